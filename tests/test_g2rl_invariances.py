"""What must not change a gradient feature: chunks, micro-batches, order, settings around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from g2rl_runs import (
    ENGINES,
    FLOAT32,
    RAGGED,
    Batch,
    batch,
    errors,
    features,
    hidden_states,
    of_hidden_states,
    reference,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor

from g2r_fast import decoder, engine, feature_sums, ops
from g2r_fast.errors import InputError
from g2r_fast.feature_sums import FeatureSums
from g2r_fast.g2rl import Features, gradient_features

# --- workspace, chunks, starting anew -------------------------------------------------------------


class Watched:
    """`ops` that remember the largest logits and sums that they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        self.logits, self.sums, self.calls = 0, 0, 0
        monkeypatch.setitem(feature_sums._ELEMENTS, "cpu", rows * 97)
        monkeypatch.setitem(decoder._LOGIT_ELEMENTS, "cpu", rows * 97)
        run = ops.residual_sums

        def residual_sums(logits: Tensor, *arguments: Any, **options: Any) -> Any:
            self.logits = max(self.logits, len(logits))
            self.sums = max(self.sums, len(arguments[4]))
            self.calls += 1
            return run(logits, *arguments, **options)

        monkeypatch.setattr(ops, "residual_sums", residual_sums)


