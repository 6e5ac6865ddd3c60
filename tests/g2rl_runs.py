"""Batches for the tests of G2RL, and what a stock model and the reference make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import random_ids
from torch import Tensor

from g2r_fast.g2rl import Features, features_from_hidden_states, gradient_features
from g2r_fast.reference import ReferenceDecoder, gradient_feature, relative_error

FLOAT64 = 1e-10
FLOAT32 = 1e-5  # against float64
STOCK = 2e-5  # against a stock model in float32
TEMPERATURE = 0.7

ENGINES = ("packed", "autograd")


@dataclass(frozen=True)
class Batch:
    prompts: list[list[int]]
    completions: list[list[int]]
    weights: list[Tensor] | None = None
    temperature: float = TEMPERATURE

    @property
    def options(self) -> dict[str, Any]:
        return {"token_weights": self.weights, "temperature": self.temperature}

    @property
    def filled(self) -> list[int]:
        """Rows with a token."""
        return [i for i, ids in enumerate(self.completions) if ids]


def batch(groups: int, size: int, lengths: Sequence[int], *, weighted: bool = True) -> Batch:
    """`size` completions of every prompt, whose lengths go round."""
    prompts, completions = [], []
    for i in range(groups * size):
        prompts.append(random_ids(3 + 4 * (i // size), 50 + i // size).tolist())
        completions.append(random_ids(lengths[i % len(lengths)], 100 + i).tolist())
    generator = torch.Generator().manual_seed(9)
    weights = [torch.rand(len(ids), generator=generator) + 0.1 for ids in completions]
    return Batch(prompts, completions, weights if weighted else None)


RAGGED = batch(2, 4, (5, 0, 9, 1, 17))


def alphas(of: Batch, row: int) -> Tensor:
    """Float64 weights of a row's tokens, which add up to 1."""
    if of.weights is None:
        return torch.ones(len(of.completions[row])).double() / len(of.completions[row])
    weights = of.weights[row].double()
    return weights / weights.sum()


def reference(policy: Any, of: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    decoder = ReferenceDecoder.from_model(policy)
    return [
        gradient_feature(decoder, prompt, ids, alphas(of, i).tolist() or None, of.temperature)
        for i, (prompt, ids) in enumerate(zip(of.prompts, of.completions, strict=True))
    ]


def hidden_states(policy: Any, prompt: list[int], ids: list[int]) -> Tensor:
    """What enters a stock model's LM head where it predicts a completion's tokens."""
    found: list[Tensor] = []
    handle = policy.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0])
    )
    with torch.no_grad():
        policy(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False)
    handle.remove()
    return found[0][0, len(prompt) - 1 : -1]


def stock(policy: Any, of: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By autograd: the gradient at the hidden states, times the temperature that Phi leaves out."""
    found = []
    for row, (prompt, ids) in enumerate(zip(of.prompts, of.completions, strict=True)):
        if not ids:
            none = torch.zeros(0)
            found.append((torch.zeros(policy.get_output_embeddings().weight.shape[1]), none, none))
            continue
        hidden = hidden_states(policy, prompt, ids).requires_grad_(True)
        logits = policy.get_output_embeddings()(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = (logits.to(wide) / of.temperature).log_softmax(-1)
        logps = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
        (grad,) = torch.autograd.grad((alphas(of, row).to(wide) * logps).sum(), hidden)
        entropies = -(rows.exp() * rows).sum(-1)
        found.append((grad.to(wide).sum(0) * of.temperature, logps.detach(), entropies.detach()))
    return found


def errors(found: Features, truth: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """Of the features, relative, row by row; an empty completion's must be zero."""
    result = []
    for row, (feature, *_) in enumerate(truth):
        if not feature.any():
            assert not found.features[row].any()
            continue
        result.append(float(relative_error(found.features[row], feature)))
    assert result
    return result


def token_errors(found: Features, truth: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """Of log-probabilities and entropies, relative, in norm over a completion's tokens."""
    result = []
    for row, (_, *wanted) in enumerate(truth):
        for got, expected in zip(
            (found.token_logps[row], found.token_entropies[row]), wanted, strict=True
        ):
            assert got.shape == expected.shape
            if len(expected):
                result.append(float(relative_error(got, expected)))
    return result


def features(policy: Any, of: Batch, **options: Any) -> Features:
    return gradient_features(policy, of.prompts, of.completions, **{**of.options, **options})


def same(a: Features, b: Features) -> bool:
    pairs = [(a.features, b.features)]
    pairs += zip(
        [*a.token_logps, *a.token_entropies], [*b.token_logps, *b.token_entropies], strict=True
    )
    return all(torch.equal(x, y) for x, y in pairs)


def of_hidden_states(lm_head: Any, hidden: Any, of: Batch, **options: Any) -> Features:
    return features_from_hidden_states(lm_head, hidden, of.completions, **{**of.options, **options})
