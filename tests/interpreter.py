"""Triton's interpreter without what it does for nothing: a kernel runs in half the time.

What is computed is the same to the bit, and so is what is noticed. For tests/conftest.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any


def quicken() -> None:
    """Imports triton, which decides by then whether it interprets."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Whether sums of integers fit is worked out, and asserted with `debug` alone.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)
    interpreter._patch_lang = _OnceALaunch(interpreter._patch_lang, tl, tl.core)
    for kind, name, quicker in (
        (tl.semantic.TritonSemantic, "broadcast_impl_value", _unless_alike),
        (tl.core.block_type, "__init__", _block_types_by_shape),
        (tl.tensor, "__init__", _tensors_by_shape),
    ):
        setattr(kind, name, quicker(getattr(kind, name)))


def _remembering(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function, which builds a dictionary of all dtypes at every call."""
    known: dict[str, Any] = {}

    @wraps(np_dtype)
    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return remembered


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which builds tuples of sizes for blocks of one shape too."""

    @wraps(broadcast)
    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and list(a.shape) == list(b.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return quick


def _block_types_by_shape(init: Callable[..., None]) -> Callable[..., None]:
    """The same constructor, which checks and wraps a shape's sizes every time."""
    known: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    @wraps(init)
    def quick(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if sizes in known and all(type(size) is int for size in sizes):
            self.shape, self.numel, text = known[sizes]
            self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"
            return
        init(self, element_ty, shape)
        if vars(self).keys() == {"element_ty", "shape", "numel", "name"}:
            known[sizes] = self.shape, self.numel, str(self.shape)

    return quick


def _tensors_by_shape(init: Callable[..., None]) -> Callable[..., None]:
    """The same constructor, which wraps the sizes of a type every time."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @wraps(init)
    def quick(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known[sizes]
            return
        init(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            known[sizes] = self.shape, self.numel

    return quick


class _OnceALaunch:
    """Puts the interpreter's own functions into the modules of the language that `function` sees.

    The interpreter takes them out when the launch ends, but looks through the modules again at
    every call of one function by another.
    """

    def __init__(self, patch: Callable[[Any], Any], *languages: Any) -> None:
        self.patch, self.languages = patch, {id(language) for language in languages}
        self.patched: set[int] = set()  # since the launch began

    def __call__(self, function: FunctionType) -> Any:
        seen = self.languages.intersection(map(id, function.__globals__.values()))
        if self.patched and seen <= self.patched:
            return None  # only a launch asks for more
        scope = self.patch(function)
        if not self.patched:
            scope.restore = self._ended(scope.restore)
        self.patched |= seen
        return scope

    def _ended(self, restore: Callable[[], None]) -> Callable[[], None]:
        def restored() -> None:
            self.patched.clear()
            restore()

        return restored
