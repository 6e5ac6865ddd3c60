"""Norms of per-sequence gradients over a model's parameters, as a signal of the packed engine.

What a linear layer with inputs A and output gradients B of one sequence adds to the squared norm is
`(A.T @ B).square().sum()`, which needs no gradient to be formed; biases and weights of norms are
sums over rows, the input embeddings sums over equal ids. A head tied to the embeddings shares their
gradient, and the square of the sum has a cross term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import LowRank, low_rank, named_modules, plain
from .cotangents import check_finite
from .errors import InputError
from .ops import squared_gradient_norms, squared_row_sums
from .plan import PackedSequence, Read
from .signal import Cotangents, LeafRows, LinearRows

__all__ = ["PARAMETERS", "NormSignal", "Parameters", "Scalar"]

PARAMETERS = ("trainable", "all", "lm_head")

# The cotangents `[n, V]` of one sequence's scalar, from its number and the logits `[n, V]` that it
# reads, and a factor by which they are too large: near one in size, they suit every dtype.
Scalar = Callable[[int, Tensor], tuple[Tensor, float]]


@dataclass(frozen=True)
class Parameters:
    """Which of a model's parameters count."""

    wanted: frozenset[int]  # ids of the nn.Parameters
    head_only: bool

    @classmethod
    def of(cls, policy: nn.Module, which: str) -> Parameters:
        """`"trainable"`: what requires a gradient; `"all"`; `"lm_head"`: the head's weight, in its
        role as the head. Adapters that are off or merged compute nothing and do not count. Raises
        InputError for another name, where nothing is left, and for weights without gradients."""
        if not isinstance(which, str) or which not in PARAMETERS:
            raise InputError(
                "unknown parameters", expected=" | ".join(map(repr, PARAMETERS)), got=repr(which)
            )
        if which == "lm_head":
            head: Any = plain(policy.get_output_embeddings())  # type: ignore[operator]
            chosen = {"lm_head.weight": head.weight}
        else:
            chosen = {
                f"{name}.{own}": parameter
                for name, module in named_modules(policy)
                for own, parameter in module.named_parameters(recurse=False)
                if which == "all" or parameter.requires_grad
            }
        if not chosen:
            idle = any(parameter.requires_grad for parameter in policy.parameters())
            raise InputError(
                "the policy has no trainable parameters",
                expected="some parameter with requires_grad",
                got="adapters that are off or merged into the weights" if idle else None,
                fix="Switch the adapters on and unmerge them, as they are in training."
                if idle
                else 'Say parameters="all", or requires_grad_(True) where a trainer would.',
            )
        for name, parameter in chosen.items():
            if not parameter.is_floating_point():
                raise InputError(
                    "a parameter can have no gradient",
                    expected="floating-point weights",
                    got=f"{name} of {parameter.dtype}",
                    fix='Say parameters="trainable".',
                )
        return cls(frozenset(map(id, chosen.values())), which == "lm_head")

    def __contains__(self, parameter: nn.Parameter | None) -> bool:
        return parameter is not None and id(parameter) in self.wanted


