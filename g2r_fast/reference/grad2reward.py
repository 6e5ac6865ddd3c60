"""Grad2Reward (arXiv 2602.01791), equation by equation, one sequence at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from g2r_fast.errors import InputError
from g2r_fast.reference.decoder import ReferenceDecoder
from g2r_fast.reference.spread import mean_and_std

__all__ = [
    "OBJECTIVES",
    "READOUTS",
    "ResponseReward",
    "aggregate_rewards",
    "argmax_verdict",
    "attribution",
    "input_gradients",
    "objective_cotangent",
    "objective_value",
    "outcome_rewards",
    "pullback",
    "response_reward",
    "response_score",
    "span_positions",
    "token_scores",
]

OBJECTIVES = ("logp", "logp_two_way", "logodds")
READOUTS = ("dot", "l1", "l2", "uniform")

Span = tuple[int, int] | Sequence[tuple[int, int]]


# --- the scalar that is differentiated -----------------------------------------------------------


def objective_value(
    logits: Tensor, target_id: int, other_id: int | None = None, objective: str = "logp"
) -> Tensor:
    """``log_softmax(logits)[target]``, or another objective, as a scalar in nats.

    - ``"logp"``: over the whole vocabulary, ``-log(1 + Σ_{v≠z} exp(l_v - l_z))``.
    - ``"logp_two_way"``: over {target, other}, ``-log(1 + exp(l_other - l_z))``.
    - ``"logodds"``: ``l_z - l_other``.

    ``logits``: ``[V]``, any floating dtype. Both logarithms are written without ``1 - p``, so
    automatic differentiation through them stays exact however sure the judge is.
    """
    target_id, other_id = _check_objective(logits, target_id, other_id, objective)
    if objective == "logodds":
        return logits[target_id] - logits[other_id]
    if objective == "logp_two_way":
        against = logits[other_id]
    else:
        others = torch.cat((logits[:target_id], logits[target_id + 1 :]))
        against = others.logsumexp(dim=0)
    margin = against - logits[target_id]
    return -torch.logaddexp(torch.zeros_like(margin), margin)


def objective_cotangent(
    logits: Tensor, target_id: int, other_id: int | None = None, objective: str = "logp"
) -> Tensor:
    """``∂ objective / ∂ logits`` → ``[V]``, in the dtype of ``logits``.

    - ``"logp"``: ``-p_v`` for v ≠ z and ``Σ_{v≠z} p_v`` at z, never ``1 - p_z``, which for a sure
      judge keeps no digits.
    - ``"logp_two_way"``: the same over {target, other}.
    - ``"logodds"``: 1 at the target, -1 at the other.
    """
    target_id, other_id = _check_objective(logits, target_id, other_id, objective)
    cotangent = torch.zeros_like(logits)
    if objective == "logodds":
        cotangent[other_id] = -1.0
        cotangent[target_id] = 1.0
    elif objective == "logp_two_way":
        p_other = (logits[other_id] - logits[target_id]).sigmoid()
        cotangent[other_id] = -p_other
        cotangent[target_id] = p_other
    else:
        p = logits.softmax(dim=0)
        cotangent = -p
        cotangent[target_id] = torch.cat((p[:target_id], p[target_id + 1 :])).sum()
    return cotangent


def argmax_verdict(logits: Tensor, true_id: int, false_id: int) -> bool:
    """``bool(logits[true_id] > logits[false_id])``: a tie is False."""
    return bool(logits[true_id] > logits[false_id])


# --- Eqs. 2 and 3: gradients at the input embeddings, and one score a token ----------------------


def pullback(
    decoder: ReferenceDecoder, input_ids: Tensor | Sequence[int], cotangent: Tensor
) -> tuple[Tensor, Tensor]:
    """``autograd.grad(logits[-1], embeds, cotangent)`` → ``(grads, embeds)``, both ``[T, H]``.

    The gradient of ``cotangent · logits`` at the last position with respect to every input
    embedding, by reverse mode.
    """
    embeds = decoder.embed(input_ids).detach().requires_grad_(True)
    with torch.enable_grad():
        logits = decoder.logits(embeds)
        (grads,) = torch.autograd.grad(logits, embeds, cotangent.to(logits))
    return grads, embeds.detach()


def input_gradients(
    decoder: ReferenceDecoder,
    input_ids: Tensor | Sequence[int],
    span: Span,
    target_id: int,
    other_id: int | None = None,
    objective: str = "logp",
) -> tuple[Tensor, Tensor]:
    """``g_t = ∂ log p(z | x, o, c) / ∂ e_t`` (Eq. 2) → ``(grads, embeds)``, both ``[T, H]``.

    ``input_ids`` is the judge's whole input; the verdict is read at its last position. ``span`` is
    the response inside it: one (start, stop), or several.
    """
    positions = span_positions(span, len(input_ids))
    with torch.no_grad():
        logits = decoder.logits(decoder.embed(input_ids))
    cotangent = objective_cotangent(logits, target_id, other_id, objective)
    grads, embeds = pullback(decoder, input_ids, cotangent)
    return grads[positions], embeds[positions]


def token_scores(grads: Tensor, embeds: Tensor, readout: str = "dot") -> Tensor:
    """``(grads * embeds).sum(-1)`` (Eq. 3), signed → ``b`` ``[T]``.

    ``"l1"`` and ``"l2"`` are the norms of the gradient (Eqs. 11 and 12), ``"uniform"`` is zeros,
    which the softmax turns into ``1 / T``.
    """
    if readout == "dot":
        return (grads * embeds).sum(dim=-1)
    if readout == "l1":
        return grads.abs().sum(dim=-1)
    if readout == "l2":
        return grads.square().sum(dim=-1).sqrt()
    if readout == "uniform":
        return grads.new_zeros(len(grads))
    raise InputError("unknown readout", expected=" or ".join(READOUTS), got=repr(readout))


# --- Eqs. 4 and 5 and the rubric -----------------------------------------------------------------


def attribution(scores: Tensor, tau: float | str | tuple[str, float] = 1.0) -> Tensor:
    """``softmax(b / tau)`` over the response's tokens (Eq. 4) → ``α`` ``[T]`` float64.

    ``tau="auto"`` or ``("auto", tau)`` divides ``b`` by its own population standard deviation over
    the response first; without spread ``α`` is then uniform. An empty response has an empty ``α``.
    """
    scores = scores.to(torch.float64)
    automatic, temperature = _parse_tau(tau)
    if automatic:
        _, std = mean_and_std(scores.tolist())
        scores = scores / std if std > 0.0 else torch.zeros_like(scores)
    return (scores / temperature).softmax(dim=0)


def response_score(verdicts: Sequence[bool], weights: Sequence[float]) -> float:
    """``Σ_k 1[z_k] w_k / Σ_k max(w_k, 0)`` (Eq. 1 over a rubric); 0 where no weight is positive."""
    positive = math.fsum(max(w, 0.0) for w in weights)
    earned = math.fsum(w for w, z in zip(weights, verdicts, strict=True) if z)
    return earned / positive if positive > 0.0 else 0.0


def aggregate_rewards(
    attributions: Sequence[Tensor | None],
    verdicts: Sequence[bool],
    weights: Sequence[float],
    num_tokens: int,
) -> Tensor:
    """``r[t] = Σ_k 1[z_k] w_k α[k][t] / Σ_k max(w_k, 0)`` (Eq. 5 over a rubric) → ``[T]`` float64.

    One softmax per item, before the sum, so that the rewards add up to :func:`response_score`. An
    item of negative weight judged True gives negative rewards. All zeros where no weight is
    positive.
    """
    rewards = torch.zeros(num_tokens, dtype=torch.float64)
    positive = math.fsum(max(w, 0.0) for w in weights)
    for alpha, verdict, weight in zip(attributions, verdicts, weights, strict=True):
        if verdict and positive > 0.0:
            if alpha is None:
                raise InputError("an item judged True has no attribution")
            rewards = rewards + weight * alpha.to(rewards) / positive
    return rewards


def outcome_rewards(alpha: Tensor, value: float, add_value: bool = True) -> Tensor:
    """``r = α V; r[-1] += V`` (Eqs. 14 and 15) → ``[T]`` float64.

    For an outcome reward model with value V and ``α`` from the gradients of V
    (:func:`pullback` with a cotangent of ones at the model's one value). Literally the rewards then
    add up to 2 V; ``add_value=False`` leaves the addition out.
    """
    rewards = alpha.to(torch.float64) * value
    if add_value and len(rewards) > 0:
        rewards[-1] += value
    return rewards


# --- one response against its rubric -------------------------------------------------------------


@dataclass(frozen=True)
class ResponseReward:
    """What Grad2Reward says of one response with K rubric items."""

    score: float  # Eq. 1 over the rubric
    verdicts: list[bool]  # K
    verdict_logps: list[float]  # K, log p(True) over the whole vocabulary, nats
    attributions: list[Tensor | None]  # K of [T] float64; None where the verdict is False
    token_rewards: Tensor  # [T] float64, adding up to the score


def response_reward(
    decoder: ReferenceDecoder,
    item_ids: Sequence[Tensor | Sequence[int]],
    spans: Sequence[Span],
    weights: Sequence[float],
    true_id: int,
    false_id: int,
    *,
    tau: float | str | tuple[str, float] = 1.0,
    objective: str = "logp",
    readout: str = "dot",
    verdicts: Sequence[bool] | None = None,
) -> ResponseReward:
    """Eqs. 1 to 5 for one response: K judge inputs, the response's span in each, K weights.

    ``verdicts=None`` takes the argmax of the two verdict words. Only items judged True are
    differentiated.
    """
    K = len(item_ids)
    if not K == len(spans) == len(weights) or K == 0 or (verdicts and len(verdicts) != K):
        raise InputError(
            "item_ids, spans, weights and verdicts need one entry per rubric item, and at least one"
        )
    num_tokens = len(span_positions(spans[0], len(item_ids[0])))
    judged, logps, attributions = [], [], []
    for k in range(K):
        with torch.no_grad():
            logits = decoder.logits(decoder.embed(item_ids[k]))
        z = argmax_verdict(logits, true_id, false_id) if verdicts is None else bool(verdicts[k])
        judged.append(z)
        logps.append(float(objective_value(logits, true_id)))
        alpha = None
        if z:
            ids, span = item_ids[k], spans[k]
            grads, embeds = input_gradients(decoder, ids, span, true_id, false_id, objective)
            alpha = attribution(token_scores(grads, embeds, readout), tau)
        attributions.append(alpha)
    return ResponseReward(
        score=response_score(judged, weights),
        verdicts=judged,
        verdict_logps=logps,
        attributions=attributions,
        token_rewards=aggregate_rewards(attributions, judged, weights, num_tokens),
    )


def span_positions(span: Span, length: int) -> Tensor:
    """``cat([arange(start, stop) for start, stop in spans])`` → positions, int64.

    InputError for a span outside the sequence, reversed, or overlapping the one before it.
    """
    is_pair = len(span) == 2 and not isinstance(span[0], Sequence)
    spans = cast("list[tuple[int, int]]", [span] if is_pair else list(span))
    positions: list[int] = []
    last = 0
    for index, (start, stop) in enumerate(spans):
        if not last <= start <= stop <= length:
            raise InputError(
                "a span does not lie inside its sequence, in order",
                expected=f"{last} <= start <= stop <= {length}",
                got=(start, stop),
                index=index,
            )
        positions += range(start, stop)
        last = stop
    return torch.tensor(positions, dtype=torch.int64)


def _check_objective(
    logits: Tensor, target_id: int, other_id: int | None, objective: str
) -> tuple[int, int]:
    if objective not in OBJECTIVES:
        raise InputError("unknown objective", expected=" or ".join(OBJECTIVES), got=repr(objective))
    if objective == "logp":
        other_id = 0 if other_id is None else other_id  # not read
    if other_id is None:
        raise InputError(f"objective {objective!r} needs the id of the other verdict word")
    for name, token in (("target_id", target_id), ("other_id", other_id)):
        if not 0 <= token < len(logits):
            raise InputError(
                f"{name} is outside the vocabulary",
                expected=f"0 <= id < {len(logits)}",
                got=token,
            )
    return target_id, other_id


def _parse_tau(tau: float | str | tuple[str, float]) -> tuple[bool, float]:
    automatic, temperature = False, tau
    if tau == "auto":
        automatic, temperature = True, 1.0
    elif isinstance(tau, tuple) and len(tau) == 2 and tau[0] == "auto":
        automatic, temperature = True, tau[1]
    if not isinstance(temperature, int | float) or not 0.0 < temperature < math.inf:
        raise InputError(
            "tau cannot be used",
            expected='a positive finite number, "auto" or ("auto", number)',
            got=repr(tau),
        )
    return automatic, float(temperature)
