"""Gradients of a projection's rows from those of queries, keys and values.

    g      = (rotated_back(dq) * scaling, rotated_back(dk), dv)
    g[0:2] = rstd * (g * weight - normed * (g * weight * normed).mean(-1))  # with norms
    out    = torch.cat([part.flatten(1) for part in g], 1)
    rotated_back(g1, g2) = (g1 cos + g2 sin, g2 cos - g1 sin)               # the halves of a head

cos, sin, normed and rstd are those of the forward row that `index` names; each of dq, dk and dv may
be missing, in `out` too. Cost per row, with two-byte storage: 4 heads D + 12 kv_heads D bytes and
4D of cos and sin, 2 (heads + kv_heads) D more with norms; memory bandwidth is the bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.configs import heads_config
from g2r_fast.kernels.heads import cases_of_heads, norm_pointers
from g2r_fast.kernels.launching import (
    CompileCase,
    check_vector,
    require_triton,
)
from g2r_fast.kernels.rms_norm import check_dense, check_shapes

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; heads_backward() then says so
    triton = None

__all__ = ["compile_cases", "heads_backward"]

if triton is not None:

    @triton.jit
    def _heads_backward_kernel(  # type: ignore[no-untyped-def]
        dq_ptr,
        dk_ptr,
        dv_ptr,
        cos_ptr,
        sin_ptr,
        index_ptr,
        q_weight_ptr,
        q_normed_ptr,
        q_rstd_ptr,
        k_weight_ptr,
        k_normed_ptr,
        k_rstd_ptr,
        out_ptr,
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
        is_q = (head < Q)[:, None] & inside[None, :]
        is_k = ((head >= Q) & (head < Q + K))[:, None] & inside[None, :]
        is_v = ((head >= Q + K) & (head < Q + K + V))[:, None] & inside[None, :]
        at = head[:, None] * D + columns[None, :]
        saved = tl.load(index_ptr + row).to(tl.int64)

        g1 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
        g2 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
        if Q + K > 0:
            cos = tl.load(cos_ptr + saved * HALF + columns, mask=inside, other=0.0)
            sin = tl.load(sin_ptr + saved * HALF + columns, mask=inside, other=0.0)
            if Q > 0:
                dq = dq_ptr + row * (Q * D) + at
                g1 += tl.load(dq, mask=is_q, other=0.0).to(tl.float32) * scaling
                g2 += tl.load(dq + HALF, mask=is_q, other=0.0).to(tl.float32) * scaling
            if K > 0:
                dk = dk_ptr + row * (K * D) + (at - Q * D)
                g1 += tl.load(dk, mask=is_k, other=0.0)
                g2 += tl.load(dk + HALF, mask=is_k, other=0.0)
            back1 = g1 * cos[None, :] + g2 * sin[None, :]
            g2 = g2 * cos[None, :] - g1 * sin[None, :]
            g1 = back1
        if Q_NORM or K_NORM:
            rstd = tl.zeros([BLOCK_HEADS], dtype=tl.float32)
            normed1 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
            normed2 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
            weight1 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
            weight2 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
            if Q_NORM:
                rstd += tl.load(q_rstd_ptr + saved * Q + head, mask=head < Q, other=0.0)
                kept = q_normed_ptr + saved * (Q * D) + at
                normed1 += tl.load(kept, mask=is_q, other=0.0).to(tl.float32)
                normed2 += tl.load(kept + HALF, mask=is_q, other=0.0).to(tl.float32)
                w1 = tl.load(q_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                w2 = tl.load(q_weight_ptr + HALF + columns, mask=inside, other=0.0).to(tl.float32)
                weight1 = tl.where(is_q, w1[None, :], weight1)
                weight2 = tl.where(is_q, w2[None, :], weight2)
            if K_NORM:
                among = (head >= Q) & (head < Q + K)
                rstd += tl.load(k_rstd_ptr + saved * K + (head - Q), mask=among, other=0.0)
                kept = k_normed_ptr + saved * (K * D) + (at - Q * D)
                normed1 += tl.load(kept, mask=is_k, other=0.0).to(tl.float32)
                normed2 += tl.load(kept + HALF, mask=is_k, other=0.0).to(tl.float32)
                w1 = tl.load(k_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                w2 = tl.load(k_weight_ptr + HALF + columns, mask=inside, other=0.0).to(tl.float32)
                weight1 = tl.where(is_k, w1[None, :], weight1)
                weight2 = tl.where(is_k, w2[None, :], weight2)
            weighted1 = g1 * weight1
            weighted2 = g2 * weight2
            mean = tl.sum(weighted1 * normed1 + weighted2 * normed2, axis=1) / D
            back1 = rstd[:, None] * (weighted1 - normed1 * mean[:, None])
            back2 = rstd[:, None] * (weighted2 - normed2 * mean[:, None])
            if Q_NORM:
                g1 = tl.where(is_q, back1, g1)
                g2 = tl.where(is_q, back2, g2)
            if K_NORM:
                g1 = tl.where(is_k, back1, g1)
                g2 = tl.where(is_k, back2, g2)
        if V > 0:
            dv = dv_ptr + row * (V * D) + (at - (Q + K) * D)
            g1 += tl.load(dv, mask=is_v, other=0.0)
            g2 += tl.load(dv + HALF, mask=is_v, other=0.0)
        mask = (head < Q + K + V)[:, None] & inside[None, :]
        out = out_ptr + row * ((Q + K + V) * D) + at
        tl.store(out, g1.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, g2.to(out_ptr.dtype.element_ty), mask=mask)


def heads_backward(
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    *,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    q_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    k_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    scaling: float = 1.0,
) -> None:
    """``out = cat((back(dq) * scaling, back(dk), dv))``: the gradient of ``heads``' source.

    Args:
        cos: [kept, D / 2] float32.
        sin: [kept, D / 2] float32.
        index: [B] int32, the row of ``cos``, ``sin`` and of what the norms kept to read. The
            values are not checked here, as that would wait for the device.
        out: [B, (heads + 2 * kv_heads) * D] float32, float16 or bfloat16: those of q, k and v
            whose gradient is given, in this order.
        dq: [B, heads, D] float32, float16 or bfloat16; None: missing.
        dk: [B, kv_heads, D] float32; None: missing.
        dv: [B, kv_heads, D] float32; None: missing.
        q_norm: weight [D], normed [kept, heads, D] float32, float16 or bfloat16, rstd
            [kept, heads] float32; None: no norm.
        k_norm: the same for k.
        scaling: of q.

    Everything is contiguous and computed in float32.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes, devices or widths other than these.
    """
    require_triton(triton, "heads_backward")
    half = cos.shape[-1]
    given = [0 if part is None else part.shape[1] for part in (dq, dk, dv)]
    wide = {name: part for name, part in (("dk", dk), ("dv", dv)) if part is not None}
    check_dense(torch.float32, out, cos=cos, sin=sin, **wide)
    check_dense(out.dtype, out, out=out)
    if dq is not None:
        check_dense(None, out, dq=dq)
    check_vector("index", index, (torch.int32,), out)
    check_shapes((len(out), -1), out=out)
    check_shapes((-1, half), cos=cos)
    check_shapes(tuple(cos.shape), sin=sin)
    check_shapes((len(out), -1, 2 * half), **wide, **({} if dq is None else {"dq": dq}))
    if out.shape[1] != sum(given) * 2 * half:
        raise InputError(
            "out does not hold the heads that are given",
            expected=f"{sum(given)} heads of {2 * half}",
            got=f"{out.shape[1]} columns",
        )
    q_norm = q_norm if dq is not None else None
    k_norm = k_norm if dk is not None else None
    missing = (out, out, cos)  # pointers that the kernel then never reads
    for part, norm in ((dq, q_norm), (dk, k_norm)):
        if part is not None and norm is not None:
            check_dense(None, out, weight=norm[0])
            check_dense(None, out, normed=norm[1])
            check_dense(torch.float32, out, rstd=norm[2])
            check_shapes((2 * half,), weight=norm[0])
            check_shapes((-1, part.shape[1], 2 * half), normed=norm[1])
            check_shapes(tuple(norm[1].shape[:2]), rstd=norm[2])
    if not len(out) or not sum(given):
        return
    norms = q_norm is not None or k_norm is not None
    config = heads_config(sum(given), half, norms)
    _heads_backward_kernel[(len(out), triton.cdiv(sum(given), config.blocks["BLOCK_HEADS"]))](
        out if dq is None else dq,
        cos if dk is None else dk,
        cos if dv is None else dv,
        cos,
        sin,
        index,
        *(q_norm or missing),
        *(k_norm or missing),
        out,
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
    """What a middle and a last layer send, with and without norms; every storage dtype."""

    def signature(dtype: str) -> dict[str, str]:
        return {
            "dq_ptr": f"*{dtype}",
            "dk_ptr": "*fp32",
            "dv_ptr": "*fp32",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "index_ptr": "*i32",
            **norm_pointers(dtype),
            # Small gradients would vanish in float16.
            "out_ptr": "*fp32" if dtype == "fp16" else f"*{dtype}",
            "scaling": "fp32",
        }

    return cases_of_heads("heads_backward", _heads_backward_kernel, signature)
