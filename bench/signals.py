"""Measure GRAIL, G2RL and VIGOR against what people do today: equal answers first, then times.

    python -m bench.signals --scenario vigor-float32 --rivals ours,loop --save NAME

Repetitions, ratios and the gate are those of `harness.py`: paired and alternating, medians of
ratios within a repetition, nothing timed before it has given the loop's answers. Beside every ratio
stands the FLOP bound: what the rival multiplies over what the method requires (`signal_flops.py`).
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from bench import allocator
from bench.facts import facts, save
from bench.flops import Sizes
from bench.gate import GateError, gate_tensors
from bench.ours import backend_of
from bench.peak import higher, peak, rate
from bench.repetitions import Effort, add_figures, repeat
from bench.rivals import Unavailable
from bench.signal_flops import REQUIRED
from bench.signal_memory import extra_memory
from bench.signal_scenarios import LOOPS, RIVALS_OF, SIGNAL_SCENARIOS, SignalScenario
from bench.signal_tables import signal_table
from bench.signal_workload import Rollouts, on_host, to_the_end

__all__ = ["compare_signal", "required"]

# What the one repetition of a scenario that is there for its answers comes down to.
ONCE = Effort(1, 1, least_seconds=0.0)


def required(model: PreTrainedModel, method: str, rollouts: Rollouts) -> dict[str, int]:
    """FLOPs that the method cannot do without, by term."""
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    rule = REQUIRED[method]
    sizes = Sizes.of(model.config)
    return rule(sizes, rollouts, tied=tied) if method == "vigor" else rule(sizes, rollouts)


def compare_signal(
    scenario: SignalScenario,
    *,
    rivals: Iterable[str] | None = None,
    effort: Effort | None = None,
    log: Callable[[str], None] = lambda line: None,
    name: str | None = None,
    gflops: float | None = None,
) -> dict[str, Any]:
    """Gate and time the rivals of a scenario; the result holds every repetition.

    Without an effort answers are compared and nothing is timed. A rival that cannot run here
    becomes an entry of `unavailable` with its reason. `name`: of the scenario, by which a process
    of its own finds it again to measure memory. `gflops`: the matrix rate of the GPU, where the
    scenario is for one; a CPU's peak is measured here.
    """
    known, loop = RIVALS_OF[scenario.method], LOOPS[scenario.method]
    model, rollouts = scenario.build()
    names = [one for one in known if one in set(rivals or scenario.rivals)]
    reference = answer_of_loop = on_host(known[loop].run(model, rollouts))
    same_dtype_loop = None
    if model.dtype != torch.float32:
        same_dtype_loop = reference
        reference = on_host(known[loop].run(copy.deepcopy(model).float(), rollouts))
    log("reference ready")

    terms = required(model, scenario.method, rollouts)
    total = sum(terms.values())
    sizes = Sizes.of(model.config)
    measured: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for one in names:
        rival = known[one]
        try:
            got = answer_of_loop if one == loop else on_host(rival.run(model, rollouts))
            errors = gate_tensors(reference, got, same_dtype_loop)
        except Unavailable as error:
            unavailable[one] = str(error)
            continue
        except GateError as error:
            raise GateError(f"{one}: {error}") from error
        flops = total if rival.flops is None else rival.flops(sizes, rollouts)
        measured[one] = {
            "title": rival.title,
            **errors,
            "gflop": round(flops / 1e9, 3),
            "flop_bound": round(flops / total, 2),
            "seconds": [],
            "cpu_seconds": [],
            "load_before": [],
        }
        log(f"{one}: answers agree, {errors['max_relative_error']:.1e}")

    threads = torch.get_num_threads()
    peaks: dict[str, Any] = {scenario.dtype: {"best_gflops": gflops}} if gflops else {}
    memory: dict[str, Any] = {}
    if effort is not None:
        of_cpu = gflops is None and model.device.type == "cpu"
        if of_cpu:
            peaks = peak(threads)
        runs = {one: to_the_end(known[one].run, model, rollouts) for one in measured}
        slow = {one for one in measured if known[one].slow}
        repeat(
            runs,
            measured,
            ONCE if scenario.once else effort,
            slow,
            log,
            partial(rate, threads, scenario.dtype) if of_cpu else None,
        )
        if of_cpu:
            peaks = higher(peaks, peak(threads))
        if scenario.memory and name is not None:
            chosen = [one for one in ("ours", loop) if one in measured]
            memory = {one: extra_memory(name, one, threads) for one in chosen}
    result = {
        "scenario": asdict(scenario),
        "workload": rollouts.describe(),
        "backend": backend_of(model),
        "required_gflop": {
            "total": round(total / 1e9, 3),
            **{term: round(value / 1e9, 3) for term, value in terms.items()},
        },
        "peak": peaks,
        "memory": memory,
        "rivals": measured,
        "unavailable": unavailable,
    }
    add_figures(result, total)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.signals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenario", choices=SIGNAL_SCENARIOS, default="vigor-float32")
    parser.add_argument("--rivals", help="comma-separated; default: the scenario's own")
    parser.add_argument("--repetitions", type=int, help="5, or the one of a scenario run once")
    parser.add_argument("--slow-repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--answers", action="store_true", help="compare answers, time nothing")
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allocator.set_up()
    scenario = SIGNAL_SCENARIOS[arguments.scenario]
    rivals = arguments.rivals.split(",") if arguments.rivals else None
    if unknown := set(rivals or ()) - set(RIVALS_OF[scenario.method]):
        known = ", ".join(RIVALS_OF[scenario.method])
        parser.error(f"unknown rivals {sorted(unknown)}; known: {known}")
    about = facts()
    if arguments.repetitions is not None:
        scenario = replace(scenario, once=False)
    plain = Effort(arguments.repetitions or Effort.repetitions, arguments.slow_repetitions)
    result = compare_signal(
        scenario,
        rivals=rivals,
        effort=None if arguments.answers else plain,
        log=lambda line: print(line, file=sys.stderr, flush=True),
        name=arguments.scenario,
    )
    print(signal_table(result, arguments.scenario))
    if arguments.save:
        content = {"facts": about, "scenarios": {arguments.scenario: result}}
        print(f"saved {save(arguments.save, content)}")


if __name__ == "__main__":
    main()
