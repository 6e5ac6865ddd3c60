"""How far float32 and bfloat16 are from float64, at full size: ours and the plain loop.

    python -m bench.accuracy [--save NAME]

`||b - b*|| / ||b*||` per judgement, b* from the float64 reference decoder on the same weights.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

from bench.harness import facts, save
from bench.ours import ours
from bench.rivals import loop
from bench.workload import build_model, make_workload
from g2r_fast.reference import (
    ReferenceDecoder,
    input_gradients,
    relative_error,
    token_scores,
)


def errors(dtype: torch.dtype, items: int) -> dict[str, list[float]]:
    """Relative errors of every judgement of one response of 300 to 600 tokens."""
    model = build_model("h512l8", dtype=dtype)
    workload = make_workload(
        group_size=1, items=items, prompt=512, response=(300, 600), tail=64, true_share=1.0
    )
    decoder = ReferenceDecoder.from_model(model)
    span = workload.span(0)
    truth = [
        token_scores(
            *input_gradients(
                decoder, workload.sequence(i, k), (span.start, span.stop), workload.target_id
            )
        )
        for i, k in workload.judgements
    ]
    found = {}
    for name, way in (("loop", loop), ("ours", ours)):
        scores, _ = way(model, workload)
        pairs = zip(scores, truth, strict=True)
        found[name] = [float(relative_error(s, t)) for s, t in pairs if s is not None]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    parser.add_argument("--items", type=int, default=4)
    arguments = parser.parse_args()
    content: dict[str, Any] = {"facts": facts(), "medians": {}, "errors": {}}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        content["errors"][name] = errors(dtype, arguments.items)
        content["medians"][name] = {
            way: float(f"{median(values):.2g}") for way, values in content["errors"][name].items()
        }
        print(name, content["medians"][name])
    if arguments.save:
        print(f"saved {save(arguments.save, content)}")


if __name__ == "__main__":
    main()
