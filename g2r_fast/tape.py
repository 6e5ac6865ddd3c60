"""What a packed forward keeps for its backward, and what both passes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property

import torch

from .backends import Backend
from .families import DecoderWeights
from .plan import PackedPlan

__all__ = [
    "LayerTape",
    "MlpGrads",
    "MlpTape",
    "NormTape",
    "PassContext",
    "QkvGrads",
    "Rotary",
    "Tape",
    "tensors_in",
]

# Rows per product: tall enough for the matrix library's full rate, small enough that what lies
# between two products stays in the shared cache; chosen by bench/tile_sizes.py.
_CHUNK = {"cpu": 512, "cuda": 16384}
# Bytes from which fresh memory is asked for in large pages; what lies side by side shares them.
_LARGE = 2**20

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [rows, head_dim / 2]


@dataclass(frozen=True)
class NormTape:
    """What an RMSNorm keeps: its rows without the weight, and what they were scaled by."""

    normed: torch.Tensor  # [rows, X] or [rows, heads, head_dim]
    rstd: torch.Tensor  # [rows] or [rows, heads]

    def __getitem__(self, rows: slice | torch.Tensor) -> NormTape:
        return NormTape(self.normed[rows], self.rstd[rows])


@dataclass(frozen=True)
class MlpTape:
    """What a gated MLP keeps: the derivatives of `act(gate) * up`, so that a backward evaluates
    no exponential."""

    d_gate: torch.Tensor  # [query, I]
    d_up: torch.Tensor
    activation: torch.Tensor | None = None  # [query, I], only for signals that read linears


@dataclass(frozen=True)
class MlpGrads:
    """What a backward of the MLP hands out where linear layers are read; backward rows."""

    gate_up: torch.Tensor  # [B, 2 * I], the model's dtype: output gradients, gate's first
    norm: torch.Tensor  # [B, H], float32 or wider: gradient of the norm's output * `normed`


@dataclass(frozen=True)
class QkvGrads:
    """What a backward of the projections hands out where linear layers are read."""

    projected: torch.Tensor  # [B, X], the model's dtype: output gradients of q, k, v that were sent
    norm: torch.Tensor  # [B, H], as of MlpGrads
    q_norm: torch.Tensor | None  # [B, D], the same of the heads' norm, summed over the heads
    k_norm: torch.Tensor | None


@dataclass(frozen=True)
class LayerTape:
    """What one layer keeps.

    `saved` rows are those that something may come back to; `query` rows are those that attend:
    the same rows, but in the last layer only those whose logits are read.
    """

    k: torch.Tensor  # [rows, kv_heads, head_dim]
    v: torch.Tensor
    norm_in: NormTape  # [saved, H]
    k_norm: NormTape | None  # [saved, kv_heads, head_dim], families with q/k-norm
    query_norm_in: NormTape  # [query, H]; `norm_in` itself, but in the last layer
    q_norm: NormTape | None  # [query, heads, head_dim]
    q: torch.Tensor  # [query, heads, head_dim]
    # As q, in the dtype that the backend gives it; for signals that read linear layers, and where
    # the backward of attention reads it.
    out: torch.Tensor | None
    lse: torch.Tensor  # [query, heads]
    norm_mid: NormTape  # [query, H]
    mlp: MlpTape


@dataclass
class Tape:
    """What a forward keeps for its backward."""

    context: PassContext
    layers: list[LayerTape]
    norm: NormTape  # [reads, H], the final norm
    leaf: torch.Tensor | None  # [saved, H], the hidden state asked for; None: embeddings

    @property
    def plan(self) -> PackedPlan:
        return self.context.plan

    @property
    def saved_bytes(self) -> int:
        """Bytes kept, each storage once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors_in((self.layers, self.norm, self.leaf))
            if t.numel()  # an empty one has no storage of its own
        }
        return sum(storages.values())


def tensors_in(part: object) -> Iterator[torch.Tensor]:
    """The tensors of a dataclass, of what it holds, and of lists of them."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, (list, tuple)):
        for inner in part:
            yield from tensors_in(inner)
    elif is_dataclass(part):
        for field in fields(part):
            yield from tensors_in(getattr(part, field.name))


class PassContext:
    """Backend, sizes, dtypes and rotary tables of the passes over one plan."""

    def __init__(self, weights: DecoderWeights, plan: PackedPlan, backend: Backend) -> None:
        self.weights = weights
        self.plan = plan
        self.backend = backend
        self.device = weights.device
        self.wide = torch.promote_types(weights.dtype, torch.float32)  # residuals and gradients
        self.chunk = _CHUNK.get(self.device.type, _CHUNK["cuda"])
        live = [s for s in plan.segments if s.saved_row is not None]
        rows = [torch.arange(s.row, s.row + len(s)) for s in live]
        self.saved_rows_on_host = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        self.saved_rows = self.index(self.saved_rows_on_host)
        self.read_rows = self.index(plan.read_rows)
        self.input_ids = plan.input_ids.to(self.device)
        self.all_saved = plan.saved_rows == plan.rows
        self.scales_lanes = weights.dtype == torch.float16

    def index(self, rows: torch.Tensor | tuple[int, ...] | list[int]) -> torch.Tensor:
        return torch.as_tensor(rows, dtype=torch.int64, device=self.device)

    @cached_property
    def rotary(self) -> Rotary:
        """Of every row."""
        weights = self.weights
        # A double cosine costs a CPU as much time as some layers cost a GPU.
        where = self.device if self.device.type == "cuda" else torch.device("cpu")
        positions = self.plan.positions.to(where, torch.float64)
        angles = positions[:, None] * weights.inv_freq.to(where, torch.float64)
        cos = (angles.cos() * weights.rotary_scaling).to(self.device, self.wide)
        sin = (angles.sin() * weights.rotary_scaling).to(self.device, self.wide)
        return cos, sin

    @cached_property
    def rotary_saved(self) -> Rotary:
        return self.rotary if self.all_saved else self._rotary_of(self.saved_rows)

    @cached_property
    def rotary_read(self) -> Rotary:
        return self._rotary_of(self.read_rows)

    def empty(self, *shape: int) -> torch.Tensor:
        """In the model's dtype: most of what is kept."""
        return self._empty(shape, self.weights.dtype)

    def empty_wide(self, *shape: int) -> torch.Tensor:
        """In float32 or wider: residual stream, gradients, row statistics."""
        return self._empty(shape, self.wide)

    def empty_gradient(self, *shape: int) -> torch.Tensor:
        """In the dtype of the backend for gradients that enter and leave attention."""
        return self._empty(shape, self.backend.gradient_dtype(self.weights.dtype))

    def empty_attended(self, *shape: int) -> torch.Tensor:
        """In the dtype of the backend for what attention gives."""
        return self._empty(shape, self.backend.attended_dtype(self.weights.dtype))

    def empty_norm(self, *shape: int) -> NormTape:
        return NormTape(self.empty(*shape), self.empty_wide(*shape[:-1]))

    def rows_of(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`values[rows]`."""
        out = self._empty((len(rows), *values.shape[1:]), values.dtype)
        return torch.index_select(values, 0, rows, out=out)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype, device=self.device)
        if (
            memory.device.type == "cpu"
            and self.backend.name == "native"
            and memory.nbytes >= _LARGE
        ):
            torch.ops.g2r_fast.prefer_large_pages(memory)
        return memory

    def _rotary_of(self, rows: torch.Tensor) -> Rotary:
        cos, sin = self.rotary
        return cos[rows], sin[rows]
