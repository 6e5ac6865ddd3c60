"""The multiply-adds that Grad2Reward's attribution cannot do without, and their share of the time.

Counted from the sequences alone, by a trie of its own: every distinct prefix is one forward row;
every (True judgement, token from the response's first on) is one backward row. A judgement reads
its last row; `signal_flops.py` counts sequences that read several. A multiply-add is two FLOPs.
H hidden, A query heads, V key/value heads, D head width, I MLP width, W vocabulary.

    linear forward      rows * (H A D + 2 H V D + A D H + 3 H I) in every layer but the last;
                        there rows * 2 H V D, and the rest for the rows that are read
    linear backward     the same matrices once per backward row (input gradients, no weight
                        gradients); in the last layer 2 H V D per backward row, and the rest once
                        per read of a True judgement
    head forward        H W per row that is read: a log-probability takes all logits
    head backward       H W per read of a True judgement
    attention forward   2 products, A D each, per row and key that it sees; in the last layer only
                        for the rows that are read
    attention backward  scores once per row that any judgement comes back to, however many do, and
                        key that it sees; dP and dQ per backward row and key that it sees; dK and
                        dV per backward row and key from the response's first on: the prompt's keys
                        get no gradient. In the last layer only for the rows that are read.

A row sees the keys of its path, itself included, at most `window` of them. Not counted: norms,
softmax, rotary embeddings, activations, sums. What an implementation computes above the diagonal
of a tile, or twice, is not required either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PretrainedConfig

from bench.workload import Workload

__all__ = ["Judgement", "RequiredFlops", "Sizes", "required_flops", "share_of_peak"]


@dataclass(frozen=True)
class Sizes:
    """Of a decoder with gated MLPs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    window: int | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes:
        text: Any = config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            head_dim,
            text.intermediate_size,
            text.vocab_size,
        )


@dataclass(frozen=True)
class Judgement:
    """A sequence, where its response starts, and whether it comes back to there."""

    input_ids: Sequence[int]
    response_start: int
    is_true: bool
    reads: tuple[int, ...] | None = None  # positions whose logits are read; None: the last

    @property
    def read_positions(self) -> tuple[int, ...]:
        return (len(self.input_ids) - 1,) if self.reads is None else self.reads


@dataclass(frozen=True)
class RequiredFlops:
    linear_forward: int
    linear_backward: int
    head_forward: int
    head_backward: int
    attention_forward: int
    attention_backward: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def describe(self) -> dict[str, float]:
        """In GFLOP, the total first."""
        terms = {"total": self.total, **asdict(self)}
        return {name: round(value / 1e9, 3) for name, value in terms.items()}


def judgements_of(workload: Workload) -> list[Judgement]:
    return [
        Judgement(workload.sequence_ids(i, k), workload.span(i).start, workload.is_true(i, k))
        for i, k in workload.judgements
    ]


def required_flops(sizes: Sizes, judgements: Sequence[Judgement]) -> RequiredFlops:
    """See the module's text."""
    paths = _rows(judgements)
    position = {row: at for path in paths for at, row in enumerate(path)}
    true = [(j, path) for j, path in zip(judgements, paths, strict=True) if j.is_true]
    seen = {row: _visible(at, 0, sizes.window) for row, at in position.items()}

    reads = {path[at] for j, path in zip(judgements, paths, strict=True) for at in j.read_positions}
    back = [(row, j.response_start) for j, path in true for row in path[j.response_start :]]
    back_once = {row for row, _ in back}
    last = [
        (path[at], j.response_start)
        for j, path in true
        for at in j.read_positions
        if at >= j.response_start
    ]
    last_once = {row for row, _ in last}

    def all_keys(rows: Any) -> int:
        return sum(seen[row] for row in rows)

    def live_keys(rows: list[tuple[int, int]]) -> int:
        return sum(_visible(position[row], start, sizes.window) for row, start in rows)

    def backward(rows: list[tuple[int, int]], once: set[int]) -> int:
        return all_keys(once) + 2 * all_keys(row for row, _ in rows) + 2 * live_keys(rows)

    body = sizes.layers - 1
    kv = 2 * sizes.hidden * sizes.kv_heads * sizes.head_dim
    rest = 2 * sizes.hidden * sizes.heads * sizes.head_dim + 3 * sizes.hidden * sizes.intermediate
    head = sizes.hidden * sizes.vocab
    width = sizes.heads * sizes.head_dim
    rows = len(position)
    return RequiredFlops(
        linear_forward=2 * (body * rows * (kv + rest) + rows * kv + len(reads) * rest),
        linear_backward=2 * (body * len(back) * (kv + rest) + len(back) * kv + len(last) * rest),
        head_forward=2 * len(reads) * head,
        head_backward=2 * sum(len(j.read_positions) for j, _ in true) * head,
        attention_forward=2 * width * (body * 2 * all_keys(position) + 2 * all_keys(reads)),
        attention_backward=2
        * width
        * (body * backward(back, back_once) + backward(last, last_once)),
    )


def share_of_peak(gflop: float, seconds: float, gflops: float) -> float:
    """Required FLOPs over those that the machine could have done in that time."""
    return gflop / (seconds * gflops)


def _rows(judgements: Sequence[Judgement]) -> list[list[int]]:
    """The row of every token of every judgement; equal prefixes share theirs."""
    row_of: dict[tuple[int, int], int] = {}  # (row before it, token) -> row
    paths = []
    for judgement in judgements:
        path: list[int] = []
        for token in judgement.input_ids:
            parent = path[-1] if path else -1
            path.append(row_of.setdefault((parent, token), len(row_of)))
        paths.append(path)
    return paths


def _visible(position: int, start: int, window: int | None) -> int:
    """Keys from `start` on that a query at `position` sees, its own included."""
    first = start if window is None else max(start, position - window + 1)
    return max(0, position + 1 - first)
