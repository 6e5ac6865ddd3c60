"""VIGOR (arXiv 2605.09920) step by step, one sequence at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from g2r_fast.reference.decoder import ReferenceDecoder
from g2r_fast.reference.grad2reward import objective_value

__all__ = ["completion_gradients", "completion_nll", "gradient_norm", "rank_rewards"]

_TABLE, _HEAD = "embed_tokens.weight", "head.weight"


def completion_nll(
    decoder: ReferenceDecoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """``-(1 / T) Σ_t log_softmax(logits[P + t - 1])[o_t]``, a scalar in nats.

    The T tokens of the completion include its EOS. The row of ``padding_idx`` in the embeddings is
    a constant, as it is for ``torch.nn.Embedding``; in a head tied to them it is not.
    """
    ids = [*prompt_ids, *completion_ids]
    embeds = decoder.embed(ids)
    if padding_idx is not None:
        at = torch.tensor([i == padding_idx for i in ids], device=embeds.device)
        embeds = torch.where(at[:, None], embeds.detach(), embeds)
    logits = decoder.logits(embeds, None)
    terms = [
        objective_value(logits[len(prompt_ids) + t - 1], token)
        for t, token in enumerate(completion_ids)
    ]
    return -torch.stack(terms).mean()


def completion_gradients(
    decoder: ReferenceDecoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    *,
    padding_idx: int | None = None,
) -> dict[str, Tensor]:
    """``∂ℓ/∂θ`` of :func:`completion_nll` for every parameter, by the decoder's names.

    A head tied to the embeddings is one parameter with them, named ``embed_tokens.weight``, whose
    gradient is the sum of both parts.
    """
    tied = decoder.weights[_HEAD] is decoder.weights[_TABLE]
    leaves = {
        name: weight.detach().clone().requires_grad_(True)
        for name, weight in decoder.weights.items()
        if not (tied and name == _HEAD)
    }
    weights = {**leaves, _HEAD: leaves[_TABLE if tied else _HEAD]}
    with torch.enable_grad():
        loss = completion_nll(
            replace(decoder, weights=weights), prompt_ids, completion_ids, padding_idx=padding_idx
        )
        grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def gradient_norm(
    decoder: ReferenceDecoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    names: Collection[str] | None = None,
    *,
    padding_idx: int | None = None,
) -> float:
    """``‖∂ℓ/∂θ‖₂`` over the parameters in ``names``, ``None``: all; 0 for an empty completion.

    Each is squared and summed as a whole, gradient by gradient.
    """
    if not completion_ids:
        return 0.0
    grads = completion_gradients(decoder, prompt_ids, completion_ids, padding_idx=padding_idx)
    chosen = grads if names is None else names
    return math.sqrt(math.fsum(float(grads[name].square().sum()) for name in chosen))


def rank_rewards(norms: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """``R_i = 2 rank_i / (G - 1) - 1`` for the G completions of one prompt → G numbers.

    ``S_i = -√T_i · norm_i``; the lowest has rank 0, equal ones rank by their index, and a group of
    one gets 0. An empty completion, which has no gradient, counts as the lowest.
    """
    if len(norms) == 1:
        return [0.0]
    scores = [
        -math.sqrt(length) * norm if length else -math.inf
        for norm, length in zip(norms, lengths, strict=True)
    ]
    rewards = []
    for i, score in enumerate(scores):
        rank = sum(other < score or (other == score and j < i) for j, other in enumerate(scores))
        rewards.append(2.0 * rank / (len(scores) - 1) - 1.0)
    return rewards
