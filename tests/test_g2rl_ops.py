"""`residual_sums` in PyTorch, C++ and Triton against one definition in float64.

Shares of 0 and 1 / n give equal bits; random rows stay within the forward-error bound, element by
element. Both rules see the bugs planted at the end. The native op alone, its arguments and its
threads: tests/test_native_*.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import native_residuals
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_arguments import Draw
from native_calls import native, unavailable
from native_oracles import EXACT, ORACLES, Arguments, Outputs
from native_residuals import OWNERS, STRETCHES
from native_rules import UNIT, equal_bits
from torch import Tensor

from g2r_fast import native_residuals as by_native
from g2r_fast import ops
from g2r_fast.backends import VARIABLE
from g2r_fast.eager.residuals import residual_sums as eager

__all__ = ["native"]

# Rows that are not finite, in NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

Implementation = Callable[..., tuple[Tensor, Tensor]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Roundings of a share on its way: two of its exponent, those of exp, its factors; of a sum of
# shares, the longest chain that any implementation has beside the rows.
ROUNDINGS = 40


def _triton() -> Implementation:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    by_triton = importlib.import_module("g2r_fast.triton_residuals").residual_sums

    def run(logits: Tensor, targets: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        lengths, owners, sums, temperature = rest
        there = sums.to(DEVICE)
        moved = (x.to(DEVICE) for x in (logits, targets, weights))
        found = by_triton(*moved, lengths, owners, there, temperature)
        sums.copy_(there)
        return found[0].cpu(), found[1].cpu()

    return run


@pytest.fixture(params=["eager", "native", "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "triton":
        return _triton()
    if request.param == "native" and unavailable():
        pytest.skip(str(unavailable()))
    return {"eager": eager, "native": by_native.residual_sums}[request.param]


def is_triton(run: Implementation) -> bool:
    return run not in (eager, by_native.residual_sums)


def stretches_in(a: Arguments) -> tuple[list[int], list[int]]:
    """Lengths and owners."""
    runs = [(owner, len(list(rows))) for owner, rows in groupby(a["owners"].tolist())]
    return [count for _, count in runs], [owner for owner, _ in runs]


def outputs(run: Implementation, a: Arguments, dtype: torch.dtype = torch.float32) -> Outputs:
    sums = a["sums"].to(dtype, copy=True)
    logps, entropies = run(
        a["logits"].to(dtype), a["targets"], a["weights"].to(dtype), *stretches_in(a), sums,
        a["temperature"],
    )  # fmt: skip
    return {"sums": sums, "logps": logps, "entropies": entropies}


def without_sums(a: Arguments) -> Arguments:
    """What was there would hide the digits of what is added."""
    return a | {"sums": torch.zeros_like(a["sums"])}


def sizes(a: Arguments, from_zero: bool) -> Outputs:
    """What the errors of each output are measured by, in units of rounding.

    A share loses as many units as its exponent has size: the distance to the largest logit, or
    (`from_zero`) logit and log-sum-exp themselves.
    """
    z = a["logits"].double() / a["temperature"]
    rows = torch.arange(len(z))
    p = z.softmax(-1)
    top = z.argmax(-1) if len(z) else a["targets"]
    gaps = (z.amax(-1, keepdim=True) if len(z) else z) - z
    noise = 1 + gaps
    if from_zero and len(z):
        noise = 2 + 2 * z.abs().amax(-1, keepdim=True) + gaps
    terms = p * noise
    rest = terms.clone()
    rest[rows, top] = 0.0
    # Every row by itself, with a weight of 1.
    alone = {"sums": torch.zeros(z.shape), "owners": rows, "weights": torch.ones(len(z))}
    exact = ORACLES["residual_sums"](a | alone, EXACT)
    # Of the word that was drawn: all others, with their noise.
    others = exact["sums"][rows, a["targets"]]
    terms[rows, a["targets"]] = others * noise.amax(-1)
    of_owner = a["sums"].double().abs()
    of_owner.index_add_(0, a["owners"], a["weights"].double()[:, None] * terms)
    entropy = exact["entropies"] + (rest * (1 + gaps)).sum(-1)
    logp = exact["logps"].abs() + rest.sum(-1)
    if from_zero:
        # The exponent's rounding is not that of a distance, where a word is not the largest.
        logp = logp + (1 - p[rows, a["targets"]]) * noise.amax(-1)
        # log_probabilities leaves out the word that was drawn; of another one that is sure, the
        # share of all others is a difference to 1.
        entropy = entropy + (1 - p[rows, a["targets"]]) * noise.amax(-1)
    return {"sums": of_owner, "logps": logp, "entropies": entropy}


def outside_bound(run: Implementation, a: Arguments) -> list[str]:
    got, expected = outputs(run, a), ORACLES["residual_sums"](a, EXACT)
    longest = max([0, *stretches_in(a)[0]])
    bound = sizes(a, is_triton(run))
    wrong = []
    for name, truth in expected.items():
        chain = ROUNDINGS + (longest if name == "sums" else 0)
        error = (got[name].double() - truth).abs()
        # What lies below float32's normal numbers may be zero.
        allowed = chain * UNIT * bound[name] + 2.0**-126
        if got[name].shape != truth.shape or not bool((error <= allowed).all()):
            wrong.append(name)
        elif bool(truth.any()) and not bool(got[name].any()):
            wrong.append(f"{name}: zeros")
    return wrong


RANDOM = [
    (n, make) for n, make, integers in native_residuals.cases() if not integers and n != "again"
]


@pytest.mark.parametrize(("name", "make"), RANDOM, ids=[n for n, _ in RANDOM])
def test_rows_stay_within_the_forward_error_bound(
    implementation: Implementation, name: str, make: Callable[[Draw], Arguments]
) -> None:
    a = make(Draw(torch.float32, 0))
    assert outside_bound(implementation, a) == []
    assert outside_bound(implementation, without_sums(a)) == []


@pytest.mark.parametrize("stretches", ["one", "none", "ragged", "long"])
@pytest.mark.parametrize("columns", [1, 2, 97, 1030])
def test_integers_are_exact(implementation: Implementation, stretches: str, columns: int) -> None:
    # Triton subtracts a log-sum-exp, whose exponential is exact for one word alone.
    most = 1 if is_triton(implementation) else 2**30
    a = native_residuals.residual_sums_integers(
        Draw(torch.float32, 1), STRETCHES[stretches], columns, most=most
    )
    got, expected = outputs(implementation, a), ORACLES["residual_sums"](a, EXACT)
    assert {n: equal_bits(got[n], expected[n]) for n in expected} == dict.fromkeys(expected)


@given(
    lengths=st.lists(st.integers(0, 5), max_size=OWNERS),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(lengths: list[int], columns: int, seed: int) -> None:
    a = native_residuals.residual_sums(Draw(torch.float32, seed), list(enumerate(lengths)), columns)
    exact = ORACLES["residual_sums"](a, EXACT)
    for run in (eager, by_native.residual_sums):
        if run is not eager and unavailable():
            continue
        assert outside_bound(run, a) == []
        # A stretch without rows adds nothing.
        sums = a["sums"].clone()
        found = run(
            a["logits"], a["targets"], a["weights"], lengths, list(range(len(lengths))), sums, 0.7
        )
        assert torch.equal(sums, outputs(run, a)["sums"])
        assert found[0].shape == exact["logps"].shape


def test_float64_is_the_definition() -> None:
    for _, make in RANDOM:
        a = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
             for n, x in without_sums(make(Draw(torch.float32, 2))).items()}  # fmt: skip
        got, exact = outputs(eager, a, torch.float64), ORACLES["residual_sums"](a, EXACT)
        for name, truth in exact.items():
            assert (got[name] - truth).norm() <= 1e-13 * truth.norm(), name


@pytest.mark.parametrize("gap", [5.0, 16.0, 25.0, 40.0, 80.0])
def test_a_sure_word_keeps_all_its_digits(implementation: Implementation, gap: float) -> None:
    """Where 1 - p is below float32's last place, everything is that small, and not 0."""
    logits = torch.zeros(1, 9)
    logits[0, 4] = gap
    a = {"logits": logits, "targets": torch.tensor([4]), "weights": torch.ones(1),
         "owners": torch.tensor([0]), "temperature": 1.0, "sums": torch.zeros(1, 9)}  # fmt: skip
    got, exact = outputs(implementation, a), ORACLES["residual_sums"](a, EXACT)
    assert 0.0 < float(exact["sums"][0, 4]) < 0.06
    for name, truth in exact.items():
        assert ((got[name].double() - truth).abs() <= 2e-6 * truth.abs()).all(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_told_and_stay_alone(
    implementation: Implementation, bad: float
) -> None:
    a = native_residuals.residual_sums(Draw(torch.float32, 3), STRETCHES["ragged"], 97)
    once = outputs(implementation, a)
    for column in (0, 41, 96):
        a["logits"][5] = once_row = a["logits"][5].clone()
        a["logits"][5, column] = bad
        got = outputs(implementation, a)
        a["logits"][5] = once_row
        for name in ("logps", "entropies"):
            assert got[name].isnan().nonzero().flatten().tolist() == [5]
            assert torch.equal(
                got[name].nan_to_num(), once[name].index_fill(0, torch.tensor([5]), 0)
            )
        owner = int(a["owners"][5])
        assert got["sums"][owner].isnan().all()
        others = [i for i in range(OWNERS) if i != owner]
        assert torch.equal(got["sums"][others], once["sums"][others])


def test_the_largest_numbers_are_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    for run in (eager, by_native.residual_sums):
        if run is not eager and unavailable():
            continue
        sums = torch.zeros(1, 3)
        logps, entropies = run(logits, torch.tensor([0, 1]), torch.ones(2), [2], [0], sums, 0.1)
        assert torch.equal(logps, -torch.tensor([0.0, 3.0]).log().clamp_min(0))
        assert torch.equal(entropies, torch.tensor([0.0, 3.0]).log().clamp_min(0))
        assert torch.allclose(sums, torch.tensor([[-1 / 3, 2 / 3, -1 / 3]]), atol=0, rtol=1e-6)


# --- which one runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype", "chosen"),
    [
        ("auto", torch.float32, "native"),
        ("native", torch.float32, "native"),
        ("reference", torch.float32, "eager"),
        ("auto", torch.float64, "eager"),
        ("triton", torch.float32, "triton"),
    ],
)
@pytest.mark.usefixtures("native")
def test_dispatch(
    backend: str, dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton's interpreter is off, and CPU tensors stay on the CPU")
    monkeypatch.setenv(VARIABLE, backend)
    run = {"native": by_native.residual_sums, "eager": eager}.get(chosen) or _triton()
    a = native_residuals.residual_sums(Draw(torch.float32, 4), STRETCHES["ragged"], 97)

    def through_ops(*arguments: Any) -> tuple[Tensor, Tensor]:
        *most, temperature = arguments
        return ops.residual_sums(*most, temperature=temperature)

    got, expected = outputs(through_ops, a, dtype), outputs(run, a, dtype)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert got["sums"].dtype == dtype


# --- planted bugs ---------------------------------------------------------------------------------

Call = tuple[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], Tensor, float]


