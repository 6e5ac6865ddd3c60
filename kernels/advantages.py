"""Token advantages of ragged groups: returns-to-go, group statistics and z-scores in one launch.

    R = r.flip(-1).cumsum(-1).flip(-1); A = (R - R[group].mean()) / R[group].std(correction=0)

Equation 9 of arXiv 2602.01791 and the other estimators of g2r_fast.advantages, which has their
formulas. Cost: rewards are read three times, from the cache after the first, and 4 bytes a token
are written; everything in between is float64 and lives in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.launching import CompileCase, check_vector, require_triton

from g2r_fast.errors import InputError, InputTypeError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; advantages() then says so
    triton = None

__all__ = ["CONFIG", "ESTIMATORS", "advantages", "compile_cases"]

ESTIMATORS = ("returns_pooled", "rewards_pooled", "normalise_then_cumsum", "scaled_sequence")


CONFIG = LAUNCHES["advantages"]

if triton is not None:

    @triton.jit
    def _advantages_kernel(  # type: ignore[no-untyped-def]
        rewards_ptr,
        keep_ptr,
        scores_ptr,
        shares_ptr,
        offsets_ptr,
        out_ptr,
        flat_ptr,
        mixed_ptr,
        group_size,
        ESTIMATOR: tl.constexpr,
        DIVIDE: tl.constexpr,
        MASKED: tl.constexpr,
        SHARES: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        group = tl.program_id(0)
        first = group.to(tl.int64) * group_size
        if ESTIMATOR == "scaled_sequence":
            _scaled_sequence(
                rewards_ptr, keep_ptr, scores_ptr, shares_ptr, offsets_ptr, out_ptr,
                flat_ptr + group, mixed_ptr, first, group_size, DIVIDE, MASKED, SHARES, BLOCK_T,
            )  # fmt: skip
        else:
            _pooled(
                rewards_ptr, keep_ptr, offsets_ptr, out_ptr, flat_ptr + group, first, group_size,
                ESTIMATOR, DIVIDE, MASKED, BLOCK_T,
            )  # fmt: skip

    @triton.jit
    def _read(  # type: ignore[no-untyped-def]
        rewards_ptr, keep_ptr, length, back, MASKED: tl.constexpr, BLOCK_T: tl.constexpr
    ):
        """Tokens from the end, so that sums over what follows are sums over what came before."""
        tokens = length - 1 - back - tl.arange(0, BLOCK_T)
        live = tokens >= 0
        kept = live
        if MASKED:
            kept = live & (tl.load(keep_ptr + tokens, mask=live, other=0) != 0)
        rewards = tl.load(rewards_ptr + tokens, mask=kept, other=0.0).to(tl.float64)
        return tokens, live, kept, rewards

    @triton.jit
    def _reciprocal(x):  # type: ignore[no-untyped-def]
        """1 / x of a float64 x > 0, exact for powers of two.

        A division and a square root of float64 are subroutines; the inverse square root is none.
        """
        root = tl.rsqrt(x)
        near = root * root
        return near + near * (1.0 - x * near)

    @triton.jit
    def _spread(square, size, peak, DIVIDE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Whether values have no spread, and what brings centred ones to spread one."""
        variance = square * _reciprocal(size)
        none = variance == 0.0
        root = tl.rsqrt(tl.where(none, 1.0, variance))
        flat = none | (variance * root <= 1e-6 * peak)
        if DIVIDE:
            scale = tl.where(flat, 0.0, root)
        else:
            scale = tl.where(flat, 0.0, peak * 0.0 + 1.0)
        return flat, scale

    @triton.jit
    def _pooled(  # type: ignore[no-untyped-def]
        rewards_ptr,
        keep_ptr,
        offsets_ptr,
        out_ptr,
        flat_ptr,
        first,
        group_size,
        ESTIMATOR: tl.constexpr,
        DIVIDE: tl.constexpr,
        MASKED: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        RETURNS: tl.constexpr = ESTIMATOR == "returns_pooled"
        total = tl.zeros([BLOCK_T], dtype=tl.float64)
        size = tl.zeros([BLOCK_T], dtype=tl.int32)
        peak = tl.zeros([BLOCK_T], dtype=tl.float64)
        for i in range(group_size):
            start = tl.load(offsets_ptr + first + i)
            length = (tl.load(offsets_ptr + first + i + 1) - start).to(tl.int32)
            behind = tl.full([], 0.0, dtype=tl.float64)
            for back in range(0, length, BLOCK_T):
                _, _, kept, values = _read(
                    rewards_ptr + start, keep_ptr + start, length, back, MASKED, BLOCK_T
                )
                if RETURNS:
                    here = tl.sum(values, axis=0)
                    values = tl.cumsum(values, axis=0) + behind
                    behind += here
                values = tl.where(kept, values, 0.0)
                total += values
                size += kept.to(tl.int32)
                peak = tl.maximum(peak, tl.abs(values))
        count = tl.maximum(tl.sum(size, axis=0), 1).to(tl.float64)
        mean = tl.sum(total, axis=0) * _reciprocal(count)
        square = tl.zeros([BLOCK_T], dtype=tl.float64)
        for i in range(group_size):
            start = tl.load(offsets_ptr + first + i)
            length = (tl.load(offsets_ptr + first + i + 1) - start).to(tl.int32)
            behind = tl.full([], 0.0, dtype=tl.float64)
            for back in range(0, length, BLOCK_T):
                _, _, kept, values = _read(
                    rewards_ptr + start, keep_ptr + start, length, back, MASKED, BLOCK_T
                )
                if RETURNS:
                    here = tl.sum(values, axis=0)
                    values = tl.cumsum(values, axis=0) + behind
                    behind += here
                values = tl.where(kept, values - mean, 0.0)
                square += values * values
        flat, scale = _spread(tl.sum(square, axis=0), count, tl.max(peak, axis=0), DIVIDE)
        tl.store(flat_ptr, flat.to(tl.int32))
        for i in range(group_size):
            start = tl.load(offsets_ptr + first + i)
            length = (tl.load(offsets_ptr + first + i + 1) - start).to(tl.int32)
            behind = tl.full([], 0.0, dtype=tl.float64)
            for back in range(0, length, BLOCK_T):
                tokens, live, kept, values = _read(
                    rewards_ptr + start, keep_ptr + start, length, back, MASKED, BLOCK_T
                )
                if RETURNS:
                    here = tl.sum(values, axis=0)
                    values = tl.cumsum(values, axis=0) + behind
                    behind += here
                values = tl.where(kept, (values - mean) * scale, 0.0)
                if ESTIMATOR == "normalise_then_cumsum":
                    here = tl.sum(values, axis=0)
                    values = tl.where(kept, tl.cumsum(values, axis=0) + behind, 0.0)
                    behind += here
                tl.store(out_ptr + start + tokens, values.to(tl.float32), mask=live)

    @triton.jit
    def _scaled_sequence(  # type: ignore[no-untyped-def]
        rewards_ptr,
        keep_ptr,
        scores_ptr,
        shares_ptr,
        offsets_ptr,
        out_ptr,
        flat_ptr,
        mixed_ptr,
        first,
        group_size,
        DIVIDE: tl.constexpr,
        MASKED: tl.constexpr,
        SHARES: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        total = tl.full([], 0.0, dtype=tl.float64)
        peak = tl.full([], 0.0, dtype=tl.float64)
        for i in range(group_size):
            score = tl.load(scores_ptr + first + i)
            total += score
            peak = tl.maximum(peak, tl.abs(score))
        size = tl.full([], 0.0, dtype=tl.float64) + group_size  # a group of one is a constant here
        mean = total * _reciprocal(size)
        square = tl.full([], 0.0, dtype=tl.float64)
        for i in range(group_size):
            centred = tl.load(scores_ptr + first + i) - mean
            square += centred * centred
        flat, scale = _spread(square, size, peak, DIVIDE)
        tl.store(flat_ptr, flat.to(tl.int32))
        for i in range(group_size):
            start = tl.load(offsets_ptr + first + i)
            length = (tl.load(offsets_ptr + first + i + 1) - start).to(tl.int32)
            advantage = (tl.load(scores_ptr + first + i) - mean) * scale
            sizes = tl.zeros([BLOCK_T], dtype=tl.int32)
            positive = tl.zeros([BLOCK_T], dtype=tl.float64)
            negative = tl.zeros([BLOCK_T], dtype=tl.float64)
            for back in range(0, length, BLOCK_T):
                _, _, kept, values = _read(
                    rewards_ptr + start, keep_ptr + start, length, back, MASKED, BLOCK_T
                )
                sizes += kept.to(tl.int32)
                positive += tl.maximum(values, 0.0)
                negative += tl.maximum(-values, 0.0)
            count = tl.sum(sizes, axis=0).to(tl.float64)
            gain = tl.sum(positive, axis=0)
            loss = tl.sum(negative, axis=0)
            tl.store(mixed_ptr + first + i, ((gain > 0.0) & (loss > 0.0)).to(tl.int32))
            whole = gain + loss
            per_reward = _reciprocal(tl.where(whole == 0.0, tl.maximum(count, 1.0), whole))
            for back in range(0, length, BLOCK_T):
                tokens, live, kept, values = _read(
                    rewards_ptr + start, keep_ptr + start, length, back, MASKED, BLOCK_T
                )
                if SHARES:
                    shares = tl.load(shares_ptr + start + tokens, mask=kept, other=0.0).to(
                        tl.float64
                    )
                else:
                    shares = tl.where(whole == 0.0, 1.0, tl.abs(values)) * per_reward
                values = tl.where(kept, advantage * count * shares, 0.0)
                tl.store(out_ptr + start + tokens, values.to(tl.float32), mask=live)


def advantages(
    rewards: torch.Tensor,
    lengths: Sequence[int],
    group_size: int,
    *,
    estimator: str = "returns_pooled",
    divide_by_std: bool = True,
    scores: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`A = (R - R[group].mean()) / R[group].std(correction=0)`, and the other estimators.

    Args:
        rewards: [M] float64 or float32, contiguous and finite: rewards.split(lengths) are the
            sequences, and every `group_size` of them are a group.
        lengths: N, a multiple of group_size.
        estimator: one of ESTIMATORS; see `g2r_fast.advantages.token_advantages`.
        divide_by_std: False subtracts the mean only.
        scores: [N] float64, "scaled_sequence" only.
        shares: [M] float64 or float32, "scaled_sequence" only: the mean attributions; without them
            they are derived from the rewards.
        keep: [M] bool; tokens that are False take no part and get 0.

    Returns:
        advantages [M] float32; the groups without spread [N / group_size] int32, 1 where there is
        none; the sequences [N] int32 whose rewards have both signs where shares had to be derived.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: shapes, dtypes or devices other than these.
    """
    require_triton(triton, "advantages")
    if estimator not in ESTIMATORS:
        raise InputError("unknown estimator", expected=" | ".join(ESTIMATORS), got=repr(estimator))
    check_vector("rewards", rewards, (torch.float64, torch.float32), rewards)
    N = len(lengths)
    fits = sum(lengths) == len(rewards) and min(lengths, default=0) >= 0
    if group_size < 1 or N % group_size or not fits:
        raise InputError(
            "the lengths do not fit",
            expected=f"a multiple of group_size of them, {len(rewards)} tokens in all",
            got=f"{N} of group_size {group_size}, {sum(lengths)} tokens",
        )
    scaled = estimator == "scaled_sequence"
    if scaled:
        if scores is None:
            raise InputTypeError('estimator "scaled_sequence" needs scores', got="None")
        check_vector("scores", scores, (torch.float64,), scores)
        if scores.shape != (N,) or scores.device != rewards.device:
            raise InputError("scores must have one entry per sequence, on the device of rewards",
                             expected=f"{N} on {rewards.device}",
                             got=f"{tuple(scores.shape)} on {scores.device}")  # fmt: skip
    if shares is not None:
        check_vector("shares", shares, (torch.float64, torch.float32), rewards)
    if keep is not None:
        check_vector("keep", keep, (torch.bool,), rewards)
    device = rewards.device
    out = torch.empty(len(rewards), dtype=torch.float32, device=device)
    flat = torch.empty(N // group_size, dtype=torch.int32, device=device)
    mixed = torch.zeros(N, dtype=torch.int32, device=device)
    if N:
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64).to(device)
        _advantages_kernel[(N // group_size,)](
            rewards,
            rewards if keep is None else keep.view(torch.uint8),
            rewards if scores is None else scores,
            rewards if shares is None else shares,
            offsets,
            out,
            flat,
            mixed,
            group_size,
            ESTIMATOR=estimator,
            DIVIDE=divide_by_std,
            MASKED=keep is not None,
            SHARES=shares is not None,
            **CONFIG.blocks,
            **CONFIG.options(),
        )
    return out, flat, mixed


def compile_cases() -> list[CompileCase]:
    """Every shipped specialisation; the engine hands float64 rewards, scores and shares."""
    forms = [(name, False) for name in ESTIMATORS] + [("scaled_sequence", True)]
    return [
        CompileCase(
            name=f"advantages {estimator}{' shares' if shares else ''}"
            f"{'' if divide else ' undivided'}{' masked' if masked else ''}",
            kernel=_advantages_kernel,
            signature={
                "rewards_ptr": "*fp64",
                "keep_ptr": "*u8" if masked else "*fp64",
                "scores_ptr": "*fp64",
                "shares_ptr": "*fp64",
                "offsets_ptr": "*i64",
                "out_ptr": "*fp32",
                "flat_ptr": "*i32",
                "mixed_ptr": "*i32",
                "group_size": "i32",
            },
            constants={
                "ESTIMATOR": estimator,
                "DIVIDE": divide,
                "MASKED": masked,
                "SHARES": shares,
                **CONFIG.blocks,
            },
            options=CONFIG.options(),
            aligned=False,
        )
        for estimator, shares in forms
        for divide in (True, False)
        for masked in (False, True)
    ]
