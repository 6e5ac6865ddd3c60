"""The plain C++ form on Arm, in an emulator: the exact cases of tests/cpp/kernels_test.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cpu"
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR),
    reason="no Arm compiler and emulator: apt install g++-aarch64-linux-gnu qemu-user",
)


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kernels_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    flags = ("-std=c++17", "-O2", "-pthread", "-DG2R_EXACT_SCRATCH=1", f"-I{KERNELS}")
    sources = [*KERNELS.glob("*.cpp"), ROOT / "tests" / "cpp" / "kernels_test.cpp"]
    objects = [folder / f"{path.stem}.o" for path in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: run(COMPILER, *flags, "-c", job[0], "-o", job[1]), jobs))
    run(COMPILER, "-static", "-pthread", *objects, "-o", folder / "kernels_test")
    return folder / "kernels_test"


@pytest.mark.parametrize("size", [(), ("large",)], ids=["small", "large"])
def test_integers_are_exact_on_arm(kernels_test: Path, size: tuple[str, ...]) -> None:
    assert run(EMULATOR, kernels_test, "plain", *size) == "plain: passed\n"
