"""How gradient-derived numbers are compared: relative norms, never absolute tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from g2r_fast.errors import InputError

__all__ = ["relative_error"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``(actual - expected).norm() / expected.norm()``, in float64.

    Gradients are small numbers: an absolute tolerance lets "all zeros" pass, and a comparison with
    an expected norm of zero lets everything pass. So this raises InputError instead of comparing
    when the shapes differ, when either side holds a value that is not finite, or when ``expected``
    is empty or all zeros. Compare one sequence at a time: over a batch, a large sequence hides an
    error in a small one.
    """
    if actual.shape != expected.shape:
        raise InputError(
            "cannot compare tensors of different shapes",
            expected=str(tuple(expected.shape)),
            got=tuple(actual.shape),
        )
    actual = actual.detach().to("cpu", torch.float64)
    expected = expected.detach().to("cpu", torch.float64)
    for name, values in (("actual", actual), ("expected", expected)):
        offenders = (~torch.isfinite(values)).nonzero()
        if len(offenders) > 0:
            raise InputError(
                f"{name} holds a value that is not finite", index=offenders[0].tolist()
            )
    largest = expected.abs().max() if expected.numel() > 0 else torch.zeros(())
    if not largest > 0:
        raise InputError(
            "nothing to compare with: the expected values have norm zero",
            expected="a tensor with at least one non-zero value",
            got=f"shape {tuple(expected.shape)}",
        )
    # Scaled first, so that the squares of tiny gradients do not underflow.
    error = torch.linalg.vector_norm((actual - expected) / largest)
    return float(error / torch.linalg.vector_norm(expected / largest))
