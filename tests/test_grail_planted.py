"""Planted bugs in GRAIL: each is caught by the rule that is named for it, which passes without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grail_cases import CASES, TOLERANCE
from grail_runs import (
    FLOAT32,
    FLOAT64,
    PACKED_ALONE,
    Rows,
    ids_of,
    reference_saliencies,
    saliencies,
    spans_of_every_kind,
    whole,
    with_tail,
    worst,
)
from tiny_models import tiny_model
from torch import Tensor

from g2r_fast import grail
from g2r_fast.grail import SaliencySignal
from g2r_fast.plan import PackedSequence, Read
from g2r_fast.rollouts import Rollout
from g2r_fast.signal import Cotangents

# Rules -------------------------------------------------------------------------------------------


def the_reference() -> None:
    model, rows = tiny_model("qwen2", dtype=torch.float64), spans_of_every_kind()
    for engine, limit in (("packed", FLOAT64), ("autograd", FLOAT32)):
        found = saliencies(model, rows, engine, temperature=0.7)
        assert worst(found, reference_saliencies(model, rows, temperature=0.7)) <= limit


def one_by_one() -> None:
    model, rows = tiny_model("llama", dtype=torch.float64), spans_of_every_kind()
    alone = [saliencies(model, rows.at([i]))[0] for i in range(len(rows))]
    assert worst(saliencies(model, rows), alone) <= PACKED_ALONE


def behind_the_span() -> None:
    """Other tokens there, and more of them: the same bits in front, zeros behind."""
    model, rows = tiny_model("llama"), spans_of_every_kind()
    for found, other, (_, stop) in zip(
        saliencies(model, rows), saliencies(model, with_tail(rows, 70)), rows.spans, strict=True
    ):
        assert torch.equal(found[:stop], other[:stop])
        assert not found[stop:].any() and not other[stop:].any()


def by_hand() -> None:
    for name, case in CASES.items():
        found = grail.saliency_weights(case.saliency, case.span, case.advantage, **case.options)
        assert found.tolist() == pytest.approx(case.weights, rel=TOLERANCE, abs=0), name


def sure_answers() -> None:
    """Cotangents in float32 against float64, where 1 - p is 1e-8."""
    logits = torch.zeros(1, 97)
    logits[0, 3] = 23.0
    rows = Rows([ids_of(2, 1)], [[3]], [(0, 1)])
    signal = signal_of(rows)
    (sequence,) = signal.sequences
    reads = [_read(0, p) for p in sequence.reads]
    found = signal.cotangents(logits, reads)
    assert found is not None
    wide = logits.double()[0].softmax(0)
    wide[3] = -(wide.sum() - wide[3] if wide[3] < 0.5 else wide[torch.arange(97) != 3].sum())
    assert worst([found.values[0] / found.values[0].norm()], [wide / wide.norm()]) <= 1e-6


RULES = {f.__name__: f for f in (the_reference, one_by_one, behind_the_span, by_hand, sure_answers)}


def _read(sequence: int, position: int) -> Any:
    return Read(sequence, position, 0, position)


def signal_of(rows: Rows) -> SaliencySignal:
    rollouts = [
        Rollout(p, c, "row") for p, c in zip(rows.prompt_ids, rows.completion_ids, strict=True)
    ]
    return SaliencySignal(rollouts, [whole(*span) for span in rows.spans], 0, 1, 1.0)


# Bugs --------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def as_argument(**wrong: Any) -> Plant:
    """The signal is told something else than was asked for."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = SaliencySignal.__init__
        names = ("rollouts", "spans", "leaf", "shift", "temperature")

        def init(self: SaliencySignal, *arguments: Any) -> None:
            plain(self, **{**dict(zip(names, arguments, strict=True)), **wrong})

        patch.setattr(SaliencySignal, "__init__", init)

    return plant


