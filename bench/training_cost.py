"""What each method adds to a step of the reference loop, by our calls and by what people run today.

    python -m bench.training_cost [--repetitions 5] [--save]

One step of the tiny policy (examples/tiny_policy): rollouts, verdicts, update. Then, on the same
rollouts, what each method asks for on top: Grad2Reward's attribution by the call that the loop
makes, by the plain loop and by the cached loops (which get their prompts encoded for nothing);
GRAIL, G2RL and VIGOR by our functions and by the public way. Answers are compared first.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bench import allocator
from bench.convergence import SETTINGS
from bench.facts import facts, save
from bench.gate import FLOAT32_LIMIT, GateError, relative_errors, tensor_error
from bench.grpo_step import PUBLIC
from bench.repetitions import Effort, repeat
from bench.rivals import RIVALS
from bench.signal_scenarios import LOOPS, RIVALS_OF
from bench.signal_workload import Rollouts as SignalRollouts
from bench.training_tables import COST, METHODS
from bench.workload import Workload
from g2r_fast.result import AttributionBatch
from g2r_fast.training.config import TrainConfig, config_of, read_yaml
from g2r_fast.training.credit import assign_credit
from g2r_fast.training.models import Models, load_models
from g2r_fast.training.sampling import Rollouts, new_sampler
from g2r_fast.training.tasks import read_tasks, tasks_of_step
from g2r_fast.training.update import Updater

__all__ = ["Step", "group_workloads", "measure", "signal_rollouts"]

ROOT = Path(__file__).resolve().parents[1]
ATTRIBUTIONS = ("loop", "cached_loop", "tuned_cached_loop")
PARTS = ("sample", "verdicts", "update")
TIMES_THE_LOOPS_ERROR = 4
ANSWER = 8  # tokens of the answer that GRAIL differentiates, before the EOS


class Step:
    """A step's rollouts, and everything to do its parts again and again."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(cpu=True)
        self.models: Models = load_models(config, torch.device("cpu"))
        optimizer = torch.optim.AdamW(self.models.policy.parameters(), lr=1e-6)
        self.updater = Updater(self.models.policy, optimizer, config, self.accelerator)
        self.sampler = new_sampler(config, self.models.tokenizer, self.models.eos_ids)
        tasks = read_tasks(config.data)
        self.tasks = tasks_of_step(tasks, config.prompts_per_step, 1, config.seed)
        self.rollouts = self.sample()

    def sample(self) -> Rollouts:
        return self.sampler(self.models.policy, self.tasks, self.config.group_size, 0)

    def credit(self, method: str) -> Any:
        changed = config_of({**self.config.to_dict(), "method": method})
        return assign_credit(self.rollouts, self.models, changed, 0)

    def update(self) -> None:
        self.models.policy.requires_grad_(True)  # the public ways leave it frozen
        self.updater(self.rollouts, self.credit_of_grpo, 1, 0)

    @property
    def credit_of_grpo(self) -> Any:
        if not hasattr(self, "_credit"):
            self._credit = self.credit("grpo")
        return self._credit


def group_workloads(step: Step, batch: AttributionBatch) -> list[Workload]:
    """The judgements of a step, one workload per group, with the verdicts of `batch`.

    Responses of a group that were cut share the tail of those that ended: it is a token shorter
    or longer, and nothing else. The cached loops' batches want tails of one length: the longer ones
    lose tokens at their front, which costs our call, on the whole tails, a little more.
    """
    judge, rollouts = step.models.judge, step.rollouts
    assert judge is not None
    workloads = []
    for start in range(0, len(rollouts), rollouts.group_size):
        rows = range(start, start + rollouts.group_size)
        rubrics = rollouts.tasks[start].rubrics
        tails = [[*judge.turn_end[1:], *judge.encode_rubric(rubric)] for rubric in rubrics]
        shortest = min(map(len, tails))
        eos = step.models.eos_ids[0]
        responses = [
            ids if ids and ids[-1] == eos else [*ids, eos]
            for ids in (rollouts.completion_ids[i] for i in rows)
        ]
        workloads.append(
            Workload(
                torch.tensor(rollouts.prompt_ids[start]),
                [torch.tensor(ids) for ids in responses],
                [torch.tensor(ids[-shortest:]) for ids in tails],
                [verdict for i in rows for verdict in batch.verdicts[i]],
                judge.true_id,
            )
        )
    return workloads


def signal_rollouts(step: Step) -> list[SignalRollouts]:
    """The same rollouts as the public ways take them; the answer is what stands at the end."""
    rollouts, groups = step.rollouts, []
    for start in range(0, len(rollouts), rollouts.group_size):
        completions = rollouts.completion_ids[start : start + rollouts.group_size]
        spans = []
        for ids in completions:
            stop = max(1, len(ids) - 1)
            first = max(0, stop - ANSWER)
            spans.append((first, first, stop, stop))
        groups.append(
            SignalRollouts(
                torch.tensor(rollouts.prompt_ids[start]),
                [torch.tensor(ids) for ids in completions],
                spans,
                step.config.temperature,
            )
        )
    return groups


