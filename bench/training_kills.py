"""Kill -9 at random moments: does a training run go on, and end with the same weights?

    python -m bench.training_kills [--kills 20] [--save]

A run that is left alone first; then the same settings in other folders, each process killed after
a random time and started again, until so many were killed. Every run that ends is compared with
the first, weights and log, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.convergence import SETTINGS
from bench.facts import facts, save

__all__ = ["Tries", "command", "differences", "kill_until"]

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12


def command(output: Path, settings: Path, options: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "g2r_fast.training", "--config", str(settings),
        "--output", str(output), "--no-progress", *options,
    ]  # fmt: skip


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    # One thread: a machine with others at work does the sums in the same order all the same, and
    # two runs at a time do not disturb each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: tensors of the final weights, lines of the log.

    Seconds are no part of the comparison.
    """
    from safetensors.torch import load_file

    from g2r_fast.training.log import read_log

    found = []
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    found += [name for name in sorted(a.keys() | b.keys()) if not _equal(a.get(name), b.get(name))]
    logs = [
        [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in read_log(run)]
        for run in (one, other)
    ]
    if logs[0] != logs[1]:
        found.append("log.jsonl")
    return found


def _equal(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and bool((a == b).all())


class Tries:
    """What happened at each kill."""

    def __init__(self) -> None:
        self.kills: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []


def kill_until(
    kills: int, folder: Path, settings: Path, options: list[str], seed: int, log: Any = print
) -> Tries:
    """Raises RuntimeError where a run that was killed does not go on."""
    reference = folder / "alone"
    started = time.perf_counter()
    process = _start(command(reference, settings, options))
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run that is left alone failed:\n{errors.decode()}")
    alone = time.perf_counter() - started
    log(f"left alone: {alone:.1f} s")
    tries, rng = Tries(), random.Random(seed)
    while len(tries.kills) < kills:
        output = folder / f"killed-{len(tries.runs)}"
        of_this = 0
        while True:
            process = _start(command(output, settings, options))
            try:
                # Once all kills are spent the last run is left to end.
                wait = rng.uniform(0.0, 1.1 * alone) if len(tries.kills) < kills else None
                _, errors = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                of_this += 1
                tries.kills.append(
                    {"after_seconds": round(wait or 0.0, 2), "found": _found(output)}
                )
                log(f"kill {len(tries.kills)}: {tries.kills[-1]}")
                continue
            if process.returncode:
                raise RuntimeError(f"a run that was killed does not go on:\n{errors.decode()}")
            break
        different = differences(reference, output)
        tries.runs.append({"kills": of_this, "different": different})
        log(f"run {len(tries.runs)}: {of_this} kills, different: {different}")
    return tries


def _found(output: Path) -> str:
    """How far a killed run was: its last step in a checkpoint, or that there is none."""
    steps = [int(p.stem.split("-")[1]) for p in (output / "checkpoints").glob("step-*.pt")]
    if (output / "final").is_dir():
        return "finished"
    return f"checkpoint of step {max(steps)}" if steps else "no checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write results/training-kills.json")
    arguments = parser.parse_args()
    about = facts()
    options = ["--steps", str(STEPS), "--checkpoint-every", "1", "--evaluate-every", "4"]
    with tempfile.TemporaryDirectory() as folder:
        tries = kill_until(arguments.kills, Path(folder), SETTINGS, options, arguments.seed)
    bad = [run for run in tries.runs if run["different"]]
    print(f"{len(tries.kills)} kills in {len(tries.runs)} runs, {len(bad)} of which differ")
    if arguments.save:
        found = {"options": options, "kills": tries.kills, "runs": tries.runs}
        content = {"facts": about, "scenarios": {"training-kills": found}}
        print(f"saved {save('training-kills', content)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
