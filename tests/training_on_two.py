"""Run by tests/test_training_processes.py in each of two processes: an update, and a whole run.

python tests/training_on_two.py update FOLDER LOSS
python tests/training_on_two.py train FOLDER CONFIG.json
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_training_update import Recorder, credit, rollouts
from tiny_models import tiny_model
from torch import Tensor

from g2r_fast.training import loop
from g2r_fast.training.config import TrainConfig, config_of
from g2r_fast.training.update import Updater


def update(folder: Path, losses: str) -> None:
    accelerator = Accelerator(cpu=True)
    for loss in losses.split(","):
        seen = gradients(accelerator, loss)
        torch.save(seen, folder / f"{loss}-{accelerator.process_index}.pt")


def gradients(accelerator: Accelerator, loss: str) -> list[list[Tensor]]:
    """Each process has every other row; gradients are averaged between them."""
    policy = copy.deepcopy(tiny_model("qwen2")).float().requires_grad_(True)
    optimizer = Recorder(policy.parameters())
    wrapped = accelerator.prepare_model(policy)
    rank, whole, given = accelerator.process_index, rollouts(), credit()
    rows = list(range(rank, len(whole), 2))
    mine = dataclasses.replace(
        whole,
        prompt_ids=[whole.prompt_ids[i] for i in rows],
        completion_ids=[whole.completion_ids[i] for i in rows],
        texts=[""] * len(rows),
        finished=[True] * len(rows),
    )
    own = dataclasses.replace(
        given,
        advantages=[given.advantages[i] for i in rows],
        reference_logps=[given.reference_logps[i] for i in rows],
    )
    config = TrainConfig(
        method="grpo", loss=loss, kl=0.3, micro_batch_tokens=20 if rank else 1000,
        temperature=0.8, max_gradient_norm=1e9,
    )  # fmt: skip
    Updater(wrapped, optimizer, config, accelerator)(mine, own, 1, 0)
    return optimizer.seen


def run(folder: Path, config: str) -> None:
    """Each process leaves the prompts of its responses by step, and the weights it ends with."""
    seen, models_of, rank = [], [], os.environ["RANK"]
    assign_credit = loop.assign_credit

    def recorded(rollouts, models, *arguments):
        seen.append([str(task.prompt) for task in rollouts.tasks])
        models_of.append(models)
        return assign_credit(rollouts, models, *arguments)

    loop.assign_credit = recorded
    loop.train(config_of(json.loads(Path(config).read_text())))
    torch.save((seen, models_of[-1].policy.state_dict()), folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, value = sys.argv[1:]
    {"update": update, "train": run}[what](Path(folder), value)
