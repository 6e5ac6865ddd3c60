"""The backward of the packed engine: many cotangents over one forward's saved rows.

Gradients travel in float32 (float64 for a float64 model) between products. Backward rows lie
token-major, so the lanes of a token read the same saved row by broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import ops
from .families import DecoderWeights, LayerWeights
from .ops import QueryBlock
from .plan import BackwardPlan, PackedPlan, Read
from .signal import LeafRows, Signal
from .tape import LayerTape, NormTape, PassContext, Tape

__all__ = ["PackedBackward"]


@dataclass(frozen=True)
class _Piece:
    """Some tokens of a run, or of single-lane runs that follow each other."""

    row: int  # first backward row
    tokens: int
    lanes: int
    saved_row: int  # what its first token reads
    members: tuple[LeafRows, ...]  # whose tokens these are, in order

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.tokens * self.lanes)

    @property
    def saved(self) -> slice:
        return slice(self.saved_row, self.saved_row + self.tokens)


class PackedBackward(PassContext):
    """From gradients at the final norm's output to a signal's leaf."""

    def __init__(
        self, weights: DecoderWeights, tape: Tape, chosen: Sequence[int], signal: Signal
    ) -> None:
        super().__init__(weights, tape.plan)
        self.tape = tape
        self.signal = signal
        self.backward = tape.plan.backward({tape.plan.reads[i].sequence for i in chosen})
        merge = not signal.reads_linears  # a linear's reader wants the lanes of each token
        self.pieces = list(_pieces(tape.plan, self.backward, self.chunk, merge))
        # The reads enter in path order, the lanes of a segment one after the other.
        reads = tape.plan.reads
        self.order = sorted(chosen, key=lambda i: (reads[i].segment, reads[i].sequence, i))
        self.enters = [chosen.index(i) for i in self.order]
        self.reads = [reads[i] for i in self.order]

    def run(self, grads: torch.Tensor) -> int:
        """`grads` `[chosen reads, H]`; returns the number of backward rows."""
        weights, tape = self.weights, self.tape
        place = {row: i for i, row in enumerate(self.plan.read_rows)}
        at = torch.tensor([place[read.row] for read in self.reads], device=self.device)
        entering = torch.zeros_like(grads)
        ops.rms_norm_backward(
            grads[torch.tensor(self.enters, device=self.device)][:, None],
            weights.norm,
            tape.norm.normed[at],
            tape.norm.rstd[at],
            entering[:, None],
        )
        last = len(weights.layers) - 1
        dx = self._last_layer(weights.layers[last], tape.layers[last], at, entering)
        for i in range(last - 1, self.signal.leaf - 1, -1):
            layer, layer_tape = weights.layers[i], tape.layers[i]
            dq, dk, dv = self._to_attention(layer, layer_tape, dx, self.pieces, self._blocks())
            for piece in self.pieces:
                cos, sin = self._rotary(self.saved_rows[piece.saved])
                dh = self._queries_back(layer, layer_tape, piece, dq, cos, sin)
                dh += self._keys_values_back(layer, layer_tape, piece, dk, dv, cos, sin)
                _norm_back(layer.input_norm, layer_tape.norm_in, piece, dh, dx)
        self._at_leaf(dx)
        return self.backward.rows

    def _last_layer(
        self, layer: LayerWeights, tape: LayerTape, at: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """Enters at the reads, `[reads, H]`; leaves at every backward row, `[rows, H]`."""
        tape = tape.for_queries(at)
        merge = not self.signal.reads_linears
        members = [LeafRows((r.sequence,), r.position, r.position + 1) for r in self.reads]
        pieces = [_Piece(0, len(members), 1, 0, tuple(members))]
        if not merge:
            pieces = [_Piece(i, 1, 1, i, (m,)) for i, m in enumerate(members)]
        dq, dk, dv = self._to_attention(layer, tape, grad, pieces, self._read_blocks())
        forward_rows = torch.tensor([read.row for read in self.reads], device=self.device)
        for piece in pieces:
            cos, sin = self._rotary(forward_rows[piece.saved])
            dh = self._queries_back(layer, tape, piece, dq, cos, sin)
            _norm_back(layer.input_norm, tape.query_norm_in, piece, dh, grad)
        dx = grad.new_zeros(self.backward.rows, grad.shape[1])
        # A read in front of its sequence's backward_start sends nothing to any row.
        entries = [self._backward_row(read) for read in self.reads]
        inside = [i for i, row in enumerate(entries) if row is not None]
        rows = torch.tensor([entries[i] for i in inside], dtype=torch.int64, device=self.device)
        dx.index_add_(0, rows, grad[torch.tensor(inside, dtype=torch.int64, device=self.device)])
        for piece in self.pieces:
            cos, sin = self._rotary(self.saved_rows[piece.saved])
            dh = self._keys_values_back(layer, tape, piece, dk, dv, cos, sin)
            _norm_back(layer.input_norm, tape.norm_in, piece, dh, dx)
        return dx

    def _to_attention(
        self,
        layer: LayerWeights,
        tape: LayerTape,
        dx: torch.Tensor,  # [rows, H], in place
        pieces: Sequence[_Piece],
        blocks: Sequence[QueryBlock],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Back through SwiGLU, its norm, the output projection and attention; `(dq, dk, dv)`."""
        weights = self.weights
        grad_out = self.empty_wide(weights.kv_heads, len(dx) * self.group, weights.head_dim)
        for piece in pieces:
            grad = dx[piece.rows]
            lanes, saved = piece.lanes, piece.saved
            act = ops.project_back(grad, layer.down.weight)
            gate, up = (self.empty_wide(*act.shape) for _ in range(2))
            ops.swiglu_backward(
                _by_lane(act, lanes), tape.mlp.d_gate[saved], tape.mlp.d_up[saved],
                _by_lane(gate, lanes), _by_lane(up, lanes),
            )  # fmt: skip
            dh = ops.project_back(gate, layer.gate.weight)
            dh += ops.project_back(up, layer.up.weight)
            if self.signal.reads_linears:
                assert tape.mlp.activation is not None
                self._read(layer, "mlp.down_proj", tape.mlp.activation[saved], grad, piece)
                inputs = tape.norm_mid.normed[saved] * layer.post_norm
                self._read(layer, "mlp.gate_proj", inputs, gate, piece)
                self._read(layer, "mlp.up_proj", inputs, up, piece)
            _norm_back(layer.post_norm, tape.norm_mid, piece, dh, dx)
            if self.signal.reads_linears:
                assert tape.out is not None
                inputs = tape.out[:, saved].transpose(0, 1).flatten(1)
                self._read(layer, "self_attn.o_proj", inputs, grad, piece)
            flat = ops.project_back(grad, layer.o.weight)
            self._head_major(grad_out, piece)[:] = self._head_view(flat, piece)
        return ops.attention_backward(
            self.plan, self.backward, blocks, tape.q, tape.k, tape.v, tape.lse,
            grad_out, layer.window,
        )  # fmt: skip

    def _queries_back(
        self,
        layer: LayerWeights,
        tape: LayerTape,
        piece: _Piece,
        dq: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """What the queries send to the norm's output, `[rows, H]`."""
        weights = self.weights
        rows = piece.tokens * piece.lanes
        flat = self.empty_wide(rows, weights.heads * weights.head_dim)
        self._head_view(flat, piece)[:] = self._head_major(dq, piece)
        grad = flat.view(piece.tokens, piece.lanes, weights.heads, weights.head_dim)
        cos, sin = cos[:, None, None], sin[:, None, None]
        grad = ops.rotary_backward(grad, cos, sin, weights.scaling)
        grad = _head_norm_back(layer.q_norm, tape.q_norm, piece, grad)
        grad = grad.view(rows, -1)
        if self.signal.reads_linears:
            inputs = tape.query_norm_in.normed[piece.saved] * layer.input_norm
            self._read(layer, "self_attn.q_proj", inputs, grad, piece)
        return ops.project_back(grad, layer.q.weight)

    def _keys_values_back(
        self,
        layer: LayerWeights,
        tape: LayerTape,
        piece: _Piece,
        dk: torch.Tensor,
        dv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """What the keys and values send to the norm's output, `[rows, H]`."""
        shape = (self.weights.kv_heads, piece.tokens, piece.lanes, self.weights.head_dim)
        # [kv_heads, rows, d] -> [tokens, lanes, kv_heads, d]
        keys = dk[:, piece.rows].view(shape).permute(1, 2, 0, 3)
        keys = ops.rotary_backward(keys, cos[:, None, None], sin[:, None, None])
        keys = _head_norm_back(layer.k_norm, tape.k_norm, piece, keys)
        keys = keys.reshape(piece.tokens * piece.lanes, -1)
        values = dv[:, piece.rows].transpose(0, 1).flatten(1)
        if self.signal.reads_linears:
            inputs = tape.norm_in.normed[piece.saved] * layer.input_norm
            self._read(layer, "self_attn.k_proj", inputs, keys, piece)
            self._read(layer, "self_attn.v_proj", inputs, values, piece)
        dh = ops.project_back(keys, layer.k.weight)
        dh += ops.project_back(values, layer.v.weight)
        return dh

    def _at_leaf(self, dx: torch.Tensor) -> None:
        leaf = self.tape.leaf
        for piece in self.pieces:
            saved = self.saved_rows[piece.saved]
            if leaf is None:
                values = self.weights.embed[self.input_ids[saved]]
            else:
                values = leaf[piece.saved]
            grads = _by_lane(dx[piece.rows], piece.lanes)
            start = 0
            for rows in piece.members:
                stop = start + rows.stop - rows.start
                self.signal.on_leaf(rows, values[start:stop].to(self.wide), grads[start:stop])
                start = stop

    def _read(
        self,
        layer: LayerWeights,
        name: str,
        inputs: torch.Tensor,
        grad: torch.Tensor,
        piece: _Piece,
    ) -> None:
        (rows,) = piece.members
        self.signal.on_linear(f"{layer.name}.{name}", inputs, _by_lane(grad, piece.lanes), rows)

    def _rotary(self, forward_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[forward_rows], self.sin[forward_rows]

    def _backward_row(self, read: Read) -> int | None:
        run = self.backward.by_segment.get(read.segment)
        if run is None or read.sequence not in run.lanes:
            return None
        token = read.position - self.plan.segments[read.segment].start
        return run.row + token * len(run.lanes) + run.lanes.index(read.sequence)

    def _blocks(self) -> list[QueryBlock]:
        return [
            QueryBlock(
                run.segment,
                slice(run.saved_row, run.saved_row + run.tokens),
                torch.arange(run.start, run.start + run.tokens),
                run.lanes,
                run.row,
            )
            for run in self.backward.runs
        ]

    def _read_blocks(self) -> list[QueryBlock]:
        """One block per (segment, sequence) among the reads, which lie in that order."""
        blocks: list[QueryBlock] = []
        start = 0
        for stop in range(1, len(self.reads) + 1):
            first = self.reads[start]
            following = self.reads[stop] if stop < len(self.reads) else None
            if following is not None and (following.segment, following.sequence) == (
                first.segment,
                first.sequence,
            ):
                continue
            positions = torch.tensor([r.position for r in self.reads[start:stop]])
            rows = slice(start, stop)
            blocks.append(QueryBlock(first.segment, rows, positions, (first.sequence,), start))
            start = stop
        return blocks

    def _head_major(self, buffer: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """A piece of grad_out or dq as `[kv_heads, tokens, group, lanes, head_dim]`."""
        rows = slice(piece.rows.start * self.group, piece.rows.stop * self.group)
        shape = (piece.tokens, self.group, piece.lanes)
        return buffer[:, rows].view(len(buffer), *shape, self.weights.head_dim)

    def _head_view(self, flat: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """`[tokens * lanes, heads * head_dim]` in the same order of axes as `_head_major`."""
        weights = self.weights
        shape = (piece.tokens, piece.lanes, weights.kv_heads, self.group, weights.head_dim)
        return flat.view(shape).permute(2, 0, 3, 1, 4)


def _norm_back(
    weight: torch.Tensor,
    tape: NormTape,
    piece: _Piece,
    grad: torch.Tensor,  # [rows, H] of the norm's output, overwritten
    out: torch.Tensor,  # [all rows, H], added to
) -> None:
    kept = tape[piece.saved]
    out = _by_lane(out[piece.rows], piece.lanes)
    ops.rms_norm_backward(_by_lane(grad, piece.lanes), weight, kept.normed, kept.rstd, out)


def _head_norm_back(
    weight: torch.Tensor | None,
    tape: NormTape | None,
    piece: _Piece,
    grad: torch.Tensor,  # [tokens, lanes, heads, head_dim], overwritten
) -> torch.Tensor:
    """Back through the per-head norm of families that have one."""
    if weight is None or tape is None:
        return grad
    kept = tape[piece.saved]
    out = torch.zeros_like(grad)
    # Heads are rows of their own: [tokens, heads, lanes, d] reads what [tokens, heads, d] saved.
    by_head = grad.transpose(1, 2)
    ops.rms_norm_backward(by_head, weight, kept.normed, kept.rstd, out.transpose(1, 2))
    return out


def _by_lane(rows: torch.Tensor, lanes: int) -> torch.Tensor:
    """`[tokens * lanes, X]` as `[tokens, lanes, X]`."""
    return rows.view(-1, lanes, rows.shape[-1])


def _pieces(plan: PackedPlan, backward: BackwardPlan, chunk: int, merge: bool) -> Iterator[_Piece]:
    """Backward rows in stretches of at most `chunk`, each with one number of lanes."""
    pending: _Piece | None = None
    for run in backward.runs:
        lanes = len(run.lanes)
        step = max(1, chunk // lanes)
        for token in range(0, run.tokens, step):
            tokens = min(step, run.tokens - token)
            start = run.start + token
            piece = _Piece(
                run.row + token * lanes,
                tokens,
                lanes,
                run.saved_row + token,
                (LeafRows(run.lanes, start, start + tokens),),
            )
            if pending is not None and merge and _can_join(pending, piece, chunk):
                pending = _Piece(
                    pending.row,
                    pending.tokens + piece.tokens,
                    1,
                    pending.saved_row,
                    (*pending.members, *piece.members),
                )
                continue
            if pending is not None:
                yield pending
            pending = piece
    if pending is not None:
        yield pending


def _can_join(first: _Piece, second: _Piece, chunk: int) -> bool:
    """Single-lane pieces whose rows and saved rows follow on are one piece."""
    return (
        first.lanes == second.lanes == 1
        and first.saved_row + first.tokens == second.saved_row
        and first.row + first.tokens == second.row
        and first.tokens + second.tokens <= chunk
    )
