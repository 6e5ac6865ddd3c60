"""Equal answers first: no rival is timed before it has given the loop's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.rivals import Answer

__all__ = ["GateError", "gate", "gate_tensors", "tensor_error"]

Tensors = Sequence[Tensor | None]

# Relative norm of a rival's b against the loop's, per (sequence, item), float32. The rivals
# measured so far differ by up to 4e-6.
FLOAT32_LIMIT = 2e-5
# Lower precision: a rival's error against the float32 loop, over the same-dtype loop's error.
LOW_PRECISION_FACTOR = 2.0


class GateError(AssertionError):
    """A rival's answers differ; it must not be timed."""


def relative_errors(reference: Answer, got: Answer) -> list[float]:
    """Relative norm per True judgement. Raises GateError where the answers are not comparable."""
    if reference[1].shape != got[1].shape:
        raise GateError(f"{len(got[1])} judgements answered, expected {len(reference[1])}")
    return _errors(reference[0], got[0], "judgement")


def _errors(reference: Tensors, got: Tensors, what: str) -> list[float]:
    if len(reference) != len(got):
        raise GateError(f"{len(got)} {what}s answered, expected {len(reference)}")
    errors = []
    for index, (want, have) in enumerate(zip(reference, got, strict=True)):
        if (want is None) != (have is None):
            raise GateError(f"{what} {index}: attributed by one side only")
        if want is None or have is None:
            continue
        if want.shape != have.shape:
            shapes = f"{tuple(have.shape)}, not {tuple(want.shape)}"
            raise GateError(f"{what} {index}: shape {shapes}")
        if not torch.isfinite(have).all() or want.norm() == 0:
            raise GateError(f"{what} {index}: not finite, or the reference is zero")
        errors.append(float((have.double() - want.double()).norm() / want.double().norm()))
    return errors


def logp_error(reference: Answer, got: Answer) -> float:
    """Largest relative difference of a verdict's log-probability; False items count too."""
    want, have = reference[1].double(), got[1].double()
    return float(((have - want).abs() / want.abs()).max())


def gate(reference: Answer, got: Answer, same_dtype_loop: Answer | None = None) -> dict[str, float]:
    """Check `got` against the loop, or raise GateError.

    float32: `reference` is the loop. Lower precision: `reference` is the loop in float32 on the
    same rounded weights and `same_dtype_loop` the loop in the model's dtype.
    """
    errors = relative_errors(reference, got)
    logp = logp_error(reference, got)
    if same_dtype_loop is None:
        limits = [FLOAT32_LIMIT] * len(errors)
        logp_limit = FLOAT32_LIMIT
    else:
        limits = [LOW_PRECISION_FACTOR * e for e in relative_errors(reference, same_dtype_loop)]
        logp_limit = LOW_PRECISION_FACTOR * logp_error(reference, same_dtype_loop)
    _hold(errors, limits, "True judgement")
    if not logp <= logp_limit:
        raise GateError(f"verdict log-probabilities: relative error {logp:.2e} > {logp_limit:.2e}")
    return {"max_relative_error": max(errors, default=0.0), "max_logp_error": logp}


def gate_tensors(
    reference: Tensors, got: Tensors, same_dtype_loop: Tensors | None = None
) -> dict[str, float]:
    """The same rule for answers that are one tensor per completion, or per group."""
    errors = _errors(reference, got, "answer")
    limits = [FLOAT32_LIMIT] * len(errors)
    if same_dtype_loop is not None:
        loops = _errors(reference, same_dtype_loop, "answer of the loop")
        limits = [LOW_PRECISION_FACTOR * error for error in loops]
    _hold(errors, limits, "answer")
    return {"max_relative_error": max(errors, default=0.0)}


def tensor_error(reference: Tensors, got: Tensors) -> float:
    """The largest relative error of answers that are one tensor per completion, or per group."""
    return max(_errors(reference, got, "answer"), default=0.0)


def _hold(errors: list[float], limits: list[float], what: str) -> None:
    for index, (error, limit) in enumerate(zip(errors, limits, strict=True)):
        if not error <= limit:
            raise GateError(f"{what} {index}: relative error {error:.2e} > {limit:.2e}")
