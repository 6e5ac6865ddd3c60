"""Causal attention over a trie of segments, forward and multi-lane backward.

Layouts, per layer: kv heads first, so that one batched product serves all of them, and the
`group` query heads of a kv head next to each other, so that they are rows of one tall matrix.

    q, out        [kv_heads, rows, group, head_dim]     q already times 1/sqrt(head_dim)
    k, v          [kv_heads, rows, head_dim]
    lse           [kv_heads, rows, group]               float32 or wider
    grad_out, dq  [kv_heads, tokens * group * lanes, head_dim] per run, in that order
    dk, dv        [kv_heads, backward rows, head_dim]

Depth-first row order makes the keys of the current path a stack: position p of the path lies at
index p of one buffer, and a segment only ever overwrites what lies behind its own start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..plan import BackwardPlan, PackedPlan, Run, Segment

__all__ = ["QueryBlock", "attention_backward", "attention_forward"]

# Elements of one score tile over all kv heads: with its gradient and two small products it stays
# in a core's second-level cache on the CPUs looked at; chosen by bench/tile_sizes.py.
_TILE = {"cpu": 2**19, "cuda": 2**24}


@dataclass(frozen=True)
class QueryBlock:
    """Queries of one segment: rows of q/out/lse, their positions, and who comes back there."""

    segment: int
    rows: slice | torch.Tensor  # of q, out and lse
    positions: torch.Tensor  # [n], ascending
    lanes: tuple[int, ...] = ()  # backward only
    row: int = 0  # backward only: first of its n * lanes rows in grad_out and dq


class _Path:
    """Keys and values of the path to the current segment, by position."""

    def __init__(self, plan: PackedPlan, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype):
        kv_heads, _, head_dim = k.shape
        self._k, self._v = k, v
        self.k = torch.empty(kv_heads, plan.length, head_dim, dtype=dtype, device=k.device)
        self.v = torch.empty_like(self.k)

    def enter(self, segment: Segment) -> None:
        rows = slice(segment.row, segment.row + len(segment))
        self.k[:, segment.start : segment.stop] = self._k[:, rows]
        self.v[:, segment.start : segment.stop] = self._v[:, rows]


def attention_forward(
    plan: PackedPlan,
    blocks: Sequence[QueryBlock],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q @ k.T + causal mask) @ v` for every query over its own path; `(out, lse)`."""
    dtype = _compute_dtype(q.dtype)
    path = _Path(plan, k, v, dtype)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    by_segment = _by_segment(blocks)
    for index, segment in enumerate(plan.segments):
        path.enter(segment)
        for block in by_segment.get(index, ()):
            block_q = q[:, block.rows]
            for tokens, low, high in _tiles(block, 1, q, window):
                tile_q = block_q[:, tokens].flatten(1, 2).to(dtype)
                scores = torch.bmm(tile_q, path.k[:, low:high].mT)
                _mask_(scores, block.positions[tokens], low, high, window, -torch.inf)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                mixed = torch.bmm(weights, path.v[:, low:high]).div_(total)
                rows = _rows_of(block.rows, tokens)
                shape = (q.shape[0], -1, *q.shape[2:])
                out[:, rows] = mixed.view(shape).to(out.dtype)
                lse[:, rows] = (largest + total.log()).view(shape[0], -1, q.shape[2])
    return out, lse