def no_temperature(*a: Any) -> tuple[Tensor, Tensor]:
    return eager(*a[:6], 1.0)


def no_weights(*a: Any) -> tuple[Tensor, Tensor]:
    return eager(a[0], a[1], torch.ones_like(a[2]), *a[3:])


def last_row_dropped(*a: Any) -> tuple[Tensor, Tensor]:
    weights = a[2].clone()
    weights[-1] = 0.0
    return eager(a[0], a[1], weights, *a[3:])


def last_column_dropped(*a: Any) -> tuple[Tensor, Tensor]:
    targets = a[1].clamp(max=a[0].shape[1] - 2)
    return eager(a[0][:, :-1], targets, *a[2:5], a[5][:, :-1], a[6])


def next_word(*a: Any) -> tuple[Tensor, Tensor]:
    return eager(a[0], (a[1] + 1) % a[0].shape[1], *a[2:])


def owners_swapped(*a: Any) -> tuple[Tensor, Tensor]:
    return eager(*a[:4], list(a[4])[::-1], *a[5:])


def written_not_added(*a: Any) -> tuple[Tensor, Tensor]:
    a[5].zero_()
    return eager(*a)


def one_minus_p(*a: Any) -> tuple[Tensor, Tensor]:
    """What everybody writes: `onehot - softmax`."""
    logits, targets, weights, lengths, owners, sums, temperature = a
    p = (logits / temperature).softmax(-1)
    left = torch.nn.functional.one_hot(targets, logits.shape[1]) - p
    parts = (weights[:, None] * left).split(list(lengths))
    for owner, part in zip(owners, parts, strict=True):
        sums[owner] += part.sum(0)
    logps = p.gather(1, targets[:, None])[:, 0].log()
    return logps, -torch.special.xlogy(p, p).sum(-1)


