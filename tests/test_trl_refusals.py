"""What the signals refuse inside TRL, and a TRL that is no longer what it was."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from packaging.version import Version
from tiny_tokenizers import byte_bpe, unigram
from trl_batches import ALONE, DENSE, agree, attributed, rows_of
from trl_runs import (
    VERSION,
    Dense,
    Written,
    config,
    dataset,
    judge,
    length_reward,
    model,
    trained,
    trainer,
)

from g2r_fast import AdvantageConfig, Judge
from g2r_fast.integrations.trl import Grad2Reward, Grad2RewardMixin, Vigor


def twice():
    return [Grad2Reward(judge()), Vigor()]


def shared_weights():
    policy = model().requires_grad_(True)
    return policy, Grad2Reward(Judge(policy, byte_bpe(), "continuation"))


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        (lambda: [length_reward], {}, "reward_funcs has no signal; .* got plain reward functions"),
        (twice, {}, "reward_funcs has several signals; .* got Grad2Reward, Vigor"),
        (lambda: Grad2Reward(judge()), {"scale_rewards": "batch"}, 'scale_rewards="batch" has no'),
        (lambda: Grad2Reward(judge()), {"scale_rewards": "none"}, "contradict each other"),
        (
            lambda: Grad2Reward(judge(), advantage=AdvantageConfig("scaled_sequence", False)),
            {},
            "contradict each other; .* got scale_rewards='group' and divide_by_std=False",
        ),
        (
            lambda: [Grad2Reward(judge(), advantage=ALONE), length_reward],
            {},
            "no token to go to with the estimator 'rewards_pooled'.* got grad2reward, length_re",
        ),
        (
            lambda: Grad2Reward(Judge(model(3, vocab_size=len(unigram())), unigram())),
            {},
            "the judge has another tokenizer than the policy",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_when_the_trainer_is_built(functions, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(Dense, functions(), **options)


@pytest.mark.skipif(Version("1.0") > VERSION, reason="this TRL aggregates rewards in one way only")
def test_another_aggregation_is_refused_where_it_would_be_ignored():
    options = {"multi_objective_aggregation": "normalize_then_sum"}
    with pytest.raises(ValueError, match="normalize_then_sum' has no counterpart"):
        trainer(Dense, [Grad2Reward(judge()), length_reward], **options)
    scaled = Grad2Reward(judge(), advantage=AdvantageConfig("scaled_sequence"))
    trainer(Dense, [scaled, length_reward], **options)


def test_the_policy_itself_is_no_judge():
    policy, signal = shared_weights()
    with pytest.raises(ValueError, match="the judge is the policy in training"):
        trainer(Dense, signal, policy)


def test_a_missing_column_is_named():
    data = dataset().rename_column("rubrics", "criteria")
    with pytest.raises(ValueError, match=r"no column 'rubrics'; .* got columns criteria\. Name"):
        trained(Dense, Grad2Reward(judge()), train_dataset=data)
    built = trained(
        Dense, Grad2Reward(judge(), DENSE, ALONE, rubrics="criteria"), train_dataset=data
    )
    assert agree(rows_of(built), attributed().token_advantages)


def test_no_judge_and_options_for_one():
    with pytest.raises(TypeError, match=r"judge is not a Judge; expected Judge\(model"):
        Grad2Reward(judge().model)
    with pytest.raises(TypeError, match=r"advantage cannot be read; expected AdvantageConfig\("):
        Grad2Reward(judge(), advantage="returns_pooled")
    with pytest.raises(ValueError, match="unknown verdict"):
        Grad2Reward(judge(), verdict="maximum")
    with pytest.raises(ValueError, match="judge_options are for a judge that is made here"):
        Grad2Reward(judge(), judge_options={"true": "Yes"})
    built = trainer(Dense, Grad2Reward(judge_options={"true": " kind", "scaffold": "grader"}))
    assert built._g2r_signal.judge.scaffold == "grader"


def test_signals_outside_of_the_mixin():
    for signal in (Grad2Reward(), Vigor()):
        with pytest.raises(ValueError, match=f"{type(signal).__name__} needs a trainer with Grad2"):
            trained(Written, signal)


def test_the_mixin_stands_first():
    with pytest.raises(TypeError, match="has the mixin behind GRPOTrainer, which would not see it"):
        type("Wrong", (Written.__mro__[1], Grad2RewardMixin), {})


def test_the_users_list_of_functions_stays_as_it_is():
    functions = [length_reward, Grad2Reward(judge())]
    before = list(functions)
    trained(Dense, functions)
    assert functions == before


def test_sharded_weights_are_refused_where_they_would_be_read(monkeypatch):
    class Sharded(Written):
        """Claims to be sharded once it is built."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_fsdp_enabled = True

    Sharded = type("Sharded", (Grad2RewardMixin, Sharded), {})
    for signal in (Grad2Reward(), Vigor()):
        with pytest.raises(ValueError, match="this process holds a part of them only"):
            trainer(Sharded, signal)
    trainer(Sharded, Grad2Reward(judge()))


