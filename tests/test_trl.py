"""Grad2Reward inside TRL: the advantages that reach the loss."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from packaging.version import Version
from trl_batches import ALONE, DENSE, IDS, MESSAGES, ROWS, agree, attributed, prompt_ids, rows_of
from trl_processes import WithTools, every_third
from trl_runs import (
    GROUP,
    ITEMS,
    VERSION,
    Dense,
    Written,
    dataset,
    judge,
    length_reward,
    trained,
)

from g2r_fast import AdvantageConfig, attribute_batch
from g2r_fast.advantages import token_advantages
from g2r_fast.integrations.trl import Grad2Reward
from g2r_fast.integrations.trl import grad2reward as module


@pytest.mark.parametrize("estimator", ["returns_pooled", "rewards_pooled", "normalise_then_cumsum"])
@pytest.mark.parametrize("divide", [True, False])
def test_advantages_are_those_of_attribute_batch(estimator, divide):
    advantage = AdvantageConfig(estimator, divide)
    scale = "group" if divide else "none"
    built = trained(Dense, Grad2Reward(judge(), DENSE, advantage), scale_rewards=scale)
    assert agree(rows_of(built), attributed(advantage=advantage).token_advantages)


@pytest.mark.parametrize("scaffold", ["continuation", "grader"])
def test_scaled_sequence_is_trls_advantage_spread_by_mean_attribution(scaffold):
    by = judge(scaffold)
    built = trained(Dense, Grad2Reward(by, DENSE, AdvantageConfig("scaled_sequence")))
    plain = trained(Written, Grad2Reward(by)).batches[0]["advantages"]
    prompts = prompt_ids() if scaffold == "continuation" else MESSAGES
    out = attribute_batch(
        by, prompts, IDS, [ITEMS] * len(IDS), GROUP, DENSE, keep_attributions=True
    )
    for row, advantage, alphas in zip(rows_of(built), plain, out.attributions, strict=True):
        pairs = [(abs(i["points"]), a) for i, a in zip(ITEMS, alphas, strict=True) if a is not None]
        mean = sum(w * a for w, a in pairs) / sum(w for w, _ in pairs) if pairs else 1 / len(row)
        assert torch.allclose(row, advantage * len(row) * mean, rtol=1e-4, atol=1e-5)


def test_a_plain_trainer_and_a_dense_one_see_the_same_scores():
    plain = trained(Written, Grad2Reward(judge()))
    dense = trained(Dense, Grad2Reward(judge()))
    logs = [b.state.log_history[0]["rewards/grad2reward/mean"] for b in (plain, dense)]
    assert logs[0] == logs[1] == pytest.approx(float(attributed().scores.mean()))


def test_the_estimators_see_what_trl_masks_as_truncated():
    """As plain GRPO does: a truncated completion counts in its group, and has no loss itself."""
    signal = Grad2Reward(judge(), DENSE, ALONE)
    built = trained(Dense, signal, mask_truncated_completions=True)
    assert agree(rows_of(built), attributed().token_advantages)
    masks = built.batches[0]["completion_mask"]
    assert [bool(m.any()) for m in masks] == [bool(place % 2) for _, place in ROWS]


def test_what_tools_wrote_has_no_reward_and_is_not_counted():
    built = trained(WithTools, Grad2Reward(judge(), DENSE, ALONE))
    spans = [[(i, i + 1) for i, own in enumerate(every_third(ids)) if own] for ids in IDS]
    expected = attributed(spans=spans).token_advantages
    assert agree(rows_of(built), expected)
    for row, ids in zip(rows_of(built), IDS, strict=True):
        assert not row[1::3].any() and len(every_third(ids)) == len(row)
    assert not agree(rows_of(built), attributed().token_advantages)


@pytest.mark.parametrize("estimator", ["returns_pooled", "normalise_then_cumsum"])
def test_other_rewards_go_to_the_last_token(estimator):
    advantage = AdvantageConfig(estimator)
    functions = [length_reward, Grad2Reward(judge(), DENSE, advantage)]
    built = trained(Dense, functions, reward_weights=[0.5, 2.0])
    rewards = [2.0 * row for row in attributed().token_rewards]
    for row, ids in zip(rewards, IDS, strict=True):
        row[-1] += 0.5 * len(ids) / 10
    assert agree(rows_of(built), token_advantages(rewards, GROUP, advantage))


def test_a_completion_without_rubric_has_no_score_and_keeps_its_other_rewards():
    def none_for_some(completion_ids, **columns):
        return [None if len(ids) % 2 else 1.0 for ids in completion_ids]

    rubrics = [ITEMS, None]
    functions = [Grad2Reward(judge(), DENSE), none_for_some]
    built = trained(Dense, functions, train_dataset=dataset(rubrics))
    rewards = attributed().token_rewards
    for i, (row, ids) in enumerate(zip(rewards, IDS, strict=True)):
        if i >= GROUP:
            row.zero_()
        row[-1] += 0.0 if len(ids) % 2 else 1.0
    assert agree(rows_of(built), token_advantages(rewards, GROUP))
    assert built._g2r_signal.rewards[:, 0].isnan().tolist() == [False] * GROUP + [True] * GROUP


def test_a_batch_without_any_rubric_trains_by_nothing():
    built = trained(Dense, Grad2Reward(judge()), train_dataset=dataset([None, None]))
    assert not built.batches[0]["advantages"].any()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_reward_is_refused_by_name(value):
    def broken(completion_ids, **columns):
        return [value if i == 3 else 0.0 for i in range(len(completion_ids))]

    with pytest.raises(ValueError, match=r"a reward is not finite; .* first at row 3 of broken"):
        trained(Dense, [Grad2Reward(judge()), broken])


def test_arrow_gives_rubric_items_keys_that_they_do_not_have():
    first = [{"criterion": item["criterion"], "points": item["points"]} for item in ITEMS]
    second = [{"description": item["criterion"], "weight": item["points"]} for item in ITEMS]
    data = dataset([first, second])
    assert data[0]["rubrics"][0].keys() == {"criterion", "points", "description", "weight"}
    built = trained(Dense, Grad2Reward(judge(), DENSE, ALONE), train_dataset=data)
    assert agree(rows_of(built), attributed().token_advantages)


def test_attribution_runs_once_per_generated_batch(monkeypatch):
    calls = []
    run = module.attribute_batch
    monkeypatch.setattr(module, "attribute_batch", lambda *a, **k: calls.append(1) or run(*a, **k))
    options = {"per_device_train_batch_size": GROUP, "steps_per_generation": 2}
    options |= {"num_iterations": 2, "max_steps": 8, "gradient_accumulation_steps": 1}
    built = trained(Dense, Grad2Reward(judge(), DENSE), **options)
    assert len(built.losses) == 8 and len(built.batches) == len(calls) == 2


def test_micro_batches_take_the_advantages_of_their_rows():
    """Rows are shuffled and split after scoring; every one keeps its own advantages."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    seen = []

    class Watched(Dense):
        def _compute_loss(self, model, inputs):
            seen.append({name: inputs[name].clone() for name in ("completion_ids", "advantages")})
            return super()._compute_loss(model, inputs)

    built = trained(Watched, Grad2Reward(judge(), DENSE, ALONE), max_steps=1, **options)
    batch, seen = built.batches[0], seen[2:]  # without the check when the trainer was built
    expected = {
        tuple(i.tolist()): a
        for i, a in zip(batch["completion_ids"], batch["advantages"], strict=True)
    }
    rows = [
        (i, a)
        for part in seen
        for i, a in zip(part["completion_ids"], part["advantages"], strict=True)
    ]
    assert [len(part["advantages"]) for part in seen] == [2] * 4
    assert len(expected) == len(rows) == len(IDS)
    assert all(torch.equal(expected[tuple(i.tolist())], a) for i, a in rows)


