"""Several processes at work on one run: who has which prompts, and figures of all of them."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from ..errors import InputError
from .config import TrainConfig

__all__ = ["Clock", "new_accelerator", "over_processes", "share_of_prompts"]


def new_accelerator() -> Any:
    """accelerate's, for plain data parallelism: settings of its environment that would change what
    is computed here have no say, and what shards a model is refused."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType
    except ImportError:
        raise InputError(
            "training needs accelerate, which is not installed", fix="pip install g2r-fast[train]."
        ) from None
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        gradient_accumulation_steps=1,
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            "the reference loop does not shard models",
            expected="accelerate launch with plain data parallelism",
            got=str(kind.value),
        )
    return accelerator


def share_of_prompts(config: TrainConfig, accelerator: Any) -> int:
    """Prompts of a step for each process."""
    processes = accelerator.num_processes
    if config.prompts_per_step % processes:
        raise InputError(
            "prompts_per_step is not a multiple of the number of processes",
            expected=f"a multiple of {processes}",
            got=config.prompts_per_step,
        )
    return config.prompts_per_step // processes


def over_processes(figures: dict[str, float], accelerator: Any) -> dict[str, float]:
    """Of each figure the mean over the processes that have it; of the largest ratio the largest."""
    if accelerator.num_processes == 1:
        return figures
    from accelerate.utils import gather_object

    gathered = gather_object([figures])
    sums, counts = Counter[str](), Counter[str]()
    for of_one in gathered:
        sums.update(of_one)
        counts.update(of_one.keys())
    found = {name: value / counts[name] for name, value in sums.items()}
    found["policy/ratio_max"] = max(of_one["policy/ratio_max"] for of_one in gathered)
    return found


class Clock:
    """Seconds since the last lap, with what was queued on a GPU done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, self.last = self.last, time.perf_counter()
        return self.last - last
