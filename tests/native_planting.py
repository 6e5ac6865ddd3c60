"""How a bug is planted into what judges the native ops, and which rules then refuse it.

What the oracle says is rounded to the dtypes of the op's outputs, so that a bug is caught whether
the native ops are built or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from native_arguments import Draw
from native_calls import DTYPES, IN_PLACE, output_shapes
from native_cases import IN_FLOAT64, OPS, SHOWN, Case, many_rows, select, truth, yardstick
from native_oracles import EXACT, ORACLES, Arguments, Outputs
from native_rules import equal_bits, judge, unbiased
from native_tries import given_lse_backward

Implementation = Callable[[str, Arguments, bool], Outputs]

# Small ones of every kind of situation: the rules are the same for the others.
CHOSEN = {
    "qkv_forward": ["biases-norms", "large-eps", "rope-scaled"],
    "mlp_forward": ["biases", "large-eps", "biases-shown"],
    "mlp_backward": ["d32-group2", "d32-group2-shown"],
    "qkv_backward": ["qk-norm-d32-group2", "rope-scaled", "qk-norm-d32-group2-shown"],
    "attention_forward": ["group", "group-window3", "softcap"],
    "attention_backward": ["group", "group-window3", "softcap"],
    "linear": ["13x208x97-bias"],
    "linear_backward": ["13x97x208"],
    "embedding_scores": ["dot-5x3x48", "l1-5x3x48", "l2-5x3x48"],
    "attribution_rewards": [
        "ragged",
        "ragged-sharp",
        "ragged-standardised",
        "ragged-standardised-sharp",
        "spread-below",
        "spread-above",
    ],
    "residual_sums": ["ragged", "ragged-2065", "plain"],
    "squared_gradient_norms": ["65x97-shuffled", "48x80-interleaved", "one"],
    "squared_row_sums": ["row-sums-80-shuffled", "row-sums-48-in-order"],
}
INTEGERS = {
    "qkv_forward": ["d32-group2", "biases", "rope-scaled"],
    "attention_forward": ["group", "group-window4"],
    "attention_backward": ["group", "group-window4"],
    "attribution_rewards": ["ragged", "ragged-standardised"],
    "residual_sums": ["ragged", "again"],
}


def chosen(op: str, integers: bool) -> list[Case]:
    names = INTEGERS.get(op, CHOSEN[op]) if integers else CHOSEN[op]
    return [case for case in select(op, integers) if case.name in names]


def exactly(op: str, a: Arguments, integers: bool) -> Outputs:
    ones = op == "attention_backward" and integers
    return given_lse_backward(a) if ones else ORACLES[op](a, EXACT)


def right(op: str, a: Arguments, integers: bool = False) -> Outputs:
    """The truth, rounded once to what the op writes."""
    return rounded(op, a, exactly(op, a, integers))


def rounded(op: str, a: Arguments, exact: Outputs) -> Outputs:
    shapes = output_shapes(op, a)
    wide = dict.fromkeys(IN_PLACE.get(op, []), torch.float32)
    return {n: x.to(wide.get(n) or shapes[n][1]) for n, x in exact.items()}


def refused(op: str, dtype: torch.dtype, implementation: Implementation) -> list[str]:
    """The rules that an implementation breaks."""
    broken = set()
    for case in chosen(op, integers=True):
        got, expected = implementation(op, case.arguments(dtype), True), truth(case, dtype)
        if any(equal_bits(got[n], expected[n]) for n in expected):
            broken.add("integers")
    for case in chosen(op, integers=False):
        a = case.arguments(dtype)
        got = implementation(op, a, False)
        if judge(op, a, got, truth(case, dtype), yardstick(case, dtype)):
            broken.add("random")
    if op in IN_FLOAT64:
        return sorted(broken)
    a = many_rows(op, Draw(dtype, 5), op in SHOWN)
    got, expected = implementation(op, a, False), ORACLES[op](a, EXACT)
    if any(unbiased(got[n], expected[n]) for n in expected):
        broken.add("mean")
    return sorted(broken)


@dataclass(frozen=True)
class Bug:
    name: str
    change: Callable[[str, Arguments, bool], Outputs]
    ops: tuple[str, ...] = OPS
    dtypes: tuple[torch.dtype, ...] = DTYPES
