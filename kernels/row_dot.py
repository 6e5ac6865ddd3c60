"""Read-out of a backward: one number per row from a gradient and the embedding it belongs to.

    dot:  out = (grad.float() * embed[row_map].float()).sum(-1)     # b_t = g_t · e_t, Eq. 3
    l1:   out = grad.float().abs().sum(-1)                          # ablation, Eq. 11
    l2:   out = grad.float().square().sum(-1).sqrt()                # ablation, Eq. 12

Equations of arXiv 2602.01791. Cost: R · H elements of grad and as many of embed are read once, 4R
bytes written, 2 FLOPs an element; memory bandwidth is the bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.launching import (
    TRITON_DTYPES,
    CompileCase,
    check_rows,
    check_vector,
    require_triton,
)

from g2r_fast.errors import InputError, InputTypeError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; row_dot() then says so
    triton = None

__all__ = ["CONFIG", "READOUTS", "compile_cases", "row_dot"]

READOUTS = ("dot", "l1", "l2")


CONFIG = LAUNCHES["row_dot"]

if triton is not None:

    @triton.jit
    def _row_dot_kernel(  # type: ignore[no-untyped-def]
        grad_ptr,
        embed_ptr,
        row_map_ptr,
        out_ptr,
        grad_stride,
        embed_stride,
        H,
        READOUT: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        grad_row = grad_ptr + row * grad_stride
        if READOUT == "dot":
            source = tl.load(row_map_ptr + row).to(tl.int64)
            embed_row = embed_ptr + source * embed_stride
        # Per column slot first, across the slots at the end: short chains of additions.
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for start in range(0, H, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            mask = columns < H
            grad = tl.load(grad_row + columns, mask=mask, other=0.0).to(tl.float32)
            if READOUT == "dot":
                embed = tl.load(embed_row + columns, mask=mask, other=0.0).to(tl.float32)
                total += grad * embed
            elif READOUT == "l1":
                total += tl.abs(grad)
            else:
                total += grad * grad
        value = tl.sum(total, axis=0)
        if READOUT == "l2":
            value = tl.sqrt_rn(value)
        tl.store(out_ptr + row, value)


def row_dot(
    grad: torch.Tensor,
    embed: torch.Tensor | None = None,
    row_map: torch.Tensor | None = None,
    *,
    readout: str = "dot",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(grad.float() * embed[row_map].float()).sum(-1)``, or the L1 or L2 norm of grad's rows.

    Args:
        grad: [R, H] gradient rows; float32, float16 or bfloat16; columns contiguous, rows of any
            stride.
        embed: [F, H] embedding rows under the same rules, of any of the dtypes; "dot" only.
        row_map: [R] int64 or int32, the row of ``embed`` that belongs to each row of ``grad``;
            "dot" only. The values are not checked here, as that would wait for the device: the op
            that calls this does it.
        readout: "dot", "l1" or "l2".
        out: [R] float32, contiguous, to be written into; a new tensor by default.

    Returns:
        [R] float32, accumulated in float32.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes or devices other than these.
    """
    require_triton(triton, "row_dot")
    if readout not in READOUTS:
        raise InputError("unknown readout", expected=" | ".join(READOUTS), got=repr(readout))
    check_rows("grad", grad, grad)
    rows, width = grad.shape
    if readout != "dot":
        embed = row_map = grad  # pointers that the kernel then never reads
    elif embed is None or row_map is None:
        raise InputTypeError('readout="dot" needs embed and row_map', got="None")
    else:
        check_rows("embed", embed, grad)
        if embed.shape[1] != width:
            raise InputError(
                "grad and embed differ in width", expected=str(width), got=embed.shape[1]
            )
        check_vector("row_map", row_map, (torch.int64, torch.int32), grad)
    if out is None:
        out = torch.empty(rows, dtype=torch.float32, device=grad.device)
    else:
        check_vector("out", out, (torch.float32,), grad)
    if rows:
        _row_dot_kernel[(rows,)](
            grad,
            embed,
            row_map,
            out,
            grad.stride(0),
            embed.stride(0),
            width,
            READOUT=readout,
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return out


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation; grad and embed of one dtype, as the engine holds them."""
    return [
        CompileCase(
            name=f"row_dot {readout} {dtype}{' aligned' if aligned else ''}",
            kernel=_row_dot_kernel,
            signature={
                "grad_ptr": f"*{dtype}",
                "embed_ptr": f"*{dtype}",
                "row_map_ptr": "*i64",
                "out_ptr": "*fp32",
                "grad_stride": "i32",
                "embed_stride": "i32",
                "H": "i32",
            },
            constants={"READOUT": readout, **CONFIG.blocks},
            options=CONFIG.options(),
            aligned=aligned,
        )
        for readout in READOUTS
        for dtype in TRITON_DTYPES.values()
        for aligned in (True, False)
    ]
