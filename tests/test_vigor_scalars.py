"""Gradient norms of any scalar of a sequence's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import native
from tiny_models import tiny_model, tiny_variant
from torch import Tensor
from vigor_runs import (
    FLOAT64,
    NATIVE_SIZES,
    PACKED_ALONE,
    STOCK,
    SUBSETS,
    Rows,
    ids_of,
    norms,
    rows_of_every_kind,
    stock_gradients,
    train_only,
    worst,
)

from g2r_fast import vigor
from g2r_fast.errors import InputError, InputTypeError
from g2r_fast.reference import ReferenceDecoder

__all__ = ["native"]

PROMPT = ids_of(5, 1)
IDS = [[*PROMPT, *ids_of(6, 2)], [*PROMPT, *ids_of(3, 3)], ids_of(1, 4), [7] * 8]
READS = [[4, 6, 9], [7], [0], [0, 1, 7]]

Scalar = Callable[[int, Tensor], Tensor]


def sum_of_logps(i: int, logits: Tensor) -> Tensor:
    tokens = torch.arange(len(logits)) * 3 + i
    return logits.log_softmax(-1)[torch.arange(len(logits)), tokens].sum()


def entropy(i: int, logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy().mean()


def one_logit(i: int, logits: Tensor) -> Tensor:
    return logits[-1, 11 + i]


def mixed_positions(i: int, logits: Tensor) -> Tensor:
    """Not a sum over positions; and one element rather than none."""
    p = logits.softmax(-1)
    return (p @ p.mT).square().sum().log().view(1)


def tiny(i: int, logits: Tensor) -> Tensor:
    return entropy(i, logits) * 1e-30


SCALARS: dict[str, Scalar] = {
    f.__name__: f for f in (sum_of_logps, entropy, one_logit, mixed_positions, tiny)
}


def of_stock(
    model: Any, scalar: Scalar, reads: list[list[int]] | None, trainable: bool = False
) -> list[float]:
    before = {p: p.requires_grad for p in model.parameters()}
    if not trainable:
        model.requires_grad_(True)
    found = []
    for i, ids in enumerate(IDS):
        at = slice(None) if reads is None else reads[i]

        def value(i: int = i, ids: list[int] = ids, at: Any = at) -> Tensor:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, at]
            return scalar(i, logits).sum()

        grads = stock_gradients(model, value)
        found.append(sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5)
    for parameter, required in before.items():
        parameter.requires_grad_(required)
    return found


@pytest.mark.parametrize("engine", ["native", "reference", "autograd"])
@pytest.mark.parametrize("reads", [None, READS], ids=["all positions", "some"])
@pytest.mark.parametrize("name", SCALARS)
def test_any_scalar(
    name: str,
    reads: Any,
    engine: str,
    native: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if engine != "autograd":
        monkeypatch.setenv("G2R_BACKEND", engine)
    for variant in ("llama-tied", "qwen3-biases"):
        model = tiny_variant(variant, **NATIVE_SIZES)
        found = vigor.scalar_gradient_norms(
            model,
            IDS,
            SCALARS[name],
            reads=reads,
            parameters="all",
            engine="autograd" if engine == "autograd" else "packed",
        )
        assert found.dtype == torch.float32 and not found.requires_grad
        assert worst(found, of_stock(model, SCALARS[name], reads)) <= STOCK


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_of_some_parameters(engine: str) -> None:
    model = tiny_model("qwen2")
    for counts in (SUBSETS["the middle layer"], SUBSETS["norms"], SUBSETS["head"]):
        train_only(model, counts)
        found = vigor.scalar_gradient_norms(model, IDS, entropy, reads=READS, engine=engine)
        assert worst(found, of_stock(model, entropy, READS, trainable=True)) <= STOCK


def test_the_mean_nll_as_a_scalar_is_vigors() -> None:
    """Without a line of the method's own cotangents."""
    model = tiny_model("mistral", dtype=torch.float64, tie_word_embeddings=True)
    rows = rows_of_every_kind()
    pairs = list(zip(rows.prompt_ids, rows.completion_ids, strict=True))

    def mean_nll(i: int, logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, torch.tensor(pairs[i][1]))

    found = vigor.scalar_gradient_norms(
        model,
        [[*p, *c[:-1]] for p, c in pairs],
        mean_nll,
        reads=[range(len(p) - 1, len(p) + len(c) - 1) for p, c in pairs],
        parameters="all",
        engine="packed",
    )
    assert worst(found, norms(model, rows)) <= PACKED_ALONE


