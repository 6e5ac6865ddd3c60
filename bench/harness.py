"""Measure rivals on one workload: equal answers first, then paired alternating repetitions.

    python -m bench.harness --scenario float32-all-true --rivals ours,loop,cached_loop --save NAME

A repetition runs every rival once; the order is reversed from one repetition to the next, so that
a slow drift of the machine hits all of them alike. Ratios are medians of ratios within a
repetition. Nothing is timed before it has given the loop's answers.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bench import allocator
from bench.facts import facts, save
from bench.flops import Sizes, judgements_of, required_flops
from bench.gate import GateError, gate
from bench.ours import backend_of
from bench.peak import higher, peak, rate
from bench.repetitions import Effort, add_figures, repeat
from bench.rivals import RIVALS, Unavailable, loop
from bench.scenarios import SCENARIOS, Scenario
from bench.tables import table

__all__ = ["SCENARIOS", "Effort", "GateError", "Scenario", "compare", "facts", "gate", "save"]


def compare(
    scenario: Scenario,
    *,
    rivals: Iterable[str] | None = None,
    effort: Effort | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Gate and time the rivals of a scenario; the result holds every repetition.

    Without an effort answers are compared and nothing is timed. Rivals marked slow run in the first
    `slow_repetitions` repetitions only. A rival that cannot run here becomes an entry of
    `unavailable` with its reason.
    """
    model, workload = scenario.build()
    names = [name for name in RIVALS if name in set(rivals or scenario.rivals)]
    reference = answer_of_loop = loop(model, workload)
    same_dtype_loop = None
    if model.dtype != torch.float32:
        same_dtype_loop = reference
        reference = loop(copy.deepcopy(model).float(), workload)
    log("reference ready")

    measured: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        rival = RIVALS[name]
        try:
            got = answer_of_loop if name == "loop" else rival.run(model, workload)
        except Unavailable as error:
            unavailable[name] = str(error)
            continue
        try:
            errors = gate(reference, got, same_dtype_loop)
        except GateError as error:
            raise GateError(f"{name}: {error}") from error
        measured[name] = {
            "title": rival.title,
            **errors,
            "passes": asdict(rival.passes(workload)),
            "seconds": [],
            "cpu_seconds": [],
            "load_before": [],
        }
        log(f"{name}: answers agree, {errors['max_relative_error']:.1e}")

    threads = torch.get_num_threads()
    peaks = {} if effort is None else peak(threads)
    if effort is not None:
        runs = {name: partial(RIVALS[name].run, model, workload) for name in measured}
        slow = {name for name in measured if RIVALS[name].slow}
        repeat(runs, measured, effort, slow, log, partial(rate, threads, scenario.dtype))
        peaks = higher(peaks, peak(threads))
    required = required_flops(Sizes.of(model.config), judgements_of(workload))
    result = {
        "scenario": asdict(scenario),
        "workload": workload.describe(),
        "backend": backend_of(model),
        "required_gflop": required.describe(),
        "peak": peaks,
        "rivals": measured,
        "unavailable": unavailable,
    }
    add_figures(result, required.total)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenario", choices=SCENARIOS, default="float32-all-true")
    parser.add_argument("--rivals", help="comma-separated; default: the scenario's own")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--slow-repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--allocator", choices=allocator.ALLOCATORS, default="kept")
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allocator.set_up(arguments.allocator)
    names = arguments.rivals.split(",") if arguments.rivals else None
    if unknown := set(names or ()) - set(RIVALS):
        parser.error(f"unknown rivals {sorted(unknown)}; known: {', '.join(RIVALS)}")
    about = facts()
    result = compare(
        SCENARIOS[arguments.scenario],
        rivals=names,
        effort=Effort(arguments.repetitions, arguments.slow_repetitions),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(table(result, arguments.scenario))
    if arguments.save:
        content = {"facts": about, "scenarios": {arguments.scenario: result}}
        print(f"saved {save(arguments.save, content)}")


if __name__ == "__main__":
    main()
