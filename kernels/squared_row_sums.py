"""Squared norm of the sum of each lane's rows: gradients of biases and of norm weights.

    out[j] = x[rows[offsets[j] : offsets[j + 1]]].float().sum(0).square().sum()

The gradient of a bias is the sum of a lane's output gradients, that of a norm's weight the sum of
`grad * normed` (arXiv 2605.09920 adds the squares of both). Cost: m · w elements of x are read
once; memory bandwidth is the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.lanes import add_partials, check_entries, check_offsets, lane_table
from g2r_fast.kernels.launching import (
    TRITON_DTYPES,
    CompileCase,
    check_rows,
    is_interpreted,
    require_triton,
)

try:
    import triton
    import triton.language as tl
    from g2r_fast.kernels.attention_paths import widened
except ImportError:  # a machine without a GPU need not have it; squared_row_sums() then says so
    triton = None

__all__ = ["CONFIG", "compile_cases", "squared_row_sums"]


CONFIG = LAUNCHES["squared_row_sums"]

if triton is not None:

    @triton.jit
    def _squared_row_sums_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        rows_ptr,
        table_ptr,
        partials_ptr,
        stride,
        W,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        blocks = tl.cdiv(W, COLUMNS)
        program = tl.program_id(0)
        lane_ptr = table_ptr + (program // blocks).to(tl.int64) * 5
        block = program % blocks
        start = tl.load(lane_ptr + 1)
        count = tl.load(lane_ptr + 2).to(tl.int32)
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        # Per row slot first, across the slots at the end: short chains of additions.
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, count, ROWS):
            entries = first + tl.arange(0, ROWS)
            real = entries < count
            row = tl.load(rows_ptr + start + entries, mask=real, other=0).to(tl.int64)
            x = tl.load(
                x_ptr + row[:, None] * stride + columns[None, :],
                mask=real[:, None] & (columns < W)[None, :],
                other=0.0,
            )
            total += widened(x, PRODUCTS)
        sums = tl.sum(total, axis=0)
        if count > 0:  # a lane without entries has no parts
            first_part = tl.load(lane_ptr + 3)
            tl.store(partials_ptr + first_part + block, tl.sum(sums * sums, axis=0))


def squared_row_sums(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: Sequence[int] | torch.Tensor,
) -> torch.Tensor:
    """``out[j] = x[rows[offsets[j] : offsets[j + 1]]].float().sum(0).square().sum()``.

    Args:
        x: [r, w] float32, float16 or bfloat16; columns contiguous, rows of any stride.
        rows: [m] int32, contiguous: rows of ``x``, lane after lane; they may repeat. The values are
            not checked here, as that would wait for the device.
        offsets: lanes + 1 ascending numbers on the host, within [0, m]: where each lane's entries
            begin, and where those of the last end.

    Returns:
        [lanes] float64, 0 for a lane without entries. Rows and the squares of 64 columns are added
        in float32, the rest in float64; two runs are equal to the bit.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes, devices or offsets other than these.
    """
    require_triton(triton, "squared_row_sums")
    check_rows("x", x, x)
    check_entries("rows", rows, x)
    bounds = check_offsets(offsets, len(rows))
    width = x.shape[1]
    blocks = -(-width // CONFIG.blocks["COLUMNS"])
    counts = bounds.diff()
    parts = torch.where(counts > 0, blocks, 0)
    table, _, total = lane_table(bounds, [torch.arange(len(counts))], parts)
    table = table.to(x.device, non_blocking=True)
    partials = torch.empty(total, dtype=torch.float32, device=x.device)
    if total:
        _squared_row_sums_kernel[(len(counts) * blocks,)](
            x,
            rows,
            table,
            partials,
            x.stride(0),
            width,
            PRODUCTS="wide" if is_interpreted() else "narrow",  # see attention_paths.widened
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return add_partials(partials, table)


def compile_cases() -> list[CompileCase]:
    """Every dtype; rows of whole vectors and others."""
    return [
        CompileCase(
            name=f"squared_row_sums {dtype}{' aligned' if aligned else ''}",
            kernel=_squared_row_sums_kernel,
            signature={
                "x_ptr": f"*{dtype}",
                "rows_ptr": "*i32",
                "table_ptr": "*i64",
                "partials_ptr": "*fp32",
                "stride": "i32",
                "W": "i32",
            },
            constants={**CONFIG.blocks, "PRODUCTS": "narrow"},
            options=CONFIG.options(),
            aligned=aligned,
        )
        for dtype in TRITON_DTYPES.values()
        for aligned in (True, False)
    ]
