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
from .products import SMALLEST, product, product_nt, product_tn

__all__ = ["QueryBlock", "attention_backward", "attention_forward"]

# Elements of one score tile over all kv heads: with its gradient and two small products it stays
# in a core's second-level cache on the CPUs looked at; chosen by bench/tile_sizes.py.
_TILE = {"cpu": 2**20, "cuda": 2**24}
# Keys are taken in whole steps, so that products come in few shapes.
_KEY_STEP = 32


@dataclass(frozen=True)
class QueryBlock:
    """Queries of one segment: rows of q and lse, their positions, and who comes back there."""

    segment: int
    rows: slice  # of q and lse
    positions: torch.Tensor  # [n], ascending
    lanes: tuple[int, ...] = ()  # backward only
    row: int = 0  # backward only: first of its n * lanes rows in grad_out and dq


class _Path:
    """Keys and values of the path to the current segment, by position."""

    def __init__(self, plan: PackedPlan, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype):
        kv_heads, _, head_dim = k.shape
        self._k, self._v = k, v
        length = plan.length + _KEY_STEP
        self.k = torch.empty(kv_heads, length, head_dim, dtype=dtype, device=k.device)
        self.v = torch.empty_like(self.k)

    def enter(self, segment: Segment) -> None:
        rows = slice(segment.row, segment.row + len(segment))
        self.k[:, segment.start : segment.stop] = self._k[:, rows]
        self.v[:, segment.start : segment.stop] = self._v[:, rows]
        # Keys are read in whole steps: what lies behind the path is masked, but must be a number.
        self.k[:, segment.stop : segment.stop + _KEY_STEP] = 0
        self.v[:, segment.stop : segment.stop + _KEY_STEP] = 0


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
    for _, block in _along(plan, blocks, path):
        for heads in _head_slices(q, block, 1):
            block_q = q[heads, block.rows]
            for tokens, low, high in _tiles(block, 1, block_q, window):
                high = _rounded(high)
                tile_q = block_q[:, tokens].flatten(1, 2).to(dtype)
                scores = product_nt(tile_q, path.k[heads, low:high])
                _mask_(scores, block.positions[tokens], low, high, window, -torch.inf)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                mixed = product(weights, path.v[heads, low:high]).div_(total)
                rows = slice(block.rows.start + tokens.start, block.rows.start + tokens.stop)
                shape = (len(block_q), -1, *q.shape[2:])
                out[heads, rows] = mixed.view(shape).to(out.dtype)
                lse[heads, rows] = (largest + total.log()).view(shape[:3])
    return out, lse


