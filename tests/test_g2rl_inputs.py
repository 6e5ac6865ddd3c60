"""What G2RL cannot use it refuses, and says which row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from g2r_fast.g2rl import features_from_hidden_states, gradient_features

NAN, INF = float("nan"), float("inf")
POLICY = tiny_model("llama")
GOOD: dict[str, Any] = {
    "policy": POLICY,
    "prompt_ids": [[1, 2], [3]],
    "completion_ids": [[4, 5, 6], [7]],
}
BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"completion_ids": [[4, 5, 97], [7]]}, ValueError, "row 0: .*outside the vocabulary.*got 97"),
    ({"completion_ids": [[4, 5, 6], [-1]]}, ValueError, "row 1: .*outside the vocabulary.*got -1"),
    ({"completion_ids": [[4, 5, 6], "7"]}, TypeError, "row 1: completion_ids cannot be read"),
    ({"token_weights": [[1.0, 1, 1]]}, ValueError, "arguments differ in length"),
    ({"token_weights": [[1.0, 1, 1], [1.0, 1]]}, ValueError, r"row 1: .*\(1,\).*got \(2,\)"),
    ({"token_weights": [[1.0, -0.5, 1], [1.0]]}, ValueError, "row 0: .*got -0.5; first at token 1"),
    ({"token_weights": [[1.0, 1, NAN], [1.0]]}, ValueError, "row 0: .*first at token 2"),
    ({"token_weights": [[1.0, 1, 1], [INF]]}, ValueError, "row 1: .*got inf; first at token 0"),
    ({"token_weights": [[0, 0, 0], [1.0]]}, ValueError, "row 0: token_weights are all 0"),
    ({"token_weights": [["a", "b", "c"], [1.0]]}, TypeError, "row 0: token_weights cannot be read"),
    ({"token_weights": 1.0}, TypeError, "token_weights is not a list"),
    ({"temperature": 0.0}, ValueError, "temperature is not positive"),
    ({"temperature": -1.0}, ValueError, "temperature is not positive"),
    ({"temperature": NAN}, ValueError, "temperature is not positive"),
    ({"temperature": "hot"}, ValueError, "temperature is not positive"),
    ({"temperature": 1e-31}, ValueError, "temperature is out of range"),
    ({"temperature": 1e31}, ValueError, "temperature is out of range"),
]
ROLLOUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt_ids": [[1, 2]]}, ValueError, "arguments differ in length"),
    ({"prompt_ids": [[1, 2], []]}, ValueError, "row 1: a prompt is empty"),
    ({"prompt_ids": [[1, 2], [99]]}, ValueError, "row 1: a prompt's id is outside"),
    ({"prompt_ids": [[1, 2], [3] * 256]}, ValueError, "row 1: .*longer than the model's positions"),
    ({"engine": "fast"}, ValueError, "unknown engine"),
    ({"max_tokens": 0}, ValueError, "max_tokens is too small"),
    ({"max_tokens": 1}, ValueError, "more rows than max_tokens.*row 0"),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"), BOTH + ROLLOUTS, ids=lambda x: str(x)[:40]
)
def test_what_cannot_be_used_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    gradient_features(**GOOD)
    with pytest.raises(error, match=message):
        gradient_features(**{**GOOD, **changed})


HEAD = nn.Linear(16, 97)
STATES = [torch.zeros(3, 16), torch.zeros(1, 16)]
GIVEN: dict[str, Any] = {
    "lm_head": HEAD, "hidden_states": STATES, "completion_ids": GOOD["completion_ids"],
}  # fmt: skip
HIDDEN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden_states": STATES[:1]}, ValueError, "arguments differ in length"),
    ({"hidden_states": [STATES[0], STATES[0]]}, ValueError, r"row 1: .*\(1, 16\).*got \(3, 16\)"),
    ({"hidden_states": [STATES[0][:, :8], STATES[1]]}, ValueError, r"row 0: .*got \(3, 8\)"),
    ({"hidden_states": torch.zeros(5, 16)}, ValueError, r"\(4, 16\), or a list.*got \(5, 16\)"),
    ({"hidden_states": torch.zeros(2, 3, 16)}, ValueError, r"got \(2, 3, 16\)"),
    ({"hidden_states": [STATES[0], [0.0] * 16]}, TypeError, "row 1: .*got list"),
    ({"hidden_states": [STATES[0].long(), STATES[1]]}, TypeError, "row 0: .*got torch.int64"),
    ({"hidden_states": [x.double() for x in STATES]}, TypeError, "row 0: .*does not hold"),
    ({"hidden_states": [x.to("meta") for x in STATES]}, ValueError, "row 0: .*another device"),
    ({"lm_head": nn.Linear(8, 97)}, ValueError, r"row 0: .*\(3, 8\).*got \(3, 16\)"),
    ({"lm_head": nn.ReLU()}, TypeError, "lm_head cannot be read.*got ReLU"),
    ({"lm_head": nn.Conv1d(16, 97, 1)}, TypeError, "lm_head cannot be read"),
    ({"lm_head": POLICY.model}, TypeError, "has no LM head|lm_head cannot be read"),
    ({"lm_head": nn.Linear(16, 97).to("meta")}, ValueError, "weight cannot be read.*meta"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BOTH + HIDDEN, ids=lambda x: str(x)[:40])
def test_hidden_states_that_cannot_be_used_are_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    features_from_hidden_states(**GIVEN)
    with pytest.raises(error, match=message):
        features_from_hidden_states(**{**GIVEN, **changed})


def test_a_quantised_weight_is_refused() -> None:
    head = nn.Linear(16, 97, bias=False).requires_grad_(False)
    head.weight.data = head.weight.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"LM head's weight cannot be read.*int8"):
        features_from_hidden_states(head, STATES, GOOD["completion_ids"])


class Adapter(nn.Module):
    """What PEFT and transformers put in a linear layer's place."""

    _disable_adapters = False

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.merged = False

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight


