"""What the methods add to a step of the reference loop: answers compared, then the clock.

The command for the documents' figures is `python -m bench.training_cost`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.convergence import ROOT, SETTINGS
from bench.training_cost import Step, measure
from bench.training_tables import METHODS
from g2r_fast.training.config import config_of, read_yaml


def test_every_method_answers_as_its_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate and no clock, at the smallest size; with all it says of the answers."""
    monkeypatch.chdir(ROOT)
    small: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 16}
    found = measure(Step(config_of({**read_yaml(Path(SETTINGS)), **small})), None)
    for method in METHODS:
        errors = found[f"training-cost-{method}"]["max_relative_error"]
        assert errors and max(errors.values()) < 2e-4, method
