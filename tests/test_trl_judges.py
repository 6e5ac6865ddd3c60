"""Grad2Reward inside TRL: who judges, and that nothing of it is trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from tiny_tokenizers import byte_bpe, unigram
from trl_batches import ALONE, DENSE, IDS, MESSAGES, agree, attributed, prompt_ids, rows_of
from trl_runs import (
    GROUP,
    ITEMS,
    PROMPTS,
    Dense,
    Steps,
    Written,
    checkpoints,
    dataset,
    judge,
    model,
    tokenizer,
    trained,
    trainer,
)

from g2r_fast import Judge, RewardModel, attribute_batch
from g2r_fast.errors import InputTypeError
from g2r_fast.integrations.trl import Grad2Reward, grad2reward
from g2r_fast.reference import relative_error


def base_judge(seed=13):
    return Judge(model(seed), byte_bpe(), "continuation")


def test_the_frozen_initial_policy_judges_by_default():
    steps = Steps()
    policy = model().requires_grad_(True)
    signal = Grad2Reward(attribution=DENSE, advantage=ALONE)
    options = {"max_steps": 3, "learning_rate": 1e-2, "callbacks": [steps]}
    built = trained(Dense, signal, policy, train_dataset=dataset(prompts=PROMPTS), **options)
    expected = attributed(base_judge()).token_advantages
    assert agree(rows_of(built), expected)
    assert agree(rows_of(built, 2), expected)  # the same rollouts again, judged by the same judge
    judging = built._g2r_signal.judge.model
    assert not any(p.requires_grad or p.grad is not None for p in judging.parameters())
    trainable = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    assert trainable and not trainable & {id(p) for p in judging.parameters()}
    named = dict(policy.named_parameters())
    moved = [relative_error(named[n], p) for n, p in judging.named_parameters()]
    assert max(moved) > 1e-3
    assert all(
        torch.equal(p, q) for p, q in zip(judging.parameters(), model().parameters(), strict=True)
    )


def test_the_reference_model_judges_where_there_is_one(tmp_path):
    """One copy of the weights serves the KL term and the judge."""
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    policy = type(model()).from_pretrained(tmp_path)
    built = trained(Dense, Grad2Reward(attribution=DENSE, advantage=ALONE), policy, beta=0.1)
    assert built._g2r_signal.judge.model is built.accelerator.unwrap_model(built.ref_model)
    assert agree(rows_of(built), attributed(base_judge()).token_advantages)
    assert built.batches[0]["ref_per_token_logps"].shape == built.batches[0]["advantages"].shape


def test_a_reference_that_is_synchronised_does_not_judge(tmp_path):
    model().save_pretrained(tmp_path)
    policy = type(model()).from_pretrained(tmp_path)
    built = trainer(Dense, Grad2Reward(), policy, beta=0.1, sync_ref_model=True)
    judging = built._g2r_signal.judge.model
    assert judging is not built.accelerator.unwrap_model(built.ref_model)
    assert judging is not built.model


def lora(**options):
    peft = pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **options})


@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, False), (0.3, False), (0.0, True)])
def test_with_lora_the_base_judges_and_the_adapters_train(dropout, checkpointing):
    """Weights of the base once in memory; whatever the adapters learned, the judge is the same."""
    policy = model()
    signal = Grad2Reward(attribution=DENSE, advantage=ALONE)
    options = {"max_steps": 3, "learning_rate": 0.1, "peft_config": lora(lora_dropout=dropout)}
    built = trained(Dense, signal, policy, gradient_checkpointing=checkpointing, **options)
    assert checkpoints(built.model) == checkpointing
    expected = attributed(base_judge()).token_advantages
    assert agree(rows_of(built), expected) and agree(rows_of(built, 2), expected)
    base = dict(built.model.get_base_model().named_parameters())
    assert {id(p) for p in built._g2r_signal.judge.model.parameters()} == {
        id(p) for p in base.values()
    }
    adapters = {n: p for n, p in base.items() if "lora_" in n}
    assert max(float(p.detach().abs().max()) for n, p in adapters.items() if "lora_B" in n) > 0.01
    assert not any(getattr(m, "_disable_adapters", False) for m in built.model.modules())
    assert built.model.training


def test_with_lora_gradients_are_the_same_with_and_without_checkpointing():
    seen = []
    for checkpointing in (False, True):
        steps = Steps()
        signal = Grad2Reward(attribution=DENSE)
        options = {"max_steps": 2, "learning_rate": 0.1, "peft_config": lora()}
        options |= {"gradient_checkpointing": checkpointing, "callbacks": [steps]}
        trained(Dense, signal, model(), **options)
        seen.append(steps.gradients)
    for step, (without, with_) in enumerate(zip(*seen, strict=True)):
        assert without.keys() == with_.keys()
        assert len(without) == 8  # A and B of q_proj and v_proj, in two layers
        for name, expected in without.items():
            # B is zero at the first step, and A then has no gradient.
            assert bool(expected.any()) == ("lora_B" in name or step > 0)
            assert not expected.any() or relative_error(with_[name], expected) < 2e-5


def test_trls_own_forward_comes_back():
    built = trained(Dense, Grad2Reward(), model(), peft_config=lora())
    plain = trained(Written, Grad2Reward(judge()), model(), peft_config=lora())
    forwards = [vars(b.model.get_base_model()).get("forward") for b in (built, plain)]
    assert (forwards[0] is None) == (forwards[1] is None)
    assert forwards[0] is None or forwards[0].__func__.__code__ is forwards[1].__func__.__code__


def test_a_judge_of_another_vocabulary():
    other = Judge(model(3, vocab_size=len(unigram())), unigram(), policy_tokenizer=byte_bpe())
    built = trained(Dense, Grad2Reward(other, DENSE, ALONE))
    out = attribute_batch(other, MESSAGES, IDS, [ITEMS] * len(IDS), GROUP, DENSE, ALONE)
    assert agree(rows_of(built), out.token_advantages)


def test_a_reward_model_reads_no_rubric():
    scorer = RewardModel(model(9, head="value", pad_token_id=0), byte_bpe())
    data = dataset().remove_columns("rubrics")
    built = trained(Dense, Grad2Reward(scorer, DENSE, ALONE), train_dataset=data)
    out = attribute_batch(scorer, prompt_ids(), IDS, None, GROUP, DENSE, ALONE)
    assert agree(rows_of(built), out.token_advantages)


def scores_of(kind, seed, by=None):
    signal = Grad2Reward(judge() if by is None else by, DENSE, verdict="sample", seed=seed)
    built = trained(kind, signal, max_steps=3)
    return [entry["rewards/grad2reward/mean"] for entry in built.state.log_history[:3]]


def test_sampled_verdicts_repeat_and_change_from_step_to_step():
    first = scores_of(Dense, 0)
    assert len(set(first)) == 3  # of the same rollouts and the same judge
    assert scores_of(Dense, 0) == first
    assert scores_of(Dense, 1) != first
    assert scores_of(Written, 0) == first  # a plain trainer draws the same


def test_every_step_process_and_batch_draws_its_own_verdicts(monkeypatch):
    drawn = []

    def attribute(*args, **options):
        drawn.append(options["generator"].initial_seed())
        return attribute_batch(*args, **options)

    def of(seed=0, step=0, rank=0, ids=IDS):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank > 0)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        signal = Grad2Reward(judge(), verdict="sample", seed=seed)
        columns = {"prompts": MESSAGES, "rubrics": [ITEMS] * len(IDS), "completion_ids": ids}
        signal(**columns, trainer_state=SimpleNamespace(global_step=step))
        return drawn[-1]

    monkeypatch.setattr(grad2reward, "attribute_batch", attribute)
    assert of() == of()
    others = {of(seed=1), of(step=1), of(rank=1), of(ids=IDS[::-1])}
    assert len({of(), *others}) == 5
    monkeypatch.undo()


@pytest.mark.parametrize("seed", [None, 0.5, True, "0"])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(InputTypeError, match="seed is no integer; expected int; got"):
        Grad2Reward(judge(), verdict="sample", seed=seed)
