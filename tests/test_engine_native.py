"""The packed engine on the native kernels, whole models, by the rules of engine_scores.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_scores import (
    bfloat16_wrong,
    float32_wrong,
    many_sequences,
    reference_scores,
    scores,
    sizes,
    stock_loop,
)
from engine_signals import record
from native_calls import threads
from patterns import PATTERNS, Batch, group
from tiny_models import FAMILIES, VARIANTS, tiny_model, tiny_variant

from g2r_fast import native_ops
from g2r_fast.decoder import FrozenDecoder
from g2r_fast.plan import PackedPlan, PackedSequence

# The smallest that native kernels take.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is on the native kernels, or fails."""
    reason = native_ops.load()
    if reason is not None:
        pytest.skip(f"no native kernels: {reason}")
    monkeypatch.setenv("G2R_BACKEND", "native")


def wrong(model: Any, batch: Batch, readout: str = "dot") -> str | None:
    """By the rule of the model's dtype, against the float64 reference and the stock loop."""
    found = scores(model, batch, readout=readout)
    truth, loop = reference_scores(model, batch, readout), stock_loop(model, batch, readout)
    if model.dtype == torch.bfloat16:
        return bfloat16_wrong(found, loop, truth)
    return float32_wrong(found, loop, truth, sizes(model, batch, readout))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, pattern: str) -> None:
    model, batch = tiny_model(family, **SIZES), PATTERNS[pattern]()
    assert wrong(model, batch) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    model = tiny_variant(variant, **SIZES)
    for readout in ("dot", "l1", "l2"):
        assert wrong(model, group(), readout) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_plain_loop(family: str) -> None:
    assert wrong(tiny_model(family, dtype=torch.bfloat16, **SIZES), many_sequences()) is None


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
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, dtype=dtype, **SIZES)
        assert str(FrozenDecoder(model).backend()) == f"native: {kernels}"
        assert wrong(model, many_sequences()) is None


# With these and a batch of six to nine sequences, torch's own product of the LM head's gradients
# differs between one and two threads.
ODD: dict[str, Any] = {**SIZES, "hidden_size": 48, "intermediate_size": 80, "vocab_size": 301}


@pytest.mark.parametrize("shape", [SIZES, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_are_equal_to_the_bit_on_any_number_of_threads(
    family: str, dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    model = tiny_model(family, dtype=dtype, **shape)
    for batch in (many_sequences(), group(), PATTERNS["responses_share_a_beginning"]()):
        once = scores(model, batch)
        for count in (1, 2, 3):
            with threads(count):
                for a, b in zip(scores(model, batch), once, strict=True):
                    assert torch.equal(a, b), f"{count} threads"


def test_twins_are_equal_to_the_bit() -> None:
    first, other, again = scores(tiny_model("llama", **SIZES), PATTERNS["twins"]())
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("leaf", [0, 1, 2])
@pytest.mark.parametrize("reads", [(-1,), (0, 5, -2, -1)])
def test_any_reads_and_any_leaf(
    reads: tuple[int, ...], leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads in front of the attributed tokens, several of a sequence, rows read by several.

    The yardstick is the same engine in plain PyTorch, as no loop keeps what a signal is shown.
    """
    batch = group()
    native = record(tiny_model("qwen3", **SIZES), batch, reads, leaf=leaf)
    monkeypatch.setenv("G2R_BACKEND", "reference")
    eager = record(tiny_model("qwen3", **SIZES), batch, reads, leaf=leaf)
    wide = tiny_model("qwen3", dtype=torch.float64, **SIZES)
    truth = record(wide, batch, reads, leaf=leaf)
    assert native.leaves.keys() == eager.leaves.keys() == truth.leaves.keys()
    for which in (0, 1):
        ours, loop, exact = (
            # A sequence's tokens together: of one alone the eager engine is right by luck.
            [torch.cat([x.leaves[at][which] for at in truth.leaves if at[0] == i]) for i in lanes]
            for x in (native, eager, truth)
            for lanes in [sorted({sequence for sequence, _ in truth.leaves})]
        )
        size = [float(x.norm()) for x in exact]
        assert float32_wrong(ours, loop, exact, size) is None, ("values", "grads")[which]


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
