"""torch.ops.g2r_fast: loads the library of CPU kernels once, and tells torch what the ops do.

Every op writes into tensors it is given and returns nothing; the C++ side checks every argument.
The functions here are what torch calls instead while it traces, where there is nothing to compute:
an op that returns nothing has nothing to say but that its arguments belong together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from . import native
from .building import CPU_OPS
from .errors import InputError

__all__ = ["OPS", "load"]

# Sizes that are equal, of two tensors each: (name, dimension, name, dimension).
_EQUAL: dict[str, tuple[tuple[str, int, str, int], ...]] = {
    "qkv_forward": (("input_norm", 0, "x", 1), ("x", 0, "keep", 0), ("x", 0, "cos", 0)),
    "mlp_forward": (("x", 0, "attended", 0), ("x", 0, "keep", 0), ("w_gate", 0, "w_up", 0)),
    "mlp_backward": (("dx", 0, "saved", 0), ("dx", 0, "grad_attended", 0)),
    "qkv_backward": (("dx", 0, "saved", 0), ("input_norm", 0, "dx", 1)),
    "attention_forward": (("k", 0, "v", 0), ("q", 0, "positions", 0), ("q", 0, "out", 0)),
    "attention_backward": (
        ("k", 0, "v", 0),
        ("q", 0, "positions", 0),
        ("q", 0, "out", 0),
        ("grad_out", 0, "dq", 0),
    ),
    "linear": (("weight", 1, "x", 1), ("x", 0, "out", 0), ("weight", 0, "out", 1)),
    "linear_backward": (("weight", 0, "grad", 1), ("grad", 0, "out", 0), ("weight", 1, "out", 1)),
    "embedding_scores": (("values", 0, "grads", 0), ("values", 1, "grads", 2)),
    "attribution_rewards": (("scores", 0, "alpha", 0), ("weights", 0, "starts", 0)),
    "squared_gradient_norms": (("kept", 0, "rows", 0),),
    "squared_row_sums": (),
    "residual_sums": (("logits", 0, "targets", 0), ("logits", 1, "sums", 1)),
}
OPS = tuple(_EQUAL)

_first_use = threading.Lock()
_loaded = False
_reason: str | None = None


def load(build: bool = True) -> str | None:
    """Make the ops available, once; the reason why they are not, None when they are.

    The first call compiles the library where it is missing, unless `build` is False, see
    `g2r_fast.native`.

    Raises InputError where `G2R_CPU` names kernels that this processor cannot run, or `G2R_BUILD`
    nothing it knows.
    """
    global _loaded, _reason
    if not _loaded:
        with _first_use:
            if not _loaded:
                _reason = _load(build)
                tried = build and not native.is_looking_only()
                _loaded = _reason is None or tried
    return _reason


def _load(build: bool) -> str | None:
    if not hasattr(torch.ops.g2r_fast, "cpu_kernels"):
        # Else this module was imported a second time: a library registers its ops only once.
        _, status = native.load_part(CPU_OPS, torch.ops.load_library, build=build)
        if status.reason is not None:
            return status.reason
        for name in OPS:
            torch.library.register_fake(f"g2r_fast::{name}", _fake(name))
    try:
        torch.ops.g2r_fast.cpu_kernels()
    except RuntimeError as error:  # G2R_CPU; whoever sets it wants to know
        raise InputError(str(error)) from None
    return None


def _fake(op: str) -> Callable[..., None]:
    schema = getattr(torch.ops.g2r_fast, op).default._schema
    names = [argument.name for argument in schema.arguments]

    def check(*values: Any) -> None:
        arguments = dict(zip(names, values, strict=True))
        for left, left_dim, right, right_dim in _EQUAL[op]:
            if arguments[right] is None:
                continue
            expected, got = arguments[left].shape[left_dim], arguments[right].shape[right_dim]
            if expected != got:
                raise RuntimeError(
                    f"g2r_fast::{op}: size {right_dim} of {right} is not size {left_dim} of "
                    f"{left}; expected {expected}; got {got}"
                )

    return check
