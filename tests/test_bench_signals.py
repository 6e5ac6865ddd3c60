"""Benchmarks of GRAIL, G2RL and VIGOR: rivals against the official rules, FLOPs, gate, tables."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace

import official_rules
import pytest
import torch

from bench import estimates, grpo_step, signal_memory, tables
from bench.gate import GateError, gate_tensors
from bench.grpo_step import GRPO_STEPS
from bench.rivals import Unavailable
from bench.signal_scenarios import LOOPS, RIVALS_OF, SIGNAL_SCENARIOS, SignalScenario
from bench.signal_tables import signal_table
from bench.signal_workload import hidden_states, make_rollouts
from bench.signals import compare_signal
from bench.vigor_tuned import linear_square

TINY = SignalScenario("", "vigor", (), model="tiny", group_size=3, prompt=6, completion=(15, 25))


def theirs(method):
    """Every rival but ours."""
    return [name for name in RIVALS_OF[method] if not name.startswith("ours")]


def answer(method, name, scenario):
    model, rollouts = replace(scenario, method=method).build()
    try:
        return model, rollouts, RIVALS_OF[method][name].run(model, rollouts)
    except Unavailable as error:
        pytest.skip(str(error))


# Rivals against the rules that were transcribed from the papers ----------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", theirs("grail"))
def test_saliencies_are_the_official_ones(name, temperature):
    model, rollouts, got = answer("grail", name, replace(TINY, temperature=temperature))
    prompt = rollouts.prompt.tolist()
    want = [
        official_rules.grail_saliency(model, prompt, ids, span, temperature=temperature)
        for ids, span in zip(rollouts.completion_ids, rollouts.spans, strict=True)
    ]
    gate_tensors(want, got)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", theirs("g2rl"))
def test_features_are_the_official_ones(name, given):
    scenario = replace(TINY, temperature=0.7, hidden_given=given)
    model, rollouts, got = answer("g2rl", name, scenario)
    want = []
    for states, ids in zip(hidden_states(model, rollouts), rollouts.completion_ids, strict=True):
        weight = model.lm_head.weight
        phi = official_rules.g2rl_token_features(states @ weight.T, ids, weight, temperature=0.7)
        want.append(official_rules.g2rl_feature(phi))
    gate_tensors(want, got)


@pytest.mark.parametrize("parameters", ["all", "lm_head"])
@pytest.mark.parametrize("model", ["tiny", "tiny-tied"])
@pytest.mark.parametrize("name", theirs("vigor"))
def test_norms_are_the_official_ones(name, model, parameters):
    if model == "tiny-tied" and parameters == "lm_head":
        pytest.skip("a tied head is the embedding too: its gradient takes a whole backward")
    scenario = replace(TINY, model=model, parameters=parameters)
    model, rollouts, got = answer("vigor", name, scenario)
    prompt = rollouts.prompt.tolist()
    want = [
        official_rules.vigor_norm(model, prompt, ids, parameters) for ids in rollouts.completion_ids
    ]
    gate_tensors([torch.tensor(want)], got)


def test_a_norm_by_grams_is_that_of_the_gradient():
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((3, 40, 50), (60, 8, 5), (60, 5, 8), (1, 4, 4)):
        x = torch.randn(rows, inputs, generator=generator)
        g = torch.randn(rows, outputs, generator=generator)
        want = float((g.double().T @ x.double()).square().sum())
        assert linear_square(x, g) == pytest.approx(want, rel=1e-5)


# The gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bug",
    ["scale", "swapped tokens", "zeros", "NaN", "missing", "too many", "other shape", "shifted"],
)
@pytest.mark.parametrize("method", ["grail", "g2rl", "vigor"])
def test_the_gate_catches(method, bug):
    _, _, want = answer(method, LOOPS[method], TINY)
    got = [tensor.clone() for tensor in want]
    first = got[0]
    if bug == "scale":
        first *= 1.0001
    elif bug == "swapped tokens":
        first[[0, 1]] = first[[1, 0]]
    elif bug == "zeros":
        first.zero_()
    elif bug == "NaN":
        first[0] = float("nan")
    elif bug == "missing":
        got[0] = None
    elif bug == "too many":
        got.append(first)
    elif bug == "other shape":
        got[0] = first[:-1]
    else:
        got[0] = first.roll(1)
    with pytest.raises(GateError):
        gate_tensors(want, got)
    assert gate_tensors(want, want) == {"max_relative_error": 0.0}


def test_in_low_precision_the_gate_is_twice_the_loops_error():
    truth = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    loop = [truth[0] * 1.01, truth[1] * 0.98]
    assert gate_tensors(truth, [truth[0] * 0.981, truth[1] * 1.039], loop)
    for worse in ([truth[0] * 1.021, truth[1]], [truth[0], truth[1] * 1.041]):
        with pytest.raises(GateError):
            gate_tensors(truth, worse, loop)


def test_a_wrong_rival_is_named_and_not_timed(monkeypatch):
    def wrong(model, rollouts):
        return [tensor * 1.001 for tensor in RIVALS_OF["vigor"]["loop"].run(model, rollouts)]

    rival = replace(RIVALS_OF["vigor"]["tuned_loop"], run=wrong)
    monkeypatch.setitem(RIVALS_OF["vigor"], "tuned_loop", rival)
    with pytest.raises(GateError, match="tuned_loop: answer 0: relative error"):
        compare_signal(TINY, rivals=["tuned_loop"])


# Scenarios, workloads, tables ---------------------------------------------------------------------


def test_workloads_have_their_answer_in_front_of_a_tail():
    made = make_rollouts(group_size=50, prompt=3, completion=(1, 60), vocab_size=99)
    for completion, (start, content, content_stop, stop) in zip(
        made.completions, made.spans, strict=True
    ):
        assert 0 <= start <= content < content_stop <= stop <= len(completion)
        if len(completion) >= 22:
            assert stop - start == 12 and len(completion) - stop == 10
            assert (content - start, stop - content_stop) == (2, 1)
    again = make_rollouts(group_size=50, prompt=3, completion=(1, 60), vocab_size=99)
    assert again.completion_ids == made.completion_ids


def test_every_scenario_is_measured_against_its_loop_and_the_fastest_rival():
    fastest = {"grail": "tuned_cached_loop", "g2rl": "chunked_gradient", "vigor": "tuned_loop"}
    for name, scenario in SIGNAL_SCENARIOS.items():
        least = {"ours", LOOPS[scenario.method], fastest[scenario.method]}
        assert least <= set(scenario.rivals) <= set(RIVALS_OF[scenario.method]), name
        assert name.startswith(f"{scenario.method}-{scenario.dtype}")
    every = [*SIGNAL_SCENARIOS.values(), *GRPO_STEPS.values()]
    for labels in ([s.label for s in SIGNAL_SCENARIOS.values()], [s.label for s in every[-6:]]):
        assert len(set(labels)) == len(labels) and "" not in labels
    lengths = {s.completion for s in SIGNAL_SCENARIOS.values()}
    assert {(64, 64), (4000, 4000)} <= lengths
    assert {s.group_size for s in SIGNAL_SCENARIOS.values()} == {1, 2, 8, 64}


def test_estimates_are_there_without_results(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in [*SIGNAL_SCENARIOS, *estimates.STEPS]:
        assert estimates.estimate(name).gate > 0, name


@pytest.fixture
def results(tmp_path, monkeypatch):
    """What compare_signal and a training step write, with made-up seconds."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    found = compare_signal(TINY, rivals=["loop", "tuned_loop"])
    found["rivals"]["ours"] = dict(found["rivals"]["loop"], title="g2r_fast", flop_bound=1.0)
    for name, times in (("ours", [1.0]), ("loop", [5.678]), ("tuned_loop", [2.0])):
        found["rivals"][name] |= {"seconds": times, "times_ours": round(times[0], 2)}
    found["rivals"]["ours"]["share_of_peak"] = 0.7654
    found["rivals"]["loop"]["flop_bound"] = 3.21
    found["required_gflop"]["total"] = 12.3456
    found["memory"] = {
        "loop": {"model_bytes": 12_000_000, "extra_bytes": 34_400_000},
        "ours": {"not_measured": "why"},
    }
    step = {"seconds": [10.0, 8.0]}
    parts = {"public": {"seconds": [4.0, 4.0]}, "ours": {"seconds": [0.5, 0.25]}}
    row = {"step": step, **parts, "flop_bound": 4.5, **grpo_step._figures(step, parts)}
    files = {"vigor-float32": {"vigor-float32": found}}
    files["grpo-step-float32"] = {"grpo-step-float32-g2rl": row}
    for name, scenarios in files.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"scenarios": scenarios}), encoding="utf-8")
    return found


