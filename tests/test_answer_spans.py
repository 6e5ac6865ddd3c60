"""Where the answer stands: brackets in text, characters in tokens of every kind of tokenizer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import TOKENIZERS, byte_bpe, byte_slow, unigram

from g2r_fast import answer_spans, decoding
from g2r_fast.answer_spans import AnswerSpan, find_answer_spans, read_answer_span
from g2r_fast.errors import InputError, InputTypeError


class Pieces:
    """A tokenizer whose id i says the i-th piece: tokens cut where a test wants them."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.calls: list[int] = []  # ids decoded at a time

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, ids: list[int], **_: Any) -> str:
        self.calls.append(len(ids))
        return "".join(self.pieces[i] for i in ids)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.pieces[token_id]


def one(tokenizer: Any, ids: Any, **options: Any) -> AnswerSpan | None:
    (span,) = find_answer_spans(tokenizer, [ids], **options)
    return span


def of_pieces(*pieces: str, **options: Any) -> tuple[int, int, int, int] | None:
    span = one(Pieces(*pieces), range(len(pieces)), **options)
    return span and (span.start, span.content_start, span.content_stop, span.stop)


def answer_in(text: str, **options: Any) -> tuple[str, str] | None:
    """(span, content) of a text whose tokens are its characters."""
    span = one(Pieces(*text), range(len(text)), **options)
    return span and (text[span.start : span.stop], text[span.content_start : span.content_stop])


# Which brackets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", (r"\boxed{42}", "42")),
        (r"\boxed{1} and \boxed{2}", (r"\boxed{1}", "1")),
        (r"\boxed{\frac{1}{2}}", (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}")),
        (r"\boxed{\boxed{1}}", (r"\boxed{\boxed{1}}", r"\boxed{1}")),
        (r"\boxed{ unclosed ... \boxed{2}", (r"\boxed{2}", "2")),
        (r"\boxed{\boxed{1} \boxed{2}", (r"\boxed{1}", "1")),
        (r"\boxed{\boxed{1} \boxed{2}}", (r"\boxed{\boxed{1} \boxed{2}}", r"\boxed{1} \boxed{2}")),
        (r"{ \boxed{3}", (r"\boxed{3}", "3")),
        (r"} \boxed{3}", (r"\boxed{3}", "3")),
        (r"\boxed{}", (r"\boxed{}", "")),
        (r"\boxed{ }", (r"\boxed{ }", " ")),
        # Escaped brackets are text, and a pair of backslashes escapes nothing.
        (r"\boxed{\{1\}}", (r"\boxed{\{1\}}", r"\{1\}")),
        (r"\boxed{\left\{1\right.}", (r"\boxed{\left\{1\right.}", r"\left\{1\right.")),
        (r"\boxed{[0,1\}}", (r"\boxed{[0,1\}}", r"[0,1\}")),
        (r"\boxed{a\\{b}}", (r"\boxed{a\\{b}}", r"a\\{b}")),
        (r"\boxed{1\\}", (r"\boxed{1\\}", r"1\\")),
        (r"\\boxed{1}", (r"\boxed{1}", "1")),  # as in a string of JSON
        # No answer.
        ("", None),
        ("nothing here", None),
        (r"\boxed{1", None),
        (r"\boxed{1\}", None),
        (r"\boxed{{1}", None),
        (r"\boxed 5", None),
        (r"\boxed {5}", None),
        (r"\fbox{5}", None),
    ],
)
def test_the_first_complete_box(text: str, expected: tuple[str, str] | None) -> None:
    assert answer_in(text) == expected


