"""What a method tells the engine. The engine knows nothing of rewards; a signal is four answers.

1. `cotangents`: which of the logits that were read send something back, and what.
2. `leaf`: where the backward may stop, 0 for the input embeddings, i for hidden state i.
3. `on_linear` (only if `reads_linears`): what to read at every linear layer on the way.
4. `on_leaf`: what to read where the backward stops; the signal keeps it and finishes by itself.

Both engines, packed and autograd, ask the same four questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .plan import Read

__all__ = ["Cotangents", "LeafRows", "Signal"]


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


class Signal(Protocol):
    """A method, as far as the engine is concerned."""

    leaf: int
    reads_linears: bool

    def cotangents(self, logits: torch.Tensor, reads: Sequence[Read]) -> Cotangents | None:
        """What goes back from `logits` `[len(reads), V]`, float32 or wider; None: nothing.

        Called once per chunk of reads, in the plan's order. A sequence comes back when any of its
        reads is named.
        """
        ...

    def on_linear(
        self, name: str, inputs: torch.Tensor, output_grads: torch.Tensor, rows: LeafRows
    ) -> None:
        """Inputs `[n, in]` and output gradients `[n, lanes, out]` of one linear layer.

        `name` is the module's name in the model. `lm_head` is called with the reads' rows.
        """
        ...

    def on_leaf(self, rows: LeafRows, values: torch.Tensor, grads: torch.Tensor) -> None:
        """Leaf values `[n, H]` and their gradients `[n, lanes, H]`, float32 or wider.

        Views of memory that is reused: read, do not keep.
        """
        ...
