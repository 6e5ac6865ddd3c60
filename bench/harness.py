"""Measure rivals on one workload: equal answers first, then paired alternating repetitions.

    python -m bench.harness --scenario h512l8-float32-all-true --rivals loop,cached_loop --save NAME

A repetition runs every rival once; the order is reversed from one repetition to the next, so that
a slow drift of the machine hits all of them alike. Ratios are medians of ratios within a
repetition. Nothing is timed before it has given the loop's answers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from bench.rivals import RIVALS, Answer, Unavailable, loop
from bench.workload import Workload, build_model, make_workload

__all__ = ["SCENARIOS", "GateError", "Scenario", "compare", "facts", "gate", "save", "table"]

RESULTS = Path(__file__).parent / "results"

# Relative norm of a rival's b against the loop's, per (sequence, item), float32. The rivals
# measured so far differ by up to 4e-6.
FLOAT32_LIMIT = 2e-5
# Lower precision: a rival's error against the float32 loop, over the same-dtype loop's error.
LOW_PRECISION_FACTOR = 2.0

ALL = tuple(RIVALS)
FAST = tuple(name for name, rival in RIVALS.items() if not rival.slow)


class GateError(AssertionError):
    """A rival's answers differ; it must not be timed."""


@dataclass(frozen=True)
class Scenario:
    model: str = "h512l8"
    dtype: str = "float32"
    group_size: int = 4
    items: int = 8
    prompt: int = 512
    response: tuple[int, int] = (300, 600)
    tail: int = 64
    true_share: float = 1.0
    rivals: tuple[str, ...] = FAST
    seed: int = 0

    def build(self) -> tuple[PreTrainedModel, Workload]:
        model = build_model(self.model, dtype=getattr(torch, self.dtype), seed=self.seed)
        workload = make_workload(
            group_size=self.group_size,
            items=self.items,
            prompt=self.prompt,
            response=self.response,
            tail=self.tail,
            true_share=self.true_share,
            vocab_size=model.config.vocab_size,
            seed=self.seed,
        )
        return model, workload


SCENARIOS: dict[str, Scenario] = {
    "h512l8-float32-all-true": Scenario(rivals=ALL),
    "h512l8-float32-half-true": Scenario(true_share=0.5),
    "h512l8-bfloat16-all-true": Scenario(dtype="bfloat16"),
    "h512l8-bfloat16-half-true": Scenario(dtype="bfloat16", true_share=0.5),
    # Shapes where sharing has little to give:
    "h512l8-float32-one-item": Scenario(items=1),
    "h512l8-float32-short": Scenario(prompt=16, response=(16, 64), tail=16),
    "h512l8-float32-short-one-item": Scenario(items=1, prompt=16, response=(16, 64), tail=16),
    # Other layer shapes:
    "h512l24-float32-all-true": Scenario(model="h512l24", group_size=2, items=4),
    "0.5b-layers-float32-all-true": Scenario(model="0.5b-layers", group_size=2, items=4),
    # A smaller shape, where the slow rivals are affordable:
    "h512l8-float32-smaller": Scenario(items=4, prompt=256, response=(150, 400), rivals=ALL),
}


def relative_errors(reference: Answer, got: Answer) -> list[float]:
    """Relative norm per True judgement. Raises GateError where the answers are not comparable."""
    if len(reference[0]) != len(got[0]) or reference[1].shape != got[1].shape:
        raise GateError(f"{len(got[0])} judgements answered, expected {len(reference[0])}")
    errors = []
    for index, (want, have) in enumerate(zip(reference[0], got[0], strict=True)):
        if (want is None) != (have is None):
            raise GateError(f"judgement {index}: attributed by one side only")
        if want is None or have is None:
            continue
        if want.shape != have.shape:
            shapes = f"{tuple(have.shape)}, not {tuple(want.shape)}"
            raise GateError(f"judgement {index}: shape {shapes}")
        if not torch.isfinite(have).all() or want.norm() == 0:
            raise GateError(f"judgement {index}: not finite, or the reference is zero")
        errors.append(float((have.double() - want.double()).norm() / want.double().norm()))
    return errors


def logp_error(reference: Answer, got: Answer) -> float:
    """Largest relative difference of a verdict's log-probability; False items count too."""
    want, have = reference[1].double(), got[1].double()
    return float(((have - want).abs() / want.abs()).max())


def gate(reference: Answer, got: Answer, same_dtype_loop: Answer | None = None) -> dict[str, float]:
    """Check `got` against the loop, or raise GateError.

    float32: `reference` is the loop. Lower precision: `reference` is the loop in float32 on the
    same rounded weights and `same_dtype_loop` the loop in the model's dtype.
    """
    errors = relative_errors(reference, got)
    logp = logp_error(reference, got)
    if same_dtype_loop is None:
        limits = [FLOAT32_LIMIT] * len(errors)
        logp_limit = FLOAT32_LIMIT
    else:
        limits = [LOW_PRECISION_FACTOR * e for e in relative_errors(reference, same_dtype_loop)]
        logp_limit = LOW_PRECISION_FACTOR * logp_error(reference, same_dtype_loop)
    for index, (error, limit) in enumerate(zip(errors, limits, strict=True)):
        if not error <= limit:
            raise GateError(f"True judgement {index}: relative error {error:.2e} > {limit:.2e}")
    if not logp <= logp_limit:
        raise GateError(f"verdict log-probabilities: relative error {logp:.2e} > {logp_limit:.2e}")
    return {"max_relative_error": max(errors, default=0.0), "max_logp_error": logp}


