"""G2RL (arXiv 2512.15687) with loops, token by token and pair by pair, straight from the equations.

The log-likelihood's gradient at the LM head's input has a factor 1 / temperature, which the paper
leaves out of the feature, and so do we.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from g2r_fast.errors import InputError
from g2r_fast.reference.decoder import ReferenceDecoder
from g2r_fast.reference.spread import ZERO_SPREAD

__all__ = [
    "G2RL_VARIANTS",
    "bounded_novelty",
    "cosine_similarities",
    "gradient_feature",
    "response_novelty",
    "shaped_rewards",
    "token_distributions",
    "token_feature",
]

G2RL_VARIANTS = ("equation", "prose")


def token_distributions(
    decoder: ReferenceDecoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    temperature: float = 1.0,
) -> Tensor:
    """`log_softmax(logits / temperature)` where the completion's tokens are predicted, `[T, V]`."""
    ids = [*prompt_ids, *completion_ids]
    logits = decoder.logits(decoder.embed(ids), position=None)
    first = len(prompt_ids) - 1
    return (logits[first : first + len(completion_ids)] / temperature).log_softmax(-1)


def token_feature(weight: Tensor, logps: Tensor, token: int) -> Tensor:
    """Eqs. 7, 14: `phi = W[y] - sum_v p(v) W[v]` `[H]`, from W `[V, H]` and log p `[V]`."""
    expected = torch.einsum("v,vh->h", logps.exp(), weight)
    return weight[token] - expected


def gradient_feature(
    decoder: ReferenceDecoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    token_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8: `Phi = sum_t alpha_t phi_t / sum_t alpha_t` `[H]`, token log-probabilities, entropies.

    All float64, in nats; zeros and nothing for an empty completion.
    """
    weight = decoder.weights["head.weight"]
    count = len(completion_ids)
    alphas = [1.0] * count if token_weights is None else [float(a) for a in token_weights]
    if len(alphas) != count:
        raise InputError(
            "token_weights and completion differ in length", expected=str(count), got=len(alphas)
        )
    feature = torch.zeros_like(weight[0])
    if not count:
        return feature, feature.new_zeros(0), feature.new_zeros(0)
    rows = token_distributions(decoder, prompt_ids, completion_ids, temperature)
    logps, entropies = [], []
    for alpha, row, token in zip(alphas, rows, completion_ids, strict=True):
        feature = feature + alpha / math.fsum(alphas) * token_feature(weight, row, token)
        logps.append(row[token])
        entropies.append(-(row.exp() * row).sum())
    return feature, torch.stack(logps), torch.stack(entropies)


def cosine_similarities(features: Sequence[Tensor]) -> list[list[float]]:
    """Eq. 9: `S[i][j] = cos(Phi_i, Phi_j)`; 0 where one of them is zero."""
    return [[_cosine(a.double(), b.double()) for b in features] for a in features]


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm()) * float(b.norm())
    return float(a @ b) / size if size > 0.0 else 0.0


def response_novelty(features: Sequence[Tensor], rewards: Sequence[float]) -> list[float]:
    """Eqs. 10, 11 for one group: `nu_i = max(1 - sum_{j != i} w_ij S_ij^2, 0)`, `w_ij ~ exp(r_j)`.

    The weights of a response add up to 1 over the others. Alone, it has nothing to be like: 1.
    """
    S = cosine_similarities(features)
    found = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        # The largest of the others taken away: exp of a large reward has no float64.
        most = max((rewards[j] for j in others), default=0.0)
        shares = [math.exp(rewards[j] - most) for j in others]
        total = math.fsum(shares)
        like = math.fsum(w / total * S[i][j] ** 2 for w, j in zip(shares, others, strict=True))
        found.append(max(1.0 - like, 0.0))
    return found


def bounded_novelty(novelties: Sequence[float]) -> list[float]:
    """`(nu - min) / (max - min)` in one group; 0 where there is no spread."""
    least, most = min(novelties), max(novelties)
    if most - least <= ZERO_SPREAD * max(abs(least), abs(most)):
        return [0.0] * len(novelties)
    return [(nu - least) / (most - least) for nu in novelties]


def shaped_rewards(
    features: Sequence[Tensor],
    rewards: Sequence[float],
    lam: float = 1.0,
    variant: str = "equation",
    clip: float = 3.0,
) -> list[float]:
    """Eqs. 12, 13 for one group: `clip(r (1 + lam r nu_bar), -clip, clip)`.

    `"prose"`: `clip(r (1 + lam nu_bar), -clip, clip)`, as the paper's text has it.
    """
    if variant not in G2RL_VARIANTS:
        raise InputError("unknown variant", expected=" or ".join(G2RL_VARIANTS), got=repr(variant))
    found = []
    for r, nu in zip(rewards, bounded_novelty(response_novelty(features, rewards)), strict=True):
        shaped = r * (1.0 + lam * (r if variant == "equation" else 1.0) * nu)
        found.append(min(max(shaped, -clip), clip))
    return found
