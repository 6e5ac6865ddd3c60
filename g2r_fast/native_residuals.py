"""`ops.residual_sums` by the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["residual_sums"]


def residual_sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    lengths: Sequence[int],
    owners: Sequence[int],
    sums: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    logps, entropies = torch.empty(2, len(logits), dtype=torch.float32)
    rows = torch.tensor(owners, dtype=torch.int64).repeat_interleave(
        torch.tensor(lengths, dtype=torch.int64)
    )
    torch.ops.g2r_fast.residual_sums(
        logits.contiguous(), targets, weights, rows, temperature, sums, logps, entropies
    )
    return logps, entropies
