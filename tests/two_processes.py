"""Run a script in two processes that talk by gloo, as `accelerate launch` does on two devices."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from forked import Forked

HERE = Path(__file__).resolve().parent


def run_in_two_processes(script: Path, *arguments: str) -> list[str]:
    """`python script arguments` as rank 0 and 1; what each printed. Raises where one fails."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = str(chosen.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        processes.append(Forked([str(script), *arguments], HERE.parent, environment))
    done = [process.wait() for process in processes]
    for process in done:
        if process.returncode:
            raise AssertionError(process.stderr)
    return [process.stdout for process in done]
