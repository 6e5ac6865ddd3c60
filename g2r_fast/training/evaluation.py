"""The policy's score on held-out prompts, by a checker that has no part in its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import TrainConfig
from .sampling import Sampler
from .tasks import Checker, Task, seed_of

__all__ = ["evaluate"]


def evaluate(
    policy: Any,
    sampler: Sampler,
    tasks: Sequence[Task],
    checker: Checker | None,
    config: TrainConfig,
    accelerator: Any,
) -> dict[str, float]:
    """`mean(checker(record, response))` over `evaluation_samples` responses to each prompt, and
    their mean length in tokens.

    The draws are the same at every evaluation, so what changes between two is the policy alone.
    Over all processes, each of which answers a part of the prompts.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    rollouts = sampler(
        policy,
        list(tasks[rank::processes]),
        config.evaluation_samples,
        seed_of(config.seed, "held out", rank),
    )
    rows = []
    for task, text, ids in zip(
        rollouts.tasks, rollouts.texts, rollouts.completion_ids, strict=True
    ):
        rows.append((0.0 if checker is None else float(checker(task.record, text)), len(ids)))
    if processes > 1:
        from accelerate.utils import gather_object

        rows = gather_object(rows)
    found = {"evaluation/length": sum(length for _, length in rows) / len(rows)}
    if checker is not None:
        found["evaluation/score"] = sum(score for score, _ in rows) / len(rows)
    return found
