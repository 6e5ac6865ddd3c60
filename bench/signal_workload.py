"""Seeded inputs for the benchmarks of GRAIL, G2RL and VIGOR: one prompt and what was sampled there.

Models are those of `workload.py`. Ids are drawn uniformly, so that completions share the prompt
and, but for chance, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.flops import Sizes
from bench.gpu_ceilings import synchronise
from bench.workload import SPECIAL_IDS

__all__ = [
    "Answer",
    "Rollouts",
    "SignalRival",
    "hidden_states",
    "make_rollouts",
    "on_host",
    "to_the_end",
]

# One tensor per completion, or None where a completion has no answer.
Answer = list[Tensor | None]


@dataclass(frozen=True)
class Rollouts:
    """One prompt, G completions; ids are int64, one-dimensional."""

    prompt: Tensor  # [P]
    completions: list[Tensor]  # G of [T_i]
    # Where the answer stands in each completion: marker, content, closing brace (GRAIL).
    spans: list[tuple[int, int, int, int]]
    temperature: float = 1.0
    parameters: str = "all"  # whose gradient VIGOR measures
    # The LM head's inputs that predict each completion, G of [T_i, H], where they are given (G2RL).
    hidden: list[Tensor] = field(default_factory=list)

    def to(self, device: str | torch.device) -> Rollouts:
        return replace(
            self,
            prompt=self.prompt.to(device),
            completions=[completion.to(device) for completion in self.completions],
            hidden=[states.to(device) for states in self.hidden],
        )

    def sequence(self, i: int) -> Tensor:
        """The ids of prompt and completion, [P + T_i]."""
        return torch.cat([self.prompt, self.completions[i]])

    @property
    def prompt_ids(self) -> list[list[int]]:
        """As the public functions take them: one prompt per completion."""
        return [self.prompt.tolist()] * len(self.completions)

    @property
    def completion_ids(self) -> list[list[int]]:
        return [completion.tolist() for completion in self.completions]

    def describe(self) -> dict[str, object]:
        return {
            "G": len(self.completions),
            "prompt": len(self.prompt),
            "completions": [len(completion) for completion in self.completions],
            "temperature": self.temperature,
            "hidden_states_given": bool(self.hidden),
        }


def on_host(answer: Answer) -> Answer:
    return [None if x is None else x.cpu() for x in answer]


def to_the_end(
    run: Callable[[PreTrainedModel, Rollouts], Answer], model: PreTrainedModel, rollouts: Rollouts
) -> Callable[[], None]:
    """A call that returns when the model's device has done its work."""

    def call() -> None:
        run(model, rollouts)
        synchronise(model.device)

    return call


@dataclass(frozen=True)
class SignalRival:
    title: str
    run: Callable[[PreTrainedModel, Rollouts], Answer]
    # As it works, see signal_flops.py; None for ours, which is held to what is required.
    flops: Callable[[Sizes, Rollouts], int] | None = None
    slow: bool = False  # gets fewer repetitions


def make_rollouts(
    *,
    group_size: int,
    prompt: int,
    completion: tuple[int, int],
    vocab_size: int,
    span: int = 12,
    tail: int = 10,
    temperature: float = 1.0,
    parameters: str = "all",
    seed: int = 0,
) -> Rollouts:
    """Draw a group. Completion lengths are uniform in `completion`, both ends included.

    The answer is the last `span` tokens in front of the last `tail`, of which the first two are the
    marker and the last one the closing brace; shorter completions have a shorter one.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> Tensor:
        return torch.randint(SPECIAL_IDS, vocab_size, (count,), generator=generator)

    shortest, longest = completion
    lengths = torch.randint(shortest, longest + 1, (group_size,), generator=generator).tolist()
    spans = []
    for length in lengths:
        stop = max(1, length - tail)
        start = max(0, stop - span)
        content = min(start + 2, stop - 1)
        spans.append((start, content, max(content + 1, stop - 1), stop))
    return Rollouts(
        ids(prompt), [ids(length) for length in lengths], spans, temperature, parameters
    )


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> list[Tensor]:
    """The LM head's inputs at the positions that predict each completion, by the stock model."""
    found = []
    for i in range(len(rollouts.completions)):
        ids = rollouts.sequence(i)[None, :-1]
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        found.append(out[len(rollouts.prompt) - 1 :])
    return found
