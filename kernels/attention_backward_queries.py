"""Gradient of attention's queries, one lane at a time, over all keys of their paths.

    delta = (grad_out * out).sum(-1);  p = exp(s - lse)
    dq = (p * (grad_out @ v[path].T - delta)) @ k[path]

with the slope of the cap at s where there is one. One program takes a tile of packed queries of
one lane and one kv head, as the forward does; `delta` is kept for the gradient of the keys.
Cost: 6 D FLOPs for each query head and key that it sees; products are the bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from g2r_fast.kernels.attention_paths import compile_cases_of
from g2r_fast.kernels.configs import AttentionConfig, attention_config, operand_precision
from g2r_fast.kernels.launching import CompileCase, is_interpreted, require_triton

if TYPE_CHECKING:
    from g2r_fast.device_tables import BackwardTiles

try:
    import triton
    import triton.language as tl
    from g2r_fast.kernels.attention_paths import (
        LOG2_E,
        added_product,
        key_tiles,
        load_keys,
        load_rows,
        product,
        segments_above,
        store_rows,
        tanh,
        visible,
        widened,
    )
except ImportError:  # a machine without a GPU need not have it; the launcher then says so
    triton = None

__all__ = ["attention_backward_queries", "compile_cases"]

if triton is not None:

    @triton.jit
    def _seen_keys(  # type: ignore[no-untyped-def]
        q,
        grad,
        lse2,
        delta,
        k_ptr,
        v_ptr,
        base,
        first_key,
        positions,
        high,
        window,
        softcap,
        dq,
        KEYS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        MASKED: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        keys = first_key + tl.arange(0, KEYS)
        row = base + first_key
        k = load_keys(k_ptr, row, keys < high, KEYS, KV_HEADS, HEAD_DIM, BLOCK_D, MASKED)
        v = load_keys(v_ptr, row, keys < high, KEYS, KV_HEADS, HEAD_DIM, BLOCK_D, MASKED)
        s = product(q, tl.trans(k), PRODUCTS)
        if CAPPED:
            capped = tanh(s / softcap)
            s = softcap * capped
        p = tl.exp2(s * LOG2_E - lse2[:, None])
        if MASKED:
            p = tl.where(visible(positions, keys, high, window, WINDOWED), p, 0.0)
        ds = p * (product(grad, tl.trans(v), PRODUCTS) - delta[:, None])
        if CAPPED:
            ds = ds * (1.0 - capped * capped)
        return added_product(ds, k, dq, PRODUCTS)

    @triton.jit(do_not_specialize=["window"])
    def _attention_backward_queries_kernel(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        out_ptr,
        grad_out_ptr,
        dq_ptr,
        lse_ptr,
        delta_ptr,
        segments_ptr,
        positions_ptr,
        entries_ptr,
        tiles_ptr,
        window,
        softcap,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        GROUP: tl.constexpr = HEADS // KV_HEADS
        program = tl.program_id(0)
        kv_head = program % KV_HEADS
        tile = tiles_ptr + program // KV_HEADS * 2
        entry = entries_ptr + tl.load(tile) * 6
        start_row = tl.load(tile + 1) * ROWS
        segment = tl.load(entry)
        first = tl.load(entry + 1)
        tokens = tl.load(entry + 2)
        first_back = tl.load(entry + 3)
        stride = tl.load(entry + 4)
        packed = start_row + tl.arange(0, ROWS)
        token = packed // GROUP
        valid = token < tokens
        head = kv_head * GROUP + packed % GROUP
        rows = (first + token).to(tl.int64) * HEADS + head
        back = (first_back + token * stride).to(tl.int64) * HEADS + head
        lowest = tl.load(positions_ptr + first + start_row // GROUP)
        last = tl.minimum((start_row + ROWS - 1) // GROUP, tokens - 1)
        highest = tl.load(positions_ptr + first + last)
        positions = tl.load(positions_ptr + first + token, mask=valid, other=0)
        q = load_rows(q_ptr, rows, valid, HEAD_DIM, BLOCK_D, True)
        grad = load_rows(grad_out_ptr, back, valid, HEAD_DIM, BLOCK_D, True)
        out = load_rows(out_ptr, rows, valid, HEAD_DIM, BLOCK_D, True)
        delta = tl.sum(widened(grad, PRODUCTS) * widened(out, PRODUCTS), 1)
        tl.store(delta_ptr + back, delta, mask=valid)
        lse2 = tl.load(lse_ptr + rows, mask=valid, other=float("inf")) * LOG2_E

        dq = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        k_ptr += kv_head * HEAD_DIM
        v_ptr += kv_head * HEAD_DIM
        for _ in range(segments_above(segments_ptr, segment, lowest, window, WINDOWED)):
            start = tl.load(segments_ptr + segment * 4)
            stop = tl.load(segments_ptr + segment * 4 + 1)
            base = tl.load(segments_ptr + segment * 4 + 2) - start
            segment = tl.load(segments_ptr + segment * 4 + 3)
            whole, count, low, before, masked, high = key_tiles(
                start, stop, lowest, highest, window, KEYS, WINDOWED
            )
            for i in range(count):
                at = whole + i * KEYS
                dq = _seen_keys(
                    q, grad, lse2, delta, k_ptr, v_ptr, base, at, positions, high,
                    window, softcap, dq,
                    KEYS, KV_HEADS, HEAD_DIM, BLOCK_D, False, WINDOWED, CAPPED, PRODUCTS,
                )  # fmt: skip
            for i in range(masked):
                at = tl.where(i < before, low + i * KEYS, whole + (count + i - before) * KEYS)
                dq = _seen_keys(
                    q, grad, lse2, delta, k_ptr, v_ptr, base, at, positions, high,
                    window, softcap, dq,
                    KEYS, KV_HEADS, HEAD_DIM, BLOCK_D, True, WINDOWED, CAPPED, PRODUCTS,
                )  # fmt: skip
        store_rows(dq_ptr, back, valid, dq, HEAD_DIM, BLOCK_D, PRODUCTS)


def attention_backward_queries(
    tiles: BackwardTiles,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    dq: torch.Tensor,
    delta: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    config: AttentionConfig | None = None,
) -> None:
    """`delta = (grad_out * out).sum(-1)` and the gradient of q, for every backward row.

    Args:
        tiles: of `config.rows` queries.
        q, k, v, out, lse: as attention_forward took and wrote them.
        grad_out: [B, heads, D] in q's dtype.
        dq: [B, heads, D] in q's dtype, written.
        delta: [B, heads] float32, written.
        window, softcap: as in attention_forward.
        config: launch configuration; by default that of configs.py.
    """
    require_triton(triton, "attention_backward_queries")
    if not len(tiles.query_tiles):
        return
    _, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    config = config or attention_config("queries", q, softcap)
    windowed = window is not None and window < tiles.length
    _attention_backward_queries_kernel[(len(tiles.query_tiles) * kv_heads,)](
        q,
        k,
        v,
        out,
        grad_out,
        dq,
        lse,
        delta,
        tiles.segments,
        tiles.positions,
        tiles.entries,
        tiles.query_tiles,
        window if windowed else 0,
        float(softcap),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        ROWS=config.rows,
        KEYS=config.keys,
        WINDOWED=windowed,
        CAPPED=softcap != 0,
        PRODUCTS=operand_precision(q.dtype, is_interpreted()),
        **config.options(),
    )


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration, with and without a window and a cap."""
    return compile_cases_of(
        _attention_backward_queries_kernel,
        "queries",
        storage=("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_out_ptr", "dq_ptr"),
        floats=("lse_ptr", "delta_ptr"),
        tables=("segments_ptr", "positions_ptr", "entries_ptr", "tiles_ptr"),
    )
