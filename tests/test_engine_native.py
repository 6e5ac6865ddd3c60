"""The packed engine on the native kernels, whole models, by the rules of test_engine.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from engine_scores import (
    FLOAT32,
    many_sequences,
    reference_scores,
    rms_error,
    scores,
    stock_loop,
)
from engine_signals import record
from patterns import PATTERNS, group
from tiny_models import FAMILIES, VARIANTS, tiny_model, tiny_variant
from torch import Tensor

from g2r_fast import native_ops
from g2r_fast.decoder import FrozenDecoder
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.reference import relative_error

# The smallest that native kernels take.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is on the native kernels, or fails."""
    reason = native_ops.load()
    if reason is not None:
        pytest.skip(f"no native kernels: {reason}")
    monkeypatch.setenv("G2R_BACKEND", "native")


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Over the whole batch: in a span of one token the sum of g times e may nearly cancel, and
    then the rounding of any order of float32 additions is large beside it."""
    return float(relative_error(torch.cat(list(actual)), torch.cat(list(expected))))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, pattern: str) -> None:
    model, batch = tiny_model(family, **SIZES), PATTERNS[pattern]()
    assert error(scores(model, batch), reference_scores(model, batch)) <= FLOAT32


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    model = tiny_variant(variant, **SIZES)
    for readout in ("dot", "l1", "l2"):
        expected = reference_scores(model, group(), readout)
        assert error(scores(model, group(), readout=readout), expected) <= FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_plain_loop(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16, **SIZES)
    batch = many_sequences()
    truth = reference_scores(model, batch)
    loop = rms_error(stock_loop(model, batch), truth)
    assert 1e-3 < loop < 0.2, "the loop is no yardstick here"
    assert rms_error(scores(model, batch), truth) <= 2 * loop


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "plain"])
def kernels(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    if request.param not in torch.ops.g2r_fast.built_cpu_kernels().split(","):
        pytest.skip("not built")
    try:
        torch.ops.g2r_fast.use_cpu_kernels(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.g2r_fast.use_cpu_kernels("")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_table_of_kernels(family: str, kernels: str) -> None:
    model = tiny_model(family, **SIZES)
    assert str(FrozenDecoder(model).backend()) == f"native: {kernels}"
    assert error(scores(model, group()), reference_scores(model, group())) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_are_equal_to_the_bit_on_any_number_of_threads(
    family: str, dtype: torch.dtype
) -> None:
    model, batch = tiny_model(family, dtype=dtype, **SIZES), many_sequences()
    once = scores(model, batch)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = scores(model, batch)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


def test_twins_are_equal_to_the_bit() -> None:
    first, other, again = scores(tiny_model("llama", **SIZES), PATTERNS["twins"]())
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("leaf", [0, 1, 2])
@pytest.mark.parametrize("reads", [(-1,), (0, 5, -2, -1)])
def test_any_reads_and_any_leaf(
    reads: tuple[int, ...], leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads in front of the attributed tokens, several of a sequence, rows read by several."""
    model, batch = tiny_model("qwen3", **SIZES), group()
    native = record(model, batch, reads, leaf=leaf)
    monkeypatch.setenv("G2R_BACKEND", "reference")
    expected = record(model, batch, reads, leaf=leaf)
    assert native.leaves.keys() == expected.leaves.keys()
    for which in (0, 1):
        actual, wanted = (
            torch.stack([found.leaves[at][which] for at in expected.leaves])
            for found in (native, expected)
        )
        assert relative_error(actual, wanted) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes_are_the_bytes_that_were_announced(family: str, dtype: torch.dtype) -> None:
    decoder = FrozenDecoder(tiny_model(family, dtype=dtype, **SIZES))
    for pattern in PATTERNS.values():
        batch = pattern()
        plan = PackedPlan.build(
            PackedSequence(ids, start)
            for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
        )
        assert decoder.forward(plan).saved_bytes == plan.saved_bytes(decoder.shape)


def test_nothing_uninitialised_is_read() -> None:
    """torch.empty comes filled with NaN here; one value that leaked would show."""
    model, batch = tiny_model("qwen3", **SIZES), group()
    expected = scores(model, batch)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = scores(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(poisoned, expected, strict=True):
        assert torch.equal(a, e)
