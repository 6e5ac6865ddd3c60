"""A plan as tables: which rows read what the forward kept, and whose keys a query sees.

Every table is built once per pass, not once per layer, and comes in the two forms that its readers
want: slices and tuples for the PyTorch operations, int32 and int64 tensors for the native ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .plan import BackwardPlan, PackedPlan, Read
from .signal import LeafRows

__all__ = [
    "Piece",
    "QueryBlock",
    "QueryTables",
    "RowMap",
    "Watch",
    "backward_queries",
    "backward_read_queries",
    "backward_reads",
    "backward_rows",
    "forward_queries",
    "forward_read_queries",
    "forward_reads",
    "forward_rows",
]


@dataclass(frozen=True)
class Piece:
    """Rows that follow each other: some tokens, times the lanes of each, token-major."""

    rows: slice
    saved: slice | torch.Tensor | None  # rows of what is kept, one per token; None: nothing is
    lanes: int = 1
    members: tuple[LeafRows, ...] = ()  # backward: whose tokens these are, in order

    @property
    def tokens(self) -> int:
        return (self.rows.stop - self.rows.start) // self.lanes


# A linear layer's name, inputs [tokens, in] and output gradients [tokens * lanes, out]; where.
Watch = Callable[[str, torch.Tensor, torch.Tensor, Piece], None]


@dataclass(frozen=True)
class RowMap:
    """For each row of a pass, the row of what the forward keeps."""

    pieces: tuple[Piece, ...]  # all rows of the pass, in order

    @cached_property
    def index(self) -> torch.Tensor:
        """The same as a tensor `[rows]`, int32; -1: nothing is kept."""
        parts = [torch.empty(0, dtype=torch.int32)]
        for piece in self.pieces:
            saved = piece.saved
            if saved is None:
                saved = torch.full((piece.tokens,), -1)
            elif isinstance(saved, slice):
                saved = torch.arange(saved.start, saved.stop)
            parts.append(saved.repeat_interleave(piece.lanes).to(torch.int32))
        return torch.cat(parts)


@dataclass(frozen=True)
class QueryBlock:
    """Queries of one segment: their rows and positions, and who comes back there."""

    segment: int
    rows: slice  # of q and lse
    positions: torch.Tensor  # [n], ascending
    lanes: tuple[int, ...] = ()  # backward only
    row: int = 0  # backward only: first of its n * lanes rows in grad_out and dq


@dataclass(frozen=True)
class QueryTables:
    """Who attends to what: queries in blocks of one segment, in the plan's depth-first order."""

    plan: PackedPlan
    positions: torch.Tensor  # [queries], int64
    blocks: tuple[QueryBlock, ...]
    backward: BackwardPlan | None = None

    @cached_property
    def segments(self) -> torch.Tensor:
        """`[n, 4]`: start, stop, first row of k and v, parent or -1."""
        return _table(
            4,
            (
                (s.start, s.stop, s.row, -1 if s.parent is None else s.parent)
                for s in self.plan.segments
            ),
        )

    @cached_property
    def forward_blocks(self) -> torch.Tensor:
        """`[n, 3]`: segment, first row of q, count."""
        return _table(3, ((b.segment, b.rows.start, len(b.positions)) for b in self.blocks))

    @cached_property
    def backward_blocks(self) -> torch.Tensor:
        """`[n, 6]`: segment, first row of q, count, first backward row, offset into
        `block_lanes`, lanes."""
        offsets = _offsets(len(b.lanes) for b in self.blocks)
        return _table(
            6,
            (
                (b.segment, b.rows.start, len(b.positions), b.row, offset, len(b.lanes))
                for b, offset in zip(self.blocks, offsets, strict=True)
            ),
        )

    @cached_property
    def block_lanes(self) -> torch.Tensor:
        return self._named(b.lanes for b in self.blocks)

    @cached_property
    def runs(self) -> torch.Tensor:
        """`[n, 5]`: segment, first backward row, tokens, offset into `run_lanes`, lanes."""
        assert self.backward is not None
        runs = self.backward.runs
        offsets = _offsets(len(run.lanes) for run in runs)
        return _table(
            5,
            (
                (run.segment, run.row, run.tokens, offset, len(run.lanes))
                for run, offset in zip(runs, offsets, strict=True)
            ),
        )

    @cached_property
    def run_lanes(self) -> torch.Tensor:
        assert self.backward is not None
        return self._named(run.lanes for run in self.backward.runs)

    def _named(self, lists: Iterable[tuple[int, ...]]) -> torch.Tensor:
        """Lanes by their place in depth-first order, so that every list of them ascends."""
        rank = self._rank
        return torch.tensor([rank[lane] for lanes in lists for lane in lanes], dtype=torch.int64)

    @cached_property
    def _rank(self) -> dict[int, int]:
        roots = (s for s in self.plan.segments if s.parent is None)
        return {lane: i for i, lane in enumerate(lane for s in roots for lane in s.members)}


def forward_rows(plan: PackedPlan, chunk: int) -> RowMap:
    """Every row of the plan, in pieces of at most `chunk` that are kept as a whole or not."""
    pieces: list[Piece] = []
    segments = plan.segments
    at = 0
    while at < len(segments):
        first = segments[at]
        stop = first.row
        while at < len(segments) and (
            (segments[at].saved_row is None) == (first.saved_row is None)
        ):
            stop = segments[at].row + len(segments[at])
            at += 1
        pieces.extend(_chunks(first.row, stop, first.saved_row, chunk))
    return RowMap(tuple(pieces))


