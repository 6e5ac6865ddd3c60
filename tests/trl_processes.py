"""Trainings whose outcome may not depend on the number of processes; run by several, it writes
what came out into a file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from trl_runs import (
    GROUP,
    LOSSES,
    SAPO_BREAKS,
    Dense,
    Written,
    judge,
    length_reward,
    model,
    sign_reward,
    trained,
)

from g2r_fast import AdvantageConfig, AttributionConfig
from g2r_fast.integrations.trl import G2RL, Grad2Reward, Grail, Vigor

DENSE = AttributionConfig(tau="auto")
UNIFORM, SCALED = AttributionConfig(readout="uniform"), AdvantageConfig("scaled_sequence")


def every_third(ids: list[int]) -> list[int]:
    """A tool wrote every third token."""
    return [int(place % 3 != 1) for place in range(len(ids))]


class WithTools(Dense):
    tool_mask = staticmethod(every_third)


class OfOneProcess(Dense):
    """A planted bug: every process takes its own rows for those of all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        host = self._g2r_host
        host.gather_rows = lambda rows: list(rows) * host.accelerator.num_processes


def beside(signal: Any) -> list[Any]:
    return [signal, length_reward]


# Name: (kind of trainer, its reward functions, options)
TRAININGS: dict[str, tuple[type, Callable[[], Any], dict[str, Any]]] = {
    "plain": (Written, lambda: beside(Grad2Reward(judge(), UNIFORM)), {}),
    "uniform": (Dense, lambda: beside(Grad2Reward(judge(), UNIFORM, SCALED)), {}),
    "dense": (Dense, lambda: beside(Grad2Reward(judge("grader"), DENSE)), {}),
    "dapo": (Dense, lambda: Grad2Reward(judge(), DENSE), {"loss_type": "dapo"}),
    "tools": (WithTools, lambda: Grad2Reward(judge(), DENSE), {}),
    "self-judging": (Dense, lambda: Grad2Reward(attribution=DENSE), {}),
    "grail": (Dense, lambda: Grail(sign_reward, polarity="both", marker=MARKER), {}),
    "g2rl": (Dense, lambda: G2RL(sign_reward), {}),
    "vigor": (Dense, lambda: Vigor(), {}),
    "planted": (OfOneProcess, lambda: beside(Grad2Reward(judge("grader"), DENSE)), {}),
}
# Plain GRPO and uniform attribution by every loss: some of TRL's own say another thing in two
# processes than in one, so that the two are compared with each other.
BY_LOSS: dict[str, tuple[type, Callable[[], Any], dict[str, Any]]] = {
    f"{name}, {loss}": (*TRAININGS[name][:2], {"loss_type": loss, "max_steps": 2})
    for loss in LOSSES
    for name in ("plain", "uniform")
    if loss != "grpo" and not (loss == "sapo" and SAPO_BREAKS)
}
MARKER = "("  # where GRAIL finds an answer in the written completions


def outcome(name: str, processes: int) -> dict[str, Any]:
    """Two groups of four, each over all processes and looked at twice."""
    kind, functions, options = {**TRAININGS, **BY_LOSS}[name]
    policy = model().requires_grad_(True)
    options = {
        "per_device_train_batch_size": GROUP // processes,
        "num_iterations": 2,
        "max_steps": 4,
        **options,
    }
    built = trained(kind, functions(), policy, **{"loss_type": "grpo", **options})
    rows = []
    for batch in built.batches:
        advantages, ids = batch["advantages"], batch["completion_ids"]
        lengths = (ids != built.processing_class.pad_token_id).sum(1).tolist()
        rows += [
            row[:n].tolist() if row.ndim else row.item()
            for row, n in zip(advantages, lengths, strict=True)
        ]
    half = len(rows) // 2
    return {
        "advantages": [gather_object(rows[:half]), gather_object(rows[half:])],
        "losses": torch.tensor(gather_object(built.losses)).view(processes, -1).mean(0).tolist(),
        "weights": torch.cat([p.detach().flatten() for p in policy.parameters()]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    found = {name: outcome(name, processes) for name in [*TRAININGS, *BY_LOSS]}
    if os.environ["RANK"] == "0":
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()  # a process that leaves takes the other's connection with it
    # All is done and written. At an ordinary exit threads of the libraries abort now and then.
    os._exit(0)
