"""Squared norms of gradients on the native kernels: which way they go, and what changes no bit.

Their values against the definition are in test_native_ops.py, with those of the other ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_arguments import Draw
from native_calls import DTYPES, TABLES, kernels, native, run, threads, usable
from native_cases import many_rows
from native_norms import LAYOUTS, gradient_norms, row_sums, squared_terms
from native_oracles import EXACT, ORACLES, Arguments
from native_rules import equal_bits, judge, within_bound
from torch import Tensor

__all__ = ["native"]

OPS = ("squared_gradient_norms", "squared_row_sums")
# Columns of a tile, of each instruction set: a block on the diagonal is computed whole.
PANEL = {"avx512bf16": 64, "avx512": 64, "avx2": 16, "plain": 8}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = usable(request.param)
    if reason:
        pytest.skip(reason)
    with kernels(request.param):
        yield request.param


# --- which way ------------------------------------------------------------------------------------


def told_apart(width: int, out: int, lengths: list[int]) -> tuple[Arguments, Tensor]:
    """Lanes whose gradient is exact in float32 and whose Gram matrices are not; the exact norms.

    One feature is 1 in every row, and gradients cancel by threes, but for the last:
    their squares, numbers of 40 bits, do not.
    """
    draw, parts = Draw(torch.float32, 7), []
    for length in lengths:
        first, second = (
            torch.randint(2**18, 2**19, (length, out), generator=draw.generator) for _ in range(2)
        )
        parts.append(torch.stack((first, second, -first - second), 1).flatten(0, 1)[:length])
    rows = torch.arange(sum(lengths), dtype=torch.int32)
    inputs = torch.zeros(len(rows), width)
    inputs[:, width // 2] = 1.0
    a = {
        "inputs": inputs,
        "grads": torch.cat(parts).float(),
        "kept": rows,
        "rows": rows,
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
    }
    return a, ORACLES["squared_gradient_norms"](a, EXACT)["out"]


@pytest.mark.parametrize(("width", "out"), [(256, 256), (112, 800), (800, 112)])
def test_the_cheaper_way_is_taken(width: int, out: int, table: str) -> None:
    """Two symmetric Gram matrices of M rows cost M (M + panel) (in + out) / 2 multiplications, the
    gradient M in out."""
    lengths = list(range(4, 300, 3))
    a, exact = told_apart(width, out, lengths)
    assert float(exact.min()) > 0
    got = run("squared_gradient_norms", a)["out"]
    assert within_bound(got, exact, *squared_terms("squared_gradient_norms", a)) is None
    by_gradient = (got == exact).tolist()
    cheaper = 2 * width * out / (width + out) - PANEL[table]
    assert by_gradient == [length >= cheaper for length in lengths]
    assert len(set(by_gradient)) == 2


def test_both_ways_agree_within_their_bound(table: str) -> None:
    """Lanes on either side of where the way changes, of the same rows but one."""
    most = 2 * 256 * 256 / (256 + 256) - PANEL[table]
    lengths = [int(most) - 1, int(most)]
    for dtype in DTYPES:
        a = gradient_norms(Draw(dtype, 1), 256, 256, [lengths[1]], layout="in-order")
        # The last row is one of zeros: the shorter lane has the same norm.
        a["grads"][a["rows"][-1].long()] = 0
        both = {name: torch.cat((a[name][: lengths[0]], a[name])) for name in ("kept", "rows")}
        both |= {"offsets": torch.tensor([0, lengths[0], sum(lengths)])}
        gram, gradient = run("squared_gradient_norms", a | both)["out"]
        terms, chains = squared_terms("squared_gradient_norms", a | both)
        assert within_bound(gram, gradient, terms.max(), 2 * chains.max()) is None


# --- what changes no bit --------------------------------------------------------------------------


def lanes_of(a: Arguments, lanes: list[int]) -> Arguments:
    """Some of the lanes, in some order."""
    lengths = a["offsets"].diff().tolist()
    part = {"offsets": torch.tensor([0, *(lengths[lane] for lane in lanes)]).cumsum(0)}
    for name in ("kept", "rows"):
        if name in a:
            entries = a[name].split(lengths)
            chosen = [entries[lane] for lane in lanes]
            part[name] = torch.cat([torch.zeros(0, dtype=torch.int32), *chosen])
    return a | part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_lanes_are_the_same_alone_and_in_any_order(op: str, dtype: torch.dtype, table: str) -> None:
    a = many_rows(op, Draw(dtype, 2))
    together = run(op, a)["out"]
    order = Draw(dtype, 3).order(len(together)).tolist()
    for lanes in ([], [0], [7], [len(together) - 1], order, order[:13], [5, 5, 5]):
        got = run(op, lanes_of(a, lanes))["out"]
        assert torch.equal(got, together[lanes]), lanes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_where_the_rows_lie_does_not_matter(op: str, dtype: torch.dtype, table: str) -> None:
    """Stretches at one distance are multiplied at once; every other row alone."""
    a = many_rows(op, Draw(dtype, 4))
    once = run(op, a)["out"]
    maps = {"rows": "grads" if "grads" in a else "x"} | ({"kept": "inputs"} if "kept" in a else {})
    moved, copied = dict(a), dict(a)
    for name, of in maps.items():
        rows = len(a[of])
        order = Draw(dtype, 5).order(rows)
        moved[of] = torch.empty_like(a[of])
        moved[of][order] = a[of]
        moved[name] = order[a[name].long()].int()
        copied[of] = a[of][a[name].long()]
        copied[name] = torch.arange(len(a[name]), dtype=torch.int32)
    assert torch.equal(run(op, moved)["out"], once)
    assert torch.equal(run(op, copied)["out"], once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "out", "lengths"),
    [(256, 256, [150]), (48, 80, [1100]), (16, 16, [1]), (1040, 72, [70, 3])],
)
def test_more_threads_than_tasks_change_no_bit(width, out, lengths, dtype, table) -> None:
    a = gradient_norms(Draw(dtype, 6), width, out, lengths)
    b = row_sums(Draw(dtype, 6), 16, lengths)
    with threads(1):
        once = run(OPS[0], a)["out"], run(OPS[1], b)["out"]
    for count in (2, 3, 5, 16):
        with threads(count):
            assert torch.equal(run(OPS[0], a)["out"], once[0]), f"{count} threads"
            assert torch.equal(run(OPS[1], b)["out"], once[1]), f"{count} threads"


# --- numbers at the edges -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_lane(bad: float, dtype: torch.dtype, table: str) -> None:
    """And does not become a number there."""
    lengths = [9, 70, 300]
    for lane in range(3):
        a = gradient_norms(Draw(dtype, 8), 130, 97, lengths)
        b = row_sums(Draw(dtype, 8), 80, lengths)
        for op, arguments, of in ((OPS[0], a, "grads"), (OPS[1], b, "x")):
            right = run(op, arguments)["out"]
            row = int(arguments["rows"][arguments["offsets"][lane]])
            arguments[of][row, 5] = bad
            wrong = run(op, arguments)["out"]
            assert wrong.isfinite().tolist() == [other != lane for other in range(3)]
            others = [other for other in range(3) if other != lane]
            assert torch.equal(wrong[others], right[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e-15, 1e12])
def test_sizes_far_from_one(size: float, dtype: torch.dtype, table: str) -> None:
    """Of both ways; squares of the smallest are no floats."""
    a = gradient_norms(Draw(dtype, 9), 130, 97, [9, 300], size=size)
    got, expected = run(OPS[0], a), ORACLES[OPS[0]](a, EXACT)
    assert judge(OPS[0], a, got, expected) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25])
def test_squares_are_taken_in_double(size: float, dtype: torch.dtype, table: str) -> None:
    """Sums are floats, their squares would not be: of a gradient, and of rows."""
    a = gradient_norms(Draw(dtype, 9), 16, 16, [300], size=size)
    b = row_sums(Draw(dtype, 9), 80, [300, 2], size=size)
    for op, arguments in zip(OPS, (a, b), strict=True):
        expected = ORACLES[op](arguments, EXACT)
        assert judge(op, arguments, run(op, arguments), expected) == {}


def test_what_cancels_is_not_below_zero(table: str) -> None:
    """Gradients that add up to nothing: what is left of the Gram matrices has either sign."""
    draw, lanes, length = Draw(torch.float32, 10), 40, 24
    half = draw.normal(lanes, length // 2, 256)
    grads = torch.cat((half, -half.flip(1)), 1)
    # Sums of three cancel only up to rounding.
    grads[:, :3] = torch.stack((half[:, 0], half[:, 1], -half[:, 0] - half[:, 1]), 1)
    grads[:, -3:] = 0
    grads[:, 3:-3] = torch.cat((half[:, 3:], -half[:, 3:]), 1)
    rows = torch.arange(lanes * length, dtype=torch.int32)
    a = {
        "inputs": torch.ones(1, 256),
        "grads": grads.reshape(-1, 256),
        "kept": torch.zeros_like(rows),
        "rows": rows,
        "offsets": torch.arange(lanes + 1) * length,
    }
    got, expected = run(OPS[0], a)["out"], ORACLES[OPS[0]](a, EXACT)["out"]
    assert float(got.min()) >= 0
    terms, chains = squared_terms(OPS[0], a)
    assert within_bound(got, expected, terms, chains) is None
    # As far as float32 tells, these are zeros of both signs.
    assert float(got.min()) == 0 and float(got.max()) > 0


# --- any shape ------------------------------------------------------------------------------------

some_lengths = st.lists(
    st.sampled_from([0, 1, 2, 5, 6, 7, 63, 64, 65]) | st.integers(0, 150), max_size=6
)


@pytest.mark.usefixtures("native")
@given(
    width=st.integers(1, 150) | st.sampled_from([256, 1009]),
    out=st.integers(1, 150) | st.sampled_from([256, 1009]),
    lengths=some_lengths,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120)
def test_norms_of_any_shape_are_exact_on_integers(width, out, lengths, layout, dtype, seed) -> None:
    options: dict[str, Any] = {"layout": layout, "integers": True}
    a = gradient_norms(Draw(dtype, seed), width, out, lengths, **options)
    b = row_sums(Draw(dtype, seed), 16 * (1 + width % 9), lengths, **options)
    for op, arguments in zip(OPS, (a, b), strict=True):
        got, expected = run(op, arguments), ORACLES[op](arguments, EXACT)
        assert equal_bits(got["out"], expected["out"]) is None
