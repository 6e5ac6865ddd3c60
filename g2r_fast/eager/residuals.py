"""What a softmax leaves of the words that were drawn, summed over the rows of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    """See `ops.residual_sums`; float32 or float64, throughout."""
    least, most = torch.aminmax(logits, dim=-1)
    finite = least.isfinite() & most.isfinite()
    gaps = (most[:, None] - logits).div_(temperature)
    gaps.clamp_(max=torch.finfo(gaps.dtype).max)  # a share of 0 times infinity would be NaN
    at = targets[:, None]
    gap = gaps.gather(1, at)[:, 0]
    shares = torch.exp(-gaps)
    # A largest word has a share of 1; all others together `rest`, which keeps its digits.
    tops = gaps == 0
    moment = gaps.mul_(shares).sum(-1)
    rest = shares.masked_fill(tops, 0).sum(-1).add_(tops.sum(-1) - 1)
    log_total = torch.log1p(rest)
    missing = rest.new_tensor(torch.nan)
    logps = torch.where(finite, -(gap + log_total), missing)
    entropies = torch.where(finite, log_total + moment / (1 + rest), missing)
    # 1 - p of the target, from what the others have.
    drawn = shares.gather(1, at)[:, 0]
    others = torch.where(tops.gather(1, at)[:, 0], rest, (1 - drawn) + rest)
    shares.scatter_(1, at, -others[:, None])
    factors = torch.where(finite, -weights / (1 + rest), missing)
    stretches = zip(factors.split(list(lengths)), shares.split(list(lengths)), strict=True)
    for owner, (factor, share) in zip(owners, stretches, strict=True):
        sums[owner] += factor @ share
    return logps, entropies
