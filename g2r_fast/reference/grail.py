"""GRAIL (arXiv 2606.04889) step by step, one sequence at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from g2r_fast.reference.decoder import ReferenceDecoder
from g2r_fast.reference.grad2reward import objective_value

__all__ = ["answer_nll", "answer_saliency", "answer_weights"]


def answer_nll(
    decoder: ReferenceDecoder,
    states: Tensor,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    span: tuple[int, int],
    *,
    leaf: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """``-Σ_{t in span} log_softmax(logits[t - 1] / temperature)[o_t]``, a scalar in nats.

    ``states`` ``[P + T, H]`` is hidden state ``leaf`` of prompt and completion, 0 for the
    embeddings; the layers from there on are run. ``span`` counts completion tokens.
    """
    for layer in range(leaf, decoder.num_layers):
        states = decoder.layer(layer, states)
    logits = decoder.linear(decoder.rms_norm(states, "norm"), "head") / temperature
    terms = [
        -objective_value(logits[len(prompt_ids) + t - 1], completion_ids[t]) for t in range(*span)
    ]
    return torch.stack(terms).sum()


def answer_saliency(
    decoder: ReferenceDecoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    span: tuple[int, int],
    *,
    leaf: int = 0,
    shift: int = 1,
    temperature: float = 1.0,
) -> Tensor:
    """``s_t = ‖(∂L / ∂E_p) ⊙ E_p‖₂`` at ``p = t - shift`` → ``[T]``.

    E is hidden state ``leaf`` and L :func:`answer_nll`. The whole completion is run, so what lies
    behind the span is zero because nothing of L depends on it, not because it was left out.
    """
    with torch.no_grad():
        embeds = decoder.embed([*prompt_ids, *completion_ids])
        states = decoder.hidden_states(embeds)[leaf]
    states = states.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = answer_nll(
            decoder, states, prompt_ids, completion_ids, span, leaf=leaf, temperature=temperature
        )
        (grads,) = torch.autograd.grad(loss, states)
    norms = (grads * states.detach()).square().sum(dim=-1).sqrt()
    first = len(prompt_ids) - shift
    return norms[first : first + len(completion_ids)]


def answer_weights(
    saliency: Tensor | Sequence[float],
    span: tuple[int, int] | None,
    content: tuple[int, int] | None = None,
    advantage: float = 0.0,
    *,
    polarity: str = "wrong",
    overrides: bool = True,
    after_span: str = "included",
) -> list[float]:
    """``clamp(1 + 0.5 · zscore(log(s + 1e-8)), 0.5, 5)``, fallback, overrides → T numbers.

    - ``polarity``: ``"correct"`` leaves rows with A <= 0 at 1, ``"wrong"`` those with A > 0,
      ``"both"`` none. ``span=None`` leaves all at 1.
    - ``overrides``, after all of that: content 5; marker, closing and everything behind 1.
    - ``after_span="excluded"``: mean and std end with the span, and what is behind is 1.
    """
    s = [float(value) for value in saliency]
    if span is None:
        return [1.0] * len(s)
    start, stop = span
    idle = (polarity == "correct" and advantage <= 0) or (polarity == "wrong" and advantage > 0)
    if idle:
        weights = [1.0] * len(s)
    else:
        count = len(s) if after_span == "included" else stop
        u = [math.log(value + 1e-8) for value in s[:count]]
        mean = math.fsum(u) / count
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in u) / count + 1e-8)
        weights = [min(max(1.0 + 0.5 * (value - mean) / std, 0.5), 5.0) for value in u]
        weights += [1.0] * (len(s) - count)
    if overrides:
        content_start, content_stop = span if content is None else content
        for t in range(start, len(s)):
            weights[t] = 5.0 if content_start <= t < content_stop else 1.0
    return weights
