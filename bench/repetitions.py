"""Paired, alternating repetitions: what every benchmark of this folder does with a clock.

A repetition runs everything once and the next one runs it in reverse order, so that a slow drift of
the machine hits all alike.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bench.flops import share_of_peak

__all__ = ["Effort", "add_figures", "paired_ratio", "repeat"]

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


def repeat(
    runs: Mapping[str, Callable[[], object]],
    entries: Mapping[str, dict[str, Any]],
    effort: Effort,
    slow: Collection[str] = (),
    log: Callable[[str], None] = lambda line: None,
    rate: Callable[[], float | None] | None = None,
) -> None:
    """Time every run; each repetition's seconds, CPU seconds and load go to the entry of its name.

    Those named in `slow` take part in the first `slow_repetitions` repetitions only. `rate`, the
    machine's peak, is measured right before and right after each run of ours, and the higher goes
    to its entry: clocks drift by more in a minute than there is to tell.
    """
    started, repetition = time.perf_counter(), 0
    while effort.another(repetition, time.perf_counter() - started):
        slow_too = repetition < effort.slow_repetitions
        order = [name for name in runs if slow_too or name not in slow]
        for name in order if repetition % 2 == 0 else reversed(order):
            entry = entries[name]
            gc.collect()
            entry["load_before"].append(round(os.getloadavg()[0], 2))
            measured = rate if name == "ours" else None
            before = measured and measured()
            cpu, wall = time.process_time(), time.perf_counter()
            runs[name]()
            entry["seconds"].append(time.perf_counter() - wall)
            entry["cpu_seconds"].append(time.process_time() - cpu)
            after = measured and measured()
            if before and after:
                entry.setdefault("peak_gflops", []).append(max(before, after))
            log(f"repetition {repetition + 1}, {name}: {entry['seconds'][-1]:.2f} s")
        repetition += 1


def paired_ratio(result: dict[str, Any], slower: str, faster: str) -> float | None:
    """Median over the repetitions both took part in of seconds(slower) / seconds(faster)."""
    rivals = result["rivals"]
    if slower not in rivals or faster not in rivals:
        return None
    pairs = list(zip(rivals[slower]["seconds"], rivals[faster]["seconds"], strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def add_figures(result: dict[str, Any], flops: int) -> None:
    """To every rival of a result: median seconds, ratio to ours, and the share of the peak that
    `flops` in that time are. Ours against the peak beside each of its repetitions, the others
    against the median of those."""
    best = result["peak"].get(result["scenario"]["dtype"], {}).get("best_gflops")
    beside = result["rivals"].get("ours", {}).get("peak_gflops")
    usual = statistics.median(beside) if beside else best
    for name, entry in result["rivals"].items():
        ratio = paired_ratio(result, name, "ours")
        entry["times_ours"] = None if ratio is None else round(ratio, 2)
        if entry["seconds"]:
            entry["median_seconds"] = round(statistics.median(entry["seconds"]), 4)
            rates = entry.get("peak_gflops") or [usual] * len(entry["seconds"])
            shares = [
                share_of_peak(flops / 1e9, seconds, rate)
                for seconds, rate in zip(entry["seconds"], rates, strict=True)
                if rate
            ]
            entry["share_of_peak"] = round(statistics.median(shares), 4) if shares else None
