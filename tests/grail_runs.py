"""Batches for GRAIL's tests, and its saliencies by the reference and by what anybody writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from engine_watch import Ran, watch
from tiny_models import random_ids
from torch import Tensor

from g2r_fast import grail
from g2r_fast.answer_spans import AnswerSpan
from g2r_fast.reference import ReferenceDecoder, answer_saliency, relative_error

# Of one sequence, ||s - s*|| / ||s*||.
FLOAT64 = 1e-10
PACKED_ALONE = 1e-12
SAME_MODULES = 1e-11  # two ways through a stock model in float64
FLOAT32 = 1e-5
STOCK = 2e-5


@dataclass(frozen=True)
class Rows:
    """What `token_saliencies` takes; every row has a span."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.spans)

    def at(self, order: Sequence[int]) -> Rows:
        return Rows(*([values[i] for i in order] for values in vars(self).values()))


def ids_of(length: int, seed: int) -> list[int]:
    return random_ids(length, seed).tolist()


def spans_of_every_kind() -> Rows:
    """Two groups, one prompt of a single token; completions that begin alike; spans at the start,
    at the end, of one token, and all of it."""
    prompts = [ids_of(7, 1)] * 6 + [ids_of(1, 2)] * 3
    common = ids_of(4, 3)
    completions = [
        ids_of(9, 10),
        [*common, *ids_of(4, 11)],
        [*common, *ids_of(6, 12)],
        [*common, *ids_of(6, 12)],  # the same with another span
        ids_of(1, 13),
        ids_of(5, 14),
        ids_of(8, 15),
        ids_of(2, 16),
        ids_of(6, 17),
    ]
    spans = [(3, 6), (0, 3), (6, 10), (2, 7), (0, 1), (0, 5), (4, 5), (1, 2), (0, 1)]
    return Rows(prompts, completions, spans)


def many_rows() -> Rows:
    """Enough for a statement about rounding errors."""
    prompts = [ids_of(8, 1 + i // 12) for i in range(36)]
    completions = [ids_of(10 + i % 5, 100 + i) for i in range(36)]
    return Rows(prompts, completions, [(4 + i % 3, 8 + i % 2) for i in range(36)])


def saliencies(model: Any, rows: Rows, engine: str = "packed", **options: Any) -> list[Tensor]:
    found = grail.token_saliencies(
        model, rows.prompt_ids, rows.completion_ids, rows.spans, engine=engine, **options
    )
    assert all(s is not None for s in found)
    return [s for s in found if s is not None]


def reference_saliencies(
    model: Any, rows: Rows, *, leaf: int = 0, shift: int = 1, temperature: float = 1.0
) -> list[Tensor]:
    decoder = ReferenceDecoder.from_model(model)
    return [
        answer_saliency(decoder, *row, leaf=leaf, shift=shift, temperature=temperature)
        for row in zip(*vars(rows).values(), strict=True)
    ]


def stock_saliencies(
    model: Any, rows: Rows, *, leaf: int = 0, shift: int = 1, temperature: float = 1.0
) -> list[Tensor]:
    """The stock model, one sequence at a time, all of the completion, in the model's dtype."""
    found = []
    for prompt, completion, (start, stop) in zip(*vars(rows).values(), strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        output = model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
        wide = torch.promote_types(embeds.dtype, torch.float32)
        logps = (output.logits[0, :-1].to(wide) / temperature).log_softmax(-1)
        logps = logps.gather(-1, ids[0, 1:, None])[:, 0]
        first = len(prompt) - 1  # of logps: the completion's first token
        loss = -logps[first + start : first + stop].sum()
        state = embeds if leaf == 0 else output.hidden_states[leaf]
        (grad,) = torch.autograd.grad(loss, state)
        norms = (grad[0].to(wide) * state.detach()[0].to(wide)).norm(dim=-1)
        found.append(norms[len(prompt) - shift : len(prompt) - shift + len(completion)])
    return found


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of each sequence; one that is zero must be zero."""
    pairs = list(zip(actual, expected, strict=True))
    assert pairs and all(a.shape == e.shape for a, e in pairs)
    return [
        float(relative_error(a, e)) if e.any() else (float("inf") if a.any() else 0.0)
        for a, e in pairs
    ]


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(errors(actual, expected))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """One entry per run of an engine for GRAIL."""
    return watch(monkeypatch, grail)


def whole(start: int, stop: int) -> AnswerSpan:
    return AnswerSpan(start, start, stop, stop)


def with_tail(rows: Rows, seed: int) -> Rows:
    """Other tokens behind every span, and three more of them."""
    completions = [
        [*completion[:stop], *ids_of(len(completion) - stop + 3, seed + i)]
        for i, (completion, (_, stop)) in enumerate(
            zip(rows.completion_ids, rows.spans, strict=True)
        )
    ]
    return replace(rows, completion_ids=completions)
