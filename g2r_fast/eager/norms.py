"""Squared norms of weight gradients per sequence, without the gradients; see ops.py."""

from __future__ import annotations

import torch

from ..signal import LinearRows
from .products import product_nt, product_tn

__all__ = ["gram_is_cheaper", "squared_gradient_norms", "squared_row_sums"]

_GRAM_ROWS = 1024  # of a block of the two Gram matrices: 4 MiB each in float32
_TILE_ELEMENTS = 2**22  # at most, of a stretch of columns of a gradient, and never all of it


def gram_is_cheaper(entries: int, inputs: int, outputs: int) -> bool:
    """Whether two symmetric Gram matrices cost fewer multiplications than the gradient does."""
    return entries * (inputs + outputs) < 2 * inputs * outputs


def squared_gradient_norms(
    inputs: torch.Tensor, grads: torch.Tensor, rows: LinearRows
) -> torch.Tensor:
    """See `ops.squared_gradient_norms`."""
    found = []
    for lane in range(len(rows.lanes)):
        entries = slice(rows.offsets[lane], rows.offsets[lane + 1])
        a = _take(inputs, rows.kept[entries])
        b = _take(grads, rows.rows[entries])
        gram = gram_is_cheaper(len(a), a.shape[1], b.shape[1])
        found.append(_by_gram(a, b) if gram else _by_gradient(a, b))
    return torch.stack(found) if found else inputs.new_zeros(0, dtype=torch.float64)


def squared_row_sums(x: torch.Tensor, rows: LinearRows) -> torch.Tensor:
    """See `ops.squared_row_sums`."""
    found = []
    for lane in range(len(rows.lanes)):
        entries = slice(rows.offsets[lane], rows.offsets[lane + 1])
        total = x[rows.rows[entries]].sum(0, dtype=torch.float64)
        found.append(total.square().sum())
    return torch.stack(found) if found else x.new_zeros(0, dtype=torch.float64)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `x`, in float32 or wider: the products here are sums over thousands of terms."""
    return x[index].to(torch.promote_types(x.dtype, torch.float32))


def _by_gram(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`((a @ a.T) * (b @ b.T)).sum()`, the blocks below the diagonal for those above it."""
    total = a.new_zeros((), dtype=torch.float64)
    for start in range(0, len(a), _GRAM_ROWS):
        for other in range(0, start + 1, _GRAM_ROWS):
            i, j = slice(start, start + _GRAM_ROWS), slice(other, other + _GRAM_ROWS)
            block = product_nt(a[i], a[j]).mul_(product_nt(b[i], b[j])).sum(dtype=torch.float64)
            total += block if start == other else 2 * block
    # Where the terms cancel, what is left of them may be below 0.
    return total.clamp_(min=0.0)


def _by_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(a.T @ b).square().sum()`, some columns at a time."""
    total = a.new_zeros((), dtype=torch.float64)
    step = max(1, min(_TILE_ELEMENTS // max(1, a.shape[1]), b.shape[1] // 2))
    for start in range(0, b.shape[1], step):
        part = product_tn(a, b[:, start : start + step])
        total += part.square_().sum(dtype=torch.float64)
    return total
