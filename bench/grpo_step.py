"""What a signal adds to a GRPO step: the public way and ours, beside the step itself.

    python -m bench.grpo_step [--dtype bfloat16] [--signals vigor,grail] [--save]

The step is stock PyTorch: one completion at a time forward and backward of the token-level clipped
objective, then AdamW. A repetition runs the step, then every signal both ways, and the next one
runs all in reverse order; what a signal adds are the seconds of its own call, nothing else running.
Public ways: GRAIL's and VIGOR's official loops, for G2RL a forward of its own and a gradient
through all logits. Ours are the public functions; G2RL's takes the LM head's inputs that the step
had.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import allocator
from bench.facts import facts, save
from bench.flops import Sizes
from bench.gate import GateError, gate_tensors
from bench.gpu_ceilings import synchronise
from bench.ours import backend_of
from bench.repetitions import Effort, repeat
from bench.signal_flops import REQUIRED, stock
from bench.signal_scenarios import LOOPS, RIVALS_OF, SignalScenario
from bench.signal_workload import Answer, Rollouts, hidden_states, on_host, to_the_end

__all__ = [
    "GRPO_STEPS",
    "PUBLIC",
    "GRPOStep",
    "TrainingStep",
    "flops_of",
    "lines",
    "measure",
    "step_file",
]

CLIP = 0.2
LEARNING_RATE = 1e-6
# The official code's way where there is one.
PUBLIC = {"grail": "slow_loop", "g2rl": "full_logits_gradient", "vigor": "loop"}


@dataclass(frozen=True)
class GRPOStep:
    label: str  # a row of a document's table
    method: str
    dtype: str


GRPO_STEPS: dict[str, GRPOStep] = {
    f"grpo-step-{dtype}-{method}": GRPOStep(f"{method.upper()}, {dtype}", method, dtype)
    for dtype in ("float32", "bfloat16")
    for method in ("grail", "g2rl", "vigor")
}


def step_file(name: str) -> str:
    """Of a row's file in bench/results, without its ending: one for all signals of a dtype."""
    return name.rpartition("-")[0]


class TrainingStep:
    """One GRPO step of a model, to be called again and again; leaves it frozen as it was."""

    def __init__(self, model: PreTrainedModel, rollouts: Rollouts, seed: int = 0) -> None:
        self.model, self.rollouts = model, rollouts
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        generator = torch.Generator().manual_seed(seed)
        self.advantages = torch.randn(len(rollouts.completions), generator=generator)
        self.hidden: list[Tensor] = []  # the LM head's inputs of the last step

    def objective(self, logps: Tensor, advantage: Tensor) -> Tensor:
        """Mean over tokens; the policy that sampled is the one that is trained."""
        ratio = torch.exp(logps - logps.detach())
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        return torch.minimum(ratio * advantage, clipped * advantage).mean()

    def __call__(self) -> None:
        self.hidden = []
        self.model.requires_grad_(True)
        try:
            for i, completion in enumerate(self.rollouts.completions):
                ids = self.rollouts.sequence(i)[None, :-1]
                states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
                states = states[len(self.rollouts.prompt) - 1 :]
                logits = self.model.lm_head(states).float()
                logps = torch.log_softmax(logits, -1).gather(-1, completion[:, None])[:, 0]
                objective = self.objective(logps, self.advantages[i])
                (-objective / len(self.rollouts.completions)).backward()
                self.hidden.append(states.detach())
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
            self.model.requires_grad_(False)


def _step_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    return sum(
        stock(
            sizes,
            len(rollouts.prompt) + len(completion) - 1,
            head=len(completion),
            backward=True,
            weights=True,
        )
        for completion in rollouts.completions
    )


def _check(method: str, model: PreTrainedModel, rollouts: Rollouts) -> dict[str, float]:
    """Gate the public way and ours, ours with the hidden states that a step would have."""
    rivals = RIVALS_OF[method]
    loop = rivals[LOOPS[method]].run
    reference, same_dtype_loop = on_host(loop(model, rollouts)), None
    if model.dtype != torch.float32:
        same_dtype_loop = reference
        reference = on_host(loop(copy.deepcopy(model).float(), rollouts))
    given = (
        replace(rollouts, hidden=hidden_states(model, rollouts)) if method == "g2rl" else rollouts
    )
    answers: dict[str, Answer] = {
        "public": rivals[PUBLIC[method]].run(model, rollouts),
        "ours": rivals["ours"].run(model, given),
    }
    errors = {}
    for name, got in answers.items():
        try:
            found = gate_tensors(reference, on_host(got), same_dtype_loop)
        except GateError as error:
            raise GateError(f"{method}, {name}: {error}") from error
        errors[name] = found["max_relative_error"]
    return errors


