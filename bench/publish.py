"""Measure every scenario and rewrite bench/results/ and the documents' tables from it.

    python -m bench.publish                  # everything; says first how long it will take
    python -m bench.publish --only bfloat16  # scenarios with that in their name
    python -m bench.publish --minutes 60     # more repetitions where they are long
    python -m bench.publish --tables         # no measurement: the tables from the files there are

One file per scenario, written when it is finished; what was not measured keeps its file. On a busy
machine two OpenMP threads wait for each other and wall times are worthless: nothing starts while
the load is above --load. Nor is a scenario published whose gate is red, or that would measure
g2r_fast without its compiled kernels, unless --reference says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.facts import facts, native_kernels, save
from bench.gate import GateError
from bench.harness import Effort, compare
from bench.rivals import RIVALS
from bench.scenarios import SCENARIOS, Scenario
from bench.tables import documents, result_name, results_of, table
from bench.workload import MODELS, make_workload

ROOT = Path(__file__).resolve().parents[1]

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
    """From the committed file's medians, or by token passes where there are none yet."""
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
    return {name for name in ("captum", "inseq") if importlib.util.find_spec(name) is None}


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


def write_tables() -> list[str]:
    """Rewrite the documents; the names of those that changed."""
    changed = []
    for path, text in documents(ROOT).items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path.relative_to(ROOT).as_posix())
    return changed


def _wait_for_quiet(load: float) -> None:
    while os.getloadavg()[0] > load:
        print(f"load {os.getloadavg()[0]:.2f} > {load}: waiting", file=sys.stderr, flush=True)
        time.sleep(15)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="TEXT", help="comma-separated parts of scenario names")
    parser.add_argument("--minutes", type=float, default=25.0, help="time budget (25)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--slow-repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--load", type=float, default=1.5, help="wait while the load is higher")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and end")
    parser.add_argument("--tables", action="store_true", help="only rewrite the documents' tables")
    parser.add_argument("--reference", action="store_true", help="publish without native kernels")
    arguments = parser.parse_args()
    if arguments.tables:
        print("rewritten:", ", ".join(write_tables()) or "nothing to change")
        return
    parts = arguments.only.split(",") if arguments.only else [""]
    chosen = [name for name in SCENARIOS if any(part in name for part in parts)]
    if not chosen:
        parser.error(f"--only matches none of {', '.join(SCENARIOS)}")
    plain = Effort(arguments.repetitions, arguments.slow_repetitions)
    plan = efforts(chosen, plain, arguments.minutes)
    expected = {name: estimate(name).total(plan[name]) for name in chosen}
    for name, seconds in expected.items():
        print(f"{name:<32}{seconds / 60:6.1f} min", file=sys.stderr)
    total = sum(expected.values())
    print(f"{'together, roughly':<32}{total / 60:6.1f} min", file=sys.stderr, flush=True)
    if arguments.estimate:
        return
    torch.set_num_threads(arguments.threads)
    print(f"native kernels: {native_kernels()}", file=sys.stderr, flush=True)
    _wait_for_quiet(arguments.load)
    refused = []
    for name in chosen:
        about = facts()
        try:
            result = compare(
                SCENARIOS[name],
                effort=plan[name],
                log=partial(print, f"{name}:", file=sys.stderr, flush=True),
            )
        except GateError as error:
            refused.append(f"{name}: {error}")
            continue
        if not result["backend"].startswith("native") and not arguments.reference:
            refused.append(f"{name}: ours ran on {result['backend']}; --reference publishes that")
            continue
        print(table(result, name), flush=True)
        content = {"facts": about, "scenarios": {name: result}}
        print(f"saved {save(result_name(name), content)}", flush=True)
    print("rewritten:", ", ".join(write_tables()) or "nothing to change")
    if refused:
        sys.exit("not published:\n" + "\n".join(refused))


if __name__ == "__main__":
    main()
