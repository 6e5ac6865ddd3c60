"""What the attention kernels share on the device: rows, products, and the keys of a segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from g2r_fast.kernels.configs import attention_cases, operand_precision, replaced_on
from g2r_fast.kernels.launching import TRITON_DTYPES, CompileCase

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; the launchers then say so
    triton = None

__all__ = ["compile_cases", "compile_cases_of"]

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)
    LN_2 = tl.constexpr(0.6931471805599453)
    # Below every score, and finite: the difference of two of these is 0, not NaN.
    LOWEST = tl.constexpr(-1e30)

    @triton.jit
    def load_rows(  # type: ignore[no-untyped-def]
        ptr, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
    ):
        """`[len(rows), BLOCK_D]`, zero where a row is not valid and behind the head's columns."""
        columns = tl.arange(0, BLOCK_D)
        pointers = ptr + rows[:, None] * HEAD_DIM + columns[None, :]
        if HEAD_DIM != BLOCK_D:
            inside = (columns < HEAD_DIM)[None, :]
            if MASKED:
                inside = inside & valid[:, None]
            return tl.load(pointers, mask=inside, other=0.0)
        elif MASKED:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers)

    @triton.jit
    def load_keys(  # type: ignore[no-untyped-def]
        ptr,
        row,
        valid,
        KEYS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """The same for `KEYS` keys that follow each other; `row`, of the first, is a scalar.

        Offsets from the first fit into 32 bits: one register a pointer, not two.
        """
        first = ptr + row.to(tl.int64) * (KV_HEADS * HEAD_DIM)
        return load_rows(first, tl.arange(0, KEYS) * KV_HEADS, valid, HEAD_DIM, BLOCK_D, MASKED)

    @triton.jit
    def store_rows(  # type: ignore[no-untyped-def]
        ptr,
        rows,
        valid,
        values,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        columns = tl.arange(0, BLOCK_D)
        pointers = ptr + rows[:, None] * HEAD_DIM + columns[None, :]
        inside = valid[:, None]
        if HEAD_DIM != BLOCK_D:
            inside = inside & (columns < HEAD_DIM)[None, :]
        tl.store(pointers, rounded(values, ptr.dtype.element_ty, PRODUCTS), mask=inside)

    @triton.jit
    def rounded(x, dtype: tl.constexpr, PRODUCTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """float32 to a narrower dtype, to nearest: the interpreter cuts off for bfloat16."""
        if PRODUCTS == "wide" and dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)

    @triton.jit
    def widened(x, PRODUCTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """As float32: the interpreter takes a bfloat16 zero for a small number."""
        if PRODUCTS == "wide" and x.dtype == tl.bfloat16:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
            return bits.to(tl.float32, bitcast=True)
        else:
            return x.to(tl.float32)

    @triton.jit
    def halves(a, b):  # type: ignore[no-untyped-def]
        """Every other column of a and row of b, and the others."""
        a0, a1 = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        b = tl.permute(tl.reshape(b, [b.shape[0] // 2, 2, b.shape[1]]), [0, 2, 1])
        b0, b1 = tl.split(b)
        return a0, b0, a1, b1

    @triton.jit
    def product(a, b, PRODUCTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`a @ b` of operands in one dtype, added up in float32.

        PRODUCTS: "ieee" for float32; "narrow" on a device; "wide" under the interpreter, which
        multiplies bfloat16 wrongly.
        """
        if PRODUCTS == "wide":
            return tl.dot(widened(a, PRODUCTS), widened(b, PRODUCTS), input_precision="ieee")
        elif PRODUCTS == "ieee" and a.shape[1] > 128:
            # In four parts: a thread keeps its operands' whole depth in registers.
            a0, b0, a1, b1 = halves(a, b)
            a00, b00, a01, b01 = halves(a0, b0)
            a10, b10, a11, b11 = halves(a1, b1)
            total = tl.dot(a00, b00, input_precision="ieee")
            total += tl.dot(a01, b01, input_precision="ieee")
            total += tl.dot(a10, b10, input_precision="ieee")
            return total + tl.dot(a11, b11, input_precision="ieee")
        elif PRODUCTS == "ieee":
            return tl.dot(a, b, input_precision="ieee")
        else:
            return tl.dot(a, b)

    @triton.jit
    def added_product(a, b, total, PRODUCTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`total + a @ b`, a rounded to b's dtype first."""
        if a.dtype != b.dtype:
            a = rounded(a, b.dtype, PRODUCTS)
        if PRODUCTS == "wide":
            return tl.dot(widened(a, PRODUCTS), widened(b, PRODUCTS), total, input_precision="ieee")
        elif PRODUCTS == "ieee":
            return tl.dot(a, b, total, input_precision="ieee")
        else:
            return tl.dot(a, b, total)

    @triton.jit
    def tanh(x):  # type: ignore[no-untyped-def]
        """Within a few roundings of 1, which is what a score of `softcap * tanh` is to."""
        small = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
        size = (1.0 - small) / (1.0 + small)
        return tl.where(x < 0, -size, size)

    @triton.jit
    def segments_above(  # type: ignore[no-untyped-def]
        segments_ptr, segment, lowest, window, WINDOWED: tl.constexpr
    ):
        """How many segments, from `segment` to the root, hold keys that a query sees."""
        count = 0
        at = segment
        while at >= 0:
            parent = tl.load(segments_ptr + at * 4 + 3)
            if WINDOWED:
                start = tl.load(segments_ptr + at * 4)
                parent = tl.where(start <= lowest - window + 1, -1, parent)
            count += 1
            at = parent
        return count

    @triton.jit
    def key_tiles(  # type: ignore[no-untyped-def]
        start, stop, lowest, highest, window, KEYS: tl.constexpr, WINDOWED: tl.constexpr
    ):
        """A segment's keys for queries at positions `lowest` to `highest`: what to read.

        Returns the first position of the whole tiles, which every query sees, and how many there
        are; then the tiles that are masked: how many lie before, at `low`, and all of them, the
        others behind the whole ones; and the end of the keys.
        """
        low = start
        high = tl.minimum(stop, highest + 1)
        whole = low
        if WINDOWED:
            low = tl.maximum(low, lowest - window + 1)
            hidden = tl.maximum(highest - window + 1 - low, 0)
            whole = low + (hidden + KEYS - 1) // KEYS * KEYS
        count = tl.maximum(tl.minimum(high, lowest + 1) - whole, 0) // KEYS
        before = (tl.maximum(tl.minimum(whole, high) - low, 0) + KEYS - 1) // KEYS
        behind = (tl.maximum(high - whole - count * KEYS, 0) + KEYS - 1) // KEYS
        return whole, count, low, before, before + behind, high

    @triton.jit
    def visible(positions, keys, high, window, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
        """`[queries, keys]`: whether a query sees a key; positions of both, keys end at `high`."""
        seen = (keys[None, :] <= positions[:, None]) & (keys < high)[None, :]
        if WINDOWED:
            seen = seen & (positions[:, None] - keys[None, :] < window)
        return seen


def compile_cases_of(
    kernel: Any, op: str, storage: Sequence[str], floats: Sequence[str], tables: Sequence[str]
) -> list[CompileCase]:
    """Every shipped configuration of an op, with and without a window and a cap.

    storage, floats, tables: what the kernel's pointers are called, in its order: to the model's
    dtype, to float32 and to int32.
    """
    return [
        CompileCase(
            name=f"attention {name}",
            kernel=kernel,
            signature={
                **dict.fromkeys(storage, f"*{TRITON_DTYPES[dtype]}"),
                **dict.fromkeys(floats, "*fp32"),
                **dict.fromkeys(tables, "*i32"),
                "window": "i32",
                "softcap": "fp32",
            },
            constants={
                "HEADS": 12,
                "KV_HEADS": 2,
                "HEAD_DIM": config.head_dim,
                "BLOCK_D": max(16, triton.next_power_of_2(config.head_dim)),
                "ROWS": config.rows,
                "KEYS": config.keys,
                "WINDOWED": windowed,
                "CAPPED": capped,
                "PRODUCTS": operand_precision(dtype, False),
            },
            options=config.options(),
            aligned=True,
            arch=config.arch,
            not_on=replaced_on(config, dtype, capped),
        )
        for config, dtype, windowed, capped, name in attention_cases(op)
    ]


def compile_cases() -> list[CompileCase]:
    """Nothing here is launched: the kernels that call it list the cases."""
    return []
