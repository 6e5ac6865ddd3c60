"""What a reader needs to judge the numbers: the machine, its rates in this run, the versions."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import g2r_fast
from bench import allocator

__all__ = ["RESULTS", "facts", "save"]

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """The rates of torch.mm are those of this moment."""
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gemm_gflops": {
            "float32": _gemm_gflops(torch.float32),
            "bfloat16": _gemm_gflops(torch.bfloat16),
        },
        "native_kernels": native_kernels(),
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "allocator": allocator.in_use(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "g2r_fast": g2r_fast.__version__,
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
    }


def native_kernels() -> str:
    """The instruction set that g2r_fast's compiled kernels use here, or why there are none."""
    from g2r_fast.native_ops import load

    missing = load()
    return missing or str(torch.ops.g2r_fast.cpu_kernels())


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


def save(name: str, content: dict[str, Any]) -> Path:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
