"""The gradient of an RMSNorm's input, added to that of the residual stream.

    g  = grad * weight
    dx = dx + rstd[index] * (g - normed[index] * (g * normed[index]).mean(-1))      # in place
    rounded = dx.to(rounded.dtype)                                                  # if wanted

Every backward row reads the forward row that `index` names; the lanes of a token read the same.
Cost per row of H, with two-byte storage: 14H bytes, 2H more with `rounded`; memory bandwidth is the
bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.configs import WIDEST, row_config
from g2r_fast.kernels.launching import TRITON_DTYPES, CompileCase, check_vector, require_triton
from g2r_fast.kernels.rms_norm import check_dense, check_shapes

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; rms_norm_backward() then says so
    triton = None

__all__ = ["compile_cases", "rms_norm_backward"]

if triton is not None:

    @triton.jit
    def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
        grad_ptr,
        weight_ptr,
        index_ptr,
        normed_ptr,
        rstd_ptr,
        dx_ptr,
        rounded_ptr,
        R,
        ROUNDED: tl.constexpr,
        H: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_H)
        real = rows < R
        mask = real[:, None] & (columns < H)[None, :]
        at = rows[:, None] * H + columns[None, :]
        saved = tl.load(index_ptr + rows, mask=real, other=0).to(tl.int64)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        dx = tl.load(dx_ptr + at, mask=mask, other=0.0)
        normed = tl.load(
            normed_ptr + saved[:, None] * H + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        rstd = tl.load(rstd_ptr + saved, mask=real, other=0.0)
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
        grad *= weight[None, :]
        mean = tl.sum(grad * normed, axis=1) / H
        dx += rstd[:, None] * (grad - normed * mean[:, None])
        tl.store(dx_ptr + at, dx, mask=mask)
        if ROUNDED:
            tl.store(rounded_ptr + at, dx.to(rounded_ptr.dtype.element_ty), mask=mask)


def rms_norm_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    normed: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    rounded: torch.Tensor | None = None,
) -> None:
    """``dx += rstd[index] * (g - normed[index] * mean(g * normed[index]))``, g = grad * weight.

    Args:
        grad: [B, H] float32, of the norm's output.
        weight: [H].
        index: [B] int32, the row of ``normed`` and ``rstd`` to read. The values are not checked
            here, as that would wait for the device.
        normed: [kept, H] float32, float16 or bfloat16.
        rstd: [kept] float32.
        dx: [B, H] float32, in place.
        rounded: [B, H] of the dtype of ``normed``: the new ``dx`` in it; or None.

    Everything is contiguous; the mean is summed in float32.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes, devices or widths other than these.
    """
    require_triton(triton, "rms_norm_backward")
    check_dense(torch.float32, dx, grad=grad, rstd=rstd, dx=dx)
    check_dense(normed.dtype, dx, normed=normed, rounded=normed if rounded is None else rounded)
    check_dense(None, dx, weight=weight)
    check_vector("index", index, (torch.int32,), dx)
    check_shapes((-1, -1), dx=dx)
    rows, width = dx.shape
    check_shapes((rows, width), grad=grad, rounded=dx if rounded is None else rounded)
    check_shapes((-1, width), normed=normed)
    check_shapes((width,), weight=weight)
    check_shapes((len(normed),), rstd=rstd)
    config = row_config(width)
    if rows:
        _rms_norm_backward_kernel[(triton.cdiv(rows, config.blocks["ROWS"]),)](
            grad,
            weight,
            index,
            normed,
            rstd,
            dx,
            normed if rounded is None else rounded,
            rows,
            ROUNDED=rounded is not None,
            H=width,
            **config.blocks,
            **config.options(),
        )


def compile_cases() -> list[CompileCase]:
    """Small, common and the widest rows; every storage dtype."""
    return [
        CompileCase(
            name=f"rms_norm_backward {width}{' rounded' if rounded else ''} {dtype}"
            f"{' aligned' if aligned else ''}",
            kernel=_rms_norm_backward_kernel,
            signature={
                "grad_ptr": "*fp32",
                "weight_ptr": f"*{dtype}",
                "index_ptr": "*i32",
                "normed_ptr": f"*{dtype}",
                "rstd_ptr": "*fp32",
                "dx_ptr": "*fp32",
                "rounded_ptr": f"*{dtype}",
                "R": "i32",
            },
            constants={
                "ROUNDED": rounded,
                "H": width,
                **row_config(width).blocks,
            },
            options=row_config(width).options(),
            aligned=aligned,
        )
        for width, aligned in ((64, True), (1536, True), (8192, True), (WIDEST, True), (77, False))
        for rounded in (False, True)
        for dtype in TRITON_DTYPES.values()
    ]
