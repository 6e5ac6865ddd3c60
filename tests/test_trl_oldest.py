"""The tests of TRL again, with the oldest one that is supported and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

ROOT = Path(__file__).resolve().parents[1]
# TRL 0.26 does not run with transformers 5; datasets that do not ask for more come along.
OLDEST = ["trl==0.26.0", "transformers==4.56.2", "tokenizers==0.22.1", "huggingface_hub==0.36.0"]
OLDEST += ["datasets==4.0.0"]
TESTS = ["test_trl.py", "test_trl_judges.py", "test_trl_loss.py", "test_trl_refusals.py"]
TESTS += ["test_trl_reference.py", "test_trl_signals.py", "test_trl_processes.py"]


@pytest.fixture(scope="module")
def overlay():
    """A folder that hides the newer packages; it is kept in build/."""
    name = "-".join(package.replace("==", "") for package in OLDEST[:2])
    folder = ROOT / "build" / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "complete").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run(
            [*command, "--target", str(folder), *OLDEST],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"the oldest TRL cannot be installed: {done.stderr.strip()[-300:]}")
        (folder / "complete").touch()
    return folder


def test_the_oldest_trl_passes_the_same_tests(overlay):
    path = os.pathsep.join([str(overlay), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    version = "import trl, transformers; print(trl.__version__, transformers.__version__)"
    shown = subprocess.run(
        [sys.executable, "-c", version], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["0.26.0", "4.56.2"]
    files = [str(ROOT / "tests" / name) for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
