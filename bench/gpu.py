"""Everything that wants an NVIDIA GPU, by the Python, torch and compilers that are there.

    make gpu                                  # build, tests, sanitize, bench
    make gpu PARTS=build,bench RESULTS=out    # some of it, results into a folder of one's own
    python -m bench.gpu --parts sweep         # launch configurations of the attention kernels

    build       the native parts, in place
    tests       the whole suite, on all cores where pytest-xdist is there
    sanitize    compute-sanitizer's four tools over the CUDA kernels (tests/cpp/cuda_small.cu), and
                its memcheck over every kernel, in small sizes (bench/gpu_small.py)
    bench       ceilings, the engine against every rival, the kernels (bench/gpu_bench.py)
    sweep       every launch configuration; not among the parts by default

No network, no virtual environment. A part that fails keeps no other from running; what failed is
told at the end, and the exit status is then 1. Results: gpu.json (bench/tables.py makes tables of
it), gpu-run.json (machine, clocks before and after each part, versions, commands), and a log of
each part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from g2r_fast import building

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "sanitize", "bench", "sweep")
DEFAULT = "build,tests,sanitize,bench"
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")  # the slowest gets what is left
CUDA_SMALL = ("csrc/cuda/attention.cu", "tests/cpp/cuda_small.cu")
SECONDS = {"build": 240.0, "tests": 480.0, "sanitize": 300.0}
FATAL_AGAIN = 4  # starts of the benchmarks after faults that end their process
PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist")
QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,"
    "power.draw,power.limit,memory.total,memory.used,utilization.gpu,ecc.mode.current"
)


def machine() -> dict[str, Any]:
    """The card, as nvidia-smi tells it now."""
    said = _output(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"])
    if said is None:
        return {"gpu": "no nvidia-smi here"}
    values = (said.splitlines() or [""])[0].split(",")
    return dict(zip(QUERY.split(","), (value.strip() for value in values), strict=False))


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    for name in ("nvcc", "g++", "compute-sanitizer"):
        said = _output([name, "--version"])
        lines = [line for line in (said or "").splitlines() if any(map(str.isdigit, line))]
        found[name] = lines[-1 if name == "nvcc" else 0] if lines else None
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    found["commit"] = commit.strip() if commit else None
    return found


def _output(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


class Runner:
    """Runs commands with a limit each, keeps what they say, and remembers what failed."""

    def __init__(self, results: Path, python: str = sys.executable) -> None:
        self.results, self.python = results, python
        self.failed: list[str] = []
        self.run_file: dict[str, Any] = {"versions": versions(), "parts": {}}
        results.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        path = self.results / "gpu-run.json"
        path.write_text(json.dumps(self.run_file, indent=1) + "\n", encoding="utf-8")

    def command(
        self,
        part: str,
        words: Sequence[str],
        seconds: float,
        environment: Mapping[str, str] | None = None,
        shown: int = 30,
    ) -> int:
        """The exit status, 124 after the limit; `shown` lines of the log's end are printed."""
        log = self.results / f"gpu-{part}.log"
        print(f"== {part}: {' '.join(words)}", flush=True)
        before, begun = machine(), time.perf_counter()
        with open(log, "ab") as file:
            start = file.tell()
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                _end(process)
                status = 124
            except BaseException:
                _end(process)
                raise
        took = time.perf_counter() - begun
        with open(log, "rb") as file:
            file.seek(start)
            said = file.read().decode(errors="replace").splitlines()
        print("\n".join(line[:400] for line in said[-shown:]))
        print(f"== {part}: exit status {status} after {took:.0f} s", flush=True)
        self.run_file["parts"].setdefault(part, []).append(
            {
                "command": " ".join(words),
                "environment": dict(environment or {}),
                "status": status,
                "seconds": round(took, 1),
                "before": before,
                "after": machine(),
            }
        )
        self.save()
        return status

    def fail(self, what: str) -> None:
        self.failed.append(what)
        self.run_file["failed"] = self.failed
        self.save()


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and what it started: the processes of its own session."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def build(run: Runner, options: argparse.Namespace) -> None:
    words = [run.python, "setup.py", "-q", "build_ext", "--inplace"]
    status = run.command("build", words, SECONDS["build"])
    notes = [path.read_text(encoding="utf-8").strip() for path in missing_notes()]
    if status or notes:
        run.fail(f"build: exit status {status} {'; '.join(notes)}".rstrip())


def missing_notes() -> list[Path]:
    return sorted((ROOT / "g2r_fast").glob("*_missing.txt"))


def tests(run: Runner, options: argparse.Namespace) -> None:
    words = [run.python, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(max(1, (os.cpu_count() or 2) - 1))]
    status = run.command("tests", words, options.test_seconds, shown=60)
    if status:
        run.fail(f"tests: exit status {status}")


