"""The planner: every token position once, everything put back where it belongs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2r_fast.errors import InputError
from g2r_fast.plan import DecoderShape, PackedPlan, PackedSequence, micro_batches


@st.composite
def batches(draw: st.DrawFn) -> list[PackedSequence]:
    """Ragged sequences over few tokens, so that prefixes of every kind are shared."""
    sequences = []
    for ids in draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=9)):
        start = draw(st.integers(0, len(ids)))
        reads = draw(st.sets(st.integers(0, len(ids) - 1), min_size=1, max_size=3))
        sequences.append(PackedSequence(ids, start, tuple(sorted(reads))))
    return sequences


def prefixes(sequences: list[PackedSequence]) -> set[tuple[int, ...]]:
    return {tuple(s.input_ids[: i + 1]) for s in sequences for i in range(len(s.input_ids))}


@given(batches())
@settings(max_examples=300, deadline=None)
def test_every_distinct_prefix_is_one_row(sequences: list[PackedSequence]) -> None:
    plan = PackedPlan.build(sequences)
    assert plan.rows == len(prefixes(sequences))
    assert plan.unshared_rows == sum(len(s.input_ids) for s in sequences)
    # Rows are covered by the segments once, in order.
    row = 0
    for segment in plan.segments:
        assert segment.row == row and len(segment) > 0
        row += len(segment)
    assert row == plan.rows


@given(batches())
@settings(max_examples=300, deadline=None)
def test_a_path_spells_its_sequence(sequences: list[PackedSequence]) -> None:
    plan = PackedPlan.build(sequences)
    for index, sequence in enumerate(sequences):
        leaf = plan.leaves[index]
        path = [*plan.segments[leaf].path, leaf]
        rows = [r for s in path for r in range_of(plan, s)]
        assert plan.input_ids[rows].tolist() == list(sequence.input_ids)
        assert plan.positions[rows].tolist() == list(range(len(sequence.input_ids)))
        assert all(index in plan.segments[s].members for s in path)
        # No segment straddles the first attributed token, and liveness says which side it is on.
        for s in path:
            segment = plan.segments[s]
            assert not segment.start < sequence.backward_start < segment.stop
            assert (index in segment.live) == (segment.start >= sequence.backward_start)


@given(batches())
@settings(max_examples=300, deadline=None)
def test_reads_point_at_their_row(sequences: list[PackedSequence]) -> None:
    plan = PackedPlan.build(sequences)
    expected = [(i, p) for i, s in enumerate(sequences) for p in s.reads]
    assert [(r.sequence, r.position) for r in plan.reads] == expected
    for read in plan.reads:
        segment = plan.segments[read.segment]
        assert read.row == segment.row + read.position - segment.start
        assert read.row in plan.read_rows_in(segment)
        assert plan.positions[read.row] == read.position
    assert sorted(r for s in plan.segments for r in plan.read_rows_in(s)) == list(plan.read_rows)


@given(batches(), st.data())
@settings(max_examples=300, deadline=None)
def test_backward_rows_are_tokens_times_lanes(
    sequences: list[PackedSequence], data: st.DataObject
) -> None:
    plan = PackedPlan.build(sequences)
    chosen = data.draw(st.sets(st.sampled_from(range(len(sequences))))) if sequences else set()
    backward = plan.backward(chosen)
    assert backward.rows == sum(sequences[i].backward_rows for i in chosen)
    row = 0
    for run in backward.runs:
        segment = plan.segments[run.segment]
        assert (run.row, run.tokens, run.start) == (row, len(segment), segment.start)
        assert run.saved_row == segment.saved_row
        assert set(run.lanes) == set(segment.live) & chosen
        row += run.rows


@given(batches(), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_micro_batches_keep_the_bound_and_lose_nobody(
    sequences: list[PackedSequence], max_tokens: int
) -> None:
    alone = [len(s.input_ids) + s.backward_rows for s in sequences]
    if max(alone, default=0) > max_tokens:
        with pytest.raises(InputError, match="needs more rows than max_tokens"):
            list(micro_batches(sequences, max_tokens))
        return
    parts = list(micro_batches(sequences, max_tokens))
    assert sorted(i for part in parts for i in part) == list(range(len(sequences)))
    for part in parts:
        plan = PackedPlan.build([sequences[i] for i in part])
        assert plan.rows + plan.backward_rows <= max_tokens


def test_sharing_stays_together_in_micro_batches() -> None:
    prompts = [[1] * 20, [2] * 20]
    sequences = [PackedSequence([*prompts[i % 2], 3, i], 20) for i in range(8)]
    parts = list(micro_batches(sequences, 45))
    assert [sorted(i % 2 for i in part) for part in parts] == [[0] * 4, [1] * 4]


def test_the_shared_shape_of_a_judged_group() -> None:
    prompt, tails = [9] * 50, [[k] * 5 for k in range(3)]
    responses = [[20 + i] * (10 + i) for i in range(4)]
    sequences = [PackedSequence([*prompt, *r, *t], 50) for r in responses for t in tails]
    plan = PackedPlan.build(sequences)
    assert plan.rows == 50 + sum(map(len, responses)) + 4 * 3 * 5
    assert plan.backward_rows == 3 * sum(map(len, responses)) + 4 * 3 * 5
    assert plan.saved_rows == plan.rows - 50
    shape = DecoderShape(2, 8, 2, 1, 4, 16, 4, 4)
    text = plan.describe(shape)
    for figure in (plan.rows, plan.unshared_rows, plan.backward_rows, plan.saved_rows):
        assert str(figure) in text
    assert f"{plan.saved_bytes(shape) / 2**20:.1f} MiB" in text


def test_bad_sequences_are_refused() -> None:
    with pytest.raises(InputError, match="a sequence is empty"):
        PackedSequence([], 0)
    with pytest.raises(InputError, match="backward_start lies outside"):
        PackedSequence([1, 2], 3)
    with pytest.raises(InputError, match="read position lies outside"):
        PackedSequence([1, 2], 0, (2,))


def range_of(plan: PackedPlan, index: int) -> range:
    segment = plan.segments[index]
    return range(segment.row, segment.row + len(segment))


def test_positions_are_integers_for_an_empty_plan() -> None:
    plan = PackedPlan.build([])
    assert plan.rows == 0 and plan.input_ids.dtype == torch.int64 and plan.describe()


@pytest.mark.parametrize("reads", [(5, 3), (3, -6)])
def test_reads_that_do_not_ascend_are_refused(reads: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="read positions do not ascend"):
        PackedSequence(list(range(8)), 0, reads)


def test_a_position_is_read_once() -> None:
    assert PackedSequence(list(range(8)), 0, (2, 2, -6, 5)).reads == (2, 5)
