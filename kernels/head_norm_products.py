"""What the weight of a norm of heads gets from each row, for a reader of its gradient.

    g   = rotated_back(grad) * scaling                    # of the norm's output
    out = (g * normed[index]).sum(1)
    rotated_back(g1, g2) = (g1 cos + g2 sin, g2 cos - g1 sin)               # the halves of a head

Summed over a sequence's rows this is the gradient of the norm's weight. cos, sin and normed are
those of the forward row that `index` names. Cost per row, with two-byte storage: 4 heads D bytes
and 8D more; memory bandwidth is the bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.configs import heads_config
from g2r_fast.kernels.launching import TRITON_DTYPES, CompileCase, check_vector, require_triton
from g2r_fast.kernels.rms_norm import check_dense, check_shapes

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; head_norm_products() then says so
    triton = None

__all__ = ["compile_cases", "head_norm_products"]

if triton is not None:

    @triton.jit
    def _head_norm_products_kernel(  # type: ignore[no-untyped-def]
        grad_ptr,
        cos_ptr,
        sin_ptr,
        index_ptr,
        normed_ptr,
        out_ptr,
        scaling,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
    ):
        D: tl.constexpr = 2 * HALF
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK_HALF)
        inside = columns < HALF
        saved = tl.load(index_ptr + row).to(tl.int64)
        cos = tl.load(cos_ptr + saved * HALF + columns, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + saved * HALF + columns, mask=inside, other=0.0)[None, :]
        total1 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
        total2 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], dtype=tl.float32)
        for first in range(0, HEADS, BLOCK_HEADS):
            head = first + tl.arange(0, BLOCK_HEADS)
            mask = (head < HEADS)[:, None] & inside[None, :]
            at = head[:, None] * D + columns[None, :]
            grad = grad_ptr + row * (HEADS * D) + at
            g1 = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
            g2 = tl.load(grad + HALF, mask=mask, other=0.0).to(tl.float32)
            normed = normed_ptr + saved * (HEADS * D) + at
            n1 = tl.load(normed, mask=mask, other=0.0).to(tl.float32)
            n2 = tl.load(normed + HALF, mask=mask, other=0.0).to(tl.float32)
            total1 += (g1 * cos + g2 * sin) * n1
            total2 += (g2 * cos - g1 * sin) * n2
        out = out_ptr + row * D + columns
        tl.store(out, tl.sum(total1, axis=0) * scaling, mask=inside)
        tl.store(out + HALF, tl.sum(total2, axis=0) * scaling, mask=inside)


def head_norm_products(
    grad: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    normed: torch.Tensor,
    out: torch.Tensor,
    *,
    scaling: float = 1.0,
) -> None:
    """``out = (rotated_back(grad) * scaling * normed[index]).sum(1)``.

    Args:
        grad: [B, heads, D] float32, float16 or bfloat16, of the rotated heads.
        cos: [kept, D / 2] float32.
        sin: [kept, D / 2] float32.
        index: [B] int32, the row of ``cos``, ``sin`` and ``normed`` to read. The values are not
            checked here, as that would wait for the device.
        normed: [kept, heads, D] float32, float16 or bfloat16.
        out: [B, D] float32.
        scaling: of the heads, after their rotation.

    Everything is contiguous and computed in float32.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes, devices or shapes other than these.
    """
    require_triton(triton, "head_norm_products")
    check_dense(None, out, grad=grad, normed=normed)
    check_dense(torch.float32, out, cos=cos, sin=sin, out=out)
    check_vector("index", index, (torch.int32,), grad)
    check_shapes((-1, -1, -1), grad=grad)
    rows, heads, dim = grad.shape
    check_shapes((-1, dim // 2), cos=cos)
    check_shapes(tuple(cos.shape), sin=sin)
    check_shapes((len(cos), heads, 2 * cos.shape[1]), normed=normed)
    check_shapes((rows, dim), out=out)
    config = heads_config(heads, dim // 2, True)
    if rows:
        _head_norm_products_kernel[(rows,)](
            grad,
            cos,
            sin,
            index,
            normed,
            out,
            float(scaling),
            HEADS=heads,
            HALF=dim // 2,
            **config.blocks,
            **config.options(),
        )


def compile_cases() -> list[CompileCase]:
    """Queries and keys, whose gradients are float32, in every storage dtype; odd halves too."""
    return [
        CompileCase(
            name=f"head_norm_products {heads} {2 * half} {grad} {dtype}{' aligned' * aligned}",
            kernel=_head_norm_products_kernel,
            signature={
                "grad_ptr": f"*{grad}",
                "cos_ptr": "*fp32",
                "sin_ptr": "*fp32",
                "index_ptr": "*i32",
                "normed_ptr": f"*{dtype}",
                "out_ptr": "*fp32",
                "scaling": "fp32",
            },
            constants={
                "HEADS": heads,
                "HALF": half,
                **heads_config(heads, half, True).blocks,
            },
            options=heads_config(heads, half, True).options(),
            aligned=aligned,
        )
        for heads, half, aligned in ((16, 64, True), (8, 64, True), (8, 128, True), (3, 7, False))
        for dtype in TRITON_DTYPES.values()
        for grad in dict.fromkeys((dtype, "fp32"))
    ]
