"""Squared norms of weight gradients per sequence on a GPU; what each op does: see ops.py."""

from __future__ import annotations

import torch

from g2r_fast.kernels import squared_gradient_norms as gradients
from g2r_fast.kernels import squared_row_sums as sums
from g2r_fast.kernels.launching import TRITON_DTYPES

from . import triton_scoring
from .signal import LinearRows

__all__ = ["serves", "squared_gradient_norms", "squared_row_sums"]


def serves(rows: torch.Tensor) -> bool:
    """Whether these kernels take such rows; on which devices: see `triton_scoring.serves`."""
    return rows.dtype in TRITON_DTYPES and triton_scoring.serves(rows.device)


def squared_gradient_norms(
    inputs: torch.Tensor, grads: torch.Tensor, rows: LinearRows
) -> torch.Tensor:
    with torch.cuda.device_of(inputs):  # Triton launches on the current device
        return gradients.squared_gradient_norms(inputs, grads, rows.kept, rows.rows, rows.offsets)


def squared_row_sums(x: torch.Tensor, rows: LinearRows) -> torch.Tensor:
    with torch.cuda.device_of(x):
        return sums.squared_row_sums(x, rows.rows, rows.offsets)
