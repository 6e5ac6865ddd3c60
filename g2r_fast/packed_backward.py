"""The backward of the packed engine: many cotangents over one forward's saved rows.

The gradient of the residual stream is float32 (float64 for a float64 model). Backward rows lie
token-major, so the lanes of a token read the same saved row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import ops
from .families import LayerWeights
from .packed_linears import LinearReader
from .plan import Read, column
from .signal import Signal
from .tables import (
    QueryTables,
    RowMap,
    backward_linears,
    backward_queries,
    backward_read_queries,
    backward_reads,
    backward_rows,
    read_linears,
)
from .tape import LayerTape, Tape

__all__ = ["PackedBackward"]


class PackedBackward:
    """From gradients at the final norm's output to a signal's leaf."""

    def __init__(self, tape: Tape, chosen: Sequence[int], signal: Signal) -> None:
        self.context = context = tape.context
        self.weights = context.weights
        self.tape = tape
        self.signal = signal
        self.backward = tape.plan.backward({tape.plan.reads[i].sequence for i in chosen})
        self.rows = backward_rows(tape.plan, self.backward, context.chunk)
        # The reads enter in path order, the lanes of a segment one after the other.
        reads = tape.plan.reads
        order = sorted(
            range(len(chosen)), key=lambda i: (reads[chosen[i]].segment, reads[chosen[i]].sequence)
        )
        self.enters = context.index(order)
        self.reads = [reads[chosen[i]] for i in order]
        weights = self.weights
        self._dk = context.empty_wide(self.backward.rows, weights.kv_heads, weights.head_dim)
        self._dv = context.empty_wide(*self._dk.shape)
        self._exponents: dict[int, int] = {}  # of the lanes, where they are scaled

    def run(self, grads: torch.Tensor) -> int:
        """`grads` `[chosen reads, H]`; returns the number of backward rows."""
        leaf = self.signal.leaf
        if leaf is None or not (self.backward.rows or self.signal.reads_linears):
            return 0
        context, weights, tape = self.context, self.weights, self.tape
        place = tape.plan.read_places
        at_on_host = torch.tensor([place[read.row] for read in self.reads])
        at = context.index(at_on_host)
        grads = grads[self.enters]
        if context.scales_lanes:
            grads = self._scaled(grads)
        reader = None
        if self.signal.reads_linears:
            reader = LinearReader(
                context,
                self.signal,
                every=backward_linears(self.backward, self._exponents),
                reads=read_linears(self.reads, at_on_host, self._exponents),
            )
            reader.norm("model.norm", grads, tape.norm.normed[at])
        entering = torch.zeros_like(grads)
        ops.rms_norm_backward(
            grads[:, None],
            weights.norm,
            tape.norm.normed[at],
            tape.norm.rstd[at],
            entering[:, None],
        )
        read_map = backward_reads(at_on_host, context.chunk)
        dx = self._last_layer(
            weights.layers[-1].whole(), tape.layers[-1], at, read_map, entering, reader
        )
        body = range(len(weights.layers) - 2, leaf - 1, -1)
        if body:
            queries = backward_queries(tape.plan, self.backward, context.saved_rows_on_host)
            shape = (self.backward.rows, weights.heads, weights.head_dim)
            grad_out, dq = context.empty_gradient(*shape), context.empty_gradient(*shape)
            for i in body:
                self._layer(
                    weights.layers[i].whole(), tape.layers[i], queries, dx, grad_out, dq, reader
                )
        self._at_leaf(dx)
        return self.backward.rows

    def _layer(
        self,
        layer: LayerWeights,
        tape: LayerTape,
        queries: QueryTables,
        dx: torch.Tensor,  # [backward rows, H], in place
        grad_out: torch.Tensor,  # [backward rows, heads, head_dim], for use here, as is dq
        dq: torch.Tensor,
        reader: LinearReader | None,
    ) -> None:
        context = self.context
        shown = None if reader is None else reader.before_mlp(layer, tape.mlp, dx)
        ops.mlp_backward(
            context.backend, layer, dx, self.rows, tape.norm_mid, tape.mlp, grad_out, shown=shown
        )
        if reader is not None:
            reader.after_mlp(layer, tape, dx)
        ops.attention_backward(
            context.backend, queries, tape.q, tape.k, tape.v, tape.out, tape.lse,
            grad_out, dq, self._dk, self._dv, window=layer.window,
        )  # fmt: skip
        sent = None if reader is None else reader.before_qkv(layer, len(dx), "qkv")
        ops.qkv_backward(
            context.backend, layer, dx, self.rows, tape.norm_in, context.rotary_saved,
            dq=dq, dk=self._dk, dv=self._dv, q_norm=tape.q_norm, k_norm=tape.k_norm,
            scaling=self.weights.scaling, shown=sent,
        )  # fmt: skip
        if reader is not None:
            reader.after_qkv(layer, tape.norm_in, "qkv")

    def _last_layer(
        self,
        layer: LayerWeights,
        tape: LayerTape,
        at: torch.Tensor,
        rows: RowMap,
        grad: torch.Tensor,
        reader: LinearReader | None,
    ) -> torch.Tensor:
        """Enters at the reads, `[reads, H]`; leaves at every backward row, `[rows, H]`.

        Read i came from row `at[i]` of what the forward kept of the rows that are read; so does
        `rows` have it.
        """
        context = self.context
        queries = backward_read_queries(self.tape.plan, self.backward, self.reads)
        q, lse = tape.q[at], tape.lse[at]
        out = None if tape.out is None else tape.out[at]
        grad_out, dq = context.empty_gradient(*q.shape), context.empty_gradient(*q.shape)
        shown = None if reader is None else reader.before_mlp(layer, tape.mlp, grad)
        ops.mlp_backward(
            context.backend, layer, grad, rows, tape.norm_mid, tape.mlp, grad_out, shown=shown
        )
        if reader is not None:
            reader.after_mlp(layer, tape, grad)
        ops.attention_backward(
            context.backend, queries, q, tape.k, tape.v, out, lse,
            grad_out, dq, self._dk, self._dv, window=layer.window,
        )  # fmt: skip
        sent = None if reader is None else reader.before_qkv(layer, len(grad), "q")
        ops.qkv_backward(
            context.backend, layer, grad, rows, tape.query_norm_in, context.rotary_read,
            dq=dq, q_norm=tape.q_norm, scaling=self.weights.scaling, shown=sent,
        )  # fmt: skip
        if reader is not None:
            reader.after_qkv(layer, tape.query_norm_in, "q")
            reader.enter_every_row()
        dx = context.empty_wide(self.backward.rows, grad.shape[1]).zero_()
        # A read in front of its sequence's backward_start sends nothing to any row.
        entries = [self._backward_row(read) for read in self.reads]
        inside = context.index([i for i, row in enumerate(entries) if row is not None])
        arrives = context.index([row for row in entries if row is not None])
        dx.index_add_(0, arrives, grad[inside])
        sent = None if reader is None else reader.before_qkv(layer, len(dx), "kv")
        ops.qkv_backward(
            context.backend, layer, dx, self.rows, tape.norm_in, context.rotary_saved,
            dk=self._dk, dv=self._dv, k_norm=tape.k_norm,
            scaling=self.weights.scaling, shown=sent,
        )  # fmt: skip
        if reader is not None:
            reader.after_qkv(layer, tape.norm_in, "kv")
        return dx

    def _at_leaf(self, dx: torch.Tensor) -> None:
        context, leaf = self.context, self.tape.leaf
        if context.scales_lanes:
            dx = dx.ldexp(self._exponents_of_rows()[:, None])
        for piece in self.rows.pieces:
            if leaf is None:
                saved = context.saved_rows[piece.saved]
                values = context.rows_of(self.weights.embed, context.input_ids[saved])
            else:
                values = leaf[piece.saved]
            grads = dx[piece.rows].view(-1, piece.lanes, dx.shape[1])
            start = 0
            for rows in piece.members:
                stop = start + rows.stop - rows.start
                self.signal.on_leaf(rows, values[start:stop].to(context.wide), grads[start:stop])
                start = stop

    def _scaled(self, grads: torch.Tensor) -> torch.Tensor:
        """`[reads, H]` with every lane brought to a power of two near one, for dtypes in which
        small gradients would vanish; a lane's whole backward is linear in it."""
        largest: dict[int, float] = {}
        for read, value in zip(self.reads, grads.abs().amax(-1).tolist(), strict=True):
            largest[read.sequence] = max(value, largest.get(read.sequence, 0.0))
        self._exponents = {lane: math.frexp(value)[1] for lane, value in largest.items()}
        exponents = [-self._exponents[read.sequence] for read in self.reads]
        return grads.ldexp(self.context.index(exponents)[:, None])

    def _exponents_of_rows(self) -> torch.Tensor:
        rows = [
            column([self._exponents[lane] for lane in run.lanes]).repeat(run.tokens)
            for run in self.backward.runs
        ]
        return self.context.index(torch.cat(rows))

    def _backward_row(self, read: Read) -> int | None:
        run = self.backward.by_segment.get(read.segment)
        if run is None or read.sequence not in run.lanes:
            return None
        token = read.position - self.tape.plan.segments[read.segment].start
        return run.row + token * len(run.lanes) + run.lanes.index(read.sequence)
