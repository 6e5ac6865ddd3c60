"""The two sizes of the plain PyTorch engine: score elements per attention tile, rows per product.

    python -m bench.tile_sizes [--save NAME]

The reason for `_TILE` in g2r_fast/eager/attention.py and `_CHUNK` in g2r_fast/tape.py: medians of
interleaved runs of one workload, one size changed at a time. And the reason for
g2r_fast/eager/products.py: the rates of torch.mm and of oneDNN at the engine's shapes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.harness import facts, save
from bench.ours import ours
from bench.workload import build_model, make_workload
from g2r_fast import tape
from g2r_fast.eager import attention

TILES = [2**n for n in range(17, 23)]
CHUNKS = [2**n for n in range(7, 12)]
PRODUCTS = [(512, 512, 1536), (512, 1536, 512), (64, 512, 1536), (1024, 64, 512), (64, 256, 4096)]


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def sizes(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by size."""
    model = build_model("h512l8", layers=4)
    workload = make_workload(
        group_size=2, items=8, prompt=512, response=(300, 600), tail=64, true_share=1.0
    )
    found = {}
    for name, table, values in (
        ("tile", attention._TILE, TILES),
        ("chunk", tape._CHUNK, CHUNKS),
    ):
        before = table["cpu"]

        def at(size: int, table: dict[str, int] = table) -> Callable[[], Any]:
            def run() -> None:
                table["cpu"] = size
                ours(model, workload)

            return run

        ways = {str(value): at(value) for value in values}
        ways[str(values[0])]()
        found[name] = interleaved(ways, repeats)
        table["cpu"] = before
    return found


def products(repeats: int) -> dict[str, dict[str, float]]:
    """GFLOP/s, median, of `[n, k] @ [m, k].T` in float32."""
    found = {}
    for n, k, m in PRODUCTS:
        x, weight = torch.randn(n, k), torch.randn(m, k)
        ways = {
            "torch.mm": lambda x=x, w=weight: torch.mm(x, w.t()),
            "oneDNN": lambda x=x, w=weight: torch.ops.mkldnn._linear_pointwise(
                x, w, None, "none", [], ""
            ),
        }
        interleaved(ways, 3)
        seconds = interleaved(ways, repeats)
        found[f"{n}x{k}x{m}"] = {
            name: 2 * n * k * m / median(s) / 1e9 for name, s in seconds.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["G2R_BACKEND"] = "reference"  # the native kernels have sizes of their own
    content: dict[str, Any] = {"facts": facts(), "gflops": products(10 * arguments.repeats)}
    for shape, rates in content["gflops"].items():
        print(shape, {name: round(rate) for name, rate in rates.items()})
    content["seconds"] = sizes(arguments.repeats)
    for name, by_size in content["seconds"].items():
        for size, seconds in by_size.items():
            print(f"{name} {size}: {median(seconds):.2f} s")
    if arguments.save:
        print(f"saved {save(arguments.save, content)}")


if __name__ == "__main__":
    main()
