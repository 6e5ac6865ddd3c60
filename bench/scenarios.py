"""The shapes that are measured, and which rivals run on each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from bench.rivals import RIVALS
from bench.workload import Workload, build_model, make_workload

__all__ = [
    "ALL",
    "CORE",
    "FAST",
    "GPU_CORE",
    "GPU_SCENARIOS",
    "SCENARIOS",
    "Scenario",
]

ALL = tuple(name for name, rival in RIVALS.items() if not rival.gpu)
FAST = tuple(name for name in ALL if not RIVALS[name].slow)
# What every shape is held against.
CORE = ("ours", "ours_reference", "loop", "cached_loop", "tuned_cached_loop")


@dataclass(frozen=True)
class Scenario:
    label: str = ""  # a row of README's table
    model: str = "h512l8"
    dtype: str = "float32"
    group_size: int = 4
    items: int = 8
    prompt: int = 512
    response: tuple[int, int] = (300, 600)
    tail: int = 64
    true_share: float = 1.0
    rivals: tuple[str, ...] = FAST
    seed: int = 0
    device: str = "cpu"

    def build(self) -> tuple[PreTrainedModel, Workload]:
        model = build_model(
            self.model, dtype=getattr(torch, self.dtype), seed=self.seed, device=self.device
        )
        workload = make_workload(
            group_size=self.group_size,
            items=self.items,
            prompt=self.prompt,
            response=self.response,
            tail=self.tail,
            true_share=self.true_share,
            vocab_size=model.config.vocab_size,
            seed=self.seed,
        )
        return model, workload.to(self.device)


SCENARIOS: dict[str, Scenario] = {
    "float32-all-true": Scenario("float32, all True", rivals=ALL),
    "float32-half-true": Scenario("float32, half True", true_share=0.5, rivals=CORE),
    "bfloat16-all-true": Scenario("bfloat16, all True", dtype="bfloat16"),
    "bfloat16-half-true": Scenario(
        "bfloat16, half True", dtype="bfloat16", true_share=0.5, rivals=CORE
    ),
    # Other layer shapes:
    "float32-24-layers": Scenario(
        "float32, 24 layers, 2 responses, 4 items",
        model="h512l24", group_size=2, items=4, rivals=CORE,
    ),
    "float32-0.5b-layers": Scenario(
        "float32, layers of a 0.5B model, 2 responses, 4 items",
        model="0.5b-layers", group_size=2, items=4, rivals=(*CORE, "prompt_cached_loop"),
    ),
    "float32-0.5b-layers-half-true": Scenario(
        "the same, half True",
        model="0.5b-layers", group_size=2, items=4, true_share=0.5, rivals=CORE,
    ),
    # Shapes where sharing has little to give:
    "float32-one-item": Scenario("float32, one item", items=1),
    "bfloat16-one-item": Scenario("bfloat16, one item", dtype="bfloat16", items=1),
    "float32-short": Scenario(
        "float32, short prompt and responses", prompt=16, response=(16, 64), tail=16
    ),
    "bfloat16-short": Scenario(
        "bfloat16, short prompt and responses",
        dtype="bfloat16", prompt=16, response=(16, 64), tail=16,
    ),
    "float32-short-one-item": Scenario(
        "float32, short, one item", items=1, prompt=16, response=(16, 64), tail=16
    ),
    "bfloat16-short-one-item": Scenario(
        "bfloat16, short, one item",
        dtype="bfloat16", items=1, prompt=16, response=(16, 64), tail=16,
    ),
    # A smaller shape, where the slow rivals are affordable:
    "float32-smaller": Scenario(
        "float32, prompt 256, responses of 150 to 400, 4 items",
        items=4, prompt=256, response=(150, 400), rivals=ALL,
    ),
}  # fmt: skip

# The order of the first run, which is the gate's.
GPU_CORE = ("ours", "loop", "cached_loop", "packed_cached_loop", "packed_loop")

_ON_GPU = Scenario(
    model="1.5b", dtype="bfloat16", group_size=8, rivals=GPU_CORE, device="cuda"
)  # fmt: skip
GPU_SCENARIOS: dict[str, Scenario] = {
    "gpu-1.5b-all-true": replace(
        _ON_GPU, label="1.5B, all True", rivals=(*GPU_CORE, "slow_loop", "padded")
    ),
    "gpu-7b-all-true": replace(_ON_GPU, label="7B, all True", model="7b"),
    "gpu-1.5b-half-true": replace(
        _ON_GPU, label="1.5B, half True", true_share=0.5
    ),
    "gpu-7b-half-true": replace(
        _ON_GPU, label="7B, half True", model="7b", true_share=0.5
    ),
    "gpu-1.5b-short-one-item": replace(
        _ON_GPU, label="1.5B, short, one item", items=1, prompt=16, response=(16, 64), tail=16,
        rivals=(*GPU_CORE, "padded"),
    ),
    "gpu-1.5b-prompt-2048": replace(
        _ON_GPU, label="1.5B, prompt 2048, half True", prompt=2048, true_share=0.5
    ),
    "gpu-1.5b-prompt-8192": replace(
        _ON_GPU, label="1.5B, prompt 8192, half True", prompt=8192, true_share=0.5
    ),
}  # fmt: skip
