"""The trie over a batch, as columns of integers: compiled where that is built, else in Python.

Both are linear in tokens once the sequences are sorted: a step from a segment to its parent passes
at least one token, and a segment has a token for every sequence through it. `g2r_fast.plan` makes
its records from the columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import native

__all__ = ["Layout", "in_trie_order", "lay_out"]


def _column() -> array[int]:
    return array("q")


@dataclass
class Layout:
    """Segments by column, in row order, which is depth-first; -1 stands for none."""

    start: array[int] = field(default_factory=_column)  # positions of the segment's tokens
    stop: array[int] = field(default_factory=_column)
    row: array[int] = field(default_factory=_column)  # of its first token
    parent: array[int] = field(default_factory=_column)  # its segment, or -1
    saved_row: array[int] = field(default_factory=_column)  # of its first token, or -1
    first: array[int] = field(default_factory=_column)  # lanes[first:last] pass through it
    last: array[int] = field(default_factory=_column)
    live_first: array[int] = field(default_factory=_column)  # those whose backward reaches it
    live_last: array[int] = field(default_factory=_column)
    lanes: array[int] = field(default_factory=_column)  # first the sequences, depth-first
    leaf: array[int] = field(default_factory=_column)  # [N], the segment in which each ends
    read_segment: array[int] = field(default_factory=_column)  # [reads]
    read_row: array[int] = field(default_factory=_column)


def in_trie_order(sequences: list[Sequence[int]]) -> tuple[list[int], list[int]]:
    """`native.sort_with_common_prefixes`, faster where all ids are int."""
    core = native.core()
    found = None if core is None else core.common_prefix_lengths_of_lists(sequences)
    return native.sort_with_common_prefixes(sequences) if found is None else found


def lay_out(
    order: Sequence[int],
    common: Sequence[int],
    lengths: Sequence[int],
    backward_starts: Sequence[int],
    owners: Sequence[int],
    positions: Sequence[int],
) -> Layout:
    """Segments, who passes through them, and where the reads lie.

    Args:
        order: the N sequences in lexicographic order.
        common: N − 1 lengths, how many tokens each has in common with the next in that order.
        lengths: of the N sequences, at least 1.
        backward_starts: the position from which each of them wants gradients, up to its length.
        owners: for every read, the sequence.
        positions: for every read, its position there.
    """
    given = (order, common, lengths, backward_starts, owners, positions)
    columns = [array("q", column) for column in given]
    core = native.core()
    if core is None:
        return _python_lay_out(*columns)
    return Layout(*(array("q", column) for column in core.lay_out(*columns)))


def _python_lay_out(*columns: array[int]) -> Layout:
    """What g2r_fast._core.lay_out computes."""
    order, common, lengths, backward_starts, owners, positions = columns
    trie = _Trie()
    leaves = [0] * len(order)  # nodes
    for sequence, shared in zip(order, [0, *common], strict=False):
        leaves[sequence] = trie.add(lengths[sequence], shared)
    for sequence in order:
        trie.cut(leaves[sequence], backward_starts[sequence])

    layout = Layout(lanes=array("q", order))
    number = _add_segments(layout, trie)
    layout.leaf.extend(number[node] for node in leaves)
    _add_members(layout)
    _add_live(layout, backward_starts)
    for node, row in _reads(trie, leaves, owners, positions):
        layout.read_segment.append(number[node])
        layout.read_row.append(row)
    layout.read_segment.reverse()
    layout.read_row.reverse()
    return layout


class _Trie:
    """Grows by sequences in sorted order, so only the last path can branch."""

    def __init__(self) -> None:
        self.start: list[int] = []  # by node
        self.stop: list[int] = []
        self.row: list[int] = []
        self.parent: list[int] = []
        self._last = -1
        self._rows = 0

    def add(self, length: int, common: int) -> int:
        """Add a sequence that shares `common` tokens with the one added before; where it ends."""
        parent = self.cut(self._last, common)
        if common < length:  # else it is equal to the one before
            self._last = self._append(common, length, self._rows, parent)
            self._rows += length - common
        return self._last

    def cut(self, leaf: int, position: int) -> int:
        """Let no node between `leaf` and the root straddle `position`; the one that ends in front
        of it, -1 at position 0. The lower part of a node keeps its number, so that leaves stay
        leaves."""
        node = self.holder(leaf, position - 1)
        if node < 0 or self.stop[node] <= position:
            return node
        upper = self._append(self.start[node], position, self.row[node], self.parent[node])
        self.row[node] += position - self.start[node]
        self.start[node], self.parent[node] = position, upper
        return upper

    def holder(self, leaf: int, position: int) -> int:
        """The node between `leaf` and the root that holds a position before the leaf's stop."""
        while leaf >= 0 and self.start[leaf] > position:
            leaf = self.parent[leaf]
        return leaf

    def _append(self, start: int, stop: int, row: int, parent: int) -> int:
        self.start.append(start)
        self.stop.append(stop)
        self.row.append(row)
        self.parent.append(parent)
        return len(self.start) - 1


def _add_segments(layout: Layout, trie: _Trie) -> list[int]:
    """Write the nodes in row order; the segment number of each."""
    by_row = sorted(range(len(trie.row)), key=trie.row.__getitem__)
    number = [0] * len(by_row)
    for segment, node in enumerate(by_row):
        number[node] = segment
    for node in by_row:
        layout.start.append(trie.start[node])
        layout.stop.append(trie.stop[node])
        layout.row.append(trie.row[node])
        layout.parent.append(-1 if trie.parent[node] < 0 else number[trie.parent[node]])
    return number


def _add_members(layout: Layout) -> None:
    """The sequences through a segment are neighbours in depth-first order: from the first to the
    last of those that end in it or below it."""
    first, last = [len(layout.leaf)] * len(layout.row), [0] * len(layout.row)
    for at, sequence in enumerate(layout.lanes):
        leaf = layout.leaf[sequence]
        first[leaf], last[leaf] = min(first[leaf], at), at + 1
    for segment in reversed(range(len(layout.row))):  # children lie behind their parents
        parent = layout.parent[segment]
        if parent >= 0:
            first[parent] = min(first[parent], first[segment])
            last[parent] = max(last[parent], last[segment])
    layout.first.extend(first)
    layout.last.extend(last)


def _add_live(layout: Layout, backward_starts: Sequence[int]) -> None:
    """A segment through which some come back and some do not has a list of its own behind the
    order."""
    saved_rows = 0
    for start, stop, first, last in zip(
        layout.start, layout.stop, layout.first, layout.last, strict=True
    ):
        live = [s for s in layout.lanes[first:last] if backward_starts[s] <= start]
        every = len(live) == last - first
        layout.live_first.append(first if every else len(layout.lanes))
        layout.live_last.append(layout.live_first[-1] + len(live))
        layout.saved_row.append(saved_rows if live else -1)
        saved_rows += stop - start if live else 0
        layout.lanes.extend([] if every else live)


def _reads(
    trie: _Trie, leaves: Sequence[int], owners: array[int], positions: array[int]
) -> Iterator[tuple[int, int]]:
    """Node and row of every read, the last one first: as positions mostly ascend, one walk from
    leaf to root then serves a whole sequence."""
    owner = node = -1
    for sequence, position in zip(reversed(owners), reversed(positions), strict=True):
        if sequence != owner or position >= trie.stop[node]:
            owner, node = sequence, leaves[sequence]
        node = trie.holder(node, position)
        yield node, trie.row[node] + position - trie.start[node]
