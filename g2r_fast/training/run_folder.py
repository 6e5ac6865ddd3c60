"""The folder of a run: what it was begun with, its checkpoints, its end, and whose it is."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .alarms import Alarms
from .checkpoints import latest_checkpoint, load_checkpoint, replace_folder, save_checkpoint
from .config import TrainConfig
from .models import Models
from .watches import JudgeWatch

__all__ = ["RunFolder"]

_FILES = ("data", "held_out", "checker", "reward")  # settings that name a file


class RunFolder:
    """`output` of one run. `final` is there once the run is over.

    `run.json` holds the settings and what lies behind them: hashes of the files they name, the
    number of processes, fingerprints of the first policy and the judge. A run goes on only where
    all of that is as it was.
    """

    def __init__(self, config: TrainConfig, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = Path(config.output)
        self.final = self.path / "final"
        self.changes: list[str] = []  # settings that are not as before, and may be so
        self._lock: Any = None
        self._facts: dict[str, Any] = {
            "processes": accelerator.num_processes,
            **{name: _hash(getattr(config, name)) for name in _FILES},
        }

    @classmethod
    def open(cls, config: TrainConfig, accelerator: Any) -> RunFolder:
        """Raises InputError where the folder holds another run, or a process that trains."""
        if not config.output:
            raise InputError("no output is given", expected="output: a folder for this run")
        folder = cls(config, accelerator)
        folder.path.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            folder._lock = _lock(folder.path)
        with ExitStack() as stack:
            stack.push(folder.__exit__)  # where it holds another run
            folder._compare()
            stack.pop_all()
        return folder

    def is_finished(self) -> bool:
        """Raises InputError where the run is over and was shorter than it is now asked to be."""
        if not self.final.is_dir():
            return False
        done = self._written()["settings"]["steps"]
        if done < self.config.steps:
            raise InputError(
                f"the run in {self.path} is over, after {done} steps",
                expected=f"steps={done} or less",
                got=self.config.steps,
                fix="Begin a new run with model set to its folder final.",
            )
        return True

    def resume(
        self, models: Models, optimizer: Any, alarms: Alarms, judge_watch: JudgeWatch | None
    ) -> int:
        """The step to begin with; what is loaded is as it was behind the step before."""
        self._facts["policy"] = JudgeWatch(models.policy).fingerprint()
        self._facts["judge"] = None if judge_watch is None else judge_watch.fingerprint()
        self._compare()
        self.accelerator.wait_for_everyone()  # nobody reads what is about to be written
        if self.accelerator.is_main_process:
            unfinished = self.path / "run.unfinished"
            content = {"settings": self.config.to_dict(), "begun with": self._facts}
            unfinished.write_text(json.dumps(content, indent=2) + "\n")
            os.replace(unfinished, self.path / "run.json")
        path = latest_checkpoint(self.path / "checkpoints")
        if path is None:
            return 1
        state = load_checkpoint(path, self.accelerator.device)
        parameters = dict(models.policy.named_parameters())
        with torch.no_grad():
            for name, value in state["policy"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        alarms.load(state["alarms"])
        return int(state["step"]) + 1

    def checkpoint(self, step: int, models: Models, optimizer: Any, alarms: Alarms) -> None:
        parameters = models.policy.named_parameters()
        state = {
            "step": step,
            "policy": {name: value.detach() for name, value in parameters if value.requires_grad},
            "optimizer": optimizer.state_dict(),
            "alarms": alarms.state(),
        }
        save_checkpoint(self.path / "checkpoints", step, state, self.config.keep_checkpoints)

    def finish(self, models: Models) -> None:
        """Writes the final weights: where they are, the run is over."""
        unfinished = self.path / "final.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        models.policy.save_pretrained(unfinished)
        models.tokenizer.save_pretrained(unfinished)
        replace_folder(unfinished, self.final)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _written(self) -> dict[str, Any]:
        path = self.path / "run.json"
        written: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return written

    def _compare(self) -> None:
        written = self._written()
        if not written:
            return
        differences, self.changes = self.config.differences(written["settings"])
        then = written["begun with"]
        differences += [
            f"{name}: not what it was then"
            for name, value in self._facts.items()
            if name in then and then[name] != value
        ]
        if differences:
            raise InputError(
                f"{self.path} holds a run with other settings: {'; '.join(differences)}",
                fix="Choose another output, or delete that folder.",
            )


def _hash(path: str | None) -> str | None:
    """SHA-256 of a file, or of that of FILE.py:FUNCTION; None where there is none to read."""
    file = None if path is None else Path(path if Path(path).is_file() else path.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None


def _lock(folder: Path) -> Any:
    """Held as long as the file is open; a process that dies, in whatever way, lets go of it."""
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InputError(
            f"another process is training in {folder}", fix="Wait for it, or choose another output."
        ) from None
    return lock
