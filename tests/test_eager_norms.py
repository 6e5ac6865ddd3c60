"""Squared norms of weight gradients in plain PyTorch, against automatic differentiation."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from g2r_fast.eager import norms
from g2r_fast.reference import relative_error
from g2r_fast.signal import LinearRows

LENGTHS = (5, 0, 1, 64, 17, 0, 130)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Relative, of sums of thousands of terms; inputs in bfloat16 are exact in float32.
LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}
SIZES = ((7, 9), (48, 80), (1, 130), (130, 1), (160, 160))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def linear_rows(lengths: tuple[int, ...], kept: int) -> LinearRows:
    """Sequences that share rows of inputs; their gradients lie anywhere."""
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    return LinearRows(
        lanes=tuple(range(len(lengths))),
        offsets=(0, *accumulate(lengths)),
        kept=torch.randint(0, kept, (total,), generator=generator).int(),
        rows=torch.randperm(total + 4, generator=generator)[:total].int(),
        exponents=(0,) * len(lengths),
    )


def arguments(
    width: int, out: int, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Tensor, Tensor, LinearRows]:
    """Rows that no entry names hold NaN."""
    rows = linear_rows(lengths, kept=40)
    inputs = normal(40, width, seed=1, dtype=dtype)
    grads = torch.full((sum(lengths) + 4, out), torch.nan, dtype=dtype)
    grads[rows.rows.long()] = normal(sum(lengths), out, seed=2, dtype=dtype)
    return inputs, grads, rows


def spans(rows: LinearRows) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(rows.offsets)]


def definition(inputs: Tensor, grads: Tensor, rows: LinearRows) -> Tensor:
    """The gradient of `sum(grads * linear(inputs))` with respect to the weight, squared."""
    found = []
    for at in spans(rows):
        weight = torch.zeros(grads.shape[1], inputs.shape[1], dtype=torch.float64)
        weight.requires_grad_(True)
        out = F.linear(inputs[rows.kept[at]].double(), weight)
        (grad,) = torch.autograd.grad(out, weight, grads[rows.rows[at]].double())
        found.append(grad.square().sum())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def near(got: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    assert got.dtype == torch.float64 and got.shape == truth.shape
    return bool(((got - truth).abs() <= LIMITS[dtype] * truth).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "out"), SIZES)
def test_norms_are_those_of_the_gradient(width: int, out: int, dtype: torch.dtype) -> None:
    inputs, grads, rows = arguments(width, out, dtype)
    truth = definition(inputs, grads, rows)
    assert near(norms.squared_gradient_norms(inputs, grads, rows), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_sums_are_those_of_the_rows(dtype: torch.dtype) -> None:
    _, grads, rows = arguments(3, 70, dtype)
    sums = torch.stack([grads[rows.rows[at]].double().sum(0) for at in spans(rows)])
    assert near(norms.squared_row_sums(grads, rows), sums.square().sum(1), dtype)


@pytest.mark.parametrize("function", ["squared_gradient_norms", "squared_row_sums"])
def test_no_sequences_have_no_norms(function: str) -> None:
    inputs, grads, rows = arguments(3, 5, torch.float32, ())
    of = (inputs, grads) if function == "squared_gradient_norms" else (grads,)
    found = getattr(norms, function)(*of, rows)
    assert found.shape == (0,) and found.dtype == torch.float64


# --- which way, and in what pieces ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 3, 64, 1024])
def test_blocks_of_gram_matrices_add_up(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row, ragged at the end, exactly as many as there are, and more."""
    monkeypatch.setattr(norms, "_GRAM_ROWS", block)
    monkeypatch.setattr(norms, "gram_is_cheaper", lambda *sizes: True)
    inputs, grads, rows = arguments(48, 80, dtype)
    truth = definition(inputs, grads, rows)
    assert near(norms.squared_gradient_norms(inputs, grads, rows), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 48, 100, 48 * 80, 2**22])
