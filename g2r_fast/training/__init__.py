"""The reference training loop: `train(TrainConfig(...))`, and the command `g2r-fast train`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .loop import train

__all__ = ["TrainConfig", "train"]

_HOME = {"TrainConfig": "config", "train": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
