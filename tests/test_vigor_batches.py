"""VIGOR over batches: sharing, order, sizes, lengths, what is computed, memory that runs out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import vigor_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import native
from tiny_models import tiny_model
from vigor_runs import (
    FLOAT64,
    NATIVE_SIZES,
    PACKED_ALONE,
    STOCK,
    SUBSETS,
    Ran,
    Rows,
    ids_of,
    norms,
    rows_of_every_kind,
    squares_of_reference,
    squares_of_stock,
    total,
    train_only,
    worst,
)

from g2r_fast.decoder import FrozenDecoder
from g2r_fast.plan import PackedPlan

__all__ = ["native"]

ran = vigor_runs.ran


def of_reference(model: Any, rows: Rows) -> list[float]:
    return total(squares_of_reference(model, rows), SUBSETS["all"])


def of_stock(model: Any, rows: Rows) -> list[float]:
    return total(squares_of_stock(model, rows), SUBSETS["all"])


def group(size: int, prompt: int = 6, seed: int = 0) -> Rows:
    """One prompt, ragged completions."""
    completions = [ids_of(3 + (3 * i + seed) % 7, 100 + seed + i) for i in range(size)]
    return Rows([ids_of(prompt, 1 + seed)] * size, completions)


# Invariances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["all", "lm_head"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_batch_is_its_rows_one_by_one(tied: bool, parameters: str) -> None:
    model = tiny_model("qwen3", dtype=torch.float64, tie_word_embeddings=tied)
    rows = rows_of_every_kind()
    alone = torch.cat([norms(model, rows.at([i]), parameters) for i in range(len(rows))])
    assert worst(norms(model, rows, parameters), alone) <= PACKED_ALONE


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_order_does_not_matter(engine: str) -> None:
    model, rows = tiny_model("qwen2", dtype=torch.float64), rows_of_every_kind()
    expected = norms(model, rows, "all", engine)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    assert worst(norms(model, rows.at(order), "all", engine), expected[order]) <= PACKED_ALONE


def test_max_tokens_does_not_matter(ran: list[Ran]) -> None:
    model = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=True)
    rows = rows_of_every_kind()
    expected = norms(model, rows)
    most = max(2 * len(s.input_ids) for s in ran[0].sequences)
    for max_tokens in (most, 3 * most, 10_000):
        assert worst(norms(model, rows, max_tokens=max_tokens), expected) <= PACKED_ALONE
    assert ran[1].done.micro_batches > ran[2].done.micro_batches > ran[3].done.micro_batches == 1


def test_by_default_what_is_kept_stays_below_the_model(ran: list[Ran]) -> None:
    """Half of the model's own bytes, so that a large batch runs in parts."""
    model, rows = tiny_model("llama"), group(64)
    expected = norms(model, rows, max_tokens=100_000)
    assert worst(norms(model, rows), expected) <= STOCK
    assert ran[0].done.micro_batches == 1 < ran[1].done.micro_batches


