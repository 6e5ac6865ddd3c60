"""Queries, keys and values from the rows of one projection.

    y       = source.view(R, heads + 2 * kv_heads, D).split((heads, kv_heads, kv_heads), 1)
    y[0:2]  = rms_norm(y) * weight                          # with weights; what of it is kept
    q, k, v = rotated(y[0]) * scaling, rotated(y[1]), y[2]
    rotated(y1, y2) = (y1 cos - y2 sin, y2 cos + y1 sin)    # the halves of a head

Each of q, k and v may be missing, in `source` too. Cost per row of F columns, with two-byte
storage: 4F bytes and 4D of cos and sin, 2F more for norms that are kept; memory bandwidth is the
bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from g2r_fast.kernels.configs import heads_config
from g2r_fast.kernels.launching import (
    TRITON_DTYPES,
    CompileCase,
    check_vector,
    require_triton,
)
from g2r_fast.kernels.rms_norm import check_dense, check_shapes

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; heads() then says so
    triton = None

__all__ = ["cases_of_heads", "compile_cases", "heads", "norm_pointers"]

if triton is not None:

    @triton.jit
    def _heads_kernel(  # type: ignore[no-untyped-def]
        source_ptr,
        cos_ptr,
        sin_ptr,
        index_ptr,
        q_ptr,
        k_ptr,
        v_ptr,
        q_weight_ptr,
        q_normed_ptr,
        q_rstd_ptr,
        k_weight_ptr,
        k_normed_ptr,
        k_rstd_ptr,
        eps,
        scaling,
        Q: tl.constexpr,  # heads of each, 0 where it is missing
        K: tl.constexpr,
        V: tl.constexpr,
        HALF: tl.constexpr,
        Q_NORM: tl.constexpr,
        K_NORM: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
    ):
        D: tl.constexpr = 2 * HALF
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        columns = tl.arange(0, BLOCK_HALF)
        inside = columns < HALF
        is_q = head < Q
        is_k = (head >= Q) & (head < Q + K)
        is_v = (head >= Q + K) & (head < Q + K + V)
        source = source_ptr + row * ((Q + K + V) * D)
        at = head[:, None] * D + columns[None, :]
        mask = (head < Q + K + V)[:, None] & inside[None, :]
        y1 = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        y2 = tl.load(source + at + HALF, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * HALF + columns, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + row * HALF + columns, mask=inside, other=0.0)
        storage = q_ptr.dtype.element_ty

        if Q_NORM or K_NORM:
            saved = tl.load(index_ptr + row).to(tl.int64)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y1 * y1 + y2 * y2, axis=1) / D + eps))
            normed1 = (y1 * rstd[:, None]).to(storage)
            normed2 = (y2 * rstd[:, None]).to(storage)
            weight1 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
            weight2 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
            if Q_NORM:
                kept = head < tl.where(saved >= 0, Q, 0)
                both = kept[:, None] & inside[None, :]
                kept_at = q_normed_ptr + saved * (Q * D) + at
                tl.store(kept_at, normed1, mask=both)
                tl.store(kept_at + HALF, normed2, mask=both)
                tl.store(q_rstd_ptr + saved * Q + head, rstd, mask=kept)
                w1 = tl.load(q_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                w2 = tl.load(q_weight_ptr + HALF + columns, mask=inside, other=0.0).to(tl.float32)
                weight1 = tl.where(is_q[:, None], w1[None, :], weight1)
                weight2 = tl.where(is_q[:, None], w2[None, :], weight2)
            if K_NORM:
                kept = (head >= Q) & (head < tl.where(saved >= 0, Q + K, 0))
                both = kept[:, None] & inside[None, :]
                kept_at = k_normed_ptr + saved * (K * D) + (at - Q * D)
                tl.store(kept_at, normed1, mask=both)
                tl.store(kept_at + HALF, normed2, mask=both)
                tl.store(k_rstd_ptr + saved * K + (head - Q), rstd, mask=kept)
                w1 = tl.load(k_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                w2 = tl.load(k_weight_ptr + HALF + columns, mask=inside, other=0.0).to(tl.float32)
                weight1 = tl.where(is_k[:, None], w1[None, :], weight1)
                weight2 = tl.where(is_k[:, None], w2[None, :], weight2)
            has_norm = (is_q & Q_NORM) | (is_k & K_NORM)
            weighted1 = (normed1.to(tl.float32) * weight1).to(storage).to(tl.float32)
            weighted2 = (normed2.to(tl.float32) * weight2).to(storage).to(tl.float32)
            y1 = tl.where(has_norm[:, None], weighted1, y1)
            y2 = tl.where(has_norm[:, None], weighted2, y2)

        rotated1 = y1 * cos[None, :] - y2 * sin[None, :]
        rotated2 = y2 * cos[None, :] + y1 * sin[None, :]
        if Q > 0:
            mask = is_q[:, None] & inside[None, :]
            q = q_ptr + row * (Q * D) + at
            tl.store(q, (rotated1 * scaling).to(storage), mask=mask)
            tl.store(q + HALF, (rotated2 * scaling).to(storage), mask=mask)
        if K > 0:
            mask = is_k[:, None] & inside[None, :]
            k = k_ptr + row * (K * D) + (at - Q * D)
            tl.store(k, rotated1.to(storage), mask=mask)
            tl.store(k + HALF, rotated2.to(storage), mask=mask)
        if V > 0:
            mask = is_v[:, None] & inside[None, :]
            v = v_ptr + row * (V * D) + (at - (Q + K) * D)
            tl.store(v, y1.to(storage), mask=mask)
            tl.store(v + HALF, y2.to(storage), mask=mask)


def heads(
    source: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    q_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    k_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    scaling: float = 1.0,
) -> None:
    """``q, k, v = rotated(norm(y_q)) * scaling, rotated(norm(y_k)), y_v`` of ``source``'s heads.

    Args:
        source: [R, (heads + 2 * kv_heads) * D] float32, float16 or bfloat16: the rows of those of
            q, k and v that are given, in this order.
        cos: [R, D / 2] float32.
        sin: [R, D / 2] float32.
        index: [R] int32, the row of what the norms keep, -1 for none. The values are not checked
            here, as that would wait for the device.
        q: [R, heads, D] of the dtype of ``source``, as are k and v; None: missing.
        k: [R, kv_heads, D].
        v: [R, kv_heads, D].
        q_norm: weight [D], normed [kept, heads, D], rstd [kept, heads] float32; None: no norm.
        k_norm: the same for k.
        eps: of the norms.
        scaling: of q.

    Everything is contiguous and computed in float32; a normed head and its product with the weight
    are rounded to the dtype of ``source``.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes, devices or widths other than these.
    """
    require_triton(triton, "heads")
    half = cos.shape[-1]
    given = [0 if part is None else part.shape[1] for part in (q, k, v)]
    present = {name: part for name, part in (("q", q), ("k", k), ("v", v)) if part is not None}
    check_dense(torch.float32, source, cos=cos, sin=sin)
    check_dense(source.dtype, source, source=source, **present)
    check_vector("index", index, (torch.int32,), source)
    check_shapes((len(source), -1), source=source)
    check_shapes((len(source), half), cos=cos, sin=sin)
    check_shapes((len(source), -1, 2 * half), **present)
    if source.shape[1] != sum(given) * 2 * half:
        raise InputError(
            "source does not hold the heads that are asked for",
            expected=f"{sum(given)} heads of {2 * half}",
            got=f"{source.shape[1]} columns",
        )
    q_norm = q_norm if q is not None else None
    k_norm = k_norm if k is not None else None
    missing = (source, source, cos)  # pointers that the kernel then never reads
    for part, norm in ((q, q_norm), (k, k_norm)):
        if part is not None and norm is not None:
            check_dense(None, source, weight=norm[0])
            check_dense(source.dtype, source, normed=norm[1])
            check_dense(torch.float32, source, rstd=norm[2])
            check_shapes((2 * half,), weight=norm[0])
            check_shapes((-1, part.shape[1], 2 * half), normed=norm[1])
            check_shapes(tuple(norm[1].shape[:2]), rstd=norm[2])
    if not len(source) or not sum(given):
        return
    norms = q_norm is not None or k_norm is not None
    config = heads_config(sum(given), half, norms)
    _heads_kernel[(len(source), triton.cdiv(sum(given), config.blocks["BLOCK_HEADS"]))](
        source,
        cos,
        sin,
        index,
        *(source if part is None else part for part in (q, k, v)),
        *(q_norm or missing),
        *(k_norm or missing),
        eps,
        scaling,
        Q=given[0],
        K=given[1],
        V=given[2],
        HALF=half,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        **config.blocks,
        **config.options(),
    )


def compile_cases() -> list[CompileCase]:
    """What a middle and a last layer ask for, with and without norms; every storage dtype."""

    def signature(dtype: str) -> dict[str, str]:
        return {
            "source_ptr": f"*{dtype}",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "index_ptr": "*i32",
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}"),
            **norm_pointers(dtype),
            "eps": "fp32",
            "scaling": "fp32",
        }

    return cases_of_heads("heads", _heads_kernel, signature)


def norm_pointers(dtype: str) -> dict[str, str]:
    """Of the norms of queries and keys, in the order in which both kernels take them."""
    return {
        f"{of}_{what}_ptr": "*fp32" if what == "rstd" else f"*{dtype}"
        for of in "qk"
        for what in ("weight", "normed", "rstd")
    }


def cases_of_heads(
    name: str, kernel: Any, signature: Callable[[str], dict[str, str]]
) -> list[CompileCase]:
    """What is compiled of this kernel and of its backward; `signature` of a storage dtype."""
    cases = []
    for dtype in TRITON_DTYPES.values():
        for q, k, v, half, aligned in (
            (12, 2, 2, 64, True),
            (0, 2, 2, 64, True),
            (12, 0, 0, 64, True),
            (32, 8, 8, 64, True),
            (8, 4, 4, 128, True),
            (3, 1, 1, 7, False),
        ):
            for norm in (False, True):
                config = heads_config(q + k + v, half, norm)
                cases.append(
                    CompileCase(
                        name=f"{name} {q} {k} {v} {2 * half}{' norm' if norm else ''} {dtype}"
                        f"{' aligned' if aligned else ''}",
                        kernel=kernel,
                        signature=signature(dtype),
                        constants={
                            "Q": q,
                            "K": k,
                            "V": v,
                            "HALF": half,
                            "Q_NORM": norm and q > 0,
                            "K_NORM": norm and k > 0,
                            **config.blocks,
                        },
                        options=config.options(),
                        aligned=aligned,
                    )
                )
    return cases
