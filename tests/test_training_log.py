"""The log of a training run: whole lines, whatever killed it, and one run's lines only."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from g2r_fast.errors import InputError
from g2r_fast.training.log import LOG_NAME, RunLog, read_log

ROOT = Path(__file__).resolve().parents[1]


def figures(step: int) -> dict[str, float]:
    return {"step": step, "reward/mean": step / 7, "policy/kl": 1e-9 * step}


def write(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with RunLog(folder, resume_step) as log:
        for step in steps:
            log.write(figures(step))
            if step % 2 == 0:
                log.note("alarm", f"at {step}")


def expected(last: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, last + 1):
        lines.append(figures(step))
        if step % 2 == 0:
            lines.append({"step": step, "note": "alarm", "text": f"at {step}"})
    return lines


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    write(folder, range(1, 5))
    assert read_log(folder) == expected(4)
    text = (folder / LOG_NAME).read_text(encoding="utf-8")
    assert text.endswith("}\n") and text.count("\n") == 6
    assert sorted(p.name for p in folder.iterdir()) == [LOG_NAME]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    for step in (1, 2):
        log.write(figures(step))
        assert len(read_log(tmp_path)) == step
    log.close()


def test_numbers_that_are_none_stay_json(tmp_path: Path) -> None:
    bad = {"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}
    with RunLog(tmp_path, None) as log:
        log.write(bad)
        log.note("alarm", "NaN")
    first = (tmp_path / LOG_NAME).read_text().splitlines()[0]

    def refuse(name: str) -> float:
        raise AssertionError(name)

    json.loads(first, parse_constant=refuse)
    line, note = read_log(tmp_path)
    assert math.isnan(line.pop("a"))
    assert line == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1}
    assert note["text"] == "NaN"


def test_text_of_any_kind_is_one_line(tmp_path: Path) -> None:
    texts = ["two\nlines\r\n\x85", "解 ✓", "lone \udc80 surrogate", '"}\u2028', "\0"]
    with RunLog(tmp_path, None) as log:
        for text in texts:
            log.note("alarm", text)
    assert [line["text"] for line in read_log(tmp_path)] == texts


# --- killed and resumed ---------------------------------------------------------------------------


def test_resumed_it_is_the_log_of_one_run(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), resume_step=4)
    assert read_log(tmp_path) == expected(6)
    write(tmp_path, range(6, 10), resume_step=5)  # and once more
    assert read_log(tmp_path) == expected(9)
    write(tmp_path, range(10, 10), resume_step=9)
    assert read_log(tmp_path) == expected(9)


def test_a_new_run_forgets_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(1, 3))
    assert read_log(tmp_path) == expected(2)
    write(tmp_path, range(1, 4), resume_step=0)
    assert read_log(tmp_path) == expected(3)


def test_a_log_cut_anywhere(tmp_path: Path) -> None:
    """Killed after any byte of the last lines, it is read, resumed, and whole again."""
    write(tmp_path, range(1, 6))
    with RunLog(tmp_path, 5) as log:
        log.write({**figures(6), "note?": 0.5})
        log.note("alarm", "解 at 6")
    content = (tmp_path / LOG_NAME).read_bytes()
    whole = read_log(tmp_path)
    start = content.index(b'{"step": 5')
    for cut in range(start, len(content) + 1):
        (tmp_path / LOG_NAME).write_bytes(content[:cut])
        read = read_log(tmp_path)
        assert read == whole[: len(read)] and len(read) >= content[:cut].count(b"\n")
        write(tmp_path, range(5, 7), resume_step=4)
        assert read_log(tmp_path) == expected(6), cut


KILLED = """
import sys
from pathlib import Path
from g2r_fast.training.log import RunLog
log = RunLog(Path(sys.argv[1]), None)
for step in range(1, 10**9):
    log.write({"step": step, "reward/mean": 0.5})
    print(step, flush=True)
