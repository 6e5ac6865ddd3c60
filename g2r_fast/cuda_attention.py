"""Attention over a trie of segments by the CUDA kernels, forward and multi-lane backward.

The ops `torch.ops.g2r_fast.cuda_attention_forward` and `..._backward` take the tables as tensors;
the functions here make the tables.
"""

from __future__ import annotations

import os

import torch

from . import cuda_ops
from .device_tables import backward_tiles, forward_tiles
from .errors import InputError
from .tables import QueryTables

__all__ = ["VARIABLE", "attention_backward", "attention_forward", "serves", "wanted_products"]

VARIABLE = "G2R_PRODUCTS"
_OLDEST = (8, 0)  # compute capability: cp.async, and products of bfloat16
_WARPGROUPS = (9, 0)  # the one whose warpgroups multiply


def serves(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why these kernels do not serve, None where they do; the first question may compile them."""
    if device.type != "cuda":
        return f"the device is {device}, not an NVIDIA GPU"
    if dtype not in cuda_ops.DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the dtype is {name}, not bfloat16 or float16"
    if head_dim not in cuda_ops.HEAD_DIMS:
        return f"head_dim is {head_dim}, not {' or '.join(map(str, cuda_ops.HEAD_DIMS))}"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        major, minor = capability
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, older than sm_80"
    if wanted_products() == "wgmma" and capability != _WARPGROUPS:
        major, minor = capability
        name = torch.cuda.get_device_name(device)
        return f"{VARIABLE}=wgmma is for sm_90, and {name} is sm_{major}{minor}"
    return cuda_ops.load() or cuda_ops.library().probe(device)


def wanted_products() -> str:
    """How the kernels multiply, as `G2R_PRODUCTS` has it: "mma" by default, or "wgmma".

    Raises InputError where it has another value.
    """
    wanted = os.environ.get(VARIABLE, "") or "mma"
    if wanted not in cuda_ops.PRODUCTS:
        raise InputError(
            f"{VARIABLE} names no products", expected=" | ".join(cuda_ops.PRODUCTS), got=wanted
        )
    return wanted


def attention_forward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    products: str | None = None,
) -> None:
    """`out = softmax(cap(q @ k.T) + causal) @ v` and `lse = logsumexp(cap(q @ k.T) + causal)`.

    A query sees the keys of the path to its segment up to its own position, the last `window` of
    them; `cap(s) = softcap * tanh(s / softcap)`, the scores themselves where softcap is 0. Sums are
    float32, probabilities are rounded to q's dtype before their product with v.

    Args:
        queries: who attends.
        q: [queries, heads, head_dim], scaled and rotated; bfloat16 or float16, head_dim 64 or 128.
        k, v: [keys, kv_heads, head_dim] in q's dtype; kv_heads divides heads.
        out: as q, written.
        lse: [queries, heads] float32, written; natural logarithm.
        window: keys that a query sees, itself among them; None: all.
        softcap: 0 for none.
        products: "mma" or "wgmma"; None: as `wanted_products`.
    """
    products = products or wanted_products()
    sizes = cuda_ops.library().tile_sizes(q.shape[2], products)
    tiles = forward_tiles(queries, q.shape[1] // k.shape[1], sizes.forward_rows, q.device)
    torch.ops.g2r_fast.cuda_attention_forward(
        q, k, v, out, lse, tiles.segments, tiles.positions, tiles.tiles, window, softcap, products,
    )  # fmt: skip


def attention_backward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    products: str | None = None,
) -> None:
    """The gradients of `attention_forward` with respect to q, k and v, lane by lane.

    No atomics: every run gives the same bits. Gradients of the scores are rounded to q's dtype
    before their products with k and q.

    Args:
        queries: who comes back where.
        q, k, v, out, lse: as attention_forward took and wrote them.
        grad_out: [B, heads, head_dim] in q's dtype.
        dq: as grad_out, written.
        dk, dv: [B_keys, kv_heads, head_dim] float32, written.
        window, softcap, products: as in attention_forward.
    """
    products = products or wanted_products()
    sizes = cuda_ops.library().tile_sizes(q.shape[2], products)
    group = q.shape[1] // k.shape[1]
    tiles = backward_tiles(queries, group, sizes.backward_rows, sizes.backward_keys, q.device)
    torch.ops.g2r_fast.cuda_attention_backward(
        q, k, v, out, lse, grad_out, dq, dk, dv,
        tiles.segments, tiles.positions, tiles.entries,
        tiles.query_tiles, tiles.keys, tiles.key_tiles, window, softcap, products,
    )  # fmt: skip


_SCHEMAS = {
    "cuda_attention_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor segments, "
        "Tensor positions, Tensor tiles, int? window, float softcap, str products) -> ()"
    ),
    "cuda_attention_backward": (
        "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad_out, Tensor(a!) dq, "
        "Tensor(b!) dk, Tensor(c!) dv, Tensor segments, Tensor positions, Tensor entries, "
        "Tensor query_tiles, Tensor key_runs, Tensor key_tiles, int? window, float softcap, "
        "str products) -> ()"
    ),
}


def _forward(*arguments: object) -> None:
    cuda_ops.library().attention_forward(*arguments)  # type: ignore[arg-type]


def _backward(*arguments: object) -> None:
    cuda_ops.library().attention_backward(*arguments)  # type: ignore[arg-type]


def _nothing(*_: object) -> None:
    """What torch calls while it traces: the ops write into what they are given."""


_registered = torch.library.Library("g2r_fast", "FRAGMENT")
for _name, _run in (("cuda_attention_forward", _forward), ("cuda_attention_backward", _backward)):
    if hasattr(torch.ops.g2r_fast, _name):  # this module was imported a second time
        continue
    _registered.define(_name + _SCHEMAS[_name])
    _registered.impl(_name, _run, "CUDA")
    _registered.impl(_name, _run, "CPU")  # the emulated library, in tests
    torch.library.register_fake(f"g2r_fast::{_name}", _nothing, lib=_registered)
