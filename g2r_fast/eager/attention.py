"""Causal attention over a trie of segments, forward and multi-lane backward; see ops.py.

Rows come as [rows, heads, head_dim]. Inside, kv heads go first, so that one batched product serves
all of them, and the `group` query heads of a kv head lie next to each other, so that they are rows
of one tall matrix; tiles are laid out so one at a time, when they are read and written.

Depth-first row order makes the keys of the current path a stack: position p of the path lies at
index p of one buffer, and a segment only ever overwrites what lies behind its own start.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..plan import BackwardPlan, PackedPlan, Run, Segment
from ..tables import QueryBlock, QueryTables
from .products import SMALLEST, product, product_nt, product_tn

__all__ = ["attention_backward", "attention_forward"]

# Elements of one score tile over all kv heads: with its gradient and two small products it stays
# in a core's second-level cache on the CPUs looked at; chosen by bench/tile_sizes.py.
_TILE = {"cpu": 2**20, "cuda": 2**24}
# Keys are taken in whole steps, so that products come in few shapes.
_KEY_STEP = 32


class _Path:
    """Keys and values of the path to the current segment, by position: `[kv_heads, length, d]`."""

    def __init__(self, plan: PackedPlan, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype):
        _, kv_heads, head_dim = k.shape
        self._k, self._v = k, v
        length = plan.length + _KEY_STEP
        self.k = torch.empty(kv_heads, length, head_dim, dtype=dtype, device=k.device)
        self.v = torch.empty_like(self.k)

    def enter(self, segment: Segment) -> None:
        rows = slice(segment.row, segment.row + len(segment))
        self.k[:, segment.start : segment.stop] = self._k[rows].transpose(0, 1)
        self.v[:, segment.start : segment.stop] = self._v[rows].transpose(0, 1)
        # Keys are read in whole steps: what lies behind the path is masked, but must be a number.
        self.k[:, segment.stop : segment.stop + _KEY_STEP] = 0
        self.v[:, segment.stop : segment.stop + _KEY_STEP] = 0


def attention_forward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
) -> None:
    path = _Path(queries.plan, k, v, lse.dtype)
    kv_heads = k.shape[1]
    for _, block in _along(queries, path):
        block_q, block_out = (_by_kv_head(x[block.rows], kv_heads) for x in (q, out))
        block_lse = lse[block.rows].unflatten(1, (kv_heads, -1)).transpose(0, 1)
        for heads in _head_slices(block_q, block, 1):
            for tokens, low, high in _tiles(block, 1, block_q[heads], window):
                high = _rounded(high)
                tile_q = _matrix(block_q[heads, tokens], lse.dtype)
                scores = product_nt(tile_q, path.k[heads, low:high])
                if softcap:
                    scores.div_(softcap).tanh_().mul_(softcap)
                _mask_(scores, block.positions[tokens], low, high, window, -torch.inf)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                mixed = product(weights, path.v[heads, low:high]).div_(total)
                block_out[heads, tokens] = mixed.view(block_out[heads, tokens].shape)
                tile_lse = (largest + total.log()).view(block_lse[heads, tokens].shape)
                block_lse[heads, tokens] = tile_lse


def attention_backward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
) -> None:
    """The probabilities of a query are computed once for all its lanes, and both parts of its keys
    use the final `lse` and row sums, so they add up exactly. Keys before the first live segment of
    a lane get no gradient: they cost dQ only, three products where a full backward takes five.
    """
    plan, backward = queries.plan, queries.backward
    assert backward is not None
    path = _Path(plan, k, v, lse.dtype)
    kv_heads = k.shape[1]
    dk.zero_()
    dv.zero_()
    for index, block in _along(queries, path):
        segment, lanes = plan.segments[index], len(block.lanes)
        live = _live_runs(segment, index, block.lanes, backward)
        first = min((plan.segments[run.segment].start for run, *_ in live), default=segment.stop)
        block_q = _by_kv_head(q[block.rows], kv_heads)
        block_lse = lse[block.rows].unflatten(1, (kv_heads, -1)).transpose(0, 1)
        rows = slice(block.row, block.row + len(block.positions) * lanes)
        block_grad, block_dq = (_by_lane(x[rows], lanes, kv_heads) for x in (grad_out, dq))
        for heads in _head_slices(block_q, block, lanes):
            path_dk, path_dv = _block_backward(
                block_q[heads],
                block_lse[heads],
                block_grad[heads],
                block_dq[heads],
                path.k[heads],
                path.v[heads],
                block,
                first,
                segment.stop,
                window,
                softcap,
            )
            for run, inner, outer in live:
                at = plan.segments[run.segment]
                keys = slice(at.start - first, at.stop - first)
                where = slice(run.row, run.row + run.rows)
                shape = (run.tokens, len(run.lanes), *dk.shape[1:])
                # [heads, d, lanes, keys] and [heads, lanes, d, keys] -> [keys, lanes, heads, d]
                dk[where].view(shape)[:, outer, heads] += path_dk[:, :, inner, keys].permute(
                    3, 2, 0, 1
                )
                dv[where].view(shape)[:, outer, heads] += path_dv[:, inner, :, keys].permute(
                    3, 1, 0, 2
                )


def _block_backward(
    q: torch.Tensor,  # [heads, n, group, d]
    lse: torch.Tensor,  # [heads, n, group]
    grad_out: torch.Tensor,  # [heads, n, group, lanes, d]
    dq: torch.Tensor,  # the same, overwritten
    k: torch.Tensor,  # [heads, length, d], by position
    v: torch.Tensor,
    block: QueryBlock,
    first: int,  # keys before this position get no gradient
    stop: int,  # of the segment, whose keys may lie behind its last query
    window: int | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the keys and values from `first` on, transposed: `[heads, d, lanes, keys]`
    and `[heads, lanes, d, keys]`."""
    heads, lanes, head_dim = len(q), grad_out.shape[3], q.shape[3]
    keys = _rounded(max(0, stop - first))
    path_dk = k.new_zeros(heads, head_dim, lanes, keys)
    path_dv = k.new_zeros(heads, lanes, head_dim, keys)
    for tokens, low, high in _tiles(block, lanes, q, window):
        grad = _matrix(grad_out[:, tokens], k.dtype)  # [heads, tile * group, lanes, d]
        tile_q = _matrix(q[:, tokens], k.dtype)
        tile_lse = lse[:, tokens].flatten(1, 2)[..., None]
        parts = []
        row_sums = grad.new_zeros(*grad.shape[:3], 1)
        for a, b in ((low, min(first, high)), (max(low, first), high)):
            if a >= b:
                continue
            if a >= first:
                b = first + _rounded(b - first)
            p = product_nt(tile_q, k[:, a:b])
            slope = None  # of the cap, at each score
            if softcap:
                capped = p.div_(softcap).tanh_()
                slope = 1 - capped.square()
                p = capped.mul_(softcap)
            p.sub_(tile_lse).exp_()
            _mask_(p, block.positions[tokens], a, b, window, 0.0)
            ds = product_nt(grad.flatten(1, 2), v[:, a:b]).view(*grad.shape[:3], b - a)
            ds.mul_(p[:, :, None])
            row_sums += ds.sum(-1, keepdim=True)
            parts.append((a, b, p, ds, slope))
        tile_dq = torch.zeros(0)
        for n, (a, b, p, ds, slope) in enumerate(parts):
            # The row sums of all parts, which is grad . out without keeping out.
            ds.addcmul_(p[:, :, None], row_sums, value=-1)
            if slope is not None:
                ds.mul_(slope[:, :, None])
            part_dq = product(ds.flatten(1, 2), k[:, a:b])
            tile_dq = part_dq if n == 0 else tile_dq.add_(part_dq)
            if a >= first:
                here = slice(a - first, b - first)
                mixed = product_tn(tile_q, ds.flatten(2, 3))
                path_dk[..., here] += mixed.view(heads, head_dim, lanes, b - a)
                mixed = product_tn(grad.flatten(2, 3), p)
                path_dv[..., here] += mixed.view(heads, lanes, head_dim, b - a)
        dq[:, tokens] = tile_dq.view(dq[:, tokens].shape)
    return path_dk, path_dv


