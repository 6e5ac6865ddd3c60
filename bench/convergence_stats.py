"""What bench/convergence.py makes of its curves: finals, steps to a target, intervals, noise floor.

A curve is a run's held-out scores by step. Curves of an arm are in the order of their seeds, and
two arms are compared seed by seed, over the seeds that both have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.convergence_arms import ALIKE, ARMS, BASES, PLAIN

__all__ = ["interval", "noise_floor", "ratio", "smoothed", "spread", "steps_to", "summary"]

Curves = Mapping[str, Sequence[dict[str, Any]]]  # by arm, then by seed

SHARE = 0.9  # of plain GRPO's gain
LAST = 3  # evaluations that make a final score
FLAT = 0.9995  # an entropy of 1.000: attribution that is uniform to three digits
# Student's t at 97.5 %, by degrees of freedom from 1 on.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def smoothed(scores: Sequence[float]) -> list[float]:
    """Means of three neighbours, so that no lucky evaluation is an answer; the start as it is.

    The start is known and no part of learning. At the end there are two neighbours.
    """
    means = [statistics.fmean(scores[i - 1 : i + 2]) for i in range(1, len(scores))]
    return [scores[0], *means]


def steps_to(target: float, steps: Sequence[int], scores: Sequence[float]) -> float | None:
    """Where the smoothed curve first reaches the target; None: never. Linear in between."""
    curve = smoothed(scores)
    for i, value in enumerate(curve):
        if value >= target:
            if i == 0:
                return float(steps[0])
            part = (target - curve[i - 1]) / (value - curve[i - 1])
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return None


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def student(degrees: int) -> float:
    """Beyond the table its last value, which is too large by 4 % at most."""
    return T[min(degrees, len(T)) - 1]


def ratio(
    plain: Sequence[float | None], arm: Sequence[float | None]
) -> tuple[float, float, float] | None:
    """Geometric mean of plain / arm over seeds in pairs, with the t interval of its logarithm.

    None where a run of either never got there, or began there: there is no number to divide.
    """
    logs = []
    for a, b in zip(plain, arm, strict=False):
        if not a or not b:
            return None
        logs.append(math.log(a / b))
    low_to_high = interval(logs)
    return (math.exp(low_to_high[0]), math.exp(low_to_high[1]), math.exp(low_to_high[2]))


def mean_curve(of_arm: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Steps, and mean scores over seeds."""
    steps = of_arm[0]["steps"]
    if any(curve["steps"] != steps for curve in of_arm):
        raise RuntimeError("runs of one arm were evaluated at different steps")
    return steps, [statistics.fmean(at) for at in zip(*(c["scores"] for c in of_arm), strict=True)]


def target_of(plain: Sequence[dict[str, Any]]) -> float:
    """90 % of the way from plain GRPO's start to the best of its mean curve, smoothed."""
    _, scores = mean_curve(plain)
    gain = max(smoothed(scores)) - scores[0]
    if gain <= 0:
        raise RuntimeError(
            f"plain GRPO gains nothing: its mean score starts at {scores[0]:.3f} and is never "
            "higher, so there is no gain to reach 90 % of. Other settings, or more steps?"
        )
    return scores[0] + SHARE * gain


