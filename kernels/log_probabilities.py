"""Log-probabilities and entropies of rows of logits.

    z = logits[rows] / temperature
    logps = z.log_softmax(-1).gather(-1, ids)
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)

One pass over every row, online, float32 in the loop and float64 at its end. The sum of exponentials
leaves out the words that are asked for, so that a log-probability near zero keeps all its digits,
as does the distribution over the other words. Cost: R · V elements are read once; memory bandwidth
is the bound.
"""

from __future__ import annotations

from typing import NamedTuple

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
except ImportError:  # a machine without a GPU need not have it; the launchers then say so
    triton = None

__all__ = ["CONFIG", "OBJECTIVES", "RowStatistics", "check_objective"]
__all__ += ["compile_cases", "log_probabilities"]

OBJECTIVES = ("logp", "logp_two_way", "logodds")
_COLUMNS = 8  # of the statistics of a row, see RowStatistics


CONFIG = LAUNCHES["log_probabilities"]


class RowStatistics(NamedTuple):
    """What is known of every row; float32 [R] each, views of one tensor [R, 8]."""

    logp: torch.Tensor  # of the first id; NaN where it is out of the vocabulary
    other_logp: torch.Tensor  # of the second id
    logsumexp: torch.Tensor
    entropy: torch.Tensor
    against: torch.Tensor  # logsumexp over all words but the first id
    margin: torch.Tensor  # z of the first id minus z of the second
    scale: torch.Tensor  # of the objective's cotangent
    finite: torch.Tensor  # 1 where every logit is finite, else 0


if triton is not None:

    @triton.jit
    def _log1p(x):  # type: ignore[no-untyped-def]
        """Of a float64 x >= 0 with all its digits: the rounding of 1 + x is divided out again."""
        u = 1.0 + x
        tiny = u == 1.0
        return tl.where(tiny, x, tl.log(u) * (x / tl.where(tiny, 1.0, u - 1.0)))

    @triton.jit
    def _log_add(a, b):  # type: ignore[no-untyped-def]
        """log(exp(a) + exp(b)); nothing and nothing is nothing."""
        high = tl.maximum(a, b)
        low = tl.minimum(a, b)
        none = high == float("-inf")
        gap = tl.where(none, 0.0, low - tl.where(none, 0.0, high))
        return tl.where(none, high, high + _log1p(tl.exp(gap)))

    @triton.jit
    def _softplus(x):  # type: ignore[no-untyped-def]
        return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))

    @triton.jit
    def _log_probabilities_kernel(  # type: ignore[no-untyped-def]
        logits_ptr,
        rows_ptr,
        ids_ptr,
        other_ids_ptr,
        out_ptr,
        stride,
        V,
        inverse_temperature,
        ROWS: tl.constexpr,
        OTHER: tl.constexpr,
        ENTROPY: tl.constexpr,
        OBJECTIVE: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        row = program
        if ROWS:
            row = tl.load(rows_ptr + program).to(tl.int64)
        logits_row = logits_ptr + row * stride
        one = tl.load(ids_ptr + program).to(tl.int64)
        two = one
        if OTHER:
            two = tl.load(other_ids_ptr + program).to(tl.int64)
        # Per column slot an online softmax of its own: a maximum, a sum of exponentials, for the
        # entropy one of exponent times exponential. The first maximum is finite, or the difference
        # to a word of probability zero would be NaN.
        lowest = -3.0e38
        most = tl.full([BLOCK_V], lowest, dtype=tl.float32)
        total = tl.zeros([BLOCK_V], dtype=tl.float32)
        moment = tl.zeros([BLOCK_V], dtype=tl.float32)
        odd = tl.zeros([BLOCK_V], dtype=tl.int32)
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_row + columns, mask=columns < V, other=0.0).to(tl.float32)
            odd = tl.where(tl.abs(z) < float("inf"), odd, 1)
            z = z * inverse_temperature
            counted = (columns < V) & (columns != one) & (columns != two)
            z = tl.where(counted, z, float("-inf"))
            gap = z - most
            share = tl.exp(-tl.abs(gap))
            rises = gap > 0.0
            if ENTROPY:
                part = tl.where(share > 0.0, gap * share, 0.0)
                shifted = tl.where(share > 0.0, share * (moment - gap * total), 0.0)
                moment = tl.where(rises, shifted, moment + part)
            total = tl.where(rises, total * share + 1.0, total + share)
            most = tl.where(rises, z, most)
        # The slots together, then the words that were left out; a slot without words has no say.
        filled = total != 0.0
        peak = tl.max(tl.where(filled, most, lowest), axis=0)
        gap = tl.where(filled, most - peak, 0.0).to(tl.float64)
        share = tl.exp(gap)
        whole = tl.sum(share * total.to(tl.float64), axis=0)
        none = whole == 0.0
        level = peak.to(tl.float64)
        rest = tl.where(none, float("-inf"), level + tl.log(tl.where(none, 1.0, whole)))
        # Ids out of the vocabulary are not read at: NaN, and so is what depends on them.
        missing = float("nan")
        z_one = tl.load(logits_row + one, mask=(one >= 0) & (one < V), other=missing)
        z_one = (z_one.to(tl.float32) * inverse_temperature).to(tl.float64)
        against = rest
        z_two = z_one
        other_logp = z_one * missing
        margin = z_one * missing
        if OTHER:
            z_two = tl.load(logits_row + two, mask=(two >= 0) & (two < V), other=missing)
            z_two = (z_two.to(tl.float32) * inverse_temperature).to(tl.float64)
            same = one == two
            against = tl.where(same, rest, _log_add(rest, z_two))
            against_two = tl.where(same, rest, _log_add(rest, z_one))
            other_logp = -_softplus(against_two - z_two)
            margin = z_one - z_two
        logsumexp = _log_add(against, z_one)
        logp = -_softplus(against - z_one)
        entropy = z_one * missing
        if ENTROPY:
            # sum p (lse - z) over the words that were counted, and p (lse - z) of each left out.
            height = tl.sum(share * (moment.to(tl.float64) + gap * total.to(tl.float64)), axis=0)
            depth = tl.where(none, 0.0, logsumexp - level)
            entropy = tl.where(none, 0.0, tl.exp(level - logsumexp) * (depth * whole - height))
            entropy -= tl.exp(logp) * tl.where(logp == float("-inf"), 0.0, logp)
            if OTHER:
                more = tl.exp(other_logp) * tl.where(other_logp == float("-inf"), 0.0, other_logp)
                entropy -= tl.where(one == two, 0.0, more)
        scale = tl.full([], 1.0, dtype=tl.float64)
        if OBJECTIVE == "logp":
            scale = 1.0 / (1.0 + tl.exp(z_one - against))
        elif OBJECTIVE == "logp_two_way":
            scale = 1.0 / (1.0 + tl.exp(margin))
        out_row = out_ptr + program * 8
        tl.store(out_row, logp.to(tl.float32))
        tl.store(out_row + 1, other_logp.to(tl.float32))
        tl.store(out_row + 2, logsumexp.to(tl.float32))
        tl.store(out_row + 3, entropy.to(tl.float32))
        tl.store(out_row + 4, against.to(tl.float32))
        tl.store(out_row + 5, margin.to(tl.float32))
        tl.store(out_row + 6, scale.to(tl.float32))
        tl.store(out_row + 7, 1.0 - tl.max(odd, axis=0).to(tl.float32))


