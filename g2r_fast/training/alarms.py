"""What is wrong with a training run, from its figures alone, and what to do about it.

An alarm is raised once, when its trouble begins, and again after the trouble was gone for a while.
All that alarms remember is in `Alarms.state()`, so that a resumed run raises those that a run
that was never killed would raise. No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from ..errors import InputError
from .alarm_limits import AlarmLimits

__all__ = ["Alarm", "AlarmLimits", "Alarms"]


@dataclass(frozen=True)
class Alarm:
    """text: what is wrong, with its number, and what to do about it."""

    name: str
    text: str


_NO_LIMIT_GIVEN = AlarmLimits()

_TRACKED = (
    "attribution/entropy",
    "attribution/top1_mass",
    "verdict/true_share",
    "reward/mean",
    "reward/std",
    "reward/groups_without_spread",
    "canaries/true_rate",
    "canaries/score",
    "response/length",
    "response/truncated",
    "policy/entropy",
)


class _Series:
    """The first and the latest values of one figure, and how many there were."""

    def __init__(self, first: Sequence[float] = (), recent: Sequence[float] = ()) -> None:
        self.first, self.recent, self.count = list(first), list(recent), 0

    def add(self, value: float, first: int, recent: int) -> None:
        if self.count < first:
            self.first.append(value)
        self.recent = [*self.recent, value][-recent:]
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"first": list(self.first), "recent": list(self.recent), "count": self.count}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> _Series:
        series = cls(state["first"], state["recent"])
        series.count = int(state["count"])
        return series


class Alarms:
    """The alarms of one run: `of_step` takes the figures of each step, in order."""

    def __init__(self, limits: AlarmLimits = _NO_LIMIT_GIVEN) -> None:
        self.limits = limits
        self._series = {name: _Series() for name in _TRACKED}
        # Per evaluation: mean reward since the one before, and held-out score.
        self._rewards, self._scores = _Series(), _Series()
        self._since: list[float] = [0.0, 0]  # rewards since the last evaluation: sum, count
        self._active: dict[str, int] = {}  # alarm -> measurements without trouble since

    def of_step(self, figures: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin at this step. A figure that is absent changes nothing."""
        finite = {name: float(v) for name, v in figures.items() if math.isfinite(v)}
        alarms = self._not_finite(figures)
        self._remember(finite)
        control = finite.get("attribution/control") == 1.0
        for name, needs, look in _RULES:
            if needs in finite and not (control and needs.startswith("attribution/")):
                text = look(self, finite)
                if self._begins(name, text is not None) and text is not None:
                    alarms.append(Alarm(name, text))
        return alarms

    def state(self) -> dict[str, Any]:
        """All that was remembered, in JSON types."""
        return {
            "series": {name: series.state() for name, series in self._series.items()},
            "evaluations": [self._rewards.state(), self._scores.state()],
            "since_evaluation": list(self._since),
            "active": dict(self._active),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave. Raises InputError for anything else."""
        try:
            series = {name: _Series.of_state(state["series"][name]) for name in _TRACKED}
            rewards, scores = map(_Series.of_state, state["evaluations"])
            total, count = state["since_evaluation"]
            active = {str(name): int(calm) for name, calm in state["active"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "the state of the alarms cannot be read",
                expected="what Alarms.state() gave in this version",
                got=f"{type(error).__name__}: {error}",
            ) from error
        self._series, self._rewards, self._scores = series, rewards, scores
        self._since, self._active = [total, count], active

    def _remember(self, finite: Mapping[str, float]) -> None:
        window = max(self.limits.window, self.limits.in_a_row)
        for name, series in self._series.items():
            if name in finite:
                series.add(finite[name], self.limits.window, window)
        if "reward/mean" in finite:
            self._since[0] += finite["reward/mean"]
            self._since[1] += 1
        if "evaluation/score" in finite and self._since[1]:
            few = self.limits.evaluations
            self._rewards.add(self._since[0] / self._since[1], few, 2 * few)
            self._scores.add(finite["evaluation/score"], few, 2 * few)
            self._since = [0.0, 0]

    def _begins(self, name: str, trouble: bool) -> bool:
        if trouble:
            begins = name not in self._active
            self._active[name] = 0
            return begins
        if name in self._active:
            self._active[name] += 1
            if self._active[name] >= self.limits.calm:
                del self._active[name]
        return False

    def _not_finite(self, figures: Mapping[str, float]) -> list[Alarm]:
        bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
        begin = [name for name in figures if self._begins(f"not finite: {name}", name in bad)]
        if not begin:
            return []
        named = ", ".join(f"{name} is {float(bad[name])}" for name in begin)
        return [Alarm("not finite", f"{named}. {_advice_for(begin)}")]

    # --- each returns its text where there is trouble ---------------------------------------------

    def _flat(self, _: Mapping[str, float]) -> str | None:
        entropy = self._steadily("attribution/entropy", self.limits.flat_entropy)
        if entropy is None:
            return None
        return (
            f"attribution is flat: every token gets the same reward (entropy {entropy:.4f} of 1). "
            'A sure judge sends almost no gradient back; use tau="auto" or objective="logodds" '
            "with a small tau."
        )

    def _spiked(self, _: Mapping[str, float]) -> str | None:
        mass = self._steadily("attribution/top1_mass", self.limits.spiked_mass)
        if mass is None:
            return None
        return (
            f"attribution lies on one token per item, which has {mass:.0%} of it: use a larger "
            "tau, or look at whether the judge is being gamed."
        )

    def _changed(self, finite: Mapping[str, float]) -> str | None:
        changed = finite["judge/changed"]
        if changed == 0:
            return None
        return (
            f"the judge is not frozen: {changed:.0f} of its tensors are no longer what they were "
            "when the run began, so rewards and KL are measured with another ruler than before. "
            "Give the optimizer the policy's parameters only, keep the judge in a model of its own "
            'or under LoRA with adapters="off", and start again from a checkpoint before the '
            "change."
        )

    def _chance(self, _: Mapping[str, float]) -> str | None:
        if not self._series["canaries/true_rate"].recent:
            return None
        limits, rate = self.limits, self._series["canaries/true_rate"].recent[-1]
        if limits.coin_rate is not None and rate >= limits.coin_rate:
            how = f"True to {rate:.0%} of answers that deserve nothing, about as often as a coin"
        else:
            shares = self._series["verdict/true_share"]
            ratio = limits.indifferent_ratio
            if ratio is None or shares.count < limits.window or rate < limits.indifferent_floor:
                return None
            share = fmean(shares.recent[-limits.window :])
            if rate < ratio * share:
                return None
            how = (
                f"True to {rate:.0%} of answers that deserve nothing, and to {share:.0%} of the "
                "policy's items"
            )
        return (
            f"the judge is at chance on canaries: it says {how}. Its reward says little about "
            "the responses. Stop; see with `g2r-fast canaries` which answers pass, then mend the "
            "rubric items, try another scaffold or other verdict words, or take a better judge."
        )

    def _hole(self, finite: Mapping[str, float]) -> str | None:
        limits, reward = self.limits, self._series["reward/mean"]
        paid = self._series["canaries/score"].recent
        if limits.canary_score is None or not paid or not self._two_windows("reward/mean"):
            return None
        early, late = reward.first, reward.recent[-limits.window :]
        start = fmean(early)
        rises = self._is_rise(
            fmean(late) - start, _standard_error(early, reward.recent, count=limits.window)
        )
        if paid[-1] < max(limits.canary_score, start) or not rises:
            return None
        return (
            f"reward rises while canaries pass: it went from {start:.3g} to {fmean(late):.3g}, and "
            f"one and the same worthless answer to every prompt earns {paid[-1]:.3g}. The policy "
            f"may be learning that hole{self._length_so_far()}. Read the best-paid responses of "
            "this step, see with `g2r-fast canaries` which answer it is, mend rubric or judge "
            "before you go on, and believe the held-out score only."
        )

    def _unconfirmed(self, _: Mapping[str, float]) -> str | None:
        limits, few = self.limits, self.limits.evaluations
        if limits.held_out_share is None or self._scores.count < 2 * few:
            return None
        # Since the start, and since the evaluations just before: a policy may learn the task first
        # and the hole later.
        for rewards, scores in (
            (self._rewards.first, self._scores.first),
            (self._rewards.recent[:few], self._scores.recent[:few]),
        ):
            rise = fmean(self._rewards.recent[-few:]) - fmean(rewards)
            held_out = fmean(self._scores.recent[-few:]) - fmean(scores)
            if not self._is_rise(
                rise, _standard_error(self._rewards.first, self._rewards.recent, count=few)
            ):
                continue
            error = _standard_error(self._scores.first, self._scores.recent, count=few)
            if held_out + 2 * error < limits.held_out_share * rise:
                return (
                    f"the judge's reward rises and the held-out score does not: {rise:+.3g} "
                    f"against {held_out:+.3g}. What the policy learns pleases the judge alone"
                    f"{self._length_so_far()}. Read the best-paid responses, and begin "
                    "again with a mended rubric or judge, a lower learning rate, or a KL term that "
                    "holds the policy closer."
                )
        return None

    def _length(self, _: Mapping[str, float]) -> str | None:
        limit, lengths = self.limits.length_ratio, self._series["response/length"]
        if limit is None or not self._two_windows("response/length"):
            return None
        start, now = median(lengths.first), median(lengths.recent[-self.limits.window :])
        logs = [[math.log(max(x, 1.0)) for x in part] for part in (lengths.first, lengths.recent)]
        drift = abs(math.log(max(now, 1.0) / max(start, 1.0)))
        if drift - 2 * _standard_error(*logs, count=self.limits.window) <= math.log(limit):
            return None
        told = f"length drift: responses went from {start:.4g} to {now:.4g} tokens"
        if now > start:
            return (
                f"{told}. The judge may pay for length: look at what was added; use an estimator "
                'without a ramp ("rewards_pooled", "scaled_sequence"), a rubric item of negative '
                "weight for padding, or a KL term."
            )
        return (
            f"{told}. Short responses may be what the judge pays for, or what a ramp along the "
            "response favours: read some, look at the canaries, and use an estimator without a "
            'ramp ("rewards_pooled", "scaled_sequence") or a KL term.'
        )

    def _truncated(self, _: Mapping[str, float]) -> str | None:
        share = self._beyond("response/truncated", self.limits.truncated_share)
        if share is None:
            return None
        return (
            f"{share:.0%} of the responses are cut off at the limit: they are judged on a fragment "
            "and never taught to end. Allow more tokens, or set mask_truncated."
        )

    def _spreadless(self, _: Mapping[str, float]) -> str | None:
        share = self._beyond("reward/groups_without_spread", self.limits.spreadless_share)
        if share is None:
            return None
        true = self._series["verdict/true_share"].recent
        if not true:
            advice = "Use prompts or rubrics that tell responses apart"
        elif fmean(true) > 0.5:
            advice = "Most items are met: use harder prompts or stricter rubric items"
        else:
            advice = "Hardly any item is met: use easier prompts or rubric items, or a better start"
        return (
            f"no learning signal: in {share:.0%} of the groups all responses earn the same. "
            f"{advice}, more responses per prompt, or a higher sampling temperature."
        )

    def _collapsed(self, _: Mapping[str, float]) -> str | None:
        limit, entropies = self.limits.entropy_ratio, self._series["policy/entropy"]
        if limit is None or not self._two_windows("policy/entropy"):
            return None
        start, now = fmean(entropies.first), fmean(entropies.recent[-self.limits.window :])
        if now >= limit * start:
            return None
        return (
            f"the policy's entropy collapsed, from {start:.3g} to {now:.3g} nats a token: the "
            "responses of a group are nearly one and the same. Begin again with a "
            "lower learning rate, a KL term, or divide_by_std=False."
        )

    # --- what they have in common -----------------------------------------------------------------

    def _two_windows(self, name: str) -> bool:
        return self._series[name].count >= 2 * self.limits.window

    def _steadily(self, name: str, limit: float | None) -> float | None:
        """The latest value, where it and those before it are all above the limit."""
        last = self._series[name].recent[-self.limits.in_a_row :]
        full = len(last) == self.limits.in_a_row
        return last[-1] if limit is not None and full and min(last) > limit else None

    def _beyond(self, name: str, limit: float | None) -> float | None:
        """The mean of the last window, where that is no less than the limit."""
        last = self._series[name].recent[-self.limits.window :]
        if limit is None or len(last) < self.limits.window:
            return None
        return fmean(last) if fmean(last) >= limit else None

    def _is_rise(self, rise: float, error: float) -> bool:
        spread = self._series["reward/std"].first
        least = self.limits.rise_spread * fmean(spread) if spread else 0.0
        return rise > self.limits.rise_errors * error and rise >= least

    def _length_so_far(self) -> str:
        lengths = self._series["response/length"]
        if not lengths.recent:
            return ""
        return f" (length {lengths.first[0]:.4g} at first, {lengths.recent[-1]:.4g} now)"


# In the order they are told. A rule is asked at the steps that have its figure.
_RULES: tuple[tuple[str, str, Callable[[Alarms, Mapping[str, float]], str | None]], ...] = (
    ("flat attribution", "attribution/entropy", Alarms._flat),
    ("mass on one token", "attribution/top1_mass", Alarms._spiked),
    ("judge not frozen", "judge/changed", Alarms._changed),
    ("judge at chance", "reward/mean", Alarms._chance),
    ("reward rises while canaries pass", "reward/mean", Alarms._hole),
    ("reward without held-out score", "evaluation/score", Alarms._unconfirmed),
    ("length drift", "response/length", Alarms._length),
    ("truncated responses", "response/truncated", Alarms._truncated),
    ("no learning signal", "reward/groups_without_spread", Alarms._spreadless),
    ("entropy collapse", "policy/entropy", Alarms._collapsed),
)


def _standard_error(*parts: Sequence[float], count: int) -> float:
    """Of the difference of two means of `count` values: `sqrt(2/count * mean(diff(x)^2) / 2)`.

    From successive differences within each part, which a steady rise hardly enters.
    """
    squares = [(b - a) ** 2 for part in parts for a, b in pairwise(part)]
    return math.sqrt(fmean(squares) / count) if squares else math.inf


def _advice_for(names: Sequence[str]) -> str:
    parts = {name.partition("/")[0] for name in names}
    if "policy" in parts:
        return (
            "An update whose gradient is not finite was left out; if it comes again, begin anew "
            "with a lower learning rate or a smaller limit of the gradient's norm."
        )
    if parts & {"reward", "verdict", "attribution", "canaries"}:
        return (
            "It comes from the judge: stop, load it in bfloat16 or float32 instead of float16, and "
            "look at the rubric weights of this step's prompts."
        )
    return "It is no figure of the judge or the update: look at how it is computed."
