"""Alarms of a training run: silent while it goes well, raised in time where trouble is planted."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from g2r_fast import AttributionConfig
from g2r_fast.errors import InputError, InputTypeError
from g2r_fast.rewards import AttributionSummary
from g2r_fast.training.alarms import Alarm, AlarmLimits, Alarms

Figures = dict[str, float]
Plant = Callable[[int, Figures], None]
STEPS, ONSET = 150, 60
ROWS = 32  # responses of a step: they make the noise of its means


def quiet_run(seed: int, steps: int = STEPS, rows: int = ROWS) -> Iterator[Figures]:
    """A run that learns honestly, with the noise of small batches and a freak batch now and then.

    Reward and held-out score rise by the same course, lengths grow by a fifth, entropy halves.
    """
    rng = random.Random(seed)
    gain, floor = rng.uniform(0.0, 0.4), rng.uniform(0.1, 0.4)
    length, canaries = rng.uniform(20, 300), rng.uniform(0.0, 0.09)
    alpha, truncated = rng.uniform(0.9, 0.995), rng.uniform(0.0, 0.12)
    for step in range(1, steps + 1):
        done = 1 - math.exp(-2 * step / steps)
        reward = floor + gain * done
        freak = 1.6 if rng.random() < 0.02 else 1.0
        figures = {
            "step": float(step),
            # The mean over prompts that are easy or hard, and over their responses.
            "reward/mean": reward + rng.gauss(0, 0.3 / math.sqrt(rows / 2)),
            "reward/std": 0.25 + rng.uniform(-0.05, 0.05),
            "reward/groups_without_spread": rng.choice([0.0, 0.125, 0.25, 0.5]),
            "verdict/true_share": min(1.0, max(0.0, reward + rng.gauss(0, 0.08))),
            "attribution/entropy": 1 - (1 - alpha) * rng.lognormvariate(0, 0.3),
            "attribution/top10_mass": 0.3,
            "attribution/top1_mass": min(1.0, max(0.0, rng.gauss(0.3, 0.15))),
            "response/length": length * (1 + 0.2 * done) * freak * rng.gauss(1, 0.6 / rows**0.5),
            "response/truncated": sum(rng.random() < truncated for _ in range(rows)) / rows,
            "policy/entropy": rng.uniform(0.9, 1.1) * (1 - 0.5 * done),
            "policy/kl": 0.01 * done * rng.uniform(0.5, 2),
            "policy/loss": rng.gauss(0, 0.1),
            "seconds/step": rng.uniform(1, 2),
        }
        if step % 5 == 0:
            figures["evaluation/score"] = floor + gain * done + rng.gauss(0, 0.03)
            figures["judge/changed"] = 0.0
        if step % 25 == 1:
            figures["canaries/true_rate"] = canaries
            figures["canaries/score"] = canaries
        yield figures


def alarms_of(
    seed: int, plant: Plant | None = None, limits: AlarmLimits | None = None, rows: int = ROWS
) -> list[tuple[int, Alarm]]:
    alarms = Alarms(limits or AlarmLimits())
    found = []
    for figures in quiet_run(seed, rows=rows):
        step = int(figures["step"])
        if plant is not None and step >= ONSET:
            plant(step, figures)
        found += [(step, alarm) for alarm in alarms.of_step(figures)]
    return found


@pytest.mark.parametrize("rows", [8, ROWS])
def test_quiet_runs_are_quiet(rows: int) -> None:
    loud = {seed: found for seed in range(200) if (found := alarms_of(seed, rows=rows))}
    told = Counter(alarm.name for found in loud.values() for _, alarm in found)
    assert len(loud) <= 10, told


# --- each trouble, planted at step ONSET ----------------------------------------------------------


def course(step: int, steps: int) -> float:
    """0 at the onset, 1 from so many steps later on."""
    return min(1.0, (step - ONSET) / steps)


def flat(step: int, figures: Figures) -> None:
    figures["attribution/entropy"] = 0.9996


def spiked(step: int, figures: Figures) -> None:
    figures["attribution/top1_mass"] = 0.97


def thawed(step: int, figures: Figures) -> None:
    if "judge/changed" in figures:
        figures["judge/changed"] = 12.0


def coin(step: int, figures: Figures) -> None:
    if "canaries/true_rate" in figures:
        figures["canaries/true_rate"] = 0.55


def indifferent(step: int, figures: Figures) -> None:
    """As often True to nothing as to responses, and both seldom."""
    figures["verdict/true_share"] = 0.2
    if "canaries/true_rate" in figures:
        figures["canaries/true_rate"] = 0.21


def hole(step: int, figures: Figures) -> None:
    """One canary earns a lot, and the policy comes to earn as much."""
    figures["reward/mean"] += 0.4 * course(step, 20)
    if "canaries/score" in figures:
        figures["canaries/score"] = 0.7


def fooled(step: int, figures: Figures) -> None:
    """No canary knows the hole; the held-out score does."""
    figures["reward/mean"] += 0.3 * course(step, 30)
    if "evaluation/score" in figures:
        figures["evaluation/score"] -= 0.05 + 0.1 * course(step, 30)


def longer(step: int, figures: Figures) -> None:
    figures["response/length"] *= 1 + course(step, 20)


def shorter(step: int, figures: Figures) -> None:
    figures["response/length"] *= 1 - 0.6 * course(step, 20)


def truncated(step: int, figures: Figures) -> None:
    figures["response/truncated"] = 0.4


def spreadless(step: int, figures: Figures) -> None:
    figures["reward/groups_without_spread"] = 1.0


def collapsed(step: int, figures: Figures) -> None:
    figures["policy/entropy"] *= 0.1


def not_a_number(step: int, figures: Figures) -> None:
    figures["policy/gradient_norm"] = math.nan


TROUBLES: list[tuple[Plant, str, int, str, str]] = [
    # what is planted, the alarm, steps within which it must be there, its number, what to do
    (flat, "flat attribution", 3, "0.9996", 'tau="auto"'),
    (spiked, "mass on one token", 3, "97%", "larger tau"),
    (thawed, "judge not frozen", 5, "12 of its tensors", "optimizer"),
    (coin, "judge at chance", 25, "55%", "g2r-fast canaries"),
    (indifferent, "judge at chance", 25, "21%", "g2r-fast canaries"),
    (hole, "reward rises while canaries pass", 40, "0.7", "held-out score"),
    (fooled, "reward without held-out score", 50, "+0.", "begin again"),
    (longer, "length drift", 25, "tokens", "negative weight"),
    (shorter, "length drift", 25, "tokens", "scaled_sequence"),
    (truncated, "truncated responses", 12, "%", "Allow more tokens"),
    (spreadless, "no learning signal", 12, "%", "temperature"),
    (collapsed, "entropy collapse", 12, "nats", "learning rate"),
    (not_a_number, "not finite", 1, "policy/gradient_norm is nan", "begin anew"),
]


@pytest.mark.parametrize("plant, name, within, number, advice", TROUBLES)
def test_planted_trouble_is_raised(
    plant: Plant, name: str, within: int, number: str, advice: str
) -> None:
    raised = []
    for seed in range(20):
        found = [(step, a) for step, a in alarms_of(seed, plant) if a.name == name]
        assert len(found) <= 2, "raised once when it begins, not at every step"
        in_time = [a for step, a in found if ONSET <= step < ONSET + within]
        raised += in_time[:1]
    assert len(raised) >= 19
    for alarm in raised:
        assert number in alarm.text and advice in alarm.text
        assert alarm.text.endswith(".")


def test_no_trouble_is_taken_for_another() -> None:
    """What is planted raises its own alarm; at most the other one that says the same."""
    for plant, name, *_ in TROUBLES:
        names = Counter(alarm.name for seed in range(5) for _, alarm in alarms_of(seed, plant))
        names.pop(name)
        also = {hole: "reward without held-out score"}.get(plant)
        assert sum(n for other, n in names.items() if other != also) <= 1, (name, names)


@pytest.mark.parametrize("flat_or_spiked", [flat, spiked])
def test_a_control_is_flat_on_purpose(flat_or_spiked: Plant) -> None:
    def control(step: int, figures: Figures) -> None:
        flat_or_spiked(step, figures)
        figures["attribution/control"] = 1.0

    assert not [a for _, a in alarms_of(0, control) if "attribution" in a.text]


def test_an_honest_rise_beside_a_judge_that_withstands_canaries_is_no_alarm() -> None:
    def learns(step: int, figures: Figures) -> None:
        figures["reward/mean"] += 0.4 * course(step, 20)
        if "evaluation/score" in figures:
            figures["evaluation/score"] += 0.3 * course(step, 20)

    assert sum(bool(alarms_of(seed, learns)) for seed in range(20)) <= 1


def test_a_policy_that_fails_does_not_accuse_the_judge() -> None:
    alarms = Alarms()
    for step in range(40):
        figures = {"reward/mean": 0.01, "verdict/true_share": 0.04}
        found = alarms.of_step({"step": step, "canaries/true_rate": 0.05, **figures})
        assert found == []


@pytest.mark.parametrize("share, chance", [(0.6, False), (0.3, False), (0.24, True), (0.1, True)])
def test_a_judge_is_at_chance_where_responses_fare_no_better(share: float, chance: bool) -> None:
    alarms, found = Alarms(), []
    for _ in range(20):
        figures = {"reward/mean": 0.3, "verdict/true_share": share, "canaries/true_rate": 0.2}
        found += alarms.of_step(figures)
    assert [alarm.name for alarm in found] == ["judge at chance"] * chance


def test_a_judge_that_answers_like_a_coin_is_told_at_once_however_well_responses_fare() -> None:
    figures = {"reward/mean": 0.9, "verdict/true_share": 0.95, "canaries/true_rate": 0.45}
    (alarm,) = Alarms().of_step(figures)
    assert alarm.name == "judge at chance" and "45%" in alarm.text and "coin" in alarm.text
    assert Alarms().of_step({**figures, "canaries/true_rate": 0.35}) == []


def test_words_and_limits_are_those_of_a_single_batch() -> None:
    assert AlarmLimits().flat_entropy == AttributionSummary.FLAT
    assert AlarmLimits().spiked_mass == AttributionSummary.SPIKED
    for alpha, plant in ((torch.full((9,), 1 / 9), flat), (torch.eye(9)[0], spiked)):
        summary = AttributionSummary(AttributionConfig())
        summary.add(alpha)
        (text,) = summary.alarms()
        first, _, advice = text.replace("; ", ". ").replace(": ", ". ").partition(". ")
        ((_, alarm),) = alarms_of(0, plant)
        assert first in alarm.text and advice.split(". ")[-1] in alarm.text


# --- when an alarm is raised again, and what is remembered ---------------------------------------


def test_raised_again_only_after_it_was_gone() -> None:
    alarms = Alarms(AlarmLimits(in_a_row=1, calm=3))

    def raised(entropy: float) -> list[str]:
        return [alarm.name for alarm in alarms.of_step({"attribution/entropy": entropy})]

    assert raised(1.0) == ["flat attribution"]
    assert raised(1.0) == raised(0.9) == raised(0.9) == raised(1.0) == []  # hovers
    assert raised(0.9) == raised(0.9) == raised(0.9) == []
    assert raised(1.0) == ["flat attribution"]
    assert alarms.of_step({}) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(next(iter(quiet_run(0)))))
def test_a_figure_that_is_not_finite_is_named_and_harms_no_other(name: str, value: float) -> None:
    alarms, beside = Alarms(), Alarms()
    for figures in quiet_run(3, 70):
        bad = {**figures, name: value} if figures["step"] == 40 else figures
        without = {k: v for k, v in bad.items() if k != name} if bad is not figures else bad
        raised, as_absent = alarms.of_step(bad), beside.of_step(without)
        if bad is not figures:
            assert [alarm.name for alarm in raised] == ["not finite"]
            assert raised[0].text.startswith(f"{name} is {value}. ")
        else:
            assert raised == as_absent


def test_another_figure_that_turns_nan_is_told_as_well() -> None:
    alarms = Alarms()
    bad = {"policy/loss": math.nan, "reward/mean": 0.1}
    assert "policy/loss is nan" in alarms.of_step(bad)[0].text
    assert alarms.of_step(bad) == []
    (alarm,) = alarms.of_step({**bad, "reward/mean": math.nan})
    assert alarm.text.startswith("reward/mean is nan. It comes from the judge")


@pytest.mark.parametrize("plant", [row[0] for row in TROUBLES])
def test_a_resumed_run_raises_the_same_alarms(plant: Plant) -> None:
    for kill in (1, 9, 15, 62, 75, 110):
        alarms, found = Alarms(), []
        for figures in quiet_run(1):
            step = int(figures["step"])
            if step >= ONSET:
                plant(step, figures)
            found += [(step, alarm) for alarm in alarms.of_step(figures)]
            if step == kill:
                text = json.dumps(alarms.state(), allow_nan=False)
                alarms = Alarms()
                alarms.load(json.loads(text))
                assert json.dumps(alarms.state(), allow_nan=False) == text
        assert found == alarms_of(1, plant) and found


def test_what_is_remembered_does_not_grow() -> None:
    alarms, sizes = Alarms(), {}
    for figures in quiet_run(0, 600):
        alarms.of_step(figures)
        sizes[int(figures["step"])] = str(alarms.state()).count(",")
    assert sizes[300] == sizes[600]


def test_a_state_is_not_changed_by_the_run_that_goes_on() -> None:
    alarms = Alarms()
    steps = list(quiet_run(0, 60))
    for figures in steps[:30]:
        alarms.of_step(figures)
    state = alarms.state()
    text = json.dumps(state)
    other = Alarms()
    other.load(state)
    for figures in steps[30:]:
        alarms.of_step(figures)
        other.of_step(figures)
    assert json.dumps(state) == text


@pytest.mark.parametrize("state", [{}, {"series": 3}, {**Alarms().state(), "active": [1]}, []])
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    alarms = Alarms()
    before = alarms.state()
    with pytest.raises(InputError, match=r"Alarms\.state"):
        alarms.load(state)
    assert alarms.state() == before


# --- limits ---------------------------------------------------------------------------------------

OFF = {
    "flat_entropy": flat,
    "spiked_mass": spiked,
    "canary_score": hole,
    "held_out_share": fooled,
    "length_ratio": longer,
    "truncated_share": truncated,
    "spreadless_share": spreadless,
    "entropy_ratio": collapsed,
}


@pytest.mark.parametrize("name", OFF)
def test_a_limit_of_none_turns_its_alarm_off(name: str) -> None:
    (alarm,) = {row[1] for row in TROUBLES if row[0] is OFF[name]}
    limits = AlarmLimits(**{name: None})
    assert alarm in {found.name for _, found in alarms_of(0, OFF[name])}
    assert alarm not in {found.name for _, found in alarms_of(0, OFF[name], limits)}


def test_a_judge_at_chance_has_two_limits() -> None:
    both = AlarmLimits(coin_rate=None, indifferent_ratio=None)
    for plant in (coin, indifferent):
        assert alarms_of(0, plant) and not alarms_of(0, plant, both)


@pytest.mark.parametrize(
    "limits, error",
    [
        ({"window": 0}, InputError),
        ({"window": 2.5}, InputTypeError),
        ({"calm": None}, InputTypeError),
        ({"flat_entropy": "0.9"}, InputTypeError),
        ({"rise_errors": None}, InputTypeError),
        ({"rise_errors": -1.0}, InputError),
        ({"length_ratio": math.nan}, InputError),
        ({"truncated_share": True}, InputTypeError),
    ],
)
def test_limits_that_cannot_be(limits: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"alarm limit {next(iter(limits))} "):
        AlarmLimits(**limits)


def test_limits_are_what_a_configuration_file_can_hold() -> None:
    for field in fields(AlarmLimits):
        assert isinstance(field.default, (int, float)), field.name
