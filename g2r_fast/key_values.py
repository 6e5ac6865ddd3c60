"""A stock model's key-value cache, under the name that this version of transformers has for it."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["cache_argument", "cache_of", "cached"]

_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on; before it


def cache_argument(model: Any) -> str | None:
    """What a model's forward calls its cache; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in parameters), None)


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model."""
    name = cache_argument(model)
    return {} if name is None else {name: cache}


def cache_of(output: Any) -> Any:
    """The cache that a forward gave back; None where it gave none."""
    for name in _NAMES:
        found = getattr(output, name, None)
        if found is not None:
            return found
    return None
