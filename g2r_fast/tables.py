"""A plan as tables: which rows read what the forward kept, and whose keys a query sees.

Every table is built once per pass, not once per layer, and comes in the two forms that its readers
want: slices and tuples for the PyTorch operations, int32 and int64 tensors for the native ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

import torch

from .plan import BackwardPlan, PackedPlan, Read, column, table
from .signal import LeafRows, LinearRows

__all__ = [
    "Piece",
    "QueryBlock",
    "QueryTables",
    "RowMap",
    "backward_linears",
    "backward_queries",
    "backward_read_queries",
    "backward_reads",
    "backward_rows",
    "forward_queries",
    "forward_read_queries",
    "forward_reads",
    "forward_rows",
    "read_linears",
]


@dataclass(slots=True)
class Piece:
    """Rows that follow each other: some tokens, times the lanes of each, token-major."""

    rows: slice
    saved: slice | torch.Tensor | None  # rows of what is kept, one per token; None: nothing is
    lanes: int = 1
    members: tuple[LeafRows, ...] = ()  # backward: whose tokens these are, in order

    @property
    def tokens(self) -> int:
        return (self.rows.stop - self.rows.start) // self.lanes


@dataclass(frozen=True)
class RowMap:
    """For each row of a pass, the row of what the forward keeps."""

    pieces: tuple[Piece, ...]  # all rows of the pass, in order
    _moved: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def index_on(self, device: torch.device) -> torch.Tensor:
        """`index` on a device, where it is copied once."""
        if device not in self._moved:
            self._moved[device] = self.index.to(device)
        return self._moved[device]

    @cached_property
    def index(self) -> torch.Tensor:
        """The same as a tensor `[rows]`, int32; -1: nothing is kept."""
        tokens = [piece.tokens for piece in self.pieces]
        offsets = _offsets(tokens)
        # Where saved rows are a slice, they and the tokens of the pass count up together.
        shifts = [
            piece.saved.start - offset if isinstance(piece.saved, slice) else 0
            for piece, offset in zip(self.pieces, offsets, strict=True)
        ]
        lengths = column(tokens)
        index = torch.arange(sum(tokens)).add_(column(shifts).repeat_interleave(lengths))
        for piece, offset in zip(self.pieces, offsets, strict=True):
            if not isinstance(piece.saved, slice):
                index[offset : offset + piece.tokens] = -1 if piece.saved is None else piece.saved
        if any(piece.lanes > 1 for piece in self.pieces):
            lanes = column([piece.lanes for piece in self.pieces])
            index = index.repeat_interleave(lanes.repeat_interleave(lengths))
        return index.to(torch.int32)


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
    block_segments: Sequence[int]  # of each block
    block_starts: Sequence[int]  # its first row of q and lse
    block_counts: Sequence[int]
    backward: BackwardPlan | None = None
    lanes: Sequence[tuple[int, ...]] = ()  # backward only: who comes back in each block
    block_rows: Sequence[int] = ()  # backward only: the block's first row in grad_out and dq
    # What device_tables.py built of this, by what it depends on.
    on_device: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def blocks(self) -> tuple[QueryBlock, ...]:
        """Made when looked at: the native operations read columns only."""
        rows = [slice(i, i + n) for i, n in zip(self.block_starts, self.block_counts, strict=True)]
        positions = [self.positions[block] for block in rows]
        columns: list[Sequence[object]] = [self.block_segments, rows, positions]
        if self.backward is not None:
            columns += [self.lanes, self.block_rows]
        return tuple(map(QueryBlock, *columns))

    @property
    def segments(self) -> torch.Tensor:
        """`[n, 4]`: start, stop, first row of k and v, parent or -1."""
        return self.plan.segment_table

    @cached_property
    def forward_blocks(self) -> torch.Tensor:
        """`[n, 3]`: segment, first row of q, count."""
        return table(self.block_segments, self.block_starts, self.block_counts)

    @cached_property
    def backward_blocks(self) -> torch.Tensor:
        """`[n, 6]`: segment, first row of q, count, first backward row, offset into
        `block_lanes`, lanes."""
        lanes = [len(lanes) for lanes in self.lanes]
        return table(
            self.block_segments,
            self.block_starts,
            self.block_counts,
            self.block_rows,
            _offsets(lanes),
            lanes,
        )

    @cached_property
    def block_lanes(self) -> torch.Tensor:
        return self._named(self.lanes)

    @cached_property
    def runs(self) -> torch.Tensor:
        """`[n, 5]`: segment, first backward row, tokens, offset into `run_lanes`, lanes."""
        assert self.backward is not None
        runs = self.backward.runs
        lanes = [len(run.lanes) for run in runs]
        return table(
            [run.segment for run in runs],
            [run.row for run in runs],
            [run.tokens for run in runs],
            _offsets(lanes),
            lanes,
        )

    @cached_property
    def run_lanes(self) -> torch.Tensor:
        assert self.backward is not None
        return self._named(run.lanes for run in self.backward.runs)

    def _named(self, lists: Iterable[tuple[int, ...]]) -> torch.Tensor:
        """Lanes by their place in depth-first order, so that every list of them ascends."""
        return self.plan.ranks[column(chain.from_iterable(lists))]


def forward_rows(plan: PackedPlan, chunk: int) -> RowMap:
    """Every row of the plan, in pieces of at most `chunk` that are kept as a whole or not."""
    pieces: list[Piece] = []
    for _, group in groupby(plan.segments, lambda s: s.saved_row is None):
        stretch = list(group)
        first, last = stretch[0], stretch[-1]
        pieces.extend(_chunks(first.row, last.row + len(last), first.saved_row, chunk))
    return RowMap(tuple(pieces))


def forward_reads(plan: PackedPlan, chunk: int) -> RowMap:
    """The rows that are read, all of them kept."""
    return RowMap(tuple(_chunks(0, len(plan.read_rows), 0, chunk)))


def forward_queries(plan: PackedPlan) -> QueryTables:
    """Every row of the plan attends."""
    segments = plan.segments
    starts, counts = [s.row for s in segments], [s.stop - s.start for s in segments]
    return QueryTables(plan, plan.positions, range(len(segments)), starts, counts)


def forward_read_queries(plan: PackedPlan) -> QueryTables:
    """The rows that are read attend; they are ascending, so those of a segment are a slice."""
    read = column(plan.read_rows)
    rows = column([*(s.row for s in plan.segments), plan.rows])
    bounds = torch.searchsorted(read, rows).tolist()
    blocks = [(i, a, b - a) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]
    segments, starts, counts = zip(*blocks, strict=True) if blocks else ((), (), ())
    return QueryTables(plan, plan.positions[read], segments, starts, counts)


def backward_rows(plan: PackedPlan, backward: BackwardPlan, chunk: int) -> RowMap:
    """Backward rows in pieces of at most `chunk`, each with one number of lanes.

    Single-lane runs that follow each other are one piece.
    """
    pieces: list[Piece] = []
    members: list[LeafRows] = []  # of the piece that is still open; so are the next four
    row = saved = saved_stop = width = 0

    def close() -> None:
        if members:
            rows = slice(row, row + (saved_stop - saved) * width)
            pieces.append(Piece(rows, slice(saved, saved_stop), width, tuple(members)))
            members.clear()

    for run in backward.runs:
        lanes = len(run.lanes)
        step = max(1, chunk // lanes)
        for token in range(0, run.tokens, step):
            kept, start = run.saved_row + token, run.start + token
            tokens = min(step, run.tokens - token)
            follows = lanes == width == 1 and kept == saved_stop
            if not (follows and kept + tokens - saved <= chunk):
                close()
                row, saved, width = run.row + token * lanes, kept, lanes
            saved_stop = kept + tokens
            members.append(LeafRows(run.lanes, start, start + tokens))
    close()
    return RowMap(tuple(pieces))


def backward_reads(at: torch.Tensor, chunk: int) -> RowMap:
    """One row for each read, which reads row `at[i]` of what was kept."""
    stretches = (slice(i, min(len(at), i + chunk)) for i in range(0, len(at), chunk))
    # (Of no rows, split makes one part.)
    parts = zip(stretches, at.split(chunk), strict=bool(len(at)))
    return RowMap(tuple(Piece(rows, saved) for rows, saved in parts))


def backward_linears(backward: BackwardPlan, exponents: Mapping[int, int]) -> LinearRows:
    """Every backward row, by sequence."""
    kept: dict[int, list[torch.Tensor]] = {}
    rows: dict[int, list[torch.Tensor]] = {}
    for run in backward.runs:
        tokens = torch.arange(run.tokens, dtype=torch.int32)
        for place, lane in enumerate(run.lanes):
            kept.setdefault(lane, []).append(tokens + run.saved_row)
            rows.setdefault(lane, []).append(tokens * len(run.lanes) + (run.row + place))
    lanes = tuple(sorted(rows))
    return _linear_rows(
        lanes,
        [torch.cat(kept[lane]) for lane in lanes],
        [torch.cat(rows[lane]) for lane in lanes],
        exponents,
    )


def read_linears(
    reads: Sequence[Read], at: torch.Tensor, exponents: Mapping[int, int]
) -> LinearRows:
    """One row for each read, by sequence; read i has its inputs in row `at[i]`."""
    places: dict[int, list[int]] = {}
    for place in sorted(range(len(reads)), key=lambda i: reads[i].position):
        places.setdefault(reads[place].sequence, []).append(place)
    lanes = tuple(sorted(places))
    rows = [column(places[lane]) for lane in lanes]
    return _linear_rows(lanes, [at[of] for of in rows], rows, exponents)


def backward_queries(
    plan: PackedPlan, backward: BackwardPlan, saved_rows: torch.Tensor
) -> QueryTables:
    """The queries of all saved rows, and the lanes of each run."""
    runs = backward.runs
    return QueryTables(
        plan,
        plan.positions[saved_rows],
        [run.segment for run in runs],
        [run.saved_row for run in runs],
        [run.tokens for run in runs],
        backward,
        [run.lanes for run in runs],
        [run.row for run in runs],
    )


def backward_read_queries(
    plan: PackedPlan, backward: BackwardPlan, reads: Sequence[Read]
) -> QueryTables:
    """One query and one lane for each read; `reads` lie by (segment, sequence)."""
    segments, sequences = [r.segment for r in reads], [r.sequence for r in reads]
    before = zip([-1, *segments], [-1, *sequences], segments, sequences, strict=False)
    starts = [i for i, (a, b, c, d) in enumerate(before) if a != c or b != d]
    return QueryTables(
        plan,
        column([r.position for r in reads]),
        [segments[i] for i in starts],
        starts,
        [stop - start for start, stop in pairwise([*starts, len(reads)])],
        backward,
        [(sequences[i],) for i in starts],
        starts,
    )


def _linear_rows(
    lanes: tuple[int, ...],
    kept: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    exponents: Mapping[int, int],
) -> LinearRows:
    none = torch.empty(0, dtype=torch.int32)
    return LinearRows(
        lanes,
        tuple(accumulate((len(of) for of in rows), initial=0)),
        torch.cat([none, *kept]).to(torch.int32),
        torch.cat([none, *rows]).to(torch.int32),
        tuple(exponents.get(lane, 0) for lane in lanes),
    )


def _chunks(start: int, stop: int, saved_row: int | None, chunk: int) -> Iterator[Piece]:
    for row in range(start, stop, chunk):
        end = min(stop, row + chunk)
        shift = None if saved_row is None else saved_row - start
        yield Piece(slice(row, end), None if shift is None else slice(row + shift, end + shift))


def _offsets(lengths: Iterable[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))[:-1]
