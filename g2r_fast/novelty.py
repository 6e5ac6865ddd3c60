"""Rewards that look at how new a response is among its group; arXiv 2512.15687, Eqs. 9 to 13.

Statistics of a group are float64, whatever the features' dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_group_size
from .errors import InputError, InputTypeError

__all__ = ["VARIANTS", "novelty", "shape_rewards", "similarity"]

VARIANTS = ("equation", "prose")

# A spread at most this fraction of the largest magnitude is rounding noise.
_NO_SPREAD = 1e-6


def similarity(features: Any) -> Tensor:
    """`F = features / features.norm(dim=-1, keepdim=True); S = F @ F.T`

    Cosines of all pairs (arXiv 2512.15687, Eq. 9), `[G, G]` in the features' dtype.

    features: `[G, H]` of one group, or a Features. A row of zeros, an empty completion's, has a
    similarity of 0 to every row, itself included. Raises InputError, naming the row, for features
    that are not finite; InputTypeError for what is no float matrix.
    """
    rows = _read_features(features)
    return _cosines(rows).to(rows.dtype)


def novelty(features: Any, rewards: Sequence[float] | Tensor, group_size: int) -> Tensor:
    """`nu_i = max(1 - (w[i] * S[i] ** 2).sum(), 0)`, `w[i] = softmax(rewards)` over all j != i

    arXiv 2512.15687, Eqs. 10 and 11, `[N]` in the features' dtype, within groups of `group_size`
    consecutive rows. S: see `similarity`. A group of one has nothing to be like: 1.

    features: `[N, H]`, or a Features; rewards: `[N]` finite numbers, of correct and of incorrect
    responses alike. Raises InputError, naming the row, for values that are not finite, lengths that
    differ, and N that groups do not divide.
    """
    rows, values = _read_group(features, rewards, group_size)
    return _novelty(rows, values, group_size).to(rows.dtype)


def shape_rewards(
    features: Any,
    rewards: Sequence[float] | Tensor,
    group_size: int,
    *,
    lam: float = 1.0,
    variant: str = "equation",
    clip: float = 3.0,
    graded: bool = False,
) -> Tensor:
    """`(rewards * (1 + lam * rewards * nu_bar)).clip(-clip, clip)`

    arXiv 2512.15687, Eqs. 12 and 13, `[N]` float32 on the features' device.

    Args:
        features: `[N, H]`, or a Features; consecutive `group_size` rows answer one prompt.
        rewards: `[N]`, each -1 or 1.
        lam: how much novelty counts, >= 0; the paper gives no value.
        variant: the equations make a wrong response's reward `-1 + lam * nu_bar`, so that novelty
            softens it; the paper's prose says that it is punished more: `"prose"`,
            `rewards * (1 + lam * nu_bar)`.
        clip: the bound, > 0.
        graded: whether rewards may be any finite numbers.

    `nu_bar` is `novelty`, min-max within the group: the paper asks for a bounded monotone map and
    names none. It is 0 where all are equal (a spread of at most 1e-6 of the largest), so in a group
    of one.

    Raises InputError: other rewards than -1 and 1 without `graded`, values that are not finite,
    lengths that differ, N that groups do not divide, an unknown variant, `lam` or `clip` out of
    range.
    """
    if variant not in VARIANTS:
        raise InputError(
            "unknown variant", expected=" | ".join(map(repr, VARIANTS)), got=repr(variant)
        )
    _check_number("lam", lam, "a finite number >= 0", lambda x: 0.0 <= x < math.inf)
    _check_number("clip", clip, "a number > 0", lambda x: x > 0.0)
    rows, values = _read_group(features, rewards, group_size)
    if not graded:
        _check_verdicts(values)
    nu_bar = _min_max(_novelty(rows, values, group_size).view(-1, group_size)).flatten()
    factor = lam * nu_bar if variant == "prose" else lam * values * nu_bar
    return (values * (1.0 + factor)).clamp(-clip, clip).float()


def _cosines(rows: Tensor) -> Tensor:
    """Of `[..., G, H]`, `[..., G, G]` float64."""
    rows = rows.double()
    # By the largest element first: the square of a small one would be 0.
    most = rows.abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.new_ones(())
    rows = rows / torch.where(most > 0, most, 1.0)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, 1.0)
    return (rows @ rows.mT).clamp(-1.0, 1.0)


def _novelty(rows: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    """`[N]` float64."""
    if group_size == 1:
        return rewards.new_ones(len(rewards))
    squares = _cosines(rows.view(-1, group_size, rows.shape[1])).square()
    itself = torch.eye(group_size, dtype=torch.bool, device=rows.device)
    others = rewards.view(-1, 1, group_size).masked_fill(itself, -math.inf)
    weighted = others.softmax(-1).mul(squares).sum(-1)
    return (1.0 - weighted).clamp_min(0.0).flatten()


def _min_max(values: Tensor) -> Tensor:
    """`(x - min) / (max - min)` of every row, 0 where there is no spread."""
    if not values.numel():
        return values
    least, most = torch.aminmax(values, dim=-1, keepdim=True)
    spread = most - least
    flat = spread <= _NO_SPREAD * values.abs().amax(-1, keepdim=True)
    return torch.where(flat, 0.0, (values - least) / torch.where(flat, 1.0, spread))


def _read_group(features: Any, rewards: Any, group_size: int) -> tuple[Tensor, Tensor]:
    """Features `[N, H]` and rewards `[N]` float64 on one device, checked."""
    rows = _read_features(features)
    try:
        values = torch.as_tensor(rewards).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputTypeError(
            "rewards cannot be read", expected="[N] numbers", got=repr(rewards)[:80]
        ) from None
    if values.is_complex():
        raise InputTypeError("rewards are complex", expected="[N] numbers", got=values.dtype)
    if values.shape != rows.shape[:1]:
        raise InputError(
            "rewards and features differ in length",
            expected=f"rewards of shape ({len(rows)},), one for each row of features",
            got=tuple(values.shape),
        )
    check_group_size(len(rows), group_size)
    values = values.to(rows.device, torch.float64)
    _check_finite("a reward", values)
    return rows, values


def _read_features(features: Any) -> Tensor:
    rows = getattr(features, "features", features)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise InputTypeError(
            "features cannot be read",
            expected="a float tensor [N, H], or Features",
            got=f"{rows.dtype} {tuple(rows.shape)}"
            if isinstance(rows, Tensor)
            else type(rows).__name__,
        )
    rows = rows.detach().contiguous()
    _check_finite("a feature", rows.sum(-1, dtype=torch.float64))
    return rows


def _check_finite(what: str, values: Tensor) -> None:
    bad = ~values.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"{what} is not finite",
            expected="finite numbers",
            got=float(values[row]),
            index=f"row {row}",
        )


def _check_verdicts(rewards: Tensor) -> None:
    bad = rewards.abs() != 1.0
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            "a reward is neither -1 nor 1",
            expected="-1 or 1",
            got=float(rewards[row]),
            index=f"row {row}",
            fix="Pass 2 * correct - 1, or graded=True.",
        )


def _check_number(name: str, value: Any, expected: str, holds: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not holds(value):
        raise InputError(f"{name} is out of range", expected=expected, got=repr(value))
