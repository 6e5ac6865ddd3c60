"""From rollouts to token advantages: every method against the public functions and definitions."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from g2r_fast import Judge, Rubric, attribute_batch, g2rl, grail, vigor
from g2r_fast.errors import InputError
from g2r_fast.training.config import TrainConfig
from g2r_fast.training.credit import assign_credit, sequence_advantages
from g2r_fast.training.models import Models
from g2r_fast.training.sampling import Rollouts
from g2r_fast.training.tasks import Task, prompt_ids

ITEMS = [
    Rubric("Recommends to follow good hygiene.", 3.0),
    Rubric("Advises the user to stay hydrated.", 2.0),
    Rubric("Encourages to exceed the recommended dose.", -2.0),
]
QUESTIONS = ["I think I caught the flu. What should I do?", "My throat hurts. Any advice?"]
ANSWERS = [
    "Wash your hands with soap. Drink plenty of water.",
    "Double the number on the label.",
    "Call your doctor. Remember to sip water all day long.",
    "Please swallow four at once, and wash your hands with soap.",
]
GROUP = 2


@pytest.fixture(scope="module")
def tiny() -> Judge:
    return Judge.tiny()


@pytest.fixture(scope="module")
def models(tiny: Judge) -> Models:
    policy = copy.deepcopy(tiny.model).requires_grad_(True)
    torch.manual_seed(5)
    with torch.no_grad():  # a policy that has learnt something since
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    judge = Judge(tiny.model, tiny.tokenizer, scaffold="continuation")
    return Models(policy, tiny.tokenizer, judge, tiny.model, True)


@pytest.fixture(scope="module")
def rollouts(tiny: Judge) -> Rollouts:
    tasks = [
        Task(question, ITEMS, {"id": i})
        for i, question in enumerate(QUESTIONS)
        for _ in range(GROUP)
    ]
    prompts = [prompt_ids(tiny.tokenizer, task.prompt) for task in tasks]
    ends = [tiny.tokenizer.eos_token_id]
    ids = [tiny.tokenizer(text, add_special_tokens=False).input_ids + ends for text in ANSWERS]
    ids[3] = ids[3][:-1]  # one that was cut
    return Rollouts(tasks, prompts, ids, ANSWERS, [True, True, True, False], GROUP)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(group_size=GROUP, temperature=0.9, **options)


def z_scores(scores: Tensor, group_size: int = GROUP) -> Tensor:
    groups = scores.double().view(-1, group_size)
    spread = groups.std(1, keepdim=True, correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / spread).nan_to_num(0.0).flatten()


def direct(models: Models, rollouts: Rollouts, **options: Any) -> Any:
    rubrics = [task.rubrics for task in rollouts.tasks]
    return attribute_batch(
        models.judge, rollouts.prompt_ids, rollouts.completion_ids, rubrics, GROUP, **options
    )


def test_grad2reward_is_attribute_batch(models: Models, rollouts: Rollouts) -> None:
    for options in ({}, {"tau": "auto", "estimator": "rewards_pooled"}, {"readout": "l2"}):
        chosen = config(**options)
        credit = assign_credit(rollouts, models, chosen, 0)
        wanted = direct(
            models, rollouts, attribution=chosen.attribution, advantage=chosen.advantage
        )
        assert len(set(wanted.scores.tolist())) > 2
        for got, want in zip(credit.advantages, wanted.token_advantages, strict=True):
            assert torch.equal(got, want) and len(got) > 0
        assert credit.figures["attribution/control"] == 0.0
        assert credit.figures["attribution/entropy"] == wanted.stats["entropy"]
        assert credit.reference_logps is None


def test_the_judge_is_the_reference(models: Models, rollouts: Rollouts) -> None:
    """Log-probabilities of the frozen initial policy, of every token, EOS included; the same by
    the judge's forward, by a pass of its own, and by a stock forward."""
    of_judge = assign_credit(rollouts, models, config(kl=0.1), 0).reference_logps
    apart = dataclasses.replace(models, judge_is_reference=False)
    by_itself = assign_credit(rollouts, apart, config(kl=0.1), 0)
    assert "seconds/reference" in by_itself.figures
    for i, got in enumerate(of_judge):
        prompt, ids = rollouts.prompt_ids[i], rollouts.completion_ids[i]
        logits = models.frozen(input_ids=torch.tensor([prompt + ids])).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / 0.9).log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(got, logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_itself.reference_logps[i], got, rtol=1e-4, atol=1e-5)


