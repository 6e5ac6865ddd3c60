"""Options of the benchmarks, and the tables at the end of a run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench import allocator
from bench.facts import facts, save
from bench.grpo_step import lines
from bench.harness import Effort
from bench.signal_tables import signal_table
from bench.tables import table

_results = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("g2r_fast benchmarks")
    group.addoption("--quick", action="store_true", help="small shapes, equal answers, no timing")
    group.addoption("--save", metavar="NAME", help="write bench/results/NAME.json")
    group.addoption("--repetitions", type=int, default=Effort.repetitions)
    group.addoption("--slow-repetitions", type=int, default=Effort.slow_repetitions)
    group.addoption("--threads", type=int, default=os.cpu_count())
    group.addoption("--rivals", help="comma-separated; default: the scenario's own")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    if not config.getoption("--quick"):
        allocator.set_up()
    config.stash[_results] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        skip = pytest.mark.skip(reason="--quick: full-size measurement left out")
        for item in items:
            if item.get_closest_marker("full_size"):
                item.add_marker(skip)


class Results:
    """What the benchmarks of this run have found so far; saved after every addition."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._content = config.stash[_results]

    def find(self, section: str, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._content.get(section, {}).get(name)
        return found

    def add(self, section: str, name: str, result: dict[str, Any]) -> None:
        if not self._content:
            self._content["facts"] = facts()
        self._content.setdefault(section, {})[name] = result
        if target := self._config.getoption("--save"):
            save(target, self._content)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return Results(request.config)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    content = config.stash[_results]
    if not content:
        return
    terminalreporter.section("g2r_fast benchmarks")
    about = content["facts"]
    terminalreporter.write_line(
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, transformers "
        f"{about['transformers']}, torch.mm GFLOP/s {about['gemm_gflops']}, load {about['load']}, "
        f"native kernels: {about['native_kernels']}"
    )
    for name, result in content.get("scenarios", {}).items():
        terminalreporter.write_line("")
        terminalreporter.write_line(table(result, name))
    for name, result in content.get("signals", {}).items():
        terminalreporter.write_line("")
        terminalreporter.write_line(signal_table(result, name))
    if steps := content.get("grpo_steps"):
        terminalreporter.write_line("\n" + lines(steps))
    for name, result in content.get("activation_bytes", {}).items():
        terminalreporter.write_line(f"activation bytes, {name}: {result}")
    if target := config.getoption("--save"):
        terminalreporter.write_line(f"\nsaved {save(target, content)}")
