"""Gradient features by both engines, and from hidden states, against the reference and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fallback_models import GPT2, model_of
from g2rl_runs import (
    ENGINES,
    FLOAT32,
    FLOAT64,
    RAGGED,
    STOCK,
    Batch,
    alphas,
    batch,
    errors,
    features,
    of_hidden_states,
    reference,
    same,
    stock,
    token_errors,
)
from native_calls import unavailable
from tiny_models import random_ids, tiny_model, tiny_variant
from torch import Tensor, nn

from g2r_fast import engine, feature_sums, g2rl
from g2r_fast.backends import VARIABLE
from g2r_fast.g2rl import Features, features_from_hidden_states, gradient_features
from g2r_fast.reference import ReferenceDecoder, relative_error

VARIANTS = ("llama", "llama-mqa", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "mistral-no-window")


# --- against other ways ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_the_reference(variant: str) -> None:
    policy = tiny_variant(variant, dtype=torch.float64)
    for of in (RAGGED, batch(1, 2, (6, 3), weighted=False)):
        found, truth = features(policy, of, engine="packed"), reference(policy, of)
        assert found.features.dtype == torch.float64
        assert max(errors(found, truth)) <= FLOAT64
        assert max(token_errors(found, truth)) <= FLOAT64


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_autograd_engine_equals_autograd_in_float64(variant: str) -> None:
    policy = tiny_variant(variant, dtype=torch.float64)
    found, truth = features(policy, RAGGED, engine="autograd"), stock(policy, RAGGED)
    assert max(errors(found, truth)) <= FLOAT64
    assert max(token_errors(found, truth)) <= FLOAT64


@pytest.mark.parametrize("chosen", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32(variant: str, chosen: str) -> None:
    policy = tiny_variant(variant)
    found = features(policy, RAGGED, engine=chosen)
    assert found.features.dtype == found.token_logps[0].dtype == torch.float32
    truth, loop = reference(policy, RAGGED), stock(policy, RAGGED)
    assert max(errors(found, truth)) <= FLOAT32
    assert max(token_errors(found, truth)) <= FLOAT32
    assert max(errors(found, loop)) <= STOCK


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_groups_of_any_size(size: int) -> None:
    policy = tiny_model("qwen2")
    of = batch(2, size, (64, 31) if size < 64 else (64,))
    assert max(errors(features(policy, of, engine="packed"), stock(policy, of))) <= STOCK


def test_long_completions() -> None:
    policy = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=8192)
    of = batch(1, 2, (4000, 3999))
    found, loop = features(policy, of, engine="packed"), stock(policy, of)
    assert max(errors(found, loop)) <= STOCK
    assert max(token_errors(found, loop)) <= STOCK


@pytest.mark.parametrize("chosen", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_is_as_near_as_the_plain_loop(
    family: str, dtype: torch.dtype, chosen: str
) -> None:
    """RMS of the errors over 36 sequences, against twice that of the same-dtype stock loop."""
    policy = tiny_model(family, dtype=dtype)
    of = batch(9, 4, (5, 9, 1, 17, 12))
    truth = reference(policy, of)
    loop = stock(policy, of)
    ours = torch.tensor(errors(features(policy, of, engine=chosen), truth))
    theirs = torch.tensor(
        [float(relative_error(x, t)) for (x, *_), (t, *_) in zip(loop, truth, strict=True)]
    )
    assert 1e-4 < theirs.square().mean().sqrt() < 0.2, "the loop is no yardstick here"
    assert ours.square().mean() <= 4 * theirs.square().mean()


def test_a_family_that_only_autograd_serves() -> None:
    policy = model_of(GPT2, torch.float64)
    of = batch(2, 2, (5, 3))
    with pytest.warns(UserWarning, match="autograd engine"):
        engine._told.clear()
        found = features(policy, of)
    assert max(errors(found, stock(policy, of))) <= FLOAT64


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_every_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and unavailable():
        pytest.skip(str(unavailable()))
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("with a GPU, Triton's interpreter is off")
    monkeypatch.setenv(VARIABLE, backend)
    policy = tiny_model("qwen2", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    of = batch(1, 2, (6, 3))
    assert max(errors(features(policy, of), reference(policy, of))) <= FLOAT32


# --- from hidden states ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "qwen3"])
def test_hidden_states_give_the_same_features(variant: str) -> None:
    exact = tiny_variant(variant, dtype=torch.float64)
    reading = ReferenceDecoder.from_model(exact)
    rows = zip(RAGGED.prompts, RAGGED.completions, strict=True)
    hidden = [
        reading.hidden_states(reading.embed([*p, *c]))[-1][len(p) - 1 : len(p) - 1 + len(c)]
        for p, c in rows
    ]
    found = of_hidden_states(exact, hidden, RAGGED)
    wanted = features(exact, RAGGED, engine="packed")
    truth = list(zip(wanted.features, wanted.token_logps, wanted.token_entropies, strict=True))
    assert max(errors(found, truth)) <= FLOAT64 and max(token_errors(found, truth)) <= FLOAT64
    # In one tensor, and by the layer itself.
    assert same(of_hidden_states(exact.lm_head, torch.cat(hidden), RAGGED), found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_states_of_every_dtype(dtype: torch.dtype, bias: bool) -> None:
    """Logits are float32 or wider, whatever the dtype; a bias moves them and is not in Phi."""
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(48, 97, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        parameter.data = (0.4 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    hidden = [
        torch.randn(len(ids), 48, generator=generator).to(dtype) for ids in RAGGED.completions
    ]
    found = of_hidden_states(head, [h.requires_grad_(True) for h in hidden], RAGGED)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.features.dtype == wide and not found.features.requires_grad
    exact = nn.Linear(48, 97, bias=bias, dtype=torch.float64)
    exact.load_state_dict({name: x.double() for name, x in head.state_dict().items()})
    truth = []
    for row, (part, ids) in enumerate(zip(hidden, RAGGED.completions, strict=True)):
        part = part.detach().double().requires_grad_(True)
        logps = (exact(part) / RAGGED.temperature).log_softmax(-1)
        drawn = logps.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0]
        (grad,) = torch.autograd.grad((alphas(RAGGED, row) * drawn).sum(), part)
        entropy = -(logps.exp() * logps).sum(-1)
        truth.append((grad.sum(0) * RAGGED.temperature, drawn.detach(), entropy.detach()))
    limit = 2e-6 if wide == torch.float32 else 1e-13
    assert max(errors(found, truth)) <= limit and max(token_errors(found, truth)) <= limit


def test_narrower_hidden_states_lose_nothing() -> None:
    """As under autocast: bfloat16 states, a float32 LM head."""
    head = nn.Linear(48, 97, bias=False)
    hidden = torch.randn(sum(map(len, RAGGED.completions)), 48).bfloat16()
    assert same(
        of_hidden_states(head, hidden, RAGGED), of_hidden_states(head, hidden.float(), RAGGED)
    )


# --- planted bugs ---------------------------------------------------------------------------------


def _no_temperature(policy: Any, of: Batch) -> Features:
    return features(policy, of, temperature=1.0)


def _chain_rule_kept(policy: Any, of: Batch) -> Features:
    found = features(policy, of)
    return Features(found.features / of.temperature, found.token_logps, found.token_entropies)


def _not_normalised(policy: Any, of: Batch) -> Features:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g2rl, "_read_weights", lambda weights, lengths: weights)
        return features(policy, of)


def _no_weights(policy: Any, of: Batch) -> Features:
    return features(policy, of, token_weights=None)


def _one_position_late(policy: Any, of: Batch) -> Features:
    prompts = [[*p[:-1], p[0]] for p in of.prompts]  # as if another token stood before
    return gradient_features(policy, prompts, of.completions, **of.options)


def _last_token_dropped(policy: Any, of: Batch) -> Features:
    assert of.weights is not None
    weights = [torch.cat((w[:-1], 0 * w[-1:])) if len(w) > 1 else w for w in of.weights]
    return features(policy, of, token_weights=weights)


def _another_head(policy: Any, of: Batch) -> Features:
    """The input embeddings for the LM head's weight, which are not the same where nothing ties."""
    with pytest.MonkeyPatch.context() as patch:
        weight = policy.get_input_embeddings().weight
        patch.setattr(g2rl, "read_head", lambda _: feature_sums.Linear(weight, None))
        return features(policy, of)