@pytest.mark.parametrize(
    ("marker", "text", "expected"),
    [
        ("answer(", "answer(f(x)) answer(2)", ("answer(f(x))", "f(x)")),
        ("A[", "A[x] A[y]", ("A[x]", "x")),
        ("<", "a <b<c>> d", ("<b<c>>", "b<c>")),
        ("{", r"\{ {1}", ("{1}", "1")),
        (("<answer>", "</answer>"), "<answer>4</answer>", ("<answer>4</answer>", "4")),
        (("<answer>", "</answer>"), "<answer>4} {</answer>", ("<answer>4} {</answer>", "4} {")),
        (("<a>", "</a>"), "<a>x<a>y</a>", ("<a>y</a>", "y")),
        (("<a>", "</a>"), "<a>x<a>y</a>z</a>", ("<a>x<a>y</a>z</a>", "x<a>y</a>z")),
        (("<a>", "</a>"), "</a><a>", None),
        (["#### ", "\n"], "#### 42\nmore", ("#### 42\n", "42")),
        (("**", "**"), "so **4** and **5**", ("**4**", "4")),
        (("**", "**"), "so **4", None),
        (("\\(", "\\)"), r"\(x\)", (r"\(x\)", "x")),
    ],
)
def test_other_markers(marker: Any, text: str, expected: tuple[str, str] | None) -> None:
    assert answer_in(text, marker=marker) == expected


def slow_answer(text: str) -> str | None:
    """The definition, in squares: for every marker, in turn, walk to where it is closed."""
    marker = "\\boxed{"
    for start in range(len(text)):
        depth, at = 1, start + len(marker)
        if not text.startswith(marker, start):
            continue
        while at < len(text):
            escaped = (at - len(text[:at].rstrip("\\"))) % 2 == 1
            depth += {"{": 1, "}": -1}.get(text[at], 0) if not escaped else 0
            at += 1
            if depth == 0:
                return text[start:at]
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\", "1", " "]), max_size=14))
def test_one_pass_equals_the_definition(parts: list[str]) -> None:
    text = "".join(parts)
    found = answer_in(text)
    assert (found and found[0]) == slow_answer(text)


# Which tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("x ", "\\boxed{", "4", "2", "}", "."), (1, 2, 4, 5)),
        (("x \\bo", "xed{", "42", "}"), (0, 2, 3, 4)),  # a token that lies partly in the span
        (("\\boxed", "{", "42", "}$.", "\n"), (0, 2, 3, 4)),
        (("\\boxed", "{4", "2", "}"), (0, 1, 3, 4)),  # marker and content: content
        (("\\boxed{", "4", "2}$."), (0, 1, 3, 3)),  # content and closing: content
        (("a\\boxed{42}b",), (0, 0, 1, 1)),
        (("\\boxed", "{}", "."), (0, 1, 1, 2)),  # no content
        (("\\boxed{", "}"), (0, 1, 1, 2)),
        (("\\boxed{4}",), (0, 0, 1, 1)),
        (("\\boxed{", "", "4", "", "}", ""), (0, 1, 3, 5)),  # tokens without text
        (("x", "", "\\boxed{4}", ""), (1, 2, 3, 3)),
        (("\\boxed{", "", "}"), (0, 1, 1, 3)),
    ],
)
def test_tokens_cut_anywhere(pieces: tuple[str, ...], expected: tuple[int, int, int, int]) -> None:
    assert of_pieces(*pieces) == expected


@given(st.data())
def test_any_cut_of_a_text(data: st.DataObject) -> None:
    """Token for token, by the definition: which say a character of it."""
    text = data.draw(st.sampled_from([r"so \boxed{4\frac{1}{2}}, or", r"\boxed{}!", r"\boxed{7}"]))
    places = range(len(text) + 1)
    cuts = sorted({0, len(text), *data.draw(st.lists(st.sampled_from(places), max_size=9))})
    tokens = list(pairwise(cuts))
    span = one(Pieces(*(text[a:b] for a, b in tokens)), range(len(tokens)))
    whole, content = answer_in(text) or ("", "")
    start = text.index(whole)
    inner = text.index("{") + 1

    def saying(first: int, last: int) -> list[int]:
        return [i for i, (a, b) in enumerate(tokens) if max(a, first) < min(b, last)]

    assert span is not None
    expected = saying(start, start + len(whole))
    assert (span.start, span.stop) == (expected[0], expected[-1] + 1)
    found = range(span.content_start, span.content_stop)
    assert span.start <= span.content_start <= span.content_stop <= span.stop
    expected = saying(inner, inner + len(content))
    assert (found.start, found.stop) == (expected[0], expected[-1] + 1) if expected else not found


# Real tokenizers ---------------------------------------------------------------------------------

