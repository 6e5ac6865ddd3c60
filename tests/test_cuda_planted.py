"""Bugs planted into the CUDA kernels: their tests on a CPU (test_cuda_emulated.py) notice each.

All of them are compiled into one library, which has one at a time.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import emulated_cuda as cuda
import pytest
from emulated_cuda import DTYPES
from native_calls import COMPILER

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
]

FORWARD, QUERIES, KEYS, SCORES = (
    f"attention_{name}.cuh" for name in ("forward", "backward_queries", "backward_keys", "scores")
)
TILE, GROUPS_FORWARD, GROUPS_QUERIES, GROUPS_KEYS = (
    f"warpgroup_{name}.cuh" for name in ("tile", "forward", "backward_queries", "backward_keys")
)
BOTH = ("attention_forward", "attention_backward")


class Bug(NamedTuple):
    name: str
    file: str
    right: str  # an expression that stands in the file once
    wrong: str
    ops: tuple[str, ...] = BOTH[1:]  # each of which notices

    @property
    def products(self) -> tuple[str, ...]:
        """With which it is there."""
        if self.file == SCORES:
            return ("mma", "wgmma")
        return ("wgmma",) if self.file.startswith("warpgroup") else ("mma",)


def masks_of_tiles(file: str, first: str, last: str) -> Iterator[Bug]:
    ops = BOTH[:1] if "forward" in file else BOTH[1:]
    yield Bug("no mask one key before the diagonal", file, f"key + keys - 1 > {first}",
              f"key + keys - 2 > {first}", ops)  # fmt: skip
    yield Bug("no mask one key behind the window", file, f"key <= {last} - call.window",
              f"key < {last} - call.window", ops)  # fmt: skip


def steps_of_queries(file: str) -> Iterator[Bug]:
    yield Bug("no mask on the last key", file, "position[0] < seen[1]", "position[0] + 1 < seen[1]")
    yield Bug("no mask on the first key", file, "position[rows - 1] - call.window >= seen[0]",
              "position[rows - 1] - call.window > seen[0]")  # fmt: skip
    yield Bug("not the last row", file, "row < stream", "row + 1 < stream")


BUGS = (
    Bug("a query does not see itself", SCORES, "at > from", "at >= from", BOTH),
    Bug("a query sees the next key", SCORES, "at > from", "at > from + 1", BOTH),
    Bug("a window of one key more", SCORES, "at <= hidden", "at < hidden", BOTH),
    Bug("a window of one key less", SCORES, "at <= hidden", "at <= hidden + 1", BOTH),
    Bug("sums keep their old scale", SCORES, "total_[m][half] * shrink[m][half]", "total_[m][half]",
        BOTH[:1]),
    Bug("0.1 % in a sum", SCORES, "1.0f / sum", "1.001f / sum", BOTH[:1]),
    Bug("log2 for log", SCORES, "log(sum)", "log2(sum)", BOTH[:1]),
    Bug("dq: no row sums", SCORES, "dp[m][n][c] - sum", "dp[m][n][c]"),
    Bug("dq: no slope of the cap", SCORES, "1.0f - share * share", "1.0f"),
    Bug("dk: a query does not see itself", SCORES, "down > from", "down >= from"),
    Bug("dk: a window of one key more", SCORES, "down <= hidden", "down < hidden"),
    Bug("dk: no row sums", SCORES, "dp[m][n][c] - centre", "dp[m][n][c]"),
    Bug("dk: no slope of the cap", SCORES, "1.0f - share[m][n][c] * share[m][n][c]", "1.0f"),
    *masks_of_tiles(FORWARD, "position[0]", "position[rows - 1]"),
    *masks_of_tiles(QUERIES, "position[0]", "position[rows - 1]"),
    *steps_of_queries(KEYS),
    *masks_of_tiles(GROUPS_FORWARD, "group_position[0]", "group_position[63]"),
    *masks_of_tiles(GROUPS_QUERIES, "group_position[0]", "group_position[63]"),
    *steps_of_queries(GROUPS_KEYS),
    Bug("scores are added to the last tile's", TILE, "k > 0", "true", BOTH),
    Bug("the same 16 columns again", TILE, "k % 4 * 32", "k % 2 * 32", BOTH),
    Bug("the next panel is this one", TILE, "k / 4 * panel_bytes<rows>", "0", BOTH),
    Bug("the same 16 rows again", TILE, "k * (16 * 128 >> 4)", "0", BOTH),
    Bug("the output is never shrunk", GROUPS_FORWARD, "any_of_warp(shrinks)", "false", BOTH[:1]),
    Bug("the other tile's k", GROUPS_FORWARD, "shared_k + (i + 1) % 2 * k_bytes",
        "shared_k + i % 2 * k_bytes", BOTH[:1]),
    Bug("a ring of two, dq", GROUPS_QUERIES, "stage + 1 == stages", "stage + 2 == stages"),
    Bug("a ring of two, dk", GROUPS_KEYS, "stage + 1 == stages", "stage + 2 == stages"),
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
    library = cuda.build(folder / "k.so", "-O2", "-include", str(switch), sources=sources)
    with cuda.used(library):
        yield ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "g2r_planted")


@pytest.mark.parametrize("products", ["mma", "wgmma"])
def test_without_a_bug_nothing_is_wrong(products: str, planted: ctypes.c_int) -> None:
    planted.value = 0
    assert not any(cuda.biased(op, DTYPES[0], products) for op in BOTH)
    for case in cuda.select(integers=True)[::7]:
        assert not cuda.faults(case, DTYPES[0], products), str(case)


def name_of(bug: Bug) -> str:
    return f"{bug.file.removesuffix('.cuh')}: {bug.name}"


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1), ids=[name_of(bug) for bug in BUGS])
def test_every_planted_bug_is_noticed(number: int, planted: ctypes.c_int) -> None:
    bug = BUGS[number - 1]
    word = next((w for w in ("window", "cap") if w in bug.name), "")  # where it shows, tried first
    planted.value = number
    try:
        for op, products in itertools.product(bug.ops, bug.products):
            cases = sorted(cuda.select(op), key=lambda c: (word not in str(c), not c.integers))
            tries = [partial(cuda.faults, case, DTYPES[0], products) for case in cases]
            # The smallest errors show only on average.
            tries.insert(
                0 if "%" in bug.name else len(tries), partial(cuda.biased, op, DTYPES[0], products)
            )
            assert any(found() for found in tries), (op, products)
    finally:
        planted.value = 0
