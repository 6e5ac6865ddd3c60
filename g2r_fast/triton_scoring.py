"""Scores, rewards, advantages and log-probabilities on an NVIDIA GPU, by the kernels of `kernels/`.

A machine without Triton can import this file and the kernels, which then say so when called.
Triton launches on the current device: every call here makes that of its tensors current.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from g2r_fast.kernels import objective_cotangents as cotangents
from g2r_fast.kernels.advantages import advantages
from g2r_fast.kernels.launching import TRITON_DTYPES
from g2r_fast.kernels.log_probabilities import RowStatistics, log_probabilities
from g2r_fast.kernels.softmax_rewards import softmax_rewards

from . import triton_device
from .backends import wanted_backend

__all__ = [
    "attribution_rewards",
    "objective_cotangents",
    "row_statistics",
    "serves",
    "serves_logits",
    "token_advantages",
    "token_logps",
]


def serves(device: torch.device) -> bool:
    """Whether these kernels run there: on a GPU, unless `G2R_BACKEND=reference`; on a CPU only
    under Triton's interpreter and with `G2R_BACKEND=triton`, for tests."""
    wanted = wanted_backend()
    if device.type == "cpu" and wanted != "triton":
        return False
    return wanted != "reference" and triton_device.problem_of(device, wanted) is None


def serves_logits(logits: torch.Tensor) -> bool:
    """The same for logits, which a float64 model has in float64."""
    return logits.dtype in TRITON_DTYPES and serves(logits.device)


def attribution_rewards(
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    temperature: float,
    standardise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.attribution_rewards`."""
    with torch.cuda.device_of(scores):
        return softmax_rewards(
            scores.contiguous(), lengths, weights, starts, count, temperature, standardise
        )


def token_advantages(
    rewards: torch.Tensor,
    lengths: Sequence[int],
    group_size: int,
    estimator: str,
    divide_by_std: bool,
    scores: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[M]` float32, groups without spread and sequences of mixed signs, int32 each; see
    `kernels.advantages.advantages`."""
    with torch.cuda.device_of(rewards):
        return advantages(
            rewards, lengths, group_size, estimator=estimator, divide_by_std=divide_by_std,
            scores=scores, shares=shares, keep=keep,
        )  # fmt: skip


def row_statistics(
    logits: torch.Tensor, target: torch.Tensor, other: torch.Tensor | None, objective: str
) -> RowStatistics:
    """Log-probabilities of two words, their margin and the scale of the objective's cotangent.

    logits `[n, V]`; target and other `[n]` int64.
    """
    with torch.cuda.device_of(logits):
        return log_probabilities(logits, target, other, objective=objective)


def objective_cotangents(
    logits: torch.Tensor,
    target: torch.Tensor,
    other: torch.Tensor | None,
    objective: str,
    statistics: RowStatistics,
    rows: Sequence[int],
) -> torch.Tensor:
    """The values of `grad2reward.objective_cotangents` for some rows of logits, float32."""
    at = torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True)
    with torch.cuda.device_of(logits):
        return cotangents.objective_cotangents(
            logits, target, statistics.against, at, other, objective=objective
        )


def token_logps(
    logits: torch.Tensor, rows: Sequence[int], ids: Sequence[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_softmax(logits[rows] / temperature)[ids]`, and 1 where a row is finite; float32 each."""
    both = torch.tensor([rows, ids], dtype=torch.int64).to(logits.device, non_blocking=True)
    with torch.cuda.device_of(logits):
        found = log_probabilities(logits, both[1], rows=both[0], temperature=temperature)
    return found.logp, found.finite
