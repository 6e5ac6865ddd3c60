"""Squared norms of gradients and of sums of rows, kernels against float64 definitions.

Under the interpreter, or on a GPU if there is one; by the rules of triton_norm_cases.py, with NaN
in all memory that nobody may read. tests/test_triton_norms_planted.py has the bugs they catch.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import lanes as lanes_module
from g2r_fast.kernels import squared_gradient_norms as norms_module
from g2r_fast.kernels import squared_row_sums as sums_module
from g2r_fast.kernels.configs import NORMS, norm_config
from g2r_fast.kernels.lanes import add_partials, lane_table
from g2r_fast.kernels.squared_gradient_norms import WAYS, squared_gradient_norms
from g2r_fast.kernels.squared_row_sums import squared_row_sums
from triton_norm_cases import (
    COUNTS,
    DEVICE,
    DTYPES,
    NAN,
    RULES,
    SMALL,
    STEP_COLUMNS,
    SUMMED,
    TILE,
    gradient_truth,
    gradients_of,
    make_batch,
    poison,
    row_sum_truth,
    row_sums_of,
)

from g2r_fast.errors import InputError, InputTypeError


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("d", "p"), [(1, 1), (16, 33), (37, 15)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [None, *WAYS])
def test_gradient_norms_are_right(rule, d, p, dtype, way):
    assert rule(gradients_of(squared_gradient_norms, way, SMALL), dtype, d, p, COUNTS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradient_norms_as_they_are_shipped(rule, dtype, way):
    tile = norm_config(way, dtype).tile
    counts = [0, 1, tile - 1, tile, tile + 1]
    # Direct: a tile and a bit of either side of the gradient, too.
    for d, p in ((70, 37),) if way == "gram" else ((tile + 2, 9), (7, tile + 1)):
        assert rule(gradients_of(squared_gradient_norms, way, None), dtype, d, p, counts)


WIDTHS = [1, STEP_COLUMNS - 1, STEP_COLUMNS, STEP_COLUMNS + 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sums_are_right(rule, width, dtype):
    assert rule(row_sums_of(squared_row_sums), dtype, 1, width, SUMMED)


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 2 * TILE + 1), max_size=4),
    d=st.integers(1, 35),
    p=st.integers(1, 35),
    dtype=st.sampled_from(DTYPES),
    way=st.sampled_from([None, *WAYS]),
    seed=st.integers(0, 99),
)
def test_any_lanes(counts, d, p, dtype, way, seed):
    batch = make_batch("integers", dtype, d, p, counts, seed)
    found = squared_gradient_norms(*batch, way=way, configs=SMALL)
    sums = squared_row_sums(batch.grads, batch.rows, torch.tensor(batch.offsets))
    assert found.dtype == sums.dtype == torch.float64
    assert found.shape == sums.shape == (len(counts),)
    if counts:
        assert torch.equal(found.cpu(), gradient_truth(batch))
        assert torch.equal(sums.cpu(), row_sum_truth(batch))


def test_each_lane_takes_the_way_of_fewer_flops():
    """2 d p / (d + p) is 24: the lane of 24 entries costs the same by either, and goes direct."""
    batch = make_batch("random", torch.float32, 40, 120 // 7, [23, 24, 25, 60, 1], seed=1)
    by_gram = [n * (40 + 17) < 2 * 40 * 17 for n in (23, 24, 25, 60, 1)]
    assert by_gram == [True, False, False, False, True]
    gram, direct = (squared_gradient_norms(*batch, way=way, configs=SMALL) for way in WAYS)
    assert (gram != direct)[:4].all(), "equal bits: this test cannot tell the ways apart"
    chosen = squared_gradient_norms(*batch, configs=SMALL)
    assert torch.equal(chosen, torch.where(torch.tensor(by_gram, device=DEVICE), gram, direct))


def test_two_runs_are_equal_to_the_bit():
    batch = make_batch("random", torch.bfloat16, 200, 70, [150, 3, 140])
    for way in (None, *WAYS):
        first = squared_gradient_norms(*batch, way=way)
        assert torch.equal(first, squared_gradient_norms(*batch, way=way))
    first = squared_row_sums(batch.inputs, batch.kept, batch.offsets)
    assert torch.equal(first, squared_row_sums(batch.inputs, batch.kept, batch.offsets))


def test_a_row_that_is_not_finite_stays_in_its_lane():
    batch = make_batch("integers", torch.float32, 20, 9, [4, 20, 18])
    batch.rows[batch.offsets[1] + 17] = 0  # NaN
    for way in WAYS:
        found = squared_gradient_norms(*batch, way=way, configs=SMALL)
        assert found.isnan().tolist() == [False, True, False]
        assert torch.equal(found[[0, 2]].cpu(), gradient_truth(batch)[[0, 2]])
    assert squared_row_sums(*batch[1::2], batch.offsets).isnan().tolist() == [False, True, False]


def test_float16_sums_do_not_overflow():
    """256² · 64 in a sum of products and 256 · 300 in one of rows, both above 65504."""
    large = torch.full((2, 64), 256.0, dtype=torch.float16, device=DEVICE)
    named = torch.zeros(300, dtype=torch.int32, device=DEVICE)
    for way in WAYS:
        found = squared_gradient_norms(large, large, named, named, [0, 300], way=way)
        assert found.tolist() == [64 * 64 * (300 * 256.0 * 256.0) ** 2]
    assert squared_row_sums(large, named, [0, 300]).tolist() == [64 * (300 * 256.0) ** 2]


def test_what_cancels_is_never_negative():
    parts = torch.tensor([1.0, -3.0, 2.0, NAN, 4.0], device=DEVICE)
    bounds = torch.tensor([0, 2, 3, 4, 5, 5])
    groups = [torch.tensor([3, 1]), torch.tensor([0, 2, 4])]
    table, launches, total = lane_table(bounds, groups, torch.tensor([2, 1, 1, 1, 0]))
    assert total == 5 and [(one.rows, one.most) for one in launches] == [(2, 1), (3, 2)]
    found = add_partials(parts[[4, 2, 0, 1, 3]], table.to(DEVICE)).tolist()
    assert found[:2] == [0.0, 2.0] and math.isnan(found[2]) and found[3:] == [4.0, 0.0]


def test_nothing_to_do():
    batch = make_batch("integers", torch.float32, 4, 3, [5])
    for offsets in ([0], [2, 2, 2]):
        zeros = [0.0] * (len(offsets) - 1)
        assert squared_gradient_norms(*batch[:4], offsets).tolist() == zeros
        assert squared_row_sums(batch.grads, batch.rows, offsets).tolist() == zeros
    none = torch.zeros(2, 0, device=DEVICE)
    named = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for way in (None, *WAYS):
        assert squared_gradient_norms(none, none, named, named, [0, 2], way=way).tolist() == [0.0]
    assert squared_row_sums(none, named, [0, 2]).tolist() == [0.0]


def test_inputs_are_left_as_they_were():
    batch = make_batch("integers", torch.float16, 20, 9, [4, 20, 18])
    before = [tensor.clone() for tensor in batch[:4]]
    squared_gradient_norms(*batch)
    squared_row_sums(batch.grads, batch.rows, batch.offsets)
    for a, b in zip(before, batch[:4], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


X = torch.ones(4, 6, device=DEVICE)
E = torch.zeros(5, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.double(), X, E, E), InputTypeError, "inputs has an unusable dtype"),
        ((X, X.half(), E, E), InputTypeError, "inputs and grads differ in dtype"),
        ((X, X[:, ::2], E, E), InputError, "grads must have contiguous columns"),
        ((X[0], X, E, E), InputError, "inputs must be a matrix"),
        ((X, X.to("meta"), E, E), InputError, "grads is on another device"),
        ((X, X, E.long(), E), InputTypeError, "kept has an unusable dtype"),
        ((X, X, E, E[::2]), InputError, "rows must be contiguous"),
        ((X, X, E, E[:4]), InputError, "kept and rows differ in number"),
        ((X, X, E.to("meta"), E), InputError, "kept is on another device"),
        ((X.double(), E, [0, 5]), InputTypeError, "x has an unusable dtype"),
        ((X.T, E, [0, 5]), InputError, "x must have contiguous columns"),
        ((X, E[None], [0, 5]), InputError, "rows must be contiguous"),
        ((X, E.to("meta"), [0, 5]), InputError, "rows is on another device"),
    ],
)
def test_bad_tensors_are_told_apart(arguments, error, message):
    with pytest.raises(error, match=message):
        if len(arguments) == 4:
            squared_gradient_norms(*arguments, [0, 4])
        else:
            squared_row_sums(*arguments)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 6], InputError, r"not there; expected within \[0, 5\]; got 6"),
        ([-1, 5], InputError, r"not there; expected within \[0, 5\]; got -1"),
        ([0, 3, 2], InputError, "do not ascend"),
        ([], InputError, "one more than there are lanes"),
        ([[0, 5]], InputError, "one more than there are lanes"),
        ([0, 2.5], InputTypeError, "unusable dtype"),
        (torch.ones(2, device="meta"), InputError, "lie on a device"),
    ],
)
def test_bad_offsets_are_told_apart(offsets, error, message):
    with pytest.raises(error, match=f"offsets.*{message}"):
        squared_gradient_norms(X, X, E, E, offsets)
    with pytest.raises(error, match=f"offsets.*{message}"):
        squared_row_sums(X, E, offsets)


def test_an_unknown_way_is_refused():
    with pytest.raises(InputError, match="unknown way"):
        squared_gradient_norms(X, X, E, E, [0, 5], way="outer")


def test_every_kernel_file_lists_what_it_ships():
    names = [c.name for m in (norms_module, sums_module, lanes_module) for c in m.compile_cases()]
    assert len(names) == len(set(names)) == 2 * (2 * 3) + 2 * 3 + 1
    assert {(c.way, dtype) for c in NORMS for dtype in c.dtypes} == set(
        itertools.product(WAYS, DTYPES)
    )
