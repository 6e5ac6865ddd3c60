r"""Where a completion's tokens give its answer: the first complete `\boxed{…}`.

Brackets are matched in the text that the tokens say; which tokens say a character is known from
`decoding.py`, whatever the tokenizer cuts.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

from .alignment import CharacterSpan
from .checks import OTHER_TOKENIZER, at_row, check_lengths, token_ids
from .decoding import decode_with_spans
from .errors import InputError, InputTypeError

__all__ = ["AnswerSpan", "Marker", "find_answer_spans", "read_answer_span", "read_answer_spans"]

Marker: TypeAlias = "str | tuple[str, str]"

_CLOSING = {"{": "}", "(": ")", "[": "]", "<": ">"}


@dataclass(frozen=True)
class AnswerSpan:
    """Tokens [start, stop) of a completion give its answer, [content_start, content_stop) without
    the marker and what closes it."""

    start: int
    content_start: int
    content_stop: int
    stop: int


def find_answer_spans(
    tokenizer: Any, completion_ids: Sequence[Any], *, marker: Marker = "\\boxed{"
) -> list[AnswerSpan | None]:
    r"""`re.search(r"\\boxed\{.*?\}", tokenizer.decode(ids))`, braces matched, in tokens.

    The first complete answer of each completion (arXiv 2606.04889, official code); None where there
    is none.

    - *Complete*: the marker's bracket is closed, brackets of the same kind nesting. A marker that
      is never closed is no answer, and what it opens around a later one does not hide that: of
      `\boxed{ unclosed ... \boxed{2}` the answer is `\boxed{2}`. Of `\boxed{\boxed{1}}` it is all.
    - An escaped bracket, one behind an odd number of backslashes, is text, so that
      `\boxed{\left\{1\right.}` is complete. (Choice: TeX's rule; to count them all differs only
      where they are not balanced.)
    - Empty content is an answer without content: `content_start == content_stop`.
    - A token that says any character of `\boxed{…}` belongs to the span, and one that says any
      character of the content is content, also where it says a part of the marker or of what
      follows (`{4`, `2}$.`). (Choice: the answer keeps all its tokens.) A token without text, as
      the first bytes of a character are with some tokenizers, goes with what follows it.
    - Control tokens say their own names.

    Args:
        tokenizer: the policy's, fast or slow.
        completion_ids: N lists of token ids.
        marker: text that ends in an opening bracket, `{`, `(`, `[` or `<`, or a pair of texts such
            as `("<answer>", "</answer>")`. Of a pair, the two texts nest, and no escapes are known.

    Time O(T). Raises InputError for a marker without an opening bracket, empty texts, negative ids;
    InputTypeError for what is no list of ids and what is no marker.
    """
    scanner = _Scanner(marker)
    check_lengths(completion_ids=completion_ids)
    found: list[AnswerSpan | None] = []
    for row, value in enumerate(completion_ids):
        with at_row(row):
            ids = token_ids(value)
            if ids is None:
                raise InputTypeError(
                    "completion_ids cannot be read",
                    expected="N lists of token ids",
                    got=repr(value)[:80],
                )
            if min(ids, default=0) < 0:
                raise InputError(
                    "a completion's id is negative",
                    expected="0 <= id",
                    got=next(i for i in ids if i < 0),
                    index=next(i for i, token_id in enumerate(ids) if token_id < 0),
                    fix=OTHER_TOKENIZER,
                )
            found.append(_find(tokenizer, ids, scanner))
    return found


def read_answer_spans(spans: Sequence[Any], lengths: Sequence[int]) -> list[AnswerSpan | None]:
    """One for each completion, of that many tokens; errors name the row."""
    found = []
    for row, (span, length) in enumerate(zip(spans, lengths, strict=True)):
        with at_row(row):
            found.append(read_answer_span(span, length))
    return found


def read_answer_span(span: Any, length: int) -> AnswerSpan | None:
    """An AnswerSpan, or None, or a plain (start, stop) that is all content; of `length` tokens."""
    if span is None:
        return None
    values = token_ids(astuple(span) if isinstance(span, AnswerSpan) else span)
    if values is not None and len(values) == 2 and not isinstance(span, AnswerSpan):
        values = [values[0], *values, values[1]]
    if values is None or len(values) != 4:
        raise InputTypeError(
            "an answer span cannot be read",
            expected="AnswerSpan(start, content_start, content_stop, stop), (start, stop) or None",
            got=repr(span)[:80],
        )
    start, content_start, content_stop, stop = values
    if not 0 <= start <= content_start <= content_stop <= stop <= length:
        raise InputError(
            "an answer span lies outside its completion or is out of order",
            expected=f"0 <= start <= content_start <= content_stop <= stop <= {length}",
            got=tuple(values),
        )
    if start == stop:
        raise InputError(
            "an answer span is empty",
            expected="start < stop",
            got=tuple(values),
            fix="Give None for a completion without an answer.",
        )
    return AnswerSpan(start, content_start, content_stop, stop)


def _find(tokenizer: Any, ids: list[int], scanner: _Scanner) -> AnswerSpan | None:
    # Embeddings are padded beyond their tokenizer, and a policy can sample an id of the padding.
    size = len(tokenizer)
    known = [token_id for token_id in ids if token_id < size]
    text, places = decode_with_spans(tokenizer, known, lambda token_id: None)
    characters = scanner.first(text)
    if characters is None:
        return None
    if len(known) < len(ids):
        places = _with_silent(places, [token_id < size for token_id in ids])
    starts, ends = [start for start, _ in places], [end for _, end in places]
    start, content_start, content_stop, stop = characters

    def from_character(place: int) -> int:
        """The first token that says it; a token without text goes with what follows it."""
        return min(bisect_right(ends, place), bisect_left(starts, place))

    inner = from_character(content_start)
    outer = bisect_left(starts, content_stop) if content_start < content_stop else inner
    return AnswerSpan(from_character(start), inner, outer, bisect_left(starts, stop))


def _with_silent(places: Sequence[CharacterSpan], speaks: Sequence[bool]) -> list[CharacterSpan]:
    """Places of all ids from those of the ids that say something."""
    rest = iter(places)
    found: list[CharacterSpan] = []
    for says in speaks:
        end = found[-1][1] if found else 0.0
        found.append(next(rest) if says else (end, end))
    return found


class _Scanner:
    """Finds the first complete answer of a text."""

    def __init__(self, marker: Any) -> None:
        pair = isinstance(marker, (tuple, list)) and len(marker) == 2
        texts = list(marker) if pair else [marker]
        if not all(isinstance(text, str) for text in texts):
            raise InputTypeError(
                "marker cannot be read",
                expected="a str, or a pair of them: opening, closing",
                got=repr(marker)[:80],
            )
        if not all(texts):
            raise InputError("a marker is empty", expected="some text", got=repr(marker))
        self.brackets = not pair
        self.opening: str = texts[0]
        self.closing: str = texts[1] if pair else _closing_of(self.opening)
        others = [] if pair else [self.opening[-1]]
        # What closes comes first: then a pair of equal texts takes turns.
        words = [self.closing, self.opening] if pair else [self.opening, self.closing, *others]
        self.pattern = re.compile("|".join(map(re.escape, words)))

    def first(self, text: str) -> tuple[int, int, int, int] | None:
        """(start, content start, content stop, stop) in characters; every bracket is seen once."""
        opened: list[tuple[int, int] | None] = []  # markers as (start, stop); None: plain brackets
        markers = 0  # among them
        best: tuple[int, int, int, int] | None = None
        at = 0
        while (match := self.pattern.search(text, at)) is not None:
            word, (start, at) = match[0], match.span()
            if self.brackets and _escaped(text, at - 1):
                continue
            if word == self.closing and opened:
                marker = opened.pop()
                if marker is not None:
                    markers -= 1
                    if best is None or marker[0] < best[0]:
                        best = (*marker, start, at)
                    if not markers:  # nothing that began earlier can still be closed
                        return best
            elif word == self.opening:
                opened.append((start, at))
                markers += 1
            elif word != self.closing:
                opened.append(None)
        return best


def _closing_of(marker: str) -> str:
    if marker[-1] not in _CLOSING or _escaped(marker, len(marker) - 1):
        raise InputError(
            "a marker does not end in an opening bracket",
            expected="text that ends in " + ", ".join(_CLOSING),
            got=repr(marker),
            fix="Give a pair: (opening text, closing text).",
        )
    return _CLOSING[marker[-1]]


def _escaped(text: str, at: int) -> bool:
    """Whether the character there stands behind an odd number of backslashes."""
    first = at
    while first and text[first - 1] == "\\":
        first -= 1
    return (at - first) % 2 == 1
