"""Planted bugs in VIGOR: each is caught by the rule that is named for it, which passes without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_vigor_batches import test_running_out_of_cuda_memory_counts_nothing_twice as out_of_memory
from test_vigor_batches import test_the_padding_row_gets_no_gradient as padding_row
from test_vigor_policies import test_some_of_the_adapters as some_of_the_adapters
from test_vigor_precision import test_a_sure_completion_keeps_its_digits as sure_completion
from test_vigor_precision import test_float16 as float16
from test_vigor_ranks import BY_HAND
from test_vigor_ranks import test_by_hand as rank_by_hand
from tiny_models import tiny_variant
from torch import Tensor
from vigor_runs import (
    FLOAT64,
    PACKED_ALONE,
    SUBSETS,
    norms,
    rows_of_every_kind,
    squares_of_reference,
    stock_head_norms,
    total,
    train_only,
    worst,
)

from g2r_fast import gradient_norms, ops, vigor
from g2r_fast.eager import norms as eager_norms
from g2r_fast.gradient_norms import NormSignal, Parameters, _EmbeddingGradient
from g2r_fast.plan import PackedSequence
from g2r_fast.rollouts import Rollout

# Rules -------------------------------------------------------------------------------------------


@cache
def truth(variant: str) -> Any:
    model = tiny_variant(variant, dtype=torch.float64)
    return squares_of_reference(model, rows_of_every_kind())


def of_reference(variant: str, subset: str = "all") -> None:
    model, counts = tiny_variant(variant, dtype=torch.float64), SUBSETS[subset]
    train_only(model, counts)
    found = norms(model, rows_of_every_kind(), "trainable")
    assert worst(found, total(truth(variant), counts)) <= FLOAT64


def the_reference() -> None:
    of_reference("qwen3-biases")


def tied_weights() -> None:
    of_reference("llama-tied")


def the_norms_weights() -> None:
    for subset in ("norms in front of attention", "norms of heads", "the final norm"):
        of_reference("qwen3-biases", subset)


def the_biases() -> None:
    for subset in ("biases", "biases of v", "k with its bias, and o"):
        of_reference("qwen3-biases", subset)


def small_blocks() -> None:
    """Of Gram matrices, so that there are some off the diagonal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager_norms, "_GRAM_ROWS", 3)
        patch.setattr(eager_norms, "gram_is_cheaper", lambda *sizes: True)
        of_reference("llama", "up and down")


def small_tiles() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager_norms, "_TILE_ELEMENTS", 160)
        patch.setattr(eager_norms, "gram_is_cheaper", lambda *sizes: False)
        of_reference("llama", "up and down")


def one_by_one() -> None:
    model, rows = tiny_variant("mistral", dtype=torch.float64), rows_of_every_kind()
    alone = torch.cat([norms(model, rows.at([i])) for i in range(len(rows))])
    assert worst(norms(model, rows), alone) <= PACKED_ALONE


def the_head_alone() -> None:
    model, rows = tiny_variant("llama-tied", dtype=torch.float64), rows_of_every_kind()
    # A float64 model of transformers keeps its norms in float32.
    for engine in ("packed", "autograd"):
        assert worst(norms(model, rows, "lm_head", engine), stock_head_norms(model, rows)) <= 1e-6


def the_padding_row() -> None:
    padding_row(tied=False)
    padding_row(tied=True)


def a_sure_completion() -> None:
    for engine in ("packed", "autograd"):
        sure_completion(engine, "all")


def half_precision() -> None:
    float16("qwen2", "packed")


def memory_that_runs_out() -> None:
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(60, patch)


def the_adapters() -> None:
    for half in (".lora_A.", ".lora_B."):
        some_of_the_adapters(half, "packed")


def ranks_by_hand() -> None:
    for name in BY_HAND:
        rank_by_hand(name)


RULES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        the_reference,
        tied_weights,
        the_norms_weights,
        the_biases,
        small_blocks,
        small_tiles,
        one_by_one,
        the_head_alone,
        the_padding_row,
        a_sure_completion,
        half_precision,
        memory_that_runs_out,
        the_adapters,
        ranks_by_hand,
    )
}

