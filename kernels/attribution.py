"""From embedding gradients to token rewards: read-out, temperature softmax, sums, in one launch.

    b_j = (grads[first_j + t * stride_j] * embed[row_map[start_j + t]]).sum(-1) * scale_j  # or norm
    alpha_j = softmax(b_j / temperature)  # or of b_j / b_j.std(correction=0) / temperature
    rewards[start_j : start_j + T_j] += weight_j * alpha_j

Equations 3, 4, 5, 11 and 12 of arXiv 2602.01791. Cost: every gradient element of a judged token is
read once, and the embedding row once per judgement; memory bandwidth is the bound. Scores are
accumulated in float32; softmax and sums, a few elements per token, are float64 as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

__all__ = ["CONFIG", "READOUTS", "AttributionConfig", "attribution", "compile_cases"]
__all__ += ["softmax_rewards"]

READOUTS = ("dot", "l1", "l2")
_JUDGEMENT = 7  # columns of the table of judgements: see _tables
_COMPONENT = 4


@dataclass(frozen=True)
class AttributionConfig:
    """Launch configuration: `block_t` tokens a program, `block_h` columns a step of the read-out;
    `block_s` tokens a step of softmax and sums."""

    block_t: int
    block_h: int
    block_s: int
    num_warps: int
    reason: str

    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


CONFIG = AttributionConfig(
    block_t=8,
    block_h=512,
    block_s=512,
    num_warps=4,
    reason="By arithmetic, not yet by measurement: a step reads 16 KB of gradients with 16 bytes a "
    "thread and load, its sums take 32 registers; a response of 500 tokens and 8 items still gives "
    "500 programs, several for every multiprocessor. 512 float64 are 8 registers a thread.",
)

if triton is not None:

    @triton.jit
    def _attribution_kernel(  # type: ignore[no-untyped-def]
        b_ptr,
        alpha_ptr,
        rewards_ptr,
        grads_ptr,
        embed_ptr,
        row_map_ptr,
        numbers_ptr,
        tiles_ptr,
        judgements_ptr,
        components_ptr,
        order_ptr,
        counters_ptr,
        grads_stride,
        embed_stride,
        H,
        J,
        READOUT: tl.constexpr,
        STANDARDISE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ):
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
        tile = tl.program_id(0)
        j = tl.load(tiles_ptr + 2 * tile)
        judgement_ptr = judgements_ptr + j * 7
        if READOUT == "given":
            _softmax_and_sum(
                b_ptr, alpha_ptr, rewards_ptr, numbers_ptr, judgements_ptr, components_ptr,
                order_ptr, counters_ptr, j, J, STANDARDISE, BLOCK_S,
            )  # fmt: skip
        else:
            _read_out(
                b_ptr, grads_ptr, embed_ptr, row_map_ptr, numbers_ptr + J + 1 + j, judgement_ptr,
                tl.load(tiles_ptr + 2 * tile + 1), grads_stride, embed_stride, H,
                READOUT, BLOCK_T, BLOCK_H,
            )  # fmt: skip
            tl.debug_barrier()
            arrived = tl.atomic_add(counters_ptr + j, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == tl.load(judgement_ptr + 6) - 1:
                _softmax_and_sum(
                    b_ptr, alpha_ptr, rewards_ptr, numbers_ptr, judgements_ptr, components_ptr,
                    order_ptr, counters_ptr, j, J, STANDARDISE, BLOCK_S,
                )  # fmt: skip

    @triton.jit
    def _read_out(  # type: ignore[no-untyped-def]
        b_ptr,
        grads_ptr,
        embed_ptr,
        row_map_ptr,
        scale_ptr,
        judgement_ptr,
        index,
        grads_stride,
        embed_stride,
        H,
        READOUT: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        offset = tl.load(judgement_ptr).to(tl.int64)
        count = tl.load(judgement_ptr + 1)
        first = tl.load(judgement_ptr + 4).to(tl.int64)
        stride = tl.load(judgement_ptr + 5).to(tl.int64)
        tokens = index * BLOCK_T + tl.arange(0, BLOCK_T)
        live = tokens < count
        grads_row = grads_ptr + (first + tokens * stride) * grads_stride  # [BLOCK_T]
        if READOUT == "dot":
            start = tl.load(judgement_ptr + 2).to(tl.int64)
            source = tl.load(row_map_ptr + start + tokens, mask=live, other=0).to(tl.int64)
            embed_row = embed_ptr + source * embed_stride
        # Per column slot first, across the slots at the end: short chains of additions.
        total = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        for begin in range(0, H, BLOCK_H):
            columns = begin + tl.arange(0, BLOCK_H)
            mask = live[:, None] & (columns < H)[None, :]
            grad = tl.load(grads_row[:, None] + columns[None, :], mask=mask, other=0.0)
            grad = grad.to(tl.float32)
            if READOUT == "dot":
                embed = tl.load(embed_row[:, None] + columns[None, :], mask=mask, other=0.0)
                total += grad * embed.to(tl.float32)
            elif READOUT == "l1":
                total += tl.abs(grad)
            else:
                total += grad * grad
        value = tl.sum(total, axis=1)
        if READOUT == "l2":
            value = tl.sqrt_rn(value)
        value = value * tl.load(scale_ptr).to(tl.float32)
        tl.store(b_ptr + offset + tokens, value, mask=live)

    @triton.jit
    def _softmax_and_sum(  # type: ignore[no-untyped-def]
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
        judgement_ptr = judgements_ptr + j * 7
        offset = tl.load(judgement_ptr).to(tl.int64)
        count = tl.load(judgement_ptr + 1)
        component = tl.load(judgement_ptr + 3)
        _softmax(
            b_ptr + offset, alpha_ptr + offset, count, tl.load(numbers_ptr + J),
            STANDARDISE, BLOCK_S,
        )  # fmt: skip
        tl.debug_barrier()
        done = tl.atomic_add(counters_ptr + J + component, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
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
    def _softmax(  # type: ignore[no-untyped-def]
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
class _Tables:
    tiles: torch.Tensor  # [n, 2] (judgement, tile index)
    judgements: torch.Tensor  # [J, 7], see _tables
    components: torch.Tensor  # [C, 4] (first in order, number, first token, token behind the last)
    order: torch.Tensor  # judgements by component, ascending within one
    counters: torch.Tensor  # [J + C]
    numbers: torch.Tensor  # [J + 1 + J] float64: weights, temperature, scales


def _tables(
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
) -> _Tables:
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
    return _Tables(*placed)


def softmax_rewards(
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    temperature: float,
    standardise: bool,
    *,
    config: AttributionConfig = CONFIG,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`alpha_j = softmax(b_j / temperature)`, `rewards[start_j : start_j + T_j] += w_j alpha_j`.

    Args:
        scores: [total] float64 or float32, contiguous; b = scores.split(lengths).
        lengths, weights, starts: J each; segments may overlap in any way.
        count: number of rewards.
        temperature, standardise: with standardise b is divided by its population std first; a
            spread <= 1e-6 * max|b| counts as zeros.
        config: launch configuration.

    Returns:
        alpha [total] and rewards [count], float64; rewards are summed in the order of j.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, dtypes or devices other than these.
    """
    require_triton(triton, "attribution")
    check_vector("scores", scores, (torch.float64, torch.float32), scores)
    _check_segments(lengths, weights, starts, count)
    if sum(lengths) != len(scores):
        raise InputError("lengths do not add up", expected=f"{len(scores)}", got=sum(lengths))
    tables = _tables(lengths, weights, starts, temperature, scores.device, block_t=None)
    alpha = torch.empty(len(scores), dtype=torch.float64, device=scores.device)
    rewards = torch.zeros(count, dtype=torch.float64, device=scores.device)
    _launch(tables, scores, alpha, rewards, scores, scores, scores, (0, 0, 0), "given", standardise,
            len(lengths), config)  # fmt: skip
    return alpha, rewards


