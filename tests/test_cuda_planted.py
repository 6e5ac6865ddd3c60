"""Bugs planted into the CUDA kernels: their tests on a CPU (test_cuda_emulated.py) notice each.

All of them are compiled into one library, which has one at a time.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

import emulated_cuda as cuda
import pytest
from emulated_cuda import DTYPES
from native_calls import COMPILER

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
]

FORWARD, QUERIES, KEYS = (
    f"attention_{name}.cuh" for name in ("forward", "backward_queries", "backward_keys")
)


class Bug(NamedTuple):
    name: str
    file: str
    right: str  # an expression that stands in the file once
    wrong: str


BUGS = (
    Bug("a query does not see itself", FORWARD, "at > from", "at >= from"),
    Bug("a query sees the next key", FORWARD, "at > from", "at > from + 1"),
    Bug("a window of one key more", FORWARD, "at <= hidden", "at < hidden"),
    Bug("a window of one key less", FORWARD, "at <= hidden", "at <= hidden + 1"),
    Bug(
        "no mask one key before the diagonal",
        FORWARD,
        "key + keys - 1 > position[0]",
        "key + keys - 2 > position[0]",
    ),
    Bug(
        "no mask one key behind the window",
        FORWARD,
        "key <= position[rows - 1] - call.window",
        "key < position[rows - 1] - call.window",
    ),
    Bug("sums keep their old scale", FORWARD, "total[m][half] * shrink[m][half]", "total[m][half]"),
    Bug("0.1 % in a sum", FORWARD, "1.0f / sum", "1.001f / sum"),
    Bug("log2 for log", FORWARD, "log(sum)", "log2(sum)"),
    Bug("dq: a query does not see itself", QUERIES, "at > from", "at >= from"),
    Bug("dq: a window of one key more", QUERIES, "at <= hidden", "at < hidden"),
    Bug(
        "dq: no mask one key before the diagonal",
        QUERIES,
        "key + keys - 1 > position[0]",
        "key + keys - 2 > position[0]",
    ),
    Bug(
        "dq: no mask one key behind the window",
        QUERIES,
        "key <= position[rows - 1] - call.window",
        "key < position[rows - 1] - call.window",
    ),
    Bug("dq: no row sums", QUERIES, "dp[m][n][c] - sum", "dp[m][n][c]"),
    Bug("dq: no slope of the cap", QUERIES, "1.0f - share * share", "1.0f"),
    Bug("dk: a query does not see itself", KEYS, "at > from", "at >= from"),
    Bug("dk: a window of one key more", KEYS, "at <= hidden", "at < hidden"),
    Bug(
        "dk: no mask on the last key",
        KEYS,
        "position[0] < seen[1]",
        "position[0] + 1 < seen[1]",
    ),
    Bug(
        "dk: no mask on the first key",
        KEYS,
        "position[rows - 1] - call.window >= seen[0]",
        "position[rows - 1] - call.window > seen[0]",
    ),
    Bug("dk: no row sums", KEYS, "ds[m][n][c] - delta", "ds[m][n][c]"),
    Bug(
        "dk: no slope of the cap", KEYS, "1.0f - ds[m][n][c] * ds[m][n][c]", "1.0f"
    ),
    Bug("dk: not the last row", KEYS, "row < stream", "row + 1 < stream"),
)  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.c_int]:
    """The number of the bug that the library has, counted from 1; 0: none."""
    folder = tmp_path_factory.mktemp("planted") / "cuda"
    shutil.copytree(cuda.ROOT / "csrc" / "cuda", folder)
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    by_text: dict[tuple[str, str], str] = {}
    for number, bug in enumerate(BUGS, 1):
        found = texts[bug.file].count(bug.right)
        assert found == 1, f"{bug.right!r} stands {found} times in {bug.file}: plant it elsewhere"
        here = by_text.get((bug.file, bug.right), f"({bug.right})")
        by_text[bug.file, bug.right] = f"(g2r_planted == {number} ? ({bug.wrong}) : {here})"
    for (file, right), changed in by_text.items():
        texts[file] = texts[file].replace(right, changed)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    switch = folder / "switch.h"
    switch.write_text('extern "C" { inline int g2r_planted = 0; }\n', encoding="utf-8")
    sources = [folder / path.name for path in cuda.SOURCES]
    library = cuda.build(folder / "k.so", "-O1", "-include", str(switch), sources=sources)
    with cuda.used(library):
        yield ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "g2r_planted")


def test_without_a_bug_nothing_is_wrong(planted: ctypes.c_int) -> None:
    planted.value = 0
    assert not any(cuda.biased(op, DTYPES[0]) for op in ("attention_forward", "attention_backward"))
    for case in cuda.select(integers=True)[::7]:
        assert not cuda.faults(case, DTYPES[0]), str(case)


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1), ids=[bug.name for bug in BUGS])
def test_every_planted_bug_is_noticed(number: int, planted: ctypes.c_int) -> None:
    op = "attention_forward" if BUGS[number - 1].file == FORWARD else "attention_backward"
    name = BUGS[number - 1].name
    word = next((w for w in ("window", "cap") if w in name), "")  # where it shows is tried first
    planted.value = number
    try:
        cases = sorted(cuda.select(op), key=lambda c: (word not in str(c), not c.integers))
        assert any(cuda.faults(case, DTYPES[0]) for case in cases) or cuda.biased(op, DTYPES[0])
    finally:
        planted.value = 0
