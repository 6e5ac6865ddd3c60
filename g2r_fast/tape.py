"""What a packed forward keeps for its backward, and what both passes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace

import torch

from .families import DecoderWeights
from .plan import PackedPlan

__all__ = ["LayerTape", "MlpTape", "NormTape", "PassContext", "Tape"]

# Rows per product: tall enough for the matrix library's full rate, small enough that what lies
# between two products stays in the shared cache; chosen by bench/tile_sizes.py.
_CHUNK = {"cpu": 512, "cuda": 16384}


@dataclass(frozen=True)
class NormTape:
    """What an RMSNorm keeps: its rows without the weight, and what they were scaled by."""

    normed: torch.Tensor  # [rows, X] or [rows, heads, head_dim]
    rstd: torch.Tensor  # [rows] or [rows, heads]

    def __getitem__(self, rows: slice | torch.Tensor) -> NormTape:
        return NormTape(self.normed[rows], self.rstd[rows])

    def __setitem__(self, rows: slice, value: NormTape) -> None:
        self.normed[rows], self.rstd[rows] = value.normed, value.rstd


@dataclass(frozen=True)
class MlpTape:
    """What a SwiGLU keeps: its two derivatives, so that a backward evaluates no exponential."""

    d_gate: torch.Tensor  # [query, I]
    d_up: torch.Tensor
    activation: torch.Tensor | None  # [query, I], only for signals that read linears

    def __getitem__(self, rows: slice | torch.Tensor) -> MlpTape:
        activation = None if self.activation is None else self.activation[rows]
        return MlpTape(self.d_gate[rows], self.d_up[rows], activation)


@dataclass(frozen=True)
class LayerTape:
    """What one layer keeps.

    `saved` rows are those that something may come back to; `query` rows are those that attend:
    the same rows, but in the last layer only those whose logits are read.
    """

    k: torch.Tensor  # [kv_heads, rows, head_dim]
    v: torch.Tensor
    norm_in: NormTape  # [saved, H]
    k_norm: NormTape | None  # [saved, kv_heads, head_dim], families with q/k-norm
    query_norm_in: NormTape  # [query, H]; `norm_in` itself, but in the last layer
    q_norm: NormTape | None  # [query, heads, head_dim]
    q: torch.Tensor  # [kv_heads, query, group, head_dim]
    out: torch.Tensor | None  # as q, only for signals that read linears
    lse: torch.Tensor  # [kv_heads, query, group]
    norm_mid: NormTape  # [query, H]
    mlp: MlpTape

    def for_queries(self, at: torch.Tensor) -> LayerTape:
        """The same with one query row for each index in `at`."""
        return replace(
            self,
            query_norm_in=self.query_norm_in[at],
            q_norm=None if self.q_norm is None else self.q_norm[at],
            q=self.q[:, at],
            out=None if self.out is None else self.out[:, at],
            lse=self.lse[:, at],
            norm_mid=self.norm_mid[at],
            mlp=self.mlp[at],
        )


@dataclass
class Tape:
    """What a forward keeps for its backward."""

    plan: PackedPlan
    layers: list[LayerTape]
    norm: NormTape  # [reads, H], the final norm
    leaf: torch.Tensor | None  # [saved, H], the hidden state asked for; None: embeddings

    @property
    def saved_bytes(self) -> int:
        """Bytes kept, each storage once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for part in (*self.layers, self.norm, self.leaf)
            for t in _tensors(part)
        }
        return sum(storages.values())


def _tensors(part: object) -> Iterator[torch.Tensor]:
    """The tensors of a tape or of a part of one; an empty one has no storage of its own."""
    if isinstance(part, torch.Tensor):
        if part.numel():
            yield part
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


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
        self.input_ids = plan.input_ids.to(self.device)
        angles = plan.positions.double()[:, None] * weights.inv_freq.double().cpu()
        self.cos = (angles.cos() * weights.rotary_scaling).to(self.device, self.wide)
        self.sin = (angles.sin() * weights.rotary_scaling).to(self.device, self.wide)

    def empty(self, *shape: int) -> torch.Tensor:
        """In the model's dtype: what is kept."""
        return torch.empty(shape, dtype=self.weights.dtype, device=self.device)

    def empty_wide(self, *shape: int) -> torch.Tensor:
        """In float32 or wider: residual stream, gradients, row statistics."""
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def empty_norm(self, *shape: int) -> NormTape:
        return NormTape(self.empty(*shape), self.empty_wide(*shape[:-1]))

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.weights.dtype)


def _index(rows: torch.Tensor | tuple[int, ...] | list[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.int64, device=device)
