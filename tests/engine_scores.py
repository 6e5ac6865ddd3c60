"""Scores of a batch by an engine and by the reference, and how near they have to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from patterns import Batch
from tiny_models import random_ids
from torch import Tensor

from g2r_fast import attribute_tokens
from g2r_fast.reference import ReferenceDecoder, input_gradients, relative_error, token_scores

# Of one judgement, ||b - b*|| / ||b*||.
FLOAT64 = 1e-10
PACKED_ALONE = 1e-12
FLOAT32 = 1e-5
STOCK = 2e-5


def scores(model: Any, batch: Batch, engine: str = "packed", **options: Any) -> list[Tensor]:
    return attribute_tokens(
        model, batch.input_ids, batch.spans, batch.target_ids, engine=engine, **options
    )


def reference_scores(model: Any, batch: Batch, readout: str = "dot") -> list[Tensor]:
    decoder = ReferenceDecoder.from_model(model)
    return [
        token_scores(*input_gradients(decoder, ids, span, target), readout)
        for ids, span, target in batch.rows
    ]


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = list(zip(actual, expected, strict=True))
    assert pairs
    return max(float(relative_error(a, e)) for a, e in pairs)


def stock_loop(model: Any, batch: Batch) -> list[Tensor]:
    """What anybody writes: the stock model, one sequence at a time, in the model's dtype."""
    found = []
    for ids, (start, stop), target in batch.rows:
        embeds = model.get_input_embeddings()(torch.tensor([ids])).requires_grad_(True)
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        (grad,) = torch.autograd.grad(logits.float().log_softmax(-1)[target], embeds)
        found.append((grad * embeds.detach()).float().sum(-1)[0, start:stop])
    return found


def many_sequences() -> Batch:
    prompt = random_ids(8, 1).tolist()
    parts = [
        (random_ids(12 + i % 5, 100 + i // 4).tolist(), random_ids(4, 200 + i % 4).tolist())
        for i in range(36)
    ]
    return Batch(
        [[*prompt, *r, *t] for r, t in parts],
        [(8, 8 + len(r)) for r, _ in parts],
        [(5 * i) % 97 for i in range(36)],
    )


def rms_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Over sequences, of the relative errors."""
    pairs = zip(actual, expected, strict=True)
    errors = torch.tensor([relative_error(a, e) for a, e in pairs])
    return float(errors.square().mean().sqrt())
