"""Gradients of attention's keys and values, one lane at a time, from all queries that see them.

    p = exp(s - lse);  dv = p.T @ grad_out;  dk = (p * (grad_out @ v.T - delta)).T @ q

with the slope of the cap at s where there is one. One program takes a tile of keys of one lane and
one kv head, and walks the lane's queries at or behind them, all heads of the group: sums stay in
registers, are added in one order, and are written once.
Cost: 8 D FLOPs for each query head and key that it sees; products are the bound.
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
        load_rows,
        product,
        store_rows,
        tanh,
    )
except ImportError:  # a machine without a GPU need not have it; the launcher then says so
    triton = None

__all__ = ["attention_backward_keys", "compile_cases"]

if triton is not None:

    @triton.jit
    def _seeing_queries(  # type: ignore[no-untyped-def]
        k,
        v,
        keys,
        packed,
        end,
        first,
        first_back,
        stride,
        kv_head,
        q_ptr,
        grad_out_ptr,
        lse_ptr,
        delta_ptr,
        positions_ptr,
        window,
        softcap,
        dk,
        dv,
        HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        MASKED: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        valid = packed < end
        token = packed // GROUP
        head = kv_head * GROUP + packed % GROUP
        rows = (first + token).to(tl.int64) * HEADS + head
        back = (first_back + token * stride).to(tl.int64) * HEADS + head
        q = load_rows(q_ptr, rows, valid, HEAD_DIM, BLOCK_D, True)
        grad = load_rows(grad_out_ptr, back, valid, HEAD_DIM, BLOCK_D, True)
        # What is not valid weighs exp(-inf) = 0.
        lse2 = tl.load(lse_ptr + rows, mask=valid, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + back, mask=valid, other=0.0)
        s = product(k, tl.trans(q), PRODUCTS)
        if CAPPED:
            capped = tanh(s / softcap)
            s = softcap * capped
        p = tl.exp2(s * LOG2_E - lse2[None, :])
        if MASKED:
            positions = tl.load(positions_ptr + first + token, mask=valid, other=0)
            seen = keys[:, None] <= positions[None, :]
            if WINDOWED:
                seen = seen & (positions[None, :] - keys[:, None] < window)
            p = tl.where(seen, p, 0.0)
        dv = added_product(p, grad, dv, PRODUCTS)
        ds = p * (product(v, tl.trans(grad), PRODUCTS) - delta[None, :])
        if CAPPED:
            ds = ds * (1.0 - capped * capped)
        return added_product(ds, q, dk, PRODUCTS), dv

    @triton.jit(do_not_specialize=["window"])
    def _attention_backward_keys_kernel(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        grad_out_ptr,
        dk_ptr,
        dv_ptr,
        lse_ptr,
        delta_ptr,
        positions_ptr,
        entries_ptr,
        keys_ptr,
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
        named = keys_ptr + tl.load(tile) * 7
        first_key = tl.load(tile + 1) * KEYS
        row = tl.load(named)
        start = tl.load(named + 1)
        tokens = tl.load(named + 2)
        key_back = tl.load(named + 3)
        key_stride = tl.load(named + 4)
        offsets = first_key + tl.arange(0, KEYS)
        inside = offsets < tokens
        keys = start + offsets
        lowest = start + first_key
        highest = tl.minimum(lowest + KEYS, start + tokens) - 1
        # Keys behind the last are zeros; what they sum up to is not stored.
        rows = (row + offsets).to(tl.int64) * KV_HEADS + kv_head
        k = load_rows(k_ptr, rows, inside, HEAD_DIM, BLOCK_D, True)
        v = load_rows(v_ptr, rows, inside, HEAD_DIM, BLOCK_D, True)

        dk = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        dv = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        for at in range(tl.load(named + 5), tl.load(named + 6)):
            entry = entries_ptr + at * 6
            first = tl.load(entry + 1)
            count = tl.load(entry + 2)
            first_back = tl.load(entry + 3)
            stride = tl.load(entry + 4)
            nearest = tl.load(positions_ptr + first)
            farthest = tl.load(positions_ptr + first + count - 1)
            # Positions ascend: nearest + i <= that of token i <= farthest - (count - 1 - i).
            # Tokens from `begin` on may see a key, from `whole` on they see all of them.
            begin = tl.minimum(tl.maximum(lowest - farthest + count - 1, 0), count)
            whole = tl.minimum(tl.maximum(highest - nearest, begin), count)
            end = count
            if WINDOWED:
                end = tl.maximum(tl.minimum(count, highest + window - nearest), begin)
                whole = tl.minimum(whole, end)
            # In packed rows, and whole tiles.
            begin *= GROUP
            end *= GROUP
            before = (whole * GROUP - begin + ROWS - 1) // ROWS
            whole = begin + before * ROWS
            if WINDOWED:
                covered = tl.minimum((lowest + window - farthest + count - 1) * GROUP, end)
                tiles = tl.maximum(covered - whole, 0) // ROWS
            else:
                tiles = tl.maximum(end - whole + ROWS - 1, 0) // ROWS
            masked = before
            if WINDOWED:
                masked += tl.maximum(end - whole - tiles * ROWS + ROWS - 1, 0) // ROWS
            for i in range(masked):
                packed = begin + i * ROWS
                if WINDOWED:
                    packed = tl.where(i < before, packed, packed + tiles * ROWS)
                dk, dv = _seeing_queries(
                    k, v, keys, packed + tl.arange(0, ROWS), end, first, first_back, stride,
                    kv_head, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, positions_ptr, window,
                    softcap, dk, dv,
                    HEADS, GROUP, HEAD_DIM, BLOCK_D, True, WINDOWED, CAPPED, PRODUCTS,
                )  # fmt: skip
            for i in range(tiles):
                packed = whole + i * ROWS
                dk, dv = _seeing_queries(
                    k, v, keys, packed + tl.arange(0, ROWS), end, first, first_back, stride,
                    kv_head, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, positions_ptr, window,
                    softcap, dk, dv,
                    HEADS, GROUP, HEAD_DIM, BLOCK_D, False, WINDOWED, CAPPED, PRODUCTS,
                )  # fmt: skip
        back = (key_back + offsets * key_stride).to(tl.int64) * KV_HEADS + kv_head
        store_rows(dk_ptr, back, inside, dk, HEAD_DIM, BLOCK_D, PRODUCTS)
        store_rows(dv_ptr, back, inside, dv, HEAD_DIM, BLOCK_D, PRODUCTS)


def attention_backward_keys(
    tiles: BackwardTiles,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    config: AttentionConfig | None = None,
) -> None:
    """The gradients of k and v, for every key of a run and each of its lanes.

    Args:
        tiles: of `config.keys` keys.
        q, k, v, lse: as attention_forward took and wrote them.
        grad_out: [B, heads, D] in q's dtype.
        delta: [B, heads] float32, from attention_backward_queries.
        dk, dv: [B_keys, kv_heads, D] float32, written.
        window, softcap: as in attention_forward.
        config: launch configuration; by default that of configs.py.
    """
    require_triton(triton, "attention_backward_keys")
    if not len(tiles.key_tiles):
        return
    _, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    config = config or attention_config("keys", q, softcap)
    windowed = window is not None and window < tiles.length
    _attention_backward_keys_kernel[(len(tiles.key_tiles) * kv_heads,)](
        q,
        k,
        v,
        grad_out,
        dk,
        dv,
        lse,
        delta,
        tiles.positions,
        tiles.entries,
        tiles.keys,
        tiles.key_tiles,
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
        _attention_backward_keys_kernel,
        "keys",
        storage=("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr"),
        floats=("dk_ptr", "dv_ptr", "lse_ptr", "delta_ptr"),
        tables=("positions_ptr", "entries_ptr", "keys_ptr", "tiles_ptr"),
    )
