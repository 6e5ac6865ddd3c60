"""A run of the tiny policy that takes seconds, for the tests of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from g2r_fast.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_policy"


def small(output: Path, **options: Any) -> TrainConfig:
    """Two prompts of four responses a step, everything written every step."""
    held_out = output.parent / "held_out.jsonl"
    few = (TINY / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    held_out.write_text("".join(few), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(TINY / "model"),
        "data": str(TINY / "train.jsonl"),
        "held_out": str(held_out),
        "checker": f"{TINY / 'environment.py'}:score",
        "output": str(output),
        "prompts_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 24,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": 1e-3,
        "steps": 3,
        "checkpoint_every": 1,
        "evaluate_every": 2,
        "progress": False,
    }
    return TrainConfig(**{**settings, **options})


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a model that was saved."""
    return load_file(folder / "model.safetensors")


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]
