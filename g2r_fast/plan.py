"""Which token positions of a batch are computed, once each, and which need a backward.

A *row* is one token position. Sequences that begin alike share the rows of their common prefix: a
trie over the token ids finds them. A *segment* is an unbranched stretch of that trie, and rows lie
in depth-first order, so that the rows below a segment follow it directly. A *lane* is one sequence
on its way back: a segment that C lanes pass through has C backward rows for each of its tokens,
token-major (row = t * C + lane), all of them reading what the one forward row saved.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .errors import InputError
from .native import sort_with_common_prefixes

__all__ = [
    "BackwardPlan",
    "DecoderShape",
    "PackedPlan",
    "PackedSequence",
    "Read",
    "Run",
    "Segment",
    "micro_batches",
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
        object.__setattr__(self, "reads", tuple(p + length if p < 0 else p for p in self.reads))
        if not all(0 <= p < length for p in self.reads):
            raise InputError(
                "a read position lies outside its sequence",
                expected=f"0 <= position < {length}",
                got=self.reads,
            )
        if not 0 <= self.backward_start <= length:
            raise InputError(
                "backward_start lies outside its sequence",
                expected=f"0 <= backward_start <= {length}",
                got=self.backward_start,
            )

    @property
    def backward_rows(self) -> int:
        return len(self.input_ids) - self.backward_start


@dataclass
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


@dataclass(frozen=True)
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
    reads: tuple[Read, ...]  # by sequence, then position
    leaves: tuple[int, ...]  # segment in which each sequence ends
    rows: int
    saved_rows: int

    @classmethod
    def build(cls, sequences: Iterable[PackedSequence]) -> PackedPlan:
        """The plan of a batch, linear in its tokens after one sort of the sequences."""
        sequences = tuple(sequences)
        trie = _Trie()
        order = []
        for index, common in _in_trie_order(sequences):
            order.append(index)
            trie.add(index, len(sequences[index].input_ids), common)
        for index in order:
            trie.cut(index, sequences[index].backward_start)
        segments, leaves, paths = trie.finish(order, sequences)
        saved_rows = 0
        for segment in segments:
            if segment.live:
                segment.saved_row = saved_rows
                saved_rows += len(segment)
        reads = []
        for index, sequence in enumerate(sequences):
            for position in sequence.reads:
                at = next(s for s in paths[index] if position < segments[s].stop)
                row = segments[at].row + position - segments[at].start
                reads.append(Read(index, position, at, row))
        return cls(sequences, tuple(segments), tuple(reads), tuple(leaves), trie.rows, saved_rows)

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """Token ids of the forward rows `[rows]`, int64."""
        ids = torch.empty(self.rows, dtype=torch.int64)
        for segment in self.segments:
            tokens = self.sequences[segment.members[0]].input_ids[segment.start : segment.stop]
            ids[segment.row : segment.row + len(segment)] = torch.tensor(tokens)
        return ids

    @cached_property
    def positions(self) -> torch.Tensor:
        """Positions of the forward rows `[rows]`, int64."""
        return torch.cat([torch.arange(s.start, s.stop) for s in self.segments])

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
        runs: list[Run] = []
        row = 0
        for index, segment in enumerate(self.segments):
            lanes = tuple(s for s in segment.live if s in chosen_set)
            if lanes:
                assert segment.saved_row is not None
                runs.append(Run(index, lanes, segment.start, len(segment), segment.saved_row, row))
                row += runs[-1].rows
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
        return tuple(sorted({read.row for read in self.reads}))

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
    sequences: Sequence[PackedSequence], max_tokens: int | None
) -> Iterator[list[int]]:
    """Indices of the sequences that run together: forward + backward rows <= max_tokens.

    Sequences are taken in the trie's order, so what shares a prefix stays together; a prefix that
    is cut in two is computed once in each part. Raises InputError where one sequence alone needs
    more rows than max_tokens.
    """
    alone = [len(s.input_ids) + s.backward_rows for s in sequences]
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
    for index, common in _in_trie_order(sequences):
        added = alone[index] - common if batch else alone[index]
        if rows + added > max_tokens:
            yield batch
            batch, rows, added = [], 0, alone[index]
        batch.append(index)
        rows += added
    if batch:
        yield batch


def _in_trie_order(sequences: Sequence[PackedSequence]) -> Iterator[tuple[int, int]]:
    """Indices in depth-first order, each with the tokens it shares with the one before."""
    order, shared = sort_with_common_prefixes([list(s.input_ids) for s in sequences])
    return zip(order, [0, *shared], strict=False)


class _Node:
    """A trie node while the trie grows; splitting keeps the object as the lower part."""

    __slots__ = ("parent", "row", "start", "stop")

    def __init__(self, start: int, stop: int, row: int, parent: _Node | None) -> None:
        self.start, self.stop, self.row, self.parent = start, stop, row, parent


class _Trie:
    """Grows by sequences in sorted order, so only the last path can branch."""

    def __init__(self) -> None:
        self.rows = 0
        self.nodes: list[_Node] = []
        self.leaf_of: dict[int, _Node] = {}
        self._last: _Node | None = None

    def add(self, index: int, length: int, common: int) -> None:
        """Add a sequence that shares `common` tokens with the one added before."""
        parent = self._last
        while parent is not None and parent.start >= common:
            parent = parent.parent
        if parent is not None and common < parent.stop:
            parent = self._split(parent, common)
        if common < length:
            node = _Node(common, length, self.rows, parent)
            self.nodes.append(node)
            self.rows += length - common
        else:  # equal to the sequence before
            assert self._last is not None
            node = self._last
        self.leaf_of[index] = self._last = node

    def cut(self, index: int, position: int) -> None:
        """Let no segment of this sequence straddle `position`."""
        node: _Node | None = self.leaf_of[index]
        while node is not None and node.start >= position:
            node = node.parent
        if node is not None and position < node.stop:
            self._split(node, position)

    def finish(
        self, order: Sequence[int], sequences: Sequence[PackedSequence]
    ) -> tuple[list[Segment], list[int], list[list[int]]]:
        """Segments in row order, the leaf of each sequence and the path to it, root first."""
        self.nodes.sort(key=lambda node: node.row)
        number = {id(node): i for i, node in enumerate(self.nodes)}
        segments: list[Segment] = []
        for node in self.nodes:
            parent = None if node.parent is None else number[id(node.parent)]
            path = () if parent is None else (*segments[parent].path, parent)
            segments.append(Segment(node.start, node.stop, node.row, parent, path))
        members: list[list[int]] = [[] for _ in segments]
        leaves = [0] * len(order)
        paths: list[list[int]] = [[] for _ in order]
        for index in order:
            leaf = number[id(self.leaf_of[index])]
            leaves[index] = leaf
            paths[index] = [*segments[leaf].path, leaf]
            for at in paths[index]:
                members[at].append(index)
        for segment, through in zip(segments, members, strict=True):
            segment.members = tuple(through)
            segment.live = tuple(i for i in through if sequences[i].backward_start <= segment.start)
        return segments, leaves, paths

    def _split(self, node: _Node, position: int) -> _Node:
        upper = _Node(node.start, position, node.row, node.parent)
        node.row += position - node.start
        node.start, node.parent = position, upper
        self.nodes.append(upper)
        return upper


def _ratio(whole: int, part: int) -> str:
    return f"{whole / part:.2f}x" if part else "0x"
