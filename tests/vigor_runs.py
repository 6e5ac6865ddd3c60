"""Batches for VIGOR, and their norms by the reference and by what anybody writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_watch import Ran, watch
from tiny_models import random_ids
from torch import Tensor

from g2r_fast import vigor
from g2r_fast.reference import ReferenceDecoder, completion_gradients

# Of one norm, |n - n*| / n*.
FLOAT64 = 1e-12
PACKED_ALONE = 1e-12
SAME_MODULES = 1e-11  # two ways through a stock model in float64
STOCK = 2e-5  # float32, two implementations

# What the native kernels serve.
NATIVE_SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


@dataclass(frozen=True)
class Rows:
    """What `gradient_norms` takes."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def at(self, order: Iterable[int]) -> Rows:
        order = list(order)
        return Rows([self.prompt_ids[i] for i in order], [self.completion_ids[i] for i in order])


def ids_of(length: int, seed: int) -> list[int]:
    return random_ids(length, seed).tolist()


def rows_of_every_kind() -> Rows:
    """A prompt that is shared, one that begins another, a stranger of one token; completions that
    begin alike, twice the same, of one token, of one id only, with the prompt's ids."""
    prompt, common = ids_of(7, 1), ids_of(3, 3)
    prompts = [prompt] * 6 + [prompt[:4], [*prompt, 8, 9], ids_of(1, 2)]
    completions = [
        ids_of(9, 10),
        [*common, *ids_of(4, 11)],
        [*common, *ids_of(2, 12)],
        [*common, *ids_of(2, 12)],
        ids_of(1, 13),
        [6] * 5,
        prompt[4:] + ids_of(2, 14),
        [*prompt[:3], 9, 9],
        ids_of(6, 15),
    ]
    return Rows(prompts, completions)


def many_rows(count: int = 36) -> Rows:
    """Enough for a statement about rounding errors."""
    prompts = [ids_of(8, 1 + i // 6) for i in range(count)]
    return Rows(prompts, [ids_of(10 + i % 5, 100 + i) for i in range(count)])


def norms(
    model: Any, rows: Rows, parameters: str = "all", engine: str = "packed", **options: Any
) -> Tensor:
    found = vigor.gradient_norms(
        model,
        rows.prompt_ids,
        rows.completion_ids,
        parameters=parameters,
        engine=engine,
        **options,
    )
    assert found.shape == (len(rows),) and not found.requires_grad
    return found


def squares_of_reference(model: Any, rows: Rows) -> list[dict[str, float]]:
    """Of every row, each parameter's squared gradient norm by its name in the model, float64."""
    decoder = ReferenceDecoder.from_model(model)
    padding_idx = model.get_input_embeddings().padding_idx
    found = []
    for prompt, completion in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        grads = completion_gradients(decoder, prompt, completion, padding_idx=padding_idx)
        found.append({_in_model(name): float(g.square().sum()) for name, g in grads.items()})
    return found


def _in_model(name: str) -> str:
    return f"lm_{name}" if name.startswith("head.") else f"model.{name}"


def mean_nll(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """As a trainer writes it, through the stock model; float32 or wider."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])


def stock_gradients(model: Any, value: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of every parameter that requires one and has a part in `value`."""
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        grads = torch.autograd.grad(value(), list(live.values()), allow_unused=True)
    return {name: g for name, g in zip(live, grads, strict=True) if g is not None}


def squares_of_stock(model: Any, rows: Rows) -> list[dict[str, float]]:
    """Of every row, each parameter's squared gradient norm through the stock model."""
    before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(True)
    found = []
    for row in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        grads = stock_gradients(model, lambda row=row: mean_nll(model, *row))
        found.append({name: float(g.double().square().sum()) for name, g in grads.items()})
    for parameter, required in before.items():
        parameter.requires_grad_(required)
    return found


def stock_head_norms(model: Any, rows: Rows) -> list[float]:
    """Of the head alone: its inputs are constants, and so are tied embeddings."""
    found = []
    for prompt, completion in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        weight = model.lm_head.weight.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            logits = (hidden[0, len(prompt) - 1 : -1] @ weight.T).to(weight.dtype)
            loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
            (grad,) = torch.autograd.grad(loss, weight)
        found.append(float(grad.double().norm()))
    return found


def total(squares: Sequence[dict[str, float]], counts: Callable[[str], bool]) -> list[float]:
    """Norms over the parameters that count."""
    return [math.sqrt(math.fsum(v for n, v in of.items() if counts(n))) for of in squares]


# Which parameters require a gradient, by name.
SUBSETS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "the first layer": lambda name: ".layers.0." in name,
    "the middle layer": lambda name: ".layers.1." in name,
    "the last layer": lambda name: ".layers.2." in name,
    "norms": lambda name: "norm" in name,
    "the final norm": lambda name: name == "model.norm.weight",
    "norms in front of attention": lambda name: "input_layernorm" in name,
    "norms of heads": lambda name: "q_norm" in name or "k_norm" in name,
    "biases": lambda name: name.endswith(".bias"),
    "biases of v": lambda name: name.endswith("v_proj.bias"),
    "q and v": lambda name: name.endswith(("q_proj.weight", "v_proj.weight")),
    "k with its bias, and o": lambda name: "k_proj" in name or "o_proj.weight" in name,
    "up and down": lambda name: name.endswith(("up_proj.weight", "down_proj.weight")),
    "embeddings": lambda name: "embed_tokens" in name,
    "head": lambda name: "lm_head" in name,
    "embeddings and the last norm": lambda name: "embed" in name or name == "model.norm.weight",
}


def train_only(model: Any, counts: Callable[[str], bool]) -> Any:
    """`requires_grad` for the parameters that count, whose number it returns."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(counts(name))
    return sum(p.requires_grad for p in model.parameters())


def errors(found: Iterable[float], expected: Iterable[float]) -> list[float]:
    """Relative, of each norm; one that is zero must be zero."""
    pairs = [(float(a), float(e)) for a, e in zip(found, expected, strict=True)]
    assert pairs and all(math.isfinite(x) for pair in pairs for x in pair)
    return [abs(a - e) / e if e else (math.inf if a else 0.0) for a, e in pairs]


def worst(found: Iterable[float], expected: Iterable[float]) -> float:
    return max(errors(found, expected))


def rms(values: Iterable[float]) -> float:
    squares = [value**2 for value in values]
    return math.sqrt(math.fsum(squares) / len(squares))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """One entry per run of a packed engine for VIGOR."""
    return watch(monkeypatch, vigor)
