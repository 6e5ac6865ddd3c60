"""The GPU benchmarks, by importance, until the time is up; saved after every piece.

    python -m bench.gpu_bench --save FILE.json                    # about six minutes
    python -m bench.gpu_bench --save FILE.json --only gpu-7b      # pieces with that in their name
    python -m bench.gpu_bench --save FILE.json --sweep            # launch configurations instead
    python -m bench.gpu_bench --save FILE.json --rehearse         # the same code on a CPU, tiny

What FILE holds already is not measured again: after a fault that leaves the GPU unusable to the
process (exit status 3) the same command goes on with the next piece. No speed is printed for what
has given wrong answers; exit status 1 says that there was any such thing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
if "--rehearse" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from bench import gpu_attention
from bench.facts import facts
from bench.gpu_ceilings import card, ceilings, clocks
from bench.gpu_rows import row_kernels
from bench.gpu_scenarios import GPU_SCENARIOS, WEIGHTS, compare_on_gpu, rehearsal
from bench.grpo_step import PUBLIC
from bench.grpo_step import lines as step_lines
from bench.grpo_step import measure as grpo_step
from bench.repetitions import Effort
from bench.signal_scenarios import GPU_SIGNALS, SignalScenario
from bench.signal_tables import signal_table
from bench.signals import compare_signal
from bench.tables import table
from bench.test_activation_bytes import measure

FATAL = 3
# Of the repetitions of a signal.
SIGNAL_SECONDS = 15.0
# What is kept for the pieces behind the scenarios.
BEHIND = 120.0
ENDED = "the process ended"
SECTIONS = ("gpu", "kernels", "scenarios", "signals", "steps", "activation_bytes", "sweep")
ACTIVATIONS = {"1.5b-bfloat16": ("1.5b-layers", "bfloat16", 1024)}

Content = dict[str, Any]


def _log(line: str) -> None:
    print(f"[{time.perf_counter() - _BEGUN:6.1f} s] {line}", file=sys.stderr, flush=True)


def _log_of(name: str, line: str) -> None:
    _log(f"{name}: {line}")


_BEGUN = time.perf_counter()


class _Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.path = Path(options.save)
        self.rehearse: bool = options.rehearse
        self.device = torch.device("cpu" if options.rehearse else options.device)
        self.deadline = _BEGUN + 60 * options.minutes
        self.only: str = options.only or ""
        self.content: Content = {}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        problems = self.content.setdefault("problems", [])
        for section in SECTIONS:
            for name, entry in self.content.get(section, {}).items():
                line = f"{section} {name}: {ENDED}"
                if entry == {"not_measured": ENDED} and line not in problems:
                    problems.append(line)

    def save(self) -> None:
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def piece(self, section: str, name: str, make: Callable[[], Any]) -> None:
        """Measures and saves one thing, whatever happens to it."""
        done = self.content.setdefault(section, {})
        if name in done or (self.only and self.only not in f"{section} {name}"):
            return
        if self.left() < 0 and not self.rehearse:
            _log(f"{section} {name}: no time was left")
            self.content["left_out"] = [*self.content.get("left_out", []), f"{section} {name}"]
            self.save()
            return
        _log(f"{section} {name}")
        # Whatever ends the process here is not tried again.
        done[name] = {"not_measured": ENDED}
        self.save()
        try:
            done[name] = make()
        except Exception as error:
            traceback.print_exc()
            short = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
            done[name] = {"not_measured": short}
            self.content["problems"].append(f"{section} {name}: {short}")
        self.content["problems"] += _problems(section, name, done[name])
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                _log(f"the GPU is of no use to this process any more: {error}")
                self.content["problems"].append(f"{section} {name}: {error}")
                self.save()
                sys.stdout.flush()
                os._exit(FATAL)

    def measure(self) -> None:
        small = self.rehearse
        self.content.setdefault("facts", _facts(small))
        self.piece("gpu", "ceilings", lambda: ceilings(self.device, small=small))
        found = self.content["gpu"].get("ceilings", {})
        gflops = _rate(found, "matrix", "tflop_per_s", 1e3)
        copy = _rate(found, "copy", "gb_per_s", 1.0)
        cases = {"small": gpu_attention.SMALL} if small else gpu_attention.ATTENTION_CASES
        first, *others = cases
        self.piece("kernels", f"attention, {first}", lambda: self._attention(cases[first]))
        self.piece("kernels", "rows", lambda: row_kernels(self.device, copy, small=small))
        # Every scenario may use a share of the time that is left.
        rest = sum(WEIGHTS.get(name, 1.0) for name in GPU_SCENARIOS)
        for name, scenario in GPU_SCENARIOS.items():
            chosen = rehearsal(scenario) if small else scenario
            share = max(0.0, self.left() - BEHIND) * WEIGHTS.get(name, 1.0) / rest
            rest -= WEIGHTS.get(name, 1.0)
            self.piece(
                "scenarios",
                name,
                lambda chosen=chosen, name=name, share=share: compare_on_gpu(  # type: ignore[misc]
                    chosen,
                    deadline=time.perf_counter() + (2.0 if small else share),
                    gflops=gflops,
                    log=lambda line: _log(f"{name}: {line}"),
                    repetitions=2 if small else 4,
                ),
            )
        self._signals(gflops)
        for name in others:
            self.piece("kernels", f"attention, {name}", lambda n=name: self._attention(cases[n]))  # type: ignore[misc]
        for name, (model, dtype, rows) in ACTIVATIONS.items():
            if small:
                model, rows = "tiny", 16
            self.piece(
                "activation_bytes",
                name,
                lambda model=model, dtype=dtype, rows=rows: measure(  # type: ignore[misc]
                    model, dtype, rows, device=self.device
                ),
            )
        self.content["clocks_at_the_end"] = clocks()
        self.save()

    def _signals(self, gflops: float | None) -> None:
        """GRAIL, G2RL and VIGOR on their own, and what each adds to a GRPO step."""
        small = self.rehearse
        effort = Effort(2 if small else 4, 1, least_seconds=0.0, most_seconds=SIGNAL_SECONDS)
        for name, scenario in GPU_SIGNALS.items():
            chosen = rehearsal_of_signal(scenario) if small else scenario
            log = partial(_log_of, name)
            self.piece(
                "signals",
                name,
                partial(compare_signal, chosen, effort=effort, log=log, gflops=gflops),
            )
        name, scenario = "gpu-grpo-step", GPU_SIGNALS["gpu-vigor"]
        chosen = rehearsal_of_signal(scenario) if small else scenario
        log = partial(_log_of, name)
        self.piece("steps", name, partial(grpo_step, chosen, PUBLIC, effort=effort, log=log))

    def _attention(self, case: gpu_attention.AttentionCase) -> Any:
        return gpu_attention.attention(case, self.device, repeats=2 if self.rehearse else 10)

    def sweep(self) -> None:
        self.content.setdefault("facts", _facts(self.rehearse))
        cases = gpu_attention.ATTENTION_CASES
        chosen = {"small": gpu_attention.SMALL} if self.rehearse else cases
        few = {"warps": (4,), "stages": (1,)} if self.rehearse else {}
        for name in list(chosen)[:1] if not self.only else chosen:
            self.piece(
                "sweep",
                name,
                lambda name=name: gpu_attention.sweep(  # type: ignore[misc]
                    chosen[name], self.device, log=_log, another=lambda: self.left() > 0, **few
                ),
            )


def rehearsal_of_signal(scenario: SignalScenario) -> SignalScenario:
    """The same in a size for a CPU."""
    return replace(
        scenario, model="tiny", device="cpu", group_size=2, prompt=8, completion=(20, 30)
    )


def _facts(small: bool) -> dict[str, Any]:
    return {} if small else {**facts(), "gpu": card()}


def _rate(found: Content, name: str, unit: str, factor: float) -> float | None:
    """The median: what the machine keeps up, rather than what it can do once."""
    rate = found.get(name, {}).get(unit, {}).get("median")
    return None if rate is None else rate * factor


def _problems(section: str, name: str, found: Any) -> list[str]:
    """Wrong answers, and what of ours did not run."""
    problems = []
    if section == "scenarios" and isinstance(found, dict):
        for rival, reason in found.get("refused", {}).items():
            problems.append(f"{name}: {rival}: {reason}")
    if section == "kernels" and isinstance(found, dict):
        for kernel, entry in found.items():
            if isinstance(entry, dict):
                reason = entry.get("refused") or entry.get("not_measured")
                problems += [f"{name}: {kernel}: {reason}"] if reason else []
    return problems


def report(content: Content) -> str:
    """What was found, as text."""
    lines = []
    for name, entry in content.get("gpu", {}).items():
        lines.append(f"{name}: {json.dumps(entry)}")
    for name, result in content.get("scenarios", {}).items():
        lines.append("")
        if "rivals" not in result:
            lines.append(f"{name}: {result.get('not_measured')}")
        elif "ours" in result["rivals"] and not result["rivals"]["ours"]["seconds"]:
            lines.append(f"{name}: not timed: {result['refused']}")
        else:
            lines.append(table(result, name))
            lines += [f"{rival}: WRONG: {why}" for rival, why in result["refused"].items()]
    for name, result in content.get("signals", {}).items():
        lines += ["", result.get("not_measured") or signal_table(result, name)]
    for result in content.get("steps", {}).values():
        lines += ["", result.get("not_measured") or step_lines(result)]
    for section in ("kernels", "activation_bytes"):
        for name, entry in content.get(section, {}).items():
            lines += ["", name]
            for key, value in entry.items():
                if isinstance(value, dict):
                    value = {k: _rounded(v) for k, v in value.items() if k != "errors"}
                lines.append(f"    {key:<24}{_rounded(value)}")
    for name, ops in content.get("sweep", {}).items():
        for op, rows in ops.items() if isinstance(ops, dict) else ():
            if isinstance(rows, list):
                lines += ["", f"{name}: {op}", *(f"    {row}" for row in rows[:6])]
                lines += [f"    shipped: {row}" for row in rows if row.get("shipped")]
    lines += ["", *(f"PROBLEM: {problem}" for problem in content.get("problems", []))]
    if content.get("left_out"):
        lines.append(f"left out, as time was up: {', '.join(content['left_out'])}")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--save", required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--only", metavar="TEXT")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --rehearse runs the same code on a CPU")
    run = _Run(options)
    run.sweep() if options.sweep else run.measure()
    print(report(run.content), flush=True)
    sys.exit(1 if run.content["problems"] else 0)


if __name__ == "__main__":
    main()