def sanitize(run: Runner, options: argparse.Namespace) -> None:
    if shutil.which("compute-sanitizer") is None:
        run.fail("sanitize: no compute-sanitizer here")
        return
    deadline = time.perf_counter() + SECONDS["sanitize"]
    tools = options.tools.split(",")
    _sanitize_cuda(run, tools, deadline)
    # Memory of its own for every tensor: in torch's pool nothing is ever out of bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = [run.python, "-m", "bench.gpu_small"]
    # Compiles, and fills Triton's cache.
    if status := run.command("sanitize", small, 120, environment):
        run.fail(f"sanitize: without a tool: {_meaning(status)}")
    if "memcheck" in tools:
        _under(run, "memcheck", small, max(60.0, deadline - time.perf_counter()), environment)


def _sanitize_cuda(run: Runner, tools: Sequence[str], deadline: float) -> None:
    nvcc = building.find_nvcc()
    if nvcc is None:
        run.fail("sanitize: no nvcc here: no tool ran over the CUDA kernels")
        return
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "cuda_small"))
        words = [nvcc, "-O3", "-std=c++17", "-lineinfo", _architecture(), "--cudart=static",
                 "-Icsrc/cuda", *CUDA_SMALL, "-o", program]  # fmt: skip
        for what, command in (("does not compile", words), ("without a tool", [program])):
            if status := run.command("sanitize", command, 120):
                run.fail(f"sanitize: cuda_small {what}: {_meaning(status)}")
                return
        for number, tool in enumerate(tools):
            # The last part of the time is for what comes behind.
            left = (deadline - time.perf_counter()) / (len(tools) - number + 1)
            # Racecheck takes three seconds a case, and float16 differs in its conversions only.
            extra = {"initcheck": ["--uninitialised"], "racecheck": ["bf16"]}.get(tool, [])
            _under(run, tool, [program, *extra], left)


def _under(
    run: Runner,
    tool: str,
    program: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "77",
             "--print-limit", "20", *program]  # fmt: skip
    if status := run.command("sanitize", words, seconds, environment):
        run.fail(f"sanitize: {tool}: {Path(program[0]).name}: {_meaning(status)}")


def _architecture() -> str:
    """nvcc's option for the card that is here."""
    said = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    number = (said or "").split("\n")[0].strip().replace(".", "")
    if number == "90":  # products of warpgroups are code for Hopper alone
        return "-arch=sm_90a"
    return f"-arch=sm_{number}" if number.isdigit() else "-arch=native"


def _meaning(status: int) -> str:
    return {77: "it found errors", 124: "time was up"}.get(status, f"exit status {status}")


def bench(run: Runner, options: argparse.Namespace) -> None:
    _benchmarks(run, options, "bench", "gpu.json", [])


def sweep(run: Runner, options: argparse.Namespace) -> None:
    _benchmarks(run, options, "sweep", "gpu-sweep.json", ["--sweep"])


def _benchmarks(
    run: Runner, options: argparse.Namespace, part: str, name: str, extra: list[str]
) -> None:
    path = run.results / name
    if not options.only:
        path.unlink(missing_ok=True)
    deadline = time.perf_counter() + 60 * options.minutes
    for _ in range(FATAL_AGAIN):
        left = deadline - time.perf_counter()
        words = [run.python, "-m", "bench.gpu_bench", "--save", str(path),
                 "--minutes", f"{left / 60:.2f}", *extra]  # fmt: skip
        if options.only:
            words += ["--only", options.only]
        if options.rehearse:
            words.append("--rehearse")
        status = run.command(part, words, left + 90, shown=400)
        if status in (0, 1, 2, 124) or deadline - time.perf_counter() < 30:
            break
    if status:
        run.fail(f"{part}: {_meaning(status)}; see {path.name} and gpu-{part}.log")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=DEFAULT, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--results", default="bench/results", help="folder")
    parser.add_argument("--minutes", type=float, default=6.0, help="of the benchmarks (6)")
    parser.add_argument("--test-seconds", type=float, default=SECONDS["tests"])
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer")
    parser.add_argument("--only", help="benchmarks with that in their name, added to what is there")
    parser.add_argument("--rehearse", action="store_true", help="the benchmarks, tiny, on a CPU")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    run = Runner(Path(options.results).resolve())
    print(json.dumps({**machine(), **run.run_file["versions"]}), flush=True)
    for part in PARTS:
        if part in chosen:
            globals()[part](run, options)
    print("\n".join(f"FAILED: {what}" for what in run.failed) or "all parts passed", flush=True)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
