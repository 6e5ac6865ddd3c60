"""How long a benchmark will take: from the committed files' medians, or from what it multiplies."""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import dataclass, replace
from typing import Any

from transformers import Qwen2Config

from bench.flops import Sizes
from bench.grpo_step import GRPO_STEPS, PUBLIC, flops_of, step_file
from bench.repetitions import Effort
from bench.rivals import RIVALS
from bench.scenarios import SCENARIOS, Scenario
from bench.signal_flops import REQUIRED
from bench.signal_scenarios import LOOPS, RIVALS_OF, SIGNAL_SCENARIOS, SignalScenario
from bench.tables import results_of
from bench.workload import MODELS, make_workload

__all__ = ["STEPS", "Estimate", "efforts", "estimate"]

# One file, and one measurement, holds all signals' rows of a dtype.
STEPS = tuple(dict.fromkeys(step_file(name) for name in GRPO_STEPS))

# GFLOP/s of an ordinary rival on the two cores of README's table: for estimates, nothing else.
GUESSED_RATE = {"float32": 120.0, "bfloat16": 300.0}
# A scenario whose repetitions take no longer together is not worth cutting short.
SHORT_SECONDS = 30.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of one scenario."""

    gate: float  # every rival once, and the references
    fast: float  # one repetition of the rivals that take part in all
    slow: float  # one of the others

    def total(self, effort: Effort) -> float:
        done, elapsed = 0, 0.0
        while effort.another(done, elapsed):
            elapsed += self.fast + (self.slow if done < effort.slow_repetitions else 0.0)
            done += 1
        return self.gate + elapsed


def estimate(name: str) -> Estimate:
    """From the committed file's medians, or by token passes or FLOPs where there are none yet."""
    if name in STEPS:
        return _step_estimate(name)
    if name in SIGNAL_SCENARIOS:
        return _signal_estimate(name)
    scenario = SCENARIOS[name]
    before = (results_of(name) or {}).get("rivals", {})
    seconds = {}
    for rival in set(scenario.rivals) - _missing():
        found = before.get(rival, before.get("ours", {}) if "ours" in rival else {}).get("seconds")
        seconds[rival] = statistics.median(found) if found else _guess(scenario, rival)
    slow = sum(value for rival, value in seconds.items() if RIVALS[rival].slow)
    fast = sum(seconds.values()) - slow
    # The loop runs as the reference already; in bfloat16 there is one in float32 besides.
    extra = 2.5 * seconds["loop"] if scenario.dtype == "bfloat16" else 0.0
    return Estimate(fast + slow + extra, fast, slow)


def _missing() -> set[str]:
    """Rivals whose library is not installed."""
    return {
        name for name in ("captum", "inseq", "opacus") if importlib.util.find_spec(name) is None
    }


def _guess(scenario: Scenario, rival: str) -> float:
    shape = {key: int(value) for key, value in MODELS[scenario.model].items()}
    workload = make_workload(
        group_size=scenario.group_size,
        items=scenario.items,
        prompt=scenario.prompt,
        response=scenario.response,
        tail=scenario.tail,
        true_share=scenario.true_share,
        seed=scenario.seed,
    )
    passes = RIVALS[rival].passes(workload)
    hidden, kv = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    per_layer = hidden * (2 * hidden + 2 * kv * hidden + 3 * shape["intermediate_size"])
    tokens = passes.forward + passes.backward + passes.weights
    flops = 2 * tokens * per_layer * shape["num_hidden_layers"]
    return float(1.2 * flops / 1e9 / GUESSED_RATE[scenario.dtype])


def _signal_estimate(name: str) -> Estimate:
    scenario = SIGNAL_SCENARIOS[name]
    known, before = RIVALS_OF[scenario.method], (results_of(name) or {}).get("rivals", {})
    sizes, rollouts = (
        _sizes(scenario.model),
        scenario.rollouts(MODELS[scenario.model]["vocab_size"]),
    )
    if scenario.hidden_given:
        rollouts = replace(rollouts, hidden=rollouts.completions)  # counted by their lengths
    required = sum(REQUIRED[scenario.method](sizes, rollouts).values())
    seconds = {}
    for rival in set(scenario.rivals) - _missing():
        found = before.get(rival, {}).get("seconds")
        count = known[rival].flops
        flops = required if count is None else count(sizes, rollouts)
        guess = flops / 1e9 / GUESSED_RATE[scenario.dtype]
        seconds[rival] = statistics.median(found) if found else guess
    slow = sum(value for rival, value in seconds.items() if known[rival].slow)
    fast = sum(seconds.values()) - slow
    loop = seconds[LOOPS[scenario.method]]
    gate = fast + slow + (2.5 * loop if scenario.dtype == "bfloat16" else 0.0)
    if scenario.memory:
        gate += seconds["ours"] + loop
    return Estimate(gate + fast + slow, 0.0, 0.0) if scenario.once else Estimate(gate, fast, slow)


def _step_estimate(name: str) -> Estimate:
    """The gate takes what both ways do, and the loop once or twice."""
    dtype = name.rpartition("-")[2]
    scenario = SignalScenario("", "", (), dtype=dtype)
    sizes, rollouts = (
        _sizes(scenario.model),
        scenario.rollouts(MODELS[scenario.model]["vocab_size"]),
    )
    flops = [flops_of(method, sizes, rollouts) for method in PUBLIC]
    added = sum(one["public"] + one["ours"] for one in flops)
    rate = 1e9 * GUESSED_RATE[dtype]
    return Estimate(2.5 * added / rate, (flops[0]["step"] + added) / rate, 0.0)


def _sizes(model: str) -> Sizes:
    shape: dict[str, Any] = dict(MODELS[model])
    return Sizes.of(Qwen2Config(**shape))


def efforts(chosen: list[str], plain: Effort, minutes: float) -> dict[str, Effort]:
    """What a budget leaves to each scenario, in proportion to what it would take; gates, slow
    rivals, two repetitions of the others and short scenarios are done whatever the budget."""
    estimates = {name: estimate(name) for name in chosen}
    least = {n: e.total(replace(plain, most_seconds=0.0)) for n, e in estimates.items()}
    wanted = {n: e.total(plain) - least[n] for n, e in estimates.items()}
    short = {n for n, e in estimates.items() if e.total(plain) - e.gate <= SHORT_SECONDS}
    spare = 60 * minutes - sum(least.values()) - sum(wanted[n] for n in short)
    share = max(0.0, spare) / max(1e-9, sum(wanted[n] for n in chosen if n not in short))
    return {
        n: plain
        if n in short
        else replace(plain, most_seconds=least[n] - e.gate + share * wanted[n])
        for n, e in estimates.items()
    }
