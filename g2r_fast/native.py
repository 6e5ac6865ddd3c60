"""The native parts of the package: what is built, what is used, and why not where it is not.

    _core      the planner: one module for each Python
    _cpu_ops   the packed engine's operations on a CPU, loaded by `g2r_fast.native_ops`
    _cuda_ops  its attention on an NVIDIA GPU, built where there is nvcc, loaded by
               `g2r_fast.cuda_ops`

Each comes from the package, where the install built it, or from the user's cache, where its first
use did (`G2R_BUILD=never` keeps it from doing so). Whatever their state, the same functions run in
Python, with equal results. ``print(g2r_fast.native.status())`` tells.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from .build_cache import build_in_cache, cached_path
from .building import CORE, CUDA_OPS, PARTS, Part, problem_of
from .errors import InputError, InputTypeError

__all__ = [
    "PACKAGE",
    "NativeStatus",
    "core",
    "is_looking_only",
    "load_part",
    "looking_only",
    "may_build",
    "sort_with_common_prefixes",
    "status",
]

_INTERFACE = 2  # as in csrc/core.cpp
PACKAGE = Path(__file__).resolve().parent
_looking_only = False

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class NativeStatus:
    """Whether a part can be used; ``reason`` says why not, None when it can."""

    part: str
    path: str | None
    reason: str | None
    cost: str

    @property
    def built(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        if self.built:
            return f"g2r_fast.{self.part}: compiled, {self.path}"
        return f"g2r_fast.{self.part}: not there, and {self.cost}: {self.reason}"


def status(part: str = CORE.name) -> NativeStatus:
    """What is built of ``"_core"``, ``"_cpu_ops"`` or ``"_cuda_ops"``, and why not where it is not.

    Builds nothing and, but for the planner, loads nothing.
    """
    if part == CORE.name:
        return _core_status
    (found,) = (candidate for candidate in (*PARTS, CUDA_OPS) if candidate.name == part)
    return load_part(found, lambda path: None, build=False)[1]


def may_build() -> bool:
    """Whether `G2R_BUILD` lets the first use compile what is missing."""
    wanted = os.environ.get("G2R_BUILD") or "auto"
    if wanted not in ("auto", "never"):
        raise InputError("G2R_BUILD has no such value", expected="auto | never", got=wanted)
    return wanted == "auto"


@contextmanager
def looking_only() -> Iterator[None]:
    """Nothing is compiled, and what is missing is tried again afterwards: for whoever only asks."""
    global _looking_only
    before, _looking_only = _looking_only, True
    try:
        yield
    finally:
        _looking_only = before


def is_looking_only() -> bool:
    return _looking_only


def load_part(
    part: Part, load: Callable[[Path], Loaded], build: bool
) -> tuple[Loaded | None, NativeStatus]:
    """``load(path)`` of the first library of this part that is sound and loads.

    Looks into the package, then into the cache; with ``build`` (and `G2R_BUILD`) every part that is
    missing is then compiled into the cache, at most once. Raises InputError where `G2R_BUILD` has
    no such value, also where nothing is missing.
    """
    allowed = not build or may_build()
    reasons: list[str] = []
    cached = cached_path(part, PACKAGE)
    candidates = (PACKAGE / part.file_name, cached)
    tried = [path for path in candidates if path is not None and path.is_file()]
    for path in tried:
        loaded = _try(part, path, load, reasons)
        if loaded is not None:
            return loaded[0], NativeStatus(part.name, str(path), None, part.cost)
    if not tried:
        # setup.py leaves this note when it tried and could not.
        note = PACKAGE / f"{part.name}_missing.txt"
        reasons.append(
            note.read_text(encoding="utf-8").strip() if note.is_file() else "it was never built"
        )
    build = build and not _looking_only
    if build and not allowed:
        reasons.append("G2R_BUILD=never")
    elif build and cached not in tried:
        missing = [other for other in PARTS if other == part or not status(other.name).built]
        failed = build_in_cache(missing, PACKAGE)
        if cached is None or part in failed:
            reasons.append(f"it cannot be compiled here ({failed[part]})")
        else:
            loaded = _try(part, cached, load, reasons)
            if loaded is not None:
                return loaded[0], NativeStatus(part.name, str(cached), None, part.cost)
    return None, NativeStatus(part.name, None, "; ".join(reasons), part.cost)


def _try(
    part: Part, path: Path, load: Callable[[Path], Loaded], reasons: list[str]
) -> tuple[Loaded] | None:
    problem = problem_of(part, path, PACKAGE)
    if problem is None:
        try:
            return (load(path),)
        except (ImportError, OSError, RuntimeError) as error:  # built against another C++ library
            problem = f"{path} does not load ({' '.join(str(error).split())})"
    reasons.append(problem)
    return None


def _load_core(path: Path) -> ModuleType:
    name = f"{__package__}.{CORE.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "INTERFACE", None)
    if found != _INTERFACE:
        raise ImportError(f"its interface is {found} where this version needs {_INTERFACE}")
    sys.modules[name] = module
    return module


_core, _core_status = load_part(CORE, _load_core, build=False)
_first_use = threading.Lock()


def core() -> ModuleType | None:
    """The compiled planner, None where there is none; the first call may build it."""
    global _core, _core_status, _asked
    if _core is None and not _asked:
        with _first_use:
            if not _asked:
                _core, _core_status = load_part(CORE, _load_core, build=True)
                _asked = not _looking_only
    return _core


# Whether there is nothing more to try.
_asked = _core is not None


def sort_with_common_prefixes(
    sequences: Sequence[Sequence[int]],
) -> tuple[list[int], list[int]]:
    """``order = sorted(range(N), key=sequences.__getitem__)``, and the prefixes neighbours share.

    Args:
        sequences: N sequences of token ids (any integers that fit int64), empty ones allowed.

    Returns:
        ``order`` (N indices; stable, so equal sequences keep their order) and ``common`` (N − 1
        lengths, 0 − 0 for no sequences): ``common[i]`` leading tokens are the same in
        ``sequences[order[i]]`` and ``sequences[order[i + 1]]``. A trie over the batch is these two
        lists read from left to right.

    Raises:
        InputTypeError: a sequence does not hold integers that fit int64.
    """
    tokens = array("q")
    offsets = array("q", [0])
    for index, sequence in enumerate(sequences):
        try:
            tokens.extend(array("q", sequence))
        except (TypeError, OverflowError) as error:
            raise InputTypeError(
                "a sequence of token ids cannot be read",
                expected="integers that fit int64",
                got=str(error),
                index=index,
            ) from error
        offsets.append(len(tokens))
    compiled = core()
    if compiled is None:
        return _python_common_prefix_lengths(tokens, offsets)
    order, common = compiled.common_prefix_lengths(tokens, offsets)
    return order, common


def _python_common_prefix_lengths(
    tokens: Sequence[int], offsets: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What g2r_fast._core.common_prefix_lengths returns for the same buffers."""
    flat = list(tokens)
    rows = [flat[start:stop] for start, stop in pairwise(offsets)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    common = []
    for before, after in pairwise(order):
        left, right = rows[before], rows[after]
        length = min(len(left), len(right))
        common.append(next((i for i in range(length) if left[i] != right[i]), length))
    return order, common