"""


def test_killed_it_has_lost_nothing_that_was_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        for _ in range(50):
            step = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    steps = [line["step"] for line in read_log(tmp_path)]
    assert step >= 50 and steps == list(range(1, len(steps) + 1)) and len(steps) >= step


def test_killed_while_it_resumes_the_old_log_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 8))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        RunLog(tmp_path, 4)
    assert read_log(tmp_path) == expected(7)
    write(tmp_path, range(5, 6), resume_step=4)
    assert read_log(tmp_path) == expected(5)


def test_a_checkpoint_that_came_without_its_log(tmp_path: Path) -> None:
    write(tmp_path, range(5, 7), resume_step=4)
    assert [line["step"] for line in read_log(tmp_path)] == [5, 6, 6]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"a": 1}', '{"step": 1.5}', "", "\xff"])
def test_a_line_in_the_middle_that_cannot_be_read(tmp_path: Path, line: str) -> None:
    write(tmp_path, range(1, 2))
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b'\n{"step": 2}\n')
    before = path.read_bytes()
    for read in (lambda: read_log(tmp_path), lambda: RunLog(tmp_path, 1)):
        with pytest.raises(InputError, match="line 2"):
            read()
    assert path.read_bytes() == before


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder with log\.jsonl"):
        read_log(tmp_path)


def test_steps_go_up(tmp_path: Path) -> None:
    with RunLog(tmp_path, 4) as log:
        with pytest.raises(InputError, match="step 4 or a later one; got 3"):
            log.write(figures(3))
        with pytest.raises(InputError, match="without their step"):
            log.write({"reward/mean": 1.0})
        log.write(figures(5))
        with pytest.raises(InputError, match="out of order"):
            log.write(figures(4))
    assert read_log(tmp_path) == [figures(5)]


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'tensorboard' \| 'wandb'; got 'mlflow'.*index 1"):
        RunLog(tmp_path / "run", None, ["wandb", "mlflow"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    write(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(InputError, match=f"pip install {tracker}"):
        RunLog(tmp_path, None, [tracker])
    assert read_log(tmp_path) == expected(3)  # nothing was forgotten for a run that did not begin


# --- trackers -------------------------------------------------------------------------------------


class Writer:
    """In place of torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.calls: list[Any] = [(Path(log_dir).name, purge_step)]
        written.append(self.calls)

    def add_scalar(self, *call: Any) -> None:
        self.calls.append(call)

    def add_text(self, *call: Any) -> None:
        self.calls.append(call)

    def close(self) -> None:
        self.calls.append("closed")


written: list[Any] = []


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written.clear()
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for resume in (None, 4):
        with RunLog(tmp_path, resume, ["tensorboard"], {"lr": 1e-6}) as log:
            log.write({"step": 5, "reward/mean": 0.5})
            log.note("alarm", "text")
    assert [calls[0] for calls in written] == [("tensorboard", 0), ("tensorboard", 5)]
    _, (name, config, _), *rest = written[1]
    assert name == "config" and "lr: 1e-06" in config
    assert rest == [("reward/mean", 0.5, 5), ("alarm", "text", 5), "closed"]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def __init__(self, id: str | None) -> None:
            self.id = id or f"id{len(calls)}"

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    def init(**options: Any) -> Run:
        calls.append(("init", (), options))
        return Run(options["id"])

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resume in (None, 4, None):
        with RunLog(tmp_path, resume, ["wandb"], {"lr": 1e-6}) as log:
            log.write({"step": 5, "reward/mean": 0.5})
            log.note("alarm", "text")
    inits = [options for name, _, options in calls if name == "init"]
    assert [(o["id"], o["resume"]) for o in inits] == [(None, None), ("id1", "allow"), (None, None)]
    assert inits[0]["config"] == {"lr": 1e-6} and inits[0]["dir"] == str(tmp_path)
    assert calls[1:6] == [
        ("define_metric", ("step",), {}),
        ("define_metric", ("*",), {"step_metric": "step"}),
        ("log", ({"step": 5, "reward/mean": 0.5},), {}),
        ("alert", (), {"title": "alarm, step 5", "text": "text"}),
        ("finish", (), {}),
    ]
