"""Attention of packed queries over their paths in a trie of segments.

    s = q @ k[path].T;  s = softcap * tanh(s / softcap) if softcap
    lse = s.logsumexp(-1);  out = exp(s - lse) @ v[path]

path: the keys at positions [max(0, p - window + 1), p] of the query's own segment and of the
segments above it. One program takes a tile of packed queries of one kv head over all their keys,
with a running maximum: keys are read once for the group's heads, `out` and `lse` written once.
Cost: 4 D FLOPs for each query head and key that it sees; products are the bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from g2r_fast.kernels.attention_paths import compile_cases_of
from g2r_fast.kernels.configs import AttentionConfig, attention_config, operand_precision
from g2r_fast.kernels.launching import CompileCase, is_interpreted, require_triton

if TYPE_CHECKING:
    from g2r_fast.device_tables import ForwardTiles

try:
    import triton
    import triton.language as tl
    from g2r_fast.kernels.attention_paths import (
        LN_2,
        LOG2_E,
        LOWEST,
        added_product,
        key_tiles,
        load_keys,
        load_rows,
        product,
        segments_above,
        store_rows,
        tanh,
        visible,
    )
except ImportError:  # a machine without a GPU need not have it; attention_forward() then says so
    triton = None

__all__ = ["attention_forward", "compile_cases"]

if triton is not None:

    @triton.jit
    def _seen_keys(  # type: ignore[no-untyped-def]
        q,
        k_ptr,
        v_ptr,
        base,
        first_key,
        positions,
        high,
        window,
        softcap,
        total,
        largest,
        mixed,
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
            s = softcap * tanh(s / softcap)
        s = s * LOG2_E
        if MASKED:
            s = tl.where(visible(positions, keys, high, window, WINDOWED), s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrunk = tl.exp2(largest - new)
        total = total * shrunk + tl.sum(p, 1)
        mixed = added_product(p, v, mixed * shrunk[:, None], PRODUCTS)
        return total, new, mixed

    @triton.jit(do_not_specialize=["window"])
    def _attention_forward_kernel(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        out_ptr,
        lse_ptr,
        segments_ptr,
        positions_ptr,
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
        tile = tiles_ptr + program // KV_HEADS * 4
        segment = tl.load(tile)
        first = tl.load(tile + 1)
        tokens = tl.load(tile + 2)
        start_row = tl.load(tile + 3) * ROWS
        packed = start_row + tl.arange(0, ROWS)
        token = packed // GROUP
        valid = token < tokens
        rows = (first + token).to(tl.int64) * HEADS + kv_head * GROUP + packed % GROUP
        lowest = tl.load(positions_ptr + first + start_row // GROUP)
        last = tl.minimum((start_row + ROWS - 1) // GROUP, tokens - 1)
        highest = tl.load(positions_ptr + first + last)
        positions = tl.load(positions_ptr + first + token, mask=valid, other=0)
        positions = tl.where(valid, positions, highest)
        q = load_rows(q_ptr, rows, valid, HEAD_DIM, BLOCK_D, True)

        total = tl.zeros([ROWS], dtype=tl.float32)
        largest = tl.zeros([ROWS], dtype=tl.float32) + LOWEST
        mixed = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
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
                total, largest, mixed = _seen_keys(
                    q, k_ptr, v_ptr, base, at, positions, high, window, softcap,
                    total, largest, mixed,
                    KEYS, KV_HEADS, HEAD_DIM, BLOCK_D, False, WINDOWED, CAPPED, PRODUCTS,
                )  # fmt: skip
            for i in range(masked):
                at = tl.where(i < before, low + i * KEYS, whole + (count + i - before) * KEYS)
                total, largest, mixed = _seen_keys(
                    q, k_ptr, v_ptr, base, at, positions, high, window, softcap,
                    total, largest, mixed,
                    KEYS, KV_HEADS, HEAD_DIM, BLOCK_D, True, WINDOWED, CAPPED, PRODUCTS,
                )  # fmt: skip
        store_rows(out_ptr, rows, valid, mixed / total[:, None], HEAD_DIM, BLOCK_D, PRODUCTS)
        tl.store(lse_ptr + rows, (largest + tl.log2(total)) * LN_2, mask=valid)


def attention_forward(
    tiles: ForwardTiles,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    config: AttentionConfig | None = None,
) -> None:
    """`out = softmax(q @ k.T + causal mask) @ v` for every query over its own path; `lse` too.

    Args:
        tiles: of `config.rows` queries.
        q: [queries, heads, D], scaled; float32, float16 or bfloat16, as k, v and out; dense.
        k, v: [rows, kv_heads, D].
        out: [queries, heads, D], written.
        lse: [queries, heads] float32, written.
        window: how many keys a query sees, its own included; None: all of its path.
        softcap: scores s are `softcap * tanh(s / softcap)`; 0: they are s.
        config: launch configuration; by default that of configs.py.
    """
    require_triton(triton, "attention_forward")
    _, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    config = config or attention_config("forward", q, softcap)
    if not len(tiles.tiles):
        return
    windowed = window is not None and window < tiles.length
    _attention_forward_kernel[(len(tiles.tiles) * kv_heads,)](
        q,
        k,
        v,
        out,
        lse,
        tiles.segments,
        tiles.positions,
        tiles.tiles,
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
        _attention_forward_kernel,
        "forward",
        storage=("q_ptr", "k_ptr", "v_ptr", "out_ptr"),
        floats=("lse_ptr",),
        tables=("segments_ptr", "positions_ptr", "tiles_ptr"),
    )
