"""What the kernels of token rewards share: tables of segments, temperature softmax, sums.

    alpha_j = softmax(b_j / temperature)  # or of b_j / b_j.std(correction=0) / temperature
    rewards[start_j : start_j + T_j] += weight_j * alpha_j

Equations 4, 5, 11 and 12 of arXiv 2602.01791; a few elements per token, in float64 as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from g2r_fast.kernels.launching import CompileCase

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; the launchers then say so
    triton = None

__all__ = ["SegmentTables", "check_segments", "compile_cases", "segment_tables"]

if triton is not None:

    @triton.jit
    def count_in(counter_ptr):  # type: ignore[no-untyped-def]
        """How many programs have counted themselves in before; what they stored is visible then."""
        # Who sees what. The tokens of a judgement are read by several programs, its softmax is
        # taken by the last of them to count itself in, and the sums of a response by the last of
        # those. Every store in front of a count must be visible behind the last count:
        #   1. debug_barrier, all threads of the block: their stores happen before what one thread,
        #      which issues the atomic, does next;
        #   2. the atomic is a release and an acquire at GPU scope: additions to one counter form
        #      one release sequence, so whoever reads tiles - 1 synchronises with all before it;
        #   3. debug_barrier again: what the one thread has acquired holds for its whole block.
        # No program waits for another, so nothing is asked of the order in which blocks run, and
        # every sum has a fixed order, whoever takes it. The counters start from zero.
        tl.debug_barrier()
        before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        return before

    @triton.jit
    def softmax_and_sum(  # type: ignore[no-untyped-def]
        b_ptr,
        alpha_ptr,
        rewards_ptr,
        numbers_ptr,
        judgements_ptr,
        components_ptr,
        order_ptr,
        counters_ptr,
        j,
        J,
        STANDARDISE: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ):
        """Softmax of judgement j; the last one of a response adds up its rewards.

        numbers: J weights, the temperature; counters: J for the caller, then one a response.
        """
        judgement_ptr = judgements_ptr + j * 7
        offset = tl.load(judgement_ptr).to(tl.int64)
        count = tl.load(judgement_ptr + 1)
        component = tl.load(judgement_ptr + 3)
        softmax(
            b_ptr + offset, alpha_ptr + offset, count, tl.load(numbers_ptr + J),
            STANDARDISE, BLOCK_S,
        )  # fmt: skip
        done = count_in(counters_ptr + J + component)
        component_ptr = components_ptr + component * 4
        members = tl.load(component_ptr + 1)
        if done == members - 1:
            order_ptr += tl.load(component_ptr)
            begin = tl.load(component_ptr + 2)
            end = tl.load(component_ptr + 3)
            for at in range(begin, end, BLOCK_S):
                tokens = at + tl.arange(0, BLOCK_S)
                total = tl.zeros([BLOCK_S], dtype=tl.float64)
                for member in range(members):  # in the order of j, whoever came last
                    one = tl.load(order_ptr + member)
                    one_ptr = judgements_ptr + one * 7
                    inside = tokens - tl.load(one_ptr + 2)
                    mask = (inside >= 0) & (inside < tl.load(one_ptr + 1))
                    source = alpha_ptr + tl.load(one_ptr).to(tl.int64) + inside
                    share = tl.load(source, mask=mask, other=0.0)
                    # Not weight * 0 beside the segment: a weight may be anything finite, a share
                    # that is not there is nothing.
                    total += tl.where(mask, tl.load(numbers_ptr + one) * share, 0.0)
                tl.store(rewards_ptr + tokens, total, mask=tokens < end)

    @triton.jit
    def softmax(  # type: ignore[no-untyped-def]
        b_ptr,
        alpha_ptr,
        count,
        temperature,
        STANDARDISE: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ):
        slots = tl.arange(0, BLOCK_S)
        low = float("-inf")
        most = tl.full([BLOCK_S], low, dtype=tl.float64)
        largest = tl.zeros([BLOCK_S], dtype=tl.float64)
        total = tl.zeros([BLOCK_S], dtype=tl.float64)
        for at in range(0, count, BLOCK_S):
            mask = at + slots < count
            b = tl.load(b_ptr + at + slots, mask=mask, other=0.0).to(tl.float64)
            most = tl.maximum(most, tl.where(mask, b, low))
            if STANDARDISE:
                largest = tl.maximum(largest, tl.abs(b))
                total += b
        peak = tl.max(most, axis=0)
        if STANDARDISE:
            mean = tl.sum(total, axis=0) / count.to(tl.float64)
            square = tl.zeros([BLOCK_S], dtype=tl.float64)
            for at in range(0, count, BLOCK_S):
                mask = at + slots < count
                b = tl.load(b_ptr + at + slots, mask=mask, other=0.0).to(tl.float64)
                square += tl.where(mask, (b - mean) * (b - mean), 0.0)
            std = tl.sqrt(tl.sum(square, axis=0) / count.to(tl.float64))
            # NaN is not flat: it stays NaN.
            std = tl.where(std <= 1e-6 * tl.max(largest, axis=0), 0.0, std)
        else:
            std = tl.full([], 1.0, dtype=tl.float64)
        flat = std == 0.0
        # One division for all: in float64 each takes a slow path of its own, and registers.
        factor = 1.0 / (tl.where(flat, 1.0, std) * temperature)
        # The difference first: of two scaled scores, one fused with its product, what is left of
        # 1e300 may be anything.
        total = tl.zeros([BLOCK_S], dtype=tl.float64)
        for at in range(0, count, BLOCK_S):
            mask = at + slots < count
            b = tl.load(b_ptr + at + slots, mask=mask, other=0.0).to(tl.float64)
            below = tl.where(flat, 0.0, (b - peak) * factor)
            total += tl.where(mask, tl.exp(below), 0.0)
        share = 1.0 / tl.sum(total, axis=0)
        for at in range(0, count, BLOCK_S):
            mask = at + slots < count
            b = tl.load(b_ptr + at + slots, mask=mask, other=0.0).to(tl.float64)
            below = tl.where(flat, 0.0, (b - peak) * factor)
            tl.store(alpha_ptr + at + slots, tl.exp(below) * share, mask=mask)


@dataclass(frozen=True)
class SegmentTables:
    tiles: torch.Tensor  # [n, 2] (judgement, tile index)
    judgements: torch.Tensor  # [J, 7], see segment_tables
    components: torch.Tensor  # [C, 4] (first in order, number, first token, token behind the last)
    order: torch.Tensor  # judgements by component, ascending within one
    counters: torch.Tensor  # [J + C]
    numbers: torch.Tensor  # [J + 1 + J] float64: weights, temperature, scales


def segment_tables(
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    temperature: float,
    device: torch.device,
    *,
    block_t: int | None,
    first_rows: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
) -> SegmentTables:
    """Judgements as (first score, tokens, first reward, component, first row, stride, tiles).

    A component is a stretch of rewards that no segment reaches beyond: one response, where every
    judgement of it covers the same tokens. block_t None: one tile a judgement, scores are given.
    """
    J = len(lengths)
    count = torch.tensor(lengths, dtype=torch.int64)
    start = torch.tensor(starts, dtype=torch.int64)
    full = torch.nonzero(count).flatten()  # judgements without tokens take no part
    by_start = full[torch.argsort(start[full], stable=True)]
    stop = (start + count)[by_start]
    reach = torch.cummax(stop, 0).values if len(stop) else stop
    opens = torch.ones(len(by_start), dtype=torch.bool)
    opens[1:] = start[by_start][1:] >= reach[:-1]
    component = torch.zeros(J, dtype=torch.int64)
    component[by_start] = opens.cumsum(0) - 1
    members = torch.bincount(component[full], minlength=int(opens.sum()))
    order = full[torch.argsort(component[full], stable=True)]
    heads = torch.nonzero(opens).flatten()
    tails = torch.cat([heads[1:], torch.tensor([len(by_start)])])[: len(heads)] - 1
    components = torch.stack(
        [members.cumsum(0) - members, members, start[by_start][heads], reach[tails]], 1
    )
    tiles = (count > 0).long() if block_t is None else (count + block_t - 1) // block_t
    judgement = torch.arange(J).repeat_interleave(tiles)
    index = torch.arange(len(judgement)) - (tiles.cumsum(0) - tiles)[judgement]
    zeros = [0] * J
    judgements = torch.stack(
        [
            count.cumsum(0) - count,
            count,
            start,
            component,
            torch.tensor(zeros if first_rows is None else first_rows, dtype=torch.int64),
            torch.tensor(zeros if strides is None else strides, dtype=torch.int64),
            tiles,
        ],
        1,
    )
    # One copy to the device for all the integers, one for the numbers.
    parts = [torch.stack([judgement, index], 1), judgements, components, order]
    parts.append(torch.zeros(J + len(components), dtype=torch.int64))
    sizes = [part.numel() for part in parts]
    flat = torch.cat([part.reshape(-1) for part in parts]).to(torch.int32).to(device)
    placed = [a.view(b.shape) for a, b in zip(flat.split(sizes), parts, strict=True)]
    numbers = [*weights, temperature, *([1.0] * J if scales is None else scales)]
    placed.append(torch.tensor(numbers, dtype=torch.float64).to(device))
    return SegmentTables(*placed)


def check_segments(
    lengths: Sequence[int], weights: Sequence[float], starts: Sequence[int], count: int
) -> None:
    if not len(lengths) == len(weights) == len(starts):
        raise InputError(
            "lengths, weights and starts differ in number",
            expected=str(len(lengths)),
            got=f"{len(weights)} and {len(starts)}",
        )
    for j, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        if length < 0 or start < 0 or start + length > count:
            raise InputError(
                "a segment lies outside the rewards",
                expected=f"within [0, {count}]",
                got=f"[{start}, {start + length}]",
                index=j,
            )


def compile_cases() -> list[CompileCase]:
    """Nothing here is launched: the kernels that call it list the cases."""
    return []
