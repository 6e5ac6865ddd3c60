"""The update: padded micro-batches give the gradient of the objective row by row."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model
from torch import Tensor

from g2r_fast.training.config import TrainConfig
from g2r_fast.training.credit import Credit
from g2r_fast.training.sampling import Rollouts
from g2r_fast.training.update import Updater, micro_batches, padded_rows

PROMPTS = [[5, 6, 7], [5, 6, 7], [8], [8], [9, 10, 11, 12, 13], [9, 10, 11, 12, 13]]
COMPLETIONS = [[20, 21], [22], [23, 24, 25, 26], [27, 28, 29], [], [30, 31, 32, 33, 34, 35]]


@cache
def accelerator() -> Any:
    return Accelerator(cpu=True)


def rollouts() -> Rollouts:
    count = len(PROMPTS)
    return Rollouts([], PROMPTS, COMPLETIONS, [""] * count, [True] * count, 2)


def credit(seed: int = 0) -> Credit:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(len(ids), generator=generator) for ids in COMPLETIONS]
    reference = [-3 * torch.rand(len(ids), generator=generator) for ids in COMPLETIONS]
    return Credit(rows, None, reference)


def by_hand(policy: Any, config: TrainConfig, given: Credit, old: list[Tensor] | None) -> Tensor:
    """The objective one row at a time, without padding."""
    total, tokens = torch.zeros(()), sum(map(len, COMPLETIONS))
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        if not completion:
            continue
        ids = torch.tensor([prompt + completion])
        logits = policy(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = (logits / config.temperature).log_softmax(-1)
        logps = logps[range(len(completion)), completion]
        ratio = (logps - (logps.detach() if old is None else old[i])).exp()
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        terms = torch.minimum(ratio * given.advantages[i], bounded * given.advantages[i])
        if config.kl:
            difference = given.reference_logps[i] - logps
            terms = terms - config.kl * (difference.exp() - difference - 1)
        if config.loss == "token_mean":
            total = total - terms.sum() / tokens
        else:
            total = total - terms.mean() / len(PROMPTS)
    return total


class Recorder(torch.optim.SGD):
    """Keeps every gradient it is stepped with."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


@pytest.mark.parametrize("loss", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch_tokens", [1, 24, 10_000])
def test_gradients_are_those_of_single_rows(loss: str, kl: float, micro_batch_tokens: int) -> None:
    policy = copy.deepcopy(tiny_model("qwen2")).float().requires_grad_(True)
    config = TrainConfig(
        method="grpo", loss=loss, kl=kl, micro_batch_tokens=micro_batch_tokens,
        temperature=0.8, max_gradient_norm=1e9,
    )  # fmt: skip
    optimizer = Recorder(policy.parameters())
    given = credit()
    figures = Updater(policy, optimizer, config, accelerator())(rollouts(), given, 1, 0)
    wanted = torch.autograd.grad(
        by_hand(policy, config, given, None), list(policy.parameters()), allow_unused=True
    )
    assert len(optimizer.seen) == 1
    for got, want in zip(optimizer.seen[0], wanted, strict=True):
        scale = want.norm()
        assert float(scale) > 0
        assert float((got - want).norm() / scale) < 2e-5
    assert figures["policy/clipped"] == 0 and figures["policy/ratio_max"] == pytest.approx(1.0)
    assert ("policy/kl" in figures) == bool(kl)


def test_later_steps_are_held_to_the_policy_that_sampled() -> None:
    """With two passes the second sees ratios; they are those against the log-probabilities before
    the first, whatever the micro-batches."""
    config = TrainConfig(
        method="grpo", iterations=2, minibatches=2, micro_batch_tokens=30, learning_rate=0.05,
        max_gradient_norm=1e9, temperature=0.8,
    )  # fmt: skip
    start = copy.deepcopy(tiny_model("qwen2")).float().requires_grad_(True)
    policies, seen = [], []
    for tokens in (30, 10_000):
        policy = copy.deepcopy(start)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        of_this = dataclasses.replace(config, micro_batch_tokens=tokens)
        updater = Updater(policy, optimizer, of_this, accelerator())
        seen.append(updater(rollouts(), credit(), 1, 7))
        policies.append(policy)
    assert seen[0]["policy/ratio_max"] > 1.01
    for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    policy = copy.deepcopy(tiny_model("qwen2")).float().requires_grad_(True)
    before = copy.deepcopy(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    given = credit()
    given.advantages[0][0] = float("nan")
    config = TrainConfig(method="grpo")
    figures = Updater(policy, optimizer, config, accelerator())(rollouts(), given, 1, 0)
    assert figures["policy/steps_left_out"] == 1.0
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    figures = Updater(policy, optimizer, config, accelerator())(rollouts(), credit(), 1, 0)
    assert figures["policy/steps_left_out"] == 0.0
    assert any(not torch.equal(before[name], v) for name, v in policy.state_dict().items())


def test_micro_batches_hold_every_row_once_within_the_limit() -> None:
    batches = micro_batches(rollouts(), range(6), 16)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        padded = padded_rows(rollouts(), batch, torch.device("cpu"))
        assert len(batch) == 1 or padded.input_ids.numel() <= 16
