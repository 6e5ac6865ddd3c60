"""GRAIL, G2RL and VIGOR: equal answers (--quick), then times against every rival."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import g2r_fast
from bench import grpo_step
from bench.conftest import Results
from bench.harness import Effort
from bench.rivals import Unavailable
from bench.signal_scenarios import RIVALS_OF, SIGNAL_SCENARIOS, SignalScenario
from bench.signal_workload import hidden_states
from bench.signals import compare_signal

TINY = SignalScenario("", "", (), model="tiny", group_size=3, prompt=12, completion=(5, 21))
# The gate compares two rounding errors in bfloat16: enough tokens, and answers, to average over.
LOW = replace(TINY, dtype="bfloat16", group_size=8, completion=(60, 90))
# Longer than one query block of the tuned rivals' attention, not a multiple of it.
LONG = replace(TINY, group_size=1, prompt=40, completion=(150, 150))
LONGEST = replace(TINY, group_size=1, completion=(4000, 4000))
LARGE = replace(TINY, group_size=64, completion=(4, 16))
ALL = {
    "plain": TINY,
    "one-completion": replace(TINY, group_size=1),
    "two-completions": replace(TINY, group_size=2),
    "64-completions": LARGE,
    "long": LONG,
    "bfloat16": LOW,
}
QUICK: dict[str, dict[str, SignalScenario]] = {
    "grail": {**ALL, "temperature": replace(TINY, temperature=0.7)},
    "g2rl": {
        **ALL,
        "temperature": replace(TINY, temperature=0.7),
        "hidden-given": replace(TINY, hidden_given=True),
        "hidden-given-bfloat16": replace(LOW, hidden_given=True),
    },
    "vigor": {
        **ALL,
        "tied": replace(TINY, model="tiny-tied"),
        "tied-bfloat16": replace(LOW, model="tiny-tied"),
        "head-alone": replace(TINY, parameters="lm_head"),
        "head-alone-bfloat16": replace(LOW, parameters="lm_head"),
    },
}
CASES = [
    pytest.param(method, case, rival, id=f"{method}-{case}-{rival}")
    for method, cases in QUICK.items()
    for case in cases
    for rival in RIVALS_OF[method]
]


def _here(method: str) -> bool:
    """In this checkout: a path that an editable install of another one adds does not count."""
    return (Path(g2r_fast.__file__).parent / f"{method}.py").is_file()


def _skip_without(methods: Iterable[str], rivals: Iterable[str]) -> None:
    """Rivals are tested where g2r_fast does not have a method yet."""
    missing = [method for method in methods if not _here(method)]
    if missing and any(rival.startswith("ours") for rival in rivals):
        pytest.skip(f"g2r_fast has no {' and no '.join(missing)}")


def _agrees(scenario: SignalScenario, rival: str) -> None:
    found = compare_signal(scenario, rivals=[rival])
    if rival in found["unavailable"]:
        pytest.skip(found["unavailable"][rival])
    assert found["rivals"].keys() == {rival}


@pytest.mark.parametrize(("method", "case", "rival"), CASES)
def test_answers_agree(method: str, case: str, rival: str) -> None:
    _skip_without([method], [rival])
    _agrees(replace(QUICK[method][case], method=method), rival)


@pytest.mark.parametrize("method", QUICK)
def test_answers_agree_at_4000_tokens(method: str) -> None:
    _skip_without([method], ["ours"])
    _agrees(replace(LONGEST, method=method), "ours")


@pytest.mark.parametrize("method", QUICK)
def test_rivals_leave_the_model_as_it_was(method: str) -> None:
    model, rollouts = replace(TINY, method=method).build()
    forward = type(model.model.layers[0].mlp.up_proj).forward
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, rival in RIVALS_OF[method].items():
        if name.startswith("ours") and not _here(method):
            continue
        try:
            rival.run(model, rollouts)
        except Unavailable:
            continue
        assert model.config._attn_implementation == "sdpa", rival.title
        assert not model.training, rival.title
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert model.model.layers[0].mlp.up_proj.forward.__func__ is forward, rival.title
        assert not model.model.norm._forward_hooks, rival.title
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_answers_are_not_degenerate() -> None:
    """Answers that differ between completions, and saliencies between tokens."""
    for method, loop in (("grail", "loop"), ("g2rl", "shortcut"), ("vigor", "loop")):
        model, rollouts = replace(TINY, method=method, completion=(20, 30)).build()
        answer = [a for a in RIVALS_OF[method][loop].run(model, rollouts) if a is not None]
        spread = torch.cat([(a - a.mean()).abs() / a.abs().mean() for a in answer])
        assert float(spread.max()) > 0.1, method


def test_a_training_step() -> None:
    """It moves the weights, leaves the head's inputs of before, and a frozen model behind."""
    model, rollouts = replace(TINY, method="g2rl").build()
    before = model.lm_head.weight.clone()
    states = hidden_states(model, rollouts)
    step = grpo_step.TrainingStep(model, rollouts)
    step()
    assert not torch.equal(before, model.lm_head.weight)
    for got, want in zip(step.hidden, states, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_step_is_compared_with_agrees(dtype: str) -> None:
    _skip_without(grpo_step.PUBLIC, ["ours"])
    found = grpo_step.measure(LOW if dtype == "bfloat16" else TINY, grpo_step.PUBLIC)
    assert found.keys() == grpo_step.PUBLIC.keys()
    assert all(one["flop_bound"] > 1 for one in found.values())


def _rivals(option: str | None, method: str) -> list[str] | None:
    """Those of `--rivals` that this method has."""
    return None if option is None else [r for r in option.split(",") if r in RIVALS_OF[method]]


@pytest.mark.full_size
@pytest.mark.parametrize("name", SIGNAL_SCENARIOS)
def test_scenario(name: str, results: Results, request: pytest.FixtureRequest) -> None:
    """Gate and paired repetitions; the table of ratios is printed at the end of the run."""
    option = request.config.getoption
    scenario = SIGNAL_SCENARIOS[name]
    rivals = _rivals(option("--rivals"), scenario.method)
    _skip_without([scenario.method], rivals or scenario.rivals)
    result = compare_signal(
        scenario,
        rivals=rivals,
        effort=Effort(option("--repetitions"), option("--slow-repetitions")),
        log=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
        name=name,
    )
    results.add("signals", name, result)


@pytest.mark.full_size
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_signals_add_to_a_step(
    dtype: str, results: Results, request: pytest.FixtureRequest
) -> None:
    _skip_without(grpo_step.PUBLIC, ["ours"])
    found: dict[str, dict[str, Any]] = grpo_step.measure(
        SignalScenario("", "", (), dtype=dtype),
        grpo_step.PUBLIC,
        effort=Effort(request.config.getoption("--repetitions"), least_seconds=0.0),
        log=lambda line: print(f"grpo step, {dtype}: {line}", file=sys.stderr, flush=True),
    )
    for method, result in found.items():
        results.add("grpo_steps", f"grpo-step-{dtype}-{method}", result)
