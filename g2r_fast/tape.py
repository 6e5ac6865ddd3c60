"""What a packed forward keeps for its backward, and what both passes share."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .families import DecoderWeights
from .plan import PackedPlan

__all__ = ["LayerTape", "PassContext", "Tape"]

# Rows per product: tall enough for the matrix library's full rate, small enough that what lies
# between two products stays in the shared cache; chosen by bench/tile_sizes.py.
_CHUNK = {"cpu": 512, "cuda": 16384}


@dataclass
class LayerTape:
    """What one layer keeps.

    `saved` rows are those that something may come back to; `query` rows are those that attend:
    the same rows, but in the last layer only those whose logits are read.
    """

    k: torch.Tensor  # [kv_heads, rows, head_dim]
    v: torch.Tensor
    normed_in: torch.Tensor  # [saved, H]
    rstd_in: torch.Tensor  # [saved]
    q: torch.Tensor  # [kv_heads, query, group, head_dim]
    out: torch.Tensor
    lse: torch.Tensor  # [kv_heads, query, group]
    normed_mid: torch.Tensor  # [query, H]
    rstd_mid: torch.Tensor  # [query]
    d_gate: torch.Tensor  # [query, I], derivatives of silu(gate) * up
    d_up: torch.Tensor
    activation: torch.Tensor | None  # [query, I], only for signals that read linears
    q_normed: torch.Tensor | None  # [query, heads, head_dim], families with q/k-norm
    q_rstd: torch.Tensor | None
    k_normed: torch.Tensor | None  # [saved, kv_heads, head_dim]
    k_rstd: torch.Tensor | None
    query_normed_in: torch.Tensor  # [query, H]; `normed_in` itself, but in the last layer
    query_rstd_in: torch.Tensor

    def for_queries(self, at: torch.Tensor) -> LayerTape:
        """The same with one query row for each index in `at`."""

        def rows(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[at]

        return replace(
            self,
            q=self.q[:, at],
            out=self.out[:, at],
            lse=self.lse[:, at],
            normed_mid=self.normed_mid[at],
            rstd_mid=self.rstd_mid[at],
            d_gate=self.d_gate[at],
            d_up=self.d_up[at],
            activation=rows(self.activation),
            q_normed=rows(self.q_normed),
            q_rstd=rows(self.q_rstd),
            query_normed_in=self.query_normed_in[at],
            query_rstd_in=self.query_rstd_in[at],
        )


@dataclass
class Tape:
    """What a forward keeps for its backward."""

    plan: PackedPlan
    layers: list[LayerTape]
    normed: torch.Tensor  # [reads, H], before the final norm's weight
    rstd: torch.Tensor  # [reads]
    leaf: torch.Tensor | None  # [saved, H], the hidden state asked for; None: embeddings

    @property
    def saved_bytes(self) -> int:
        """Bytes kept, each storage once."""
        tensors = [getattr(layer, f.name) for layer in self.layers for f in fields(layer)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*tensors, self.normed, self.rstd, self.leaf)
            if t is not None and t.numel()
        }
        return sum(storages.values())


class PassContext:
    """Sizes, dtypes, chunks and rotary tables of a pass over one plan."""

    def __init__(self, weights: DecoderWeights, plan: PackedPlan) -> None:
        self.weights = weights
        self.plan = plan
        self.device = weights.device
        self.wide = torch.promote_types(weights.dtype, torch.float32)  # residuals and gradients
        self.chunk = _CHUNK.get(self.device.type, _CHUNK["cuda"])
        self.group = weights.heads // weights.kv_heads
        live = [s for s in plan.segments if s.saved_row is not None]
        rows = [torch.arange(s.row, s.row + len(s)) for s in live]
        self.saved_rows = _index(torch.cat(rows) if rows else [], self.device)
        self.read_rows = _index(plan.read_rows, self.device)
        angles = plan.positions.double()[:, None] * weights.inv_freq.double().cpu()
        self.cos = (angles.cos() * weights.rotary_scaling).to(self.device, self.wide)
        self.sin = (angles.sin() * weights.rotary_scaling).to(self.device, self.wide)

    def empty(self, *shape: int) -> torch.Tensor:
        """In the model's dtype: what is kept."""
        return torch.empty(shape, dtype=self.weights.dtype, device=self.device)

    def empty_wide(self, *shape: int) -> torch.Tensor:
        """In float32 or wider: residual stream, gradients, row statistics."""
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.weights.dtype)


def _index(rows: torch.Tensor | tuple[int, ...] | list[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.int64, device=device)