@pytest.mark.parametrize("chosen", [*ENGINES, "hidden"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_chunk_of_logits_is_all_that_is_held(
    chosen: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And chunks, which cut sequences anywhere, change nothing."""
    policy = tiny_model("llama", dtype=torch.float64)
    of = batch(2, 4, (5, 0, 9, 1, 17))
    hidden = [hidden_states(policy, p, c) for p, c in zip(of.prompts, of.completions, strict=True)]

    def run() -> Features:
        if chosen == "hidden":
            return of_hidden_states(policy, hidden, of)
        return features(policy, of, engine=chosen)

    once = run()
    watched = Watched(monkeypatch, rows)
    found = run()
    total = sum(map(len, of.completions))
    assert 0 < watched.logits <= rows and watched.sums <= rows
    assert watched.calls >= total / rows
    for got, expected in zip(
        [found.features, *found.token_logps], [once.features, *once.token_logps], strict=True
    ):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    cuts=st.lists(st.integers(1, 5), min_size=1),
    rows=st.integers(1, 4),
    again=st.integers(0, 12),
)
@settings(max_examples=150)
def test_pieces_of_any_size_and_starting_anew(
    lengths: list[int], cuts: list[int], rows: int, again: int
) -> None:
    """Sums over any pieces are those of all at once, also where a run broke off and began again."""
    generator = torch.Generator().manual_seed(0)
    head = feature_sums.Linear(torch.randn(11, 16, generator=generator).double(), None)
    tokens = [torch.randint(11, (n,), generator=generator).tolist() for n in lengths]
    weights = [torch.rand(n, generator=generator).double() for n in lengths]
    logits = torch.randn(sum(lengths), 11, generator=generator).double()

    def pieces() -> list[list[tuple[int, int, int]]]:
        found, at = [], 0
        tokens_of = [(i, t) for i, n in enumerate(lengths) for t in range(n)]
        while at < len(tokens_of):
            part = tokens_of[at : at + cuts[at % len(cuts)]]
            at += len(part)
            stretches: list[tuple[int, int, int]] = []
            for i, t in part:
                if stretches and stretches[-1][0] == i:
                    stretches[-1] = (i, stretches[-1][1], stretches[-1][2] + 1)
                else:
                    stretches.append((i, t, 1))
            found.append(stretches)
        return found

    def run(sums: FeatureSums, calls: int | None) -> None:
        at = 0
        for stretches in pieces()[:calls]:
            count = sum(n for *_, n in stretches)
            sums.add(logits[at : at + count], stretches)
            at += count

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(feature_sums._ELEMENTS, "cpu", rows * 11)
        sums = FeatureSums(head, tokens, weights, 0.7)
        run(sums, again)
        run(sums, None)
        found, logps, _ = sums.finish()
    for row, part in enumerate(logits.split(lengths)):
        p = (part / 0.7).softmax(-1)
        left = torch.nn.functional.one_hot(torch.tensor(tokens[row], dtype=torch.int64), 11) - p
        expected = (weights[row] @ left) @ head.weight
        assert (found[row] - expected).norm() <= 1e-12 * max(1.0, float(expected.norm()))
        assert len(logps[row]) == lengths[row]


def test_a_run_that_ran_out_of_memory_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_model("llama", dtype=torch.float64)
    once = features(policy, RAGGED)
    attempt, broken = engine.PackedEngine._attempt, []

    def breaks_off(self: Any, plan: Any, signal: Any) -> int | None:
        done = attempt(self, plan, signal)
        if len(broken) < 2:
            broken.append(plan)
            return None  # after everything was shown to the signal
        return done

    monkeypatch.setattr(engine.PackedEngine, "_attempt", breaks_off)
    with pytest.warns(ResourceWarning, match="out of CUDA memory"):
        found = features(policy, RAGGED)
    assert len(broken) == 2
    assert (found.features - once.features).norm() <= 1e-12 * once.features.norm()


def _not_set_to_zero(self: FeatureSums, sequence: int) -> None:
    before = self._sums.clone()
    BEGIN(self, sequence)
    self._sums.copy_(before)


def _without_the_last_rows(self: FeatureSums, logits: Tensor, stretches: Any) -> None:
    REDUCE(self, logits[:-1], [(*s[:2], s[2] - (s is stretches[-1])) for s in stretches])


def _never_flushed_in_between(self: FeatureSums, sequence: int) -> None:
    if not self._free and sequence not in self._slots:
        self._free.append(self._slots.pop(next(iter(self._slots))))
    BEGIN(self, sequence)


BEGIN, REDUCE = FeatureSums._begin, FeatureSums._reduce


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("_begin", _not_set_to_zero),
        ("_begin", _never_flushed_in_between),
        ("_reduce", _without_the_last_rows),
    ],
)
def test_bugs_planted_into_the_sums_are_caught(
    name: str, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the tests above compare: small chunks, and all at once by another way."""
    policy = tiny_model("llama", dtype=torch.float64)
    truth = reference(policy, RAGGED)

    def right() -> bool:
        found = features(policy, RAGGED, engine="packed")
        return max(errors(found, truth)) <= 1e-10

    Watched(monkeypatch, 2)
    assert right()
    monkeypatch.setattr(FeatureSums, name, planted)
    try:
        caught = not right()
    except InputError:  # tokens that never came
        caught = True
    assert caught


# --- what must not matter -------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [23, 40])
def test_micro_batches_and_order(max_tokens: int) -> None:
    policy = tiny_model("qwen3", dtype=torch.float64)
    once = features(policy, RAGGED)
    cut = features(policy, RAGGED, max_tokens=max_tokens, engine="packed")
    assert (cut.features - once.features).norm() <= 1e-12 * once.features.norm()
    order = [6, 0, 3, 7, 1, 5, 2, 4]
    assert RAGGED.weights is not None
    moved = Batch(
        *([x[i] for i in order] for x in (RAGGED.prompts, RAGGED.completions, RAGGED.weights))
    )
    found = features(policy, moved)
    assert (found.features - once.features[order]).norm() <= 1e-12 * once.features.norm()
    assert all(
        len(a) == len(RAGGED.completions[i]) for a, i in zip(found.token_logps, order, strict=True)
    )


def test_weights_count_only_relative_to_each_other() -> None:
    policy = tiny_model("llama", dtype=torch.float64)
    assert RAGGED.weights is not None
    once = features(policy, RAGGED)
    for factor in (1e-300, 0.25, 1e300):
        scaled = [w.double() * factor for w in RAGGED.weights]
        found = features(policy, RAGGED, token_weights=scaled)
        assert (found.features - once.features).norm() <= 1e-12 * once.features.norm()
    # A weight of 0 leaves a token out; equal ones are none.
    ones = features(policy, RAGGED, token_weights=[[3] * len(w) for w in RAGGED.weights])
    none = features(policy, RAGGED, token_weights=None)
    assert (ones.features - none.features).norm() <= 1e-12 * none.features.norm()
    last = [[0.0] * (len(w) - 1) + [1.0] * bool(len(w)) for w in RAGGED.weights]
    (alone,) = (features(policy, RAGGED, token_weights=last).features[2:3],)
    p, c = RAGGED.prompts[2], RAGGED.completions[2]
    one = features(policy, Batch([p + c[:-1]], [c[-1:]])).features
    assert (alone - one).norm() <= 1e-12 * one.norm()


def test_no_gradient_and_no_trace_of_the_policy() -> None:
    policy = tiny_model("llama").requires_grad_(True)
    for chosen in ENGINES:
        with torch.autocast("cpu", torch.bfloat16):  # a trainer's own setting
            found = features(policy, RAGGED, engine=chosen)
        assert max(errors(found, reference(policy, RAGGED))) <= FLOAT32
        assert not any(x.requires_grad for x in (found.features, *found.token_logps))
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("chosen", ENGINES)
def test_memory_that_is_not_set_is_not_read(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_model("qwen2", hidden_size=64, intermediate_size=96)
    once = features(policy, RAGGED, engine=chosen)

    def poisoned(make: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Tensor:
            made = make(*arguments, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    assert same(features(policy, RAGGED, engine=chosen), once)


def test_hidden_states_of_inference_mode() -> None:
    policy = tiny_model("llama")
    rows = list(zip(RAGGED.prompts, RAGGED.completions, strict=True))
    with torch.inference_mode():
        hidden = [hidden_states(policy, p, c) for p, c in rows]
        inside = of_hidden_states(policy, hidden, RAGGED)
    outside = of_hidden_states(policy, [x.clone() for x in hidden], RAGGED)
    assert same(inside, outside)


def test_a_batch_of_nothing() -> None:
    policy = tiny_model("llama")
    found = gradient_features(policy, [], [])
    assert found.features.shape == (0, 32) and found.token_logps == []
    found = gradient_features(policy, [[1], [2, 3]], [[], []])
    assert found.features.shape == (2, 32) and not found.features.any()
    assert [len(x) for x in found.token_entropies] == [0, 0]
