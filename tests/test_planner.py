"""The trie: compiled and in Python the same, strict about what it is handed."""

from __future__ import annotations

import random
import shutil
import subprocess
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from g2r_fast import native, planner, tables
from g2r_fast.errors import InputTypeError
from g2r_fast.plan import PackedPlan, PackedSequence, Read, micro_batches

ROOT = Path(__file__).resolve().parents[1]

needs_core = pytest.mark.skipif(
    native.core() is None, reason=f"nothing to compare with: {native.status()}"
)
COLUMNS = ("start", "stop", "row", "parent", "saved_row", "first", "last")
COLUMNS += ("live_first", "live_last", "lanes", "leaf", "read_segment", "read_row")


@st.composite
def batches(draw: st.DrawFn) -> list[PackedSequence]:
    """Sequences that share prefixes of every kind; any reads, and none."""
    ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)
    sequences = []
    for one in draw(st.lists(ids | st.just([1] * 5), max_size=12)):
        start = draw(st.integers(0, len(one)))
        reads = draw(st.lists(st.integers(-len(one), len(one) - 1), max_size=4))
        reads = sorted(reads, key=lambda position: position % len(one))
        sequences.append(PackedSequence(one, start, tuple(reads)))
    return sequences


# Much sharing: equal but for the last token, all equal, each a prefix of the next, one prompt.
SHARING = {
    "last token": [PackedSequence([7] * 30 + [i % 40], 30) for i in range(60)],
    "equal": [PackedSequence([1, 2, 3], i % 4, (0, 2)) for i in range(40)],
    "chain": [PackedSequence(range(i + 1), i // 2, tuple(range(i + 1))) for i in range(60)],
    "chain, all live": [PackedSequence(range(60 - i), 0, (0, -1)) for i in range(60)],
    "prompt": [PackedSequence([*range(50), 60 + i], 50 if i % 3 else 20) for i in range(40)],
}


def in_python(call: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "core", lambda: None)
        return call(*args)


def compiled() -> Any:
    core = native.core()
    assert core is not None
    return core


def columns_of(sequences: Sequence[PackedSequence]) -> planner.Layout:
    """What PackedPlan.build asks for."""
    order, common = planner.in_trie_order([s.input_ids for s in sequences])
    return planner.lay_out(
        order,
        common,
        [len(s.input_ids) for s in sequences],
        [s.backward_start for s in sequences],
        [i for i, s in enumerate(sequences) for _ in s.reads],
        [position for s in sequences for position in s.reads],
    )


@needs_core
@given(batches())
@settings(max_examples=400, deadline=None)
@example([])
@example(SHARING["last token"])
@example(SHARING["equal"])
@example(SHARING["chain"])
@example(SHARING["chain, all live"])
@example(SHARING["prompt"])
def test_compiled_equals_python_field_by_field(sequences: list[PackedSequence]) -> None:
    layout, expected = columns_of(sequences), in_python(columns_of, sequences)
    for name in COLUMNS:
        assert getattr(layout, name) == getattr(expected, name), name
    assert layout == expected

    plan, python_plan = PackedPlan.build(sequences), in_python(PackedPlan.build, sequences)
    assert plan == python_plan and repr(plan) == repr(python_plan)
    for tensor in ("input_ids", "positions"):
        assert torch.equal(getattr(plan, tensor), getattr(python_plan, tensor))
    assert plan.read_rows == python_plan.read_rows
    for bound in (None, max((s.backward_rows + len(s.input_ids) for s in sequences), default=1)):
        parts = list(micro_batches(sequences, bound))
        assert parts == in_python(list, micro_batches(sequences, bound))


@given(batches())
@settings(max_examples=200, deadline=None)
def test_lists_of_members_are_no_longer_than_the_sequences(sequences: list[PackedSequence]) -> None:
    layout = columns_of(sequences)
    tokens = sum(len(s.input_ids) for s in sequences)
    passing = sum(b - a for a, b in zip(layout.first, layout.last, strict=True))
    assert passing <= tokens and len(layout.lanes) <= len(sequences) + tokens
    # Two cuts a sequence at most, where it leaves the one before and where its backward stops.
    assert len(layout.row) <= 3 * len(sequences)


def test_a_plan_by_hand() -> None:
    sequences = [PackedSequence([5, 6, 7, 8], 3), PackedSequence([5, 6, 9], 1, (0, -1))]
    plan = PackedPlan.build(sequences)
    # Rows: 5 | 6 | 7 | 8 | 9, cut where the second comes back, at the branch, where the first does.
    fields = "start={}, stop={}, row={}, parent={}, path={}, members={}, live={}, saved_row={}"
    assert [repr(segment) for segment in plan.segments] == [
        f"Segment({fields.format(*values)})"
        for values in (
            (0, 1, 0, None, (), (0, 1), (), None),
            (1, 2, 1, 0, (0,), (0, 1), (1,), 0),
            (2, 3, 2, 1, (0, 1), (0,), (), None),
            (3, 4, 3, 2, (0, 1, 2), (0,), (0,), 1),
            (2, 3, 4, 1, (0, 1), (1,), (1,), 2),
        )
    ]
    reads = (Read(0, 3, 3, 3), Read(1, 0, 0, 0), Read(1, 2, 4, 4))
    assert plan.reads == reads and repr(plan.reads) == repr(reads)
    assert (plan.leaves, plan.rows, plan.saved_rows) == ((3, 4), 5, 3)
    assert plan.read_rows == (0, 3, 4)


def test_reads_are_a_sequence() -> None:
    plan = PackedPlan.build([PackedSequence([1, 2, 3], 0, (0, 1, 2)), PackedSequence([1, 2], 0)])
    every = tuple(plan.reads)
    assert len(plan.reads) == 4 and every[3] == Read(1, 1, every[1].segment, 1)
    assert plan.reads[-1] == every[-1] and plan.reads[1:3] == every[1:3]
    assert plan.reads != every[:3] and plan.reads != 4
    with pytest.raises(IndexError):
        plan.reads[4]


IDS = [3, 1, 2, 1]
FORMS = {
    "tuple": tuple(IDS),
    "array": array("i", IDS),
    "array of 64 bits": array("q", IDS),
    "bytes": bytes(IDS),
    "range": range(3, 7),
    "numpy": np.array(IDS, dtype=np.int32),
    "numpy, every other": np.arange(20)[::2],
    "tensor": torch.tensor(IDS),
    "list of numpy integers": list(np.array(IDS)),
    "list of tensors": list(torch.tensor(IDS)),
    "list with a bool": [True, 2],
}


@pytest.mark.parametrize("form", FORMS)
def test_ids_come_in_every_form(form: str) -> None:
    ids = FORMS[form]
    plain = [int(i) for i in ids]
    sequences = [PackedSequence(ids, 1), PackedSequence([*plain, 8], 1)]
    expected = PackedPlan.build([PackedSequence(plain, 1), PackedSequence([*plain, 8], 1)])
    for plan in (PackedPlan.build(sequences), in_python(PackedPlan.build, sequences)):
        assert plan.segments == expected.segments and plan.reads == expected.reads
        assert plan.input_ids.tolist() == [*plain, 8] and plan.input_ids.dtype == torch.int64


@pytest.mark.parametrize(
    "bad",
    [[1, 2.5], "ab", [None], [2**63], np.array([1.5]), np.eye(2, dtype=int), [[1]], [-(2**64)]],
)
def test_ids_that_are_no_integers_are_refused(bad: Any) -> None:
    sequences = [PackedSequence([1], 0), PackedSequence(bad, 0)]
    for call in (PackedPlan.build, lambda given: list(micro_batches(given, None))):
        for run in (call, lambda given, call=call: in_python(call, given)):
            with pytest.raises(InputTypeError, match="first at index 1"):
                run(sequences)


@needs_core
@pytest.mark.parametrize(
    "sequences", [[[1, 2.0]], [["1"]], [[2**63]], [[-(2**63) - 1]], ["12"], [None], [[True]]]
)
def test_lists_that_hold_something_else_are_left_to_python(sequences: list[Any]) -> None:
    assert compiled().common_prefix_lengths_of_lists([[1], *sequences]) is None


@needs_core
def test_lists_are_read_over_the_whole_range() -> None:
    sequences = [[2**63 - 1], (-(2**63), 0), [], [2**31, -1], [2**31]]
    found = compiled().common_prefix_lengths_of_lists(sequences)
    assert found == native.sort_with_common_prefixes(sequences) == ([2, 1, 4, 3, 0], [0, 0, 1, 0])
    assert compiled().common_prefix_lengths_of_lists([]) == ([], [])


# Two sequences of three tokens that share one, and a read of the second.
GOOD = {
    "order": [1, 0],
    "common": [1],
    "lengths": [3, 3],
    "backward_starts": [0, 3],
    "owners": [1],
    "positions": [2],
}


@needs_core
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": [0]}, ValueError, "order must hold 2 values, got 1"),
        ({"order": [0, 2]}, ValueError, r"order must lie in 0 \.\. 1, got 2 at index 1"),
        ({"order": [-1, 0]}, ValueError, r"order must lie in 0 \.\. 1, got -1 at index 0"),
        ({"order": [1, 1]}, ValueError, "order must name a sequence once, got 1 again"),
        ({"common": []}, ValueError, "common must hold 1 values, got 0"),
        ({"common": [-1]}, ValueError, r"common must lie in 0 \.\. 3, got -1"),
        ({"common": [4]}, ValueError, r"common must lie in 0 \.\. 3, got 4"),
        # A prefix of the sequence before it would lie before it; nothing is shared past an end.
        ({"common": [3], "lengths": [3, 4]}, ValueError, r"common must lie in 0 \.\. 2, got 3"),
        ({"common": [3], "lengths": [4, 2], "positions": [0], "backward_starts": [0, 0]},
         ValueError, r"common must lie in 0 \.\. 2, got 3"),
        ({"lengths": [3, 0]}, ValueError, r"lengths must lie in 1 .*, got 0 at index 1"),
        ({"lengths": [3, 2**63 - 3]}, ValueError, "lengths must lie in 1 .* at index 1"),
        ({"backward_starts": [0]}, ValueError, "backward_starts must hold 2 values, got 1"),
        ({"backward_starts": [4, 0]}, ValueError, r"must lie in 0 \.\. 3, got 4 at index 0"),
        ({"backward_starts": [0, -1]}, ValueError, r"must lie in 0 \.\. 3, got -1 at index 1"),
        ({"owners": [2]}, ValueError, r"owners must lie in 0 \.\. 1, got 2"),
        ({"owners": [-1]}, ValueError, r"owners must lie in 0 \.\. 1, got -1"),
        ({"owners": []}, ValueError, "positions must hold 0 values, got 1"),
        ({"positions": [3]}, ValueError, r"positions must lie in 0 \.\. 2, got 3"),
        ({"positions": [-1]}, ValueError, r"positions must lie in 0 \.\. 2, got -1"),
        ({"order": np.array([1.0, 0.0])}, TypeError, "order must be int64"),
        ({"owners": np.array([1], dtype=np.int32)}, TypeError, "owners must be int64"),
        ({"lengths": np.array([[3, 3]])}, ValueError, "lengths must have one dimension"),
        ({"positions": None}, TypeError, "incompatible function arguments"),
    ],
)  # fmt: skip
def test_hostile_columns_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    def call(**columns: Any) -> tuple[bytes, ...]:
        as_arrays = {
            name: np.array(c, dtype=np.int64) if isinstance(c, list) else c
            for name, c in columns.items()
        }
        return compiled().lay_out(**as_arrays)

    assert len(call(**GOOD)) == len(COLUMNS)
    with pytest.raises(error, match=message):
        call(**{**GOOD, **change})