def test_an_adapter_of_the_head() -> None:
    adapter = Adapter(HEAD)
    with pytest.raises(ValueError, match="adapter of the LM head is on"):
        features_from_hidden_states(adapter, STATES, GOOD["completion_ids"])
    adapter._disable_adapters = True
    found = features_from_hidden_states(adapter, STATES, GOOD["completion_ids"])
    plain = features_from_hidden_states(HEAD, STATES, GOOD["completion_ids"])
    assert torch.equal(found.features, plain.features)


def test_an_lm_head_of_fewer_words_than_there_are_embeddings() -> None:
    policy = tiny_model("llama")
    policy.lm_head.weight.data = policy.lm_head.weight.data[:6].clone()
    with pytest.raises(ValueError, match=r"row 0: .*outside the vocabulary; expected 0 <= id < 6"):
        gradient_features(policy, *list(GOOD.values())[1:], engine="autograd")
    found = gradient_features(policy, [[90, 2], [3]], [[4, 5], [1]], engine="autograd")
    assert found.features.any()


def test_logits_that_are_not_the_heads_are_refused() -> None:
    policy = tiny_model("llama")
    inner = policy.lm_head
    policy.lm_head = nn.Sequential(inner, nn.ConstantPad1d((0, 3), 0.0))
    policy.get_output_embeddings = lambda: inner
    with pytest.raises(ValueError, match=r"not those of its LM head; expected 97.*got 100"):
        gradient_features(policy, *list(GOOD.values())[1:], engine="autograd")


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_logits_that_are_not_finite_are_told_with_their_row(engine: str) -> None:
    policy = tiny_model("llama")
    policy.lm_head.weight[5] = INF
    with pytest.raises(ValueError, match=r"logits are not finite.*row 0, token 0"):
        gradient_features(policy, *list(GOOD.values())[1:], engine=engine)
    states = [STATES[0], STATES[1].clone()]
    states[1][0, 3] = NAN
    with pytest.raises(ValueError, match=r"logits are not finite.*row 1, token 0"):
        features_from_hidden_states(HEAD, states, GOOD["completion_ids"])


def test_a_policy_with_dropout_is_refused() -> None:
    policy = tiny_model("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="policy is in train mode and has dropout"):
        gradient_features(policy, *list(GOOD.values())[1:])