def attention_backward(
    plan: PackedPlan,
    backward: BackwardPlan,
    blocks: Sequence[QueryBlock],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(dq, dk, dv)` of attention_forward for every lane.

    The probabilities of a query are computed once for all its lanes, and both parts of its keys use
    the final `lse` and row sums, so they add up exactly. Keys before the first live segment of a
    lane get no gradient: they cost dQ only, three products where a full backward takes five.
    """
    kv_heads, _, group, head_dim = q.shape
    path = _Path(plan, k, v, lse.dtype)
    dq = torch.empty_like(grad_out)
    dk = grad_out.new_zeros(kv_heads, backward.rows, head_dim)
    dv = torch.zeros_like(dk)
    for index, block in _along(plan, blocks, path):
        segment, lanes = plan.segments[index], len(block.lanes)
        live = _live_runs(segment, index, block.lanes, backward)
        first = min((plan.segments[run.segment].start for run, *_ in live), default=segment.stop)
        first_row = block.row * group
        rows = slice(first_row, first_row + len(block.positions) * group * lanes)
        for heads in _head_slices(q, block, lanes):
            shape = (-1, len(block.positions) * group, lanes, head_dim)
            path_dk, path_dv = _block_backward(
                q[heads, block.rows],
                lse[heads, block.rows],
                grad_out[heads, rows].view(shape),
                dq[heads, rows].view(shape),
                path.k[heads],
                path.v[heads],
                block,
                first,
                window,
            )
            for run, inner, outer in live:
                at = plan.segments[run.segment]
                keys = slice(at.start - first, at.stop - first)
                where = slice(run.row, run.row + run.rows)
                shape = (-1, run.tokens, len(run.lanes), head_dim)
                # [heads, d, lanes, keys] and [heads, lanes, d, keys] -> [heads, keys, lanes, d]
                dk[heads, where].view(shape)[:, :, outer] += path_dk[:, :, inner, keys].permute(
                    0, 3, 2, 1
                )
                dv[heads, where].view(shape)[:, :, outer] += path_dv[:, inner, :, keys].permute(
                    0, 3, 1, 2
                )
    return dq, dk, dv


def _block_backward(
    q: torch.Tensor,  # [heads, n, group, d]
    lse: torch.Tensor,  # [heads, n, group]
    grad_out: torch.Tensor,  # [heads, n * group, lanes, d]
    dq: torch.Tensor,  # the same, overwritten
    k: torch.Tensor,  # [heads, length, d], by position
    v: torch.Tensor,
    block: QueryBlock,
    first: int,  # keys before this position get no gradient
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the keys and values from `first` on, transposed: `[heads, d, lanes, keys]`
    and `[heads, lanes, d, keys]`."""
    heads, _, group, head_dim = q.shape
    lanes = grad_out.shape[2]
    keys = _rounded(int(block.positions[-1]) + 1 - first) if len(block.positions) else 0
    path_dk = dq.new_zeros(heads, head_dim, lanes, max(0, keys))
    path_dv = dq.new_zeros(heads, lanes, head_dim, max(0, keys))
    for tokens, low, high in _tiles(block, lanes, q, window):
        merged = slice(tokens.start * group, tokens.stop * group)
        grad = grad_out[:, merged]
        tile_q = q[:, tokens].flatten(1, 2).to(dq.dtype)
        tile_lse = lse[:, tokens].flatten(1, 2)[..., None]
        parts = []
        row_sums = grad.new_zeros(*grad.shape[:3], 1)
        for a, b in ((low, min(first, high)), (max(low, first), high)):
            if a >= b:
                continue
            if a >= first:
                b = first + _rounded(b - first)
            p = product_nt(tile_q, k[:, a:b]).sub_(tile_lse).exp_()
            _mask_(p, block.positions[tokens], a, b, window, 0.0)
            ds = product_nt(grad.flatten(1, 2), v[:, a:b]).view(*grad.shape[:3], b - a)
            ds.mul_(p[:, :, None])
            row_sums += ds.sum(-1, keepdim=True)
            parts.append((a, b, p, ds))
        for n, (a, b, p, ds) in enumerate(parts):
            # The row sums of all parts, which is grad . out without keeping out.
            ds.addcmul_(p[:, :, None], row_sums, value=-1)
            part_dq = product(ds.flatten(1, 2), k[:, a:b]).view(grad.shape)
            dq[:, merged] = part_dq if n == 0 else dq[:, merged].add_(part_dq)
            if a >= first:
                here = slice(a - first, b - first)
                mixed = product_tn(tile_q, ds.flatten(2, 3))
                path_dk[..., here] += mixed.view(heads, head_dim, lanes, b - a)
                mixed = product_tn(grad.flatten(2, 3), p)
                path_dv[..., here] += mixed.view(heads, lanes, head_dim, b - a)
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


def _along(
    plan: PackedPlan, blocks: Sequence[QueryBlock], path: _Path
) -> Iterator[tuple[int, QueryBlock]]:
    """Every block with the path that leads to it."""
    by_segment: dict[int, list[QueryBlock]] = {}
    for block in blocks:
        by_segment.setdefault(block.segment, []).append(block)
    for index, segment in enumerate(plan.segments):
        path.enter(segment)
        for block in by_segment.get(index, ()):
            yield index, block


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and probabilities of half-precision models are float32."""
    return torch.promote_types(dtype, torch.float32)
