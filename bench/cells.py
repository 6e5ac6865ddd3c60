"""Cells of the documents' tables: a number of a result as text, or that it was not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["NOT_RUN", "Cell", "required", "seconds", "share", "times_ours", "value"]

NOT_RUN = "not run"

Cell = Callable[[dict[str, Any]], str]


def value(path: str, form: Callable[[Any], str]) -> Cell:
    """What stands at a dotted path of a result, or that it was not run."""

    def cell(result: dict[str, Any]) -> str:
        found: Any = result
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return NOT_RUN if found is None else form(found)

    return cell


def times_ours(rival: str) -> Cell:
    return value(f"rivals.{rival}.times_ours", lambda ratio: f"{ratio:.2f}")


def share(rival: str) -> Cell:
    return value(f"rivals.{rival}.share_of_peak", lambda part: f"{part * 100:.0f} %")


def seconds(rival: str) -> Cell:
    return value(f"rivals.{rival}.median_seconds", lambda found: f"{found * 1e3:.0f} ms")


required: Cell = value("required_gflop.total", lambda total: f"{total:.0f}")