def in_cotangents(change: Callable[[SaliencySignal, Any, Tensor], Tensor]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = SaliencySignal.cotangents

        def cotangents(self: SaliencySignal, logits: Tensor, reads: Any) -> Cotangents:
            found = plain(self, logits, reads)
            assert found is not None
            return replace(found, values=change(self, reads, found.values))

        patch.setattr(SaliencySignal, "cotangents", cotangents)

    return plant


def in_leaf(change: Callable[..., tuple[Any, Tensor, Tensor]]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = SaliencySignal.on_leaf
        patch.setattr(
            SaliencySignal, "on_leaf", lambda self, *arguments: plain(self, *change(*arguments))
        )

    return plant


def in_target(move: int) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        def target(self: SaliencySignal, read: Any) -> int:
            rollout = self._rollouts[read.sequence]
            ids = [*rollout.prompt_ids, *rollout.response_ids, 0]
            return ids[read.position + 1 + move]

        patch.setattr(SaliencySignal, "_target", target)

    return plant


def mean(signal: SaliencySignal, reads: Any, values: Tensor) -> Tensor:
    counts = [len(signal.sequences[read.sequence].reads) for read in reads]
    return values / torch.tensor(counts)[:, None]


def one_minus_p(signal: SaliencySignal, reads: Any, values: Tensor) -> Tensor:
    """p - 1 at the target, as float32 has it."""
    exponents = torch.tensor([signal._exponents[read.sequence] for read in reads])
    plain = values.ldexp(-exponents[:, None])
    target = torch.tensor([signal._target(read) for read in reads])
    rows = torch.arange(len(reads))
    plain[rows, target] = (1.0 + plain[rows, target]) - 1.0
    return plain.ldexp(exponents[:, None])


def first_lane_for_all(rows: Any, values: Tensor, grads: Tensor) -> tuple[Any, Tensor, Tensor]:
    return rows, values, grads[:, :1].expand_as(grads)


def longer(patch: pytest.MonkeyPatch) -> None:
    """Whole completions go to the engine, and all of their tokens from the span on are read."""
    plain = SaliencySignal.__init__

    def init(self: SaliencySignal, rollouts: Any, *arguments: Any) -> None:
        plain(self, rollouts, *arguments)
        self.sequences = [
            PackedSequence(
                [*r.prompt_ids, *r.response_ids[:-1]],
                s.backward_start,
                tuple(range(s.reads[0], len(r.prompt_ids) + len(r.response_ids) - 1)),
                s.label,
            )
            for r, s in zip(rollouts, self.sequences, strict=True)
        ]

    patch.setattr(SaliencySignal, "__init__", init)


def not_shifted(patch: pytest.MonkeyPatch) -> None:
    """Token t has the saliency of its own position."""
    plain = SaliencySignal.saliency
    patch.setattr(
        SaliencySignal,
        "saliency",
        lambda self, at: torch.cat([plain(self, at), torch.zeros(1)])[1:],
    )


def other_polarity(patch: pytest.MonkeyPatch) -> None:
    plain = grail._applies
    others = {"both": "both", "correct": "wrong", "wrong": "correct"}
    patch.setattr(grail, "_applies", lambda polarity, a: plain(others[polarity], a))


def in_rule(**wrong: Any) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = grail.saliency_weights
        patch.setattr(
            grail, "saliency_weights", lambda *a, **options: plain(*a, **{**options, **wrong})
        )

    return plant


def overrides_first(patch: pytest.MonkeyPatch) -> None:
    plain = grail.saliency_weights

    def rule(saliency: Tensor, span: Any, advantage: Any, **options: Any) -> Tensor:
        applies = grail._applies(options.get("polarity", "wrong"), advantage)
        weights = plain(saliency, span, advantage, **options)
        return weights if applies else torch.ones_like(weights)

    patch.setattr(grail, "saliency_weights", rule)


def constant(name: str, value: float) -> Plant:
    return lambda patch: patch.setattr(grail, name, value)


def sample_std(patch: pytest.MonkeyPatch) -> None:
    """Bessel's correction, by way of a mean over one token less."""
    plain = Tensor.mean

    def corrected(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found = plain(self, *arguments, **options)
        squares = self.ndim == 1 and len(self) > 1 and bool((self >= 0).all())
        return found * len(self) / (len(self) - 1) if squares else found

    patch.setattr(Tensor, "mean", corrected)


BUGS: dict[str, tuple[str, Plant]] = {
    "no index shift": ("the_reference", not_shifted),
    "mean instead of sum": ("the_reference", in_cotangents(mean)),
    "temperature forgotten": ("the_reference", as_argument(temperature=1.0)),
    "temperature forgotten in the chain rule": (
        "the_reference",
        in_cotangents(lambda signal, reads, values: values * 0.7),
    ),
    "another leaf": ("the_reference", as_argument(leaf=1)),
    "the token itself as its own target": ("the_reference", in_target(-1)),
    "the token after next as target": ("the_reference", in_target(1)),
    "0.1 % scale": ("the_reference", in_cotangents(lambda signal, reads, values: values * 1.001)),
    "gradient without value": (
        "the_reference",
        in_leaf(lambda rows, values, grads: (rows, torch.ones_like(values), grads)),
    ),
    "last column dropped": (
        "the_reference",
        in_leaf(lambda rows, values, grads: (rows, values[:, :-1], grads[..., :-1])),
    ),
    "every lane the first one's": ("one_by_one", in_leaf(first_lane_for_all)),
    "the whole completion read": ("behind_the_span", longer),
    "1 - p": ("sure_answers", in_cotangents(one_minus_p)),
    "tokens behind the span left out": ("by_hand", in_rule(after_span="excluded")),
    "overrides left out": ("by_hand", in_rule(overrides=False)),
    "overrides before polarity": ("by_hand", overrides_first),
    "the other polarity": ("by_hand", other_polarity),
    "sample std": ("by_hand", sample_std),
    "another floor": ("by_hand", constant("_FLOOR", 1e-6)),
    "another slope": ("by_hand", constant("_SLOPE", 0.501)),
    "another least": ("by_hand", constant("_LEAST", 0.49)),
    "another most": ("by_hand", constant("_MOST", 4.9)),
    "another weight of the content": ("by_hand", constant("_CONTENT", 4.0)),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_passes_as_it_is(rule: str) -> None:
    RULES[rule]()


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, plant = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        RULES[rule]()
