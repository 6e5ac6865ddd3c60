"""Which implementation runs the packed engine's operations, and why not another one.

    native      on a CPU the C++ kernels of csrc/cpu: float32 and bfloat16; on an NVIDIA GPU the
                attention of csrc/cuda, bfloat16 and float16, and Triton for the rest
    triton      the kernels of kernels/, on a GPU: float32, bfloat16 and float16
    reference   plain PyTorch operations (`eager/`): every dtype, every device

The first that can serve a run is taken; the environment variable `G2R_BACKEND` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from g2r_fast.kernels.configs import WIDEST
from g2r_fast.kernels.launching import TRITON_DTYPES, is_interpreted, triton_version

from . import cuda_attention, native, native_ops, triton_device
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
_LARGEST_HEAD_DIM = 256
_WIDE_MLP = 4  # hidden sizes


@dataclass(frozen=True)
class Request:
    """What a run asks of a backend."""

    device: torch.device
    dtype: torch.dtype  # of the weights
    hidden: int
    intermediate: int
    head_dim: int
    scattered: tuple[str, ...] = ()  # names of the weights that are not contiguous


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
    kernels: str = ""  # which of its kernels are in use
    refused: Mapping[str, str] = field(default_factory=dict)  # those before it, and why
    on_gpu: bool = False  # or under Triton's interpreter, as on one
    forms_attended: bool = False  # once more in the backward of attention, where it is not given

    def __str__(self) -> str:
        return f"{self.name}: {self.kernels}" if self.kernels else self.name

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the gradients that enter and leave attention, for weights of `dtype`."""
        return torch.promote_types(dtype, torch.float32) if self.name == "reference" else dtype

    def attended_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what attention gives, for weights of `dtype`: on a CPU its backward reads it, and
        sums that cancel would feel its rounding."""
        on_cpu = self.name == "native" and not self.on_gpu
        return torch.promote_types(dtype, torch.float32) if on_cpu else dtype

    @property
    def keeps_attended(self) -> bool:
        """Whether the backward of attention wants what its forward gave."""
        return self.name != "reference" and not self.forms_attended


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
            on_gpu = name == "triton" or (name == "native" and request.device.type == "cuda")
            kernels = "" if name == "reference" else _kernels(name, on_gpu)
            forms = name == "native" and not on_gpu and _forms_attended(request)
            return Backend(name, kernels, refused, on_gpu, forms)
        refused[name] = str(candidate.reason)
    raise BackendError(wanted, list(candidate.reasons))


def _forms_attended(request: Request) -> bool:
    """Where the MLP is most of a layer, attention is little of the time, and keeping its output
    would not be worth the memory."""
    wide = request.intermediate > _WIDE_MLP * request.hidden
    return wide and request.dtype == torch.float32


def native_serves(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the CPU kernels take rows of `width` that no run has chosen a backend for."""
    return wanted_backend() in ("auto", "native") and not _cpu_reasons(
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
        raise BackendError(wanted, list(reasons))


def wanted_backend() -> str:
    """What `G2R_BACKEND` asks for, "auto" where nothing.

    Raises InputError where it, `G2R_BUILD` or `G2R_PRODUCTS` has no such value: also where nothing
    is to be built or multiplied, as whoever sets it wants to know.
    """
    native.may_build()
    cuda_attention.wanted_products()
    wanted = os.environ.get(VARIABLE, "") or "auto"
    if wanted not in ("auto", *BACKENDS):
        raise InputError(
            f"{VARIABLE} names no backend", expected=" | ".join(("auto", *BACKENDS)), got=wanted
        )
    return wanted


def _candidate(backend: str, request: Request) -> Candidate:
    if backend == "native" and request.device.type == "cuda":
        return Candidate(backend, tuple(_cuda_reasons(request)))
    if backend == "native":
        return Candidate(backend, tuple(_cpu_reasons(request)))
    if backend == "triton":
        return Candidate(backend, tuple(_triton_reasons(request)))
    return Candidate(backend, ())


def _triton_reasons(request: Request) -> list[str]:
    reasons = []
    if request.dtype not in TRITON_DTYPES:
        dtype = str(request.dtype).removeprefix("torch.")
        reasons.append(f"the dtype is {dtype}, not float32, bfloat16 or float16")
    # Exact products of two float32 tiles keep their operands in registers: there is an end to that.
    largest = _LARGEST_HEAD_DIM // 2 if request.dtype == torch.float32 else _LARGEST_HEAD_DIM
    if request.head_dim % 2 or request.head_dim > largest:
        reasons.append(f"head_dim {request.head_dim} is not even and at most {largest}")
    if request.hidden > WIDEST:
        reasons.append(f"hidden size {request.hidden} is above {WIDEST}")
    problem = triton_device.problem_of(request.device, wanted_backend())
    return reasons if problem is None else [problem, *reasons]


def _cuda_reasons(request: Request) -> list[str]:
    """Of attention in CUDA C++ with everything else on Triton."""
    reasons = _triton_reasons(request)
    if not reasons and wanted_backend() == "auto" and _favours_triton(request.device):
        reasons.append("on compute capability 9.0 Triton's attention is the faster one")
    if not reasons:  # the first question compiles what is missing: only where that is of use
        refused = cuda_attention.serves(request.dtype, request.head_dim, request.device)
        reasons.extend([] if refused is None else [refused])
    return reasons


def _favours_triton(device: torch.device) -> bool:
    """Its products are wgmma there, ours mma.sync: bench/results/gpu.json has both. Our own wgmma
    (`G2R_PRODUCTS`) was never run."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _cpu_reasons(request: Request) -> list[str]:
    reasons = []
    if request.device.type != "cpu":
        reasons.append(f"the device is {request.device}, neither a CPU nor an NVIDIA GPU")
    if request.dtype not in _NATIVE_DTYPES:
        dtype = str(request.dtype).removeprefix("torch.")
        reasons.append(f"the dtype is {dtype}, not float32 or bfloat16")
    if request.head_dim % _NATIVE_STEP or request.head_dim > _LARGEST_HEAD_DIM:
        reasons.append(
            f"head_dim {request.head_dim} is not a multiple of {_NATIVE_STEP} up to "
            f"{_LARGEST_HEAD_DIM}"
        )
    for name, size in (("hidden", request.hidden), ("intermediate", request.intermediate)):
        if size % _NATIVE_STEP:
            reasons.append(f"{name} size {size} is not a multiple of {_NATIVE_STEP}")
    if request.scattered:
        first, others = request.scattered[0], len(request.scattered) - 1
        more = f" (and {others} more)" if others else ""
        reasons.append(f"the weight {first} is not contiguous in memory{more}")
    if not reasons:  # the first question compiles what is missing: only where that is of use
        missing = native_ops.load()
        reasons.extend([] if missing is None else [missing])
    return reasons


def _kernels(backend: str, on_gpu: bool) -> str:
    if not on_gpu:
        return str(torch.ops.g2r_fast.cpu_kernels())
    triton = f"triton {triton_version()}{' interpreted' if is_interpreted() else ''}"
    if backend == "triton":
        return triton
    return f"CUDA attention by {cuda_attention.wanted_products()}, {triton}"
