"""GRAIL over batches: sharing, order, sizes, what is computed and what is not; bad arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import grail_runs
import pytest
import torch
from grail_runs import (
    FLOAT32,
    FLOAT64,
    PACKED_ALONE,
    STOCK,
    Ran,
    Rows,
    ids_of,
    reference_saliencies,
    saliencies,
    spans_of_every_kind,
    stock_saliencies,
    worst,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from g2r_fast import grail
from g2r_fast.answer_spans import AnswerSpan
from g2r_fast.errors import InputError, InputTypeError, UnsupportedModelError

ran = grail_runs.ran


def group(size: int, prompt: int = 6, seed: int = 0) -> Rows:
    """One prompt, ragged completions, an answer near the end of each."""
    lengths = [5 + (3 * i + seed) % 7 for i in range(size)]
    return Rows(
        [ids_of(prompt, 1 + seed)] * size,
        [ids_of(length, 100 + seed + i) for i, length in enumerate(lengths)],
        [(length - 4, length - 1) for length in lengths],
    )


# Invariances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_a_batch_is_its_rows_one_by_one(leaf: int, shift: int) -> None:
    model, rows = tiny_model("qwen3", dtype=torch.float64), spans_of_every_kind()
    options: dict[str, Any] = {"leaf": leaf, "shift": shift}
    alone = [saliencies(model, rows.at([i]), **options)[0] for i in range(len(rows))]
    assert worst(saliencies(model, rows, **options), alone) <= PACKED_ALONE


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_order_does_not_matter(engine: str) -> None:
    model, rows = tiny_model("qwen2", dtype=torch.float64), spans_of_every_kind()
    expected = saliencies(model, rows, engine)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    found = saliencies(model, rows.at(order), engine)
    assert worst(found, [expected[i] for i in order]) <= PACKED_ALONE


def test_max_tokens_does_not_matter(ran: list[Ran]) -> None:
    model, rows = tiny_model("llama", dtype=torch.float64), spans_of_every_kind()
    expected = saliencies(model, rows)
    most = max(len(s.input_ids) + s.backward_rows for s in ran[0].sequences)
    for max_tokens in (most, 2 * most, 1000):
        assert worst(saliencies(model, rows, max_tokens=max_tokens), expected) <= PACKED_ALONE
    assert ran[1].done.micro_batches > ran[2].done.micro_batches > ran[3].done.micro_batches == 1


def test_duplicates_are_equal_to_the_bit() -> None:
    model, rows = tiny_model("mistral"), spans_of_every_kind()
    twice = saliencies(model, rows.at([i // 2 for i in range(2 * len(rows))]))
    assert all(map(torch.equal, twice[::2], twice[1::2]))


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_groups(size: int) -> None:
    model, rows = tiny_model("qwen2", dtype=torch.float64), group(size)
    found = saliencies(model, rows, temperature=0.7)
    assert worst(found, reference_saliencies(model, rows, temperature=0.7)) <= FLOAT64


def test_two_groups_and_the_stock_loop() -> None:
    a, b = group(4), group(3, prompt=11, seed=5)
    rows = Rows(*(x + y for x, y in zip(vars(a).values(), vars(b).values(), strict=True)))
    model = tiny_model("llama")
    assert worst(saliencies(model, rows), stock_saliencies(model, rows)) <= STOCK


@pytest.mark.parametrize("length", [64, 4000])
def test_short_and_long_completions(length: int) -> None:
    model = tiny_model("qwen2", num_hidden_layers=2, max_position_embeddings=5000)
    rows = Rows([ids_of(8, 1)], [ids_of(length, 2)], [(length - 12, length - 3)])
    (found,), (expected,) = saliencies(model, rows), stock_saliencies(model, rows)
    assert worst([found], [expected]) <= STOCK
    assert bool((found[: length - 3] > 0).all()) and not found[length - 3 :].any()


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[Any]]:
    """Few different ids, so that rows begin alike in every way."""
    ids = st.integers(0, 2)
    prompts, completions, spans = [], [], []
    for _ in range(draw(st.integers(0, 5))):
        prompts.append(draw(st.lists(ids, min_size=1, max_size=3)))
        completions.append(draw(st.lists(ids, max_size=5)))
        length = len(completions[-1])
        span = None
        if length and draw(st.integers(0, 3)):
            start = draw(st.integers(0, length - 1))
            span = (start, draw(st.integers(start + 1, length)))
        spans.append(span)
    return prompts, completions, spans


@cache
def float64_model() -> Any:
    return tiny_model("qwen3", dtype=torch.float64)


@settings(max_examples=40)
@given(batches(), st.integers(0, 2), st.integers(0, 1), st.booleans())
def test_any_batch(batch: Any, leaf: int, shift: int, cut: bool) -> None:
    model = float64_model()
    max_tokens = 16 if cut else None
    found = grail.token_saliencies(
        model, *batch, leaf=leaf, shift=shift, engine="packed", max_tokens=max_tokens
    )
    some = [i for i, span in enumerate(batch[2]) if span is not None]
    assert [i for i, s in enumerate(found) if s is not None] == some
    if some:
        rows = Rows(*([values[i] for i in some] for values in batch))
        expected = reference_saliencies(model, rows, leaf=leaf, shift=shift)
        actual = [s for s in found if s is not None]
        assert worst(actual, expected) <= FLOAT64
    weights = grail.token_weights(model, *batch, [-1.0] * len(batch[0]), leaf=leaf, shift=shift)
    for completion, span, w in zip(batch[1], batch[2], weights, strict=True):
        assert w.shape == (len(completion),) and bool(w.isfinite().all())
        start, stop = (len(completion), len(completion)) if span is None else span
        assert bool((w[start:stop] == 5).all()) and bool((w[stop:] == 1).all())
        assert span is not None or bool((w == 1).all())


# What is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_that_are_computed(shift: int, ran: list[Ran]) -> None:
    """The prompt once; of each completion what comes before its span's last token; back from the
    prompt's last position."""
    prompt = ids_of(7, 1)
    completions = [[i, *ids_of(9 + i, 20 + i)] for i in range(4)]  # no common beginning
    spans = [(3, 6), (0, 10), (8, 9), (0, 2)]
    rows = Rows([prompt] * 4, completions, spans)
    saliencies(tiny_model("llama"), rows, shift=shift)
    ((sequences, done),) = [(r.sequences, r.done) for r in ran]
    for sequence, completion, (start, stop) in zip(sequences, completions, spans, strict=True):
        assert sequence.input_ids == [*prompt, *completion[: stop - 1]]
        assert sequence.reads == tuple(range(7 + start - 1, 7 + stop - 1))
        assert sequence.backward_start == 7 - shift
    assert done.rows_forward == 7 + sum(stop - 1 for _, stop in spans)
    assert done.rows_backward == sum(stop - 1 + shift for _, stop in spans)
    assert done.rows_unshared == 4 * 7 + sum(stop - 1 for _, stop in spans)


