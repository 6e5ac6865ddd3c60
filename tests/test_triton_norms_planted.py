"""Bugs planted into the text of the kernels that sum over entries; both rules notice each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import lanes as lanes_module
from g2r_fast.kernels import squared_gradient_norms as norms_module
from g2r_fast.kernels import squared_row_sums as sums_module
from g2r_fast.kernels.squared_gradient_norms import WAYS, squared_gradient_norms
from triton_norm_cases import (
    COUNTS,
    RULES,
    SMALL,
    STEP_COLUMNS,
    SUMMED,
    gradients_of,
    poison,
    row_sums_of,
)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


class Bug(NamedTuple):
    name: str
    right: str  # stands in the kernel's file
    wrong: str


BOTH = [
    Bug("the first lane's entries of inputs", "kept_ptr + start + ", "kept_ptr + "),
    Bug("the first lane's entries of gradients", "rows_ptr + start + ", "rows_ptr + "),
    Bug("rows of inputs for those of gradients", "tl.load(rows_ptr", "tl.load(kept_ptr"),
]
GRADIENT_BUGS = {
    "gram": [
        *BOTH,
        Bug("a pair counted once", "apart > 0, 2.0, 1.0", "apart > 0, 1.0, 1.0"),
        Bug("the diagonal counted twice", "apart > 0, 2.0, 1.0", "apart > 0, 2.0, 2.0"),
        Bug("0.1 %", "apart > 0, 2.0, 1.0", "apart > 0, 2.002, 1.001"),
        Bug("a pair dropped", "tiles + 1) // 2:", "tiles + 1) // 2 - 1:"),
        Bug("the diagonal only", "left_tile + apart)", "left_tile)"),
        Bug("not the last column", "columns < width)", "columns < width - 1)"),
        Bug("not the last step", "range(0, width, STEP)", "range(0, width - STEP, STEP)"),
        Bug("not the last entry", "right < count", "right < count - 1"),
        Bug("no mask of entries", "mask=right_real[:, None] & inside", "mask=inside"),
        Bug("inputs alone", "of_inputs * of_grads", "of_inputs * of_inputs"),
    ],
    "direct": [
        *BOTH,
        Bug("0.1 %", "total * total", "total * total * 1.001"),
        Bug("not the last input", "inward < D", "inward < D - 1"),
        Bug("not the last output", "outward < P", "outward < P - 1"),
        Bug("not the last entry", "entries < count", "entries < count - 1"),
        Bug("not the last step", "range(0, count, STEP)", "range(0, count - STEP, STEP)"),
        Bug("a tile twice", "index % tiles * TILE", "index % 1 * TILE"),
        Bug("not squared", "total * total", "total * 1.0"),
    ],
}
ROW_SUM_BUGS = [
    Bug("0.1 %", "sums * sums", "sums * sums * 1.001"),
    Bug("not the last column", "columns < W", "columns < W - 1"),
    Bug("not the last row", "entries < count", "entries < count - 1"),
    Bug("not the last step", "range(0, count, ROWS)", "range(0, count - ROWS, ROWS)"),
    Bug("the first lane's rows", "rows_ptr + start + ", "rows_ptr + "),
    Bug("squares before the sum", "total += widened", "total += widened(x, PRODUCTS) * widened"),
    Bug("a block of columns twice", "block * COLUMNS", "0 * COLUMNS"),
]
LANE_SUM_BUGS = [
    Bug("not the last part", "mask=at < parts", "mask=at < parts - 1"),
    Bug("another lane's parts", "row_ptr + 3)", "row_ptr + 3) // 2"),
    Bug("the order of the table", "out_ptr + lane", "out_ptr + tl.program_id(0)"),
]


def planted(module, bug, folder):
    """The module with the bug in its text."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert bug.right in text, f"{bug.right!r} is not there any more: plant it elsewhere"
    path = folder / f"planted_{Path(module.__file__).name}"
    path.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, found)  # dataclasses look it up
        spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("way", "bug"),
    [(way, bug) for way in WAYS for bug in GRADIENT_BUGS[way]],
    ids=lambda x: getattr(x, "name", x),
)
def test_every_rule_catches_every_bug_of_gradient_norms(rule, way, bug, tmp_path):
    wrong = planted(norms_module, bug, tmp_path).squared_gradient_norms
    assert not rule(gradients_of(wrong, way, SMALL), torch.float32, 37, 19, COUNTS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bug", ROW_SUM_BUGS, ids=lambda bug: bug.name)
def test_every_rule_catches_every_bug_of_row_sums(rule, bug, tmp_path):
    wrong = planted(sums_module, bug, tmp_path).squared_row_sums
    assert not rule(row_sums_of(wrong), torch.float32, 1, STEP_COLUMNS + 1, SUMMED)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bug", LANE_SUM_BUGS, ids=lambda bug: bug.name)
def test_every_rule_catches_every_bug_of_the_last_sum(rule, bug, tmp_path, monkeypatch):
    wrong = planted(lanes_module, bug, tmp_path)
    monkeypatch.setattr(norms_module, "add_partials", wrong.add_partials)
    # By both ways in one call, so that the table is not in the order of the lanes.
    judged = gradients_of(squared_gradient_norms, None, SMALL)
    assert not rule(judged, torch.float32, 19, 16, COUNTS)
