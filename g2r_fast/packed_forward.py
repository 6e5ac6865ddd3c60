"""The forward of the packed engine: every row once, keeping only what comes back."""

from __future__ import annotations

import torch

from . import ops
from .families import LayerWeights
from .tables import (
    QueryTables,
    RowMap,
    forward_queries,
    forward_read_queries,
    forward_reads,
    forward_rows,
)
from .tape import LayerTape, MlpTape, NormTape, PassContext, Tape

__all__ = ["PackedForward"]


class PackedForward:
    """One pass over a plan's rows.

    Args:
        leaf: index of the hidden state to keep for the signal; 0, the embeddings, and None: none.
        keep_linears: keep the inputs of every linear layer too.
    """

    def __init__(self, context: PassContext, leaf: int | None, keep_linears: bool) -> None:
        self.context = context
        self.weights = context.weights
        self.leaf = leaf
        self.keep_linears = keep_linears
        self.keep_out = keep_linears or context.backend.keeps_attended
        self.rows = forward_rows(context.plan, context.chunk)
        # What a layer needs and does not keep, for all layers in turn.
        shape = (context.plan.rows, self.weights.heads, self.weights.head_dim)
        self._shape = shape
        fresh = context.all_saved and self.keep_out  # every layer's own
        self._out = None if fresh else context.empty_attended(*shape)
        self._q = None if context.all_saved else context.empty(*shape)
        self._lse = None if context.all_saved else context.empty_wide(*shape[:2])

    def run(self) -> Tape:
        context, layers = self.context, self.weights.layers
        x = context.rows_of(self.weights.embed, context.input_ids).to(context.wide)  # [rows, H]
        queries = forward_queries(context.plan)
        tapes = []
        leaf = None
        for i, layer in enumerate(layers):
            if 0 < i == self.leaf:
                leaf = context.rows_of(x, context.saved_rows)
            if i + 1 < len(layers):
                tapes.append(self._layer(layer.whole(), x, queries))
        x, tape = self._last_layer(layers[-1].whole(), x)
        normed = context.empty(*x.shape)
        norm = NormTape(normed, ops.rms_norm(x, self.weights.eps, normed))
        return Tape(context, [*tapes, tape], norm, leaf)

    def _layer(self, layer: LayerWeights, x: torch.Tensor, queries: QueryTables) -> LayerTape:
        """One decoder layer over every row of `x` `[rows, H]`, in place."""
        context = self.context
        saved = context.plan.saved_rows
        q, lse, out = self._q, self._lse, self._out
        if q is None or lse is None:  # all of it is kept
            q, lse = context.empty(*self._shape), context.empty_wide(*self._shape[:2])
        if out is None:
            out = context.empty_attended(*self._shape)
        k, v = self._keys_values()
        norm_in = context.empty_norm(saved, x.shape[1])
        q_norm = self._head_norm(layer.q_norm, saved, self.weights.heads)
        k_norm = self._head_norm(layer.k_norm, saved, self.weights.kv_heads)
        ops.qkv_forward(
            context.backend, layer, x, context.rotary, self.rows, norm_in,
            q=q, k=k, v=v, q_norm=q_norm, k_norm=k_norm,
            eps=self.weights.eps, scaling=self.weights.scaling,
        )  # fmt: skip
        ops.attention_forward(context.backend, queries, q, k, v, out, lse, window=layer.window)
        norm_mid, mlp = self._mlp(layer, x, out, self.rows, saved)
        if not context.all_saved:
            q, lse = context.rows_of(q, context.saved_rows), lse[context.saved_rows]
            out = context.rows_of(out, context.saved_rows) if self.keep_out else out
        return LayerTape(
            k=k,
            v=v,
            norm_in=norm_in,
            k_norm=k_norm,
            query_norm_in=norm_in,
            q_norm=q_norm,
            q=q,
            out=out if self.keep_out else None,
            lse=lse,
            norm_mid=norm_mid,
            mlp=mlp,
        )

    def _last_layer(self, layer: LayerWeights, x: torch.Tensor) -> tuple[torch.Tensor, LayerTape]:
        """Keys and values of all rows, the rest for those that are read: `[reads, H]`."""
        context, weights = self.context, self.weights
        saved, reads = context.plan.saved_rows, len(context.read_rows)
        k, v = self._keys_values()
        norm_in = context.empty_norm(saved, x.shape[1])
        k_norm = self._head_norm(layer.k_norm, saved, weights.kv_heads)
        ops.qkv_forward(
            context.backend, layer, x, context.rotary, self.rows, norm_in,
            k=k, v=v, k_norm=k_norm, eps=weights.eps, scaling=weights.scaling,
        )  # fmt: skip
        x = x[context.read_rows]
        rows = forward_reads(context.plan, context.chunk)
        q = context.empty(reads, weights.heads, weights.head_dim)
        query_norm_in = context.empty_norm(reads, x.shape[1])
        q_norm = self._head_norm(layer.q_norm, reads, weights.heads)
        ops.qkv_forward(
            context.backend, layer, x, context.rotary_read, rows, query_norm_in,
            q=q, q_norm=q_norm, eps=weights.eps, scaling=weights.scaling,
        )  # fmt: skip
        out, lse = context.empty_attended(*q.shape), context.empty_wide(*q.shape[:2])
        queries = forward_read_queries(context.plan)
        ops.attention_forward(context.backend, queries, q, k, v, out, lse, window=layer.window)
        norm_mid, mlp = self._mlp(layer, x, out, rows, reads)
        return x, LayerTape(
            k=k,
            v=v,
            norm_in=norm_in,
            k_norm=k_norm,
            query_norm_in=query_norm_in,
            q_norm=q_norm,
            q=q,
            out=out if self.keep_out else None,
            lse=lse,
            norm_mid=norm_mid,
            mlp=mlp,
        )

    def _mlp(
        self, layer: LayerWeights, x: torch.Tensor, attended: torch.Tensor, rows: RowMap, kept: int
    ) -> tuple[NormTape, MlpTape]:
        """Output projection and MLP, added to `x` in place; what of it is kept."""
        context = self.context
        width = len(layer.gate.weight)
        norm = context.empty_norm(kept, x.shape[1])
        activation = context.empty(kept, width) if self.keep_linears else None
        mlp = MlpTape(context.empty(kept, width), context.empty(kept, width), activation)
        ops.mlp_forward(context.backend, layer, x, attended, rows, norm, mlp, eps=self.weights.eps)
        return norm, mlp

    def _keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.context.plan.rows, self.weights.kv_heads, self.weights.head_dim)
        return self.context.empty(*shape), self.context.empty(*shape)

    def _head_norm(self, weight: torch.Tensor | None, rows: int, heads: int) -> NormTape | None:
        return None if weight is None else self.context.empty_norm(rows, heads, len(weight))
