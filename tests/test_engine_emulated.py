"""The whole engine as it runs on a GPU, without one: the attention of csrc/cuda thread by thread on
the CPU, and everything else on Triton's kernels under their interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import emulated_cuda as cuda
import pytest
import torch
from engine_scores import reference_scores, scores, stock_loop, worst
from native_calls import COMPILER
from patterns import Batch, group
from tiny_models import FAMILIES, tiny_model

from g2r_fast import cuda_attention
from g2r_fast.backends import Backend
from g2r_fast.decoder import FrozenDecoder

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to run them"),
]

# Of what the attention serves the smallest: heads of 64.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 64, "num_hidden_layers": 2
}  # fmt: skip


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cuda.Emulation]:
    with cuda.used(cuda.build(tmp_path_factory.mktemp("cuda") / "kernels.so", "-O1")) as found:
        yield found


@pytest.mark.parametrize("products", ["mma", "wgmma"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_gives_the_references_answers(
    family: str, products: str, emulation: cuda.Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, which the interpreter rounds as a GPU does, held to half of the error that the
    stock loop has in bfloat16, which rounds eight times as coarsely."""
    monkeypatch.setenv("G2R_BACKEND", "triton")
    monkeypatch.setenv("G2R_PRODUCTS", products)
    backend = Backend("native", "emulated", {}, on_gpu=True)
    monkeypatch.setattr(FrozenDecoder, "backend", lambda self: backend)
    rows = [group().rows[i] for i in (0, 1, 3, 4)]
    batch = Batch(*map(list, zip(*rows, strict=True)))
    half, coarse = (tiny_model(family, dtype=d, **SIZES) for d in (torch.float16, torch.bfloat16))
    calls = []
    backward = cuda_attention.attention_backward
    monkeypatch.setattr(
        cuda_attention,
        "attention_backward",
        lambda *given, **options: (calls.append(1), backward(*given, **options)),
    )
    emulation.counts()
    found = scores(half, batch)
    counts = emulation.counts()
    assert (counts["products"] > 0, counts["warpgroup_products"] > 0) == (
        products == "mma",
        products == "wgmma",
    )
    assert len(calls) == SIZES["num_hidden_layers"]
    limit = worst(stock_loop(coarse, batch), reference_scores(coarse, batch))
    assert all(torch.isfinite(b).all() and b.norm() > 0 for b in found)
    assert worst(found, reference_scores(half, batch)) <= limit / 2