def compare(
    scenario: Scenario,
    *,
    rivals: Iterable[str] | None = None,
    repetitions: int = 5,
    slow_repetitions: int = 2,
    timed: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Gate and time the rivals of a scenario; the result holds every repetition.

    Rivals marked slow run in the first `slow_repetitions` repetitions only. A rival that cannot
    run here becomes an entry of `unavailable` with its reason.
    """
    model, workload = scenario.build()
    names = [name for name in RIVALS if name in set(rivals or scenario.rivals)]
    reference = loop(model, workload)
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
            got = rival.run(model, workload)
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

    for repetition in range(repetitions if timed else 0):
        order = [
            name for name in measured if not RIVALS[name].slow or repetition < slow_repetitions
        ]
        for name in order if repetition % 2 == 0 else reversed(order):
            entry = measured[name]
            gc.collect()
            entry["load_before"].append(round(os.getloadavg()[0], 2))
            cpu, wall = time.process_time(), time.perf_counter()
            RIVALS[name].run(model, workload)
            entry["seconds"].append(time.perf_counter() - wall)
            entry["cpu_seconds"].append(time.process_time() - cpu)
            log(f"repetition {repetition + 1}, {name}: {entry['seconds'][-1]:.2f} s")
    result = {
        "scenario": asdict(scenario),
        "workload": workload.describe(),
        "rivals": measured,
        "unavailable": unavailable,
    }
    for name, entry in measured.items():
        ratio = paired_ratio(result, name, "ours")
        entry["times_ours"] = None if ratio is None else round(ratio, 2)
    return result


def paired_ratio(result: dict[str, Any], slower: str, faster: str) -> float | None:
    """Median over the repetitions both took part in of seconds(slower) / seconds(faster)."""
    rivals = result["rivals"]
    if slower not in rivals or faster not in rivals:
        return None
    pairs = list(zip(rivals[slower]["seconds"], rivals[faster]["seconds"], strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def table(result: dict[str, Any], title: str) -> str:
    """The result as plain text: medians, spread, and the ratios both ways."""
    workload = result["workload"]
    head = (
        f"{title}: G={workload['G']} K={workload['K']} prompt={workload['prompt']} "
        f"responses={workload['responses']} tail={workload['tail'][0]} "
        f"True={workload['true_items']}"
    )
    row = "{:<46}{:>9}{:>18}{:>5}{:>12}{:>12}{:>11}{:>10}"
    lines = [
        head,
        row.format(
            "", "median s", "min-max s", "reps", "loop / it", "it / ours", "passes", "error"
        ),
    ]
    for name, entry in result["rivals"].items():
        seconds = entry["seconds"]
        against_loop = paired_ratio(result, "loop", name)
        against_ours = paired_ratio(result, name, "ours")
        lines.append(
            row.format(
                entry["title"],
                f"{statistics.median(seconds):.2f}" if seconds else "-",
                f"{min(seconds):.2f}-{max(seconds):.2f}" if seconds else "-",
                len(seconds),
                f"{against_loop:.2f}x" if against_loop else "-",
                f"{against_ours:.2f}x" if against_ours else "-",
                sum(entry["passes"].values()),
                f"{entry['max_relative_error']:.1e}",
            )
        )
    for name, reason in result["unavailable"].items():
        lines.append(f"{RIVALS[name].title:<46}not run: {reason}")
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
        return names[0].strip() if names else platform.processor()
    except OSError:
        return platform.processor()


def _gemm_gflops(dtype: torch.dtype) -> float:
    """Best of 20 products [512, 512] x [512, 1536]: the vendor library's rate right now."""
    left, right = torch.randn(512, 512).to(dtype), torch.randn(1536, 512).to(dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right.t())
        best = min(best, time.perf_counter() - start)
    return round(2 * 512 * 512 * 1536 / best / 1e9, 1)


def command() -> str:
    """The command line as one types it in the repository, without this machine's paths."""
    started = Path(sys.argv[0])
    module = "pytest" if "pytest" in started.parts else f"bench.{started.stem}"
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def facts() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gemm_gflops": {
            "float32": _gemm_gflops(torch.float32),
            "bfloat16": _gemm_gflops(torch.bfloat16),
        },
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, content: dict[str, Any]) -> Path:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenario", choices=SCENARIOS, default="h512l8-float32-all-true")
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
        repetitions=arguments.repetitions,
        slow_repetitions=arguments.slow_repetitions,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(table(result, arguments.scenario))
    if arguments.save:
        content = {"facts": about, "scenarios": {arguments.scenario: result}}
        print(f"saved {save(arguments.save, content)}")


if __name__ == "__main__":
    main()
