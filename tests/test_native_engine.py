"""Whole models on the native kernels, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_scores import FLOAT32, reference_scores, scores, worst
from native_calls import TABLES, kernels, native, threads, usable
from patterns import PATTERNS, Batch, group
from tiny_models import FAMILIES, VARIANTS, random_ids, tiny_variant
from torch import Tensor

from g2r_fast.decoder import FrozenDecoder
from g2r_fast.errors import BackendError
from g2r_fast.reference import ReferenceDecoder, input_gradients, relative_error

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


def test_it_is_the_native_kernels_that_are_tested() -> None:
    assert FrozenDecoder(model_of("llama")).backend().name == "native"
    with pytest.raises(BackendError, match="head_dim 8 is not a multiple of 16"):
        scores(tiny_variant("llama"), group())


# Of a batch, all sequences together; and of one sequence, in units of what is summed up for its
# scores: b_t is a sum of H terms that may all but cancel, and then nobody's float32 has its digits.
TERMS = 4e-6


def terms(model: Any, batch: Batch) -> list[Tensor]:
    """`(grads * embeds).abs().sum(-1)` of every sequence, float64."""
    decoder = ReferenceDecoder.from_model(model)
    found = (input_gradients(decoder, ids, span, target) for ids, span, target in batch.rows)
    return [(grads * embeds).abs().sum(-1) for grads, embeds in found]


def check_float32(model: Any, batch: Batch, readout: str = "dot") -> list[Tensor]:
    packed = scores(model, batch, readout=readout)
    expected = reference_scores(model, batch, readout)
    assert all(b.dtype == torch.float32 for b in packed)
    assert relative_error(torch.cat(packed), torch.cat(expected)) <= FLOAT32
    if readout != "dot":  # norms: nothing cancels
        assert worst(packed, expected) <= FLOAT32
        return packed
    for b, truth, size in zip(packed, expected, terms(model, batch), strict=True):
        assert (b.double() - truth).norm() <= TERMS * size.norm()
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
    model, batch = model_of("qwen3", dtype=dtype), group()
    expected = reference_scores(model, batch)
    with kernels(table):
        assert table in str(FrozenDecoder(model).backend())
        once = scores(model, batch)
        assert worst(once, expected) <= (FLOAT32 if dtype == torch.float32 else 0.1)
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


def stock_loop(model: Any, batch: Batch) -> list[Tensor]:
    """What anybody writes: the stock model, one sequence at a time, in the model's dtype."""
    found = []
    for ids, (start, stop), target in batch.rows:
        embeds = model.get_input_embeddings()(torch.tensor([ids])).requires_grad_(True)
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        (grad,) = torch.autograd.grad(logits.float().log_softmax(-1)[target], embeds)
        found.append((grad * embeds.detach()).float().sum(-1)[0, start:stop])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_plain_loop(family: str) -> None:
    """RMS of the errors over all sequences within twice the loop's; none beyond twice its worst."""
    model = model_of(family, dtype=torch.bfloat16)
    batches = [PATTERNS[name]() for name in ("group", "responses_share_a_beginning", "strangers")]
    ours, loop = [], []
    for batch in batches:
        truth = reference_scores(model, batch)
        for found, errors in ((scores(model, batch), ours), (stock_loop(model, batch), loop)):
            assert all(torch.isfinite(b).all() and b.norm() > 0 for b in found)
            errors += [float(relative_error(a, e)) for a, e in zip(found, truth, strict=True)]
    ours, loop = torch.tensor(ours), torch.tensor(loop)
    assert 1e-3 < loop.square().mean().sqrt() < 0.2, "the loop is no yardstick here"
    assert ours.square().mean().sqrt() <= 2 * loop.square().mean().sqrt()
    assert ours.max() <= 2 * loop.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_company_and_runs_do_not_matter(dtype: torch.dtype) -> None:
    model, batch = model_of("qwen2", dtype=dtype), PATTERNS["staggered"]()
    packed = scores(model, batch)
    for again in (
        scores(model, batch),
        scores(model, Batch(*map(list, zip(*batch.rows, strict=True)))),
    ):
        assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))
    order = [2, 0, 3, 1]
    shuffled = Batch(*map(list, zip(*[batch.rows[i] for i in order], strict=True)))
    limit = FLOAT32 if dtype == torch.float32 else 0.1
    assert worst(scores(model, shuffled), [packed[i] for i in order]) <= limit
    alone = [scores(model, Batch([i], [s], [t]))[0] for i, s, t in batch.rows]
    assert worst(packed, alone) <= limit


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
    """The engine sees the changed weight, the reference the right one."""
    model, batch = model_of("qwen2"), group()
    right = model_of("qwen2")
    check_float32(model, batch)
    PLANTED[bug](model)
    packed, expected = scores(model, batch), reference_scores(right, batch)
    # Either rule finds it, with room to spare.
    assert relative_error(torch.cat(packed), torch.cat(expected)) > 2 * FLOAT32
    for b, truth, size in zip(packed, expected, terms(right, batch), strict=True):
        assert (b.double() - truth).norm() > 2 * TERMS * size.norm()