def log_probabilities(
    logits: torch.Tensor,
    ids: torch.Tensor,
    other_ids: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    objective: str = "logodds",
) -> RowStatistics:
    """`(logits[rows] / temperature).log_softmax(-1).gather(-1, ids)`, and what comes with it.

    Args:
        logits: [R, V] float32, float16 or bfloat16; columns contiguous, rows of any stride.
        ids: [n] int64 or int32, one word a row; out of the vocabulary: NaN, nothing is read there.
        other_ids: [n], a second word a row; without it other_logp and margin are NaN.
        rows: [n] int64 or int32, the row of logits of each id; by default n = R and all of them.
        temperature: divides the logits.
        entropy: whether it is computed, in nats; else it is NaN.
        objective: whose scale is computed: "logp", `sum of p_v over v != id`, never `1 - p`;
            "logp_two_way", the other word's probability among the two; "logodds", 1.

    Returns:
        RowStatistics, n rows. `finite` is 0 for a row with any NaN or infinity.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes or devices other than these.
    """
    require_triton(triton, "log_probabilities")
    check_objective(objective, other_ids)
    check_rows("logits", logits, logits)
    check_vector("ids", ids, (torch.int64, torch.int32), logits if rows is None else ids)
    integers = (torch.int64, torch.int32)
    for name, vector in (("rows", rows), ("other_ids", other_ids)):
        if vector is not None:
            check_vector(name, vector, integers, ids)
    if ids.device != logits.device:
        raise InputError("ids is on another device", expected=str(logits.device), got=ids.device)
    if not temperature > 0.0:
        raise InputError("temperature is not positive", expected="> 0", got=temperature)
    out = torch.empty(len(ids), _COLUMNS, dtype=torch.float32, device=logits.device)
    if len(ids):
        _log_probabilities_kernel[(len(ids),)](
            logits,
            ids if rows is None else rows,
            ids,
            ids if other_ids is None else other_ids,
            out,
            logits.stride(0),
            logits.shape[1],
            1.0 / temperature,
            ROWS=rows is not None,
            OTHER=other_ids is not None,
            ENTROPY=entropy,
            OBJECTIVE=objective,
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return RowStatistics(*out.unbind(1))


def check_objective(objective: str, other_ids: torch.Tensor | None) -> None:
    if objective not in OBJECTIVES:
        raise InputError("unknown objective", expected=" | ".join(OBJECTIVES), got=repr(objective))
    if objective == "logp_two_way" and other_ids is None:
        raise InputTypeError(f"objective {objective!r} needs other_ids", got="None")


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation, ids int64."""
    statistics = {
        "rows_ptr": "*i64",
        "ids_ptr": "*i64",
        "other_ids_ptr": "*i64",
        "out_ptr": "*fp32",
        "stride": "i32",
        "V": "i32",
        "inverse_temperature": "fp32",
    }
    # What the callers ask for: verdicts with two words, rollouts with one, G2RL with entropies.
    asked = [(objective, False, True, False) for objective in OBJECTIVES]
    asked += [("logp", False, False, False), ("logodds", True, False, False)]
    asked += [("logodds", True, False, True), ("logodds", False, False, True)]
    asked += [("logp", False, True, True), ("logp", False, False, True)]
    return [
        CompileCase(
            name=f"log_probabilities {objective}{' rows' if rows else ''}"
            f"{' other' if other else ''}{' entropy' if entropy else ''} {dtype}",
            kernel=_log_probabilities_kernel,
            signature={"logits_ptr": f"*{dtype}"} | statistics,
            constants={
                "ROWS": rows,
                "OTHER": other,
                "ENTROPY": entropy,
                "OBJECTIVE": objective,
                **CONFIG.blocks,
            },
            options=CONFIG.options(),
            aligned=False,
        )
        for objective, rows, other, entropy in asked
        for dtype in TRITON_DTYPES.values()
    ]
