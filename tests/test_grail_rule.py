"""From saliencies to weights: by hand, by other transcriptions, and through a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grail_runs
import pytest
import torch
from grail_cases import CASES, TOLERANCE
from grail_runs import FLOAT64, Rows, ids_of, spans_of_every_kind
from hypothesis import given
from hypothesis import strategies as st
from official_rules import grail_weights
from tiny_models import tiny_model

from g2r_fast import grail
from g2r_fast.answer_spans import AnswerSpan
from g2r_fast.errors import InputError
from g2r_fast.grail import saliency_weights
from g2r_fast.reference import ReferenceDecoder, answer_saliency, answer_weights

ran = grail_runs.ran


def official(saliency: Any, span: Any, content: Any, advantage: Any, **options: Any) -> Any:
    """The rule of the official code as somebody else transcribed it, who never saw ours."""
    values = torch.as_tensor(saliency, dtype=torch.float64)
    if span is None:
        return grail_weights(None, None, advantage, length=len(values), **options).tolist()
    return grail_weights(values, (span[0], *content, span[1]), advantage, **options).tolist()


# rule(saliency, span, content, advantage, *, polarity, overrides, after_span) -> T numbers.
TRANSCRIPTIONS: dict[str, Callable[..., Any]] = {"reference": answer_weights, "official": official}


def pairs(span: AnswerSpan | None) -> tuple[Any, Any]:
    if span is None:
        return None, None
    return (span.start, span.stop), (span.content_start, span.content_stop)


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    case = CASES[name]
    found = saliency_weights(case.saliency, case.span, case.advantage, **case.options)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(case.weights, rel=TOLERANCE, abs=0)


@pytest.mark.parametrize("transcription", TRANSCRIPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_transcriptions_by_hand(name: str, transcription: str) -> None:
    case = CASES[name]
    rule = TRANSCRIPTIONS[transcription]
    found = rule(case.saliency, *pairs(case.span), case.advantage, **case.options)
    assert list(found) == pytest.approx(case.weights, rel=TOLERANCE, abs=0)


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[float], AnswerSpan | None]:
    length = draw(st.integers(0, 12))
    values = st.one_of(st.just(0.0), st.floats(1e-12, 1e3))
    s = draw(st.lists(values, min_size=length, max_size=length))
    if length == 0 or draw(st.booleans()):
        return s, None
    start = draw(st.integers(0, length - 1))
    stop = draw(st.integers(start + 1, length))
    inner = sorted(draw(st.tuples(st.integers(start, stop), st.integers(start, stop))))
    return [*s[:stop], *[0.0] * (length - stop)], AnswerSpan(start, *inner, stop)


@pytest.mark.parametrize("transcription", TRANSCRIPTIONS)
@given(
    responses(),
    st.sampled_from([-1.5, 0.0, 2.0]),
    st.sampled_from(grail.POLARITIES),
    st.booleans(),
    st.sampled_from(grail.AFTER_SPAN),
)
def test_equals_the_transcriptions(
    transcription: str,
    response: tuple[list[float], AnswerSpan | None],
    advantage: float,
    polarity: str,
    overrides: bool,
    after_span: str,
) -> None:
    s, span = response
    options: dict[str, Any] = {
        "polarity": polarity, "overrides": overrides, "after_span": after_span,
    }  # fmt: skip
    found = saliency_weights(torch.tensor(s, dtype=torch.float64), span, advantage, **options)
    expected = TRANSCRIPTIONS[transcription](s, *pairs(span), advantage, **options)
    assert found.tolist() == pytest.approx(list(expected), rel=FLOAT64, abs=0)
    assert found.shape == (len(s),) and bool(((found >= 0.5) & (found <= 5.0)).all())


def test_float32_saliencies_lose_nothing_in_the_rule() -> None:
    """Of equal ones, std is 1e-4: float32 would make z-scores of rounding errors."""
    s = torch.full((50,), 0.3)
    weights = saliency_weights(s, AnswerSpan(49, 49, 50, 50), polarity="both", overrides=False)
    assert (weights - 1).abs().max() < 1e-9


@pytest.mark.parametrize("tail", [5, 20, 60])
def test_the_tail_sets_the_scale(tail: int) -> None:
    """What docs/grail.md warns of: saliencies that differ fourfold, weights that do not."""
    s = torch.cat([torch.linspace(0.1, 0.4, 20), torch.zeros(tail)])
    q = tail / len(s)
    span = AnswerSpan(19, 19, 20, 20)
    weights = saliency_weights(s, span, polarity="both", overrides=False)[:20]
    near = 1 + 0.5 * (q / (1 - q)) ** 0.5
    assert weights.tolist() == pytest.approx([near] * 20, rel=0.08, abs=0)
    apart = saliency_weights(s, span, polarity="both", overrides=False, after_span="excluded")[:20]
    assert float(apart.max() - apart.min()) > 1


# Through a model ---------------------------------------------------------------------------------

ADVANTAGES = [-1.0, 0.5, -0.5, 0.0, 1.0, -2.0, 0.5, -1.0, -0.25]


@pytest.mark.parametrize("polarity", grail.POLARITIES)
@pytest.mark.parametrize("overrides", [True, False])
@pytest.mark.parametrize("after_span", grail.AFTER_SPAN)
def test_weights_of_a_batch(polarity: str, overrides: bool, after_span: str) -> None:
    """Against the reference from the ids on; one row without an answer, one without a token."""
    model = tiny_model("qwen3", dtype=torch.float64)
    reference = ReferenceDecoder.from_model(model)
    rows = spans_of_every_kind()
    spans: list[Any] = [
        AnswerSpan(a, min(a + 1, b), max(min(a + 1, b), b - 1), b) for a, b in rows.spans
    ]
    spans[1] = rows.spans[1]  # a plain pair: all content
    spans[3] = None
    completions = [*rows.completion_ids, []]
    prompts, spans = [*rows.prompt_ids, ids_of(3, 4)], [*spans, None]
    advantages = [*ADVANTAGES, 1.0]
    options: dict[str, Any] = {
        "polarity": polarity, "overrides": overrides, "after_span": after_span,
    }  # fmt: skip
    found = grail.token_weights(
        model, prompts, completions, spans, advantages, leaf="first", temperature=0.7, **options
    )
    for i, weights in enumerate(found):
        assert weights.dtype == torch.float32 and weights.shape == (len(completions[i]),)
        if spans[i] is None:
            assert bool((weights == 1).all())
            continue
        span, content = rows.spans[i], rows.spans[i]
        if isinstance(spans[i], AnswerSpan):
            span, content = pairs(spans[i])
        s = answer_saliency(reference, prompts[i], completions[i], span, leaf=1, temperature=0.7)
        expected = answer_weights(s, span, content, advantages[i], **options)
        assert weights.tolist() == pytest.approx(expected, rel=2**-23, abs=0)


def test_rows_without_need_are_not_run(ran: list[Any]) -> None:
    """No span, excluded by polarity, no token: nothing of them goes to the engine."""
    model, rows = tiny_model("llama"), spans_of_every_kind()
    spans = [None if i == 2 else span for i, span in enumerate(rows.spans)]
    arguments = (model, rows.prompt_ids, rows.completion_ids, spans)
    for polarity, wanted in (
        ("wrong", [0, 3, 5, 7, 8]),
        ("correct", [1, 4, 6]),
        ("both", [0, 1, 3, 4, 5, 6, 7, 8]),
    ):
        grail.token_weights(*arguments, ADVANTAGES, polarity=polarity)
        labels = [sequence.label for sequence in ran[-1].sequences]
        assert labels == [f"row {i}" for i in wanted]
    grail.token_weights(*arguments, [1.0] * 9)
    assert ran[-1].sequences == [] and ran[-1].done.rows_forward == 0


def test_advantages_come_in_every_form() -> None:
    model, rows = tiny_model("llama"), spans_of_every_kind()
    arguments = (model, rows.prompt_ids, rows.completion_ids, rows.spans)
    expected = grail.token_weights(*arguments, ADVANTAGES)
    tensor = torch.tensor(ADVANTAGES)
    for advantages in (tensor, tensor.numpy(), list(tensor), list(tensor.numpy()), tuple(tensor)):
        assert all(map(torch.equal, grail.token_weights(*arguments, advantages), expected))
    both = grail.token_weights(*arguments, None, polarity="both")
    assert all(map(torch.equal, grail.token_weights(*arguments, [0.0] * 9), both))


def test_an_empty_batch() -> None:
    model = tiny_model("llama")
    assert grail.token_weights(model, [], [], [], []) == []
    assert grail.token_saliencies(model, [], [], []) == []


def test_nothing_requires_a_gradient_and_no_weight_has_one() -> None:
    model, rows = tiny_model("qwen2"), spans_of_every_kind()
    model.requires_grad_(True)
    for engine in ("packed", "autograd"):
        weights = grail.token_weights(
            model, rows.prompt_ids, rows.completion_ids, rows.spans, ADVANTAGES, engine=engine
        )
        assert not any(w.requires_grad for w in weights)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_what_a_trainer_has_switched_on(engine: str) -> None:
    model, rows = tiny_model("qwen2"), Rows([ids_of(4, 1)], [ids_of(6, 2)], [(2, 5)])
    arguments = (model, *vars(rows).values())
    (expected,) = grail.token_saliencies(*arguments, engine=engine)
    assert expected is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = grail.token_saliencies(*arguments, engine=engine)
    assert found is not None and torch.equal(found, expected)
    with torch.inference_mode():
        (found,) = grail.token_saliencies(*arguments, engine=engine)
    assert found is not None and torch.equal(found, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"polarity": "wrogn"}, "unknown polarity"),
        ({"after_span": "exclude"}, "unknown after_span"),
        ({"polarity": "correct", "advantage": None}, "the advantage is missing"),
    ],
)
def test_the_bare_rule_refuses_what_it_does_not_know(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"advantage": -1.0, **options}
    with pytest.raises(InputError, match=message):
        saliency_weights(torch.ones(3), AnswerSpan(1, 1, 2, 2), **arguments)