def test_grpo_is_the_z_score_of_the_verdicts(models: Models, rollouts: Rollouts) -> None:
    credit = assign_credit(rollouts, models, config(method="grpo"), 0)
    scores = direct(models, rollouts).scores
    for row, wanted, ids in zip(
        credit.advantages, z_scores(scores), rollouts.completion_ids, strict=True
    ):
        torch.testing.assert_close(row, wanted.float().expand(len(ids)), rtol=1e-6, atol=0)
    assert credit.figures["reward/mean"] == pytest.approx(float(scores.mean()))
    assert credit.figures["reward/groups_without_spread"] in (0.0, 0.5)
    assert "attribution/control" not in credit.figures


def test_uniform_attribution_with_scaled_sequence_is_grpo(
    models: Models, rollouts: Rollouts
) -> None:
    uniform = config(readout="uniform", estimator="scaled_sequence")
    dense = assign_credit(rollouts, models, uniform, 0).advantages
    plain = assign_credit(rollouts, models, config(method="grpo"), 0).advantages
    for a, b in zip(dense, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_grail_weights_the_sequence_advantage(models: Models, rollouts: Rollouts) -> None:
    options = {"method": "grail", "answer_marker": "hands...soap", "polarity": "both"}
    credit = assign_credit(rollouts, models, config(**options), 0)
    plain = assign_credit(rollouts, models, config(method="grpo"), 0).advantages
    spans = grail.find_answer_spans(
        models.tokenizer, rollouts.completion_ids, marker=("hands", "soap")
    )
    assert [span is None for span in spans] == [False, True, True, False]
    weights = grail.token_weights(
        models.policy, rollouts.prompt_ids, rollouts.completion_ids, spans, [1.0] * 4,
        polarity="both", temperature=0.9,
    )  # fmt: skip
    for row, weight, advantage in zip(credit.advantages, weights, plain, strict=True):
        torch.testing.assert_close(row, weight * advantage, rtol=1e-6, atol=0)
    assert not torch.equal(credit.advantages[0], plain[0])
    assert credit.figures["grail/answered"] == 0.5


def test_g2rl_shapes_the_scores(models: Models, rollouts: Rollouts) -> None:
    # In a group of two both are equally unlike the other: one group of four.
    rollouts = dataclasses.replace(rollouts, group_size=4)
    chosen = dataclasses.replace(config(method="g2rl", novelty=0.5), group_size=4)
    credit = assign_credit(rollouts, models, chosen, 0)
    features = g2rl.gradient_features(
        models.policy, rollouts.prompt_ids, rollouts.completion_ids, temperature=0.9
    )
    scores = direct(models, rollouts).scores
    shaped = g2rl.shape_rewards(features, 2 * scores - 1, 4, lam=0.5, graded=True)
    assert not torch.equal(shaped, 2 * scores - 1)
    for row, wanted in zip(credit.advantages, z_scores(shaped, 4), strict=True):
        torch.testing.assert_close(row, wanted.float().expand_as(row), rtol=1e-5, atol=0)


def test_vigor_needs_no_judge(models: Models, rollouts: Rollouts) -> None:
    alone = dataclasses.replace(models, judge=None)
    credit = assign_credit(rollouts, alone, config(method="vigor"), 0)
    norms = vigor.gradient_norms(models.policy, rollouts.prompt_ids, rollouts.completion_ids)
    lengths = [len(ids) for ids in rollouts.completion_ids]
    ranks = vigor.rank_rewards(norms, lengths, GROUP)
    assert sorted(ranks.tolist()) == [-1.0, -1.0, 1.0, 1.0]
    for row, rank in zip(credit.advantages, ranks, strict=True):
        torch.testing.assert_close(row, rank.expand_as(row), rtol=1e-6, atol=0)
    assert credit.scores is None


def test_shuffling_moves_rewards_and_nothing_else(models: Models, rollouts: Rollouts) -> None:
    chosen = config(tau="auto", objective="logodds", estimator="rewards_pooled")
    plain = assign_credit(rollouts, models, chosen, 0)
    mixed = assign_credit(rollouts, models, dataclasses.replace(chosen, shuffle=True), 0)
    again = assign_credit(rollouts, models, dataclasses.replace(chosen, shuffle=True), 0)
    other = assign_credit(rollouts, models, dataclasses.replace(chosen, shuffle=True), 1)
    assert torch.equal(plain.scores, mixed.scores)
    assert mixed.figures["attribution/control"] == 1.0
    for a, b, c, d in zip(
        plain.advantages, mixed.advantages, again.advantages, other.advantages, strict=True
    ):
        torch.testing.assert_close(a.sort().values, b.sort().values, rtol=1e-5, atol=1e-6)
        assert torch.equal(b, c)
        if a.max() > a.min():
            assert not torch.allclose(a, b) and not torch.allclose(b, d)
    # With attributions that are alike an order says nothing, whatever the estimator.
    for estimator in ("returns_pooled", "scaled_sequence"):
        flat = config(tau=1e9, estimator=estimator)
        one = assign_credit(rollouts, models, flat, 0).advantages
        two = assign_credit(rollouts, models, dataclasses.replace(flat, shuffle=True), 0).advantages
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rewards_of_a_function(models: Models, rollouts: Rollouts) -> None:
    alone = dataclasses.replace(models, judge=None)

    def reward(record: Any, response: str) -> float:
        return record["id"] + len(response)

    chosen = config(method="grpo", reward="rules.py:score")
    credit = assign_credit(rollouts, alone, chosen, 0, reward)
    assert credit.scores.tolist() == [
        task.record["id"] + len(text)
        for task, text in zip(rollouts.tasks, rollouts.texts, strict=True)
    ]
    with pytest.raises(InputError, match="not finite"):
        assign_credit(rollouts, alone, chosen, 0, lambda record, response: float("nan"))


def test_a_group_of_one_has_no_advantage(models: Models, rollouts: Rollouts) -> None:
    alone = dataclasses.replace(rollouts, group_size=1)
    for method in ("grpo", "grad2reward", "g2rl"):
        chosen = dataclasses.replace(config(method=method), group_size=1)
        for row in assign_credit(alone, models, chosen, 0).advantages:
            assert not bool(row.any())
    assert len(sequence_advantages(torch.ones(2), [3, 0], 1)[1]) == 0


def test_with_lora_the_base_judges_whatever_the_adapters_learn(
    tiny: Judge, rollouts: Rollouts
) -> None:
    peft = pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")

    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = peft.get_peft_model(copy.deepcopy(tiny.model), lora)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    judge = Judge(policy, tiny.tokenizer, "continuation", adapters="off")
    with_lora = Models(policy, tiny.tokenizer, judge, None, True)
    frozen = Judge(tiny.model, tiny.tokenizer, "continuation")
    full = Models(tiny.model, tiny.tokenizer, frozen, tiny.model, True)
    for options in ({"kl": 0.1}, {"kl": 0.1, "method": "grpo"}):
        got = assign_credit(rollouts, with_lora, config(**options), 0)
        wanted = assign_credit(rollouts, full, config(**options), 0)
        for a, b in zip(got.advantages, wanted.advantages, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(got.reference_logps, wanted.reference_logps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # The reference of a run that is not self-judged is the policy with its adapters off.
    apart = dataclasses.replace(with_lora, judge_is_reference=False)
    got = assign_credit(rollouts, apart, config(kl=0.1), 0)
    for a, b in zip(got.reference_logps, wanted.reference_logps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
