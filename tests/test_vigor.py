"""VIGOR's norms against the float64 reference, the stock model, and the official rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vigor_runs
from fallback_models import CONFIGS as OTHER_FAMILIES
from fallback_models import exact_model_of
from native_calls import native
from official_rules import vigor_norm
from tiny_models import VARIANTS, tiny_model, tiny_variant
from vigor_runs import (
    FLOAT64,
    NATIVE_SIZES,
    SAME_MODULES,
    STOCK,
    SUBSETS,
    Ran,
    norms,
    rows_of_every_kind,
    squares_of_reference,
    squares_of_stock,
    stock_head_norms,
    total,
    train_only,
    worst,
)

from g2r_fast.reference import ReferenceDecoder, completion_nll, gradient_norm

__all__ = ["native"]

ran = vigor_runs.ran

# In a model with these, every subset above has some parameter.
COMPLETE = ("qwen3-biases", "llama-biases", "qwen2")


def errors_of_subsets(model: Any, rows: Any, squares: Any, engine: str) -> dict[str, float]:
    """The worst error of each subset of the parameters that this model has."""
    found = {}
    for name, counts in SUBSETS.items():
        if train_only(model, counts):
            actual = norms(model, rows, "trainable", engine)
            found[name] = worst(actual, total(squares, counts))
    model.requires_grad_(False)
    found["all, whatever is trainable"] = worst(
        norms(model, rows, "all", engine), total(squares, SUBSETS["all"])
    )
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_the_reference(variant: str) -> None:
    """For every subset of the parameters."""
    model, rows = tiny_variant(variant, dtype=torch.float64), rows_of_every_kind()
    assert norms(model, rows).dtype == torch.float64
    found = errors_of_subsets(model, rows, squares_of_reference(model, rows), "packed")
    assert max(found.values()) <= FLOAT64, found
    assert len(found) >= 12


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_the_stock_model(
    variant: str, backend: str, native: None, ran: list[Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2R_BACKEND", backend)
    model, rows = tiny_variant(variant, **NATIVE_SIZES), rows_of_every_kind()
    assert norms(model, rows).dtype == torch.float32
    found = errors_of_subsets(model, rows, squares_of_stock(model, rows), "packed")
    found["lm_head"] = worst(norms(model, rows, "lm_head"), stock_head_norms(model, rows))
    assert max(found.values()) <= STOCK, found
    assert all(backend in one.done.backend for one in ran)


@pytest.mark.parametrize("variant", ["qwen3-biases", "llama-tied"])
def test_triton_under_its_interpreter(
    variant: str, ran: list[Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One subset of the parameters for each kind of kernel, as a program takes milliseconds."""
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    monkeypatch.setenv("G2R_BACKEND", "triton")
    model = tiny_variant(variant, num_hidden_layers=2)
    rows = rows_of_every_kind().at([1, 2, 8])
    squares = squares_of_stock(model, rows)
    for subset in ("all", "norms", "biases", "q and v"):
        if train_only(model, SUBSETS[subset]):
            found = norms(model, rows, "trainable")
            assert worst(found, total(squares, SUBSETS[subset])) <= STOCK, subset
    assert worst(norms(model, rows, "lm_head"), stock_head_norms(model, rows)) <= STOCK
    assert all("triton" in one.done.backend for one in ran)


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3-biases", "mistral"])
def test_float32_of_one_backward_at_a_time(variant: str) -> None:
    model, rows = tiny_variant(variant), rows_of_every_kind()
    found = errors_of_subsets(model, rows, squares_of_stock(model, rows), "autograd")
    head = stock_head_norms(model, rows)
    found["lm_head"] = worst(norms(model, rows, "lm_head", "autograd"), head)
    assert max(found.values()) <= STOCK, found


def test_there_is_a_model_for_every_subset() -> None:
    models = [tiny_variant(name) for name in COMPLETE]
    for name, counts in SUBSETS.items():
        assert any(train_only(model, counts) for model in models), name


@pytest.mark.parametrize("parameters", ["all", "trainable", "lm_head"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3-biases"])
def test_the_official_rule(variant: str, parameters: str) -> None:
    """Transcribed by somebody else. With tied weights its "lm_head" is the whole parameter."""
    model, rows = tiny_variant(variant), rows_of_every_kind()
    train_only(model, SUBSETS["q and v"])
    expected = [
        vigor_norm(model, *row, parameters)
        for row in zip(rows.prompt_ids, rows.completion_ids, strict=True)
    ]
    if (variant, parameters) == ("llama-tied", "lm_head"):
        train_only(model, SUBSETS["embeddings"])
        parameters = "trainable"
    for engine in ("packed", "autograd"):
        assert worst(norms(model, rows, parameters, engine), expected) <= STOCK


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_families_that_only_autograd_knows(name: str) -> None:
    model, rows = exact_model_of(name), rows_of_every_kind()
    limit = SAME_MODULES if model.dtype == torch.float64 else STOCK
    expected = total(squares_of_stock(model, rows), SUBSETS["all"])
    assert worst(norms(model, rows, "all", "autograd"), expected) <= limit


def test_the_reference_against_central_differences() -> None:
    """Of every parameter, along a random direction; the prompt's ids occur in the completion."""
    from dataclasses import replace

    model = tiny_model("qwen3", dtype=torch.float64, tie_word_embeddings=True, pad_token_id=8)
    decoder, prompt, completion = ReferenceDecoder.from_model(model), [3, 8, 5], [5, 8, 2]
    grads = vigor_runs.completion_gradients(decoder, prompt, completion)
    generator, step = torch.Generator().manual_seed(0), 1e-5
    for name, grad in grads.items():
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (step, -step):
            moved = {**decoder.weights, name: decoder.weights[name] + sign * direction}
            if name == "embed_tokens.weight":
                moved["head.weight"] = moved[name]
            values.append(completion_nll(replace(decoder, weights=moved), prompt, completion))
        expected = (values[0] - values[1]) / (2 * step)
        assert worst([(grad * direction).sum()], [expected]) <= 1e-6, name


def test_the_reference_takes_names() -> None:
    decoder = ReferenceDecoder.from_model(tiny_model("llama", dtype=torch.float64))
    row = ([1, 2], [3, 4])
    parts = [gradient_norm(decoder, *row, [name]) for name in decoder.weights]
    whole = gradient_norm(decoder, *row)
    assert worst([whole], [sum(part**2 for part in parts) ** 0.5]) <= SAME_MODULES
    assert min(parts) > 0 and gradient_norm(decoder, [1, 2], []) == 0
