"""Two processes, each with half of a step's prompts: one gradient, one log, one set of weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_training_update import Recorder, accelerator, credit, rollouts
from tiny_models import tiny_model
from training_runs import TINY, small, weights
from two_processes import run_in_two_processes

from g2r_fast.training.config import TrainConfig
from g2r_fast.training.log import read_log
from g2r_fast.training.tasks import read_tasks, tasks_of_step
from g2r_fast.training.update import Updater

SCRIPT = Path(__file__).parent / "training_on_two.py"


LOSSES = ("sequence_mean", "token_mean")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_in_two_processes(SCRIPT, "update", str(folder), ",".join(LOSSES))
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_one_process(of_two: Path, loss: str) -> None:
    policy = copy.deepcopy(tiny_model("qwen2")).float().requires_grad_(True)
    optimizer = Recorder(policy.parameters())
    config = TrainConfig(method="grpo", loss=loss, kl=0.3, temperature=0.8, max_gradient_norm=1e9)
    Updater(policy, optimizer, config, accelerator())(rollouts(), credit(), 1, 0)
    for rank in (0, 1):
        (got,) = torch.load(of_two / f"{loss}-{rank}.pt")
        for one, two in zip(got, optimizer.seen[0], strict=True):
            assert float((one - two).norm() / two.norm()) < 2e-5


def test_a_run_in_two_processes(tmp_path: Path) -> None:
    """One log, by one process; and it goes on from its checkpoint where it was stopped."""
    tasks = read_tasks(TINY / "train.jsonl")
    for steps in (1, 2):
        config = small(tmp_path / "run", prompts_per_step=4, kl=0.05, steps=steps)
        (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
        run_in_two_processes(SCRIPT, "train", str(tmp_path), str(tmp_path / "run.json"))
        ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
        chosen = [str(task.prompt) for task in tasks_of_step(tasks, 4, steps, config.seed)]
        for (prompts, _), own in zip(ranks, (chosen[:2], chosen[2:]), strict=True):
            assert prompts == [[prompt for prompt in own for _ in range(config.group_size)]]
        for name, value in ranks[0][1].items():
            assert torch.equal(value, ranks[1][1][name]), name
        if steps == 1:
            shutil.rmtree(tmp_path / "run" / "final")
    lines = [line for line in read_log(tmp_path / "run") if "note" not in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[-1]["policy/kl"] >= 0 and lines[-1]["judge/changed"] == 0
    before, after = weights(TINY / "model"), weights(tmp_path / "run" / "final")
    assert not any(torch.equal(before[name].float(), after[name]) for name in after)