def scaled_by_0_1_percent(*a: Any) -> tuple[Tensor, Tensor]:
    logps, entropies = eager(*a)
    a[5].mul_(1.001)
    return logps * 1.001, entropies * 1.001


def in_bits(*a: Any) -> tuple[Tensor, Tensor]:
    return tuple(x / torch.tensor(2.0).log() for x in eager(*a))  # type: ignore[return-value]


def nothing(*a: Any) -> tuple[Tensor, Tensor]:
    a[5].zero_()
    return torch.zeros(len(a[0])), torch.zeros(len(a[0]))


PLANTED: dict[Implementation, set[str]] = {
    no_temperature: {"sums", "logps", "entropies"},
    no_weights: {"sums"},
    last_row_dropped: {"sums"},
    last_column_dropped: {"sums", "logps", "entropies"},
    next_word: {"sums", "logps"},
    owners_swapped: {"sums"},
    written_not_added: {"sums"},
    one_minus_p: {"sums", "logps", "entropies"},
    scaled_by_0_1_percent: {"sums", "logps", "entropies"},
    in_bits: {"logps", "entropies"},
    nothing: {"sums", "logps", "entropies"},
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda f: f.__name__)
def test_planted_bugs_are_caught(planted: Implementation) -> None:
    found = set()
    for sure in (None, 14.0):
        a = native_residuals.residual_sums(
            Draw(torch.float32, 0), STRETCHES["ragged"], 97, sure=sure
        )
        found |= {*outside_bound(planted, a), *outside_bound(planted, without_sums(a))}
    assert {name.partition(":")[0] for name in found} == PLANTED[planted]
