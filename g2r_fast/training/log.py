"""The log of a training run: one line of JSON a step, and TensorBoard or wandb beside it.

`log.jsonl` in the run's folder holds figures and notes in the order they came. A run that is
resumed at a step forgets all that was logged after it, so that the log is that of one run. No torch
in here.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ..errors import InputError

__all__ = ["LOG_NAME", "TRACKERS", "RunLog", "read_log"]

LOG_NAME = "log.jsonl"
TRACKERS = ("tensorboard", "wandb")


class RunLog:
    """The log of one run, open for the steps to come.

    Every line is a JSON object with its `"step"`: the figures of a step, or a note,
    `{"step", "note": kind, "text"}`. JSON has no NaN: it is written as `"NaN"`, infinities as
    `"Infinity"` and `"-Infinity"`, and `read_log` turns them back. A line is handed to the
    system as a whole as soon as it is written; a killed process loses at most half of its last one.

    Args:
        folder: the run's folder; made where it is not there.
        resume_step: the last step that counts, of a run that goes on; None: a new run, and what a
            run before it logged in this folder is forgotten.
        trackers: of "tensorboard" and "wandb". TensorBoard's files lie in the folder.
        config: the run's settings, for trackers that show them.

    Raises InputError for an unknown tracker or one that is not installed, and for a log that cannot
    be read.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        for index, name in enumerate(trackers):
            if name not in TRACKERS:
                expected = " | ".join(map(repr, TRACKERS))
                raise InputError("unknown tracker", expected=expected, got=repr(name), index=index)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        self._step = 0 if resume_step is None else resume_step
        kept = [] if resume_step is None else _lines_until(self.path, resume_step)
        self._trackers: list[_Tracker] = [
            _OPEN[name](folder, resume_step, dict(config or {})) for name in trackers
        ]
        # Replaced as a whole: a run that is killed here finds the old log or the new one.
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(fresh, self.path)
        self._file = self.path.open("ab")

    def write(self, figures: Mapping[str, float]) -> None:
        """Log the figures of one step, `"step"` among them."""
        if "step" not in figures:
            raise InputError(
                "figures without their step cannot be logged", expected="figures['step']"
            )
        step = int(figures["step"])
        if step < self._step:
            raise InputError(
                "a step is logged out of order",
                expected=f"step {self._step} or a later one",
                got=step,
            )
        self._step = step
        self._append({**figures, "step": step})
        for tracker in self._trackers:
            tracker.write(step, figures)

    def note(self, kind: str, text: str) -> None:
        """Log a line of text, such as an alarm, at the latest step."""
        self._append({"step": self._step, "note": kind, "text": text})
        for tracker in self._trackers:
            tracker.note(self._step, kind, text)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        values = {name: _to_json(value) for name, value in line.items()}
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        # A lone surrogate, which a response may hold, is no UTF-8.
        self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's log, notes among them; half a line at the end, of a killed run, is none.

    Raises InputError where there is no log, or a line before the last cannot be read.
    """
    path = folder / LOG_NAME
    if not path.is_file():
        raise InputError(
            "there is no log of a run", expected=f"a folder with {LOG_NAME}", got=str(folder)
        )
    return [values for _, values in _read(path)]


def _lines_until(path: Path, step: int) -> list[bytes]:
    if not path.exists():  # the checkpoint was taken elsewhere without it
        return []
    return [line for line, values in _read(path) if values["step"] <= step]


def _read(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError("it is no object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path.name} cannot be read",
                expected="one JSON object a line",
                got=str(error),
                index=f"line {number}",
                fix="Take the line out, or move the file away.",
            ) from error
        if "note" not in values:
            values = {name: _from_json(value) for name, value in values.items()}
        found.append((line, values))
    return found


_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(value: Any) -> Any:
    return _NAMES.get(value, value) if isinstance(value, str) else value


# --- trackers -------------------------------------------------------------------------------------


class _Tracker(Protocol):
    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def note(self, step: int, kind: str, text: str) -> None: ...

    def close(self) -> None: ...


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"the tracker {package} cannot be used: {error}", fix=f"pip install {package}"
        ) from error


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None, config: dict[str, Any]) -> None:
        _import("tensorboard", "tensorboard")
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # What was written after this step, before the run was killed, is not shown.
        purge = 0 if resume_step is None else resume_step + 1
        self._writer = writer(str(folder / "tensorboard"), purge_step=purge)
        text = "\n".join(f"    {name}: {value}" for name, value in config.items())  # as it stands
        self._writer.add_text("config", text, purge)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def note(self, step: int, kind: str, text: str) -> None:
        self._writer.add_text(kind, text, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One run of wandb for all the processes of one run of ours, by an id kept in its folder.

    wandb cannot forget: what a killed run logged after its last checkpoint stays, and the same
    steps come again. They are plotted over our own step, as wandb's own only goes up.
    """

    def __init__(self, folder: Path, resume_step: int | None, config: dict[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        id_file = folder / "wandb-id"
        known = resume_step is not None and id_file.exists()
        self._run = wandb.init(
            id=id_file.read_text(encoding="utf-8").strip() if known else None,
            resume="allow" if known else None,
            name=folder.name,
            dir=str(folder),
            config=config,
        )
        id_file.write_text(self._run.id + "\n", encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def note(self, step: int, kind: str, text: str) -> None:
        self._run.alert(title=f"{kind}, step {step}"[:60], text=text)

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