def attention_backward(
    plan: PackedPlan,
    backward: BackwardPlan,
    blocks: Sequence[QueryBlock],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(dq, dk, dv)` of attention_forward for every lane.

    The probabilities of a query are computed once for all its lanes, and every block of keys uses
    the final `lse` and row sums, so blocks add up exactly. Keys before the first live segment of a
    lane get no gradient: they cost dQ only, three products where a full backward takes five.
    """
    dtype = lse.dtype
    path = _Path(plan, k, v, dtype)
    kv_heads, _, group, head_dim = q.shape
    dq = torch.empty_like(grad_out)
    dk = grad_out.new_zeros(kv_heads, backward.rows, head_dim)
    dv = torch.zeros_like(dk)
    by_segment = _by_segment(blocks)
    for index, segment in enumerate(plan.segments):
        path.enter(segment)
        for block in by_segment.get(index, ()):
            lanes = len(block.lanes)
            count = len(block.positions)
            live = _live_runs(segment, index, block.lanes, backward)
            live_start = min((plan.segments[run.segment].start for run, *_ in live), default=None)
            first = segment.stop if live_start is None else live_start
            first_row = block.row * group
            rows = slice(first_row, first_row + count * group * lanes)
            block_grad = grad_out[:, rows].view(kv_heads, count * group, lanes, head_dim)
            block_dq = dq[:, rows].view(kv_heads, count * group, lanes, head_dim)
            block_q, block_out, block_lse = (x[:, block.rows] for x in (q, out, lse))
            path_dk = grad_out.new_zeros(kv_heads, lanes, segment.stop - first, head_dim)
            path_dv = grad_out.new_zeros(kv_heads, segment.stop - first, lanes, head_dim)
            for tokens, low, high in _tiles(block, lanes, q, window):
                tile_q = block_q[:, tokens].flatten(1, 2).to(dtype)
                tile_lse = block_lse[:, tokens].flatten(1, 2)[..., None]
                merged = slice(tokens.start * group, tokens.stop * group)
                grad = block_grad[:, merged]
                tile_out = block_out[:, tokens].flatten(1, 2)[:, :, None].to(dtype)
                row_sums = (grad * tile_out).sum(-1, keepdim=True)
                tile_dq = block_dq[:, merged]
                tile_dq.zero_()
                for a, b in ((low, min(first, high)), (max(low, first), high)):
                    if a >= b:
                        continue
                    p = torch.bmm(tile_q, path.k[:, a:b].mT).sub_(tile_lse).exp_()
                    _mask_(p, block.positions[tokens], a, b, window, 0.0)
                    ds = torch.bmm(grad.flatten(1, 2), path.v[:, a:b].mT)
                    ds = ds.view(*grad.shape[:3], b - a)
                    ds.sub_(row_sums).mul_(p[:, :, None])
                    tile_dq += torch.bmm(ds.flatten(1, 2), path.k[:, a:b]).view(grad.shape)
                    if a >= first:
                        keys = slice(a - first, b - first)
                        mixed = torch.bmm(p.mT, grad.flatten(2, 3))
                        path_dv[:, keys] += mixed.view(kv_heads, b - a, lanes, head_dim)
                        mixed = torch.bmm(ds.flatten(2, 3).mT, tile_q)
                        path_dk[:, :, keys] += mixed.view(kv_heads, lanes, b - a, head_dim)
            for run, inner, outer in live:
                keys = slice(
                    plan.segments[run.segment].start - first,
                    plan.segments[run.segment].stop - first,
                )
                where = slice(run.row, run.row + run.rows)
                shape = (kv_heads, run.tokens, len(run.lanes), head_dim)
                dk[:, where].view(shape)[:, :, outer] += path_dk[:, inner, keys].transpose(1, 2)
                dv[:, where].view(shape)[:, :, outer] += path_dv[:, keys, inner]
    return dq, dk, dv


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
    """Stretches of a block's queries, and the range of keys that any of them sees."""
    positions = block.positions.tolist()
    kv_heads, _, group, _ = q.shape
    budget = _TILE.get(q.device.type, _TILE["cuda"])
    start = 0
    while start < len(positions):
        per_token = kv_heads * group * lanes * (positions[start] + 1)
        stop = min(len(positions), start + max(8, budget // per_token))
        low = 0 if window is None else max(0, positions[start] - window + 1)
        yield slice(start, stop), low, positions[stop - 1] + 1
        start = stop


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


def _by_segment(blocks: Sequence[QueryBlock]) -> dict[int, list[QueryBlock]]:
    found: dict[int, list[QueryBlock]] = {}
    for block in blocks:
        found.setdefault(block.segment, []).append(block)
    return found


def _rows_of(rows: slice | torch.Tensor, tokens: slice) -> slice | torch.Tensor:
    if isinstance(rows, slice):
        return slice(rows.start + tokens.start, rows.start + tokens.stop)
    return rows[tokens]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and probabilities of half-precision models are float32."""
    return torch.promote_types(dtype, torch.float32)
