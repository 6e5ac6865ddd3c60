"""What every launcher here needs: checks that do not wait for the device, and cases to compile."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from g2r_fast.errors import InputError, InputTypeError

__all__ = [
    "TRITON_DTYPES",
    "CompileCase",
    "check_device",
    "check_rows",
    "check_vector",
    "is_interpreted",
    "require_triton",
    "triton_version",
]

TRITON_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of one kernel as it is shipped, for tests/compile_only.py."""

    name: str
    kernel: Any  # triton.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]  # num_warps and the like, as at launch
    aligned: bool  # pointers and sizes are multiples of 16, as Triton finds them at most launches
    arch: int | None = None  # the one compute capability that it is for, 90 for 9.0; None: any
    not_on: frozenset[int] = frozenset()  # those where another case is launched in its place

    def is_launched_on(self, arch: int) -> bool:
        return self.arch in (None, arch) and arch not in self.not_on


@cache
def triton_version() -> str | None:
    """None where it is not installed; nightly builds of torch bring it under another name."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on the CPU."""
    if triton_version() is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def require_triton(triton: Any, op: str) -> None:
    """Raises ImportError with the way out where triton could not be imported."""
    if triton is None:
        raise ImportError(
            f"g2r_fast.kernels.{op} needs triton, which is not installed. "
            "Install it with pip install 'g2r-fast[gpu]'; everything else works without it."
        )


def check_rows(name: str, rows: torch.Tensor, like: torch.Tensor) -> None:
    """A float matrix with contiguous columns on the device of ``like``."""
    if rows.dtype not in TRITON_DTYPES:
        raise InputTypeError(
            f"{name} has an unusable dtype",
            expected="float32, float16 or bfloat16",
            got=rows.dtype,
        )
    if rows.dim() != 2:
        raise InputError(f"{name} must be a matrix", expected="2 dimensions", got=rows.dim())
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise InputError(
            f"{name} must have contiguous columns",
            expected="stride 1",
            got=f"stride {rows.stride(1)}",
            fix="Call .contiguous().",
        )
    check_device(name, rows, like)


def check_vector(
    name: str, vector: torch.Tensor, dtypes: tuple[torch.dtype, ...], like: torch.Tensor
) -> None:
    """A contiguous vector with one entry per row of ``like``, on its device."""
    if vector.dtype not in dtypes:
        raise InputTypeError(
            f"{name} has an unusable dtype",
            expected=" or ".join(str(dtype) for dtype in dtypes),
            got=vector.dtype,
        )
    if vector.shape != like.shape[:1] or not vector.is_contiguous():
        raise InputError(
            f"{name} must be contiguous and have one entry per row",
            expected=f"shape ({like.shape[0]},)",
            got=f"shape {tuple(vector.shape)}, stride {vector.stride()}",
        )
    check_device(name, vector, like)


def check_device(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """On the device of ``like``, where kernels run."""
    import triton

    if tensor.device != like.device:
        raise InputError(
            f"{name} is on another device", expected=str(like.device), got=tensor.device
        )
    if tensor.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise InputError(
            f"{name} is not on a GPU",
            expected="a CUDA tensor (or TRITON_INTERPRET=1, for tests)",
            got=tensor.device,
        )