def test_documents_tables(results):
    assert tables.render("vigor").splitlines() == [
        '<!-- from bench/results/vigor-float32.json; table "vigor" of bench/tables.py -->',
        "| | required GFLOP | g2r_fast, of peak | loop | tuned loop |",
        "|---|---|---|---|---|",
        f"| VIGOR, float32 | 12 | 77 % | 5.68 (3.21) | "
        f"2.00 ({results['rivals']['tuned_loop']['flop_bound']:.2f}) |",
    ]
    assert "| VIGOR, float32 | 12 MB | 34 MB |" in tables.render("vigor memory")
    assert tables.render("grpo step").splitlines()[3] == (
        "| G2RL, float32 | 9.00 s | 4.00 s | 0.38 s | 45.0 % | 4.1 % | 12.00 | 4.50 |"
    )
    assert tables.render("grail").startswith("<!-- from no results yet;")


def test_a_terminals_table(results):
    text = signal_table(results, "title")
    assert "12.3 GFLOP required" in text and "memory of ours: why" in text
    assert "34 MB beyond the model's 12 MB" in text
    row = next(line for line in text.splitlines() if line.startswith("loop"))
    assert "5.68x" in row and "3.21x" in row


def test_memory_is_measured_in_bytes_of_what_was_live_together():
    """40 MB at once, and 40 MB twice one after the other, are the same peak; 80 MB are not."""
    if not signal_memory.RESET.exists():
        pytest.skip("no /proc/self/clear_refs here")

    def ones():  # fresh from the system, whatever malloc has left over from other tests
        return torch.frombuffer(mmap.mmap(-1, 40_000_000), dtype=torch.float32).fill_(1.0)

    def one():
        ones().sum()

    def two():
        a, b = ones(), ones()
        (a.sum() + b.sum()).item()

    one()
    single, again, double = (
        signal_memory.peak_of(run) for run in (one, lambda: (one(), one()), two)
    )
    assert 38e6 < single < 60e6 and 38e6 < again < 60e6
    assert 78e6 < double < 100e6
