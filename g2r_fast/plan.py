"""Which token positions of a batch are computed, once each, and which need a backward.

A *row* is one token position. Sequences that begin alike share the rows of their common prefix: a
trie over the token ids finds them. A *segment* is an unbranched stretch of that trie, and rows lie
in depth-first order, so that the rows below a segment follow it directly. A *lane* is one sequence
on its way back: a segment that C lanes pass through has C backward rows for each of its tokens,
token-major (row = t * C + lane), all of them reading what the one forward row saved.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import overload

import torch

from . import planner
from .errors import InputError

__all__ = [
    "BackwardPlan",
    "DecoderShape",
    "PackedPlan",
    "PackedSequence",
    "Read",
    "Reads",
    "Run",
    "Segment",
    "column",
    "micro_batches",
    "table",
]


@dataclass(frozen=True)
class PackedSequence:
    """Ids of one sequence, where its logits are read, and where its backward may stop."""

    input_ids: Sequence[int]
    backward_start: int  # no gradient is wanted before this position
    reads: tuple[int, ...] = (-1,)  # positions whose logits are read, ascending; -1: the last
    label: str = ""  # what errors call it; empty: its index

    def __post_init__(self) -> None:
        length = len(self.input_ids)
        if length == 0:
            raise InputError("a sequence is empty", expected="at least one token")
        ids = self.input_ids
        if not isinstance(ids, (list, tuple)):  # a tensor, say, is slow to read one by one
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            object.__setattr__(self, "input_ids", ids)
        reads = tuple(self.reads)
        if min(reads, default=0) < 0:
            reads = tuple(p + length if p < 0 else p for p in reads)
        reads = tuple(dict.fromkeys(reads))  # of one token, the first is the last
        object.__setattr__(self, "reads", reads)
        if reads and not (min(reads) >= 0 and max(reads) < length):
            raise InputError(
                "a read position lies outside its sequence",
                expected=f"0 <= position < {length}",
                got=reads,
            )
        if any(a >= b for a, b in pairwise(reads)):
            raise InputError("read positions do not ascend", expected="ascending", got=reads)
        if not 0 <= self.backward_start <= length:
            raise InputError(
                "backward_start lies outside its sequence",
                expected=f"0 <= backward_start <= {length}",
                got=self.backward_start,
            )

    @property
    def backward_rows(self) -> int:
        return len(self.input_ids) - self.backward_start


@dataclass(slots=True)
class Segment:
    """An unbranched stretch of the trie: tokens [start, stop) of every sequence through it."""

    start: int  # position of its first token
    stop: int
    row: int  # forward row of its first token
    parent: int | None
    path: tuple[int, ...] = ()  # ancestors, root first
    members: tuple[int, ...] = ()  # sequences through it, in depth-first order
    live: tuple[int, ...] = ()  # those of them whose backward reaches it
    saved_row: int | None = None  # where its activations are kept; None: nothing comes back

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Read:
    """Logits that are looked at: the row after which `sequence` predicts its next token."""

    sequence: int
    position: int
    segment: int
    row: int


class Reads(Sequence[Read]):
    """A plan's reads, made when looked at: there may be one for every token."""

    def __init__(
        self,
        sequences: array[int],
        positions: array[int],
        segments: array[int],
        rows: array[int],
    ) -> None:
        self.rows = rows
        self._columns = (sequences, positions, segments, rows)

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, at: int) -> Read: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Read, ...]: ...
    def __getitem__(self, at: int | slice) -> Read | tuple[Read, ...]:
        if isinstance(at, slice):
            return tuple(map(Read, *(column[at] for column in self._columns)))
        return Read(*(column[at] for column in self._columns))

    def __iter__(self) -> Iterator[Read]:
        return map(Read, *self._columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder, for counting bytes before anything runs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    itemsize: int  # bytes of one saved activation
    stat_itemsize: int  # bytes of one saved row statistic
    qk_norm: bool = False
    attended_itemsize: int | None = None  # bytes of what attention gives; None: `itemsize`
    keeps_attended: bool = False  # where the backend's attention backward reads its output
    keeps_linears: bool = False  # where a signal reads linear layers: their inputs too


@dataclass(slots=True)
class Run:
    """The backward rows of one segment: len(segment) tokens times len(lanes) lanes."""

    segment: int
    lanes: tuple[int, ...]  # sequences, in depth-first order
    start: int  # position of its first token
    tokens: int
    saved_row: int
    row: int  # first backward row

    @property
    def rows(self) -> int:
        return self.tokens * len(self.lanes)


@dataclass(frozen=True)
class BackwardPlan:
    """The backward rows of chosen sequences over a plan's forward rows."""

    runs: tuple[Run, ...]
    rows: int
    by_segment: dict[int, Run] = field(repr=False)


@dataclass(frozen=True)
class PackedPlan:
    """Rows, segments and reads of a batch; see the module's text for the words."""

    sequences: tuple[PackedSequence, ...]
    segments: tuple[Segment, ...]
    reads: Reads  # by sequence, then position
    leaves: tuple[int, ...]  # segment in which each sequence ends
    rows: int
    saved_rows: int

    @classmethod
    def build(cls, sequences: Iterable[PackedSequence]) -> PackedPlan:
        """The plan of a batch, linear in its tokens after one sort of the sequences."""
        sequences = tuple(sequences)
        order, common = planner.in_trie_order([s.input_ids for s in sequences])
        owners = array("q", [i for i, s in enumerate(sequences) for _ in s.reads])
        positions = array("q", [position for s in sequences for position in s.reads])
        layout = planner.lay_out(
            order,
            common,
            [len(s.input_ids) for s in sequences],
            [s.backward_start for s in sequences],
            owners,
            positions,
        )
        segments = tuple(_segments(layout))
        saved = (s.saved_row + len(s) for s in reversed(segments) if s.saved_row is not None)
        return cls(
            sequences,
            segments,
            reads=Reads(owners, positions, layout.read_segment, layout.read_row),
            leaves=tuple(layout.leaf),
            rows=segments[-1].row + len(segments[-1]) if segments else 0,
            saved_rows=next(saved, 0),
        )

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """Token ids of the forward rows `[rows]`, int64."""
        ids = array("q")
        for segment in self.segments:
            tokens = self.sequences[segment.members[0]].input_ids
            ids.extend(array("q", tokens[segment.start : segment.stop]))
        return _tensor(ids)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Positions of the forward rows `[rows]`, int64."""
        # Within a segment, position and row count up together.
        shifts = column([s.start - s.row for s in self.segments])
        lengths = column([s.stop - s.start for s in self.segments])
        return torch.arange(self.rows).add_(shifts.repeat_interleave(lengths))

    @cached_property
    def segment_table(self) -> torch.Tensor:
        """`[segments, 4]`: start, stop, first forward row, parent or -1; int64."""
        return table(
            [s.start for s in self.segments],
            [s.stop for s in self.segments],
            [s.row for s in self.segments],
            [-1 if s.parent is None else s.parent for s in self.segments],
        )

    @cached_property
    def ranks(self) -> torch.Tensor:
        """Place of every sequence in depth-first order `[N]`, int64."""
        roots = (s.members for s in self.segments if s.parent is None)
        order = column(chain.from_iterable(roots))
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order))
        return ranks

    @property
    def unshared_rows(self) -> int:
        """Forward rows if every sequence ran alone."""
        return sum(len(s.input_ids) for s in self.sequences)

    @property
    def backward_rows(self) -> int:
        """Backward rows if every sequence comes back."""
        return sum(s.backward_rows for s in self.sequences)

    @property
    def length(self) -> int:
        """The longest sequence."""
        return max((s.stop for s in self.segments), default=0)

    def backward(self, chosen: Iterable[int]) -> BackwardPlan:
        """The backward rows of the chosen sequences."""
        chosen_set = set(chosen)
        every = chosen_set.issuperset(range(len(self.sequences)))
        runs: list[Run] = []
        row = 0
        for index, segment in enumerate(self.segments):
            lanes = segment.live
            if lanes and not every:
                lanes = tuple(filter(chosen_set.__contains__, lanes))
            if lanes:
                assert segment.saved_row is not None
                start = segment.start
                tokens = segment.stop - start
                runs.append(Run(index, lanes, start, tokens, segment.saved_row, row))
                row += tokens * len(lanes)
        return BackwardPlan(tuple(runs), row, {run.segment: run for run in runs})

    def saved_bytes(self, shape: DecoderShape) -> int:
        """Bytes a forward keeps for the backward, exactly."""
        item, stat = shape.itemsize, shape.stat_itemsize
        heads_width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        keys_and_values = 2 * kv_width * item  # every row
        into_layer = shape.hidden * item + stat  # its normalised input
        query = (heads_width + shape.hidden + 2 * shape.intermediate) * item
        query += (shape.heads + 1) * stat  # log-sum-exp per head, the second norm
        if shape.keeps_attended or shape.keeps_linears:
            query += heads_width * (shape.attended_itemsize or item)
        if shape.keeps_linears:
            query += shape.intermediate * item
        if shape.qk_norm:
            into_layer += kv_width * item + shape.kv_heads * stat
            query += heads_width * item + shape.heads * stat
        body = self.rows * keys_and_values + self.saved_rows * (into_layer + query)
        # The last layer computes, beyond keys and values, only the rows that are read, whose
        # normalised input and final norm are kept beside the others'.
        reads = len(self.read_rows)
        last = self.rows * keys_and_values + self.saved_rows * into_layer
        last += reads * (query + 2 * (shape.hidden * item + stat))
        return (shape.layers - 1) * body + last

    @cached_property
    def read_rows(self) -> tuple[int, ...]:
        """The distinct forward rows that are read, ascending."""
        read = torch.zeros(self.rows, dtype=torch.bool)
        read[_tensor(self.reads.rows)] = True
        return tuple(read.nonzero().flatten().tolist())

    @cached_property
    def read_places(self) -> dict[int, int]:
        """Where each of `read_rows` lies among them."""
        return {row: place for place, row in enumerate(self.read_rows)}

    def read_rows_in(self, segment: Segment) -> tuple[int, ...]:
        """Those of `read_rows` that lie in a segment."""
        first = bisect_left(self.read_rows, segment.row)
        return self.read_rows[first : bisect_left(self.read_rows, segment.row + len(segment))]

    def describe(self, shape: DecoderShape | None = None) -> str:
        """Rows, sharing and (with a shape) expected bytes, in words, before anything runs."""
        lines = [
            f"{len(self.sequences)} sequences, {len(self.segments)} segments, "
            f"longest {self.length} tokens",
            f"forward rows  {self.rows} of {self.unshared_rows} "
            f"({_ratio(self.unshared_rows, self.rows)} shared)",
            f"backward rows {self.backward_rows} at most, of {self.unshared_rows}",
            f"saved rows    {self.saved_rows}",
        ]
        if shape is not None:
            lines.append(f"saved bytes   {self.saved_bytes(shape) / 2**20:.1f} MiB")
        return "\n".join(lines)


def micro_batches(
    sequences: Sequence[PackedSequence],
    max_tokens: int | None,
    weights: tuple[int, int] = (1, 1),
) -> Iterator[list[int]]:
    """Indices of the sequences that run together: forward + backward rows <= max_tokens.

    Sequences are taken in the trie's order, so what shares a prefix stays together; a prefix that
    is cut in two is computed once in each part. With `weights` a forward and a backward row count
    as that many tokens each. Raises InputError where one sequence alone needs more rows than
    max_tokens.
    """
    forward, backward = weights
    alone = [forward * len(s.input_ids) + backward * s.backward_rows for s in sequences]
    if max_tokens is None:
        max_tokens = sum(alone)
    for index, rows in enumerate(alone):
        if rows > max_tokens:
            raise InputError(
                "one sequence needs more rows than max_tokens",
                expected=f"forward + backward rows <= {max_tokens}",
                got=rows,
                index=sequences[index].label or index,
                fix=f"Use max_tokens >= {max(alone)}, or None to let free memory decide.",
            )
    batch: list[int] = []
    rows = 0
    order, common = planner.in_trie_order([s.input_ids for s in sequences])
    for index, shared in zip(order, [0, *common], strict=False):
        added = alone[index] - forward * shared if batch else alone[index]
        if rows + added > max_tokens:
            yield batch
            batch, rows, added = [], 0, alone[index]
        batch.append(index)
        rows += added
    if batch:
        yield batch


def _segments(layout: planner.Layout) -> Iterator[Segment]:
    lanes = tuple(layout.lanes)
    paths: list[tuple[int, ...]] = []
    columns = (layout.start, layout.stop, layout.row, layout.parent, layout.saved_row)
    ranges = (layout.first, layout.last, layout.live_first, layout.live_last)
    for start, stop, row, parent, saved, first, last, live_first, live_last in zip(
        *columns, *ranges, strict=True
    ):
        path = () if parent < 0 else (*paths[parent], parent)
        paths.append(path)
        members = lanes[first:last]
        live = members if live_first == first else lanes[live_first:live_last]
        yield Segment(
            start,
            stop,
            row,
            None if parent < 0 else parent,
            path,
            members,
            live,
            None if saved < 0 else saved,
        )


def column(values: Iterable[int]) -> torch.Tensor:
    """As an int64 tensor, several times faster than torch reads a list."""
    return _tensor(array("q", values))


def table(*columns: Iterable[int]) -> torch.Tensor:
    """`[rows, columns]`, int64."""
    return torch.stack([column(values) for values in columns], 1)


def _tensor(values: array[int]) -> torch.Tensor:
    """The same memory as a tensor; torch refuses an empty buffer."""
    if not values:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(values, dtype=torch.int64)


def _ratio(whole: int, part: int) -> str:
    return f"{whole / part:.2f}x" if part else "0x"
