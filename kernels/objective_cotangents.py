"""The cotangent of a verdict's objective at rows of logits.

    values = onehot(id) - exp(z - against)  # off the id; or onehot(id) - onehot(other)

Equation 2 of arXiv 2602.01791 without its scale, which log_probabilities finds along with
`against`. Cost: n · V elements are read and written once; memory bandwidth is the bound.
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
from g2r_fast.kernels.log_probabilities import OBJECTIVES, check_objective

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; the launcher then says so
    triton = None

__all__ = ["CONFIG", "compile_cases", "objective_cotangents"]


CONFIG = LAUNCHES["objective_cotangents"]

if triton is not None:

    @triton.jit
    def _cotangents_kernel(  # type: ignore[no-untyped-def]
        logits_ptr,
        rows_ptr,
        ids_ptr,
        other_ids_ptr,
        against_ptr,
        values_ptr,
        stride,
        against_stride,
        V,
        OBJECTIVE: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = columns < V
        row = tl.load(rows_ptr + program).to(tl.int64)
        one = tl.load(ids_ptr + row).to(tl.int64)
        if OBJECTIVE == "logp":
            against = tl.load(against_ptr + row * against_stride)
            z = tl.load(logits_ptr + row * stride + columns, mask=inside, other=0.0)
            values = tl.where(columns == one, 1.0, -tl.exp(z.to(tl.float32) - against))
        else:
            two = tl.load(other_ids_ptr + row).to(tl.int64)
            values = tl.where(columns == one, 1.0, 0.0) - tl.where(columns == two, 1.0, 0.0)
        tl.store(values_ptr + program * V + columns, values, mask=inside)


def objective_cotangents(
    logits: torch.Tensor,
    ids: torch.Tensor,
    against: torch.Tensor,
    rows: torch.Tensor,
    other_ids: torch.Tensor | None = None,
    *,
    objective: str = "logp",
) -> torch.Tensor:
    """`onehot(id) - exp(z - against)` off the id, or `onehot(id) - onehot(other)`.

    Args:
        logits: [R, V], as in log_probabilities, at temperature 1.
        ids, other_ids: [R] int64 or int32; other_ids not for "logp".
        against: [R] float32 of any stride, RowStatistics.against of all rows.
        rows: [n] int64 or int32, the rows of logits that are wanted; not checked against R, as
            that would wait for the device.
        objective: "logp", "logp_two_way" or "logodds".

    Returns:
        [n, V] float32; times RowStatistics.scale they are the gradient.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes or devices other than these.
    """
    require_triton(triton, "objective_cotangents")
    check_objective(objective, other_ids)
    check_rows("logits", logits, logits)
    integers = (torch.int64, torch.int32)
    check_vector("ids", ids, integers, logits)
    if other_ids is not None:
        check_vector("other_ids", other_ids, integers, logits)
    check_vector("rows", rows, integers, rows)
    if against.dtype != torch.float32 or against.shape != ids.shape:
        raise InputError("against must be float32 with one entry per row",
                         expected=f"shape ({len(ids)},)",
                         got=f"{against.dtype} {tuple(against.shape)}")  # fmt: skip
    for name, tensor in (("against", against), ("rows", rows)):
        if tensor.device != logits.device:
            raise InputError(f"{name} is on another device", expected=str(logits.device),
                             got=tensor.device)  # fmt: skip
    V = logits.shape[1]
    values = torch.empty(len(rows), V, dtype=torch.float32, device=logits.device)
    if values.numel():
        _cotangents_kernel[(len(rows), triton.cdiv(V, CONFIG.blocks["BLOCK_V"]))](
            logits,
            rows,
            ids,
            ids if other_ids is None else other_ids,
            against,
            values,
            logits.stride(0),
            against.stride(0),
            V,
            OBJECTIVE=objective,
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return values


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation, ids int64."""
    return [
        CompileCase(
            name=f"cotangents {objective} {dtype}",
            kernel=_cotangents_kernel,
            signature={
                "logits_ptr": f"*{dtype}",
                "rows_ptr": "*i64",
                "ids_ptr": "*i64",
                "other_ids_ptr": "*i64",
                "against_ptr": "*fp32",
                "values_ptr": "*fp32",
                "stride": "i32",
                "against_stride": "i32",
                "V": "i32",
            },
            constants={"OBJECTIVE": objective, **CONFIG.blocks},
            options=CONFIG.options(),
            aligned=False,
        )
        for objective in OBJECTIVES
        for dtype in (TRITON_DTYPES.values() if objective == "logp" else ["fp32"])
    ]
