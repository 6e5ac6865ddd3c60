"""From scores to token rewards: temperature softmax and sums of many segments, in one launch.

    alpha_j = softmax(b_j / temperature)  # or of b_j / b_j.std(correction=0) / temperature
    rewards[start_j : start_j + T_j] += weight_j * alpha_j

Equations 4, 5, 11 and 12 of arXiv 2602.01791, in float64 as on the CPU. One program a judgement;
the last one of a response adds up its rewards. Cost: a few elements per token; the launch is the
bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.launching import CompileCase, check_vector, require_triton
from g2r_fast.kernels.segment_softmax import check_segments, segment_tables

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
    from g2r_fast.kernels.segment_softmax import softmax_and_sum
except ImportError:  # a machine without a GPU need not have it; softmax_rewards() then says so
    triton = None

__all__ = ["CONFIG", "compile_cases", "softmax_rewards"]


CONFIG = LAUNCHES["softmax_rewards"]

if triton is not None:

    @triton.jit
    def _softmax_rewards_kernel(  # type: ignore[no-untyped-def]
        b_ptr,
        alpha_ptr,
        rewards_ptr,
        numbers_ptr,
        tiles_ptr,
        judgements_ptr,
        components_ptr,
        order_ptr,
        counters_ptr,
        J,
        STANDARDISE: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ):
        j = tl.load(tiles_ptr + 2 * tl.program_id(0))
        softmax_and_sum(
            b_ptr, alpha_ptr, rewards_ptr, numbers_ptr, judgements_ptr, components_ptr,
            order_ptr, counters_ptr, j, J, STANDARDISE, BLOCK_S,
        )  # fmt: skip


def softmax_rewards(
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    temperature: float,
    standardise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`alpha_j = softmax(b_j / temperature)`, `rewards[start_j : start_j + T_j] += w_j alpha_j`.

    Args:
        scores: [total] float64 or float32, contiguous; b = scores.split(lengths).
        lengths, weights, starts: J each; segments may overlap in any way.
        count: number of rewards.
        temperature, standardise: with standardise b is divided by its population std first; a
            spread <= 1e-6 * max|b| counts as zeros.

    Returns:
        alpha [total] and rewards [count], float64; rewards are summed in the order of j.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, dtypes or devices other than these.
    """
    require_triton(triton, "softmax_rewards")
    check_vector("scores", scores, (torch.float64, torch.float32), scores)
    check_segments(lengths, weights, starts, count)
    if sum(lengths) != len(scores):
        raise InputError("lengths do not add up", expected=f"{len(scores)}", got=sum(lengths))
    tables = segment_tables(lengths, weights, starts, temperature, scores.device, block_t=None)
    alpha = torch.empty(len(scores), dtype=torch.float64, device=scores.device)
    rewards = torch.zeros(count, dtype=torch.float64, device=scores.device)
    if len(tables.tiles):
        _softmax_rewards_kernel[(len(tables.tiles),)](
            scores,
            alpha,
            rewards,
            tables.numbers,
            tables.tiles,
            tables.judgements,
            tables.components,
            tables.order,
            tables.counters,
            len(lengths),
            STANDARDISE=standardise,
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return alpha, rewards


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation: scores float64, as the engine has them, or float32."""
    return [
        CompileCase(
            name=f"softmax_rewards {dtype}{' auto' if standardise else ''}"
            f"{' aligned' if aligned else ''}",
            kernel=_softmax_rewards_kernel,
            signature={
                "b_ptr": f"*{dtype}",
                "alpha_ptr": "*fp64",
                "rewards_ptr": "*fp64",
                "numbers_ptr": "*fp64",
                "tiles_ptr": "*i32",
                "judgements_ptr": "*i32",
                "components_ptr": "*i32",
                "order_ptr": "*i32",
                "counters_ptr": "*i32",
                "J": "i32",
            },
            constants={"STANDARDISE": standardise, **CONFIG.blocks},
            options=CONFIG.options(),
            aligned=aligned,
        )
        for dtype in ("fp64", "fp32")
        for standardise in (False, True)
        for aligned in (True, False)
    ]