@needs_core
def test_long_shared_prompts_and_many_reads() -> None:
    """Larger than hypothesis draws: vectors grow, and walks are long."""
    ids = random.Random(0)
    prompt = [ids.randrange(1000) for _ in range(300)]
    sequences = []
    for _ in range(40):
        response = [ids.randrange(3) for _ in range(ids.randrange(1, 60))]
        length = len(prompt) + len(response)
        start = ids.randrange(length + 1)
        sequences.append(PackedSequence(prompt + response, start, tuple(range(start, length))))
    assert columns_of(sequences) == in_python(columns_of, sequences)


@given(batches(), st.integers(1, 12), st.data())
@settings(max_examples=200, deadline=None)
@example(SHARING["prompt"], 4, None)
@example(SHARING["chain"], 12, None)
def test_tables_against_their_definition(
    sequences: list[PackedSequence], chunk: int, data: st.DataObject | None
) -> None:
    """Row by row from the segments; also where only some sequences come back."""
    plan = PackedPlan.build(sequences)
    every = list(range(len(sequences)))
    chosen = every if data is None else [i for i in every if data.draw(st.booleans())]
    saved = {
        s.row + t: s.saved_row + t
        for s in plan.segments
        if s.saved_row is not None
        for t in range(len(s))
    }
    forward = tables.forward_rows(plan, chunk)
    assert forward.index.dtype == torch.int32
    assert forward.index.tolist() == [saved.get(row, -1) for row in range(plan.rows)]

    backward = plan.backward(chosen)
    rank = {s: i for i, s in enumerate(sorted(every, key=lambda i: (sequences[i].input_ids, i)))}
    back = [
        (index, segment.start + t, saved[segment.row + t], lane)
        for index, segment in enumerate(plan.segments)
        for t in range(len(segment))
        for lane in segment.live
        if lane in chosen
    ]
    rows = tables.backward_rows(plan, backward, chunk)
    assert rows.index.tolist() == [kept for _, _, kept, _ in back]
    assert [
        (position, lane)
        for piece in rows.pieces
        for whose in piece.members
        for position in range(whose.start, whose.stop)
        for lane in whose.lanes
    ] == [(position, lane) for _, position, _, lane in back]
    for piece in rows.pieces:
        assert len(range(*piece.rows.indices(len(back)))) <= max(chunk, piece.lanes)

    queries = tables.backward_queries(plan, backward, torch.tensor(list(saved), dtype=torch.int64))
    assert torch.equal(queries.block_lanes, queries.run_lanes)
    lanes, spelled = queries.run_lanes.tolist(), []
    for block, run in zip(queries.backward_blocks.tolist(), queries.runs.tolist(), strict=True):
        segment, first, tokens, offset, count = run
        start, stop, row, _ = queries.segments[segment].tolist()
        assert block == [segment, saved[row], tokens, first, offset, count]
        assert (first, tokens) == (len(spelled), stop - start)
        for t in range(tokens):
            spelled += [(segment, start + t, lane) for lane in lanes[offset : offset + count]]
    assert spelled == [(segment, position, rank[lane]) for segment, position, _, lane in back]
    for block in queries.blocks:
        segment, run = plan.segments[block.segment], backward.by_segment[block.segment]
        assert block.positions.tolist() == list(range(segment.start, segment.stop))
        assert (block.lanes, block.row) == (run.lanes, run.row)

    read = tables.forward_read_queries(plan)
    assert read.forward_blocks.tolist() == [
        [i, plan.read_rows.index(inside[0]), len(inside)]
        for i, inside in enumerate(map(plan.read_rows_in, plan.segments))
        if inside
    ]
    assert read.positions.tolist() == [plan.positions[row] for row in plan.read_rows]

    reads = sorted(plan.reads, key=lambda r: (r.segment, r.sequence))
    entering = tables.backward_read_queries(plan, backward, reads)
    found = []
    for block, (segment, _, _, first, offset, count) in zip(
        entering.blocks, entering.backward_blocks.tolist(), strict=True
    ):
        (lane,) = block.lanes
        assert (segment, first, count) == (block.segment, block.row, 1)
        assert entering.block_lanes[offset] == rank[lane]
        found += [(segment, lane, position) for position in block.positions.tolist()]
    assert found == [(r.segment, r.sequence, r.position) for r in reads]
    at = torch.arange(len(reads)).flip(0)
    assert tables.backward_reads(at, chunk).index.tolist() == at.tolist()

    # By sequence, in the order of its positions: every backward row, and every read.
    linears = tables.backward_linears(backward, dict.fromkeys(chosen, 3))
    rows_of = {lane: [i for i, b in enumerate(back) if b[3] == lane] for lane in chosen}
    for rows in rows_of.values():
        assert [back[i][1] for i in rows] == sorted(back[i][1] for i in rows)
    rows_of = {lane: rows for lane, rows in rows_of.items() if rows}
    assert linears.lanes == tuple(sorted(rows_of)) and set(linears.exponents) <= {3}
    assert linears.rows.tolist() == [i for lane in linears.lanes for i in rows_of[lane]]
    assert linears.kept.tolist() == [back[i][2] for i in linears.rows.tolist()]
    assert list(linears.offsets) == [0, *accumulate(len(rows_of[lane]) for lane in linears.lanes)]
    shown = tables.read_linears(reads, at, {})
    order = sorted(range(len(reads)), key=lambda i: (reads[i].sequence, reads[i].position))
    assert shown.rows.tolist() == order and shown.kept.tolist() == at[order].tolist()
    assert shown.lanes == tuple(sorted({read.sequence for read in reads}))


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
def test_the_trie_in_c_plus_plus_alone(tmp_path: Path) -> None:
    """Random batches against the definition, with the library's own bounds checks."""
    program = tmp_path / "trie_test"
    command = [COMPILER, "-std=c++17", "-O1", "-D_GLIBCXX_ASSERTIONS", f"-I{ROOT / 'csrc'}"]
    command += [str(ROOT / "tests" / "cpp" / "trie_test.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[:2000]
