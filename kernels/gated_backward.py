"""Back through the gated activation of an MLP, for every lane.

    out[:, 0] = grad * d_gate[index]; out[:, 1] = grad * d_up[index]

Both gradients of a row follow each other, so that one product, or two, can read them. Cost per row
of I, with two-byte storage: 10I bytes, of which the lanes of a token share the reads of 4I; memory
bandwidth is the bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.gated import CONFIG
from g2r_fast.kernels.launching import TRITON_DTYPES, CompileCase, check_vector, require_triton
from g2r_fast.kernels.rms_norm import check_dense, check_shapes

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; gated_backward() then says so
    triton = None

__all__ = ["compile_cases", "gated_backward"]

if triton is not None:

    @triton.jit
    def _gated_backward_kernel(  # type: ignore[no-untyped-def]
        grad_ptr,
        index_ptr,
        d_gate_ptr,
        d_up_ptr,
        out_ptr,
        I: tl.constexpr,  # noqa: E741
        STEPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        row = (program // STEPS).to(tl.int64)
        columns = program % STEPS * BLOCK + tl.arange(0, BLOCK)
        mask = columns < I
        saved = tl.load(index_ptr + row).to(tl.int64)
        grad = tl.load(grad_ptr + row * I + columns, mask=mask, other=0.0).to(tl.float32)
        d_gate = tl.load(d_gate_ptr + saved * I + columns, mask=mask, other=0.0).to(tl.float32)
        d_up = tl.load(d_up_ptr + saved * I + columns, mask=mask, other=0.0).to(tl.float32)
        at = 2 * row * I + columns
        tl.store(out_ptr + at, (grad * d_gate).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + at + I, (grad * d_up).to(out_ptr.dtype.element_ty), mask=mask)


def gated_backward(
    grad: torch.Tensor,
    index: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``out = torch.stack((grad * d_gate[index], grad * d_up[index]), 1)``.

    Args:
        grad: [B, I] float32, float16 or bfloat16.
        index: [B] int32, the row of ``d_gate`` and ``d_up`` to read. The values are not checked
            here, as that would wait for the device.
        d_gate: [kept, I] of the dtype of ``grad``, as is all of the following.
        d_up: [kept, I].
        out: [B, 2, I].

    Everything is contiguous and computed in float32.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes or devices other than these.
    """
    require_triton(triton, "gated_backward")
    check_dense(grad.dtype, grad, grad=grad, d_gate=d_gate, d_up=d_up, out=out)
    check_vector("index", index, (torch.int32,), grad)
    check_shapes((-1, -1), grad=grad)
    rows, width = grad.shape
    check_shapes((-1, width), d_gate=d_gate)
    check_shapes(tuple(d_gate.shape), d_up=d_up)
    check_shapes((rows, 2, width), out=out)
    steps = triton.cdiv(width, CONFIG.blocks["BLOCK"])
    if rows:
        _gated_backward_kernel[(rows * steps,)](
            grad,
            index,
            d_gate,
            d_up,
            out,
            I=width,
            STEPS=steps,
            **CONFIG.blocks,
            **CONFIG.options(),
        )


def compile_cases() -> list[CompileCase]:
    """Every storage dtype; rows of whole vectors and others."""
    return [
        CompileCase(
            name=f"gated_backward {dtype}{' aligned' if aligned else ''}",
            kernel=_gated_backward_kernel,
            signature={
                "grad_ptr": f"*{dtype}",
                "index_ptr": "*i32",
                "d_gate_ptr": f"*{dtype}",
                "d_up_ptr": f"*{dtype}",
                "out_ptr": f"*{dtype}",
            },
            constants={
                "I": width,
                "STEPS": triton.cdiv(width, CONFIG.blocks["BLOCK"]),
                **CONFIG.blocks,
            },
            options=CONFIG.options(),
            aligned=aligned,
        )
        for dtype in TRITON_DTYPES.values()
        for width, aligned in ((8960, True), (1037, False))
    ]
