"""TRL's loss with advantages per token: plain GRPO's where nothing tells tokens apart, and that of
the clipped objective elsewhere, computed here by itself."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from trl_runs import (
    GROUP,
    ITEMS,
    LOSSES,
    PROMPTS,
    SAPO_BREAKS,
    Dense,
    GRPOConfig,
    GRPOTrainer,
    Steps,
    Written,
    checkpoints,
    completion,
    judge,
    length_reward,
    model,
    tokenizer,
    trained,
    trainer,
)

from g2r_fast import AdvantageConfig, AttributionConfig, attribute_batch
from g2r_fast.advantages import ESTIMATORS
from g2r_fast.errors import InputError
from g2r_fast.integrations.trl import Grad2Reward
from g2r_fast.reference import relative_error

FLOAT32 = 2e-5
UNIFORM = AttributionConfig(readout="uniform")
SCALED = AdvantageConfig("scaled_sequence")
# Two passes over two micro-batches of a generated batch: ratios are not one, and a micro-batch
# holds rows of several groups.
OFF_POLICY = {
    "per_device_train_batch_size": GROUP,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "max_steps": 4,
    "learning_rate": 3e-3,
}
EVERYTHING = {
    "delta": 2.5,
    "epsilon_high": 0.28,
    "top_entropy_quantile": 0.8,
    "mask_truncated_completions": True,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": GROUP,
}


def weights(built):
    return torch.cat([p.detach().flatten() for p in built.model.parameters()])


def close(ours, plain):
    """Losses to float32 rounding; a loss is a sum in which terms of size 1 cancel."""
    return torch.allclose(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-6)


def test_every_loss_of_this_trl_is_in_the_list():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    named = re.findall(r'loss_type (?:==|in) (\[[^]]*\]|"\w+")', source)
    assert set(re.findall(r"\w+", " ".join(named))) == set(LOSSES)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("options", [OFF_POLICY, EVERYTHING], ids=["off policy", "everything"])
def test_uniform_attribution_reproduces_plain_grpo(loss_type, options):
    if loss_type == "sapo" and SAPO_BREAKS:
        pytest.skip("this TRL's sapo takes no advantages per token, and is refused")
    options = {**options, "loss_type": loss_type}
    signal = Grad2Reward(judge(), UNIFORM, SCALED)
    plain = trained(Written, [signal, length_reward], reward_weights=[1.0, 0.5], **options)
    dense = trained(Dense, [signal, length_reward], reward_weights=[1.0, 0.5], **options)
    assert dense.batches[0]["advantages"].shape == dense.batches[0]["completion_ids"].shape
    assert len(plain.losses) == options.get("max_steps", 2)
    assert any(abs(loss) > 1e-4 for loss in plain.losses)
    assert close(dense.losses, plain.losses)
    # Adam divides a gradient by its own size: rounding is amplified where a gradient is small.
    assert relative_error(weights(dense), weights(plain)) < 1e-4


def test_attributions_do_change_the_loss():
    """The test above compares nothing if attributions never reach the loss."""
    options = {**OFF_POLICY, "loss_type": "grpo"}
    plain = trained(Written, Grad2Reward(judge(), UNIFORM), **options)
    dense = trained(Dense, Grad2Reward(judge(), AttributionConfig(tau=0.05), SCALED), **options)
    assert not close(dense.losses, plain.losses)


def clipped_objective(policy, advantages, old_logps=None, epsilon=0.2):
    """`mean_i mean_t min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)`, and the log-probabilities.

    One rollout after the other, without padding, in plain PyTorch.
    """
    losses, all_logps = [], []
    for row, advantage in enumerate(advantages):
        prompt, ids = rollouts()[row]
        logits = policy(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        old = logps.detach() if old_logps is None else old_logps[row]
        ratio = (logps - old).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage).mean())
        all_logps.append(logps.detach())
    return torch.stack(losses).mean(), all_logps


def rollouts():
    """(prompt ids, completion ids) of every row of a batch, in its order."""
    rows = []
    for text in PROMPTS:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        rows += [(prompt, completion(text, place)) for place in range(GROUP)]
    return rows


def test_trl_checkpoints_gradients_by_default():
    """The other tests have it off, which saves time; what they are about does not depend on it."""
    assert GRPOConfig.__dataclass_fields__["gradient_checkpointing"].default is True


@pytest.mark.parametrize(
    ("estimator", "checkpointing"),
    [*((name, False) for name in ESTIMATORS[:3]), ("returns_pooled", True)],
)
def test_gradients_are_those_of_the_clipped_objective(estimator, checkpointing):
    """Also with gradient checkpointing, which TRL has on by default."""
    attribution, advantage = AttributionConfig(tau="auto"), AdvantageConfig(estimator)
    steps = Steps()
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 3e-4, "loss_type": "grpo"}
    options["gradient_checkpointing"] = checkpointing
    signal = Grad2Reward(judge(), attribution, advantage)
    built = trained(Dense, signal, callbacks=[steps], **options)
    assert checkpoints(built.model) == checkpointing

    prompts, responses = zip(*rollouts(), strict=True)
    items = [ITEMS] * len(prompts)
    out = attribute_batch(judge(), prompts, responses, items, GROUP, attribution, advantage)
    assert sum(float(row.std()) > 0.1 for row in out.token_advantages) > len(prompts) / 2
    policy, old_logps = model().requires_grad_(True), None
    for gradients, values in zip(steps.gradients, steps.weights, strict=True):
        policy.load_state_dict(values, strict=False)
        policy.zero_grad()
        loss, logps = clipped_objective(policy, out.token_advantages, old_logps)
        loss.backward()
        old_logps = logps if old_logps is None else old_logps
        expected = {name: p.grad for name, p in policy.named_parameters()}
        assert gradients.keys() == expected.keys()
        assert all(relative_error(gradients[n], expected[n]) < FLOAT32 for n in expected)


def test_a_ratio_per_sequence_is_refused():
    with pytest.raises(InputError, match=r"only their mean would be left; .* got 'sequence'"):
        trainer(Dense, Grad2Reward(judge()), importance_sampling_level="sequence")


@pytest.mark.skipif(not SAPO_BREAKS, reason="this TRL's sapo takes advantages per token")
def test_the_sapo_of_old_versions_is_refused():
    with pytest.raises(InputError, match=r"loss_type='sapo'.*TRL 0\.28 and newer"):
        trainer(Dense, Grad2Reward(judge()), loss_type="sapo")


class BroadcastsTheWrongWay(Written):
    """`[B, 1, T]` against `[B, T]`: every row gets the advantages of all."""

    def _compute_loss(self, model, inputs):
        advantages = inputs["advantages"]
        if advantages.dim() == 2:
            inputs = {**inputs, "advantages": advantages.unsqueeze(1)}
        return super()._compute_loss(model, inputs)


class TakesTheMean(Written):
    def _compute_loss(self, model, inputs):
        advantages = inputs["advantages"]
        if advantages.dim() == 2:
            inputs = {**inputs, "advantages": advantages.mean(1)}
        return super()._compute_loss(model, inputs)


class HasLiger(Written):
    def compute_liger_loss(self, unwrapped_model, inputs):
        raise NotImplementedError


@pytest.mark.parametrize("base", [BroadcastsTheWrongWay, TakesTheMean])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_loss_that_would_spread_or_mix_advantages_is_refused(base, loss_type):
    from g2r_fast.integrations.trl import Grad2RewardMixin

    kind = type("Refused", (Grad2RewardMixin, base), {})
    with pytest.raises(InputError, match="does not give every token its own advantage"):
        trainer(kind, Grad2Reward(judge()), loss_type=loss_type)


def test_ligers_fused_loss_is_refused():
    from g2r_fast.integrations.trl import Grad2RewardMixin
    from g2r_fast.integrations.trl.host import Host
    from g2r_fast.integrations.trl.token_loss import check_loss

    kind = type("Refused", (Grad2RewardMixin, HasLiger), {})
    built = trainer(kind, Grad2Reward(judge()))
    built.args.use_liger_kernel = True  # Liger itself need not be installed for this
    with pytest.raises(InputError, match="Liger's fused GRPO loss takes one advantage per seq"):
        check_loss(Host(built))


def test_the_check_leaves_no_traces():
    plain = trainer(Written, Grad2Reward(judge()))
    dense = trainer(Dense, Grad2Reward(judge()))
    assert dense.model.training == plain.model.training
    assert dense._metrics == plain._metrics
    assert set(vars(dense)) - set(vars(plain)) == {"_g2r_host", "_g2r_signal"}
