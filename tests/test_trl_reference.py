"""Inside TRL as in `g2r_fast.training`: the same gradients on the same rollouts, at every step."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from test_training_update import accelerator
from tiny_tokenizers import byte_bpe
from trl_batches import IDS, ROWS, prompt_ids
from trl_runs import GROUP, ITEMS, Dense, Steps, judge, model, tokenizer, trained

from g2r_fast import Judge
from g2r_fast.integrations.trl import Grad2Reward
from g2r_fast.reference import relative_error
from g2r_fast.rubric import as_rubric
from g2r_fast.training.config import TrainConfig
from g2r_fast.training.credit import assign_credit
from g2r_fast.training.models import Models
from g2r_fast.training.sampling import Rollouts
from g2r_fast.training.tasks import Task
from g2r_fast.training.update import Updater

FLOAT32 = 2e-5
OFF_POLICY = {"iterations": 2, "learning_rate": 0.003}
# Settings of the reference loop; the judge is given where they do not say that it judges itself.
CASES: dict[str, dict[str, Any]] = {
    "returns_pooled": {},
    "rewards_pooled": {"estimator": "rewards_pooled"},
    "normalise_then_cumsum": {"estimator": "normalise_then_cumsum"},
    # Undivided: the advantage of a sequence is TRL's, whose standard deviation is another.
    "scaled_sequence": {"estimator": "scaled_sequence", "divide_by_std": False},
    "off policy": OFF_POLICY,
    "kl": {**OFF_POLICY, "kl": 0.3},
    "self-judging": {**OFF_POLICY, "self_judging": True},
    "self-judging, kl": {**OFF_POLICY, "kl": 0.3, "self_judging": True},
}


class Recorder(torch.optim.SGD):
    """Keeps every gradient that it steps by. Adam would amplify the rounding of small ones."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.seen: list[list[torch.Tensor]] = []

    def step(self, closure: Any = None) -> None:
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        super().step(closure)


def in_the_reference_loop(config, given_judge):
    """The gradients of two sets of rollouts, which are alike, and the second update's figures."""
    policy, frozen = model().requires_grad_(True), model()
    by = Judge(frozen, byte_bpe(), "continuation") if given_judge is None else given_judge
    models = Models(policy, tokenizer(), by, frozen, judge_is_reference=given_judge is None)
    tasks = [Task(text, [as_rubric(item) for item in ITEMS], {}) for text, _ in ROWS]
    batch = Rollouts(tasks, prompt_ids(), IDS, [""] * len(tasks), [True] * len(tasks), GROUP)
    recorder = Recorder(policy.parameters(), config.learning_rate)
    update = Updater(policy, recorder, config, accelerator())
    for step in (1, 2):
        figures = update(batch, assign_credit(batch, models, config, step), step, step)
    return recorder.seen, figures


def in_trl(config, given_judge):
    policy = type(model()).from_pretrained(config.model)  # by its name TRL finds the reference
    steps = Steps()
    trained(
        Dense,
        Grad2Reward(given_judge, config.attribution, config.advantage),
        policy,
        callbacks=[steps],
        optimizers=(torch.optim.SGD(policy.parameters(), lr=config.learning_rate), None),
        lr_scheduler_type="constant",
        loss_type="grpo",
        scale_rewards="group" if config.divide_by_std else "none",
        temperature=config.temperature,
        beta=config.kl,
        use_bias_correction_kl=False,  # or TRL's newest multiplies its estimate by the ratio
        num_iterations=config.iterations,
        max_steps=2 * config.iterations,
    )
    return steps.gradients, [name for name, _ in policy.named_parameters()]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference_loop(case):
    options = dict(CASES[case])
    given_judge = None if options.pop("self_judging", False) else judge()
    with tempfile.TemporaryDirectory() as folder:
        model().save_pretrained(folder)
        config = TrainConfig(
            model=folder, tau="auto", group_size=GROUP, temperature=0.7, max_gradient_norm=1e9,
            micro_batch_tokens=100, **{"learning_rate": 1e-3, **options},
        )  # fmt: skip
        expected, figures = in_the_reference_loop(config, given_judge)
        ours, names = in_trl(config, given_judge)
    assert len(ours) == len(expected) == 2 * config.iterations
    for step, (gradients, wanted) in enumerate(zip(ours, expected, strict=True)):
        assert gradients.keys() == set(names)
        for name, of_name in zip(names, wanted, strict=True):
            assert relative_error(gradients[name], of_name) < FLOAT32, (step, name)
    # Nothing is compared where the policy stays as it is.
    assert (figures["policy/clipped"] > 0.05) == (config.iterations > 1)
    assert not config.kl or figures["policy/kl"] > 1e-3