@pytest.mark.parametrize(
    "planted",
    [
        _no_temperature, _chain_rule_kept, _not_normalised, _no_weights, _one_position_late,
        _last_token_dropped, _another_head,
    ],
)  # fmt: skip
def test_planted_bugs_are_caught(planted: Any) -> None:
    policy = tiny_model("qwen2")
    truth = reference(policy, RAGGED)
    assert max(errors(features(policy, RAGGED), truth)) <= FLOAT32
    assert max(errors(planted(policy, RAGGED), truth)) > FLOAT32


def test_one_minus_p_is_caught() -> None:
    """States that are sure of every token: in float32, `1 - p` has few digits left of them."""
    generator = torch.Generator().manual_seed(2)
    head = nn.Linear(48, 97, bias=False)
    head.weight.data = torch.randn(97, 48, generator=generator)
    ids = random_ids(7, 3).tolist()
    hidden = 0.8 * head.weight.detach()[ids]
    found = features_from_hidden_states(head, hidden, [ids])
    assert 0.0 < float(found.token_logps[0].abs().max()) < 1e-4

    def naive(dtype: torch.dtype) -> Tensor:
        weight = head.weight.detach().to(dtype)
        p = (hidden.to(dtype) @ weight.T).softmax(-1)
        left = torch.nn.functional.one_hot(torch.tensor(ids), 97) - p
        return left.mean(0) @ weight

    assert relative_error(found.features[0], naive(torch.float64)) <= STOCK
    assert relative_error(naive(torch.float32), naive(torch.float64)) > 10 * STOCK
