"""The compiled part of the package, and the same functions in Python where it is not built.

``print(g2r_fast.native.status())`` tells which of the two runs, and why.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from .errors import InputTypeError

__all__ = ["NativeStatus", "sort_with_common_prefixes", "status"]

_INTERFACE = 1  # as in csrc/core.cpp
_REBUILD = "pip install --no-build-isolation -e . (in a checkout) builds it"


@dataclass(frozen=True)
class NativeStatus:
    """Which implementation runs; ``reason`` says why not the compiled one, None when it does."""

    built: bool
    path: str | None
    reason: str | None

    def __str__(self) -> str:
        if self.built:
            return f"g2r_fast._core: compiled, {self.path}"
        return f"g2r_fast._core: in Python, slower, with equal results: {self.reason}"


def _load() -> tuple[ModuleType | None, NativeStatus]:
    try:
        core = importlib.import_module("g2r_fast._core")
    except ModuleNotFoundError:
        # setup.py leaves this note when it tried and could not.
        note = Path(__file__).with_name("_core_missing.txt")
        if note.exists():
            reason = note.read_text(encoding="utf-8").strip()
        else:
            reason = f"it was never built for this Python; {_REBUILD}"
        return None, NativeStatus(False, None, reason)
    except ImportError as error:  # built against another C++ library, say
        return None, NativeStatus(False, None, f"it is there but does not load ({error})")
    found = getattr(core, "INTERFACE", None)
    if found != _INTERFACE:
        reason = (
            f"{core.__file__} has interface {found} where this version needs {_INTERFACE}: it is "
            f"left over from another version; {_REBUILD}"
        )
        return None, NativeStatus(False, None, reason)
    return core, NativeStatus(True, core.__file__, None)


_core, _status = _load()


def status() -> NativeStatus:
    """What is built, and the reason where it is not."""
    return _status


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
    if _core is None:
        return _python_common_prefix_lengths(tokens, offsets)
    return _core.common_prefix_lengths(tokens, offsets)


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