@cache
def float64_model() -> Any:
    return tiny_model(
        "qwen3",
        dtype=torch.float64,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        attention_bias=True,
    )


def of_reference(model: Any, scalar: Scalar, sequence: Any, counts: Callable[[str], bool]) -> float:
    """Through the float64 decoder and autograd."""
    ids, reads = sequence
    decoder = ReferenceDecoder.from_model(model)
    leaves = {n: w.clone().requires_grad_(True) for n, w in decoder.weights.items()}
    leaves["head.weight"] = leaves["embed_tokens.weight"]
    live = {n: w for n, w in leaves.items() if n != "head.weight" and counts(f"model.{n}")}
    with torch.enable_grad():
        again = replace(decoder, weights=leaves)
        value = scalar(0, again.logits(again.embed(ids), None)[reads]).sum()
        grads = torch.autograd.grad(value, list(live.values()), allow_unused=True)
    return float(sum(g.square().sum() for g in grads if g is not None)) ** 0.5


# Few different ids: sequences begin alike, are the same with other reads, repeat themselves.
SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=6).flatmap(
        lambda ids: st.tuples(
            st.just(ids),
            st.sets(st.integers(0, len(ids) - 1), min_size=1).map(sorted),
        )
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(SEQUENCES, st.sampled_from(sorted(SUBSETS)), st.booleans())
def test_any_reads_of_any_batch(sequences: Any, subset: str, cut: bool) -> None:
    model = float64_model()
    if not train_only(model, SUBSETS[subset]):
        return
    found = vigor.scalar_gradient_norms(
        model,
        [ids for ids, _ in sequences],
        mixed_positions,
        reads=[reads for _, reads in sequences],
        engine="packed",
        max_tokens=24 if cut else None,
    )
    expected = [of_reference(model, mixed_positions, s, SUBSETS[subset]) for s in sequences]
    # Of a single token attention has no gradient but rounding.
    least = 1e-12 * of_reference(model, mixed_positions, sequences[0], SUBSETS["all"])
    pairs = list(zip(found.tolist(), expected, strict=True))
    assert all(a <= 10 * least for a, e in pairs if e <= least)
    pairs = [(a, e) for a, e in pairs if e > least]
    assert not pairs or worst(*zip(*pairs, strict=True)) <= FLOAT64


def test_positions_from_the_end_and_micro_batches() -> None:
    model = tiny_model("llama")
    last = [[len(ids) - 1] for ids in IDS]
    expected = vigor.scalar_gradient_norms(model, IDS, one_logit, reads=last, parameters="all")
    found = vigor.scalar_gradient_norms(
        model, IDS, one_logit, reads=[[-1]] * len(IDS), parameters="all", max_tokens=22
    )
    assert worst(found, expected) <= STOCK


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_a_scalar_without_slope_has_norm_zero(engine: str) -> None:
    found = vigor.scalar_gradient_norms(
        tiny_model("llama"), IDS, lambda i, x: (x * 0).sum(), parameters="all", engine=engine
    )
    assert found.tolist() == [0.0] * len(IDS)


def test_no_sequences() -> None:
    found = vigor.scalar_gradient_norms(tiny_model("llama"), [], entropy, parameters="all")
    assert found.shape == (0,)


# Bad arguments -----------------------------------------------------------------------------------


def of_the_policy(i: int, logits: Tensor) -> Tensor:
    """Requires a gradient, but not for the logits' sake."""
    return torch.ones((), requires_grad=True) * 2


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a function": ({"scalar": 3}, InputTypeError, "scalar is not a function; .*got int"),
    "a number": ({"scalar": lambda i, x: 1.0}, InputTypeError, "got float"),
    "detached": (
        {"scalar": lambda i, x: x.detach().sum()}, InputTypeError, "did not return a scalar",
    ),
    "of something else": ({"scalar": of_the_policy}, InputTypeError, "did not return a scalar"),
    "a vector": (
        {"scalar": lambda i, x: x.sum(0)}, InputTypeError, r"got Tensor \(97,\); first at row \d",
    ),
    "no ids": ({"input_ids": [[1, 2], "ab"]}, InputTypeError, "row 1: input_ids cannot be read"),
    "no list": ({"input_ids": None}, InputTypeError, "input_ids is not a list"),
    "an empty sequence": ({"input_ids": [[1, 2], []]}, InputError, "row 1: nothing is read"),
    "an id too large": ({"input_ids": [[1, 97], [3]]}, InputError, "row 0: .*got 97"),
    "too long": ({"input_ids": [[1, 2], [3] * 257]}, InputError, "row 1: .*at most 256"),
    "fewer reads": ({"reads": [[0]]}, InputError, "got reads with 1"),
    "reads in words": ({"reads": [[0], "b"]}, InputTypeError, "row 1: reads cannot be read"),
    "no reads": ({"reads": [[], [0]]}, InputError, "row 0: nothing is read"),
    "reads outside": ({"reads": [[0, 2], [0]]}, InputError, "row 0: a read position lies outside"),
    "reads that descend": ({"reads": [[1, 0], [0]]}, InputError, "row 0: read positions do not"),
    "reads twice": ({"reads": [[1, 1], [0]]}, InputError, "row 0: a position is read twice"),
    "a slope without end": (
        {"scalar": lambda i, x: (x - x.detach()).abs().sum().sqrt()},
        InputError,
        r"the scalar's gradient is not finite; .*first at row 0",
    ),
    "parameters": ({"parameters": "some"}, InputError, "unknown parameters"),
    "engine": ({"engine": "fast"}, InputError, "unknown engine"),
    "max_tokens": ({"max_tokens": 0}, InputError, "max_tokens is too small"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, engine: str) -> None:
    change, error, message = BAD[name]
    good: dict[str, Any] = {
        "input_ids": [[1, 2], [3]],
        "scalar": entropy,
        "parameters": "all",
        "engine": engine,
    }
    model = tiny_model("llama")
    vigor.scalar_gradient_norms(model, **good)
    with pytest.raises(error, match=message):
        vigor.scalar_gradient_norms(model, **{**good, **change})


def test_rows_of_a_batch_keep_their_numbers() -> None:
    """The scalar hears the caller's row, whatever the planner made of the order."""
    rows = Rows([[3], [1], [2]], [[4], [5], [6]])
    seen: dict[int, float] = {}

    def scalar(i: int, logits: Tensor) -> Tensor:
        return logits[0, rows.completion_ids[i][0]] * (i + 1)

    model = tiny_model("llama", dtype=torch.float64)
    found = vigor.scalar_gradient_norms(model, rows.prompt_ids, scalar, parameters="all")
    for i, ids in enumerate(rows.prompt_ids):
        (alone,) = vigor.scalar_gradient_norms(
            model, [ids], lambda _, x, i=i: scalar(i, x), parameters="all"
        )
        seen[i] = float(alone)
    assert worst(found, seen.values()) <= PACKED_ALONE


@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("parameters", ["all", "lm_head"])
def test_a_model_without_an_lm_head(parameters: str, engine: str) -> None:
    with pytest.raises(InputError, match="no LM head; expected a causal LM; got LlamaForSequence"):
        vigor.scalar_gradient_norms(
            tiny_model("llama", head="value"), [[1, 2]], entropy,
            parameters=parameters, engine=engine,
        )  # fmt: skip


def test_parameters_that_no_forward_uses() -> None:
    model = tiny_model("llama")
    model.v_head = torch.nn.Linear(32, 1)  # of a trainer's; and nothing else trains
    with (
        pytest.warns(UserWarning, match="slower autograd engine"),
        pytest.raises(InputError, match="no parameter that counts has a part in the logits"),
    ):
        vigor.scalar_gradient_norms(model, [[1, 2]], entropy)
