"""The forward of the packed engine: every row once, keeping only what comes back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import ops
from .families import DecoderWeights, LayerWeights, Linear
from .ops import QueryBlock
from .plan import PackedPlan
from .tape import LayerTape, PassContext, Tape

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
        x = weights.embed[plan.input_ids.to(self.device)].to(self.wide)  # [rows, H]
        layers = []
        leaf = None
        for i, layer in enumerate(weights.layers):
            if 0 < i == self.leaf:
                leaf = x[self.saved_rows]
            is_last = i + 1 == len(weights.layers)
            x, tape = self._layer(layer, x, self.read_rows if is_last else None)
            layers.append(tape)
        normed = self.empty(*x.shape)
        rstd = ops.rms_norm(x, weights.eps, normed)
        return Tape(plan, layers, normed, rstd, leaf)

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
        normed_in = self.empty(saved, x.shape[1])
        rstd_in = self.empty_wide(saved)
        k_kept = self._norm_tape(layer, saved, weights.kv_heads)
        q_kept = self._norm_tape(layer, saved if reads is None else queries, weights.heads)

        for rows, kept in self._stretches():
            normed = self.empty(len_of(rows), x.shape[1]) if kept is None else normed_in[kept]
            rstd = ops.rms_norm(x[rows], weights.eps, normed)
            if kept is not None:
                rstd_in[kept] = rstd
            h = normed * layer.input_norm
            cos, sin = self.cos[rows], self.sin[rows]
            keys = self._heads(h, layer.k, layer.k_norm, weights.kv_heads, k_kept, kept)
            keys = ops.rotary(keys, cos[:, None], sin[:, None])
            k[:, rows] = self.narrow(keys).transpose(0, 1)
            values = self._heads(h, layer.v, None, weights.kv_heads, None, None)
            v[:, rows] = self.narrow(values).transpose(0, 1)
            if reads is None:
                heads = self._heads(h, layer.q, layer.q_norm, weights.heads, q_kept, kept)
                q[:, rows] = self._grouped(heads, cos, sin)
        query_normed_in, query_rstd_in = normed_in, rstd_in
        if reads is not None:
            x = x[reads]
            query_normed_in = self.empty(*x.shape)
            query_rstd_in = ops.rms_norm(x, weights.eps, query_normed_in)
            h = query_normed_in * layer.input_norm
            everything = slice(0, queries)
            heads = self._heads(h, layer.q, layer.q_norm, weights.heads, q_kept, everything)
            q[:] = self._grouped(heads, self.cos[reads], self.sin[reads])

        blocks = self._blocks() if reads is None else self._read_blocks()
        out, lse = ops.attention_forward(plan, blocks, q, k, v, layer.window)
        mlp_kept = self._mlp(layer, x, out, reads is not None)
        if reads is None and saved < plan.rows:
            q, out, lse = (t[:, self.saved_rows] for t in (q, out, lse))
        return x, LayerTape(
            k, v, normed_in, rstd_in, q, out, lse, *mlp_kept, *q_kept, *k_kept,
            query_normed_in, query_rstd_in,
        )  # fmt: skip

    def _mlp(
        self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor, reads_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Output projection and SwiGLU, added to `x` in place; what of it is kept."""
        kept_rows = len(x) if reads_only else self.plan.saved_rows
        width = layer.gate.weight.shape[0]
        normed_mid = self.empty(kept_rows, x.shape[1])
        rstd_mid = self.empty_wide(kept_rows)
        d_gate, d_up = self.empty(kept_rows, width), self.empty(kept_rows, width)
        activation = self.empty(kept_rows, width) if self.keep_linears else None
        stretches = self._stretches() if not reads_only else self._chunks(0, len(x), 0)
        for rows, kept in stretches:
            mixed = out[:, rows].transpose(0, 1).flatten(1)
            ops.project(mixed, layer.o.weight, layer.o.bias, x[rows], accumulate=True)
            normed = self.empty(len_of(rows), x.shape[1]) if kept is None else normed_mid[kept]
            rstd = ops.rms_norm(x[rows], self.weights.eps, normed)
            h = normed * layer.post_norm
            gate, up = (self.empty_wide(len(h), width) for _ in range(2))
            ops.project(h, layer.gate.weight, layer.gate.bias, gate)
            ops.project(h, layer.up.weight, layer.up.bias, up)
            derivatives = None
            if kept is not None:
                rstd_mid[kept] = rstd
                derivatives = (d_gate[kept], d_up[kept])
            act = self.narrow(ops.swiglu(gate, up, derivatives))
            if activation is not None and kept is not None:
                activation[kept] = act
            ops.project(act, layer.down.weight, layer.down.bias, x[rows], accumulate=True)
        return normed_mid, rstd_mid, d_gate, d_up, activation

    def _heads(
        self,
        h: torch.Tensor,  # [n, H]
        linear: Linear,
        norm: torch.Tensor | None,
        heads: int,
        norm_tape: tuple[torch.Tensor | None, torch.Tensor | None] | None,
        kept: slice | None,
    ) -> torch.Tensor:
        """A projection as `[n, heads, head_dim]`, normalised per head where the family does."""
        y = self.empty_wide(len(h), linear.weight.shape[0])
        ops.project(h, linear.weight, linear.bias, y)
        y = y.view(len(h), heads, self.weights.head_dim)
        if norm is None:
            return y
        normed = self.empty(*y.shape)
        rstd = ops.rms_norm(y, self.weights.eps, normed)
        if norm_tape is not None and kept is not None:
            normed_tape, rstd_tape = norm_tape
            assert normed_tape is not None and rstd_tape is not None
            normed_tape[kept], rstd_tape[kept] = normed, rstd
        return (normed * norm).to(self.wide)

    def _grouped(self, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries rotated, scaled and laid out `[kv_heads, n, group, head_dim]`."""
        rotated = ops.rotary(q, cos[:, None], sin[:, None], self.weights.scaling)
        shape = (len(q), self.weights.kv_heads, self.group, self.weights.head_dim)
        return self.narrow(rotated).view(shape).transpose(0, 1)

    def _norm_tape(
        self, layer: LayerWeights, rows: int, heads: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if layer.q_norm is None:
            return None, None
        return self.empty(rows, heads, self.weights.head_dim), self.empty_wide(rows, heads)

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


def len_of(rows: slice) -> int:
    return rows.stop - rows.start