def test_an_answer_of_the_first_token_alone_needs_nothing_with_shift_0(ran: list[Ran]) -> None:
    rows = Rows([ids_of(4, 1)], [ids_of(3, 2)], [(0, 1)])
    (found,) = saliencies(tiny_model("llama"), rows, shift=0)
    assert found.tolist() == [0.0, 0.0, 0.0] and ran[0].sequences == []


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_engines_by_name(engine: str) -> None:
    model, rows = tiny_model("qwen2"), spans_of_every_kind()
    assert worst(saliencies(model, rows, engine), saliencies(model, rows, "auto")) <= FLOAT32


# Bad arguments -----------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "prompt_ids": [[1, 2], [3]],
    "completion_ids": [[4, 5, 6], [7]],
    "answer_spans": [(1, 2), None],
    "advantages": [-1.0, -1.0],
}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fewer completions": ({"completion_ids": [[4]]}, InputError, "got completion_ids with 1"),
    "fewer spans": ({"answer_spans": [None]}, InputError, "got answer_spans with 1"),
    "one advantage is not broadcast": ({"advantages": [1.0]}, InputError, "got advantages with 1"),
    "a single span": ({"answer_spans": None}, InputTypeError, "answer_spans is not a list"),
    "an empty prompt": ({"prompt_ids": [[1], []]}, InputError, "row 1: a prompt is empty"),
    "an id too large": ({"completion_ids": [[4, 5, 97], [7]]}, InputError, "row 0: .*got 97"),
    "padding": ({"completion_ids": [[4, 5, -100], [7]]}, InputError, "row 0: .*got -100"),
    "too long": ({"completion_ids": [[4] * 255, [7]]}, InputError, "row 0: .*at most 256"),
    "no ids": ({"prompt_ids": ["ab", [3]]}, InputTypeError, "row 0: prompt_ids cannot be read"),
    "a span outside": (
        {"answer_spans": [None, (0, 2)]}, InputError, "row 1: an answer span lies outside",
    ),
    "a span out of order": (
        {"answer_spans": [AnswerSpan(1, 0, 2, 3), None]}, InputError, "row 0: .*out of order",
    ),
    "an empty span": ({"answer_spans": [(1, 1), None]}, InputError, "row 0: .*is empty"),
    "no span at all": ({"answer_spans": ["ab", None]}, InputTypeError, "row 0: .*cannot be read"),
    "no advantages": ({"advantages": None}, InputError, "advantages are missing"),
    "no number": ({"advantages": [1.0, "x"]}, InputTypeError, "no number; .*first at index 1"),
    "a bool": ({"advantages": [True, 1.0]}, InputTypeError, "no number; .*first at index 0"),
    "NaN": ({"advantages": [1.0, float("nan")]}, InputError, "not finite; .*first at index 1"),
    "infinity": (
        {"advantages": [float("inf"), 1.0], "polarity": "both"}, InputError, "an advantage is not",
    ),
    "a batch of advantages": ({"advantages": torch.ones(2, 1)}, InputTypeError, "no number"),
    "polarity": ({"polarity": "good"}, InputError, "unknown polarity; expected 'both' | 'correct'"),
    "after_span": ({"after_span": "zero"}, InputError, "unknown after_span; expected 'included'"),
    "overrides": ({"overrides": "no"}, InputError, "unknown overrides; expected True"),
    "a leaf's name": ({"leaf": "logits"}, InputError, "unknown leaf; expected 'embeddings'"),
    "a leaf of another kind": ({"leaf": 1.5}, InputError, "unknown leaf"),
    "a leaf that is a bool": ({"leaf": True}, InputError, "unknown leaf"),
    "the last hidden state": ({"leaf": 3}, InputError, "none of the model's.*0 <= leaf < 3; got 3"),
    "a leaf from the end": ({"leaf": -1}, InputError, "none of the model's hidden states"),
    "shift": ({"shift": 2}, InputError, "unknown shift; expected 0 | 1; got 2"),
    "a shift that is a bool": ({"shift": True}, InputError, "unknown shift"),
    "temperature": ({"temperature": 0.0}, InputError, "temperature is not positive"),
    "max_tokens": ({"max_tokens": 0}, InputError, "max_tokens is too small"),
    "max_tokens of a row": ({"max_tokens": 3}, InputError, "max_tokens; .*first at row 0"),
    "engine": ({"engine": "fast"}, InputError, "unknown engine"),
}  # fmt: skip
OF_WEIGHTS = ("advantages", "polarity", "after_span", "overrides")


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    change, error, message = BAD[name]
    model, arguments = tiny_model("llama"), {**GOOD, **change}
    with pytest.raises(error, match=message.replace(" | ", r" \| ")):
        grail.token_weights(model, **arguments)
    if not any(key in change for key in OF_WEIGHTS):
        del arguments["advantages"]
        with pytest.raises(error, match=message.replace(" | ", r" \| ")):
            grail.token_saliencies(model, **arguments)


