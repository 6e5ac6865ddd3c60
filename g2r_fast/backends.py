"""Which implementation runs the packed engine's operations, and why not another one.

    native      the C++ kernels of csrc/cpu: float32 and bfloat16 on a CPU
    triton      none of these operations yet
    reference   plain PyTorch operations (`eager/`): every dtype, every device

The first that can serve a run is taken; the environment variable `G2R_BACKEND` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import native, native_ops
from .errors import BackendError, InputError

__all__ = [
    "BACKENDS",
    "Backend",
    "Candidate",
    "Request",
    "check_not_forced",
    "choose",
    "describe",
    "native_is_there",
    "native_serves",
    "wanted_backend",
]

BACKENDS = ("native", "triton", "reference")
VARIABLE = "G2R_BACKEND"

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_NATIVE_STEP = 16  # elements; rows of anything that is multiplied come in whole vectors
_NATIVE_HEAD_DIM = 256
_NO_TRITON = "it has no kernel for these operations yet"


@dataclass(frozen=True)
class Request:
    """What a run asks of a backend."""

    device: torch.device
    dtype: torch.dtype  # of the weights
    hidden: int
    intermediate: int
    head_dim: int
    scattered: tuple[str, ...] = ()  # names of the weights that are not contiguous
    reads_linears: bool = False  # whether the signal reads linear layers on the way back


@dataclass(frozen=True)
class Candidate:
    """A backend and every reason why it cannot serve; none: it can."""

    backend: str
    reasons: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not self.reasons

    @property
    def reason(self) -> str | None:
        return "; ".join(self.reasons) or None


@dataclass(frozen=True)
class Backend:
    """The implementation that runs."""

    name: str
    kernels: str = ""  # of the native one: the instruction set in use
    refused: Mapping[str, str] = field(default_factory=dict)  # those before it, and why

    def __str__(self) -> str:
        return f"{self.name}: {self.kernels}" if self.kernels else self.name

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the gradients that enter and leave attention, for weights of `dtype`."""
        return dtype if self.name == "native" else torch.promote_types(dtype, torch.float32)


def describe(request: Request) -> list[Candidate]:
    """Every backend in order of preference, and why it cannot serve where it cannot.

    `G2R_CPU` with a name that is none is a reason here.
    """
    found = []
    for name in BACKENDS:
        try:
            found.append(_candidate(name, request))
        except InputError as error:
            found.append(Candidate(name, (str(error),)))
    return found


def choose(request: Request) -> Backend:
    """The backend that `G2R_BACKEND` names, or the first that can serve.

    Raises InputError where a variable has no such value, see `wanted_backend` and
    `native_ops.load`, and BackendError where the backend that is named cannot serve.
    """
    wanted = wanted_backend()
    refused: dict[str, str] = {}
    for name in BACKENDS if wanted == "auto" else (wanted,):
        candidate = _candidate(name, request)
        if candidate.usable:
            return Backend(name, _kernels() if name == "native" else "", refused)
        refused[name] = str(candidate.reason)
    raise BackendError(wanted, list(candidate.reasons))


def native_serves(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the native kernels take rows of `width` that no run has chosen a backend for."""
    return wanted_backend() in ("auto", "native") and not _native_reasons(
        Request(device, dtype, width, _NATIVE_STEP, _NATIVE_STEP)
    )


def native_is_there(device: torch.device) -> bool:
    """Whether native kernels that ask nothing of a model run here; nothing is compiled for them."""
    wanted = wanted_backend() in ("auto", "native")
    return wanted and device.type == "cpu" and native_ops.load(build=False) is None


def check_not_forced(reasons: Sequence[str]) -> None:
    """For a run that no backend has a part in: raises BackendError, with the reasons, if one must.

    Such a run is plain PyTorch, which is all that `G2R_BACKEND=reference` asks for.
    """
    wanted = wanted_backend()
    if wanted not in ("auto", "reference"):
        raise BackendError(wanted, [*([_NO_TRITON] if wanted == "triton" else []), *reasons])


def wanted_backend() -> str:
    """What `G2R_BACKEND` asks for, "auto" where nothing.

    Raises InputError where it, or `G2R_BUILD`, has no such value: also where nothing is to be
    built, as whoever sets it wants to know.
    """
    native.may_build()
    wanted = os.environ.get(VARIABLE, "") or "auto"
    if wanted not in ("auto", *BACKENDS):
        raise InputError(
            f"{VARIABLE} names no backend", expected=" | ".join(("auto", *BACKENDS)), got=wanted
        )
    return wanted


def _candidate(backend: str, request: Request) -> Candidate:
    if backend == "native":
        return Candidate(backend, tuple(_native_reasons(request)))
    if backend == "triton":
        return Candidate(backend, (_NO_TRITON,))
    return Candidate(backend, ())


def _native_reasons(request: Request) -> list[str]:
    reasons = []
    if request.device.type != "cpu":
        reasons.append(f"the device is {request.device}, not a CPU")
    if request.dtype not in _NATIVE_DTYPES:
        dtype = str(request.dtype).removeprefix("torch.")
        reasons.append(f"the dtype is {dtype}, not float32 or bfloat16")
    if request.head_dim % _NATIVE_STEP or request.head_dim > _NATIVE_HEAD_DIM:
        reasons.append(
            f"head_dim {request.head_dim} is not a multiple of {_NATIVE_STEP} up to "
            f"{_NATIVE_HEAD_DIM}"
        )
    for name, size in (("hidden", request.hidden), ("intermediate", request.intermediate)):
        if size % _NATIVE_STEP:
            reasons.append(f"{name} size {size} is not a multiple of {_NATIVE_STEP}")
    if request.scattered:
        first, others = request.scattered[0], len(request.scattered) - 1
        more = f" (and {others} more)" if others else ""
        reasons.append(f"the weight {first} is not contiguous in memory{more}")
    if request.reads_linears:
        reasons.append("the signal reads linear layers")
    if not reasons:  # the first question compiles what is missing: only where that is of use
        missing = native_ops.load()
        reasons.extend([] if missing is None else [missing])
    return reasons


def _kernels() -> str:
    return str(torch.ops.g2r_fast.cpu_kernels())
