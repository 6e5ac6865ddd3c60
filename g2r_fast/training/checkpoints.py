"""Checkpoints that a killed run goes on from: one file each, there whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["latest_checkpoint", "load_checkpoint", "replace_folder", "save_checkpoint"]

_NAME = re.compile(r"step-(\d+)\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-N.pt` under another name first and renames it; then deletes old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.pt"
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync(folder)
    for old in sorted(_steps(folder))[:-keep]:
        (folder / f"step-{old}.pt").unlink()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    steps = _steps(folder)
    return folder / f"step-{max(steps)}.pt" if steps else None


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location=device.type, weights_only=True)
    return state


def replace_folder(unfinished: Path, folder: Path) -> None:
    """`unfinished` becomes `folder`, in one step where there was none."""
    for file in unfinished.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    os.replace(unfinished, folder)
    _sync(folder.parent)


def _steps(folder: Path) -> list[int]:
    found = [_NAME.fullmatch(path.name) for path in folder.glob("step-*.pt")]
    return [int(match[1]) for match in found if match]


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
