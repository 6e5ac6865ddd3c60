"""Two processes, each with half of a step's prompts: one gradient, one log, one set of weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_training_update import Recorder, accelerator, credit, rollouts
from tiny_models import tiny_model
from two_processes import run_in_two_processes

from g2r_fast.training.config import TrainConfig
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
