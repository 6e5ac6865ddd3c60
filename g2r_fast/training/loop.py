"""`train`: rollouts, credit, update, again; everything a run does, top to bottom.

Where this differs from arXiv 2602.01791, first:

- Sampling temperature divides the logits wherever log-probabilities are taken (ratio, KL term,
  entropy); top-p and top-k cut the sampling only, as in every trainer we looked at.
- The policy that sampled is the one that is updated, so with one iteration and one minibatch the
  ratio is 1 and nothing is clipped; the paper gives no number of updates per batch.
- `kl` is 0 by default, as Eq. 10 shows no KL term; where it is positive the reference is the frozen
  initial policy, and self-judging its log-probabilities come from the judge's own forward.
- The judge's question is asked as the next turn after the rollout (scaffold "continuation"), which
  makes the judge's pass the reference model's; the paper does not print its prompt.
- Weight decay is 0, the learning rate constant after `warmup`, gradients are clipped to norm 1; the
  paper gives the learning rate alone.
- The literal tau = 1 on log p is the default. A sure judge sends so little back that its
  attribution is uniform: the alarm says so, and `tau="auto"` is the way out.
- A response cut at `max_new_tokens` is judged and trained on like any other, unless
  `mask_truncated` leaves it out of the loss.
- The model's own generation settings (a repetition penalty, say) have no part in sampling.
- The KL term is the estimate `exp(d) - d - 1` (arXiv 2402.03300), on the tokens that were sampled.
- A judge beside the policy is asked in one user turn (scaffold "grader").
- With vLLM the ratio is to this model's own log-probabilities, not to those vLLM sampled by.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import InputError
from .alarms import Alarm, Alarms
from .config import TrainConfig
from .credit import assign_credit
from .evaluation import evaluate
from .log import RunLog
from .models import Models, check_positions, load_models
from .processes import Clock, new_accelerator, over_processes, share_of_prompts
from .progress import Progress
from .run_folder import RunFolder
from .sampling import new_sampler
from .tasks import Task, load_function, read_tasks, seed_of, tasks_of_step
from .update import Updater
from .watches import CanaryWatch, JudgeWatch

__all__ = ["train"]

CANARY_PROMPTS = 8


def train(config: TrainConfig) -> Path:
    """Trains `config.model` and returns the folder of its final weights, `output/final`.

    A run that was stopped, in whatever way, goes on from its last checkpoint when it is started
    again with the same settings; on a CPU its weights are bit-equal to those of a run that was not
    stopped. A finished run is not run again.

    Under `accelerate launch` every process takes an equal share of a step's prompts, whole groups.

    Raises InputError for settings, data and models that cannot be used, and where `output` holds a
    run with other settings or other data, or another process trains there.
    """
    accelerator = new_accelerator()
    with RunFolder.open(config, accelerator) as folder:
        if not folder.is_finished():
            _run(config, accelerator, folder)
        accelerator.wait_for_everyone()
    return folder.final


def _run(config: TrainConfig, accelerator: Any, folder: RunFolder) -> None:
    main = accelerator.is_main_process
    share = share_of_prompts(config, accelerator)
    needs_judge = config.reward is None and config.method != "vigor"
    tasks = read_tasks(config.data, need_rubrics=needs_judge)
    held_out = read_tasks(config.held_out, need_rubrics=False) if config.held_out else []
    reward = load_function(config.reward) if config.reward else None
    checker = load_function(config.checker) if config.checker else None

    models = load_models(config, accelerator.device)
    check_positions(models, config, [*tasks, *held_out])
    optimizer = torch.optim.AdamW(
        [p for p in models.policy.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    policy, optimizer = accelerator.prepare(models.policy, optimizer)
    update = Updater(policy, optimizer, config, accelerator)
    sampler = new_sampler(config, models.tokenizer, models.eos_ids)
    judge_watch = None
    if models.judge is not None:
        judge_watch = JudgeWatch(models.judge.model, models.judge.adapters)
    canaries = _canaries(config, models, tasks)
    alarms = Alarms(config.alarms)
    first = folder.resume(models, optimizer, alarms, judge_watch)

    with ExitStack() as stack:
        stack.enter_context(_alarms_told_once())
        log = progress = None
        if main:  # only one process writes
            last = first - 1 if first > 1 else None
            log = stack.enter_context(RunLog(folder.path, last, config.trackers, config.to_dict()))
            for change in folder.changes:
                log.note("settings", change)
            console = None if config.progress else Console(stderr=True, force_terminal=False)
            progress = stack.enter_context(Progress(config.steps, first, console=console))
            for text in config.without_effect():
                if first == 1:
                    log.note("settings", text)
                progress.say(text)

        def tell(figures: dict[str, float]) -> None:
            if log is not None and progress is not None:
                log.write(figures)
                if config.progress:
                    progress.step(figures)

        def warn(alarm: Alarm) -> None:
            if log is not None and progress is not None:
                log.note("alarm", alarm.text)
                progress.alarm(alarm)

        if config.evaluate_every and first == 1:
            found = evaluate(models.policy, sampler, held_out, checker, config, accelerator)
            tell({"step": 0.0, **found})
        for step in range(first, config.steps + 1):
            started, clock = time.perf_counter(), Clock(accelerator.device)
            seed = seed_of(config.seed, step, accelerator.process_index)
            chosen = tasks_of_step(tasks, config.prompts_per_step, step, config.seed)
            mine = chosen[accelerator.process_index * share :][:share]
            rollouts = sampler(models.policy, mine, config.group_size, seed)
            figures = {"seconds/sample": clock.lap()}
            try:
                credit = assign_credit(rollouts, models, config, seed, reward)
            except InputError as error:  # a judge whose logits are not finite, say
                warn(Alarm("no rewards", f"step {step} cannot be rewarded: {error}"))
                raise
            parts = ("seconds/gradient", "seconds/reference")
            figures["seconds/judge"] = clock.lap() - sum(credit.figures.get(p, 0.0) for p in parts)
            figures |= credit.figures
            figures |= update(rollouts, credit, step, seed)
            figures["seconds/update"] = clock.lap()

            lengths = [len(ids) for ids in rollouts.completion_ids]
            figures["response/length"] = sum(lengths) / len(lengths)
            figures["response/truncated"] = 1 - sum(rollouts.finished) / len(lengths)
            if config.evaluate_every and step % config.evaluate_every == 0:
                figures |= evaluate(models.policy, sampler, held_out, checker, config, accelerator)
                figures["seconds/evaluation"] = clock.lap()
            if canaries is not None and (step - 1) % config.canaries_every == 0:
                figures |= canaries.figures()
            if judge_watch is not None:
                figures |= judge_watch.figures()
            figures["seconds/step"] = time.perf_counter() - started
            figures = {"step": float(step), **over_processes(figures, accelerator)}
            raised = alarms.of_step(figures)
            tell(figures)
            for alarm in raised:
                warn(alarm)
            if main and (step % config.checkpoint_every == 0 or step == config.steps):
                folder.checkpoint(step, models, optimizer, alarms)
    if main:
        _plot(folder.path)
        folder.finish(models)


def _canaries(config: TrainConfig, models: Models, tasks: list[Task]) -> CanaryWatch | None:
    if not config.canaries_every or models.judge is None:
        return None
    return CanaryWatch(
        models.judge,
        [task.prompt for task in tasks],
        [task.rubrics for task in tasks],
        sample=CANARY_PROMPTS,
        # No more rows side by side than in the update: a check is not what memory runs out by.
        max_tokens=config.max_tokens or config.micro_batch_tokens,
    )


def _plot(folder: Path) -> None:
    from .plot import plot

    try:
        plot(folder)
    except InputError as error:  # no matplotlib: the log has it all
        print(error, file=sys.stderr)


@contextmanager
def _alarms_told_once() -> Iterator[None]:
    """`attribute_batch` warns of every batch; in a run the alarms say the same, and say it once."""
    logger = logging.getLogger("g2r_fast")

    def is_another(record: logging.LogRecord) -> bool:
        return record.funcName != "attribute_batch" or record.levelno != logging.WARNING

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)
