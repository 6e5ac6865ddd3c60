"""Weights of GRAIL that were computed by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from g2r_fast.answer_spans import AnswerSpan

LOW = math.log(1e-8)  # of a saliency of zero
ROOT3 = math.sqrt(3.0)


@dataclass(frozen=True)
class Case:
    """One response: logarithms u of s + 1e-8, and the weights.

    std is sqrt(var + 1e-8), so that a z-score of 1 is 5e-9 less; hence TOLERANCE.
    """

    logs: list[float]
    span: AnswerSpan | None
    weights: list[float]
    advantage: float = -1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def saliency(self) -> Tensor:
        return torch.tensor([math.exp(u) - 1e-8 for u in self.logs], dtype=torch.float64)


TOLERANCE = 1e-7
PLAIN: dict[str, Any] = {"overrides": False}
BOX = AnswerSpan(1, 2, 3, 4)  # marker, content, closing

CASES: dict[str, Case] = {
    # mean 1, std 1
    "two tokens": Case([0, 2], AnswerSpan(0, 0, 2, 2), [0.5, 1.5], options=PLAIN),
    # mean 1, variance 3: z = -1 / sqrt(3) and sqrt(3)
    "population std": Case(
        [0, 0, 0, 4],
        AnswerSpan(3, 3, 4, 4),
        [1 - 0.5 / ROOT3] * 3 + [1 + 0.5 * ROOT3],
        options=PLAIN,
    ),
    # One of 101 lies 10 std above the mean, and then 10 below it.
    "at most 5": Case(
        [0] * 100 + [7], AnswerSpan(0, 0, 101, 101), [0.95] * 100 + [5.0], options=PLAIN
    ),
    "at least 0.5": Case(
        [0] * 100 + [-7], AnswerSpan(0, 0, 101, 101), [1.05] * 100 + [0.5], options=PLAIN
    ),
    "all alike": Case([3, 3, 3], AnswerSpan(0, 0, 3, 3), [1, 1, 1], options=PLAIN),
    "one token": Case([-2], AnswerSpan(0, 0, 1, 1), [1], options=PLAIN),
    # Behind the span: half of the tokens at log 1e-8, so z = 1 and -1 ...
    "tail included": Case(
        [0, 0, LOW, LOW], AnswerSpan(0, 0, 2, 2), [1.5, 1.5, 0.5, 0.5], options=PLAIN
    ),
    # ... or two tokens alike.
    "tail excluded": Case(
        [0, 0, LOW, LOW],
        AnswerSpan(0, 0, 2, 2),
        [1, 1, 1, 1],
        options={**PLAIN, "after_span": "excluded"},
    ),
    "tail excluded, spread": Case(
        [0, 2, LOW],
        AnswerSpan(0, 0, 2, 2),
        [0.5, 1.5, 1],
        options={**PLAIN, "after_span": "excluded"},
    ),
    # Overrides: content 5; marker, closing and behind 1; in front what it was.
    "overrides": Case([0, 2, 0, 2, 0, 2], BOX, [0.5, 1, 5, 1, 1, 1]),
    "overrides, no content": Case([0, 2], AnswerSpan(1, 1, 1, 2), [0.5, 1]),
    "overrides, tail excluded": Case(
        [0, 2, 0, 2, LOW], BOX, [0.5, 1, 5, 1, 1], options={"after_span": "excluded"}
    ),
    # Polarity, which the overrides come after.
    "wrong, A > 0": Case([0, 2, 0, 2], BOX, [1, 1, 1, 1], 0.5, PLAIN),
    "wrong, A = 0": Case([0, 2, 0, 2], BOX, [0.5, 1.5, 0.5, 1.5], 0.0, PLAIN),
    "wrong, A < 0": Case([0, 2, 0, 2], BOX, [0.5, 1.5, 0.5, 1.5], -0.5, PLAIN),
    "correct, A > 0": Case(
        [0, 2, 0, 2], BOX, [0.5, 1.5, 0.5, 1.5], 0.5, {**PLAIN, "polarity": "correct"}
    ),
    "correct, A = 0": Case([0, 2, 0, 2], BOX, [1, 1, 1, 1], 0.0, {**PLAIN, "polarity": "correct"}),
    "correct, A < 0": Case([0, 2, 0, 2], BOX, [1, 1, 1, 1], -1.0, {**PLAIN, "polarity": "correct"}),
    "both": Case([0, 2, 0, 2], BOX, [0.5, 1.5, 0.5, 1.5], 1.0, {**PLAIN, "polarity": "both"}),
    "overrides where polarity leaves w = 1": Case([0, 2, 0, 2, 0], BOX, [1, 1, 5, 1, 1], 0.5),
    # Fallback
    "no span": Case([0, 2, 4], None, [1, 1, 1]),
    "no span, no token": Case([], None, []),
}  # fmt: skip