def measure(
    scenario: SignalScenario,
    methods: Iterable[str],
    *,
    effort: Effort | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """A result per method. Without an effort answers are compared and nothing is timed.

    Of `scenario` everything but its method and rivals counts: model, shapes, dtype.
    """
    model, rollouts = scenario.build()
    methods = list(methods)
    errors = {method: _check(method, model, rollouts) for method in methods}
    log("answers agree")
    step = TrainingStep(model, rollouts)

    def train() -> None:
        step()
        synchronise(model.device)

    def ours(method: str) -> None:
        given = replace(rollouts, hidden=step.hidden) if method == "g2rl" else rollouts
        to_the_end(RIVALS_OF[method]["ours"].run, model, given)()

    runs: dict[str, Callable[[], object]] = {"step": train}
    for method in methods:
        public = RIVALS_OF[method][PUBLIC[method]].run
        runs[f"{method} public"] = to_the_end(public, model, rollouts)
        runs[f"{method} ours"] = partial(ours, method)
    entries: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "cpu_seconds": [], "load_before": []} for name in runs
    }
    if effort is not None:
        step()  # AdamW makes its state, and the first hidden states are there
        repeat(runs, entries, effort, (), log)
    sizes = Sizes.of(model.config)
    found = {}
    for method in methods:
        flops = flops_of(method, sizes, rollouts)
        parts = {"public": entries[f"{method} public"], "ours": entries[f"{method} ours"]}
        found[method] = {
            "scenario": asdict(scenario) | {"method": method},
            "workload": rollouts.describe(),
            "backend": backend_of(model),
            "max_relative_error": errors[method],
            "gflop": {name: round(value / 1e9, 3) for name, value in flops.items()},
            "flop_bound": round(flops["public"] / flops["ours"], 2),
            "step": entries["step"],
            **parts,
            **_figures(entries["step"], parts),
        }
    return found


def flops_of(method: str, sizes: Sizes, rollouts: Rollouts) -> dict[str, int]:
    """Of the step, of the public way as it works, and what ours cannot do without."""
    given = replace(rollouts, hidden=rollouts.completions) if method == "g2rl" else rollouts
    count = RIVALS_OF[method][PUBLIC[method]].flops
    return {
        "step": _step_flops(sizes, rollouts),
        "public": 0 if count is None else count(sizes, rollouts),
        "ours": sum(REQUIRED[method](sizes, given).values()),
    }


def _figures(step: dict[str, Any], parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians; shares and ratios are medians of those within a repetition."""
    if not step["seconds"]:
        return {}
    added = {name: statistics.median(part["seconds"]) for name, part in parts.items()}
    shares = {
        name: statistics.median(
            a / b for a, b in zip(part["seconds"], step["seconds"], strict=True)
        )
        for name, part in parts.items()
    }
    pairs = zip(parts["public"]["seconds"], parts["ours"]["seconds"], strict=True)
    return {
        "step_seconds": round(statistics.median(step["seconds"]), 4),
        "added_seconds": {name: round(value, 4) for name, value in added.items()},
        "added_share": {name: round(value, 4) for name, value in shares.items()},
        "times_ours": round(statistics.median(a / b for a, b in pairs), 2),
    }


def lines(results: dict[str, dict[str, Any]]) -> str:
    """A line per signal."""
    found = []
    for name, one in results.items():
        shares = {way: f"{part:+.1%}" for way, part in one["added_share"].items()}
        found.append(
            f"{name}: step {one['step_seconds']:.2f} s, added {one['added_seconds']} s = {shares}, "
            f"{one['times_ours']:.2f}x, FLOP bound {one['flop_bound']:.2f}x"
        )
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.grpo_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--signals", default=",".join(PUBLIC), help="comma-separated; all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write bench/results/grpo-step-….json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allocator.set_up()
    methods = arguments.signals.split(",")
    if unknown := set(methods) - set(PUBLIC):
        parser.error(f"unknown signals {sorted(unknown)}; known: {', '.join(PUBLIC)}")
    about = facts()
    found = measure(
        SignalScenario("", "", (), dtype=arguments.dtype),
        methods,
        effort=Effort(arguments.repetitions, least_seconds=0.0),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    results = {f"grpo-step-{arguments.dtype}-{method}": one for method, one in found.items()}
    print(lines(results))
    if arguments.save:
        content = {"facts": about, "scenarios": results}
        print(f"saved {save(f'grpo-step-{arguments.dtype}', content)}")


if __name__ == "__main__":
    main()
