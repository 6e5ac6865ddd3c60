"""Squared norm of each lane's gradient of a linear layer's weight.

    a, b = inputs[kept[offsets[j] : offsets[j + 1]]], grads[rows[offsets[j] : offsets[j + 1]]]
    out[j] = (a.float().T @ b.float()).square().sum()

arXiv 2605.09920. Either way no gradient is written. For a lane of M entries, whichever is cheaper:

    gram:    ((a @ a.T) * (b @ b.T)).sum(), M² (d + p) FLOPs as the matrices are symmetric; one
             program a pair of tiles of entries
    direct:  (a.T @ b).square().sum(), 2 M d p FLOPs; one program a tile of the gradient

Gram is below M = 2 d p / (d + p). Its terms may cancel: its error is that of the sum of their
absolute values. Products are the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from g2r_fast.kernels.configs import NORMS, NormConfig, norm_config, operand_precision
from g2r_fast.kernels.lanes import Lanes, add_partials, check_entries, check_offsets, lane_table
from g2r_fast.kernels.launching import (
    TRITON_DTYPES,
    CompileCase,
    check_rows,
    is_interpreted,
    require_triton,
)

from g2r_fast.errors import InputError, InputTypeError

try:
    import triton
    import triton.language as tl
    from g2r_fast.kernels.attention_paths import added_product
except ImportError:  # a machine without a GPU need not have it; the launcher then says so
    triton = None

__all__ = [
    "WAYS",
    "compile_cases",
    "squared_gradient_norms",
]

WAYS = ("gram", "direct")
if triton is not None:

    @triton.jit
    def _row_products(  # type: ignore[no-untyped-def]
        x_ptr,
        left,  # [TILE] int64, where rows begin
        right,
        left_real,
        right_real,
        width,
        TILE: tl.constexpr,
        STEP: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        """`x[left] @ x[right].T`, 0 where either is not real."""
        total = tl.zeros([TILE, TILE], dtype=tl.float32)
        for first in range(0, width, STEP):
            columns = first + tl.arange(0, STEP)
            inside = (columns < width)[None, :]
            a_ptrs = x_ptr + left[:, None] + columns[None, :]
            b_ptrs = x_ptr + right[:, None] + columns[None, :]
            a = tl.load(a_ptrs, mask=left_real[:, None] & inside, other=0.0)
            b = tl.load(b_ptrs, mask=right_real[:, None] & inside, other=0.0)
            total = added_product(a, tl.trans(b), total, PRODUCTS)
        return total

    @triton.jit(do_not_specialize=["most"])
    def _gram_kernel(  # type: ignore[no-untyped-def]
        inputs_ptr,
        grads_ptr,
        kept_ptr,
        rows_ptr,
        table_ptr,
        partials_ptr,
        input_stride,
        grad_stride,
        D,
        P,
        most,  # programs a lane
        TILE: tl.constexpr,
        STEP: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        program = tl.program_id(0)
        lane_ptr = table_ptr + (program // most).to(tl.int64) * 5
        index = program % most
        start = tl.load(lane_ptr + 1)
        count = tl.load(lane_ptr + 2).to(tl.int32)
        tiles = tl.cdiv(count, TILE)
        if index < tiles * (tiles + 1) // 2:
            # Every tile with itself, then with the next, with the one after that, and so on around:
            # halfway round every pair was there once, for odd and for even numbers of tiles.
            left_tile = index % tiles
            apart = index // tiles
            right_tile = (left_tile + apart) % tiles
            left = left_tile * TILE + tl.arange(0, TILE)
            right = right_tile * TILE + tl.arange(0, TILE)
            left_real = left < count
            right_real = right < count
            left_row = tl.load(kept_ptr + start + left, mask=left_real, other=0)
            right_row = tl.load(kept_ptr + start + right, mask=right_real, other=0)
            of_inputs = _row_products(
                inputs_ptr,
                left_row.to(tl.int64) * input_stride,
                right_row.to(tl.int64) * input_stride,
                left_real, right_real, D, TILE, STEP, PRODUCTS,
            )  # fmt: skip
            left_row = tl.load(rows_ptr + start + left, mask=left_real, other=0)
            right_row = tl.load(rows_ptr + start + right, mask=right_real, other=0)
            of_grads = _row_products(
                grads_ptr,
                left_row.to(tl.int64) * grad_stride,
                right_row.to(tl.int64) * grad_stride,
                left_real, right_real, P, TILE, STEP, PRODUCTS,
            )  # fmt: skip
            part = tl.sum(tl.sum(of_inputs * of_grads, axis=1), axis=0)
            part *= tl.where(apart > 0, 2.0, 1.0)
            tl.store(partials_ptr + tl.load(lane_ptr + 3) + index, part)

    @triton.jit(do_not_specialize=["most"])
    def _direct_kernel(  # type: ignore[no-untyped-def]
        inputs_ptr,
        grads_ptr,
        kept_ptr,
        rows_ptr,
        table_ptr,
        partials_ptr,
        input_stride,
        grad_stride,
        D,
        P,
        most,  # programs a lane, all of them with work
        TILE: tl.constexpr,
        STEP: tl.constexpr,
        PRODUCTS: tl.constexpr,
    ):
        program = tl.program_id(0)
        lane_ptr = table_ptr + (program // most).to(tl.int64) * 5
        index = program % most
        start = tl.load(lane_ptr + 1)
        count = tl.load(lane_ptr + 2).to(tl.int32)
        tiles = tl.cdiv(D, TILE)
        inward = index % tiles * TILE + tl.arange(0, TILE)
        outward = index // tiles * TILE + tl.arange(0, TILE)
        total = tl.zeros([TILE, TILE], dtype=tl.float32)
        for first in range(0, count, STEP):
            entries = first + tl.arange(0, STEP)
            real = entries < count
            row = tl.load(kept_ptr + start + entries, mask=real, other=0).to(tl.int64)
            a = tl.load(
                inputs_ptr + row[:, None] * input_stride + inward[None, :],
                mask=real[:, None] & (inward < D)[None, :],
                other=0.0,
            )
            row = tl.load(rows_ptr + start + entries, mask=real, other=0).to(tl.int64)
            b = tl.load(
                grads_ptr + row[:, None] * grad_stride + outward[None, :],
                mask=real[:, None] & (outward < P)[None, :],
                other=0.0,
            )
            total = added_product(tl.trans(a), b, total, PRODUCTS)
        part = tl.sum(tl.sum(total * total, axis=1), axis=0)
        tl.store(partials_ptr + tl.load(lane_ptr + 3) + index, part)


def squared_gradient_norms(
    inputs: torch.Tensor,
    grads: torch.Tensor,
    kept: torch.Tensor,
    rows: torch.Tensor,
    offsets: Sequence[int] | torch.Tensor,
    *,
    way: str | None = None,
    configs: tuple[NormConfig, NormConfig] | None = None,
) -> torch.Tensor:
    """``out[j] = (a.float().T @ b.float()).square().sum()`` for the rows a, b of each lane j.

    Args:
        inputs: [n, d] of the linear layer; float32, float16 or bfloat16; columns contiguous, rows
            of any stride.
        grads: [r, p] gradients of its output, of the same dtype, under the same rules. In float16
            they should be around one in size: the caller divides their scale out.
        kept: [m] int32, contiguous: rows of ``inputs``, lane after lane; they may repeat, within a
            lane and between lanes. The values are not checked here, as that would wait for the
            device; neither are those of rows.
        rows: [m] int32, contiguous: the row of ``grads`` that belongs to each.
        offsets: lanes + 1 ascending numbers on the host, within [0, m]: where each lane's entries
            begin, and where those of the last end.
        way: "gram" or "direct" for every lane; None: whichever takes fewer FLOPs, lane by lane.
        configs: launch configurations of gram and of direct; by default those of NORMS.

    Returns:
        [lanes] float64, 0 for a lane without entries, never below 0. Products and what one program
        adds are float32, the rest is float64; two runs are equal to the bit.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes, devices, offsets or ways other than
            these.
    """
    require_triton(triton, "squared_gradient_norms")
    if way not in (None, *WAYS):
        raise InputError("unknown way", expected=" | ".join(WAYS), got=repr(way))
    check_rows("inputs", inputs, inputs)
    check_rows("grads", grads, inputs)
    if grads.dtype != inputs.dtype:
        raise InputTypeError(
            "inputs and grads differ in dtype", expected=str(inputs.dtype), got=grads.dtype
        )
    check_entries("kept", kept, inputs)
    check_entries("rows", rows, inputs)
    if len(rows) != len(kept):
        raise InputError("kept and rows differ in number", expected=str(len(kept)), got=len(rows))
    bounds = check_offsets(offsets, len(kept))
    d, p = inputs.shape[1], grads.shape[1]
    gram, direct = configs or tuple(norm_config(each, inputs.dtype) for each in WAYS)
    table, launches, total = _work(bounds, d, p, way, gram, direct)
    table = table.to(inputs.device, non_blocking=True)
    partials = torch.empty(total, dtype=torch.float32, device=inputs.device)
    first = 0
    for kernel, config, lanes in zip(
        (_gram_kernel, _direct_kernel), (gram, direct), launches, strict=True
    ):
        if lanes.programs:
            kernel[(lanes.programs,)](
                inputs,
                grads,
                kept,
                rows,
                table[first:],
                partials,
                inputs.stride(0),
                grads.stride(0),
                d,
                p,
                lanes.most,
                TILE=config.tile,
                STEP=config.step,
                PRODUCTS=operand_precision(inputs.dtype, is_interpreted()),
                **config.options(),
            )
        first += lanes.rows
    return add_partials(partials, table)


def _work(
    bounds: torch.Tensor, d: int, p: int, way: str | None, gram: NormConfig, direct: NormConfig
) -> tuple[torch.Tensor, list[Lanes], int]:
    """The table of lanes, those of gram first, what each launch serves, and the number of parts."""
    counts = bounds.diff()
    if way is None:
        by_gram = counts * (d + p) < 2 * d * p
    else:
        by_gram = torch.full_like(counts, way == "gram", dtype=torch.bool)
    by_gram |= counts == 0  # no tiles there, and so no parts
    tiles = -(-counts // gram.tile)
    tiles_of_weight = -(-d // direct.tile) * -(-p // direct.tile)
    parts = torch.where(by_gram, tiles * (tiles + 1) // 2, tiles_of_weight)
    groups = [torch.nonzero(chosen).flatten() for chosen in (by_gram, ~by_gram)]
    return lane_table(bounds, groups, parts)


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration and dtype; rows of whole vectors and others."""
    return [
        CompileCase(
            name=f"squared_gradient_norms {config.way} {TRITON_DTYPES[dtype]}"
            f"{' aligned' if aligned else ''}",
            kernel=_gram_kernel if config.way == "gram" else _direct_kernel,
            signature={
                "inputs_ptr": f"*{TRITON_DTYPES[dtype]}",
                "grads_ptr": f"*{TRITON_DTYPES[dtype]}",
                "kept_ptr": "*i32",
                "rows_ptr": "*i32",
                "table_ptr": "*i64",
                "partials_ptr": "*fp32",
                "input_stride": "i32",
                "grad_stride": "i32",
                "D": "i32",
                "P": "i32",
                "most": "i32",
            },
            constants={
                "TILE": config.tile,
                "STEP": config.step,
                "PRODUCTS": operand_precision(dtype, False),
            },
            options=config.options(),
            aligned=aligned,
        )
        for config, dtype, aligned in _shipped()
    ]


def _shipped() -> Iterator[tuple[NormConfig, torch.dtype, bool]]:
    for config in NORMS:
        for dtype in config.dtypes:
            for aligned in (True, False):
                yield config, dtype, aligned
