"""Can the words alone tell? A logistic regression over the bag of words of response and item.

`bag_of_words_accuracy(train, held_out)` = accuracy of `sigmoid(x @ w + b) > 0.5`, x the word
counts of the response, the word counts of the rubric item (kept apart) and the number of content
words the two share. With `pairs=True` also every (response word, item word) pair, hashed: that is
no bag of words any more, and it shows how far looking up keyword pairs gets.
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from generate import MAX_SENTENCES, Generator
from numpy.typing import NDArray

PAIR_BUCKETS = 1 << 18
Example = tuple[str, str, bool]  # response, rubric item, verdict


def examples(seed: int, count: int) -> list[Example]:
    """Balanced (response, item, verdict), lengths 1 to 7 alike, seen wordings."""
    generator = Generator(seed)
    found: list[Example] = []
    while len(found) < count:
        record = generator.record(1 + len(found) // 2 % MAX_SENTENCES, items=2)
        found += [(record.response, item.text, item.verdict) for item in record.items]
    return found[:count]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _features(
    found: list[Example], vocabulary: dict[str, int], pairs: bool
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Sparse rows (indices, values); words outside the vocabulary are left out."""
    rows = []
    overlap = len(vocabulary)
    for response, item, _ in found:
        said, asked = _words(response), _words(item)
        names = [f"said {w}" for w in said] + [f"asked {w}" for w in asked]
        ids = [vocabulary[name] for name in names if name in vocabulary]
        values = [1.0] * len(ids)
        ids.append(overlap)
        values.append(float(len(set(said) & set(asked))))
        if pairs:
            buckets = {
                zlib.crc32(f"{s}|{a}".encode()) % PAIR_BUCKETS
                for s in set(said)
                for a in set(asked)
            }
            ids += [overlap + 1 + b for b in buckets]
            values += [1.0] * len(buckets)
        rows.append((np.array(ids), np.array(values) / np.sqrt(len(ids))))
    return rows


def bag_of_words_accuracy(
    train: list[Example],
    held_out: list[Example],
    *,
    pairs: bool = False,
    epochs: int = 20,
    rate: float = 0.1,
    l2: float = 1e-4,
    seed: int = 0,
) -> float:
    """Accuracy on `held_out` of a logistic regression trained by AdaGrad on `train`."""
    names = {f"said {w}" for r, _, _ in train for w in _words(r)}
    names |= {f"asked {w}" for _, i, _ in train for w in _words(i)}
    vocabulary = {name: i for i, name in enumerate(sorted(names))}
    width = len(vocabulary) + 1 + (PAIR_BUCKETS if pairs else 0)
    weights, squares = np.zeros(width), np.full(width, 1e-8)
    bias = 0.0
    rows = _features(train, vocabulary, pairs)
    targets = np.array([verdict for _, _, verdict in train], dtype=float)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        for i in order.permutation(len(rows)):
            ids, values = rows[i]
            error = 1 / (1 + np.exp(-(values @ weights[ids] + bias))) - targets[i]
            gradient = error * values + l2 * weights[ids]
            np.add.at(squares, ids, gradient**2)
            np.add.at(weights, ids, -rate * gradient / np.sqrt(squares[ids]))
            bias -= 0.01 * error
    scores = [v @ weights[i] + bias > 0 for i, v in _features(held_out, vocabulary, pairs)]
    return float(
        np.mean([s == verdict for s, (_, _, verdict) in zip(scores, held_out, strict=True)])
    )
