"""GRAIL's saliencies against the float64 reference, forward mode, and the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fallback_models import CONFIGS as OTHER_FAMILIES
from fallback_models import exact_model_of
from grail_runs import (
    FLOAT32,
    FLOAT64,
    PACKED_ALONE,
    SAME_MODULES,
    STOCK,
    Rows,
    errors,
    ids_of,
    many_rows,
    reference_saliencies,
    saliencies,
    spans_of_every_kind,
    stock_saliencies,
    worst,
)
from tiny_models import FAMILIES, tiny_model, tiny_variant
from torch import Tensor

from g2r_fast import decoder, grail
from g2r_fast.reference import ReferenceDecoder, answer_nll, answer_saliency

VARIANTS = ["llama", "llama-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "mistral"]
LEAVES = [0, 1, 2]  # of three layers
SHIFTS = [0, 1]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_the_reference(variant: str, leaf: int, shift: int) -> None:
    model, rows = tiny_variant(variant, dtype=torch.float64), spans_of_every_kind()
    options: dict[str, Any] = {"leaf": leaf, "shift": shift, "temperature": 0.7}
    found = saliencies(model, rows, **options)
    assert all(s.dtype == torch.float64 for s in found)
    assert worst(found, reference_saliencies(model, rows, **options)) <= FLOAT64


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32(variant: str, engine: str, leaf: int, shift: int) -> None:
    """Against float64, and against the loop that anybody writes."""
    model, rows = tiny_variant(variant), spans_of_every_kind()
    options: dict[str, Any] = {"leaf": leaf, "shift": shift, "temperature": 1.3}
    found = saliencies(model, rows, engine, **options)
    assert all(s.dtype == torch.float32 for s in found)
    assert worst(found, reference_saliencies(model, rows, **options)) <= FLOAT32
    assert worst(found, stock_saliencies(model, rows, **options)) <= STOCK


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_the_autograd_engine_in_float64_is_the_stock_loop(leaf: int, shift: int) -> None:
    """To the last digits; a Hugging Face model in float64 keeps its norms in float32, so the
    reference is further away."""
    model, rows = tiny_model("qwen3", dtype=torch.float64), spans_of_every_kind()
    found = saliencies(model, rows, "autograd", leaf=leaf, shift=shift)
    assert worst(found, stock_saliencies(model, rows, leaf=leaf, shift=shift)) <= SAME_MODULES
    assert worst(found, reference_saliencies(model, rows, leaf=leaf, shift=shift)) <= FLOAT32


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_families_that_only_autograd_knows(name: str) -> None:
    model, rows = exact_model_of(name), spans_of_every_kind()
    limit = SAME_MODULES if model.dtype == torch.float64 else STOCK
    for leaf in LEAVES:
        found = saliencies(model, rows, "autograd", leaf=leaf)
        assert worst(found, stock_saliencies(model, rows, leaf=leaf)) <= limit


@pytest.mark.parametrize("leaf", LEAVES)
def test_reverse_mode_equals_forward_mode(leaf: int) -> None:
    """d L / d m of states * m is gradient times value, by tangents and without any backward."""
    model = tiny_model("qwen2", dtype=torch.float64)
    reference = ReferenceDecoder.from_model(model)
    prompt, completion, span = ids_of(3, 1), ids_of(5, 2), (1, 4)
    states = reference.hidden_states(reference.embed([*prompt, *completion]))[leaf]

    def loss(scale: Tensor) -> Tensor:
        return answer_nll(reference, states * scale, prompt, completion, span, leaf=leaf)

    products = torch.func.jacfwd(loss)(torch.ones_like(states))
    expected = products.norm(dim=-1)[len(prompt) - 1 : -1]
    (found,) = saliencies(model, Rows([prompt], [completion], [span]), leaf=leaf)
    assert worst([found], [expected]) <= FLOAT64
    assert worst([answer_saliency(reference, prompt, completion, span, leaf=leaf)], [expected]) <= (
        FLOAT64
    )


def test_the_reference_against_central_differences() -> None:
    reference = ReferenceDecoder.from_model(tiny_model("llama", dtype=torch.float64))
    prompt, completion, span = ids_of(2, 1), ids_of(4, 2), (1, 3)
    embeds = reference.embed([*prompt, *completion])
    token, step = len(prompt), 1e-5
    products = []
    for h in range(embeds.shape[1]):
        around = []
        for sign in (1.0, -1.0):
            moved = embeds.clone()
            moved[token, h] += sign * step
            logits = reference.logits(moved, None) / 0.7
            around.append(
                -sum(
                    logits[len(prompt) + t - 1].log_softmax(0)[completion[t]] for t in range(*span)
                )
            )
        products.append((around[0] - around[1]) / (2 * step) * embeds[token, h])
    expected = torch.stack(products).norm()
    found = answer_saliency(reference, prompt, completion, span, temperature=0.7)
    assert worst([found[1:2]], [expected[None]]) <= 1e-6


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_near_as_the_plain_loop(
    family: str, dtype: torch.dtype, leaf: int
) -> None:
    """RMS of the errors over 36 sequences, against twice that of the same-dtype stock loop."""
    model, rows = tiny_model(family, dtype=dtype), many_rows()
    truth = reference_saliencies(model, rows, leaf=leaf)

    def rms(found: list[Tensor]) -> float:
        return float(torch.tensor(errors(found, truth)).square().mean().sqrt())

    loop = rms(stock_saliencies(model, rows, leaf=leaf))
    assert 3e-4 < loop < 0.2, "the loop is no yardstick here"
    for engine in ("packed", "autograd"):
        found = saliencies(model, rows, engine, leaf=leaf)
        assert all(s.dtype == torch.float32 and s.isfinite().all() for s in found)
        assert rms(found) <= 2 * loop


def sure_rows(model: Any, low: float = 1e-8, high: float = 1e-6) -> Rows:
    """Spans of one token each, for which 1 - p lies between these."""
    reference = ReferenceDecoder.from_model(model)
    prompts, completions = [], []
    for seed in range(80):
        ids = ids_of(8, 500 + seed)
        logits = reference.logits(reference.embed(ids))
        token = int(logits.argmax())
        others = torch.cat([logits[:token], logits[token + 1 :]]).logsumexp(0)
        if low < float(torch.sigmoid(others - logits[token])) < high:
            prompts.append(ids[:4])
            completions.append([*ids[4:], token])
    assert len(prompts) >= 4
    return Rows(prompts, completions, [(4, 5)] * len(prompts))


SURE = 1e-3  # the logits' own rounding, 32 times as large as elsewhere


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_a_sure_answer_keeps_its_digits(engine: str) -> None:
    model = tiny_model("qwen2")
    model.lm_head.weight.mul_(32)
    rows = sure_rows(model)
    truth = reference_saliencies(model, rows)
    assert worst(saliencies(model, rows, engine), truth) <= SURE
    assert worst(stock_saliencies(model, rows), truth) > 30 * SURE, "1 - p would do as well"


@pytest.mark.parametrize("elements", [97, 97 * 3])
def test_chunks_of_logits_may_split_a_span(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("qwen3", dtype=torch.float64), spans_of_every_kind()
    expected = saliencies(model, rows)
    monkeypatch.setattr(decoder, "_LOGIT_ELEMENTS", {"cpu": elements, "cuda": elements})
    assert worst(saliencies(model, rows), expected) <= PACKED_ALONE


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_a_sure_answer_does_not_vanish_in_float16(engine: str) -> None:
    model = tiny_model("qwen2", dtype=torch.float16)
    model.lm_head.weight.mul_(32)
    rows = sure_rows(model, 1e-13, 1e-10)
    assert worst(saliencies(model, rows, engine), reference_saliencies(model, rows)) <= 0.25


def test_without_powers_of_two_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grail, "_HIGHEST_EXPONENT", 0)
    with pytest.raises(AssertionError, match=r"0\.25"):
        test_a_sure_answer_does_not_vanish_in_float16("autograd")


@pytest.mark.parametrize(
    ("leaf", "number"), [("embeddings", 0), ("first", 1), ("middle", 2), ("last", 3)]
)
def test_leaves_by_name(leaf: str, number: int) -> None:
    model, rows = tiny_model("llama", num_hidden_layers=4), spans_of_every_kind()
    named, numbered = saliencies(model, rows, leaf=leaf), saliencies(model, rows, leaf=number)
    assert all(map(torch.equal, named, numbered))
    others = [saliencies(model, rows, leaf=n) for n in range(4) if n != number]
    assert all(worst(named, other) > 0.01 for other in others)


def test_a_model_of_one_layer() -> None:
    model, rows = tiny_model("qwen2", num_hidden_layers=1), spans_of_every_kind()
    for leaf in ("embeddings", "middle", "last"):
        found = saliencies(model, rows, leaf=leaf)
        assert worst(found, reference_saliencies(model, rows)) <= FLOAT32
