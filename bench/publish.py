"""Measure every scenario; rewrite bench/results/ and the documents' tables from it.

    python -m bench.publish                  # everything; says first how long it will take
    python -m bench.publish --only bfloat16  # results files with that in their name
    python -m bench.publish --only vigor,grail,g2rl,grpo   # the three methods beside Grad2Reward
    python -m bench.publish --minutes 90     # more repetitions where they are long
    python -m bench.publish --tables         # no measurement: the tables from the files there are

One file per scenario, written when it is finished; what was not measured keeps its file. On a busy
machine two OpenMP threads wait for each other and wall times are worthless: nothing starts while
the load is above --load. Nor is a scenario published whose gate is red, or that would measure
g2r_fast without its compiled kernels, unless --reference says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import allocator, grpo_step
from bench.estimates import STEPS, efforts, estimate
from bench.facts import facts, native_kernels, save
from bench.gate import GateError
from bench.harness import Effort, compare
from bench.scenarios import SCENARIOS
from bench.signal_scenarios import SIGNAL_SCENARIOS, SignalScenario
from bench.signal_tables import signal_table
from bench.signals import compare_signal
from bench.tables import documents, result_name, table

ROOT = Path(__file__).resolve().parents[1]


def write_tables() -> list[str]:
    """Rewrite the documents; the names of those that changed."""
    changed = []
    for path, text in documents(ROOT).items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path.relative_to(ROOT).as_posix())
    return changed


def measure(name: str, effort: Effort) -> tuple[str, dict[str, dict[str, Any]]]:
    """What a terminal is told, and the results by scenario; several for a training step."""
    log = partial(print, f"{name}:", file=sys.stderr, flush=True)
    if name in STEPS:
        scenario = SignalScenario("", "", (), dtype=name.rpartition("-")[2])
        found = grpo_step.measure(scenario, grpo_step.PUBLIC, effort=effort, log=log)
        results = {f"{name}-{method}": one for method, one in found.items()}
        return grpo_step.lines(results), results
    if name in SIGNAL_SCENARIOS:
        result = compare_signal(SIGNAL_SCENARIOS[name], effort=effort, log=log, name=name)
        return signal_table(result, name), {name: result}
    result = compare(SCENARIOS[name], effort=effort, log=log)
    return table(result, name), {name: result}


def _file(name: str) -> str:
    return name if name in STEPS else result_name(name)


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
    parser.add_argument("--only", metavar="TEXT", help="comma-separated parts of file names")
    parser.add_argument("--minutes", type=float, default=65.0, help="time budget (65)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--slow-repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--allocator", choices=allocator.ALLOCATORS, default="kept")
    parser.add_argument("--load", type=float, default=1.5, help="wait while the load is higher")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and end")
    parser.add_argument("--tables", action="store_true", help="only rewrite the documents' tables")
    parser.add_argument("--reference", action="store_true", help="publish without native kernels")
    arguments = parser.parse_args()
    if arguments.tables:
        print("rewritten:", ", ".join(write_tables()) or "nothing to change")
        return
    parts = arguments.only.split(",") if arguments.only else [""]
    known = [*SCENARIOS, *SIGNAL_SCENARIOS, *STEPS]
    chosen = [name for name in known if any(part in _file(name) for part in parts)]
    if not chosen:
        parser.error(f"--only matches none of {', '.join(known)}")
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
    allocator.set_up(arguments.allocator)
    print(f"native kernels: {native_kernels()}", file=sys.stderr, flush=True)
    _wait_for_quiet(arguments.load)
    refused = []
    for name in chosen:
        about = facts()
        try:
            text, results = measure(name, plan[name])
        except GateError as error:
            refused.append(f"{name}: {error}")
            continue
        backends = {result["backend"] for result in results.values()}
        if not all(b.startswith("native") for b in backends) and not arguments.reference:
            ran = " and ".join(sorted(backends))
            refused.append(f"{name}: ours ran on {ran}; --reference publishes that")
            continue
        print(text, flush=True)
        print(f"saved {save(_file(name), {'facts': about, 'scenarios': results})}", flush=True)
    print("rewritten:", ", ".join(write_tables()) or "nothing to change")
    if refused:
        sys.exit("not published:\n" + "\n".join(refused))


if __name__ == "__main__":
    main()
