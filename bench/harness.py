"""Measure rivals on one workload: equal answers first, then paired alternating repetitions.

    python -m bench.harness --scenario float32-all-true --rivals ours,loop,cached_loop --save NAME

A repetition runs every rival once; the order is reversed from one repetition to the next, so that
a slow drift of the machine hits all of them alike. Ratios are medians of ratios within a
repetition. Nothing is timed before it has given the loop's answers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.facts import facts, save
from bench.flops import Sizes, judgements_of, required_flops, share_of_peak
from bench.gate import GateError, gate
from bench.ours import backend_of
from bench.peak import higher, peak
from bench.rivals import RIVALS, Unavailable, loop
from bench.scenarios import SCENARIOS, Scenario
from bench.tables import paired_ratio, table

__all__ = ["SCENARIOS", "Effort", "GateError", "Scenario", "compare", "facts", "gate", "save"]

# Of a scenario whose repetitions are short: until this many of them, or `least_seconds`.
MOST_REPETITIONS = 25
# Of a scenario whose repetitions are long: a median of fewer says nothing about the spread.
LEAST_REPETITIONS = 2


@dataclass(frozen=True)
class Effort:
    """How often things are repeated."""

    repetitions: int = 5
    slow_repetitions: int = 2  # for rivals marked slow
    least_seconds: float = 10.0  # short scenarios go on for as long
    most_seconds: float | None = None  # long ones stop after it, with at least two repetitions

    def another(self, done: int, elapsed: float) -> bool:
        """Whether to repeat once more after `done` repetitions that took `elapsed` seconds."""
        if done < min(LEAST_REPETITIONS, self.repetitions):
            return True
        if self.most_seconds is not None and elapsed * (done + 1) / done > self.most_seconds:
            return False
        return done < self.repetitions or (
            elapsed < self.least_seconds and done < max(MOST_REPETITIONS, self.repetitions)
        )


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
    started, repetition = time.perf_counter(), 0
    while effort is not None and effort.another(repetition, time.perf_counter() - started):
        slow_too = repetition < effort.slow_repetitions
        order = [name for name in measured if slow_too or not RIVALS[name].slow]
        for name in order if repetition % 2 == 0 else reversed(order):
            entry = measured[name]
            gc.collect()
            entry["load_before"].append(round(os.getloadavg()[0], 2))
            cpu, wall = time.process_time(), time.perf_counter()
            RIVALS[name].run(model, workload)
            entry["seconds"].append(time.perf_counter() - wall)
            entry["cpu_seconds"].append(time.process_time() - cpu)
            log(f"repetition {repetition + 1}, {name}: {entry['seconds'][-1]:.2f} s")
        repetition += 1
    if effort is not None:
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
    rate = peaks.get(scenario.dtype, {}).get("best_gflops")
    for name, entry in measured.items():
        ratio = paired_ratio(result, name, "ours")
        entry["times_ours"] = None if ratio is None else round(ratio, 2)
        if entry["seconds"]:
            median = statistics.median(entry["seconds"])
            entry["median_seconds"] = round(median, 4)
            share = None if rate is None else share_of_peak(required.total / 1e9, median, rate)
            entry["share_of_peak"] = None if share is None else round(share, 4)
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
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
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
