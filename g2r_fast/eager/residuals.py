"""What a softmax leaves of the words that were drawn, summed over the rows of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

__all__ = ["residual_sums"]

_CPU_ELEMENTS = 2**18  # of the logits that are worked on: they stay in the cache in between


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
    logps, entropies = logits.new_empty(2, len(logits))
    for owner, at in _pieces(logits, lengths, owners):
        logps[at], entropies[at] = _add(
            logits[at], targets[at], weights[at], sums[owner], temperature
        )
    return logps, entropies


def _pieces(
    logits: torch.Tensor, lengths: Sequence[int], owners: Sequence[int]
) -> Iterator[tuple[int, slice]]:
    """Rows of one owner, few enough for the cache."""
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _CPU_ELEMENTS // max(1, logits.shape[1]))
    start = 0
    for length, owner in zip(lengths, owners, strict=True):
        stop = start + length
        while start < stop:
            yield owner, slice(start, min(start + step, stop))
            start = min(start + step, stop)


def _add(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    # 1 - p of the target, from what the others have.
    drawn = shares.gather(1, at)[:, 0]
    others = torch.where(tops.gather(1, at)[:, 0], rest, (1 - drawn) + rest)
    shares.scatter_(1, at, -others[:, None])
    total += torch.where(finite, -weights / (1 + rest), missing) @ shares
    return (
        torch.where(finite, -(gap + log_total), missing),
        torch.where(finite, log_total + moment / (1 + rest), missing),
    )