TEXT = "hello \\boxed{a good world} and kind"


@pytest.mark.parametrize("name", [n for n in TOKENIZERS if "wordpiece" not in n])
def test_every_kind_of_tokenizer(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    span = one(tokenizer, ids)
    assert span is not None

    def said(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)

    assert "\\boxed{a good world}" in said(span.start, span.stop)
    assert "\\boxed{a good world}" not in said(span.start + 1, span.stop)
    assert "\\boxed{a good world}" not in said(span.start, span.stop - 1)
    assert "a good world" in said(span.content_start, span.content_stop)
    assert "a good world" not in said(span.content_start + 1, span.content_stop)
    assert "a good world" not in said(span.content_start, span.content_stop - 1)


def test_wordpiece_writes_blanks_where_none_were() -> None:
    """Its text of `\\boxed{4}` is `\\ boxed { 4 }`, in which there is no such marker."""
    tokenizer = TOKENIZERS["wordpiece"]()
    ids = tokenizer("so \\boxed{4}.", add_special_tokens=False).input_ids
    assert one(tokenizer, ids) is None


@pytest.mark.parametrize("make", [byte_bpe, byte_slow, lambda: unigram(byte_fallback=True)])
def test_characters_of_several_tokens(make: Any) -> None:
    """A snowman of three bytes before, in and behind the answer: each of its tokens belongs."""
    tokenizer = make()

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    before, marker, content, after = "☃𝟙", "\\boxed{", "☃𝟙", "}☃"
    ids = encode(before + marker + content + after)
    span = one(tokenizer, ids)
    assert span is not None
    inside = ids[span.content_start : span.content_stop]
    assert tokenizer.decode(inside) == "☃𝟙" and len(inside) == len(encode("{☃𝟙")) - len(encode("{"))
    assert len(inside) >= 5, "the test is about characters of several tokens"
    assert tokenizer.decode(ids[span.content_stop : span.stop]) == "}"
    assert tokenizer.decode(ids[: span.start]) == "☃𝟙"


def test_bytes_that_make_no_character_are_content() -> None:
    tokenizer = byte_bpe()
    ids = list(tokenizer("\\boxed{☃}", add_special_tokens=False).input_ids)
    before = len(tokenizer("\\boxed{", add_special_tokens=False).input_ids)
    span = one(tokenizer, ids[:before] + ids[before + 1 :])  # the first byte is missing
    assert span == AnswerSpan(0, before, len(ids) - 2, len(ids) - 1)


def test_control_tokens_say_their_names() -> None:
    tokenizer = byte_bpe()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    think = tokenizer.convert_tokens_to_ids("<think>")
    box = tokenizer("\\boxed{4}", add_special_tokens=False).input_ids
    assert one(tokenizer, [think, *box, end]) == AnswerSpan(
        1, 1 + len(box) - 2, 1 + len(box) - 1, 1 + len(box)
    )
    inner = one(tokenizer, [*box[:-1], end, box[-1]])
    assert inner is not None and inner.content_stop - inner.content_start == 2
    pair = one(tokenizer, [box[0], think, *box, end], marker=("<think>", "<|im_end|>"))
    assert pair == AnswerSpan(1, 2, 2 + len(box), 3 + len(box))


def test_ids_that_the_tokenizer_does_not_know_say_nothing() -> None:
    """Embeddings are padded beyond their tokenizer."""
    tokenizer = byte_bpe()
    box = tokenizer("\\boxed{4}", add_special_tokens=False).input_ids
    beyond = len(tokenizer) + 3
    span = one(tokenizer, box)
    assert span is not None
    padded = one(tokenizer, [beyond, box[0], beyond, *box[1:], beyond])
    assert padded == AnswerSpan(0, span.content_start + 2, span.content_stop + 2, span.stop + 2)


def test_a_batch_of_all_that_holds_ids() -> None:
    tokenizer = byte_bpe()
    ids = tokenizer("so \\boxed{4}", add_special_tokens=False).input_ids
    span = one(tokenizer, ids)
    assert span is not None
    batch = [ids, [], numpy.array(ids), torch.tensor(ids), ids[:-1], tuple(ids)]
    assert find_answer_spans(tokenizer, batch) == [span, None, span, span, None, span]
    assert find_answer_spans(tokenizer, []) == []


# Linear time -------------------------------------------------------------------------------------


def decoded_tokens(length: int) -> int:
    """Tokens that are decoded to find the answer at the end of a completion."""
    tokenizer = Pieces("word ", "\\boxed{", "4", "}", "€")
    one(tokenizer, [*([0, 4] * (length // 2)), 1, 2, 3])
    return sum(tokenizer.calls)


def test_a_completion_is_decoded_a_few_times_and_not_for_every_token() -> None:
    assert decoded_tokens(4000) <= 8 * 4000
    assert decoded_tokens(8000) <= 2.2 * decoded_tokens(4000)


def test_real_tokenizers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    plain = decoding._Decoder._decode

    def counting(self: Any, ids: list[int]) -> str:
        counted.append(len(ids))
        return plain(self, ids)

    monkeypatch.setattr(decoding._Decoder, "_decode", counting)
    for tokenizer in (byte_bpe(), byte_slow()):
        ids = tokenizer("☃ hello " * 900 + "\\boxed{42}", add_special_tokens=False).input_ids
        counted.clear()
        assert len(ids) >= 4000 and one(tokenizer, ids) is not None
        assert sum(counted) <= 40 * len(ids)  # windows of five, where bytes make characters


def test_brackets_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many markers stay open."""
    seen: list[int] = []
    plain = answer_spans._escaped
    monkeypatch.setattr(
        answer_spans, "_escaped", lambda text, at: (seen.append(at), plain(text, at))[1]
    )
    assert answer_in("\\boxed{" * 3000 + "1}") == ("\\boxed{1}", "1")
    assert len(seen) == 3001 + 1  # and the marker's own


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "error", "message"),
    [
        ("\\boxed", InputError, "does not end in an opening bracket; expected text that ends in {"),
        ("\\(", InputError, "does not end in an opening bracket"),
        ("", InputError, "a marker is empty"),
        (("<a>", ""), InputError, "a marker is empty"),
        (("<a>",), InputTypeError, "marker cannot be read"),
        (None, InputTypeError, "marker cannot be read"),
        ((1, 2), InputTypeError, "marker cannot be read"),
    ],
)
def test_bad_markers(marker: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_answer_spans(Pieces("a"), [[0]], marker=marker)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[0], "text"], InputTypeError, "row 1: completion_ids cannot be read"),
        ([[0], [0.5]], InputTypeError, "row 1: completion_ids cannot be read"),
        ([[0], [0, -100]], InputError, "row 1: .*negative.*got -100; first at index 1"),
        ("text", InputTypeError, "completion_ids is not a list"),
    ],
)
def test_bad_ids(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_answer_spans(Pieces("a"), ids)


@pytest.mark.parametrize(
    ("span", "error", "message"),
    [
        (AnswerSpan(2, 1, 3, 4), InputError, "out of order"),
        (AnswerSpan(0, 1, 3, 6), InputError, "lies outside its completion"),
        (AnswerSpan(-1, 1, 3, 4), InputError, "lies outside its completion"),
        ((3, 6), InputError, "lies outside its completion"),
        ((3, 2), InputError, "out of order"),
        ((2, 2), InputError, "an answer span is empty.*Give None"),
        ((1, 2, 3), InputTypeError, "cannot be read"),
        ((1, 2, 3, 4, 5), InputTypeError, "cannot be read"),
        ("ab", InputTypeError, "cannot be read"),
        (3, InputTypeError, "cannot be read"),
        (AnswerSpan(0, 1, 2, 3.5), InputTypeError, "cannot be read"),  # type: ignore[arg-type]
    ],
)
def test_bad_spans(span: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_answer_span(span, 5)


def test_spans_that_are_read() -> None:
    assert read_answer_span(None, 0) is None
    assert read_answer_span((1, 5), 5) == AnswerSpan(1, 1, 5, 5)
    assert read_answer_span(numpy.array([1, 5]), 5) == AnswerSpan(1, 1, 5, 5)
    assert read_answer_span(AnswerSpan(0, 1, 1, 2), 5) == AnswerSpan(0, 1, 1, 2)