def measure(
    step: Step, effort: Effort | None, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Gates every way, then times all of them; without an effort nothing is timed."""
    judge, policy = step.models.judge, step.models.policy
    assert judge is not None
    batch = step_batch(step)
    workloads, groups = group_workloads(step, batch), signal_rollouts(step)
    errors = _attribution_errors(judge.model, workloads)
    errors |= _signal_errors(policy, groups)
    log("answers agree")
    runs: dict[str, Callable[[], object]] = {
        "sample": step.sample,
        "verdicts": partial(step.credit, "grpo"),
        "update": step.update,
        "grad2reward ours": partial(step.credit, "grad2reward"),
    }
    for name in ATTRIBUTIONS:
        runs[f"grad2reward {name}"] = partial(_each, RIVALS[name].run, judge.model, workloads)
    for method, public in PUBLIC.items():
        for way, name in (("public", public), ("ours", "ours")):
            runs[f"{method} {way}"] = partial(_each, RIVALS_OF[method][name].run, policy, groups)
    entries: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "cpu_seconds": [], "load_before": []} for name in runs
    }
    if effort is not None:
        step.update()
        repeat(runs, entries, effort, (), log)
    about = {
        "rollouts": len(step.rollouts),
        "tokens": sum(map(len, step.rollouts.completion_ids)),
        "items": len(step.rollouts.tasks[0].rubrics),
    }
    return {
        f"{COST}-{method}": {
            "label": label,
            "step": {name: entries[name] for name in PARTS},
            "ways": _ways(method, entries),
            "max_relative_error": {k: v for k, v in errors.items() if k.startswith(method)},
            **about,
            **_figures(method, entries),
        }
        for method, label in METHODS.items()
    }


def _attribution_errors(model: Any, workloads: list[Workload]) -> dict[str, float]:
    """Largest relative error of every way against the loop in float64, over True judgements.

    A trained judge's gradients cancel, and where it is sure stock float32 loses the digits of
    1 - p: the loop itself is off by more than its rivals from each other on random weights. So its
    error sets the limit, group by group; GateError beyond.
    """
    exact = copy.deepcopy(model).double()
    errors = dict.fromkeys((f"grad2reward {way}" for way in (*ATTRIBUTIONS, "ours")), 0.0)
    for workload in workloads:
        right = RIVALS["loop"].run(exact, workload)
        limit = 0.0
        for way in (*ATTRIBUTIONS, "ours"):  # the loop comes first
            found = relative_errors(right, RIVALS[way].run(model, workload))
            error = max(found, default=0.0)
            limit = limit or TIMES_THE_LOOPS_ERROR * error
            if not error <= limit:
                raise GateError(f"{way}: relative error {error:.2e} > {limit:.2e}")
            errors[f"grad2reward {way}"] = max(errors[f"grad2reward {way}"], error)
    return errors


def _signal_errors(policy: Any, groups: list[SignalRollouts]) -> dict[str, float]:
    """The same for GRAIL, G2RL and VIGOR: the limit is what float32 may be off by, or 4 times the
    float32 loop's own error where that is more. What is right is our engine in float64, which the
    tests hold to the reference: the norms of a stock model stay float32 in any dtype."""
    exact = copy.deepcopy(policy).double()
    errors: dict[str, float] = {}
    for method, public in PUBLIC.items():
        ways = {"loop": LOOPS[method], "public": public, "ours": "ours"}  # the loop comes first
        for group in groups:
            right = RIVALS_OF[method]["ours"].run(exact, group)
            limit = 0.0
            for way, name in ways.items():
                error = tensor_error(right, RIVALS_OF[method][name].run(policy, group))
                limit = limit or max(FLOAT32_LIMIT, TIMES_THE_LOOPS_ERROR * error)
                if not error <= limit:
                    raise GateError(f"{method} {way}: relative error {error:.2e} > {limit:.2e}")
                key = f"{method} {way}"
                errors[key] = max(errors.get(key, 0.0), error)
    return errors


def step_batch(step: Step) -> AttributionBatch:
    """Verdicts as the loop's judge gives them."""
    from g2r_fast import AttributionConfig, attribute_batch

    rollouts, judge = step.rollouts, step.models.judge
    assert judge is not None
    rubrics = [task.rubrics for task in rollouts.tasks]
    uniform = AttributionConfig(readout="uniform")
    return attribute_batch(
        judge, rollouts.prompt_ids, rollouts.completion_ids, rubrics, rollouts.group_size, uniform
    )


def _each(run: Callable[[Any, Any], object], model: Any, parts: list[Any]) -> None:
    for part in parts:
        run(model, part)


def _ways(method: str, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name.removeprefix(f"{method} "): entry
        for name, entry in entries.items()
        if name.startswith(f"{method} ")
    }


def _figures(method: str, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians in seconds. A step is sampling, verdicts and update. What Grad2Reward adds is its
    call less that of the verdicts, for the rivals too, whose calls judge as well."""
    if not entries["sample"]["seconds"]:
        return {}
    median = {name: statistics.median(entries[name]["seconds"]) for name in PARTS}
    step = sum(median.values())
    added = {
        way: statistics.median(entry["seconds"])
        - (median["verdicts"] if method == "grad2reward" else 0.0)
        for way, entry in _ways(method, entries).items()
    }
    return {
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "step_seconds": round(step, 4),
        "added_seconds": {name: round(value, 4) for name, value in added.items()},
        "added_share": {name: round(value / step, 4) for name, value in added.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write results/training-cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allocator.set_up()
    os.chdir(ROOT)  # the settings' paths are relative to it
    about = facts()
    step = Step(config_of(read_yaml(SETTINGS)))
    log = partial(print, file=sys.stderr, flush=True)
    found = measure(step, Effort(arguments.repetitions), log)
    for name, one in found.items():
        print(f"{name}: step {one['step_seconds']:.2f} s", one["added_seconds"], one["added_share"])
    if arguments.save:
        print(f"saved {save(COST, {'facts': about, 'scenarios': found})}")


if __name__ == "__main__":
    main()
