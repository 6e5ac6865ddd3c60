"""One function per op of the packed engine; this is the only place that knows devices.

Today every op runs in plain PyTorch operations (`eager/`).
"""

from __future__ import annotations

from .eager.attention import QueryBlock, attention_backward, attention_forward
from .eager.rows import (
    project,
    project_back,
    rms_norm,
    rms_norm_backward,
    rotary,
    rotary_backward,
    swiglu,
    swiglu_backward,
)

__all__ = [
    "QueryBlock",
    "attention_backward",
    "attention_forward",
    "project",
    "project_back",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_backward",
    "swiglu",
    "swiglu_backward",
]