# Bugs --------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def around(owner: Any, name: str, change: Callable[..., Any]) -> Plant:
    """`change(plain, *arguments)` in place of what is there."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = getattr(owner, name)
        patch.setattr(owner, name, lambda *a, **options: change(plain, *a, **options))

    return plant


def in_cotangents(change: Callable[[int, Tensor, float], tuple[Tensor, float]]) -> Plant:
    """`change(tokens, values, factor)` of the mean NLL."""
    return around(
        vigor._MeanNll,
        "__call__",
        lambda plain, self, sequence, logits: change(
            len(self._rollouts[sequence].response_ids), *plain(self, sequence, logits)
        ),
    )


def one_minus_p(plain: Any, self: Any, sequence: int, logits: Tensor) -> tuple[Tensor, float]:
    ids = torch.tensor(self._rollouts[sequence].response_ids)
    values = logits.softmax(-1)
    values[torch.arange(len(ids)), ids] -= 1.0
    return values, 1.0 / len(ids)


def next_target(plain: Any, self: Any, sequence: int, logits: Tensor) -> tuple[Tensor, float]:
    """Every position predicts the token after next."""
    ids = list(self._rollouts[sequence].response_ids)
    moved = replace(self._rollouts[sequence], response_ids=[*ids[1:], ids[0]])
    found: tuple[Tensor, float] = plain(vigor._MeanNll({sequence: moved}), sequence, logits)
    return found


def without_prompt(plain: Any, self: Rollout, backward_start: int | None = None) -> Any:
    found = plain(self, backward_start)
    start = len(self.prompt_ids) - 1
    return found and PackedSequence(found.input_ids, start, found.reads, found.label)


def not_reset(plain: Any, self: NormSignal, logits: Tensor, reads: Any) -> Any:
    squares = self._squares.clone()
    found = plain(self, logits, reads)
    self._squares.copy_(squares)
    return found


def lower_half(plain: Any, a: Tensor, b: Tensor) -> Tensor:
    """Blocks below the diagonal do not stand for those above it too."""
    step = eager_norms._GRAM_ROWS
    total = a.new_zeros(())
    for i in range(0, len(a), step):
        for j in range(0, i + 1, step):
            rows, others = slice(i, i + step), slice(j, j + step)
            total += ((a[rows] @ a[others].T) * (b[rows] @ b[others].T)).sum()
    return total


def last_tile_left_out(plain: Any, a: Tensor, b: Tensor) -> Tensor:
    step = max(1, eager_norms._TILE_ELEMENTS // a.shape[1])
    return plain(a, b[:, : b.shape[1] // step * step])


def each_occurrence_apart(plain: Any, self: Any, ids: Any, *rest: Any) -> None:
    """Equal ids are squared before they are added."""
    plain(self, ids, *rest)
    self.ids, self._places = torch.tensor(ids), torch.arange(len(ids))


def without_cross_term(plain: Any, self: _EmbeddingGradient) -> Tensor:
    self.of_head = None
    return plain(self)


def cross_term_once(plain: Any, self: _EmbeddingGradient) -> Tensor:
    whole = plain(self)
    self.of_head = None
    return (whole + plain(self)) / 2


def cross_term_in_float32(plain: Any, self: _EmbeddingGradient) -> Tensor:
    if self.of_head is not None:
        self.of_head = self.of_head.float()
    return plain(self)


def parts_apart(plain: Any, self: NormSignal, name: str, products: Tensor, rows: Any) -> None:
    """The queries' and the keys' part of the last layer's first norm."""
    self._last_norm = ""
    plain(self, name, products, rows)


def rows_swapped(plain: Any, self: NormSignal, outputs: Any, a: Any, b: Any, rows: Any) -> None:
    plain(self, outputs, a, b, replace(rows, lanes=rows.lanes[::-1]))


def gradients_of_another(plain: Any, inputs: Tensor, grads: Tensor, rows: Any) -> Tensor:
    """Output gradients one row off: each meets the inputs of the row before."""
    return plain(inputs, grads, replace(rows, rows=rows.rows.roll(1)))


def without(kind: str) -> Plant:
    """A function of two that the signal uses finds nothing."""
    return around(gradient_norms, kind, lambda plain, *arguments: plain(*arguments) * 0)


def embedding_too(patch: pytest.MonkeyPatch) -> None:
    """The head's weight as the parameter that it is: with the embedding's part."""
    plain = Parameters.of
    patch.setattr(
        Parameters,
        "of",
        lambda policy, which: replace(plain(policy, which), head_only=False),
    )


