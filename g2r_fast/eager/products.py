"""Matrix products of the packed engine, by the library that is fast on this machine.

PyTorch's float32 products on x86 CPUs run on MKL, which takes its AVX2 path on processors of other
vendors than Intel. oneDNN, which PyTorch carries too, does not: on an AMD EPYC with AVX-512 its
products are about twice as fast at every shape of this engine (bench/tile_sizes.py). Where that
is so, float32 products go there; everywhere else, and in every other dtype, to `torch.mm`.

A oneDNN kernel is generated once per shape and costs more to call, so callers keep their shapes few
and small products stay with `torch.mm`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

# Multiplications from which the higher rate outweighs the dearer call.
SMALLEST = 2**21

__all__ = ["SMALLEST", "product", "product_nt", "product_tn"]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for `[n, k]` and `[k, m]`, or both with one leading batch dimension."""
    if _on_onednn(a, b.mT):
        return _linear(a, b.mT)
    return a @ b


def product_nt(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b.mT + bias` for `[n, k]` and `[m, k]`, or both with one leading batch dimension."""
    if _on_onednn(a, b):
        return _linear(a, b, bias)
    out = a @ b.mT
    return out if bias is None else out.add_(bias)


def product_tn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a.mT @ b` for `[k, n]` and `[k, m]`, or both with one leading batch dimension.

    `a` should be the smaller one: it may be copied.
    """
    if _on_onednn(a.mT, b.mT):
        return _linear(a.mT.contiguous(), b.mT)
    return a.mT @ b


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.mT + bias`; oneDNN wants dense operands, plain or transposed."""
    if x.ndim == 3:
        parts = [_linear(x[i], weight[i], bias) for i in range(len(x))]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)
    x = x.contiguous()
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _on_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `x @ weight.mT`, `[n, k]` and `[m, k]`, is one for oneDNN."""
    return (
        x.shape[-2] * x.shape[-1] * weight.shape[-2] >= SMALLEST
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and _onednn_is_faster()
    )


@cache
def _onednn_is_faster() -> bool:
    """Whether float32 `torch.mm` would run on MKL on a processor that MKL does not favour."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "vendor_id" in about and "GenuineIntel" not in about
