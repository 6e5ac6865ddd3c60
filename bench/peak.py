"""The machine's peak rate of multiply-adds, measured: what no implementation can exceed.

    python -m bench.peak [--threads N]

A loop over registers (`peak.cpp`), compiled for this processor when it is asked for: float32 fused
multiply-adds, and bfloat16 dot products with float32 sums where the processor has them. Matrix
units (AMX, SME) are not counted.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["higher", "peak", "rate"]

SOURCE = Path(__file__).with_name("peak.cpp")
NAMES = {"float32": "f32", "bfloat16": "bf16"}
COMPILERS = ("g++", "c++", "clang++")
RUNS = 9
# Where our kernels are held to older instructions, so is the peak.
INSTRUCTIONS = {"avx512": ["-mavx512f"], "avx2": ["-mavx2", "-mfma"], "plain": list[str]()}


class _NotMeasured(RuntimeError):
    """The message says why."""


def peak(threads: int) -> dict[str, Any]:
    """`{dtype: {"instructions", "best_gflops", "median_gflops"} | {"not_measured": why}}`."""
    return {dtype: _one(threads, kind) for dtype, kind in NAMES.items()}


def rate(threads: int, dtype: str) -> float | None:
    """GFLOP/s of the best run, None: not measured."""
    return _one(threads, NAMES[dtype]).get("best_gflops")


def higher(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements, that with the higher rate for every dtype."""
    return {
        dtype: max(first[dtype], second[dtype], key=lambda found: found.get("best_gflops", 0.0))
        for dtype in first
    }


def _one(threads: int, kind: str) -> dict[str, Any]:
    try:
        done = _command([os.path.join(_program().name, "peak"), str(threads), str(RUNS), kind])
        if done.returncode == 3:
            raise _NotMeasured("the processor, or the compiler, has no bfloat16 dot product")
        if done.returncode != 0:
            raise _NotMeasured(f"the program ended with {done.returncode}")
    except _NotMeasured as error:
        return {"not_measured": str(error)}
    instructions, *lines = done.stdout.splitlines()
    rates = [float(line) for line in lines]
    return {
        "instructions": instructions,
        "best_gflops": max(rates),
        "median_gflops": round(median(rates), 1),
    }


@cache
def _program() -> tempfile.TemporaryDirectory[str]:
    """The folder with the compiled program, which goes when this process does."""
    compiler = _compiler()
    native = ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"]
    native = INSTRUCTIONS.get(os.environ.get("G2R_CPU", ""), native)
    folder = tempfile.TemporaryDirectory()
    build = ["-O2", "-std=c++17", "-pthread", str(SOURCE), "-o", os.path.join(folder.name, "peak")]
    done = _command([compiler, *native, *build])
    if done.returncode != 0:  # a compiler that does not know this processor
        done = _command([compiler, *build])
    if done.returncode != 0:
        raise _NotMeasured(f"{compiler} failed: {done.stderr.strip()[:200]}")
    return folder


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise _NotMeasured(f"no C++ compiler: none of {', '.join(COMPILERS)}")


def _command(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for dtype, found in peak(parser.parse_args().threads).items():
        print(dtype, found)


if __name__ == "__main__":
    main()