def ranks(change: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Plant:
    return around(
        vigor,
        "rank_rewards",
        lambda plain, norms, lengths, size: plain(
            *change(torch.tensor(norms), torch.tensor(lengths), size), size
        ),
    )


def ties_the_other_way(plain: Any, norms: Any, lengths: Any, size: int) -> Tensor:
    turned = [torch.tensor(x).view(-1, size).flip(1).flatten() for x in (norms, lengths)]
    return plain(*turned, size).view(-1, size).flip(1).flatten()


BUGS: dict[str, tuple[str, Plant]] = {
    "the sum of the NLL": ("the_reference", in_cotangents(lambda n, v, f: (v, f * n))),
    "EOS not counted": ("the_reference", in_cotangents(lambda n, v, f: (v, f * n / (n + 1)))),
    "0.1 % scale": ("the_reference", in_cotangents(lambda n, v, f: (v * 1.001, f))),
    "another target": ("the_reference", around(vigor._MeanNll, "__call__", next_target)),
    "1 - p": ("a_sure_completion", around(vigor._MeanNll, "__call__", one_minus_p)),
    "the prompt left out": ("the_reference", around(Rollout, "sequence", without_prompt)),
    "every occurrence apart": (
        "the_reference", around(_EmbeddingGradient, "__init__", each_occurrence_apart),
    ),
    "cross term forgotten": (
        "tied_weights", around(_EmbeddingGradient, "square", without_cross_term),
    ),
    "cross term once": ("tied_weights", around(_EmbeddingGradient, "square", cross_term_once)),
    "cross term in float32": (
        "tied_weights", around(_EmbeddingGradient, "square", cross_term_in_float32),
    ),
    "padding row counted": (
        "the_padding_row",
        around(
            _EmbeddingGradient,
            "__init__",
            lambda plain, self, ids, padding, device: plain(self, ids, None, device),
        ),
    ),
    "padding row without a head": (
        "the_padding_row",
        around(
            vigor.NormSignal,
            "on_linear",
            lambda plain, self, outputs, inputs, grads, rows: plain(
                self,
                outputs,
                inputs,
                grads.index_fill(1, torch.tensor([5]), 0.0) if self._head in outputs else grads,
                rows,
            ),
        ),
    ),
    "a norm's parts squared apart": (
        "the_norms_weights", around(NormSignal, "on_scale", parts_apart),
    ),
    "the norms' weights left out": (
        "the_norms_weights", around(NormSignal, "on_scale", lambda plain, *arguments: None),
    ),
    "biases left out": ("the_biases", without("squared_row_sums")),
    "weights left out": ("the_biases", without("squared_gradient_norms")),
    "off the diagonal once": (
        "small_blocks", around(eager_norms, "_by_gram", lower_half),
    ),
    "the last tile left out": (
        "small_tiles", around(eager_norms, "_by_gradient", last_tile_left_out),
    ),
    "rows of another lane": ("one_by_one", around(NormSignal, "on_linear", rows_swapped)),
    "gradients one row off": (
        "the_reference", around(gradient_norms, "squared_gradient_norms", gradients_of_another),
    ),
    "the embedding's part in the head": ("the_head_alone", embedding_too),
    "powers of two forgotten": (
        "half_precision", around(ops, "_scaled_back", lambda plain, squares, rows: squares),
    ),
    "counted again after running out": (
        "memory_that_runs_out", around(NormSignal, "cotangents", not_reset),
    ),
    "an adapter's scale forgotten": (
        "the_adapters",
        around(
            NormSignal,
            "_add_adapter",
            lambda plain, self, adapter, *rest: plain(self, replace(adapter, scale=1.0), *rest),
        ),
    ),
    "without the length": ("ranks_by_hand", ranks(lambda n, t, size: (n, t.clamp(max=1)))),
    "the length without its root": ("ranks_by_hand", ranks(lambda n, t, size: (n, t**2))),
    "the largest is the best": (
        "ranks_by_hand",
        around(vigor, "rank_rewards", lambda plain, *arguments: -plain(*arguments)),
    ),
    "the last of equals first": (
        "ranks_by_hand", around(vigor, "rank_rewards", ties_the_other_way),
    ),
    "an empty completion the best": (
        "ranks_by_hand", ranks(lambda n, t, size: (n, t.clamp(min=1))),
    ),
    "groups forgotten": (
        "ranks_by_hand",
        around(
            vigor,
            "rank_rewards",
            lambda plain, norms, lengths, size: plain(norms, lengths, max(1, len(norms))),
        ),
    ),
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
