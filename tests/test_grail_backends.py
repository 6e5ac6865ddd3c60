"""GRAIL's reads lie in the middle of a sequence and its backward stops anywhere: on every backend
of a CPU, forced."""

from __future__ import annotations

from typing import Any

import grail_runs
import pytest
import torch
from grail_runs import (
    FLOAT32,
    Ran,
    errors,
    many_rows,
    reference_saliencies,
    saliencies,
    spans_of_every_kind,
    stock_saliencies,
    worst,
)
from native_calls import native
from tiny_models import FAMILIES, tiny_model

__all__ = ["native"]

ran = grail_runs.ran

# What the native kernels serve, no multiple of a tile.
SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("leaf", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_float32(
    family: str, leaf: int, native: None, ran: list[Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2R_BACKEND", "native")
    model, rows = tiny_model(family, **SIZES), spans_of_every_kind()
    for shift in (0, 1):
        found = saliencies(model, rows, leaf=leaf, shift=shift)
        expected = reference_saliencies(model, rows, leaf=leaf, shift=shift)
        assert worst(found, expected) <= FLOAT32
    assert "native" in ran[0].done.backend


@pytest.mark.parametrize("family", FAMILIES)
def test_native_bfloat16(family: str, native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2R_BACKEND", "native")
    model, rows = tiny_model(family, dtype=torch.bfloat16, **SIZES), many_rows()
    truth = reference_saliencies(model, rows)
    ours, loop = (
        float(torch.tensor(errors(found, truth)).square().mean().sqrt())
        for found in (saliencies(model, rows), stock_saliencies(model, rows))
    )
    assert 1e-3 < loop < 0.2, "the loop is no yardstick here"
    assert ours <= 2 * loop


def test_triton_under_its_interpreter(ran: list[Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed")
    monkeypatch.setenv("G2R_BACKEND", "triton")
    model = tiny_model("qwen3", num_hidden_layers=2)
    rows = spans_of_every_kind().at([0, 1, 2])
    found = saliencies(model, rows, leaf=1, temperature=0.7)
    assert worst(found, reference_saliencies(model, rows, leaf=1, temperature=0.7)) <= FLOAT32
    assert "triton" in ran[0].done.backend
