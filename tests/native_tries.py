"""Tries of every kind, and the arguments of attention over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from native_arguments import Arguments, Draw
from native_oracles import EXACT
from native_oracles import attention_forward as attention_oracle
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """Segments in depth-first order as (parent, tokens), and who comes back through them.

    `lanes`: (leaf, first segment that the lane reaches) of each sequence. `reads`: the tokens that
    are queries, by segment; None: all of every segment. `names`: what the lanes are called, in the
    order in which they lie in every run.
    """

    segments: tuple[tuple[int, int], ...]
    lanes: tuple[tuple[int, int], ...] = ((0, 0),)
    reads: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    names: tuple[int, ...] | None = None
    row_order: tuple[int, ...] | None = None  # in which order the segments lie in k and v

    @property
    def rows(self) -> int:
        return sum(tokens for _, tokens in self.segments)

    def path(self, segment: int) -> list[int]:
        parent = self.segments[segment][0]
        return [*(self.path(parent) if parent >= 0 else []), segment]

    def start(self, segment: int) -> int:
        return sum(self.segments[s][1] for s in self.path(segment)[:-1])

    def first_row(self, segment: int) -> int:
        order = self.row_order or tuple(range(len(self.segments)))
        return sum(self.segments[s][1] for s in order[: order.index(segment)])

    def table(self) -> Tensor:
        rows = []
        for index, (parent, tokens) in enumerate(self.segments):
            start = self.start(index)
            rows.append([start, start + tokens, self.first_row(index), parent])
        return torch.tensor(rows, dtype=torch.int64).view(-1, 4)

    def through(self, segment: int) -> list[int]:
        """Lanes whose path leads through a segment."""
        return [i for i, (leaf, _) in enumerate(self.lanes) if segment in self.path(leaf)]

    def live(self, segment: int) -> list[int]:
        """Those of them that come back as far as here."""
        first = [self.start(first) for _, first in self.lanes]
        return [i for i in self.through(segment) if first[i] <= self.start(segment)]

    def name(self, lane: int) -> int:
        return lane if self.names is None else self.names[lane]


TRIES = {
    "single": Trie(((-1, 6),)),
    "one-token": Trie(((-1, 1),)),
    "long": Trie(((-1, 75),)),
    "branch-at-0": Trie(((-1, 4), (-1, 1), (-1, 9)), ((0, 0), (1, 1), (2, 2))),
    "nested": Trie(((-1, 5), (0, 3), (1, 4)), ((0, 0), (1, 0), (2, 0))),
    "deep": Trie(
        ((-1, 2), (0, 1), (1, 3), (2, 1), (3, 4), (4, 1), (4, 2), (2, 5), (7, 1), (0, 2)),
        ((5, 0), (6, 0), (8, 1), (9, 0), (9, 9)),
    ),
    "siblings": Trie(((-1, 9), (0, 4), (0, 1), (0, 6)), ((1, 0), (2, 0), (3, 0))),
    "group": Trie(
        ((-1, 17), (0, 5), (1, 3), (1, 2), (0, 8), (4, 3), (4, 1)),
        ((2, 1), (3, 1), (5, 4), (6, 4)),
    ),
    "staggered": Trie(((-1, 4), (0, 5), (1, 3)), ((2, 0), (2, 1), (2, 2), (2, 1))),
    "many-lanes": Trie(
        ((-1, 6), *((0, 1 + i % 3) for i in range(19))), tuple((1 + i, 0) for i in range(19))
    ),
    "tile-borders": Trie(
        ((-1, 33), (0, 64), (1, 1), (1, 16), (0, 31)), ((2, 1), (3, 1), (4, 4), (2, 0))
    ),
    "long-branches": Trie(((-1, 150), (0, 60), (0, 130)), ((1, 0), (2, 2))),
    "names": Trie(((-1, 3), (0, 4), (0, 2)), ((1, 0), (2, 0), (2, 2)), names=(0, 3, 5)),
    "rows-elsewhere": Trie(
        ((-1, 5), (0, 3), (1, 4), (0, 2)), ((2, 0), (3, 0)), row_order=(3, 1, 0, 2)
    ),
    "reads": Trie(
        ((-1, 8), (0, 5), (1, 3), (1, 2), (0, 4)),
        ((2, 1), (3, 1), (4, 0)),
        reads=((2, (0, 2)), (3, (1,)), (4, (3,))),
    ),
    "reads-within": Trie(
        ((-1, 4), (0, 6), (1, 3)),
        ((2, 0), (2, 1), (1, 1)),
        reads=((0, (1,)), (1, (2, 5)), (2, (2,))),
    ),
}

# Queries of one tile that look at keys far apart.
FAR_READS = Trie(((-1, 300), (0, 5)), ((1, 0),), reads=((0, (1, 150, 290)), (1, (3,))))
# More lanes than one backward takes through its tiles together.
CROWD = Trie(((-1, 3), (0, 7), *((1, 1) for _ in range(37))), tuple((2 + i, 1) for i in range(37)))


def shape(
    draw: Draw, trie: Trie, heads: int, kv_heads: int, head_dim: int, gain: float
) -> Arguments:
    """Queries and keys whose scores have a standard deviation of about `gain`."""
    return {
        "k": draw.stored(trie.rows, kv_heads, head_dim),
        "v": draw.stored(trie.rows, kv_heads, head_dim),
        "segments": trie.table(),
        "gain": gain * head_dim**-0.5,
        "heads": heads,
        "head_dim": head_dim,
    }


def _integers(rows: list[list[int]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, columns)


def _tokens(trie: Trie, segment: int) -> list[int]:
    """Which tokens of a segment ask."""
    if trie.reads is None:
        return list(range(trie.segments[segment][1]))
    return [t for at, tokens in trie.reads if at == segment for t in tokens]


def forward(
    draw: Draw,
    trie: Trie,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int = 0,
    softcap: float = 0.0,
    gain: float = 1.5,
    equal_keys: bool = False,
) -> Arguments:
    a = shape(draw, trie, heads, kv_heads, head_dim, gain)
    blocks, positions = [], []
    for segment in range(len(trie.segments)):
        tokens = _tokens(trie, segment)
        if tokens:
            blocks.append([segment, len(positions), len(tokens)])
            positions += [trie.start(segment) + t for t in tokens]
    return _finish(draw, a, blocks, 3, positions, window, softcap, equal_keys)


def _finish(
    draw: Draw,
    a: Arguments,
    blocks: list[list[int]],
    columns: int,
    positions: list[int],
    window: int,
    softcap: float,
    equal_keys: bool,
) -> Arguments:
    if equal_keys:
        a["k"] = a["k"][:1].expand_as(a["k"]).contiguous()
    a["q"] = draw.stored(len(positions), a["heads"], a["head_dim"], scale=a["gain"])
    a["blocks"] = _integers(blocks, columns)
    a["positions"] = torch.tensor(positions, dtype=torch.int64)
    return a | {"window": window, "softcap": softcap}


def backward(
    draw: Draw,
    trie: Trie,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int = 0,
    softcap: float = 0.0,
    gain: float = 1.5,
    equal_keys: bool = False,
    keeps_out: bool = True,
) -> Arguments:
    """Without `keeps_out` a float32 model has no `out`."""
    a = shape(draw, trie, heads, kv_heads, head_dim, gain)
    runs: list[list[int]] = []
    blocks: list[list[int]] = []
    run_lanes: list[int] = []
    block_lanes: list[int] = []
    positions: list[int] = []
    key_rows = query_rows = 0
    for segment, (_, tokens) in enumerate(trie.segments):
        live = trie.live(segment)
        if live:
            runs.append([segment, key_rows, tokens, len(run_lanes), len(live)])
            run_lanes += [trie.name(lane) for lane in live]
            key_rows += tokens * len(live)
        asked = _tokens(trie, segment)
        # Everything that is live comes back at once; of reads, each lane alone, live here or not.
        together = [live] if live else []
        alone = [[lane] for lane in trie.through(segment)]
        for lanes in together if trie.reads is None else alone:
            if not asked:
                continue
            blocks.append(
                [segment, len(positions), len(asked), query_rows, len(block_lanes), len(lanes)]
            )
            block_lanes += [trie.name(lane) for lane in lanes]
            positions += [trie.start(segment) + t for t in asked]
            query_rows += len(asked) * len(lanes)
    a = _finish(draw, a, blocks, 6, positions, window, softcap, equal_keys)
    a["block_lanes"] = torch.tensor(block_lanes, dtype=torch.int64)
    a["runs"] = _integers(runs, 5)
    a["run_lanes"] = torch.tensor(run_lanes, dtype=torch.int64)
    a["grad_out"] = draw.stored(query_rows, heads, head_dim, scale=0.02)
    a["key_rows"] = key_rows
    kept = attention_oracle(a | {"blocks": a["blocks"][:, :3]}, EXACT)
    a |= {name: kept[name].float() for name in ("out", "lse")}
    return a if keeps_out or draw.dtype != torch.float32 else a | {"out": None}


# --- integers -------------------------------------------------------------------------------------


def forward_one_hot(draw: Draw, trie: Trie, *sizes: int, **options: Any) -> Arguments:
    """Every query finds one key so much larger than the others that their weights vanish.

    Keys are distinct codes of ±16, the query is the code of one key that it sees: its score is
    256 head_dim, every other one at least 512 less, and exp(-512) is 0.
    """
    a = forward(draw, trie, *sizes, **options)
    _, kv_heads, head_dim = a["k"].shape
    codes = draw.signs(trie.rows, kv_heads, head_dim)
    # The number of a row in its first columns: no two alike.
    bits = (torch.arange(trie.rows)[:, None] >> torch.arange(12)) & 1
    codes[:, :, :12] = (2.0 * bits - 1.0)[:, None]
    a["k"], a["v"] = (16 * codes).to(draw.dtype), draw.integers(*a["v"].shape, most=9)
    group = a["heads"] // kv_heads
    q = torch.empty(len(a["positions"]), a["heads"], head_dim)
    for row, keys in seen(a):
        for head in range(a["heads"]):
            target = keys[int(torch.randint(len(keys), (), generator=draw.generator))]
            q[row, head] = 16 * codes[target, head // group]
    return a | {"q": q.to(draw.dtype), "v": a["v"].to(draw.dtype)}


def seen(a: Arguments) -> list[tuple[int, list[int]]]:
    """(row of q, rows of the keys that it sees), by comparing positions."""
    from native_oracles import visible_rows

    return [
        (row, visible_rows(a, block[0], int(a["positions"][row])))
        for block in a["blocks"].tolist()
        for row in range(block[1], block[1] + block[2])
    ]


def forward_uniform(draw: Draw, trie: Trie, *sizes: int, **options: Any) -> Arguments:
    """Queries and keys without a common column: all scores 0, all weights 1 / n."""
    a = forward(draw, trie, *sizes, **options)
    return a | _without_scores(draw, a)


def backward_of_ones(draw: Draw, trie: Trie, *sizes: int, **options: Any) -> Arguments:
    """All scores 0 and a log-sum-exp of 0: every probability that is seen is 1.

    These are no probabilities, but the gradients are defined by `p = exp(s - lse)` all the same,
    and are integers.
    """
    a = backward(draw, trie, *sizes, **options)
    a |= _without_scores(draw, a)
    a["v"] = draw.sparse(a["v"][..., 0].numel(), a["head_dim"], 2).view(a["v"].shape)
    a["grad_out"] = draw.integers(*a["grad_out"].shape, most=1)
    for name in ("v", "grad_out"):
        a[name] = a[name].to(draw.dtype)
    out = None if a["out"] is None else _sums_of_values(a)
    return a | {"out": out, "lse": torch.zeros_like(a["lse"])}


def _sums_of_values(a: Arguments) -> Tensor:
    """`out` where every probability is 1."""
    values = a["v"].double().repeat_interleave(a["q"].shape[1] // a["k"].shape[1], 1)
    out = torch.zeros(a["q"].shape, dtype=torch.float64)
    for row, keys in seen(a):
        out[row] = values[keys].sum(0)
    assert torch.equal(out.to(a["q"].dtype).double(), out)  # for backends that round it
    return out.float()


def _without_scores(draw: Draw, a: Arguments) -> Arguments:
    half = a["head_dim"] // 2
    q, k = draw.integers(*a["q"].shape), draw.integers(*a["k"].shape)
    q[..., half:], k[..., :half] = 0, 0
    v = draw.integers(*a["v"].shape, most=4)
    return {name: x.to(draw.dtype) for name, x in (("q", q), ("k", k), ("v", v))}


def given_lse_backward(a: Arguments) -> dict[str, Tensor]:
    """`p = exp(-lse)`; `dv = pᵀ g`; `ds = p (g vᵀ - Σ p g vᵀ)`; `dq = ds k`; `dk = dsᵀ q`.

    For scores of 0. Written out, as no forward has these for its gradients.
    """
    q, k, v, grads = (a[name].double() for name in ("q", "k", "v", "grad_out"))
    group = q.shape[1] // k.shape[1]
    dq = torch.full_like(grads, torch.nan)
    dk = k.new_zeros(a["key_rows"], *k.shape[1:])
    dv = torch.zeros_like(dk)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    keys_of = dict(seen(a))
    where: dict[tuple[int, int], int] = {}  # (row of k, lane) -> backward row
    run_lanes, block_lanes = a["run_lanes"].tolist(), a["block_lanes"].tolist()
    for segment, first, tokens, lane_at, lanes in a["runs"].tolist():
        for t in range(tokens):
            for c, lane in enumerate(run_lanes[lane_at : lane_at + lanes]):
                where[int(a["segments"][segment, 2]) + t, lane] = first + t * lanes + c
    for _, row, count, backward_row, lane_at, lanes in a["blocks"].tolist():
        for query in range(row, row + count):
            keys = keys_of[query]
            p = (-a["lse"][query].double()).exp()  # [heads], the same for every key
            for lane in block_lanes[lane_at : lane_at + lanes]:
                grad = grads[backward_row]
                dp = torch.einsum("nhd,hd->nh", v[keys], grad)
                ds = p * (dp - (p * dp).sum(0))
                dq[backward_row] = torch.einsum("nh,nhd->hd", ds, k[keys])
                backward_row += 1
                alive = [i for i, key in enumerate(keys) if (key, lane) in where]
                rows = [where[keys[i], lane] for i in alive]
                to_k = torch.einsum("nh,hd->nhd", ds[alive], q[query])
                dk[rows] += to_k.unflatten(1, (-1, group)).sum(2)
                dv[rows] += (p[:, None] * grad).unflatten(0, (-1, group)).sum(1)
    return {"dq": dq, "dk": dk, "dv": dv}


def sliced(trie: Trie, lane: int) -> tuple[Trie, list[int]]:
    """The path of one lane as a trie of its own, and the rows that its tokens had."""
    leaf, first = trie.lanes[lane]
    path = trie.path(leaf)
    segments = tuple((i - 1, trie.segments[s][1]) for i, s in enumerate(path))
    rows = [trie.first_row(s) + t for s in path for t in range(trie.segments[s][1])]
    alone = replace(
        trie,
        segments=segments,
        lanes=((len(path) - 1, path.index(first)),),
        reads=None,
        names=None,
        row_order=None,
    )
    return alone, rows