def _live_runs(
    segment: Segment, index: int, lanes: tuple[int, ...], backward: BackwardPlan
) -> list[tuple[Run, slice | list[int], slice | list[int]]]:
    """Runs on the path whose keys get gradients: which of `lanes`, and which of the run's."""
    found = []
    for at in (*segment.path, index):
        run = backward.by_segment.get(at)
        if run is None:
            continue
        place = {lane: i for i, lane in enumerate(run.lanes)}
        inner = [i for i, lane in enumerate(lanes) if lane in place]
        if inner:
            outer = [place[lanes[i]] for i in inner]
            found.append((run, _as_slice(inner), _as_slice(outer)))
    return found


def _as_slice(index: list[int]) -> slice | list[int]:
    """A slice where the indices are consecutive: a view instead of a gather."""
    if index == list(range(index[0], index[0] + len(index))):
        return slice(index[0], index[0] + len(index))
    return index


def _tiles(
    block: QueryBlock, lanes: int, q: torch.Tensor, window: int | None
) -> Iterator[tuple[slice, int, int]]:
    """Stretches of a block's queries, and the range of keys that any of them sees.

    Powers of two, so that products come in few shapes.
    """
    positions = block.positions.tolist()
    heads, _, group, _ = q.shape
    budget = _TILE.get(q.device.type, _TILE["cuda"])
    start = 0
    while start < len(positions):
        fitting = budget // (heads * group * lanes * (positions[start] + 1))
        stop = min(len(positions), start + (1 << max(0, fitting.bit_length() - 1)))
        low = 0 if window is None else max(0, positions[start] - window + 1)
        yield slice(start, stop), low, positions[stop - 1] + 1
        start = stop


