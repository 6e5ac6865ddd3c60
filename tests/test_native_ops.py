"""Every native op of every instruction set against its definition in float64.

Integers have one right answer to the bit. Random arguments at the scale of real ones stay within a
relative error: a number in float32, twice that of plain PyTorch in bfloat16. Every tensor lies
between guards and every output is NaN before it is written (`native_calls.run`).
"""

from __future__ import annotations

from collections.abc import Iterator

import native_tries as attention
import pytest
import torch
from native_arguments import Draw
from native_calls import (
    COMPILER,
    DTYPES,
    TABLES,
    expected_tables,
    kernels,
    native,
    run,
    unavailable,
    usable,
)
from native_cases import (
    HEADS,
    IN_FLOAT64,
    OPS,
    TRIES,
    VARIANTS,
    many_rows,
    select,
    shared,
    truth,
    yardstick,
)
from native_norms import squared_terms
from native_oracles import EXACT, ORACLES, Arguments
from native_rules import equal_bits, judge, unbiased, within_bound

__all__ = ["native"]


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = usable(request.param)
    if reason:
        pytest.skip(reason)
    with kernels(request.param):
        yield request.param


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: nothing needs to be built")
def test_nothing_is_skipped_where_there_is_a_compiler() -> None:
    assert unavailable() is None
    missing = {name: usable(name) for name in expected_tables() if usable(name)}
    assert not missing


@pytest.mark.usefixtures("native")
def test_the_best_table_runs_unless_another_is_asked_for() -> None:
    best = next(name for name in TABLES if usable(name) is None)
    torch.ops.g2r_fast.use_cpu_kernels("")
    assert torch.ops.g2r_fast.cpu_kernels() == best
    with pytest.raises(RuntimeError, match="sse9"):
        torch.ops.g2r_fast.use_cpu_kernels("sse9")
    assert torch.ops.g2r_fast.cpu_kernels() == best


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_integers_are_exact(op: str, dtype: torch.dtype, table: str) -> None:
    wrong = {}
    for case in select(op, integers=True):
        got, expected = run(op, shared(case, dtype)), truth(case, dtype)
        assert got.keys() == expected.keys()
        for name in expected:
            reason = equal_bits(got[name], expected[name])
            if reason:
                wrong[f"{case} {name}"] = reason
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_random_arguments_at_the_scale_of_real_ones(
    op: str, dtype: torch.dtype, table: str
) -> None:
    wrong = {}
    for case in select(op, integers=False):
        a = shared(case, dtype)
        reasons = judge(op, a, run(op, a), truth(case, dtype), yardstick(case, dtype))
        if reasons:
            wrong[str(case)] = reasons
    assert not wrong


SUMS = ["linear", "linear_backward", "embedding_scores"]
SUMS += ["squared_gradient_norms", "squared_row_sums"]


def terms(op: str, a: Arguments) -> tuple[torch.Tensor, int | torch.Tensor]:
    """The sum of the absolute values of what is added up, and the longest chain of roundings."""
    if op.startswith("squared"):
        return squared_terms(op, a)
    if op == "linear":
        magnitudes = {name: None if a[name] is None else a[name].abs() for name in a}
        # A product, at most one addition per column, the bias.
        return ORACLES[op](magnitudes, EXACT)["out"], a["x"].shape[1] + 2
    if op == "linear_backward":
        magnitudes = {name: x.abs() for name, x in a.items()}
        return ORACLES[op](magnitudes, EXACT)["out"], len(a["weight"]) + 1
    magnitudes = a | {"values": a["values"].abs(), "grads": a["grads"].abs()}
    return ORACLES[op](magnitudes, EXACT)["scores"], a["values"].shape[1] + 3  # product, root


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", SUMS)
def test_sums_stay_within_the_forward_error_bound(op: str, dtype: torch.dtype, table: str) -> None:
    wrong = {}
    for case in select(op, integers=False):
        a = shared(case, dtype)
        got, expected = run(op, a), truth(case, dtype)
        for name in expected:
            reason = within_bound(got[name], expected[name], *terms(op, a))
            if reason:
                wrong[f"{case} {name}"] = reason
    assert not wrong


@pytest.mark.parametrize(("op", "shown"), [v for v in VARIANTS if v[0] not in IN_FLOAT64])
def test_errors_average_out(op: str, shown: bool, table: str) -> None:
    """A factor that is off by 0.1 % hides below one rounding, but not below the mean of many.

    Squared norms are not rounded to bfloat16, and long sums of its squares err to one side, by
    less than a float32 error (csrc/cpu/norms.h): errors of theirs average out in float32.
    """
    dtype = torch.float32 if op == "squared_gradient_norms" else torch.bfloat16
    a = many_rows(op, Draw(dtype, 5), shown)
    got, expected = run(op, a), ORACLES[op](a, EXACT)
    wrong = {name: unbiased(got[name], expected[name]) for name in expected}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 1, 4, 16])
@pytest.mark.parametrize("trie", TRIES)
def test_without_scores_attention_is_a_mean(
    trie: str, window: int, dtype: torch.dtype, table: str
) -> None:
    """Exactly so where the number of keys is a power of two; its logarithm is the log-sum-exp."""
    a = attention.forward_uniform(Draw(dtype, 3), TRIES[trie], *HEADS["d32-group2"], window=window)
    got, expected = run("attention_forward", a), ORACLES["attention_forward"](a, EXACT)
    assert not judge(
        "attention_forward", a, got, expected, None if dtype.itemsize == 4 else expected
    )
    exact = [row for row, keys in attention.seen(a) if len(keys) & (len(keys) - 1) == 0]
    assert exact
    assert equal_bits(got["out"][exact], expected["out"][exact]) is None
