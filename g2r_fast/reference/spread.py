"""The one rule for means and spreads: population standard deviation, no epsilon."""

from __future__ import annotations

import math
from collections.abc import Sequence

from g2r_fast.errors import InputError

__all__ = ["ZERO_SPREAD", "mean_and_std", "standardise"]

# A spread at most this fraction of the largest magnitude is rounding noise, not signal.
ZERO_SPREAD = 1e-6


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """``x.mean(), x.std(correction=0)``, the std set to 0.0 where it is at most 1e-6 * max|x|.

    The sums are exactly rounded (``math.fsum``). Raises InputError for a value that is not finite.
    """
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise InputError(
                "a value is not finite", expected="finite numbers", got=value, index=index
            )
    if len(values) == 0:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    largest = max(abs(value) for value in values)
    return mean, std if std > ZERO_SPREAD * largest else 0.0


def standardise(values: Sequence[float], divide_by_std: bool = True) -> list[float]:
    """``(x - x.mean()) / x.std(correction=0)``; all zeros where there is no spread.

    Without ``divide_by_std`` the values are centred only.
    """
    mean, std = mean_and_std(values)
    if std == 0.0:
        return [0.0] * len(values)
    return [(value - mean) / std if divide_by_std else value - mean for value in values]
