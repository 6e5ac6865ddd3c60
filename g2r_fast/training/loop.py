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
- A response cut at `max_new_tokens` is judged and trained on like any other.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import InputError
from .alarms import Alarms
from .checkpoints import latest_checkpoint, load_checkpoint, replace_folder, save_checkpoint
from .config import TrainConfig
from .credit import assign_credit
from .evaluation import evaluate
from .log import RunLog
from .models import Models, load_models
from .progress import Progress
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
    run with other settings.
    """
    accelerator = _accelerator()
    output = _output(config)
    final = output / "final"
    if final.is_dir():
        _check_same_run(config, json.loads((output / "config.json").read_text()))
        return final
    lock = _lock(output) if accelerator.is_main_process else None
    share = _share(config, accelerator.num_processes)
    needs_judge = config.reward is None and config.method != "vigor"
    tasks = read_tasks(config.data, need_rubrics=needs_judge)
    held_out = read_tasks(config.held_out, need_rubrics=False) if config.held_out else []
    reward = load_function(config.reward) if config.reward else None
    checker = load_function(config.checker) if config.checker else None

    models = load_models(config, accelerator.device)
    policy, optimizer = _prepare(models, config, accelerator)
    update = Updater(policy, optimizer, config, accelerator)
    sampler = new_sampler(config, models.tokenizer, models.eos_ids)
    judge_watch = None
    if models.judge is not None:
        judge_watch = JudgeWatch(models.judge.model, models.judge.adapters)
    canaries = _canaries(config, models, tasks)
    alarms = Alarms(config.alarms)
    first = _resume(config, output, models, optimizer, alarms, judge_watch, accelerator)

    # Only one process writes.
    log = progress = None
    if accelerator.is_main_process:
        log = RunLog(output, first - 1 or None, config.trackers, config.to_dict())
        # Without progress only the alarms are written.
        console = None if config.progress else Console(stderr=True, force_terminal=False)
        progress = Progress(config.steps, first, console=console)
    with progress or nullcontext(), _alarms_told_once():
        if config.evaluate_every and first == 1:
            found = evaluate(models.policy, sampler, held_out, checker, config, accelerator)
            if log is not None and progress is not None:
                log.write({"step": 0.0, **found})
                if config.progress:
                    progress.step({"step": 0.0, **found})
        for step in range(first, config.steps + 1):
            started = time.perf_counter()
            seed = seed_of(config.seed, step, accelerator.process_index)
            chosen = tasks_of_step(tasks, config.prompts_per_step, step, config.seed)
            mine = chosen[accelerator.process_index * share :][:share]
            clock = _Clock(accelerator.device)
            rollouts = sampler(models.policy, mine, config.group_size, seed)
            figures = {"seconds/sample": clock.lap()}
            credit = assign_credit(rollouts, models, config, seed, reward)
            figures["seconds/signal"] = clock.lap()
            figures |= credit.figures
            figures |= update(rollouts, credit, step, seed)
            figures["seconds/update"] = clock.lap()

            lengths = [len(ids) for ids in rollouts.completion_ids]
            figures["response/length"] = sum(lengths) / len(lengths)
            figures["response/truncated"] = 1 - sum(rollouts.finished) / len(lengths)
            figures["seconds/step"] = time.perf_counter() - started
            if config.evaluate_every and step % config.evaluate_every == 0:
                figures |= evaluate(models.policy, sampler, held_out, checker, config, accelerator)
                figures["seconds/evaluation"] = clock.lap()
            if canaries is not None and (step - 1) % config.canaries_every == 0:
                figures |= canaries.figures()
            if judge_watch is not None:
                figures |= judge_watch.figures()
            figures = {"step": float(step), **_mean_over_processes(figures, accelerator)}

            raised = alarms.of_step(figures)
            if log is not None and progress is not None:
                log.write(figures)
                if config.progress:
                    progress.step(figures)
                for alarm in raised:
                    log.note("alarm", alarm.text)
                    progress.alarm(alarm)
                if step % config.checkpoint_every == 0 and step < config.steps:
                    _checkpoint(config, output, step, models, optimizer, alarms, judge_watch)
    if log is not None:
        log.close()
        _finish(output, models)
    if lock is not None:
        lock.close()
    accelerator.wait_for_everyone()
    return final


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise InputError(
            "training needs accelerate, which is not installed", fix="pip install g2r-fast[train]."
        ) from None
    return Accelerator(cpu=not torch.accelerator.is_available())


def _output(config: TrainConfig) -> Path:
    if not config.output:
        raise InputError("no output is given", expected="output: a folder for this run")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lock(output: Path) -> Any:
    """Held as long as the file is open; a process that dies, in whatever way, lets go of it."""
    lock = open(output / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InputError(
            f"another process is training in {output}", fix="Wait for it, or choose another output."
        ) from None
    return lock


def _share(config: TrainConfig, processes: int) -> int:
    """Prompts of a step for each process."""
    if config.prompts_per_step % processes:
        raise InputError(
            "prompts_per_step is not a multiple of the number of processes",
            expected=f"a multiple of {processes}",
            got=config.prompts_per_step,
        )
    return config.prompts_per_step // processes


def _prepare(models: Models, config: TrainConfig, accelerator: Any) -> tuple[Any, Any]:
    """The policy as it is trained (wrapped where there are several processes), and AdamW."""
    trainable = [p for p in models.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    policy, optimizer = accelerator.prepare(models.policy, optimizer)
    return policy, optimizer


def _canaries(config: TrainConfig, models: Models, tasks: list[Task]) -> CanaryWatch | None:
    if not config.canaries_every or models.judge is None:
        return None
    chosen = tasks_of_step(tasks, min(CANARY_PROMPTS, len(tasks)), 1, config.seed)
    return CanaryWatch(models.judge, [t.prompt for t in chosen], [t.rubrics for t in chosen])


def _check_same_run(config: TrainConfig, other: Mapping[str, Any]) -> None:
    differences = config.differences(other)
    if differences:
        raise InputError(
            f"{config.output} holds a run with other settings: {'; '.join(differences)}",
            fix="Choose another output, or delete that folder.",
        )


def _resume(
    config: TrainConfig,
    output: Path,
    models: Models,
    optimizer: Any,
    alarms: Alarms,
    judge_watch: JudgeWatch | None,
    accelerator: Any,
) -> int:
    """The step to begin with; what is loaded is as it was behind the step before."""
    settings = output / "config.json"
    if settings.is_file():
        _check_same_run(config, json.loads(settings.read_text()))
    accelerator.wait_for_everyone()  # nobody reads what the main process is about to write
    if accelerator.is_main_process:
        unfinished = settings.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        os.replace(unfinished, settings)
    path = latest_checkpoint(output / "checkpoints")
    if path is None:
        return 1
    state = load_checkpoint(path, accelerator.device)
    if judge_watch is not None and state["judge"] != judge_watch.fingerprint():
        raise InputError(
            "the judge is not the one that this run began with",
            expected="the same weights as then",
            fix=f"Put {config.judge or config.model} back as it was, or begin a new run.",
        )
    parameters = dict(models.policy.named_parameters())
    with torch.no_grad():
        for name, value in state["policy"].items():
            parameters[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    alarms.load(state["alarms"])
    return int(state["step"]) + 1


def _checkpoint(
    config: TrainConfig,
    output: Path,
    step: int,
    models: Models,
    optimizer: Any,
    alarms: Alarms,
    judge_watch: JudgeWatch | None,
) -> None:
    parameters = models.policy.named_parameters()
    state = {
        "step": step,
        "policy": {name: value.detach() for name, value in parameters if value.requires_grad},
        "optimizer": optimizer.state_dict(),
        "alarms": alarms.state(),
        "judge": None if judge_watch is None else judge_watch.fingerprint(),
    }
    save_checkpoint(output / "checkpoints", step, state, config.keep_checkpoints)


def _finish(output: Path, models: Models) -> None:
    """The plot, then the final weights: where those are, the run is over."""
    from .plot import plot

    try:
        plot(output)
    except InputError as error:  # no matplotlib: the log has it all
        print(error, file=sys.stderr)
    unfinished = output / "final.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    models.policy.save_pretrained(unfinished)
    models.tokenizer.save_pretrained(unfinished)
    replace_folder(unfinished, output / "final")


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


class _Clock:
    """Seconds since the last lap, with what was queued on a GPU done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, self.last = self.last, time.perf_counter()
        return self.last - last


def _mean_over_processes(figures: dict[str, float], accelerator: Any) -> dict[str, float]:
    """Of each figure, over the processes that have it."""
    if accelerator.num_processes == 1:
        return figures
    from accelerate.utils import gather_object

    sums, counts = Counter[str](), Counter[str]()
    for of_one in gather_object([figures]):
        sums.update(of_one)
        counts.update(of_one.keys())
    return {name: value / counts[name] for name, value in sums.items()}