def test_the_good_arguments_are_good() -> None:
    grail.token_weights(tiny_model("llama"), **GOOD)


def test_first_of_a_single_layer_is_what_enters_the_head() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(InputError, match="got 'first', hidden state 1"):
        grail.token_weights(model, **GOOD, leaf="first")


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_logits_that_are_not_finite(engine: str) -> None:
    model = tiny_model("llama")
    model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(InputError, match=r"not finite.*first at row 1"):
        grail.token_saliencies(model, [[1], [2]], [[3], [4]], [None, (0, 1)], engine=engine)


def test_gradients_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = grail.SaliencySignal.on_leaf
    monkeypatch.setattr(
        grail.SaliencySignal,
        "on_leaf",
        lambda self, rows, values, grads: plain(self, rows, values, grads * float("inf")),
    )
    with pytest.raises(InputError, match="gradients are not finite; first at row 1"):
        grail.token_saliencies(tiny_model("llama"), [[1], [2]], [[3], [4]], [None, (0, 1)])


def test_a_policy_that_drops() -> None:
    model = tiny_model("llama", attention_dropout=0.1).train()
    with pytest.raises(InputError, match="the policy is in train mode and has dropout"):
        grail.token_weights(model, **GOOD)


def test_a_named_engine_that_cannot_serve() -> None:
    from fallback_models import GPT2, model_of

    with pytest.raises(UnsupportedModelError, match="engine='packed' cannot serve"):
        grail.token_weights(model_of(GPT2), **GOOD, engine="packed")
