"""`ops.residual_sums` by the kernels of `kernels/`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from g2r_fast.kernels import residual_sums as kernel
from g2r_fast.kernels.log_probabilities import log_probabilities

__all__ = ["residual_sums"]


def residual_sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    lengths: Sequence[int],
    owners: Sequence[int],
    sums: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    stops = list(accumulate(lengths))
    starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
    table = torch.tensor([starts, stops, list(owners)], dtype=torch.int64).T.contiguous()
    with torch.cuda.device_of(logits):
        found = log_probabilities(
            logits, targets, temperature=temperature, entropy=True, objective="logp"
        )
        finite = found.finite.bool()
        # A row with NaN or infinity makes its sum NaN, also where its log-sum-exp is a number.
        kernel.residual_sums(
            logits,
            targets,
            torch.where(finite, weights, torch.nan),
            found.logsumexp.contiguous(),
            found.scale.contiguous(),
            table.to(logits.device, non_blocking=True),
            sums,
            temperature=temperature,
        )
    logps, entropies = (torch.where(finite, x, torch.nan) for x in (found.logp, found.entropy))
    return logps, entropies
