"""The tests of TRL see the bugs that they are there for."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import test_trl
import test_trl_judges
import test_trl_loss
import test_trl_reference
import test_trl_signals

from g2r_fast.integrations.trl import grad2reward, mixin
from g2r_fast.integrations.trl.host import Host, Rollouts


def attributes_what_tools_wrote(monkeypatch):
    monkeypatch.setattr(Rollouts, "spans", None)


def counts_what_tools_wrote(monkeypatch):
    read = Rollouts.read.__func__

    def all_own(cls, generated, device):
        found = read(cls, generated, device)
        own = [torch.ones_like(row) for row in found.own]
        return Rollouts(found.prompt_ids, found.completion_ids, own)

    monkeypatch.setattr(Rollouts, "read", classmethod(all_own))


def pads_on_the_left(monkeypatch):
    padded = mixin._padded
    monkeypatch.setattr(mixin, "_padded", lambda rows, ids: padded(rows, ids).roll(1, dims=1))


def swaps_rows(monkeypatch):
    padded = mixin._padded
    monkeypatch.setattr(mixin, "_padded", lambda rows, ids: padded(rows[::-1], ids))


def judges_by_the_policy_in_training(monkeypatch):
    def shares_its_weights(policy, host):
        with host.at_rest(policy):
            return copy.deepcopy(policy, {id(p): p for p in policy.parameters()})

    monkeypatch.setattr(grad2reward, "_frozen_copy", shares_its_weights)


def leaves_the_adapters_on(monkeypatch):
    monkeypatch.setattr("g2r_fast.adapters.adapters_off", lambda model: nullcontext())


def draws_alike_at_every_step(monkeypatch):
    monkeypatch.setattr(
        grad2reward.Grad2Reward, "_generator", lambda *_: torch.Generator().manual_seed(0)
    )


def spreads_without_the_length(monkeypatch):
    advantages = grad2reward._Grad2Reward.token_advantages

    def unscaled(self, of_sequences):
        rows = advantages(self, of_sequences)
        return [row / len(row) for row in rows] if self._scaled else rows

    monkeypatch.setattr(grad2reward._Grad2Reward, "token_advantages", unscaled)


def forgets_the_weight(monkeypatch):
    weights = property(lambda self: torch.ones(len(self.trainer.reward_funcs)))
    monkeypatch.setattr(Host, "reward_weights", weights)


def forgets_other_rewards(monkeypatch):
    monkeypatch.setattr(
        grad2reward._Grad2Reward,
        "_with_other_rewards",
        lambda self, own: [
            row * self.host.reward_weights[self.index] for row in self._token_rewards
        ],
    )


def forgets_the_temperature(monkeypatch):
    init = Host.__init__

    def without(self, *args):
        init(self, *args)
        self.temperature = 1.0

    monkeypatch.setattr(Host, "__init__", without)


@pytest.mark.parametrize(
    ("bug", "test", "arguments"),
    [
        (
            attributes_what_tools_wrote,
            test_trl.test_what_tools_wrote_has_no_reward_and_is_not_counted,
            (),
        ),
        (
            counts_what_tools_wrote,
            test_trl.test_what_tools_wrote_has_no_reward_and_is_not_counted,
            (),
        ),
        (
            pads_on_the_left,
            test_trl.test_advantages_are_those_of_attribute_batch,
            ("returns_pooled", True),
        ),
        (
            swaps_rows,
            test_trl.test_advantages_are_those_of_attribute_batch,
            ("rewards_pooled", True),
        ),
        (
            swaps_rows,
            test_trl_loss.test_gradients_are_those_of_the_clipped_objective,
            ("returns_pooled", True),
        ),
        (
            judges_by_the_policy_in_training,
            test_trl_judges.test_the_frozen_initial_policy_judges_by_default,
            (),
        ),
        (
            judges_by_the_policy_in_training,
            test_trl_reference.test_gradients_are_those_of_the_reference_loop,
            ("self-judging",),
        ),
        (
            leaves_the_adapters_on,
            test_trl_judges.test_with_lora_the_base_judges_and_the_adapters_train,
            (0.0, True),
        ),
        (
            spreads_without_the_length,
            test_trl_loss.test_uniform_attribution_reproduces_plain_grpo,
            ("grpo", test_trl_loss.OFF_POLICY),
        ),
        (
            draws_alike_at_every_step,
            test_trl_judges.test_sampled_verdicts_repeat_and_change_from_step_to_step,
            (),
        ),
        (forgets_the_weight, test_trl.test_other_rewards_go_to_the_last_token, ("returns_pooled",)),
        (
            forgets_other_rewards,
            test_trl.test_other_rewards_go_to_the_last_token,
            ("returns_pooled",),
        ),
        (forgets_the_temperature, test_trl_signals.test_grail_weighs_trls_advantages, ("both",)),
        (
            forgets_the_temperature,
            test_trl_signals.test_g2rl_shapes_the_rewards_of_its_function,
            ({},),
        ),
    ],
)
def test_a_planted_bug_is_seen(bug, test, arguments, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)
