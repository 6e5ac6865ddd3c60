"""Whole models on the native kernels, against the float64 reference."""

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
from native_calls import TABLES, kernels, native, threads, usable
from patterns import PATTERNS, Batch, group
from tiny_models import FAMILIES, VARIANTS, random_ids, tiny_variant
from torch import Tensor

from g2r_fast.decoder import FrozenDecoder
from g2r_fast.errors import BackendError

__all__ = ["native"]

# Sizes that the kernels serve, and that are no multiple of a tile or of a vector of 32.
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
MORE = {
    "llama-mha": {"num_key_value_heads": 3},
    "qwen3": {"head_dim": 32},  # not hidden_size / num_attention_heads
    "mistral": {"sliding_window": 9},
}


def model_of(variant: str, **options: Any) -> Any:
    # A variant's own number of heads was chosen for other sizes.
    return tiny_variant(variant, **{**SIZES, **MORE.get(variant, {}), **options})


@pytest.fixture(autouse=True)
def _forced(native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The native kernels or an error: nothing else may stand in for them."""
    monkeypatch.setenv("G2R_BACKEND", "native")
    yield


def test_a_model_that_is_mostly_mlp_keeps_no_output_of_attention() -> None:
    model = model_of("qwen3", intermediate_size=240)
    decoder = FrozenDecoder(model)
    assert not decoder.backend().keeps_attended and not decoder.shape.keeps_attended
    check_float32(model, group())
    check_float32(model, long_group())
    wide = FrozenDecoder(model_of("qwen3", intermediate_size=240, dtype=torch.bfloat16))
    assert wide.backend().keeps_attended and FrozenDecoder(model_of("qwen3")).shape.keeps_attended


def test_it_is_the_native_kernels_that_are_tested() -> None:
    assert FrozenDecoder(model_of("llama")).backend().name == "native"
    with pytest.raises(BackendError, match="head_dim 8 is not a multiple of 16"):
        scores(tiny_variant("llama"), group())


def check_float32(model: Any, batch: Batch, readout: str = "dot") -> list[Tensor]:
    packed = scores(model, batch, readout=readout)
    truth, loop = reference_scores(model, batch, readout), stock_loop(model, batch, readout)
    assert all(b.dtype == torch.float32 for b in packed)
    assert float32_wrong(packed, loop, truth, sizes(model, batch, readout)) is None
    return packed


def check(model: Any, batch: Batch, *others: list[Tensor]) -> list[Tensor]:
    """The rule of the model's dtype, for its scores and for others of the same batch."""
    packed, truth, loop = (f(model, batch) for f in (scores, reference_scores, stock_loop))
    for found in (packed, *others):
        if model.dtype == torch.bfloat16:
            assert bfloat16_wrong(found, loop, truth) is None
        else:
            assert float32_wrong(found, loop, truth, sizes(model, batch)) is None
    return packed


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_in_float32(variant: str) -> None:
    check_float32(model_of(variant), group())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sharing_pattern_in_float32(family: str, pattern: str) -> None:
    model, batch = model_of(family), PATTERNS[pattern]()
    for readout in ("dot", "l1", "l2"):
        check_float32(model, batch, readout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_every_instruction_set(table: str, dtype: torch.dtype) -> None:
    if usable(table):
        pytest.skip(str(usable(table)))
    model, batch = model_of("qwen3", dtype=dtype), many_sequences()
    with kernels(table):
        assert table in str(FrozenDecoder(model).backend())
        once = check(model, batch)
        for count in (1, 3):
            with threads(count):
                for a, b in zip(scores(model, batch), once, strict=True):
                    assert torch.equal(a, b)


def long_group() -> Batch:
    """One prompt, responses and items longer than the tiles of the kernels."""
    prompt = random_ids(40, 1).tolist()
    parts = [
        (random_ids(50 + 13 * i, 10 + i).tolist(), random_ids(7 + 5 * k, 20 + k).tolist())
        for i in range(3)
        for k in range(4)
    ]
    return Batch(
        [[*prompt, *response, *item] for response, item in parts],
        [(40, 40 + len(response)) for response, _ in parts],
        [(11 * i + 2) % 97 for i in range(len(parts))],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_longer_than_a_tile(family: str) -> None:
    window = {"sliding_window": 45} if family == "mistral" else {}
    model, batch = model_of(family, **window), long_group()
    packed = check_float32(model, batch)
    again = scores(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_plain_loop(family: str) -> None:
    check(model_of(family, dtype=torch.bfloat16), many_sequences())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_company_and_runs_do_not_matter(dtype: torch.dtype) -> None:
    model, batch = model_of("qwen2", dtype=dtype), many_sequences()
    alone = [scores(model, Batch([i], [s], [t]))[0] for i, s, t in batch.rows]
    order = torch.randperm(len(alone), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = scores(model, Batch(*map(list, zip(*[batch.rows[i] for i in order], strict=True))))
    packed = check(model, batch, alone, [shuffled[order.index(i)] for i in range(len(order))])
    for again in (
        scores(model, batch),
        scores(model, Batch(*map(list, zip(*batch.rows, strict=True)))),
    ):
        assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))


PLANTED = {
    "a weight's last column dropped": lambda m: (
        m.model.layers[1].mlp.down_proj.weight[:, -1:].zero_()
    ),
    "0.1 % scale of one weight": lambda m: m.model.layers[1].self_attn.v_proj.weight.mul_(1.001),
    "a norm's weight dropped": lambda m: m.model.layers[2].post_attention_layernorm.weight.fill_(1),
    "a bias dropped": lambda m: m.model.layers[0].self_attn.q_proj.bias.zero_(),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str) -> None:
    """The engine sees the changed weight, the reference and the loop the right one."""
    model, batch = model_of("qwen2"), group()
    right = model_of("qwen2")
    check_float32(model, batch)
    PLANTED[bug](model)
    truth, loop = reference_scores(right, batch), stock_loop(right, batch)
    assert float32_wrong(scores(model, batch), loop, truth, sizes(right, batch))


# What shows in bfloat16, at 5 % and more.
PLANTED_BFLOAT16 = {
    "a norm's weight dropped": PLANTED["a norm's weight dropped"],
    "a bias dropped": PLANTED["a bias dropped"],
    "20 % scale of one weight": lambda m: m.model.layers[1].self_attn.v_proj.weight.mul_(1.2),
    "5 % scale of the head": lambda m: m.lm_head.weight.mul_(1.05),
}


@pytest.mark.parametrize("bug", PLANTED_BFLOAT16)
def test_planted_bugs_are_caught_in_bfloat16(bug: str) -> None:
    model, right = (model_of("qwen2", dtype=torch.bfloat16) for _ in range(2))
    batch = many_sequences()
    PLANTED_BFLOAT16[bug](model)
    truth, loop = reference_scores(right, batch), stock_loop(right, batch)
    assert bfloat16_wrong(scores(model, batch), loop, truth)


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_that_are_5_percent_off_are_caught(family: str, factor: float) -> None:
    model, batch = model_of(family, dtype=torch.bfloat16), many_sequences()
    truth, loop = reference_scores(model, batch), stock_loop(model, batch)
    assert bfloat16_wrong([factor * b for b in scores(model, batch)], loop, truth)