def forward_reads(plan: PackedPlan, chunk: int) -> RowMap:
    """The rows that are read, all of them kept."""
    return RowMap(tuple(_chunks(0, len(plan.read_rows), 0, chunk)))


def forward_queries(plan: PackedPlan) -> QueryTables:
    """Every row of the plan attends."""
    blocks = (
        QueryBlock(i, rows, plan.positions[rows])
        for i, rows in enumerate(slice(s.row, s.row + len(s)) for s in plan.segments)
    )
    return QueryTables(plan, plan.positions, tuple(blocks))


def forward_read_queries(plan: PackedPlan) -> QueryTables:
    """The rows that are read attend; they are ascending, so those of a segment are a slice."""
    positions = plan.positions[torch.tensor(plan.read_rows, dtype=torch.int64)]
    blocks = []
    row = 0
    for i, segment in enumerate(plan.segments):
        count = len(plan.read_rows_in(segment))
        if count:
            rows = slice(row, row + count)
            blocks.append(QueryBlock(i, rows, positions[rows]))
            row += count
    return QueryTables(plan, positions, tuple(blocks))


def backward_rows(plan: PackedPlan, backward: BackwardPlan, chunk: int, merge: bool) -> RowMap:
    """Backward rows in pieces of at most `chunk`, each with one number of lanes.

    With `merge`, single-lane runs that follow each other are one piece.
    """
    pieces: list[Piece] = []
    for run in backward.runs:
        lanes = len(run.lanes)
        step = max(1, chunk // lanes)
        for token in range(0, run.tokens, step):
            tokens = min(step, run.tokens - token)
            row, saved = run.row + token * lanes, run.saved_row + token
            start = run.start + token
            piece = Piece(
                slice(row, row + tokens * lanes),
                slice(saved, saved + tokens),
                lanes,
                (LeafRows(run.lanes, start, start + tokens),),
            )
            joined = _join(pieces[-1], piece, chunk) if merge and pieces else None
            if joined is None:
                pieces.append(piece)
            else:
                pieces[-1] = joined
    return RowMap(tuple(pieces))


def backward_reads(reads: Sequence[Read], at: torch.Tensor, chunk: int, merge: bool) -> RowMap:
    """One row for each read, which reads row `at[i]` of what was kept."""
    members = [LeafRows((r.sequence,), r.position, r.position + 1) for r in reads]
    step = chunk if merge else 1
    stretches = (slice(i, min(len(reads), i + step)) for i in range(0, len(reads), step))
    return RowMap(tuple(Piece(s, at[s], 1, tuple(members[s])) for s in stretches))


def backward_queries(
    plan: PackedPlan, backward: BackwardPlan, saved_rows: torch.Tensor
) -> QueryTables:
    """The queries of all saved rows, and the lanes of each run."""
    positions = plan.positions[saved_rows]
    blocks = (
        QueryBlock(run.segment, rows, positions[rows], run.lanes, run.row)
        for run in backward.runs
        for rows in (slice(run.saved_row, run.saved_row + run.tokens),)
    )
    return QueryTables(plan, positions, tuple(blocks), backward)


def backward_read_queries(
    plan: PackedPlan, backward: BackwardPlan, reads: Sequence[Read]
) -> QueryTables:
    """One query and one lane for each read; `reads` lie by (segment, sequence)."""
    positions = torch.tensor([r.position for r in reads], dtype=torch.int64)
    blocks = []
    start = 0
    for stop in range(1, len(reads) + 1):
        first = reads[start]
        if stop < len(reads) and (reads[stop].segment, reads[stop].sequence) == (
            first.segment,
            first.sequence,
        ):
            continue
        rows = slice(start, stop)
        blocks.append(QueryBlock(first.segment, rows, positions[rows], (first.sequence,), start))
        start = stop
    return QueryTables(plan, positions, tuple(blocks), backward)


def _chunks(start: int, stop: int, saved_row: int | None, chunk: int) -> Iterator[Piece]:
    for row in range(start, stop, chunk):
        end = min(stop, row + chunk)
        shift = None if saved_row is None else saved_row - start
        yield Piece(slice(row, end), None if shift is None else slice(row + shift, end + shift))


def _join(first: Piece, second: Piece, chunk: int) -> Piece | None:
    """Single-lane pieces whose rows and saved rows follow on, as one."""
    assert isinstance(first.saved, slice) and isinstance(second.saved, slice)
    if (
        first.lanes == second.lanes == 1
        and first.rows.stop == second.rows.start
        and first.saved.stop == second.saved.start
        and first.tokens + second.tokens <= chunk
    ):
        return Piece(
            slice(first.rows.start, second.rows.stop),
            slice(first.saved.start, second.saved.stop),
            1,
            (*first.members, *second.members),
        )
    return None


def _table(width: int, rows: Iterable[tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=torch.int64).view(-1, width)


def _offsets(lengths: Iterable[int]) -> Iterator[int]:
    at = 0
    for length in lengths:
        yield at
        at += length
