"""What a softmax leaves of the words that were drawn, summed over the rows of a sequence.

    p = (logits / temperature).softmax(-1)
    sums[owner] += (weights[:, None] * (onehot(ids) - p))[start:stop].sum(0)     # per stretch

Sums over tokens come before the LM head: arXiv 2512.15687, Eq. 8. Log-probabilities, log-sum-exps
and `1 - p` of the ids come from `log_probabilities`. Cost: R · V elements are read once here and
once there; memory bandwidth is the bound.
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
except ImportError:  # a machine without a GPU need not have it; the launcher then says so
    triton = None

__all__ = ["CONFIG", "compile_cases", "residual_sums"]


CONFIG = LAUNCHES["residual_sums"]

if triton is not None:

    @triton.jit
    def _residual_sums_kernel(  # type: ignore[no-untyped-def]
        logits_ptr,
        ids_ptr,
        weights_ptr,
        logsumexp_ptr,
        others_ptr,
        stretches_ptr,
        sums_ptr,
        stride,
        sums_stride,
        V,
        inverse_temperature,
        BLOCK_V: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        columns = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = columns < V
        stretch = stretches_ptr + tl.program_id(1).to(tl.int64) * 3
        start = tl.load(stretch).to(tl.int64)
        stop = tl.load(stretch + 1).to(tl.int64)
        owner = tl.load(stretch + 2).to(tl.int64)
        total = tl.zeros([BLOCK_V], dtype=tl.float32)
        for first in range(start, stop, BLOCK_R):
            part = tl.zeros([BLOCK_V], dtype=tl.float32)
            for row in range(first, tl.minimum(first + BLOCK_R, stop)):
                z = tl.load(logits_ptr + row * stride + columns, mask=mask, other=float("-inf"))
                z = z.to(tl.float32) * inverse_temperature
                one = tl.load(ids_ptr + row).to(tl.int64)
                p = tl.exp(z - tl.load(logsumexp_ptr + row).to(tl.float32))
                # What all other words have, and not 1 less what this one has.
                left = tl.where(columns == one, tl.load(others_ptr + row).to(tl.float32), -p)
                part += tl.load(weights_ptr + row).to(tl.float32) * left
            total += part
        sums = sums_ptr + owner * sums_stride + columns
        before = tl.load(sums, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums, before + total, mask=mask)


def residual_sums(
    logits: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    logsumexp: torch.Tensor,
    others: torch.Tensor,
    stretches: torch.Tensor,
    sums: torch.Tensor,
    *,
    temperature: float,
) -> None:
    """`sums[owner] += (weights[:, None] * (onehot(ids) - p))[start:stop].sum(0)` per stretch.

    Args:
        logits: [R, V] float32, float16 or bfloat16; columns contiguous, rows of any stride.
        ids: [R] int64 or int32, the word of every row that was drawn.
        weights: [R] float32.
        logsumexp: [R] float32, of `logits / temperature`.
        others: [R] float32, the sum of p over all words but the row's own.
        stretches: [S, 3] int64: first row, the row behind the last, and the row of sums that they
            are added to; no two of them the same. The values are not checked here, as that would
            wait for the device.
        sums: [O, V] float32, added to; columns contiguous.
        temperature: divides the logits.

    Sums are float32: `block_r` rows, those sums of a stretch, and what was there. No atomics: the
    result is the same at every run.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes or devices other than these.
    """
    require_triton(triton, "residual_sums")
    check_rows("logits", logits, logits)
    check_vector("ids", ids, (torch.int64, torch.int32), logits)
    for name, vector in (("weights", weights), ("logsumexp", logsumexp), ("others", others)):
        check_vector(name, vector, (torch.float32,), logits)
    check_rows("sums", sums, logits)
    if sums.dtype != torch.float32:
        raise InputTypeError("sums has an unusable dtype", expected="float32", got=sums.dtype)
    if sums.shape[1] != logits.shape[1]:
        raise InputError(
            "sums and logits differ in width", expected=str(logits.shape[1]), got=sums.shape[1]
        )
    if stretches.ndim != 2 or stretches.shape[1] != 3 or not stretches.is_contiguous():
        raise InputError(
            "stretches must be contiguous triples",
            expected="shape (S, 3)",
            got=f"shape {tuple(stretches.shape)}, stride {stretches.stride()}",
        )
    check_vector("stretches", stretches[:, 0].contiguous(), (torch.int64,), stretches)
    if stretches.device != logits.device:
        raise InputError(
            "stretches is on another device", expected=str(logits.device), got=stretches.device
        )
    if not temperature > 0.0:
        raise InputError("temperature is not positive", expected="> 0", got=temperature)
    V = logits.shape[1]
    if len(stretches) and V:
        _residual_sums_kernel[(triton.cdiv(V, CONFIG.blocks["BLOCK_V"]), len(stretches))](
            logits,
            ids,
            weights,
            logsumexp,
            others,
            stretches,
            sums,
            logits.stride(0),
            sums.stride(0),
            V,
            1.0 / temperature,
            **CONFIG.blocks,
            **CONFIG.options(),
        )


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation, ids int64."""
    return [
        CompileCase(
            name=f"residual_sums {dtype}{' aligned' if aligned else ''}",
            kernel=_residual_sums_kernel,
            signature={
                "logits_ptr": f"*{dtype}",
                "ids_ptr": "*i64",
                "weights_ptr": "*fp32",
                "logsumexp_ptr": "*fp32",
                "others_ptr": "*fp32",
                "stretches_ptr": "*i64",
                "sums_ptr": "*fp32",
                "stride": "i32",
                "sums_stride": "i32",
                "V": "i32",
                "inverse_temperature": "fp32",
            },
            constants=CONFIG.blocks,
            options=CONFIG.options(),
            aligned=aligned,
        )
        for dtype in TRITON_DTYPES.values()
        for aligned in (True, False)
    ]