@pytest.mark.skipif(Version("1.9") > VERSION, reason="this TRL has no pad_to_multiple_of")
def test_padding_of_trls_own_is_followed():
    built = trained(Dense, Grad2Reward(judge(), DENSE, ALONE), pad_to_multiple_of=16)
    assert built.batches[0]["advantages"].shape == (len(IDS), 16)
    assert agree(rows_of(built), attributed().token_advantages)


@pytest.mark.parametrize("generations", [GROUP, 2])
def test_evaluation(generations):
    options = {"num_generations_eval": generations, "per_device_eval_batch_size": GROUP}
    signal = Grad2Reward(judge(), DENSE, ALONE)
    built = trained(Dense, signal, eval_dataset=dataset(), **options)
    built.batches.clear()
    built.evaluate()
    found = built.state.log_history[-1]
    assert {"eval_loss", "eval_reward", "eval_grad2reward/entropy"} <= found.keys()
    batch = built.batches[0]["advantages"]
    assert batch.shape == built.batches[0]["completion_ids"].shape and batch.abs().max() > 0.1
    assert built.model.training is False and all(
        p.grad is None for p in signal.judge.model.parameters()
    )


def test_figures_are_logged():
    log = trained(Dense, Grad2Reward(judge(), DENSE)).state.log_history[0]
    stats = attributed().stats
    for figure in ("entropy", "top10_mass", "top1_mass"):
        assert log[f"grad2reward/{figure}"] == pytest.approx(stats[figure], rel=1e-4)
    assert log["grad2reward/seconds"] > 0.0
    assert log["grad2reward/frac_groups_without_signal"] == 0.0


@pytest.mark.skipif(Version("1.0") > VERSION, reason="this TRL divides by the spread of one reward")
def test_an_evaluation_with_groups_of_one_has_no_advantages():
    options = {"num_generations_eval": 1, "per_device_eval_batch_size": 2}
    built = trained(Dense, Grad2Reward(judge(), DENSE), eval_dataset=dataset(), **options)
    built.batches.clear()
    built.evaluate()
    assert not built.batches[0]["advantages"].any()
    assert built.batches[0]["advantages"].shape == built.batches[0]["completion_ids"].shape
