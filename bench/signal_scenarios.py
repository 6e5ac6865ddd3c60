"""The shapes on which GRAIL, G2RL and VIGOR are measured, and which rivals run on each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from bench.g2rl_rivals import G2RL_RIVALS
from bench.grail_rivals import GRAIL_RIVALS
from bench.signal_workload import Rollouts, SignalRival, hidden_states, make_rollouts
from bench.vigor_rivals import VIGOR_RIVALS
from bench.workload import build_model

__all__ = ["GPU_SIGNALS", "LOOPS", "RIVALS_OF", "SIGNAL_SCENARIOS", "SignalScenario"]

RIVALS_OF: dict[str, dict[str, SignalRival]] = {
    "grail": GRAIL_RIVALS,
    "g2rl": G2RL_RIVALS,
    "vigor": VIGOR_RIVALS,
}
# Whose answers the others are held to.
LOOPS = {"grail": "loop", "g2rl": "full_logits_gradient", "vigor": "loop"}


@dataclass(frozen=True)
class SignalScenario:
    label: str  # a row of a document's table
    method: str  # "grail", "g2rl" or "vigor"
    rivals: tuple[str, ...]
    model: str = "h512l8-v32k"
    dtype: str = "float32"
    group_size: int = 8
    prompt: int = 128
    completion: tuple[int, int] = (100, 400)
    temperature: float = 1.0
    parameters: str = "all"  # VIGOR
    hidden_given: bool = False  # G2RL: the trainer has the LM head's inputs already
    memory: bool = False  # measure the memory beyond the model, too
    once: bool = False  # one repetition: the shape is there for its answers
    seed: int = 0
    device: str = "cpu"

    def build(self) -> tuple[PreTrainedModel, Rollouts]:
        model = build_model(
            self.model, dtype=getattr(torch, self.dtype), seed=self.seed, device=self.device
        )
        rollouts = self.rollouts(model.config.vocab_size).to(self.device)
        if self.hidden_given:
            rollouts = replace(rollouts, hidden=hidden_states(model, rollouts))
        return model, rollouts

    def rollouts(self, vocab_size: int) -> Rollouts:
        """The workload but for hidden states, which take a model."""
        return make_rollouts(
            group_size=self.group_size,
            prompt=self.prompt,
            completion=self.completion,
            vocab_size=vocab_size,
            temperature=self.temperature,
            parameters=self.parameters,
            seed=self.seed,
        )


_VIGOR = SignalScenario("", "vigor", tuple(VIGOR_RIVALS), memory=True)
_G2RL = SignalScenario("", "g2rl", tuple(G2RL_RIVALS))
_GRAIL = SignalScenario("", "grail", tuple(GRAIL_RIVALS), prompt=512, completion=(300, 600))
# What every other shape is held against: the loop and the fastest rival.
_SHORT_LIST = {
    "vigor": ("ours", "loop", "tuned_loop"),
    "g2rl": ("ours", "full_logits_gradient", "chunked_gradient", "shortcut"),
    "grail": ("ours", "loop", "tuned_cached_loop"),
}
_WITHOUT_OPACUS = tuple(name for name in VIGOR_RIVALS if name != "opacus")


def _scenarios() -> dict[str, SignalScenario]:
    found: dict[str, SignalScenario] = {}
    for dtype in ("float32", "bfloat16"):
        head = replace(_VIGOR, parameters="lm_head", rivals=_WITHOUT_OPACUS, memory=False)
        tied = replace(_VIGOR, model="h512l8-v32k-tied", rivals=_WITHOUT_OPACUS)
        given = replace(_G2RL, hidden_given=True)
        named = {
            f"vigor-{dtype}": replace(_VIGOR, label=f"VIGOR, {dtype}"),
            f"vigor-{dtype}-tied": replace(tied, label=f"VIGOR, {dtype}, tied"),
            f"vigor-{dtype}-head": replace(head, label=f"VIGOR, {dtype}, LM head alone"),
            f"g2rl-{dtype}-head": replace(given, label=f"G2RL, {dtype}, hidden states given"),
            f"g2rl-{dtype}": replace(_G2RL, label=f"G2RL, {dtype}"),
            f"grail-{dtype}": replace(_GRAIL, label=f"GRAIL, {dtype}"),
        }
        found |= {name: replace(one, dtype=dtype) for name, one in named.items()}
    for one in (_VIGOR, _G2RL, _GRAIL):
        title, short = one.method.upper(), replace(one, rivals=_SHORT_LIST[one.method])
        short = replace(short, memory=False, once=True)
        name = f"{one.method}-float32"
        found |= {
            f"{name}-64-tokens": replace(
                short, completion=(64, 64), label=f"{title}, float32, completions of 64"
            ),
            f"{name}-4000-tokens": replace(
                short, completion=(4000, 4000), group_size=2,
                label=f"{title}, float32, 2 completions of 4000",
            ),
            f"{name}-group-1": replace(short, group_size=1, label=f"{title}, float32, group of 1"),
            f"{name}-group-2": replace(short, group_size=2, label=f"{title}, float32, group of 2"),
            f"{name}-group-64": replace(
                short, group_size=64, completion=(16, 64),
                label=f"{title}, float32, group of 64, completions of 16 to 64",
            ),
        }  # fmt: skip
    return found


SIGNAL_SCENARIOS: dict[str, SignalScenario] = _scenarios()

# On a GPU: whole models of a size that is trained, against the loop and the fastest rival.
GPU_SIGNALS: dict[str, SignalScenario] = {
    f"gpu-{one.method}": replace(
        one, label=f"{one.method.upper()}, 1.5B", rivals=_SHORT_LIST[one.method], model="1.5b",
        dtype="bfloat16", memory=False, device="cuda",
    )
    for one in (_GRAIL, replace(_G2RL, hidden_given=True), _VIGOR)
}  # fmt: skip