def summary(curves: Curves) -> dict[str, dict[str, Any]]:
    """Of every arm: scores, differences to GRPO and to both bases, steps to 90 % of GRPO's gain."""
    target = target_of(curves[PLAIN])
    final = final_scores(curves)
    reached = {
        arm: [steps_to(target, curve["steps"], curve["scores"]) for curve in of_arm]
        for arm, of_arm in curves.items()
    }
    by_mean = {arm: steps_to(target, *mean_curve(of_arm)) for arm, of_arm in curves.items()}
    floor = noise_floor(curves)
    found = {}
    for arm, of_arm in curves.items():
        there = [steps for steps in reached[arm] if steps is not None]
        by_ratio = ratio(reached[PLAIN], reached[arm])
        peaks = [max(smoothed(curve["scores"])) for curve in of_arm]
        found[arm] = {
            "arm": arm,
            "label": ARMS[arm].label,
            "base": ARMS[arm].base,
            "change": ARMS[arm].change,
            "settings": ARMS[arm].settings,
            "seeds": len(of_arm),
            "start_score": round(statistics.fmean(c["scores"][0] for c in of_arm), 4),
            "target_score": round(target, 4),
            "peak_score": _rounded(interval(peaks)),
            "final_score": _rounded(interval(final[arm])),
            "final_minus": {
                other: _rounded(interval(_differences(final[arm], final[other])))
                for other in (PLAIN, *BASES)
                if other in curves and other != arm
            },
            "noise_floor": _half_width(floor, len(of_arm)),
            "steps_to_target": [_tenths(steps) for steps in reached[arm]],
            "never_reached": len(of_arm) - len(there),
            "median_steps_of_those_which_reached": (
                _tenths(statistics.median(there)) if there else None
            ),
            "steps_of_the_mean_curve": _tenths(by_mean[arm]),
            "grpo_steps_over_its": None if by_ratio is None else _rounded(by_ratio, 2),
            **{
                name: round(statistics.fmean(curve[name] for curve in of_arm), 4)
                for name in ("reward_first", "reward_last", "length_last", "truncated_last")
            },
            "means": {
                name: round(statistics.fmean(curve["means"][name] for curve in of_arm), 4)
                for name in of_arm[0]["means"]
            },
            "curves": list(of_arm),
        }
    return found


def final_scores(curves: Curves) -> dict[str, list[float]]:
    return {
        arm: [statistics.fmean(curve["scores"][-LAST:]) for curve in of_arm]
        for arm, of_arm in curves.items()
    }


def spread(values: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Standard deviation between arms within a seed, pooled over seeds; degrees of freedom."""
    squares, degrees = 0.0, 0
    for seed in range(max(map(len, values.values()))):
        of_seed = [of_arm[seed] for of_arm in values.values() if seed < len(of_arm)]
        squares += statistics.pvariance(of_seed) * len(of_seed)
        degrees += len(of_seed) - 1
    return math.sqrt(squares / degrees), degrees


def noise_floor(curves: Curves) -> dict[str, Any] | None:
    """How far arms lie apart that are one arm up to rounding: what no difference can go below.

    Arms of `ALIKE` whose attribution is flat to three digits. Their first steps are the same; a
    rounding then makes one response another, and from there on they are different runs of the same
    thing. None where fewer than two of them are that flat.
    """
    flat = {
        arm: curves[arm]
        for arm in ALIKE
        if arm in curves and min(map(_entropy, curves[arm])) >= FLAT
    }
    if len(flat) < 2:
        return None
    final = final_scores(flat)
    deviation, degrees = spread(final)
    means = {
        f"{one} and {other}": statistics.fmean(_differences(final[one], final[other]))
        for i, one in enumerate(final)
        for other in list(final)[:i]
    }
    farthest = max(means, key=lambda pair: abs(means[pair]))
    return {
        "arms": list(flat),
        "lowest_entropy": round(min(min(map(_entropy, c)) for c in flat.values()), 6),
        "standard_deviation": round(deviation, 5),
        "degrees_of_freedom": degrees,
        "farthest": farthest,
        "farthest_difference": round(means[farthest], 4),
    }


def _entropy(curve: dict[str, Any]) -> float:
    return float(curve["means"]["attribution/entropy"])


def _half_width(floor: dict[str, Any] | None, seeds: int) -> float | None:
    """95 % of differences between two arms that are alike, of so many seeds each, are within ±."""
    if floor is None:
        return None
    t = student(floor["degrees_of_freedom"])
    return round(t * floor["standard_deviation"] * math.sqrt(2 / seeds), 4)


def _differences(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, others, strict=False)]


def _tenths(steps: float | None) -> float | None:
    return None if steps is None else round(steps, 1)


def _rounded(values: tuple[float, float, float], digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values]