# TRL itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.25.1", "0.9.6"])
def test_an_older_trl_is_refused(version, monkeypatch):
    monkeypatch.setattr("trl.__version__", version)
    with pytest.raises(ValueError, match=rf"TRL is too old.*got TRL {version}\. pip install"):
        trainer(Dense, Grad2Reward(judge()))


def test_without_trl(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(
        ValueError, match=r"TRL cannot be imported; .*pip install 'g2r_fast\[trl\]'"
    ):
        Dense(model(), Grad2Reward(judge()))


@pytest.mark.parametrize("name", ["_generate", "_calculate_rewards", "_compute_loss"])
def test_a_method_that_moved_is_named(name, monkeypatch):
    from trl import GRPOTrainer

    monkeypatch.delattr(GRPOTrainer, name)
    kind = type("Moved", (Grad2RewardMixin, GRPOTrainer), {name: None})
    with pytest.raises(
        ValueError, match=rf"Moved has no method {name}; TRL, .* is not as TRL 0\.26"
    ):
        kind(model(), Grad2Reward(judge()), args=config())


@pytest.mark.parametrize("name", ["_metrics", "num_generations_eval", "temperature"])
def test_an_attribute_that_moved_is_named(name):
    class Moved(Written):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            delattr(self, name)

    kind = type("Dense", (Grad2RewardMixin, Moved), {})
    with pytest.raises(ValueError, match=f"the trainer has no {name}; TRL, or the trainer"):
        trainer(kind, Grad2Reward(judge()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: (None, *found[1:]), "what _generate returned cannot be read"),
        (lambda found: (found[0][1:], *found[1:]), "of _generate differ in length"),
        (lambda found: (*found[:2], [[1]] * 8, *found[3:]), "of _generate differ in length"),
    ],
)
def test_rollouts_of_another_form_are_seen(change, message):
    class Moved(Written):
        def _generate(self, prompts):
            return change(super()._generate(prompts))

    kind = type("Dense", (Grad2RewardMixin, Moved), {})
    with pytest.raises(ValueError, match=message):
        trained(kind, Grad2Reward(judge()))


def swapped(output):
    return {**output, "completion_ids": output["completion_ids"].flip(0)}


def fewer(output):
    return {name: value[:4] if value.ndim else value for name, value in output.items()}


@pytest.mark.parametrize("change", [swapped, fewer])
def test_rows_that_were_changed_after_scoring_are_seen(change):
    """As a replay buffer does: advantages of what was sampled would go to other rows."""

    class Replays(Written):
        def _generate_and_score_completions(self, inputs):
            return change(super()._generate_and_score_completions(inputs))

    kind = type("Dense", (Grad2RewardMixin, Replays), {})
    with pytest.raises(ValueError, match="returned other rows than _generate"):
        trained(kind, Grad2Reward(judge()))
