"""The benchmarks' allocator: memory that was taken once is not taken again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import allocator

# Pages that are touched anew when 160 MB are taken for the second time.
ROUNDS = """
import resource, sys, torch
from bench import allocator
allocator.MOST = 2**29
allocator.set_up(sys.argv[1])

def round_of():
    kept = [torch.ones(2**20) for _ in range(25)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del kept
    large = torch.ones(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

round_of()
print(round_of())
print(allocator.in_use())
"""


def faults(name: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, name], capture_output=True, text=True, check=True
    )
    count, said = done.stdout.splitlines()
    return int(count), said


def test_kept_memory_is_not_taken_again() -> None:
    count, said = faults("kept")
    if not said.startswith("glibc"):
        pytest.skip(said)
    assert said == "glibc, freed memory kept, 0.5 GiB taken in large pages first"
    assert count < 100
    of_system, said = faults("system")
    assert said == "as the system has it"
    assert of_system > 10 * max(count, 1)


def test_a_container_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(allocator, "CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    of_machine = allocator._free_memory()
    assert of_machine > 2**28
    limit.write_text("max\n")
    assert allocator._free_memory() > 2**28
    limit.write_text("1048576\n")
    assert allocator._free_memory() == 2**20


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="allocator 'jemalloc' is none of kept, system"):
        allocator.set_up("jemalloc")
    assert allocator.in_use() == "as the system has it"


def test_a_preloaded_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so")
    monkeypatch.setattr(allocator, "_in_use", "")
    allocator.set_up()
    assert allocator.in_use() == "as the system has it: libjemalloc.so is preloaded"
