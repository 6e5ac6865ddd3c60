"""Python processes that need not import torch and transformers, seconds each, once more.

They are forked off one that has imported these and has done nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_MODELS = "transformers.models"
_SERVER.set_forkserver_preload(
    ["torch", "accelerate", f"{_MODELS}.auto.modeling_auto", f"{_MODELS}.qwen2.modeling_qwen2"]
)


def _run(command: list[str], cwd: Path, environment: dict[str, str], said: Path) -> None:
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # nobody reads it any more
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    where = "" if command[0] in ("-c", "-m") else str(Path(command[0]).resolve().parent)
    more = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [where, *filter(None, more), str(ROOT)]
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


class Forked:
    """`python command…`, as `subprocess.Popen` would start it."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self.command, self.said = command, tempfile.TemporaryDirectory()
        arguments = (command, cwd, environment, Path(self.said.name))
        self.process = _SERVER.Process(target=_run, args=arguments, daemon=True)
        self.process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with self.said as folder:
            out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(self.command, self.process.exitcode, out, err)


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python command…` with this process's environment and what is named."""
    return Forked(command, cwd, os.environ | environment).wait()