def test_duplicates_are_equal_to_the_bit() -> None:
    model, rows = tiny_model("mistral"), rows_of_every_kind()
    twice = norms(model, rows.at(i // 2 for i in range(2 * len(rows))))
    assert torch.equal(twice[::2], twice[1::2])


def test_a_prompt_may_be_shared_or_not() -> None:
    """The prompt's gradients are each completion's own: the same norms whoever shares it."""
    model = tiny_model("llama", dtype=torch.float64)
    together, strangers = group(4), [ids_of(6, 50 + i) for i in range(4)]
    shared = norms(model, together)
    mixed = Rows([*together.prompt_ids, *strangers], [*together.completion_ids] * 2)
    found = norms(model, mixed)
    assert worst(found[:4], shared) <= PACKED_ALONE
    assert worst(found, of_reference(model, mixed)) <= FLOAT64
    assert min(abs(found[4:] / shared - 1)) > 1e-3


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_groups(size: int) -> None:
    model, rows = tiny_model("qwen2", dtype=torch.float64, num_hidden_layers=2), group(size)
    assert worst(norms(model, rows), of_reference(model, rows)) <= FLOAT64


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("length", [64, 4000])
def test_short_and_long_completions(
    length: int, backend: str, native: None, ran: list[Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gram matrices for the one, tiles of gradients for the other."""
    monkeypatch.setenv("G2R_BACKEND", backend)
    model = tiny_model("qwen2", num_hidden_layers=2, max_position_embeddings=5000, **NATIVE_SIZES)
    rows = Rows([ids_of(8, 1)], [ids_of(length, 2)])
    assert worst(norms(model, rows), of_stock(model, rows)) <= STOCK
    assert backend in ran[0].done.backend


@pytest.mark.parametrize("vocabulary", [97, 113, 7])
def test_vocabularies_that_no_tile_divides(vocabulary: int, native: None) -> None:
    model = tiny_model("llama", vocab_size=vocabulary, tie_word_embeddings=True, **NATIVE_SIZES)
    rows = group(3)
    rows = Rows(
        [[i % vocabulary for i in ids] for ids in rows.prompt_ids],
        [[i % vocabulary for i in ids] for ids in rows.completion_ids],
    )
    assert worst(norms(model, rows), of_stock(model, rows)) <= STOCK


def test_empty_completions_have_no_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        model, rows = tiny_model("llama", dtype=dtype), Rows([[1, 2], [3], [4]], [[], [5, 6], []])
        for engine in ("packed", "autograd"):
            for parameters in ("all", "lm_head"):
                found = norms(model, rows, parameters, engine)
                assert found.dtype == dtype and found[1] > 0
                assert found[[0, 2]].tolist() == [0.0, 0.0]
                (alone,) = norms(model, rows.at([1]), parameters, engine)
                assert worst([found[1]], [alone]) == 0
    assert norms(model, Rows([[1]], [[]])).tolist() == [0.0]
    assert norms(model, Rows([], [])).shape == (0,)


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_row_gets_no_gradient(tied: bool) -> None:
    """Whose id occurs in prompts and completions; in a tied head it is a word as any other."""
    options: dict[str, Any] = {"pad_token_id": 5, "tie_word_embeddings": tied}
    rows = Rows([[5, 7, 5, 9], [5]], [[5, 5, 7, 3], [2, 5, 5]])
    model = tiny_model("llama", dtype=torch.float64, **options)
    assert model.model.embed_tokens.padding_idx == 5
    assert worst(norms(model, rows), of_reference(model, rows)) <= FLOAT64
    model = tiny_model("llama", **options)
    expected = of_stock(model, rows)
    for engine in ("packed", "autograd"):
        assert worst(norms(model, rows, "all", engine), expected) <= STOCK
    without = norms(tiny_model("llama", tie_word_embeddings=tied), rows)
    assert min(abs(without - torch.tensor(expected)) / without) > 1e-3


# Few different ids, so that rows begin alike and repeat themselves in every way.
IDS = st.integers(0, 3)
BATCHES = st.lists(
    st.tuples(st.lists(IDS, min_size=1, max_size=4), st.lists(IDS, max_size=6)), max_size=5
)


@cache
def float64_model(tied: bool) -> Any:
    return tiny_model(
        "qwen3", dtype=torch.float64, num_hidden_layers=2, tie_word_embeddings=tied, pad_token_id=2
    )


@settings(max_examples=40)
@given(BATCHES, st.booleans(), st.booleans())
def test_any_batch(batch: Any, tied: bool, cut: bool) -> None:
    model = float64_model(tied)
    rows = Rows([list(p) for p, _ in batch], [list(c) for _, c in batch])
    found = norms(model, rows, max_tokens=20 if cut else None)
    some = [i for i in range(len(rows)) if rows.completion_ids[i]]
    assert all(found[i] == 0 for i in range(len(rows)) if i not in some)
    if some:
        assert worst(found[some], of_reference(model, rows.at(some))) <= FLOAT64


# What is computed, and with how much memory ------------------------------------------------------


def test_rows_that_are_computed(ran: list[Ran]) -> None:
    """The prompt once forward, and once back for every completion."""
    prompt, completions = ids_of(7, 1), [[i, *ids_of(9 + i, 20 + i)] for i in range(4)]
    norms(tiny_model("llama"), Rows([prompt] * 4, completions), max_tokens=1000)
    ((sequences, done),) = [(r.sequences, r.done) for r in ran]
    assert [s.input_ids for s in sequences] == [[*prompt, *c[:-1]] for c in completions]
    assert [s.reads for s in sequences] == [tuple(range(6, 6 + len(c))) for c in completions]
    tails = sum(len(c) - 1 for c in completions)
    assert (done.rows_forward, done.rows_backward) == (7 + tails, 4 * 7 + tails)


def test_the_head_alone_needs_no_backward(ran: list[Ran]) -> None:
    model = tiny_model("llama")
    norms(model, group(4), "lm_head")
    assert ran[0].done.rows_backward == 0
    train_only(model, SUBSETS["the last layer"])
    norms(model, group(4), "trainable")
    assert ran[1].done.rows_backward > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_uninitialised_is_read(
    backend: str, native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.empty comes filled with NaN here; one value that leaked would show."""
    monkeypatch.setenv("G2R_BACKEND", backend)
    model, rows = tiny_model("qwen3", attention_bias=True, **NATIVE_SIZES), rows_of_every_kind()
    expected = norms(model, rows)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.equal(norms(model, rows), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("limit", [120, 60])
def test_running_out_of_cuda_memory_counts_nothing_twice(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    rows = Rows(
        rows_of_every_kind().prompt_ids + group(6).prompt_ids,
        rows_of_every_kind().completion_ids + group(6).completion_ids,
    )
    expected = norms(model, rows)
    run, sizes = FrozenDecoder.run, []

    def limited(self: FrozenDecoder, plan: PackedPlan, signal: Any) -> int:
        sizes.append(plan.rows + plan.backward_rows)
        done = run(self, plan, signal)
        # Late, when every square has been added up; one sequence always fits.
        if sizes[-1] > limit and len(plan.sequences) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return done

    monkeypatch.setattr(FrozenDecoder, "run", limited)
    with pytest.warns(ResourceWarning, match="going on with"):
        found = norms(model, rows, max_tokens=1000)
    assert worst(found, expected) <= STOCK
    assert max(sizes) > limit and len(sizes) < 3 * len(rows)


def test_running_out_half_way_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layer: its first norm has been shown once of twice, the embeddings never."""
    from g2r_fast import ops

    model, rows = tiny_model("llama", tie_word_embeddings=True), rows_of_every_kind()
    expected = norms(model, rows)
    plain, calls = ops.qkv_backward, []

    def once(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        plain(*arguments, **options)

    monkeypatch.setattr(ops, "qkv_backward", once)
    with pytest.warns(ResourceWarning, match="going on with"):
        assert worst(norms(model, rows, max_tokens=1000), expected) <= STOCK
