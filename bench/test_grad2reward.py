"""Grad2Reward's attribution: equal answers (--quick), then times against every rival."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.conftest import Results
from bench.harness import SCENARIOS, GateError, Scenario, compare, gate
from bench.ours import ours
from bench.rivals import RIVALS, Answer, Unavailable, loop

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


@pytest.mark.full_size
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, results: Results, request: pytest.FixtureRequest) -> None:
    """Gate and paired repetitions of a scenario; the table is printed at the end of the run."""
    option = request.config.getoption
    chosen = option("--rivals")
    result = compare(
        SCENARIOS[name],
        rivals=chosen.split(",") if chosen else None,
        repetitions=option("--repetitions"),
        slow_repetitions=option("--slow-repetitions"),
        log=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
    )
    results.add("scenarios", name, result)


@pytest.mark.full_size
@pytest.mark.parametrize("name", ["h512l8-float32-all-true", "h512l8-bfloat16-all-true"])
def test_ours_alone(name: str, benchmark: Any) -> None:
    """Ours in pytest-benchmark's own table, for --benchmark-compare across commits."""
    model, workload = SCENARIOS[name].build()
    benchmark.pedantic(ours, args=(model, workload), rounds=5)
