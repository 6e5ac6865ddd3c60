"""The clipped objective of GRPO with one advantage per token, and its log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ObjectiveParts", "kl_estimate", "policy_loss", "token_logps"]


@dataclass(frozen=True)
class ObjectiveParts:
    """What `policy_loss` makes of a batch. loss carries the graph; the others do not."""

    loss: Tensor  # []
    clipped: Tensor  # [B, T] bool: tokens that send nothing back, being clipped
    ratio: Tensor  # [B, T]
    kl: Tensor | None  # [B, T], nats


def token_logps(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """`log_softmax(logits / temperature, -1).gather(-1, token_ids[..., None])[..., 0]`, in nats.

    logits: `[..., V]`; token_ids `[...]`. Returns `[...]` float32, whatever the logits' dtype.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, token_ids[..., None])[..., 0]
    return chosen - scaled.logsumexp(-1)


def kl_estimate(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """`exp(ref - logp) - (ref - logp) - 1`: unbiased and never negative (arXiv 2402.03300, Eq. 4).

    Of KL(policy || reference), per token `[B, T]`, in nats.
    """
    difference = reference_logps - logps
    return difference.exp() - difference - 1


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss: str = "sequence_mean",
    normalizer: float | Tensor | None = None,
    reference_logps: Tensor | None = None,
    kl: float = 0.0,
) -> ObjectiveParts:
    """`-torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)`, mean over tokens.

    arXiv 2602.01791, Eq. 10, rho = exp(logps - old_logps); with `kl` times `kl_estimate` added.

    Args:
        logps, old_logps, advantages, mask: `[B, T]`; mask is 1 at the response's tokens. Only logps
            carries a gradient.
        loss: `"sequence_mean"`, `mean_i mean_t` as in the equation; `"token_mean"`, over all tokens
            of the batch alike (long responses weigh more).
        normalizer: what the sum over sequences (or tokens) is divided by; None: their number here.
            A micro-batch passes that of its whole batch. A response without tokens counts as 0.
        reference_logps: `[B, T]`, for the KL term.

    Returns ObjectiveParts. What lies outside the mask may hold anything.
    """
    inside = mask > 0
    mask = inside.to(logps.dtype)
    # Before any exp: inf * 0 is NaN, in the loss or in its gradient.
    logps, old_logps, advantages = (
        torch.where(inside, values, 0.0) for values in (logps, old_logps, advantages)
    )
    ratio = (logps - old_logps).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    divergence = None
    if kl:
        if reference_logps is None:
            raise ValueError("a KL term needs reference_logps")
        divergence = kl_estimate(logps, torch.where(inside, reference_logps, 0.0))
        objective = objective - kl * divergence
    if loss == "sequence_mean":
        total = ((objective * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()
        count: float | Tensor = len(mask) if normalizer is None else normalizer
    else:
        total = (objective * mask).sum()
        count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    with torch.no_grad():
        clipped = (bounded * advantages < ratio * advantages) & inside
    return ObjectiveParts(
        -total / count, clipped, ratio.detach(), None if divergence is None else divergence.detach()
    )
