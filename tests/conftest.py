"""Settings of the whole suite; they must stand before torch's and triton's users are imported."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys

# No test may depend on the network: what is tested is in the repository.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Kernels decide when they are defined, and Triton's own library when triton is imported.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py"
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from interpreter import quicken

        quicken()

# The models in here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

# No deadline, as no test may fail for being slow; the same examples in every run, as a failure that
# cannot be repeated helps nobody.
settings.register_profile("g2r_fast", deadline=None, derandomize=True)
settings.load_profile("g2r_fast")

# What takes longest starts first: at the end, no worker is left alone with it.
LONGEST = (
    "test_packaging.py",
    "test_cuda_emulated.py",
    "test_engine_device.py",
    "test_cuda_planted.py",
    "test_native_sanitizers.py",
    "test_native_arm.py",
    "test_trl_oldest.py",
    "test_cuda_build.py",
    "test_training_loop.py",
    "test_native_ops.py",
    "test_native_invariances.py",
    "test_vigor.py",
    "test_bench_gpu.py",
    "test_cuda_warpgroup.py",
    "test_fuzz.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage need look through it again."""
    gc.freeze()
