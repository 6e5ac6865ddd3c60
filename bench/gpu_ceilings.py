"""What this GPU can do in this run: copy bandwidth, bf16 matrix rate, flash attention; and clocks.

Everything runs on a CPU too, in small sizes, so that it is tested where there is no GPU.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["card", "ceilings", "clocks", "seconds_of", "short", "synchronise"]

_ASKED = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "temperature.gpu,power.draw,power.limit,memory.total,memory.used,utilization.gpu"
)


def card() -> dict[str, Any]:
    """What nvidia-smi says of the first GPU, and torch of its compiler."""
    return {"cuda": torch.version.cuda, **clocks()}


def clocks() -> dict[str, str]:
    """A query of nvidia-smi; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"not asked": str(error)}
    values = done.stdout.splitlines()[:1]
    if done.returncode != 0 or not values:
        return {"not asked": (done.stderr or done.stdout).strip()[:200]}
    names = _ASKED.split(",")
    return dict(zip(names, (value.strip() for value in values[0].split(",")), strict=False))


def synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def short(error: Exception) -> str:
    """One line of what went wrong."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


_flushed: dict[torch.device, Tensor] = {}


def seconds_of(
    run: Callable[[], Any],
    device: torch.device | str,
    *,
    repeats: int = 20,
    warm: int = 3,
    flush: bool = False,
) -> list[float]:
    """Seconds of each of `repeats` calls; on a GPU by events, with `flush` past its L2 cache."""
    device = torch.device(device)
    for _ in range(warm):
        run()
    synchronise(device)
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found
    if flush and device not in _flushed:
        _flushed[device] = torch.empty(2**28, dtype=torch.int8, device=device)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, stop in events:  # type: ignore[assignment]
        if flush:
            _flushed[device].zero_()
        start.record()  # type: ignore[attr-defined]
        run()
        stop.record()  # type: ignore[attr-defined]
    synchronise(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def ceilings(device: torch.device | str, *, small: bool = False) -> dict[str, Any]:
    """Rates of this moment; `small`: sizes for a rehearsal."""
    device = torch.device(device)
    found: dict[str, Any] = {"clocks_before": clocks()}
    for name, measure in (
        ("copy", _copy), ("matrix", _matrix), ("attention", _attention)
    ):  # fmt: skip
        try:
            found[name] = measure(device, small)
        except Exception as error:  # out of memory, say: the rest is still worth having
            found[name] = {"not_measured": f"{type(error).__name__}: {error}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found["clocks_after"] = clocks()
    return found


def _rates(amount: float, seconds: list[float]) -> dict[str, float]:
    return {
        "best": round(amount / min(seconds), 2),
        "median": round(amount / statistics.median(seconds), 2),
        "median_seconds": statistics.median(seconds),
    }


def _copy(device: torch.device, small: bool) -> dict[str, Any]:
    """GB/s read and written of a copy of 2 GiB."""
    count = 2**20 if small else 2**31
    source = torch.empty(count, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, repeats=15)
    return {"bytes": 2 * count, "gb_per_s": _rates(2 * count / 1e9, seconds)}


def _matrix(device: torch.device, small: bool) -> dict[str, Any]:
    """TFLOP/s of a bfloat16 product of random square matrices."""
    n = 128 if small else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(n, n, device=device, generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(a)
    seconds = seconds_of(lambda: torch.mm(a, b, out=out), device, repeats=3 if small else 40)
    return {"size": n, "tflop_per_s": _rates(2 * n**3 / 1e12, seconds)}


def _attention(device: torch.device, small: bool) -> dict[str, Any]:
    """TFLOP/s of causal attention through scaled_dot_product_attention, forward and backward."""
    batch, heads, rows, width = (1, 2, 32, 16) if small else (4, 16, 8192, 128)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, heads, rows, width, device=device, generator=generator).to(
            torch.bfloat16
        )
        for _ in range(4)
    )
    flop = 2 * 2 * batch * heads * rows * rows * width / 2 / 1e12
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if device.type != "cuda":
        backends = {"math": SDPBackend.MATH}
    found: dict[str, Any] = {"shape": [batch, heads, rows, width]}
    attend = torch.nn.functional.scaled_dot_product_attention
    for name, backend in backends.items():
        try:
            with sdpa_kernel(backend):
                forward = seconds_of(
                    lambda: attend(q, k, v, is_causal=True), device, repeats=3 if small else 10
                )
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                out = attend(*inputs, is_causal=True)
                backward = seconds_of(
                    lambda out=out, inputs=inputs: torch.autograd.grad(  # type: ignore[misc]
                        out, inputs, grad, retain_graph=True
                    ),
                    device,
                    repeats=3 if small else 10,
                )
            found[name] = {
                "forward_tflop_per_s": _rates(flop, forward),
                "backward_tflop_per_s": _rates(2.5 * flop, backward),
            }
        except RuntimeError as error:
            found[name] = {"not_measured": str(error)[:200]}
    return found
