"""Token-level advantages from token rewards, written with loops, straight from the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from g2r_fast.errors import InputError
from g2r_fast.reference.spread import standardise

__all__ = ["ESTIMATORS", "mean_attribution", "token_advantages"]

ESTIMATORS = ("returns_pooled", "rewards_pooled", "normalise_then_cumsum", "scaled_sequence")


def token_advantages(
    token_rewards: Sequence[Tensor],
    group_size: int,
    estimator: str = "returns_pooled",
    divide_by_std: bool = True,
    scores: Sequence[float] | Tensor | None = None,
    mean_attributions: Sequence[Tensor] | None = None,
) -> list[Tensor] | None:
    """``Â[i][t]`` for N rows, each ``group_size`` consecutive rows one group; None for groups of 1.

    ``token_rewards``: N tensors ``[T_i]``. Returns N float64 tensors ``[T_i]`` on the CPU. With
    ``r`` the rewards and mean and std taken over **all tokens of all responses of the group**
    (population std; no spread: zeros):

    - ``"returns_pooled"`` (arXiv 2602.01791, Eq. 9): ``R[i][t] = Σ_{s>=t} r[i][s]``, then
      ``(R - mean(R)) / std(R)``. Mind its position bias: with equal positive rewards and uniform
      attributions it runs from ``+√(3(T-1)/(T+1))`` at the first token to minus that at the last.
    - ``"rewards_pooled"``: ``(r - mean(r)) / std(r)``.
    - ``"normalise_then_cumsum"``: the same, then ``Σ_{s>=t}`` (process-supervised GRPO).
    - ``"scaled_sequence"``: ``A[i] * T_i * ᾱ[i][t]``; ``A`` the group's ``scores`` standardised,
      ``ᾱ`` as :func:`mean_attribution` gives it. Needs ``scores`` and ``mean_attributions``.

    ``divide_by_std=False`` only subtracts the mean. Raises InputError for lengths that do not
    agree, an unknown estimator and values that are not finite.
    """
    if estimator not in ESTIMATORS:
        raise InputError(
            "unknown advantage estimator", expected=" or ".join(ESTIMATORS), got=repr(estimator)
        )
    N = len(token_rewards)
    if group_size < 1 or N % group_size != 0:
        raise InputError(
            "the rows do not divide into groups",
            expected="group_size >= 1 and a multiple of group_size rows",
            got=f"{N} rows, group_size {group_size}",
        )
    for i, rewards in enumerate(token_rewards):
        for t, reward in enumerate(rewards.tolist()):
            if not math.isfinite(reward):
                raise InputError(
                    "a token reward is not finite",
                    expected="finite numbers",
                    got=reward,
                    index=(i, t),
                )
    if estimator == "scaled_sequence":
        if scores is None or mean_attributions is None:
            raise InputError("scaled_sequence needs scores and mean_attributions")
        lengths = [len(rewards) for rewards in token_rewards]
        if len(scores) != N or [len(alpha) for alpha in mean_attributions] != lengths:
            raise InputError(
                "scores and mean_attributions do not match the rewards",
                expected=f"{N} scores, mean attributions of lengths {lengths}",
                got=f"{len(scores)} scores, lengths {[len(alpha) for alpha in mean_attributions]}",
            )
    if group_size == 1:
        return None

    advantages: list[list[float]] = []
    for start in range(0, N, group_size):
        rows = slice(start, start + group_size)
        group = [rewards.tolist() for rewards in token_rewards[rows]]
        if estimator == "returns_pooled":
            advantages += _standardise_pooled([_returns(row) for row in group], divide_by_std)
        elif estimator == "rewards_pooled":
            advantages += _standardise_pooled(group, divide_by_std)
        elif estimator == "normalise_then_cumsum":
            advantages += [_returns(row) for row in _standardise_pooled(group, divide_by_std)]
        elif scores is not None and mean_attributions is not None:  # scaled_sequence
            sequence = standardise([float(score) for score in scores[rows]], divide_by_std)
            for advantage, alpha in zip(sequence, mean_attributions[rows], strict=True):
                advantages.append([advantage * len(alpha) * a for a in alpha.tolist()])
    return [torch.tensor(row, dtype=torch.float64) for row in advantages]


def mean_attribution(
    attributions: Sequence[Tensor | None],
    verdicts: Sequence[bool],
    weights: Sequence[float],
    num_tokens: int,
) -> Tensor:
    """``ᾱ[t] = Σ_k 1[z_k] |w_k| α[k][t] / Σ_k 1[z_k] |w_k|`` → ``[T]`` float64.

    One response: K attributions ``[T]`` (None where the verdict is False), K verdicts, K weights.
    ``1 / T`` where no item of non-zero weight is True.
    """
    total = math.fsum(abs(w) for w, z in zip(weights, verdicts, strict=True) if z)
    if total == 0.0:
        return torch.full((num_tokens,), 1.0 / max(num_tokens, 1), dtype=torch.float64)
    mean = torch.zeros(num_tokens, dtype=torch.float64)
    for alpha, verdict, weight in zip(attributions, verdicts, weights, strict=True):
        if verdict:
            if alpha is None:
                raise InputError("an item judged True has no attribution")
            mean = mean + abs(weight) / total * alpha.to(mean)
    return mean


def _returns(rewards: list[float]) -> list[float]:
    """``R[t] = Σ_{s>=t} r[s]``."""
    return [math.fsum(rewards[t:]) for t in range(len(rewards))]


def _standardise_pooled(rows: list[list[float]], divide_by_std: bool) -> list[list[float]]:
    """Standardise over all tokens of all rows, and give the rows back."""
    pooled = standardise([value for row in rows for value in row], divide_by_std)
    result, start = [], 0
    for row in rows:
        result.append(pooled[start : start + len(row)])
        start += len(row)
    return result
