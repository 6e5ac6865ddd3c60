"""What a method tells the engine. The engine knows nothing of rewards; a signal is four answers.

1. `cotangents`: which of the logits that were read send something back, and what.
2. `leaf`: where the backward may stop, 0 for the input embeddings, i for hidden state i; None: at
   the LM head, nothing goes back behind it.
3. `on_linear` and `on_scale` (only if `reads_linears`): what to read at every linear layer and at
   every weight of a norm on the way.
4. `on_leaf`: what to read where the backward stops; the signal keeps it and finishes by itself.

Both engines, packed and autograd, ask the same questions; the autograd engine does not know which
of a model's modules are norms and never asks `on_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .plan import Read

__all__ = ["Cotangents", "LeafRows", "LinearRows", "ReadsNoLinears", "Signal"]


@dataclass(frozen=True)
class Cotangents:
    """`d scalar / d logits` for some of the reads, at a scale near one.

    A sequence's gradient is a linear function of its cotangents, so a signal divides out their
    scale here and multiplies it back, in float32, into what it reads at the leaf: half-precision
    products then neither underflow nor lose the signal.
    """

    reads: Sequence[int]  # which of the reads that were given, ascending
    values: torch.Tensor  # [len(reads), V], float32 or wider


@dataclass(frozen=True)
class LeafRows:
    """Tokens [start, stop) of the sequences in `lanes`, which share these rows' forward."""

    lanes: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class LinearRows:
    """Which rows of what a layer shows belong to which sequence.

    Entries [offsets[j], offsets[j + 1]) are those of sequence `lanes[j]`, in the order of its
    positions: entry e has its inputs in row `kept[e]` and its output gradients in row `rows[e]`.
    Sequences share rows of inputs, never rows of gradients. The gradients of `lanes[j]` are to be
    multiplied by `2 ** exponents[j]`.
    """

    lanes: tuple[int, ...]
    offsets: tuple[int, ...]  # [len(lanes) + 1], ascending from 0
    kept: torch.Tensor  # [entries] int32
    rows: torch.Tensor  # [entries] int32
    exponents: tuple[int, ...]  # all 0 but in float16

    def to(self, device: torch.device) -> LinearRows:
        return replace(self, kept=self.kept.to(device), rows=self.rows.to(device))


class Signal(Protocol):
    """A method, as far as the engine is concerned."""

    @property
    def leaf(self) -> int | None: ...

    @property
    def reads_linears(self) -> bool: ...

    def cotangents(self, logits: torch.Tensor, reads: Sequence[Read]) -> Cotangents | None:
        """What goes back from `logits` `[len(reads), V]`, float32 or wider; None: nothing.

        Called once per chunk of reads, in the plan's order; where `reads_linears`, a chunk holds
        all reads of every sequence in it. A sequence comes back when any of its reads is named.
        """
        ...

    def on_linear(
        self,
        outputs: Mapping[str, int],
        inputs: torch.Tensor,
        output_grads: torch.Tensor,
        rows: LinearRows,
    ) -> None:
        """Inputs `[kept, in]` and output gradients `[rows, out]` of linear layers with one input.

        `outputs`: the modules' names in the model, and the width of each: their columns lie side
        by side in `output_grads`. The LM head is shown with the rows that are read. Views of memory
        that is reused: read, do not keep.
        """
        ...

    def on_scale(self, name: str, products: torch.Tensor, rows: LinearRows) -> None:
        """`output_grads * normalised inputs`, `[rows, X]` float32 or wider, of the norm `name`.

        Its sum over a sequence's rows is the gradient of the norm's weight; where a layer asks
        twice, of its queries and of its keys, of both sums.
        """
        ...

    def on_leaf(self, rows: LeafRows, values: torch.Tensor, grads: torch.Tensor) -> None:
        """Leaf values `[n, H]` and their gradients `[n, lanes, H]`, float32 or wider.

        Views of memory that is reused: read, do not keep.
        """
        ...


class ReadsNoLinears:
    """The part of a signal that has nothing to read on the way back."""

    reads_linears = False

    def on_linear(
        self,
        outputs: Mapping[str, int],
        inputs: torch.Tensor,
        output_grads: torch.Tensor,
        rows: LinearRows,
    ) -> None:
        """Never asked."""

    def on_scale(self, name: str, products: torch.Tensor, rows: LinearRows) -> None:
        """Never asked."""
