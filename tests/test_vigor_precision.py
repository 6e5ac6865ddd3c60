"""VIGOR in half precision, and where the policy is sure of its completion."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import vigor_runs
from native_calls import native
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from vigor_runs import (
    NATIVE_SIZES,
    SUBSETS,
    Ran,
    Rows,
    errors,
    ids_of,
    many_rows,
    mean_nll,
    norms,
    rms,
    squares_of_reference,
    squares_of_stock,
    stock_gradients,
    total,
    worst,
)

from g2r_fast import vigor
from g2r_fast.reference import ReferenceDecoder

__all__ = ["native"]

ran = vigor_runs.ran


def of_reference(model: Any, rows: Rows) -> list[float]:
    return total(squares_of_reference(model, rows), SUBSETS["all"])


def of_official_loop(model: Any, rows: Rows) -> list[float]:
    """Squares are summed in the gradient's dtype, parameter by parameter."""
    model.requires_grad_(True)
    found = []
    for row in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        grads = stock_gradients(model, lambda row=row: mean_nll(model, *row))
        squares: list[Tensor] = [g.pow(2).sum() for g in grads.values()]
        found.append(float(torch.stack(squares).sum().sqrt()))
    model.requires_grad_(False)
    return found


MODELS = [*FAMILIES, "qwen2, tied"]


@cache
def bfloat16_model(name: str) -> Any:
    family, _, tied = name.partition(", ")
    options: dict[str, Any] = {"tie_word_embeddings": bool(tied), **NATIVE_SIZES}
    return tiny_model(family, dtype=torch.bfloat16, **options)


@cache
def bfloat16_errors(name: str) -> tuple[list[float], list[float], list[float]]:
    """The truth; errors of the official loop, and of one with float64 sums of squares."""
    model, rows = bfloat16_model(name), many_rows()
    truth = of_reference(model, rows)
    wide = total(squares_of_stock(model, rows), SUBSETS["all"])
    return truth, errors(of_official_loop(model, rows), truth), errors(wide, truth)


@pytest.mark.parametrize("engine", ["native", "reference", "autograd"])
def test_bfloat16_is_nearer_than_the_loops(
    engine: str, native: None, ran: list[Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RMS of the errors of 36 sequences, against float64 with the same weights: below the official
    loop's for every model; and over all models, packed, below that of the loop whose only bfloat16
    is the model's own."""
    if engine != "autograd":
        monkeypatch.setenv("G2R_BACKEND", engine)
    ours, loops = [], []
    for name in MODELS:
        truth, official, wide = bfloat16_errors(name)
        found = norms(
            bfloat16_model(name), many_rows(), engine="packed" if engine != "autograd" else engine
        )
        assert found.dtype == torch.float32
        ours += errors(found, truth)
        loops += wide
        assert 1e-4 < rms(official) < 0.05, "the loop is no yardstick here"
        assert rms(ours[-len(truth) :]) < rms(official), name
    assert engine == "autograd" or (rms(ours) < rms(loops) and engine in ran[0].done.backend)


@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("name", MODELS)
def test_float16(name: str, engine: str) -> None:
    family, _, tied = name.partition(", ")
    model = tiny_model(family, dtype=torch.float16, tie_word_embeddings=bool(tied))
    rows = many_rows()
    truth = of_reference(model, rows)
    loop = rms(errors(total(squares_of_stock(model, rows), SUBSETS["all"]), truth))
    found = norms(model, rows, engine=engine)
    assert found.dtype == torch.float32
    assert 1e-5 < loop < 0.05, "the loop is no yardstick here"
    assert rms(errors(found, truth)) <= 2 * loop


def sure_rows(model: Any, low: float, high: float) -> Rows:
    """Completions of one token, for which 1 - p lies between these."""
    decoder = ReferenceDecoder.from_model(model)
    prompts, completions = [], []
    for seed in range(80):
        ids = ids_of(8, 500 + seed)
        logits = decoder.logits(decoder.embed(ids))
        token = int(logits.argmax())
        others = torch.cat([logits[:token], logits[token + 1 :]]).logsumexp(0)
        if low < float(torch.sigmoid(others - logits[token])) < high:
            prompts.append(ids)
            completions.append([token])
    assert len(prompts) >= 4
    return Rows(prompts, completions)


SURE = 1e-3  # the logits' own rounding, 32 times as large as elsewhere


@pytest.mark.parametrize("parameters", ["all", "lm_head"])
@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_a_sure_completion_keeps_its_digits(engine: str, parameters: str) -> None:
    model = tiny_model("qwen2")
    model.lm_head.weight.mul_(32)
    rows = sure_rows(model, 1e-8, 1e-6)
    counts = SUBSETS["head" if parameters == "lm_head" else "all"]
    truth = total(squares_of_reference(model, rows), counts)
    assert worst(norms(model, rows, parameters, engine), truth) <= SURE
    loop = total(squares_of_stock(model, rows), counts)
    assert worst(loop, truth) > 30 * SURE, "1 - p would do as well"


SURE_IN_FLOAT16 = 0.25  # of logits, rounding is 32 * 5e-4 there


@pytest.mark.parametrize("parameters", ["all", "lm_head"])
@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_a_sure_completion_does_not_vanish_in_float16(engine: str, parameters: str) -> None:
    model = tiny_model("qwen2", dtype=torch.float16)
    model.lm_head.weight.mul_(32)
    rows = sure_rows(model, 1e-13, 1e-10)
    counts = SUBSETS["head" if parameters == "lm_head" else "all"]
    truth = total(squares_of_reference(model, rows), counts)
    assert worst(norms(model, rows, parameters, engine), truth) <= SURE_IN_FLOAT16


def test_without_powers_of_two_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigor, "_LOWEST_EXPONENT", 0)
    for engine in ("packed", "autograd"):
        with pytest.raises(AssertionError, match=r"SURE_IN_FLOAT16|0\.25"):
            test_a_sure_completion_does_not_vanish_in_float16(engine, "lm_head")


def test_large_float16_gradients_find_room() -> None:
    """The sum over 200 rows of one token would pass 65504; the mean does not."""
    model = tiny_model("llama", dtype=torch.float16)
    model.model.norm.weight.mul_(2000)
    model.lm_head.weight.div_(2000)
    rows = Rows([[1, 2]], [[7] * 200])
    truth = total(squares_of_reference(model, rows), SUBSETS["head"])
    for engine in ("packed", "autograd"):
        assert worst(norms(model, rows, "lm_head", engine), truth) <= 0.01
