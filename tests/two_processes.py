"""Run a script in two processes that talk by gloo, as `accelerate launch` does on two devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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
            "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise AssertionError(errors)
    return [output for output, _ in outputs]