class NormSignal:
    """Squared gradient norms of one scalar per sequence.

    Raises InputError, while it runs, where logits are not finite.
    """

    reads_linears = True

    def __init__(
        self,
        policy: Any,
        sequences: Sequence[PackedSequence],
        scalar: Scalar,
        parameters: Parameters,
    ) -> None:
        self._policy = policy
        self._sequences = sequences
        self._labels = [sequence.label for sequence in sequences]
        self._scalar = scalar
        self._parameters = parameters
        embedding = plain(policy.get_input_embeddings())
        head = plain(policy.get_output_embeddings())
        self._head = next(name for name, module in named_modules(policy) if module is head)
        self._reads_embedding = not parameters.head_only and embedding.weight in parameters
        self._tied = self._reads_embedding and head.weight is embedding.weight
        self._padding = embedding.padding_idx if self._reads_embedding else None
        device = embedding.weight.device
        self._squares = torch.zeros(len(sequences), dtype=torch.float64, device=device)
        self._factors = torch.ones_like(self._squares)
        # Of the last layer's first norm, which is shown twice: the queries' part.
        self._parts: dict[int, Tensor] = {}
        self._embeddings: dict[int, _EmbeddingGradient] = {}
        self._last_norm = ""
        self.leaf = self._lowest()

    def norms(self) -> Tensor:
        """`[N]` float64; NaN or infinity where a gradient is not finite."""
        return self._squares.clamp(min=0.0).sqrt() * self._factors

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        check_finite(logits, reads, self._labels)
        owners = [read.sequence for read in reads]
        starts = [i for i in range(len(owners)) if i == 0 or owners[i] != owners[i - 1]]
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(reads)], strict=True):
            sequence = owners[start]
            values, factor = self._scalar(sequence, logits[start:stop])
            parts.append(values)
            # Memory may have run out before the end: a second attempt starts anew.
            self._squares[sequence] = 0.0
            self._factors[sequence] = factor
            self._parts.pop(sequence, None)
            self._embeddings.pop(sequence, None)
        return Cotangents(range(len(reads)), parts[0] if len(parts) == 1 else torch.cat(parts))

    def on_linear(
        self, outputs: Mapping[str, int], inputs: Tensor, output_grads: Tensor, rows: LinearRows
    ) -> None:
        modules = [plain(self._policy.get_submodule(name)) for name in outputs]
        widths = list(outputs.values())
        weights = [module.weight in self._parameters for module in modules]
        biases = [getattr(module, "bias", None) in self._parameters for module in modules]
        if any(weights):
            grads = _columns(output_grads, widths, weights)
            self._add(rows, squared_gradient_norms(inputs, grads, rows))
        if any(biases) and not self._parameters.head_only:
            grads = _columns(output_grads, widths, biases)
            self._add(rows, squared_row_sums(grads, rows))
        for module, grads in zip(modules, output_grads.split(widths, dim=1), strict=True):
            for adapter in low_rank(module) or ():
                self._add_adapter(adapter, inputs, grads, rows)
        if self._tied and self._head in outputs:
            for lane, sequence in enumerate(rows.lanes):
                entries = slice(rows.offsets[lane], rows.offsets[lane + 1])
                gradient = self._embedding(sequence)
                wide = torch.promote_types(inputs.dtype, torch.float32)
                columns = output_grads[rows.rows[entries, None].long(), gradient.ids].to(wide)
                gradient.of_head = columns.mT @ inputs[rows.kept[entries]].to(wide)

    def on_scale(self, name: str, products: Tensor, rows: LinearRows) -> None:
        module = plain(self._policy.get_submodule(name))
        if module.weight not in self._parameters:
            return
        if name != self._last_norm:
            self._add(rows, squared_row_sums(products, rows))
            return
        for lane, sequence in enumerate(rows.lanes):
            entries = slice(rows.offsets[lane], rows.offsets[lane + 1])
            part = products[rows.rows[entries]].sum(0, dtype=torch.float64)
            part = part.ldexp(torch.tensor(rows.exponents[lane], device=part.device))
            if sequence in self._parts:
                self._squares[sequence] += (self._parts.pop(sequence) + part).square().sum()
            else:
                self._parts[sequence] = part

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        if not self._reads_embedding:
            return
        for lane, sequence in enumerate(rows.lanes):
            gradient = self._embedding(sequence)
            gradient.add(rows.start, grads[:, lane])
            if gradient.is_whole:
                self._squares[sequence] += gradient.square()
                del self._embeddings[sequence]

    def _add_adapter(
        self, adapter: LowRank, inputs: Tensor, grads: Tensor, rows: LinearRows
    ) -> None:
        """Of `y = x @ W.T + scale * (x @ a.T) @ b.T`: a has the inputs x and the output gradients
        `scale * dy @ b`, b the inputs `x @ a.T` and the output gradients `scale * dy`."""
        a, b = adapter.a.detach().to(inputs.dtype), adapter.b.detach().to(inputs.dtype)
        scaled = grads * adapter.scale
        if adapter.a in self._parameters:
            self._add(rows, squared_gradient_norms(inputs, scaled @ b, rows))
        if adapter.b in self._parameters:
            self._add(rows, squared_gradient_norms(inputs @ a.T, scaled, rows))

    def _add(self, rows: LinearRows, squares: Tensor) -> None:
        self._squares[torch.tensor(rows.lanes, device=squares.device)] += squares

    def _embedding(self, sequence: int) -> _EmbeddingGradient:
        if sequence not in self._embeddings:
            self._embeddings[sequence] = _EmbeddingGradient(
                self._sequences[sequence].input_ids, self._padding, self._squares.device
            )
        return self._embeddings[sequence]

    def _lowest(self) -> int | None:
        """Where the backward may stop: at the input of the lowest layer that counts."""
        if self._parameters.head_only:
            return None
        layers = self._policy.model.layers
        self._last_norm = f"model.layers.{len(layers) - 1}.input_layernorm"
        if self._reads_embedding:
            return 0
        for index, layer in enumerate(layers):
            if any(p in self._parameters for p in layer.parameters()):
                return index
        return len(layers) - 1 if self._policy.model.norm.weight in self._parameters else None


class _EmbeddingGradient:
    """The gradient of the rows of an embedding that one sequence uses, and of a head tied to it."""

    def __init__(self, input_ids: Sequence[int], padding: int | None, device: torch.device) -> None:
        ids, self._places = torch.tensor(input_ids, device=device).unique(return_inverse=True)
        self.ids = ids
        self.of_head: Tensor | None = None  # [ids, H], the same rows of the head's gradient
        self._counts = None if padding is None else (ids != padding)
        self._sums: Tensor | None = None  # [ids, H]
        self._missing = len(input_ids)

    @property
    def is_whole(self) -> bool:
        return self._missing == 0

    def add(self, start: int, grads: Tensor) -> None:
        """Gradients `[n, H]` of the inputs from position `start` on: those of equal ids add up."""
        if self._sums is None:
            self._sums = grads.new_zeros(len(self.ids), grads.shape[1])
        self._sums.index_add_(0, self._places[start : start + len(grads)], grads)
        self._missing -= len(grads)

    def square(self) -> Tensor:
        """`G_e.square().sum()`, and for a tied head `2 * (G_e * G_h).sum()`: that head's own square
        is counted where it is read."""
        assert self._sums is not None
        sums = self._sums.double()
        if self._counts is not None:  # the row of padding_idx gets no gradient
            sums = sums * self._counts[:, None]
        whole = sums.square().sum()
        return whole if self.of_head is None else whole + 2 * (sums * self.of_head).sum()


def _columns(grads: Tensor, widths: Sequence[int], wanted: Sequence[bool]) -> Tensor:
    """Of layers side by side, the columns of those that count."""
    if all(wanted):
        return grads
    parts = zip(grads.split(list(widths), dim=1), wanted, strict=True)
    return torch.cat([part for part, counts in parts if counts], dim=1)
