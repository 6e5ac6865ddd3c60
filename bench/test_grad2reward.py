"""Grad2Reward's attribution: equal answers (--quick), then times against every rival."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.conftest import Results
from bench.gate import GateError, gate
from bench.harness import Effort, compare
from bench.rivals import RIVALS, Answer, Unavailable, loop
from bench.scenarios import SCENARIOS, Scenario

TINY = Scenario(model="tiny", group_size=3, items=3, prompt=12, response=(5, 21), tail=4)
QUICK: dict[str, Scenario] = {
    "all-true": TINY,
    "half-true": replace(TINY, true_share=0.5),
    # one True item in nine: two responses have none, and their backward must not be entered
    "rarely-true": replace(TINY, true_share=0.11),
    "none-true": replace(TINY, true_share=0.0),
    "one-item": replace(TINY, items=1),
    # longer than one query block of the tuned rival's attention, not a multiple of it
    "long": replace(TINY, group_size=1, items=2, prompt=40, response=(150, 150)),
    # The gate compares two rounding errors, which needs enough tokens to average over: at 5-21
    # tokens honest rivals exceed twice the loop's error in 1-5 % of items (up to 3.3 times), at
    # 60-90 tokens in none of 108 (at most 1.64 times).
    "bfloat16": replace(TINY, dtype="bfloat16", response=(60, 90)),
}


def _answer(name: str, scenario: Scenario) -> tuple[Answer, Answer, Answer | None]:
    """(reference, the rival's answer, the same-dtype loop where it is not the reference)."""
    model, workload = scenario.build()
    same_dtype_loop = None
    reference = loop(model, workload)
    if model.dtype != torch.float32:
        same_dtype_loop = reference
        reference = loop(scenario.build()[0].float(), workload)
    return reference, RIVALS[name].run(model, workload), same_dtype_loop


@pytest.mark.parametrize("case", QUICK)
@pytest.mark.parametrize("name", RIVALS)
def test_answers_agree(name: str, case: str) -> None:
    try:
        reference, got, same_dtype_loop = _answer(name, QUICK[case])
    except Unavailable as error:
        pytest.skip(str(error))
    gate(reference, got, same_dtype_loop)


@pytest.mark.parametrize(
    "bug", ["scale", "swapped tokens", "zeros", "NaN", "missing item", "False item's log p"]
)
def test_the_gate_catches(bug: str) -> None:
    model, workload = QUICK["half-true"].build()
    reference = loop(model, workload)
    values, logps = [v if v is None else v.clone() for v in reference[0]], reference[1].clone()
    first = next(v for v in values if v is not None)
    if bug == "scale":
        first *= 1.0001
    elif bug == "swapped tokens":
        first[[0, 1]] = first[[1, 0]]
    elif bug == "zeros":
        first.zero_()
    elif bug == "NaN":
        first[0] = float("nan")
    elif bug == "missing item":
        values[next(i for i, v in enumerate(values) if v is not None)] = None
    else:
        logps[next(i for i, v in enumerate(values) if v is None)] *= 1.001
    with pytest.raises(GateError):
        gate(reference, (values, logps))


def test_rivals_leave_the_model_as_it_was() -> None:
    model, workload = TINY.build()
    before = loop(model, workload)
    forward = type(model.model.layers[0].mlp.up_proj).forward
    for rival in RIVALS.values():
        try:
            rival.run(model, workload)
        except Unavailable:
            continue
        assert model.config._attn_implementation == "sdpa", rival.title
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert model.model.layers[0].mlp.up_proj.forward.__func__ is forward, rival.title
    after = loop(model, workload)
    assert all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(before[0], after[0], strict=True)
    )


def test_random_weights_are_not_degenerate() -> None:
    """Far from saturation (1 - p > 0.05), and attributions that differ between items."""
    model, workload = TINY.build()
    values, logps = loop(model, workload)
    assert float(logps.exp().max()) < 0.95
    first, second = values[0], values[1]
    assert first is not None and second is not None
    assert float((first - second).norm() / first.norm()) > 0.1


class _Clock:
    """Shows the time that passes by `spend` alone."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


CLOCK = _Clock()
FAILED: dict[str, GateError] = {}  # scenarios whose gate was red in this run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per scenario and rival."""
    if "measured" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--rivals")
        cases = [
            pytest.param(name, rival, marks=pytest.mark.benchmark(group=name, timer=CLOCK))
            for name, scenario in SCENARIOS.items()
            for rival in (chosen.split(",") if chosen else scenario.rivals)
        ]
        metafunc.parametrize(("measured", "rival"), cases, indirect=["measured"])


@pytest.fixture
def measured(request: pytest.FixtureRequest, results: Results) -> dict[str, Any]:
    """Gate and paired, interleaved repetitions of all rivals of a scenario, once for all of its
    benchmarks; the tables of ratios are printed at the end of the run."""
    name: str = request.param
    if (done := results.find("scenarios", name)) is not None:
        return done
    if name in FAILED:
        raise FAILED[name]
    option = request.config.getoption
    chosen = option("--rivals")
    try:
        result = compare(
            SCENARIOS[name],
            rivals=chosen.split(",") if chosen else None,
            effort=Effort(option("--repetitions"), option("--slow-repetitions")),
            log=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
        )
    except GateError as error:
        FAILED[name] = error
        raise
    results.add("scenarios", name, result)
    return result


@pytest.mark.full_size
def test_scenario(measured: dict[str, Any], rival: str, benchmark: Any) -> None:
    """A rival's repetitions as pytest-benchmark reports them, whose clock runs by what they took:
    left to itself it would time one rival after the other, on a machine that drifts meanwhile."""
    if rival in measured["unavailable"]:
        benchmark.skipped = True
        pytest.skip(measured["unavailable"][rival])
    entry = measured["rivals"][rival]
    benchmark.extra_info |= {
        key: entry[key] for key in ("times_ours", "share_of_peak", "max_relative_error")
    }
    seconds = iter(entry["seconds"])
    benchmark.pedantic(lambda: CLOCK.spend(next(seconds)), rounds=len(entry["seconds"]))
