"""From logits to what goes back: cotangents that keep their digits; odd logits are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import InputError
from .plan import Read

__all__ = ["check_finite", "objective_cotangents"]


def objective_cotangents(
    logits: Tensor, target: Tensor, other: Tensor | None, objective: str
) -> tuple[Tensor, Tensor]:
    """`d objective / d logits` as unit-scale rows and their scale: `(values [n, V], scale [n])`.

    The gradient is `scale[:, None] * values`. For `"logp"`, `values` is `onehot(z) - q` with q the
    distribution over the other words and `scale` is `sum of p_v over v != z`, never `1 - p_z`,
    which keeps no digits for a sure judge; for `"logp_two_way"` and `"logodds"` it is
    `onehot(z) - onehot(other)` with scale `p_other` and 1. arXiv 2602.01791, Eq. 2.

    logits: `[n, V]` float32 or wider; target, other: `[n]` int64.
    """
    rows = torch.arange(len(logits), device=logits.device)
    if objective == "logp":
        others = logits.index_put((rows, target), logits.new_tensor(-torch.inf))
        against = others.logsumexp(-1)
        values = others.sub_(against[:, None]).exp_().neg_()
        values[rows, target] = 1.0
        return values, torch.sigmoid(against - logits[rows, target])
    if other is None:
        raise InputError(f"objective {objective!r} needs the other verdict word")
    values = torch.zeros_like(logits)
    values[rows, target] = 1.0
    values[rows, other] -= 1.0
    if objective == "logodds":
        return values, torch.ones_like(logits[:, 0])
    return values, torch.sigmoid(logits[rows, other] - logits[rows, target])


def check_finite(
    logits: Tensor,
    reads: Sequence[Read],
    labels: Sequence[str] | Mapping[int, str] | None = None,
) -> None:
    """Raise InputError where a model's logits hold NaN or infinity."""
    if not len(logits):
        return
    ends = torch.stack(logits.aminmax())  # NaN where there is any; and no copy is made
    if not bool(ends.isfinite().all()):
        finite = torch.isfinite(logits).all(-1)
        # Reads come in the trie's order: the first offender is the caller's.
        first = min(reads[int(i)].sequence for i in (~finite).nonzero())
        raise InputError(
            "the model's logits are not finite",
            expected="finite logits",
            index=f"sequence {first}" if labels is None else labels[first],
            fix="Check the model's weights; float16 models may need bfloat16 or float32.",
        )
