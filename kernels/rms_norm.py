"""RMSNorm of the residual stream, with the sum before it, and what of it is kept.

    x    = x + delta                                            # only with delta, in place
    rstd = (x.square().mean(-1) + eps).rsqrt()
    out  = (x * rstd[:, None]).to(out.dtype) * weight
    kept_normed[index] = x * rstd[:, None]; kept_rstd[index] = rstd     # where index >= 0

Cost per row of H, with two-byte storage: 6H bytes, 6H more with delta, 2H more where it is kept;
memory bandwidth is the bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.configs import WIDEST, row_config
from g2r_fast.kernels.launching import (
    TRITON_DTYPES,
    CompileCase,
    check_rows,
    check_vector,
    require_triton,
)

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; rms_norm() then says so
    triton = None

__all__ = [
    "check_dense",
    "check_shapes",
    "compile_cases",
    "rms_norm",
]

if triton is not None:

    @triton.jit
    def _rms_norm_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        delta_ptr,
        weight_ptr,
        index_ptr,
        out_ptr,
        normed_ptr,
        rstd_ptr,
        R,
        eps,
        ADD: tl.constexpr,
        H: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_H)
        real = rows < R
        mask = real[:, None] & (columns < H)[None, :]
        at = rows[:, None] * H + columns[None, :]
        saved = tl.load(index_ptr + rows, mask=real, other=-1).to(tl.int64)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(x_ptr + at, x, mask=mask)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / H + eps))
        normed = (x * rstd[:, None]).to(out_ptr.dtype.element_ty)
        out = normed.to(tl.float32) * weight[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        kept = saved >= 0
        kept_at = saved[:, None] * H + columns[None, :]
        tl.store(normed_ptr + kept_at, normed, mask=mask & kept[:, None])
        tl.store(rstd_ptr + saved, rstd, mask=kept)


def check_dense(dtype: torch.dtype | None, like: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Raises InputError unless each is contiguous, on the device of ``like`` and of ``dtype``."""
    device = like.device
    for name, tensor in tensors.items():
        usable = tensor.is_contiguous() and (dtype is None or tensor.dtype == dtype)
        if not usable:
            raise InputError(
                f"{name} has an unusable layout or dtype",
                expected=f"contiguous, {dtype or 'any float'}",
                got=f"stride {tensor.stride()}, {tensor.dtype}",
            )
        # What a launch costs is mostly this; the full check says what is wrong.
        if not (tensor.is_cuda and tensor.device == device and tensor.dtype in TRITON_DTYPES):
            check_rows(name, tensor.view(1, -1), like)


def check_shapes(shape: tuple[int, ...], **tensors: torch.Tensor) -> None:
    """Raises InputError unless each has this shape; -1 is any size."""
    for name, tensor in tensors.items():
        fits = zip(tensor.shape, shape, strict=False)
        if tensor.dim() != len(shape) or any(b not in (a, -1) for a, b in fits):
            raise InputError(
                f"{name} has another shape", expected=str(shape), got=tuple(tensor.shape)
            )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    normed: torch.Tensor,
    rstd: torch.Tensor,
    *,
    eps: float,
    delta: torch.Tensor | None = None,
) -> None:
    """``x += delta; out = rms_norm(x, eps) * weight``; the unweighted rows and rstd are kept.

    Args:
        x: [R, H] float32; overwritten with the sum where there is a ``delta``.
        weight: [H].
        index: [R] int32, the row of ``normed`` and ``rstd`` to write, -1 for none. The values are
            not checked here, as that would wait for the device.
        out: [R, H], of the storage dtype: float32, float16 or bfloat16.
        normed: [kept, H] of that dtype, written at ``index``.
        rstd: [kept] float32, written at ``index``.
        delta: [R, H] of that dtype, or None.

    Everything is contiguous. ``out`` is the product of ``normed`` as rounded, in float32, rounded.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes, devices or widths other than these.
    """
    require_triton(triton, "rms_norm")
    check_dense(torch.float32, x, x=x, rstd=rstd)
    check_dense(out.dtype, x, out=out, normed=normed, delta=out if delta is None else delta)
    check_dense(None, x, weight=weight)
    check_vector("index", index, (torch.int32,), x)
    check_shapes((-1, -1), x=x)
    rows, width = x.shape
    check_shapes((rows, width), out=out, delta=out if delta is None else delta)
    check_shapes((-1, width), normed=normed)
    check_shapes((width,), weight=weight)
    check_shapes((len(normed),), rstd=rstd)
    config = row_config(width)
    if rows:
        _rms_norm_kernel[(triton.cdiv(rows, config.blocks["ROWS"]),)](
            x,
            out if delta is None else delta,
            weight,
            index,
            out,
            normed,
            rstd,
            rows,
            eps,
            ADD=delta is not None,
            H=width,
            **config.blocks,
            **config.options(),
        )


def compile_cases() -> list[CompileCase]:
    """Small, common and the widest rows; every storage dtype."""
    return [
        CompileCase(
            name=f"rms_norm {width}{' add' if add else ''} {dtype}{' aligned' if aligned else ''}",
            kernel=_rms_norm_kernel,
            signature={
                "x_ptr": "*fp32",
                "delta_ptr": f"*{dtype}",
                "weight_ptr": f"*{dtype}",
                "index_ptr": "*i32",
                "out_ptr": f"*{dtype}",
                "normed_ptr": f"*{dtype}",
                "rstd_ptr": "*fp32",
                "R": "i32",
                "eps": "fp32",
            },
            constants={
                "ADD": add,
                "H": width,
                **row_config(width).blocks,
            },
            options=row_config(width).options(),
            aligned=aligned,
        )
        for width, aligned in ((64, True), (1536, True), (8192, True), (WIDEST, True), (77, False))
        for add in (False, True)
        for dtype in TRITON_DTYPES.values()
    ]