def attribution(
    grads: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    first_rows: Sequence[int],
    strides: Sequence[int],
    temperature: float,
    standardise: bool,
    embed: torch.Tensor | None = None,
    row_map: torch.Tensor | None = None,
    *,
    readout: str = "dot",
    scales: Sequence[float] | None = None,
    config: AttributionConfig = CONFIG,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`softmax_rewards` of `b_j = (grads[rows_j] * embed[row_map[tokens_j]]).sum(-1) * scale_j`.

    Args:
        grads: [R, H] float32, float16 or bfloat16; row first_rows[j] + t * strides[j] belongs to
            token t of judgement j.
        lengths, weights, starts, count, temperature, standardise: as in softmax_rewards.
        embed: [F, H] embedding rows, any of the dtypes; "dot" only.
        row_map: [count] int64 or int32, the row of embed of each token that can earn; "dot" only.
        readout: "dot", "l1" or "l2", the norms of the gradient.
        scales: J numbers that multiply b; 1 by default.
        config: launch configuration.

    Returns:
        b [total] float32, alpha [total] and rewards [count] float64.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, strides, dtypes or devices other than these.
    """
    require_triton(triton, "attribution")
    if readout not in READOUTS:
        raise InputError("unknown readout", expected=" | ".join(READOUTS), got=repr(readout))
    check_rows("grads", grads, grads)
    _check_segments(lengths, weights, starts, count)
    J = len(lengths)
    for name, given in (("first_rows", first_rows), ("strides", strides), ("scales", scales)):
        if given is not None and len(given) != J:
            raise InputError(
                f"{name} has another number of entries", expected=str(J), got=len(given)
            )
    spans = zip(first_rows, strides, lengths, strict=True)
    for j, (first, stride, length) in enumerate(spans):
        if length and (first < 0 or stride < 0 or first + (length - 1) * stride >= len(grads)):
            raise InputError("a judgement reads rows that grads does not have",
                             expected=f"rows below {len(grads)}", index=j)  # fmt: skip
    if readout != "dot":
        embed = row_map = grads  # pointers that the kernel then never reads
    elif embed is None or row_map is None:
        raise InputTypeError('readout="dot" needs embed and row_map', got="None")
    else:
        check_rows("embed", embed, grads)
        if embed.shape[1] != grads.shape[1]:
            raise InputError("grads and embed differ in width", expected=str(grads.shape[1]),
                             got=embed.shape[1])  # fmt: skip
        check_vector("row_map", row_map, (torch.int64, torch.int32), row_map)
        if len(row_map) != count or row_map.device != grads.device:
            raise InputError("row_map must have one entry per reward, on the device of grads",
                             expected=f"{count} on {grads.device}",
                             got=f"{len(row_map)} on {row_map.device}")  # fmt: skip
    tables = _tables(
        lengths, weights, starts, temperature, grads.device, block_t=config.block_t,
        first_rows=first_rows, strides=strides, scales=scales,
    )  # fmt: skip
    total = sum(lengths)
    b = torch.empty(total, dtype=torch.float32, device=grads.device)
    alpha = torch.empty(total, dtype=torch.float64, device=grads.device)
    rewards = torch.zeros(count, dtype=torch.float64, device=grads.device)
    sizes = (grads.stride(0), embed.stride(0), grads.shape[1])
    _launch(tables, b, alpha, rewards, grads, embed, row_map, sizes, readout, standardise, J,
            config)  # fmt: skip
    return b, alpha, rewards


def _launch(
    tables: _Tables,
    b: torch.Tensor,
    alpha: torch.Tensor,
    rewards: torch.Tensor,
    grads: torch.Tensor,
    embed: torch.Tensor,
    row_map: torch.Tensor,
    sizes: tuple[int, int, int],
    readout: str,
    standardise: bool,
    judgements: int,
    config: AttributionConfig,
) -> None:
    if not len(tables.tiles):
        return
    _attribution_kernel[(len(tables.tiles),)](
        b,
        alpha,
        rewards,
        grads,
        embed,
        row_map,
        tables.numbers,
        tables.tiles,
        tables.judgements,
        tables.components,
        tables.order,
        tables.counters,
        *sizes,
        judgements,
        READOUT=readout,
        STANDARDISE=standardise,
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        BLOCK_S=config.block_s,
        **config.options(),
    )


def _check_segments(
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
    """Every shipped specialisation: gradients float32; embeddings of any dtype for "dot"."""
    forms = [("given", "fp64"), ("l1", "fp32"), ("l2", "fp32")]
    forms += [("dot", dtype) for dtype in TRITON_DTYPES.values()]
    return [
        CompileCase(
            name=f"attribution {readout} {dtype}{' auto' if standardise else ''}"
            f"{' aligned' if aligned else ''}",
            kernel=_attribution_kernel,
            signature={
                "b_ptr": "*fp64" if readout == "given" else "*fp32",
                "alpha_ptr": "*fp64",
                "rewards_ptr": "*fp64",
                "grads_ptr": "*fp64" if readout == "given" else "*fp32",
                "embed_ptr": f"*{dtype}",
                "row_map_ptr": "*fp64" if readout == "given" else "*i64",
                "numbers_ptr": "*fp64",
                "tiles_ptr": "*i32",
                "judgements_ptr": "*i32",
                "components_ptr": "*i32",
                "order_ptr": "*i32",
                "counters_ptr": "*i32",
                "grads_stride": "i32",
                "embed_stride": "i32",
                "H": "i32",
                "J": "i32",
            },
            constants={
                "READOUT": readout,
                "STANDARDISE": standardise,
                "BLOCK_T": CONFIG.block_t,
                "BLOCK_H": CONFIG.block_h,
                "BLOCK_S": CONFIG.block_s,
            },
            options=CONFIG.options(),
            aligned=aligned,
        )
        for readout, dtype in forms
        for standardise in (False, True)
        for aligned in (True, False)
    ]
