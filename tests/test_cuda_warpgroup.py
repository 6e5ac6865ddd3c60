"""Products of a warpgroup on a CPU: what the emulation computes, and what it must not let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated_cuda as cuda
import pytest
from native_calls import COMPILER

ROOT = Path(__file__).resolve().parents[1]
TEST = ROOT / "tests" / "cpp" / "test_cuda_warpgroup.cpp"
INCLUDES = [f"-I{ROOT / 'tests' / 'cpp'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
BUILDS = {
    "sanitized": [*cuda.SANITIZERS, "-Og"],
    "optimised": ["-O2"],
}

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)


@pytest.mark.parametrize("build", BUILDS)
def test_products_are_those_of_plain_loops_and_planted_bugs_are_found(
    build: str, tmp_path: Path
) -> None:
    program = tmp_path / build
    flags = ["-std=c++17", "-DG2R_EMULATE", *cuda.WARNINGS, *INCLUDES, *BUILDS[build]]
    built = run(str(COMPILER), *flags, str(TEST), "-o", str(program))
    if built.returncode != 0 and "san" in built.stderr and "cannot find" in built.stderr:
        pytest.skip(f"{COMPILER} cannot link the sanitizers: {built.stderr.strip()[-200:]}")
    assert built.returncode == 0, built.stderr[:4000]
    done = run(str(program))
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr[-4000:]
