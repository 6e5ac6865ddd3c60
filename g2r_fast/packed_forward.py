"""The forward of the packed engine: every row once, keeping only what comes back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import ops
from .families import DecoderWeights, LayerWeights, Linear
from .ops import QueryBlock
from .plan import PackedPlan
from .tape import LayerTape, MlpTape, NormTape, PassContext, Tape

__all__ = ["PackedForward"]


class PackedForward(PassContext):
    """One pass over a plan's rows.

    Args:
        leaf: index of the hidden state to keep for the signal, 0 for the embeddings.
        keep_linears: keep the inputs of every linear layer too.
    """

    def __init__(
        self, weights: DecoderWeights, plan: PackedPlan, leaf: int, keep_linears: bool
    ) -> None:
        super().__init__(weights, plan)
        self.leaf = leaf
        self.keep_linears = keep_linears

    def run(self) -> Tape:
        weights, plan = self.weights, self.plan
        x = weights.embed[self.input_ids].to(self.wide)  # [rows, H]
        layers = []
        leaf = None
        for i, layer in enumerate(weights.layers):
            if 0 < i == self.leaf:
                leaf = x[self.saved_rows]
            is_last = i + 1 == len(weights.layers)
            x, tape = self._layer(layer, x, self.read_rows if is_last else None)
            layers.append(tape)
        return Tape(plan, layers, self._norm(x), leaf)

    def _layer(
        self, layer: LayerWeights, x: torch.Tensor, reads: torch.Tensor | None
    ) -> tuple[torch.Tensor, LayerTape]:
        """One decoder layer; with `reads`, keys and values of all rows and the rest of those."""
        weights, plan = self.weights, self.plan
        saved = plan.saved_rows
        queries = plan.rows if reads is None else len(reads)
        k = self.empty(weights.kv_heads, plan.rows, weights.head_dim)
        v = torch.empty_like(k)
        q = self.empty(weights.kv_heads, queries, self.group, weights.head_dim)
        norm_in = self.empty_norm(saved, x.shape[1])
        k_norm = q_norm = None
        if layer.q_norm is not None:
            query_saved = saved if reads is None else queries
            k_norm = self.empty_norm(saved, weights.kv_heads, weights.head_dim)
            q_norm = self.empty_norm(query_saved, weights.heads, weights.head_dim)

        for rows, kept in self._stretches():
            norm = self._norm(x[rows])
            if kept is not None:
                norm_in[kept] = norm
            h = norm.normed * layer.input_norm
            cos, sin = self.cos[rows], self.sin[rows]
            keys = self._heads(h, layer.k, layer.k_norm, k_norm, kept)
            k[:, rows] = self.narrow(ops.rotary(keys, cos[:, None], sin[:, None])).transpose(0, 1)
            v[:, rows] = self.narrow(self._heads(h, layer.v, None, None, None)).transpose(0, 1)
            if reads is None:
                heads = self._heads(h, layer.q, layer.q_norm, q_norm, kept)
                q[:, rows] = self._grouped(heads, cos, sin)
        query_norm_in = norm_in
        if reads is not None:
            x = x[reads]
            query_norm_in = self._norm(x)
            h = query_norm_in.normed * layer.input_norm
            heads = self._heads(h, layer.q, layer.q_norm, q_norm, slice(0, queries))
            q[:] = self._grouped(heads, self.cos[reads], self.sin[reads])

        blocks = self._blocks() if reads is None else self._read_blocks()
        out, lse = ops.attention_forward(plan, blocks, q, k, v, layer.window)
        norm_mid, mlp = self._mlp(layer, x, out, reads is not None)
        if reads is None and saved < plan.rows:
            q, lse = q[:, self.saved_rows], lse[:, self.saved_rows]
            out = out[:, self.saved_rows] if self.keep_linears else out
        return x, LayerTape(
            k=k,
            v=v,
            norm_in=norm_in,
            k_norm=k_norm,
            query_norm_in=query_norm_in,
            q_norm=q_norm,
            q=q,
            out=out if self.keep_linears else None,
            lse=lse,
            norm_mid=norm_mid,
            mlp=mlp,
        )

    def _mlp(
        self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor, reads_only: bool
    ) -> tuple[NormTape, MlpTape]:
        """Output projection and SwiGLU, added to `x` in place; what of it is kept."""
        kept_rows = len(x) if reads_only else self.plan.saved_rows
        width = layer.gate.weight.shape[0]
        norm_mid = self.empty_norm(kept_rows, x.shape[1])
        activation = self.empty(kept_rows, width) if self.keep_linears else None
        tape = MlpTape(self.empty(kept_rows, width), self.empty(kept_rows, width), activation)
        stretches = self._stretches() if not reads_only else self._chunks(0, len(x), 0)
        for rows, kept in stretches:
            mixed = out[:, rows].transpose(0, 1).flatten(1)
            x[rows] += ops.project(mixed, layer.o.weight, layer.o.bias)
            norm = self._norm(x[rows])
            h = norm.normed * layer.post_norm
            gate = ops.project(h, layer.gate.weight, layer.gate.bias)
            up = ops.project(h, layer.up.weight, layer.up.bias)
            derivatives = None
            if kept is not None:
                norm_mid[kept] = norm
                derivatives = (tape.d_gate[kept], tape.d_up[kept])
            act = self.narrow(ops.swiglu(gate, up, derivatives))
            if tape.activation is not None and kept is not None:
                tape.activation[kept] = act
            x[rows] += ops.project(act, layer.down.weight, layer.down.bias)
        return norm_mid, tape

    def _norm(self, x: torch.Tensor) -> NormTape:
        normed = self.empty(*x.shape)
        return NormTape(normed, ops.rms_norm(x, self.weights.eps, normed))

    def _heads(
        self,
        h: torch.Tensor,  # [n, H]
        linear: Linear,
        weight: torch.Tensor | None,
        tape: NormTape | None,
        kept: slice | None,
    ) -> torch.Tensor:
        """A projection as `[n, heads, head_dim]`, normalised per head where the family does."""
        y = ops.project(h, linear.weight, linear.bias).view(len(h), -1, self.weights.head_dim)
        if weight is None:
            return y
        norm = self._norm(y)
        if tape is not None and kept is not None:
            tape[kept] = norm
        return (norm.normed * weight).to(self.wide)

    def _grouped(self, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries rotated, scaled and laid out `[kv_heads, n, group, head_dim]`."""
        rotated = ops.rotary(q, cos[:, None], sin[:, None], self.weights.scaling)
        shape = (len(q), self.weights.kv_heads, self.group, self.weights.head_dim)
        return self.narrow(rotated).view(shape).transpose(0, 1)

    def _stretches(self) -> Iterator[tuple[slice, slice | None]]:
        """Rows in chunks that are kept as a whole (and where) or not at all."""
        segments = self.plan.segments
        at = 0
        while at < len(segments):
            first = segments[at]
            stop = first.row
            while at < len(segments) and (
                (segments[at].saved_row is None) == (first.saved_row is None)
            ):
                stop = segments[at].row + len(segments[at])
                at += 1
            yield from self._chunks(first.row, stop, first.saved_row)

    def _chunks(
        self, start: int, stop: int, saved_row: int | None
    ) -> Iterator[tuple[slice, slice | None]]:
        for row in range(start, stop, self.chunk):
            end = min(stop, row + self.chunk)
            kept = None
            if saved_row is not None:
                kept = slice(saved_row + row - start, saved_row + end - start)
            yield slice(row, end), kept

    def _blocks(self) -> list[QueryBlock]:
        return [
            QueryBlock(i, slice(s.row, s.row + len(s)), torch.arange(s.start, s.stop))
            for i, s in enumerate(self.plan.segments)
        ]

    def _read_blocks(self) -> list[QueryBlock]:
        """The rows that are read, by segment; they are ascending, so each block is a slice."""
        blocks = []
        row = 0
        for i, segment in enumerate(self.plan.segments):
            inside = self.plan.read_rows_in(segment)
            if inside:
                positions = torch.tensor(inside) - segment.row + segment.start
                blocks.append(QueryBlock(i, slice(row, row + len(inside)), positions))
                row += len(inside)
        return blocks
