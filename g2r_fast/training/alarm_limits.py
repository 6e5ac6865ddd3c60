"""The thresholds of a training run's alarms, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..errors import InputError, InputTypeError

__all__ = ["AlarmLimits"]


@dataclass(frozen=True)
class AlarmLimits:
    """When an alarm is raised. None at a limit that may be None turns its alarm off."""

    # Steps that are averaged. A small batch has means that are off by a tenth of their value; the
    # mean of ten by a thirtieth. What drifts is compared with the first `window` steps, once
    # there are two windows that share no step.
    window: int = 10
    # Well again for this many measurements before an alarm may be raised anew: a figure that hovers
    # about its limit is one alarm, not one a step.
    calm: int = 10
    # Steps in a row beyond a limit where a figure hardly varies: each is a mean over all True items
    # of a batch already, so that this only rules out a batch with hardly any.
    in_a_row: int = 3

    # Mean entropy of alpha over log T, 1 is uniform, and mean share of its largest entry: the
    # limits of `AttributionSummary`, which looks at one batch.
    flat_entropy: float | None = 0.999
    spiked_mass: float | None = 0.9

    # A judge at chance: True to answers that deserve nothing as often as a coin says it. Not 0.5:
    # a few dozen items leave the rate uncertain by a tenth.
    coin_rate: float | None = 0.4
    # Or nearly as often as to the policy's responses: then a verdict says nothing of the response.
    # Below the floor that says nothing of the judge: a policy that fails gets few True as well.
    indifferent_ratio: float | None = 0.8
    indifferent_floor: float = 0.1

    # Canaries pass where the best of them earns this much, and no less than the policy did at the
    # start: then there is something to be gained by giving up the task.
    canary_score: float | None = 0.1
    # A rise is real beyond 4 standard errors (20 windows of a run that stands still pass 3 by luck
    # in one run of 20), and worth a word beyond a quarter of the spread between responses.
    rise_errors: float = 4.0
    rise_spread: float = 0.25
    # The held-out score must rise by this share of what the judge's reward does; a rule checker
    # and a judge do not count in the same unit, so only a small share is asked for,
    # and it must be missed by two standard errors.
    held_out_share: float | None = 0.25
    # Evaluations that are averaged: few, as they come every so many steps only.
    evaluations: int = 3

    # Mean length over its start, or its start over it. Lengths do move in honest training. The
    # drift must be beyond this by two standard errors.
    length_ratio: float | None = 1.5
    # A truncated response is judged on a fragment and never taught to end.
    truncated_share: float | None = 0.25
    # Half of the groups without spread is usual near the end; nine in ten leave one in ten of the
    # rollouts to learn from.
    spreadless_share: float | None = 0.9
    # Entropy over its start. Halving is usual; at a fifth a group's responses are nearly one.
    entropy_ratio: float | None = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value, counts = getattr(self, field.name), field.type == "int"
            if value is None and "None" in str(field.type):
                continue
            if isinstance(value, bool) or not isinstance(value, int if counts else (int, float)):
                raise InputTypeError(
                    f"the alarm limit {field.name} is not a number",
                    expected=str(field.type),
                    got=repr(value),
                )
            least = 1 if counts else 0
            if not (math.isfinite(value) and value >= least):
                raise InputError(
                    f"the alarm limit {field.name} is out of range",
                    expected=f"a number, >= {least}",
                    got=value,
                )
