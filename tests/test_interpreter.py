"""Triton's interpreter as tests/interpreter.py makes it: the same bits, and nothing left behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_scores import scores
from patterns import PATTERNS
from tiny_models import tiny_model
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

if torch.cuda.is_available():
    pytest.skip("with a GPU nothing is interpreted", allow_module_level=True)


@triton.jit
def doubled(x):  # type: ignore[no-untyped-def]
    return x + x


@triton.jit
def kernel(in_ptr, out_ptr, FAILS: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(in_ptr + tl.arange(0, 4))
    if FAILS:
        x = x + tl.arange(0, 8)
    tl.store(out_ptr + tl.arange(0, 4), doubled(doubled(x)) + tl.sum(x))


def test_a_whole_model_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of the engine, in three dtypes, by the interpreter as it comes."""
    monkeypatch.setenv("G2R_BACKEND", "triton")

    def found(dtype: torch.dtype) -> list[Tensor]:
        model = tiny_model("qwen3", dtype=dtype, num_hidden_layers=1)
        return scores(model, PATTERNS["short_spans"]())

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    quick = {dtype: found(dtype) for dtype in dtypes}
    builder: Any = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=True)
    monkeypatch.setattr(builder, "options", options)
    for name, plain in (
        ("_patch_lang", interpreter._patch_lang.patch),
        ("_get_np_dtype", interpreter._get_np_dtype.__wrapped__),
    ):
        monkeypatch.setattr(interpreter, name, plain)
    for kind, name in (
        (tl.semantic.TritonSemantic, "broadcast_impl_value"),
        (tl.core.block_type, "__init__"),
        (tl.tensor, "__init__"),
    ):
        monkeypatch.setattr(kind, name, getattr(kind, name).__wrapped__)
    for dtype in dtypes:
        for ours, plain in zip(quick[dtype], found(dtype), strict=True):
            assert torch.equal(ours, plain) and ours.norm() > 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_ends_as_it_began(fails: bool) -> None:
    given, out = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    before = tl.load, tl.sum, tl.tensor.__add__, tl.range
    for _ in range(2):
        out.zero_()
        if fails:
            with pytest.raises(interpreter.InterpreterError):
                kernel[(1,)](given, out, FAILS=True)
        else:
            kernel[(1,)](given, out, FAILS=False)
            assert out.tolist() == [6, 10, 14, 18]
        assert (tl.load, tl.sum, tl.tensor.__add__, tl.range) == before
        assert not interpreter._patch_lang.patched
