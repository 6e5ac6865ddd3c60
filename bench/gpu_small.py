"""Every GPU kernel once, small and with odd sizes, its answers checked: for compute-sanitizer.

compute-sanitizer --tool memcheck python -m bench.gpu_small
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from bench.gpu_attention import AttentionCase, attention
from bench.gpu_rows import row_kernels
from bench.gpu_scenarios import gate_on_gpu
from bench.ours import backend_of, ours
from bench.rivals import loop
from bench.scenarios import Scenario

CASES = {
    "attention, 64": AttentionCase(6, 2, 64, 70, (40, 75), tail=5, group_size=2, items=2),
    "attention, 128": AttentionCase(14, 2, 128, 130, (33, 90), tail=3, group_size=1, items=3),
}
ENGINE = {
    "engine, head_dim 16": Scenario(
        model="tiny", dtype="bfloat16", group_size=2, items=2, prompt=12, response=(60, 70), tail=4
    ),
    "engine, head_dim 64": Scenario(
        model="0.5b-layers", dtype="bfloat16", group_size=1, items=2, prompt=12,
        response=(60, 70), tail=4, true_share=0.5,
    ),
}  # fmt: skip


def _engine(scenario: Scenario, device: str) -> dict[str, Any]:
    model, workload = scenario.build()
    reference = loop(model.float(), workload)
    model, workload = scenario.build()
    same = loop(model, workload)
    model, workload = model.to(device), workload.to(device)  # type: ignore[arg-type]
    values, logps = ours(model, workload)
    found = ([None if x is None else x.cpu() for x in values], logps.cpu())
    everything = list(range(len(workload.judgements)))
    errors = gate_on_gpu((reference, same), found, None, everything, workload)
    return {"backend": backend_of(model), **errors}


def main(device: str = "cuda") -> int:
    begun = time.perf_counter()
    wrong = []

    def told(name: str, entry: dict[str, Any]) -> None:
        reason = entry.get("refused") or entry.get("not_measured")
        if reason:
            wrong.append(f"{name}: {reason}")
        print(f"[{time.perf_counter() - begun:6.1f} s] {name}: {reason or 'right'}", flush=True)

    for name, entry in row_kernels(device, None, small=True).items():
        told(name, entry)
    for name, case in CASES.items():
        for kernel, entry in attention(case, device, repeats=1).items():
            if isinstance(entry, dict):
                told(f"{name}, {kernel}", entry)
    for name, scenario in ENGINE.items():
        try:
            print(f"{name}: {_engine(scenario, device)}", flush=True)
        except Exception as error:
            told(name, {"refused": f"{type(error).__name__}: {error}"})
    if device == "cuda":
        torch.cuda.synchronize()
    print("\n".join(wrong) or "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
