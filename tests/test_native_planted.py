"""Planted bugs: the rules that judge the native ops catch them, in every dtype.

The bugs are those of native_bugs.py. What is right passes every rule first.
"""

from __future__ import annotations

import pytest
import torch
from native_bugs import BUGS
from native_calls import DTYPES, Guarded
from native_cases import OPS, select, truth
from native_planting import CHOSEN, Bug, chosen, refused, right
from native_rules import judge


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_is_right_breaks_no_rule(op: str, dtype: torch.dtype) -> None:
    assert chosen(op, True) and len(chosen(op, False)) == len(CHOSEN[op])
    assert refused(op, dtype, right) == []


@pytest.mark.parametrize(
    ("bug", "op", "dtype"),
    [
        pytest.param(bug, op, dtype, id=f"{bug.name}-{op}-{dtype}".replace("torch.", ""))
        for bug in BUGS
        for op in bug.ops
        for dtype in bug.dtypes
    ],
)
def test_planted_bugs_are_caught(bug: Bug, op: str, dtype: torch.dtype) -> None:
    assert refused(op, dtype, bug.change)


def test_writing_beside_a_tensor_is_seen() -> None:
    for like in (torch.zeros(3, 5), torch.zeros(4).bfloat16(), torch.zeros(4, dtype=torch.int32)):
        for index in (0, -1, 36):
            guard = Guarded(like)
            assert guard.unharmed() and guard.unchanged()
            guard.memory[index] = 0
            assert not guard.unharmed()
        guard = Guarded(like)
        guard.tensor.view(-1)[0] = 1
        assert guard.unharmed() and not guard.unchanged()


def test_the_two_gelus_are_told_apart() -> None:
    """They differ by less than bfloat16 shows: in float32."""
    (case,) = (c for c in select("mlp_forward", False) if c.name == "activation2-wide")
    a, expected = case.arguments(torch.float32), truth(case, torch.float32)
    assert judge("mlp_forward", a, right("mlp_forward", a), expected) == {}
    assert judge("mlp_forward", a, right("mlp_forward", a | {"activation": 1}), expected)
