"""Memory beyond the model that one way of computing a signal needs, in a process of its own.

    python -m bench.signal_memory vigor-float32 loop

Prints one line of JSON: bytes of the parameters, and the most memory resident during one run less
what was resident before it. Linux alone: it resets the high-water mark of /proc/self/status.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.signal_scenarios import RIVALS_OF, SIGNAL_SCENARIOS

__all__ = ["extra_memory", "peak_of"]

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} does not say {field}")
    return 1024 * int(found[1])


def peak_of(run: Any) -> int:
    """Bytes by which resident memory rose at most while `run()` was running."""
    gc.collect()
    RESET.write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def extra_memory(scenario: str, rival: str, threads: int) -> dict[str, Any]:
    """`{"model_bytes", "extra_bytes"}` of a fresh process, or `{"not_measured": why}`."""
    command = [sys.executable, "-m", "bench.signal_memory", scenario, rival]
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"not_measured": last}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=SIGNAL_SCENARIOS)
    parser.add_argument("rival")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scenario = SIGNAL_SCENARIOS[arguments.scenario]
    rival = RIVALS_OF[scenario.method][arguments.rival]
    model, rollouts = scenario.build()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    extra = peak_of(lambda: rival.run(model, rollouts))
    print(json.dumps({"model_bytes": sum(sizes), "extra_bytes": extra}))


if __name__ == "__main__":
    main()
