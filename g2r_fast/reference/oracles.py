"""Two ways to ``b_t`` that share nothing with a backward pass: forward mode and differences.

``b_t = g_t · e_t`` is the derivative of the objective along ``e_t`` at token t. Forward-mode
differentiation with that tangent gives it exactly, and central differences give it to the accuracy
of the step. Neither forms a cotangent or a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from g2r_fast.errors import InputError
from g2r_fast.reference.decoder import ReferenceDecoder
from g2r_fast.reference.grad2reward import Span, objective_value, span_positions

__all__ = ["central_differences", "forward_mode_scores"]


def forward_mode_scores(
    decoder: ReferenceDecoder,
    input_ids: Tensor | Sequence[int],
    span: Span,
    target_id: int,
    other_id: int | None = None,
    objective: str = "logp",
) -> Tensor:
    """``b[t] = jvp(objective, embeds, tangent = e_t at token t)`` (Eqs. 2 and 3) → ``[T]``.

    One forward pass with tangents per token of the span.
    """
    value, embeds = _objective_of_embeds(decoder, input_ids, target_id, other_id, objective)
    scores = []
    for position in span_positions(span, len(embeds)).tolist():
        tangent = torch.zeros_like(embeds)
        tangent[position] = embeds[position]
        scores.append(torch.func.jvp(value, (embeds,), (tangent,))[1])
    return torch.stack(scores) if scores else embeds.new_zeros(0)


def central_differences(
    decoder: ReferenceDecoder,
    input_ids: Tensor | Sequence[int],
    span: Span,
    target_id: int,
    other_id: int | None = None,
    objective: str = "logp",
    step: float = 1e-4,
) -> Tensor:
    """``b[t] = (f(e_t (1 + h)) - f(e_t (1 - h))) / 2h`` (Eqs. 2 and 3) → ``[T]``.

    ``step`` is h: the embedding of token t grows and shrinks by that fraction. The error is of
    order h² from the curvature and of order 1e-16 |f| / h from rounding, so only a float64 decoder
    is accepted (InputError).
    """
    value, embeds = _objective_of_embeds(decoder, input_ids, target_id, other_id, objective)
    if embeds.dtype != torch.float64:
        raise InputError(
            "central differences drown in rounding", expected="float64", got=embeds.dtype
        )
    scores = []
    with torch.no_grad():
        for position in span_positions(span, len(embeds)).tolist():
            change = torch.zeros_like(embeds)
            change[position] = step * embeds[position]
            scores.append((value(embeds + change) - value(embeds - change)) / (2.0 * step))
    return torch.stack(scores) if scores else embeds.new_zeros(0)


def _objective_of_embeds(
    decoder: ReferenceDecoder,
    input_ids: Tensor | Sequence[int],
    target_id: int,
    other_id: int | None,
    objective: str,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    def value(embeds: Tensor) -> Tensor:
        return objective_value(decoder.logits(embeds), target_id, other_id, objective)

    return value, decoder.embed(input_ids)
