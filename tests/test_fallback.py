"""The autograd engine on families that the packed engine does not know."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fallback_models import (
    CONFIGS,
    FLOAT32,
    FLOAT64,
    GPT2,
    PHI,
    ROUNDED,
    alone,
    exact_model_of,
    group,
    model_of,
    run,
)
from tiny_models import tiny_model

from g2r_fast import attribute_tokens
from g2r_fast.engine import PackedEngine, choose_engine
from g2r_fast.errors import UnsupportedModelError
from g2r_fast.fallback import AutogradEngine
from g2r_fast.grad2reward import TargetSignal
from g2r_fast.key_values import cache_argument
from g2r_fast.plan import PackedSequence
from g2r_fast.reference import ReferenceDecoder, relative_error


@pytest.mark.parametrize("readout", ["dot", "l2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_one_sequence_at_a_time(name: str, readout: str) -> None:
    model, (ids, spans, targets) = model_of(name), group()
    scores = attribute_tokens(model, ids, spans, targets, readout=readout, engine="autograd")
    for i, span in enumerate(spans):
        grads, embeds = alone(model, ids[i], targets[i])
        expected = (grads * embeds).sum(-1) if readout == "dot" else grads.norm(dim=-1)
        assert relative_error(scores[i], expected[slice(*span)]) <= FLOAT32


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_central_differences(name: str) -> None:
    # Rounding of float32 over the step, truncation with its square: a larger step, a larger error.
    step, tolerance = (1e-2, 3e-3) if name in ROUNDED else (1e-4, 1e-6)
    model, (ids, spans, targets) = exact_model_of(name), group()
    signal, _, _ = run(model, ids[:1], spans[:1], targets[:1])
    embeds = model.get_input_embeddings()(torch.tensor(ids[0]))
    differences = []
    for position in range(*spans[0]):
        values = []
        for sign in (1.0, -1.0):
            moved = embeds.clone()
            moved[position] *= 1.0 + sign * step
            logits = model(inputs_embeds=moved[None], use_cache=False).logits[0, -1].double()
            values.append(logits.log_softmax(-1)[targets[0]])
        differences.append((values[0] - values[1]) / (2.0 * step))
    assert relative_error(signal.scores(0), torch.stack(differences)) <= tolerance


# --- prefixes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_prefix_runs_once_and_changes_nothing(name: str) -> None:
    model, (ids, spans, targets) = exact_model_of(name), group()
    shared, _, done = run(model, ids, spans, targets)
    assert done.rows_forward == spans[0][0] + sum(len(i) - spans[0][0] for i in ids)
    assert done.rows_unshared == sum(map(len, ids))
    assert done.rows_backward == sum(len(i) - spans[0][0] for i in ids)
    engine = AutogradEngine(model)
    engine._cache_works = False
    whole = TargetSignal(spans, targets, "dot", torch.device("cpu"))
    sequences = [PackedSequence(i, start) for i, (start, _) in zip(ids, spans, strict=True)]
    assert engine.run(sequences, whole).rows_forward == sum(map(len, ids))
    tolerance = FLOAT32 if name in ROUNDED else FLOAT64
    for i in range(len(ids)):
        assert relative_error(shared.scores(i), whole.scores(i)) <= tolerance


def breaks_its_cache(model: Any, how: Callable[[Any], Any]) -> Any:
    """A copy of the model whose forward does something to the cache it is given."""
    broken = copy.deepcopy(model)
    forward = broken.forward

    name = str(cache_argument(model))

    @functools.wraps(forward)  # its signature says what it calls its cache
    def wrong(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(name) is not None:
            kwargs[name] = how(kwargs[name])
        return forward(*args, **kwargs)

    broken.forward = wrong
    return broken


def forget(cache: Any) -> None:
    return None


def scale(cache: Any) -> Any:
    for layer in cache.layers:
        layer.values *= 1.1
    return cache


def shift(cache: Any) -> Any:
    """As a cache that counts a position too many."""
    for layer in cache.layers:
        layer.keys = layer.keys.roll(1, -2)
    return cache


def refuse(cache: Any) -> Any:
    raise ValueError("this model takes no cache")


@pytest.mark.parametrize("how", [forget, scale, shift, refuse])
@pytest.mark.parametrize("name", [GPT2, PHI])
def test_a_wrong_cache_is_found_out_and_not_used(
    name: str, how: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, (ids, spans, targets) = model_of(name), group()
    with caplog.at_level("INFO", logger="g2r_fast"):
        signal, engine, _ = run(breaks_its_cache(model, how), ids, spans, targets)
    assert engine._cache_works is False
    expected = "cannot be reused" if how is refuse else "changes its logits"
    assert [expected in record.message for record in caplog.records] == [True]
    for i, span in enumerate(spans):
        grads, embeds = alone(model, ids[i], targets[i])
        wanted = (grads * embeds).sum(-1)[slice(*span)]
        assert relative_error(signal.scores(i), wanted) <= FLOAT32


def test_a_cache_that_goes_wrong_only_when_it_is_long_is_found_out() -> None:
    def window(cache: Any) -> Any:
        for layer in cache.layers:
            layer.values[..., :-8, :] = 0.0
        return cache

    model = model_of(GPT2)
    broken = breaks_its_cache(model, window)
    short, long = group(prompt=5), group(prompt=20)
    ids, spans, targets = short[0] + long[0], short[1] + long[1], short[2] + long[2]
    signal, engine, _ = run(broken, ids, spans, targets)
    assert engine._cache_works is False
    for i, span in enumerate(spans):
        grads, embeds = alone(model, ids[i], targets[i])
        wanted = (grads * embeds).sum(-1)[slice(*span)]
        assert relative_error(signal.scores(i), wanted) <= FLOAT32


def test_no_cache_for_one_sequence_alone_or_from_its_beginning() -> None:
    model, (ids, spans, targets) = model_of(GPT2), group()
    calls: list[Any] = []

    def watch(cache: Any) -> Any:
        calls.append(cache)
        return cache

    watched = breaks_its_cache(model, watch)
    run(watched, ids[:1], spans[:1], targets[:1])
    run(watched, [i[9:] for i in ids], [(0, b - a) for a, b in spans], targets)
    assert not calls
    run(watched, ids, spans, targets)
    assert calls


# --- what goes with it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_packed_engine_says_no(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type '.*' is not one of llama"):
        PackedEngine(model_of(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert choose_engine(model_of(name)).name == "autograd"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_the_plain_loop(dtype: torch.dtype) -> None:
    ids, spans, targets = group()
    model = tiny_model("qwen2", dtype=dtype)
    decoder = ReferenceDecoder.from_model(model)
    scores = attribute_tokens(model, ids, spans, targets, engine="autograd")
    ours, theirs = [], []
    for i, span in enumerate(spans):
        truth_embeds = decoder.embed(ids[i]).requires_grad_(True)
        logp = decoder.logits(truth_embeds).log_softmax(-1)[targets[i]]
        (truth,) = torch.autograd.grad(logp, truth_embeds)
        expected = (truth * truth_embeds).sum(-1).detach()[slice(*span)]
        grads, embeds = alone(model, ids[i], targets[i])
        plain = (grads.float() * embeds.float()).sum(-1)[slice(*span)]
        ours.append(relative_error(scores[i], expected))
        theirs.append(relative_error(plain, expected))
    # The mean over sequences: of a few tokens each, one of them may be lucky.
    assert 0.0 < sum(ours) <= 2 * sum(theirs)


def test_small_gradients_survive_float16() -> None:
    """What float16 rounds to zero at its own scale comes back at the scale cotangents travel at."""
    ids, spans, targets = group()
    model = tiny_model("llama", dtype=torch.float32)
    model.lm_head.weight.data *= 1e-4
    half = tiny_model("llama", dtype=torch.float16)
    half.lm_head.weight.data = model.lm_head.weight.data.half()
    scores = attribute_tokens(half, ids, spans, targets, engine="autograd")
    expected = attribute_tokens(model, ids, spans, targets, engine="autograd")
    grads, embeds = alone(half, ids[0], targets[0])
    plain = (grads.float() * embeds.float()).sum(-1)[slice(*spans[0])]
    assert relative_error(scores[0], expected[0]) < 0.2 * relative_error(plain, expected[0])


def test_a_trainable_model_gets_no_gradients() -> None:
    model = copy.deepcopy(model_of(GPT2)).requires_grad_(True)
    ids, spans, targets = group()
    frozen = attribute_tokens(model_of(GPT2), ids, spans, targets, engine="autograd")
    scores = attribute_tokens(model, ids, spans, targets, engine="autograd")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, scores, frozen))


def test_progress_counts_every_sequence() -> None:
    ids, spans, targets = group()
    model = model_of(GPT2)
    signal = TargetSignal(spans, targets, "dot", torch.device("cpu"))
    sequences = [PackedSequence(i, start) for i, (start, _) in zip(ids, spans, strict=True)]
    counted: list[int] = []
    AutogradEngine(model).run(sequences, signal, None, counted.append)
    assert sum(counted) == 6


def test_a_model_that_reads_more_than_embeddings_is_refused() -> None:
    """Per-layer embeddings and the like look ids up again; from embeddings alone they differ."""
    model = copy.deepcopy(model_of(next(iter(CONFIGS))))
    forward = model.forward

    def with_ids(*args: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        out = forward(*args, input_ids=input_ids, **kwargs)
        if input_ids is not None:
            out.logits = out.logits + 0.5 * input_ids[:, -1:, None]
        return out

    model.forward = with_ids
    ids, spans, targets = group()
    with pytest.raises(UnsupportedModelError, match="more of a token than its input embedding"):
        attribute_tokens(model, ids, spans, targets, engine="autograd")
