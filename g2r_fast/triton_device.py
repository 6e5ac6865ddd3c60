"""On which devices Triton's kernels run, and why not on the others."""

from __future__ import annotations

from functools import cache

import torch

from g2r_fast.kernels.launching import is_interpreted, triton_version

__all__ = ["problem_of"]

_LEAST = (8, 0)  # compute capability: bfloat16 products


def problem_of(device: torch.device, wanted: str) -> str | None:
    """Why the kernels do not run there, None where they do; `wanted` as `G2R_BACKEND` has it.

    On a CPU they do under Triton's interpreter, for tests, and only where they are asked for by
    name: a program takes milliseconds.
    """
    if device.type == "cpu" and wanted == "triton" and is_interpreted():
        return None
    if device.type != "cuda":
        return f"the device is {device}, not a GPU"
    if torch.version.hip is not None:
        return "the GPU is AMD's, for which nothing here was ever tried"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST:
        return f"the GPU's compute capability {capability[0]}.{capability[1]} is below 8.0"
    if triton_version() is None:
        return "triton is not installed: pip install 'g2r-fast[gpu]'"
    if is_interpreted() and wanted != "triton":
        return "TRITON_INTERPRET is set, and its kernels would run on the CPU"
    return _problem_of_launch(device)


@cache
def _problem_of_launch(device: torch.device) -> str | None:
    """Of one small kernel: Triton compiles its launcher on the machine, which may lack what that
    takes."""
    from g2r_fast.kernels.row_dot import row_dot

    try:
        with torch.cuda.device(device):
            row_dot(torch.ones(1, 16, device=device), readout="l1").item()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"its kernels do not run here ({type(error).__name__}: {lines[-1][:200]})"
    return None