def _head_slices(q: torch.Tensor, block: QueryBlock, lanes: int) -> Iterator[slice]:
    """kv heads taken together: all in batched products on a GPU and where a block is small; else
    one at a time, as a CPU's tile should fit into its cache."""
    heads, _, group, head_dim = q.shape
    keys = int(block.positions[-1]) + 1
    size = len(block.positions) * group * lanes * keys * head_dim
    step = 1 if q.device.type == "cpu" and size >= SMALLEST else heads
    for start in range(0, heads, step):
        yield slice(start, start + step)


def _rounded(count: int) -> int:
    return -(-count // _KEY_STEP) * _KEY_STEP


def _mask_(
    scores: torch.Tensor,  # [kv_heads, n * group, high - low]
    positions: torch.Tensor,  # [n], ascending
    low: int,
    high: int,
    window: int | None,
    value: float,
) -> None:
    """Write `value` where a key lies after its query or outside the window."""
    first, last = int(positions[0]), int(positions[-1])
    hidden_by_window = window is not None and low <= last - window
    start = low if hidden_by_window else max(low, first + 1)
    if start >= high:
        return
    keys = torch.arange(start, high, device=scores.device)
    at = positions[:, None].to(scores.device)
    hidden = keys > at
    if window is not None:
        hidden |= keys <= at - window
    view = scores.view(scores.shape[0], len(positions), -1, scores.shape[-1])
    view[..., start - low :].masked_fill_(hidden[None, :, None], value)


def _along(queries: QueryTables, path: _Path) -> Iterator[tuple[int, QueryBlock]]:
    """Every block with the path that leads to it."""
    by_segment: dict[int, list[QueryBlock]] = {}
    for block in queries.blocks:
        by_segment.setdefault(block.segment, []).append(block)
    for index, segment in enumerate(queries.plan.segments):
        path.enter(segment)
        for block in by_segment.get(index, ()):
            yield index, block


def _by_kv_head(rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[n, heads, d]` as `[kv_heads, n, group, d]`, a view."""
    return rows.unflatten(1, (kv_heads, -1)).transpose(0, 1)


def _by_lane(rows: torch.Tensor, lanes: int, kv_heads: int) -> torch.Tensor:
    """`[n * lanes, heads, d]` as `[kv_heads, n, group, lanes, d]`, a view."""
    return rows.unflatten(0, (-1, lanes)).unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4)


def _matrix(tile: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[heads, n, group, ...]` as a dense `[heads, n * group, ...]`."""
    return tile.to(dtype).flatten(1, 2).contiguous()
