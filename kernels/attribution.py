"""From embedding gradients to token rewards: read-out, temperature softmax, sums, in one launch.

    b_j = (grads[first_j + t * stride_j] * embed[row_map[start_j + t]]).sum(-1) * scale_j  # or norm
    alpha_j = softmax(b_j / temperature)  # or of b_j / b_j.std(correction=0) / temperature
    rewards[start_j : start_j + T_j] += weight_j * alpha_j

Equations 3, 4, 5, 11 and 12 of arXiv 2602.01791. Cost: every gradient element of a judged token is
read once, and the embedding row once per judgement; memory bandwidth is the bound. Scores are
accumulated in float32; softmax and sums, a few elements per token, are float64 as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.launching import (
    TRITON_DTYPES,
    CompileCase,
    check_rows,
    check_vector,
    require_triton,
)
from g2r_fast.kernels.segment_softmax import check_segments, segment_tables

from g2r_fast.errors import InputError, InputTypeError

try:
    import triton
    import triton.language as tl
    from g2r_fast.kernels.segment_softmax import count_in, softmax_and_sum
except ImportError:  # a machine without a GPU need not have it; attribution() then says so
    triton = None

__all__ = ["CONFIG", "READOUTS", "attribution", "compile_cases"]

READOUTS = ("dot", "l1", "l2")


CONFIG = LAUNCHES["attribution"]

if triton is not None:

    @triton.jit
    def _attribution_kernel(  # type: ignore[no-untyped-def]
        b_ptr,
        alpha_ptr,
        rewards_ptr,
        grads_ptr,
        embed_ptr,
        row_map_ptr,
        numbers_ptr,
        tiles_ptr,
        judgements_ptr,
        components_ptr,
        order_ptr,
        counters_ptr,
        grads_stride,
        embed_stride,
        H,
        J,
        READOUT: tl.constexpr,
        STANDARDISE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ):
        tile = tl.program_id(0)
        j = tl.load(tiles_ptr + 2 * tile)
        judgement_ptr = judgements_ptr + j * 7
        _read_out(
            b_ptr, grads_ptr, embed_ptr, row_map_ptr, numbers_ptr + J + 1 + j, judgement_ptr,
            tl.load(tiles_ptr + 2 * tile + 1), grads_stride, embed_stride, H,
            READOUT, BLOCK_T, BLOCK_H,
        )  # fmt: skip
        if count_in(counters_ptr + j) == tl.load(judgement_ptr + 6) - 1:
            softmax_and_sum(
                b_ptr, alpha_ptr, rewards_ptr, numbers_ptr, judgements_ptr, components_ptr,
                order_ptr, counters_ptr, j, J, STANDARDISE, BLOCK_S,
            )  # fmt: skip

    @triton.jit
    def _read_out(  # type: ignore[no-untyped-def]
        b_ptr,
        grads_ptr,
        embed_ptr,
        row_map_ptr,
        scale_ptr,
        judgement_ptr,
        index,
        grads_stride,
        embed_stride,
        H,
        READOUT: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        offset = tl.load(judgement_ptr).to(tl.int64)
        count = tl.load(judgement_ptr + 1)
        first = tl.load(judgement_ptr + 4).to(tl.int64)
        stride = tl.load(judgement_ptr + 5).to(tl.int64)
        tokens = index * BLOCK_T + tl.arange(0, BLOCK_T)
        live = tokens < count
        grads_row = grads_ptr + (first + tokens * stride) * grads_stride  # [BLOCK_T]
        if READOUT == "dot":
            start = tl.load(judgement_ptr + 2).to(tl.int64)
            source = tl.load(row_map_ptr + start + tokens, mask=live, other=0).to(tl.int64)
            embed_row = embed_ptr + source * embed_stride
        # Per column slot first, across the slots at the end: short chains of additions.
        total = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        for begin in range(0, H, BLOCK_H):
            columns = begin + tl.arange(0, BLOCK_H)
            mask = live[:, None] & (columns < H)[None, :]
            grad = tl.load(grads_row[:, None] + columns[None, :], mask=mask, other=0.0)
            grad = grad.to(tl.float32)
            if READOUT == "dot":
                embed = tl.load(embed_row[:, None] + columns[None, :], mask=mask, other=0.0)
                total += grad * embed.to(tl.float32)
            elif READOUT == "l1":
                total += tl.abs(grad)
            else:
                total += grad * grad
        value = tl.sum(total, axis=1)
        if READOUT == "l2":
            value = tl.sqrt_rn(value)
        value = value * tl.load(scale_ptr).to(tl.float32)
        tl.store(b_ptr + offset + tokens, value, mask=live)


def attribution(
    grads: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    first_rows: Sequence[int],
    strides: Sequence[int],
    temperature: float,
    standardise: bool,
    embed: torch.Tensor | None = None,
    row_map: torch.Tensor | None = None,
    *,
    readout: str = "dot",
    scales: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`softmax_rewards` of `b_j = (grads[rows_j] * embed[row_map[tokens_j]]).sum(-1) * scale_j`.

    Args:
        grads: [R, H] float32, float16 or bfloat16; row first_rows[j] + t * strides[j] belongs to
            token t of judgement j.
        lengths, weights, starts, count, temperature, standardise: as in softmax_rewards.
        embed: [F, H] embedding rows, any of the dtypes; "dot" only.
        row_map: [count] int64 or int32, the row of embed of each token that can earn; "dot" only.
        readout: "dot", "l1" or "l2", the norms of the gradient.
        scales: J numbers that multiply b; 1 by default.

    Returns:
        b [total] float32, alpha [total] and rewards [count] float64.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes or devices other than these.
    """
    require_triton(triton, "attribution")
    if readout not in READOUTS:
        raise InputError("unknown readout", expected=" | ".join(READOUTS), got=repr(readout))
    check_rows("grads", grads, grads)
    check_segments(lengths, weights, starts, count)
    J = len(lengths)
    for name, given in (("first_rows", first_rows), ("strides", strides), ("scales", scales)):
        if given is not None and len(given) != J:
            raise InputError(
                f"{name} has another number of entries", expected=str(J), got=len(given)
            )
    spans = zip(first_rows, strides, lengths, strict=True)
    for j, (first, stride, length) in enumerate(spans):
        if length and (first < 0 or stride < 0 or first + (length - 1) * stride >= len(grads)):
            raise InputError("a judgement reads rows that grads does not have",
                             expected=f"rows below {len(grads)}", index=j)  # fmt: skip
    if readout != "dot":
        embed = row_map = grads  # pointers that the kernel then never reads
    elif embed is None or row_map is None:
        raise InputTypeError('readout="dot" needs embed and row_map', got="None")
    else:
        check_rows("embed", embed, grads)
        if embed.shape[1] != grads.shape[1]:
            raise InputError("grads and embed differ in width", expected=str(grads.shape[1]),
                             got=embed.shape[1])  # fmt: skip
        check_vector("row_map", row_map, (torch.int64, torch.int32), row_map)
        if len(row_map) != count or row_map.device != grads.device:
            raise InputError("row_map must have one entry per reward, on the device of grads",
                             expected=f"{count} on {grads.device}",
                             got=f"{len(row_map)} on {row_map.device}")  # fmt: skip
    tables = segment_tables(
        lengths, weights, starts, temperature, grads.device, block_t=CONFIG.blocks["BLOCK_T"],
        first_rows=first_rows, strides=strides, scales=scales,
    )  # fmt: skip
    total = sum(lengths)
    b = torch.empty(total, dtype=torch.float32, device=grads.device)
    alpha = torch.empty(total, dtype=torch.float64, device=grads.device)
    rewards = torch.zeros(count, dtype=torch.float64, device=grads.device)
    if len(tables.tiles):
        _attribution_kernel[(len(tables.tiles),)](
            b,
            alpha,
            rewards,
            grads,
            embed,
            row_map,
            tables.numbers,
            tables.tiles,
            tables.judgements,
            tables.components,
            tables.order,
            tables.counters,
            grads.stride(0),
            embed.stride(0),
            grads.shape[1],
            J,
            READOUT=readout,
            STANDARDISE=standardise,
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return b, alpha, rewards


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation: gradients float32; embeddings of any dtype for "dot"."""
    forms = [("l1", "fp32"), ("l2", "fp32")]
    forms += [("dot", dtype) for dtype in TRITON_DTYPES.values()]
    return [
        CompileCase(
            name=f"attribution {readout} {dtype}{' auto' if standardise else ''}"
            f"{' aligned' if aligned else ''}",
            kernel=_attribution_kernel,
            signature={
                "b_ptr": "*fp32",
                "alpha_ptr": "*fp64",
                "rewards_ptr": "*fp64",
                "grads_ptr": "*fp32",
                "embed_ptr": f"*{dtype}",
                "row_map_ptr": "*i64",
                "numbers_ptr": "*fp64",
                "tiles_ptr": "*i32",
                "judgements_ptr": "*i32",
                "components_ptr": "*i32",
                "order_ptr": "*i32",
                "counters_ptr": "*i32",
                "grads_stride": "i32",
                "embed_stride": "i32",
                "H": "i32",
                "J": "i32",
            },
            constants={
                "READOUT": readout,
                "STANDARDISE": standardise,
                **CONFIG.blocks,
            },
            options=CONFIG.options(),
            aligned=aligned,
        )
        for readout, dtype in forms
        for standardise in (False, True)
        for aligned in (True, False)
    ]
