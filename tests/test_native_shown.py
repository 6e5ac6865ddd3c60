"""What a reader of linear layers asks of the native stages does not change what they do.

With it the weights of norms are not folded into a product, so that gradients may differ in their
last bits from those without; everything else is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native_arguments import Draw
from native_calls import DTYPES, TABLES, kernels, native, run, usable
from native_cases import SHOWN, Case, many_rows, select, truth, yardstick
from native_oracles import Arguments
from native_rules import equal_bits, near, within_bound
from torch import Tensor

__all__ = ["native"]


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = usable(request.param)
    if reason:
        pytest.skip(reason)
    with kernels(request.param):
        yield request.param


def cases(op: str, integers: bool) -> list[Case]:
    return [case for case in select(op, integers) if case.name.endswith("-shown")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forward_that_keeps_more_changes_no_bit(dtype: torch.dtype, table: str) -> None:
    for case in cases("mlp_forward", integers=False):
        a = case.arguments(dtype)
        shown, plain = run(case.op, a), run(case.op, a | {"shown": False})
        assert shown.keys() - plain.keys() == {"activated"}
        for name, expected in plain.items():
            assert torch.equal(shown[name].nan_to_num(), expected.nan_to_num()), (str(case), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["mlp_backward", "qkv_backward"])
def test_integers_are_the_same_with_and_without(op: str, dtype: torch.dtype, table: str) -> None:
    for case in cases(op, integers=True):
        a, expected = case.arguments(dtype), truth(case, dtype)
        plain = run(op, a | {"shown": False})
        wrong = {name: equal_bits(x, expected[name]) for name, x in plain.items()}
        assert not any(wrong.values()), (str(case), wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["mlp_backward", "qkv_backward"])
def test_gradients_without_are_as_near_as_with(op: str, dtype: torch.dtype, table: str) -> None:
    for case in cases(op, integers=False):
        a, expected, loop = case.arguments(dtype), truth(case, dtype), yardstick(case, dtype)
        for name, x in run(op, a | {"shown": False}).items():
            wrong = near(x, expected[name], None if loop is None else loop[name])
            assert wrong is None, (str(case), name, wrong)


# --- element by element ---------------------------------------------------------------------------


def _norm_terms(a: Arguments, grads: Tensor, weight: str) -> Tensor:
    """Of `dx += rstd * (g - normed * mean(g * normed))`, where g are sums of these sizes."""
    saved = a["saved"].long()
    normed, rstd = a["normed"].double()[saved].abs(), a["rstd"].double()[saved]
    g = grads * a[weight].double().abs()
    mean = (g * normed).mean(-1, keepdim=True)
    return a["dx"].double().abs() + rstd[:, None] * (g + normed * mean)


def mlp_terms(a: Arguments) -> tuple[Tensor, int]:
    """The absolute values that dx adds up, and the longest chain: products, a mean, the rest."""
    saved = a["saved"].long()
    size = {name: a[name].double().abs() for name in ("dx", "w_gate", "w_up", "w_down")}
    act = size["dx"] @ size["w_down"]
    gate, up = (act * a[name].double()[saved].abs() for name in ("d_gate", "d_up"))
    grads = gate @ size["w_gate"] + up @ size["w_up"]
    hidden, width = a["w_down"].shape
    return _norm_terms(a, grads, "post_norm"), 2 * hidden + 2 * width + 8


def qkv_terms(a: Arguments) -> tuple[Tensor, int]:
    """Of projections whose heads have no norms of their own; a turn adds up two terms."""
    saved, grads, chain = a["saved"].long(), torch.zeros(a["dx"].shape).double(), 0
    cos, sin = (a[name].double()[saved][:, None].abs() for name in ("cos", "sin"))
    for name, scale in (("q", a["scaling"]), ("k", 1.0), ("v", 1.0)):
        sent = a[f"d{name}"].double().abs() * scale
        if name != "v":
            first, second = sent.chunk(2, -1)
            sent = torch.cat((first * cos + second * sin, second * cos + first * sin), -1)
        grads += sent.flatten(1) @ a[f"w{name}"].double().abs()
        chain += len(a[f"w{name}"])
    return _norm_terms(a, grads, "input_norm"), chain + a["dx"].shape[1] + 12


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    ("op", "terms"), [("mlp_backward", mlp_terms), ("qkv_backward", qkv_terms)]
)
def test_both_stay_within_the_forward_error_bound(op, terms, shown: bool, table: str) -> None:
    for name in ("d16-shown", "d32-group2-shown", "d64-group4-shown"):
        (case,) = (case for case in cases(op, integers=False) if case.name == name)
        a = case.arguments(torch.float32)
        expected, bound = truth(case, torch.float32)["dx"], terms(a)
        got = run(op, a | {"shown": shown})["dx"]
        assert within_bound(got, expected, *bound) is None, name
        # It is not so wide that a weight that is 1 % off passes.
        assert within_bound(got + 0.01 * (expected - a["dx"]), expected, *bound), name


# --- nothing is sent ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_nothing_is_sent_the_products_are_zero(dtype: torch.dtype, table: str) -> None:
    a = many_rows("qkv_backward", Draw(dtype, 3), shown=True)
    there = ("dq", "dk", "dv", "wq", "wk", "wv", "q_norm", "k_norm", "q_normed", "q_rstd")
    a |= dict.fromkeys((*there, "k_normed", "k_rstd"))
    got = run("qkv_backward", a)
    assert torch.equal(got["dx"], a["dx"])
    assert got["projected"].shape == (len(a["dx"]), 0)
    assert torch.equal(got["norm_products"], torch.zeros_like(a["dx"]))


@pytest.mark.parametrize("op", SHOWN)
def test_no_rows_are_no_rows(op: str, table: str) -> None:
    for case in cases(op, integers=False):
        if case.name == "rows0-shown":
            assert all(not x.numel() for n, x in run(op, case.arguments(torch.float32)).items())
            return
    raise AssertionError("no such case")