def test_columns_of_a_gradient_add_up(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time even where one is more than a stretch may hold, by twos, and all at once."""
    monkeypatch.setattr(norms, "_TILE_ELEMENTS", elements)
    monkeypatch.setattr(norms, "gram_is_cheaper", lambda *sizes: False)
    inputs, grads, rows = arguments(48, 80, dtype)
    truth = definition(inputs, grads, rows)
    assert near(norms.squared_gradient_norms(inputs, grads, rows), truth, dtype)


@pytest.mark.parametrize(("width", "out"), [(48, 80), (64, 64), (1, 7), (7, 1), (512, 2048)])
def test_the_way_with_fewer_multiplications_is_the_cheaper(width: int, out: int) -> None:
    """Half of M x M for each of two Gram matrices, or one gradient."""
    for rows in (0, 1, 2, 30, 59, 60, 61, 63, 64, 65, 500, 5000):
        gram, gradient = rows * rows / 2 * (width + out), rows * width * out
        if rows:
            assert norms.gram_is_cheaper(rows, width, out) == (gram < gradient)


def test_the_way_is_chosen_by_each_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    for name in ("_by_gram", "_by_gradient"):
        function = getattr(norms, name)

        def noted(a: Tensor, b: Tensor, name=name, function=function) -> Tensor:
            taken.append((name, len(a)))
            return function(a, b)

        monkeypatch.setattr(norms, name, noted)
    norms.squared_gradient_norms(*arguments(48, 80, torch.float32, (59, 60, 61)))
    # 2 * 48 * 80 / (48 + 80) = 60 rows cost the same either way.
    assert taken == [("_by_gram", 59), ("_by_gradient", 60), ("_by_gradient", 61)]


def test_gradients_that_cancel_leave_no_negative_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 what is left of the Gram matrices has either sign."""
    lengths, found = (3,) * 60, []
    rows = LinearRows(
        tuple(range(60)),
        tuple(range(0, 181, 3)),
        torch.zeros(180, dtype=torch.int32),
        torch.arange(180, dtype=torch.int32),
        (0,) * 60,
    )
    first, second = normal(2, len(lengths), 200, seed=3, dtype=torch.float32)
    grads = torch.stack((first, second, -first - second), 1).flatten(0, 1)
    inputs = torch.ones(1, 200)
    for gram in (True, False):
        monkeypatch.setattr(norms, "gram_is_cheaper", lambda *sizes, gram=gram: gram)
        found.append(norms.squared_gradient_norms(inputs, grads, rows))
    assert float(found[0].min()) >= 0 and float(found[1].min()) >= 0
    # What is left is rounding, a small part of what cancelled.
    terms = 200 * grads.double().square().sum()
    assert float(found[0].max()) <= 1e-6 * float(terms)


# --- bugs that these rules catch ------------------------------------------------------------------


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a @ a.T).double() * (b @ b.T).double()


BUGS = {
    "one triangle only": lambda a, b: _gram(a, b).tril().sum(),
    "the diagonal twice": lambda a, b: _gram(a, b).sum() + _gram(a, b).diagonal().sum(),
    "the tokens' norms": lambda a, b: _gram(a, b).diagonal().sum(),
    "the last row dropped": lambda a, b: _gram(a[:-1], b[:-1]).sum(),
    "the last column dropped": lambda a, b: _gram(a, b[:, :-1]).sum(),
    "0.1 % off": lambda a, b: 1.001 * _gram(a, b).sum(),
    "in bfloat16": lambda a, b: _gram(a.bfloat16(), b.bfloat16()).sum(),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grads, rows = arguments(48, 80, torch.float32)
    truth = definition(inputs, grads, rows)
    monkeypatch.setattr(norms, "_by_gram", lambda a, b: _gram(a.double(), b.double()).sum())
    assert near(norms.squared_gradient_norms(inputs, grads, rows), truth, torch.float32)
    monkeypatch.setattr(norms, "_by_gram", BUGS[bug])
    found = norms.squared_gradient_norms(inputs, grads, rows)
    assert not near(found, truth, torch.float32)
    assert relative_error(found, truth) > LIMITS[torch.float32]


@pytest.mark.parametrize("width, out", [(16, 40), (300, 7), (64, 2)])
def test_a_gradient_is_never_formed_whole(
    width: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    product = norms.product_tn
    monkeypatch.setattr(norms, "product_tn", lambda a, b: made.append(b.shape[1]) or product(a, b))
    a, b = torch.randn(500, width), torch.randn(500, out)
    found = norms._by_gradient(a, b)
    assert sum(made) == out and max(made) <= out / 2
    assert float(found) == pytest.approx(float((a.T @ b).double().square().sum()), rel=1e-5)
