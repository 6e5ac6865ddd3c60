"""Batches that share prefixes in every way a trie can, for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiny_models import random_ids


@dataclass(frozen=True)
class Batch:
    """What attribute_tokens takes."""

    input_ids: list[list[int]]
    spans: list[tuple[int, int]]
    target_ids: list[int]

    @property
    def rows(self) -> list[tuple[list[int], tuple[int, int], int]]:
        return list(zip(self.input_ids, self.spans, self.target_ids, strict=True))


def _ids(length: int, seed: int) -> list[int]:
    ids: list[int] = random_ids(length, seed).tolist()
    return ids


def _batch(parts: list[tuple[list[int], list[int], list[int]]]) -> Batch:
    """(before, attributed, after) of each sequence."""
    return Batch(
        [[*a, *b, *c] for a, b, c in parts],
        [(len(a), len(a) + len(b)) for a, b, _ in parts],
        [(7 * i + 3) % 97 for i in range(len(parts))],
    )


def group() -> Batch:
    """One prompt, ragged responses, ragged items: the shape this library is for."""
    prompt = _ids(9, 1)
    return _batch(
        [(prompt, _ids(5 + 3 * i, 10 + i), _ids(3 + k, 20 + k)) for i in range(3) for k in range(3)]
    )


def alone() -> Batch:
    return _batch([(_ids(4, 1), _ids(6, 2), _ids(3, 3))])


def strangers() -> Batch:
    """Nothing shared, lengths far apart."""
    return _batch(
        [(_ids(2 * i, 30 + i), _ids(1 + 4 * i, 40 + i), _ids(2, 50 + i)) for i in range(4)]
    )


def twins() -> Batch:
    """The same sequence twice with two targets, and once more with the first."""
    parts = (_ids(5, 1), _ids(7, 2), _ids(3, 3))
    batch = _batch([parts, parts, parts])
    return Batch(batch.input_ids, batch.spans, [4, 11, 4])


def nested() -> Batch:
    """Sequences that begin other sequences, and read their logits in the middle of them."""
    ids = _ids(20, 1)
    return Batch([ids[:8], ids[:13], ids], [(3, 8), (3, 11), (3, 20)], [5, 6, 7])


def staggered() -> Batch:
    """One sequence, attributed from different tokens on: lanes join on the way back."""
    ids = _ids(14, 1)
    other = [*ids[:10], *_ids(4, 2)]
    return Batch([ids, ids, other, other], [(2, 14), (6, 9), (0, 10), (9, 14)], [5, 6, 7, 8])


def responses_share_a_beginning() -> Batch:
    """Responses that agree for a while, items that begin alike."""
    prompt, common, item = _ids(6, 1), _ids(5, 2), _ids(4, 3)
    return _batch(
        [
            (prompt, [*common, *_ids(2 + 2 * i, 10 + i)], [*item, *_ids(1 + k, 20 + k)])
            for i in range(3)
            for k in range(2)
        ]
    )


def short_spans() -> Batch:
    """Spans of one token and of none, at the start and at the very end."""
    ids = _ids(9, 1)
    return Batch([ids] * 4, [(0, 1), (8, 9), (4, 5), (0, 9)], [5, 6, 7, 8])


PATTERNS: dict[str, Callable[[], Batch]] = {
    f.__name__: f
    for f in (
        group,
        alone,
        strangers,
        twins,
        nested,
        staggered,
        responses_share_a_beginning,
        short_spans,
    )
}
