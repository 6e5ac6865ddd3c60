"""Kill -9 at random moments: does a training run go on, and end with the same weights?

    python -m bench.training_kills [--kills 20] [--save]

A run that is left alone first; then the same settings in other folders, each run killed and started
again, until so many were killed: a quarter of the tries before a process has logged anything, the
others a random time after its first line. Every run that ends is compared with the first, weights
and log, bit by bit. Then the same, with a quarter of the kills, for LoRA and for two processes.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.convergence import SETTINGS
from bench.facts import facts, save

__all__ = ["PARTS", "Part", "Tries", "differences", "kill_until", "phase_of", "wait_for_log"]

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
OPTIONS = ("--steps", str(STEPS), "--checkpoint-every", "1", "--evaluate-every", "4")
START_UP_SHARE = 0.25  # of the tries
LONGEST = 0.5  # a try ends within this part of a run behind its first line
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Part:
    share: float  # of the kills that are asked for
    options: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


PARTS = {
    "all weights": Part(1.0),
    "LoRA": Part(0.25, ("--lora-rank", "4")),
    "two processes": Part(0.25, launcher=TWO),
}


@dataclass
class Tries:
    """What happened at each kill, and what each run came to."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: tensors of the final weights, lines of the log.

    Seconds are no part of the comparison.
    """
    from g2r_fast.training.log import read_log

    a, b = (_weights(run) for run in (one, other))
    found = [name for name in sorted(a.keys() | b.keys()) if not _equal(a.get(name), b.get(name))]
    logs = [
        [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in read_log(run)]
        for run in (one, other)
    ]
    if logs[0] != logs[1]:
        found.append("log.jsonl")
    return found


def _weights(run: Path) -> dict[str, Any]:
    """Of the model, or of its adapters."""
    from safetensors.torch import load_file

    files = sorted((run / "final").glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"there are no weights in {run / 'final'}")
    return {name: value for file in files for name, value in load_file(file).items()}


def _equal(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and bool((a == b).all())


def phase_of(output: Path, logged: bool, started: float) -> str:
    """What a process was at that began at `started` (of time.time) and is now dead."""

    def written(path: Path) -> bool:  # by this process, not by one that was killed before
        return path.exists() and path.stat().st_mtime >= started

    if not logged:
        return "start-up"
    if (output / "final").is_dir():
        return "behind the end"
    if written(output / "final.unfinished"):
        return "writing the final weights"
    if any(map(written, (output / "checkpoints").glob("*.unfinished"))):
        return "writing a checkpoint"
    return "training"


def wait_for_log(
    process: subprocess.Popen[bytes], log: Path, before: int | None, seconds: float | None
) -> bool:
    """Whether the process logged a line of its own, within `seconds`, before it ended.

    before: the inode of the log that was there when it began; a run that goes on begins a new file
    with what it keeps of the old one.
    """
    began, kept = time.monotonic(), None
    while process.poll() is None and (seconds is None or time.monotonic() - began < seconds):
        inode, size = _stat(log)
        if inode != before:
            kept = size if kept is None else kept
            if size > kept:
                return True
        time.sleep(0.005)
    return False


def _stat(log: Path) -> tuple[int | None, int]:
    try:
        found = log.stat()
    except FileNotFoundError:
        return None, 0
    return found.st_ino, found.st_size


class _Run:
    """Processes that train in a folder, as a user starts them."""

    def __init__(self, part: Part, output: Path) -> None:
        self.output, self.errors = output, output.with_suffix(".stderr")
        self.before, _ = _stat(output / "log.jsonl")
        self.started = time.time()
        # One thread each: the order of sums is then the same whatever else the machine does.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable, *part.launcher, "-m", "g2r_fast.training", "--config", str(SETTINGS),
            "--output", str(output), "--no-progress", *OPTIONS, *part.options,
        ]  # fmt: skip
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def logged(self, seconds: float | None = None) -> bool:
        return wait_for_log(self.process, self.output / "log.jsonl", self.before, seconds)

    def ended(self, seconds: float | None = None) -> bool:
        """Whether it ends by itself within that time; RuntimeError where it fails."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise RuntimeError(f"{self.output.name} failed:\n{self.errors.read_text()}")
        return True

    def kill(self) -> None:
        """With all its workers, which a launcher gives sessions of their own."""
        import psutil

        launcher = psutil.Process(self.process.pid)
        launcher.suspend()  # starts no more of them
        processes = [launcher, *launcher.children(recursive=True)]
        for process in processes:
            process.kill()
        self.process.wait()
        psutil.wait_procs(processes[1:])


def kill_until(kills: int, part: Part, folder: Path, seed: int, log: Any = print) -> Tries:
    """Raises RuntimeError where a run that was killed does not go on."""
    reference = folder / "alone"
    began = time.perf_counter()
    run = _Run(part, reference)
    run.logged()
    start_up = time.perf_counter() - began
    run.ended()
    training = time.perf_counter() - began - start_up
    log(f"left alone: {start_up:.1f} s to its first line, {training:.1f} s behind it")
    tries, rng = Tries(), random.Random(seed)
    while len(tries.kills) < kills:
        output, of_this = folder / f"killed-{len(tries.runs)}", 0
        while True:
            run = _Run(part, output)
            if len(tries.kills) == kills:  # all are spent: this run is left to end
                run.ended()
                break
            early = rng.random() < START_UP_SHARE
            logged = run.logged(rng.uniform(0.0, start_up) if early else None)
            if run.ended(0.0 if early else rng.uniform(0.0, LONGEST * training)):
                break
            run.kill()
            of_this += 1
            tries.kills.append(
                {
                    "phase": phase_of(output, logged, run.started),
                    "after_seconds": round(time.time() - run.started, 2),
                    "last_logged_step": _last_logged(output),
                    "checkpoint_of_step": _checkpoint(output),
                }
            )
            log(f"kill {len(tries.kills)}: {tries.kills[-1]}")
        different = differences(reference, output)
        tries.runs.append({"kills": of_this, "different": different})
        log(f"run {len(tries.runs)}: {of_this} kills, different: {different}")
    return tries


def _checkpoint(output: Path) -> int | None:
    steps = [int(p.stem.split("-")[1]) for p in (output / "checkpoints").glob("step-*.pt")]
    return max(steps, default=None)


def _last_logged(output: Path) -> int | None:
    from g2r_fast.training.log import read_log

    if not (output / "log.jsonl").is_file():
        return None
    return max((int(line["step"]) for line in read_log(output)), default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; all")
    parser.add_argument("--save", action="store_true", help="write results/training-kills.json")
    given = parser.parse_args(arguments)
    names = given.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    about, found, bad = facts(), {}, 0
    for name in names:
        part = PARTS[name]
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            tries = kill_until(
                max(1, round(given.kills * part.share)), part, Path(folder), given.seed
            )
        phases = Counter(kill["phase"] for kill in tries.kills)
        differ = sum(bool(run["different"]) for run in tries.runs)
        bad += differ
        told = ", ".join(f"{phase}: {count}" for phase, count in phases.items())
        print(f"{len(tries.kills)} kills ({told}) in {len(tries.runs)} runs, {differ} differ")
        found[f"training-kills, {name}"] = {
            "options": [*part.launcher, *OPTIONS, *part.options],
            "kills": len(tries.kills),
            "phases": dict(phases),
            "runs_that_differ": differ,
            "each_kill": tries.kills,
            "each_run": tries.runs,
        }
    if given.save:
        print(f"saved {save('training-kills', {'facts': about, 'scenarios': found})}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
