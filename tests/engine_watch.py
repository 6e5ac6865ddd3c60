"""What a method hands to its engine, and what the engine did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from g2r_fast.engine import Engine
from g2r_fast.fallback import EngineRun
from g2r_fast.plan import PackedSequence


@dataclass
class Ran:
    """What went to the engine, and what it did."""

    sequences: list[PackedSequence]
    done: EngineRun


def watch(monkeypatch: pytest.MonkeyPatch, method: Any) -> list[Ran]:
    """One entry per run of an engine that `method`, a module, chooses from now on."""
    found: list[Ran] = []
    choose = method.choose_engine

    def choose_and_watch(*arguments: Any) -> Engine:
        engine: Engine = choose(*arguments)
        run = engine.run

        def watched(sequences: Any, *rest: Any, **options: Any) -> EngineRun:
            found.append(Ran(list(sequences), run(sequences, *rest, **options)))
            return found[-1].done

        engine.run = watched  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(method, "choose_engine", choose_and_watch)
    return found
