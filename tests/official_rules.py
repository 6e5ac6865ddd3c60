"""GRAIL, G2RL and VIGOR as the papers and their official code have them, transcribed by hand.

One sequence at a time, float64, as literal as can be; nothing here is g2r_fast's. Written from the
equations alone by somebody who had not seen the fast code, so that both would have to make the same
mistake for it to pass. What takes a model takes a stock transformers model and autograd, and is as
accurate as that model's dtype.

Sources: GRAIL arXiv 2606.04889 and its official code, quirks included; G2RL arXiv 2512.15687,
Eqs. 7-14; VIGOR arXiv 2605.09920 and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "g2rl_feature",
    "g2rl_novelty",
    "g2rl_reference_weights",
    "g2rl_shaped_rewards",
    "g2rl_similarities",
    "g2rl_token_features",
    "grail_saliency",
    "grail_weights",
    "vigor_norm",
    "vigor_rank_rewards",
]

# (start, content_start, content_stop, stop) in completion tokens: marker, content, closing brace.
AnswerSpan = tuple[int, int, int, int]


# GRAIL --------------------------------------------------------------------------------------------


def grail_saliency(
    model: Any,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    answer_span: AnswerSpan | None,
    leaf_index: int = 0,
    shift: int = 1,
    temperature: float = 1.0,
) -> Tensor | None:
    """`s_t = ||(dL/dE_p) * E_p||_2`, p = t - shift, L = -sum over the span of log pi(o_t).

    `[T]`, in the model's dtype or float32 if that is narrower; None without a span.
    `leaf_index` 0 is the input embeddings, i > 0 hidden state i.
    """
    if answer_span is None:
        return None
    start, _, _, stop = answer_span
    prompt, completion = list(prompt_ids), list(completion_ids)
    ids = torch.tensor([prompt + completion], device=model.device)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
    leaf = embeds if leaf_index == 0 else out.hidden_states[leaf_index]
    logits = out.logits[0]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    loss = logits.new_zeros(())
    for t in range(start, stop):
        predicting = logits[len(prompt) + t - 1] / temperature
        loss = loss - torch.log_softmax(predicting, -1)[completion[t]]
    (grad,) = torch.autograd.grad(loss, leaf)
    wide = torch.promote_types(leaf.dtype, torch.float32)
    product = grad[0].to(wide) * leaf[0].detach().to(wide)
    return torch.stack([product[len(prompt) + t - shift].norm() for t in range(len(completion))])


def grail_weights(
    saliency: Tensor | None,
    answer_span: AnswerSpan | None,
    advantage: float | None,
    polarity: str = "wrong",
    overrides: bool = True,
    after_span: str = "included",
    length: int | None = None,
) -> Tensor:
    """`[T]` float64. Without a span there is no saliency, and `length` says how many tokens.

    `after_span="excluded"`: the tokens after the span enter neither mean nor std, and weigh 1.
    """
    if answer_span is None or saliency is None:
        tokens = length if saliency is None else len(saliency)
        assert tokens is not None, "without a saliency, give the length"
        return torch.ones(tokens, dtype=torch.float64)
    start, content_start, content_stop, stop = answer_span
    tokens = len(saliency)
    counted = range(tokens) if after_span == "included" else range(stop)
    u = [math.log(float(s) + 1e-8) for s in saliency]
    mean = sum(u[t] for t in counted) / len(counted)
    variance = sum((u[t] - mean) ** 2 for t in counted) / len(counted)
    std = math.sqrt(variance + 1e-8)
    weights = [1.0] * tokens
    for t in counted:
        weights[t] = min(max(1.0 + 0.5 * (u[t] - mean) / std, 0.5), 5.0)

    assert polarity in ("both", "correct", "wrong")
    if polarity == "correct" and advantage is not None and advantage <= 0:
        weights = [1.0] * tokens
    if polarity == "wrong" and advantage is not None and advantage > 0:
        weights = [1.0] * tokens

    if overrides:
        for t in range(tokens):
            if content_start <= t < content_stop:
                weights[t] = 5.0
            elif t >= start:  # the marker, the closing brace and everything after
                weights[t] = 1.0
    return torch.tensor(weights, dtype=torch.float64)


# G2RL ---------------------------------------------------------------------------------------------


def g2rl_token_features(
    logits: Tensor, completion_ids: Sequence[int], lm_head: Tensor, temperature: float = 1.0
) -> Tensor:
    """Eqs. 7, 14: `phi_t = W[y_t] - sum_v p_t(v) W[v]`, `[T, H]` float64.

    `logits` [T, V] are those that predict the completion, `lm_head` is W [V, H].
    """
    weight = lm_head.detach().double()
    features = []
    for row, token in zip(logits.detach().double(), completion_ids, strict=True):
        p = torch.softmax(row / temperature, -1)
        expected = torch.zeros_like(weight[0])
        for v in range(len(p)):
            expected = expected + p[v] * weight[v]
        features.append(weight[token] - expected)
    return torch.stack(features) if features else weight.new_zeros(0, weight.shape[1])


def g2rl_feature(phi: Tensor, token_weights: Sequence[float] | None = None) -> Tensor:
    """Eq. 8: `Phi = sum_t alpha_t phi_t / sum_t alpha_t`, `[H]`; alpha is 1 by default."""
    alpha = [1.0] * len(phi) if token_weights is None else [float(a) for a in token_weights]
    total = torch.zeros_like(phi[0])
    for a, one in zip(alpha, phi, strict=True):
        total = total + a / sum(alpha) * one
    return total


def g2rl_similarities(features: Tensor) -> Tensor:
    """Eq. 9: `S_ij = cos(Phi_i, Phi_j)`, `[G, G]`."""
    rows = features.double()
    return torch.stack([torch.stack([(a @ b) / (a.norm() * b.norm()) for b in rows]) for a in rows])


def g2rl_reference_weights(rewards: Sequence[float]) -> Tensor:
    """Eq. 10: `w_ij = exp(r_j) / sum_{k != i} exp(r_k)`, j != i; the diagonal is 0. `[G, G]`."""
    count = len(rewards)
    weights = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        others = [k for k in range(count) if k != i]
        for j in others:
            weights[i, j] = math.exp(rewards[j]) / sum(math.exp(rewards[k]) for k in others)
    return weights


def g2rl_novelty(features: Tensor, rewards: Sequence[float]) -> Tensor:
    """Eq. 11: `nu_i = max(1 - sum_{j != i} w_ij S_ij^2, 0)`, `[G]`."""
    similar, weights = g2rl_similarities(features), g2rl_reference_weights(rewards)
    found = []
    for i in range(len(rewards)):
        explained = sum(float(weights[i, j] * similar[i, j] ** 2) for j in range(len(rewards)))
        found.append(max(1.0 - explained, 0.0))
    return torch.tensor(found, dtype=torch.float64)


def g2rl_shaped_rewards(
    novelty: Tensor,
    rewards: Sequence[float],
    lam: float = 1.0,
    variant: str = "equation",
    clip: float = 3.0,
) -> Tensor:
    """Eqs. 12-13 for one group, `[G]`: `clip(r (1 + lam r nu_bar), -3, 3)`.

    The prose's variant is `clip(r (1 + lam nu_bar), -3, 3)`. nu_bar: novelty min-max within the
    group, 0 where all are equal.
    """
    assert variant in ("equation", "prose")
    nu = [float(x) for x in novelty]
    lowest, highest = min(nu), max(nu)
    equal = highest - lowest <= 1e-6 * max(abs(x) for x in nu)
    shaped = []
    for x, r in zip(nu, rewards, strict=True):
        bar = 0.0 if equal else (x - lowest) / (highest - lowest)
        factor = 1.0 + lam * (r if variant == "equation" else 1.0) * bar
        shaped.append(min(max(r * factor, -clip), clip))
    return torch.tensor(shaped, dtype=torch.float64)


# VIGOR --------------------------------------------------------------------------------------------


def vigor_norm(
    model: Any,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    parameters: str = "trainable",
) -> float:
    """`||d loss / d theta||_2`, loss: the mean negative log-probability of the completion's tokens.

    `"trainable"`: what requires a gradient; `"all"`; `"lm_head"`: the head's weight and bias. A
    tied weight is one parameter whose gradient has both parts, and it is the head's where tied.
    """
    chosen = _chosen(model, parameters)
    before = [p.requires_grad for p in chosen]
    prompt, completion = list(prompt_ids), list(completion_ids)
    try:
        for p in chosen:
            p.requires_grad_(True)
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        logps = torch.log_softmax(logits, -1)
        nll = [-logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)]
        loss = torch.stack(nll).mean()
        grads = torch.autograd.grad(loss, chosen, allow_unused=True)
    finally:
        for p, required in zip(chosen, before, strict=True):
            p.requires_grad_(required)
    squares = [float(g.double().square().sum()) for g in grads if g is not None]
    return math.sqrt(sum(squares))


def _chosen(model: Any, parameters: str) -> list[Any]:
    if parameters == "lm_head":
        return list(model.get_output_embeddings().parameters())
    assert parameters in ("all", "trainable")
    # named_parameters gives a tied weight once.
    return [p for _, p in model.named_parameters() if p.requires_grad or parameters == "all"]


def vigor_rank_rewards(norms: Sequence[float], lengths: Sequence[int]) -> Tensor:
    """`R_i = 2 rank_i / (G - 1) - 1` for one group, `[G]`; the worst has rank 0; 0 for G = 1.

    The score is `S_i = -sqrt(T_i) * norm_i`; equal scores rank by their index.
    """
    count = len(norms)
    if count == 1:
        return torch.zeros(1, dtype=torch.float64)
    scores = [-math.sqrt(t) * float(n) for n, t in zip(norms, lengths, strict=True)]
    rewards = [0.0] * count
    for rank, i in enumerate(sorted(range(count), key=lambda i: scores[i])):  # a stable sort
        rewards[i] = 2.0 * rank / (count - 1) - 1.0
    return torch.tensor(rewards, dtype=torch.float64)
