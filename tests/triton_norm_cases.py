"""Batches of lanes for the kernels that sum over entries, their truth, and two rules that judge.

Integer inputs must give equal bits, random ones at the scale of real gradients stay within a
forward-error bound. What no entry names is NaN: rows, columns behind the last, and entries before
the first lane and behind the last one name such a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from g2r_fast.kernels.configs import NormConfig, norm_config
from g2r_fast.kernels.squared_gradient_norms import WAYS
from g2r_fast.kernels.squared_row_sums import CONFIG
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Round to nearest; tensor cores cut what they add.
UNIT = 2.0**-23 if ON_GPU else 2.0**-24
NAN = float("nan")
# Small tiles, so that a lane of few entries has many: the kernels are those of the shipped ones.
SMALL = tuple(replace(norm_config(way, torch.float32), tile=16, step=16) for way in WAYS)
TILE = 16
# Of the sums of rows, as they are shipped.
STEP_ROWS, STEP_COLUMNS = CONFIG.blocks["ROWS"], CONFIG.blocks["COLUMNS"]


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for comes filled with NaN: a part that nobody wrote shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))


class Batch(NamedTuple):
    inputs: Tensor
    grads: Tensor
    kept: Tensor
    rows: Tensor
    offsets: list[int]

    def entries(self) -> list[range]:
        return [range(start, stop) for start, stop in itertools.pairwise(self.offsets)]

    def lanes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """float64 inputs and gradients of every lane."""
        for entries in self.entries():
            at = slice(entries.start, entries.stop)
            a, b = self.inputs[self.kept[at].long()], self.grads[self.rows[at].long()]
            yield a.double().cpu(), b.double().cpu()


ROWS = 48  # of inputs and of gradients; every third is NaN, as is the first
MARGIN = 3  # entries before the first lane and behind the last


def make_batch(
    kind: str, dtype: torch.dtype, d: int, p: int, counts: list[int], seed: int = 0
) -> Batch:
    generator = torch.Generator().manual_seed(seed + 7 * d + p)

    def matrix(width: int, scale: float) -> Tensor:
        memory = torch.full((ROWS, width + 5), NAN, dtype=torch.float32)
        if kind == "integers":
            values = torch.randint(-1, 2, (ROWS, width), generator=generator).float()
        else:
            values = torch.randn(ROWS, width, generator=generator) * scale
        memory[:, :width] = values
        memory[::3] = NAN
        return memory.to(DEVICE, dtype)[:, :width]

    def entries() -> Tensor:
        named = torch.randint(0, ROWS // 3, (sum(counts),), generator=generator) * 3
        named += torch.randint(1, 3, named.shape, generator=generator)
        around = torch.zeros(MARGIN, dtype=torch.int64)
        return torch.cat([around, named, around]).to(DEVICE, torch.int32)

    offsets = [MARGIN + n for n in itertools.accumulate(counts, initial=0)]
    return Batch(matrix(d, 1.0), matrix(p, 0.02), entries(), entries(), offsets)


def gradient_truth(batch: Batch) -> Tensor:
    return torch.stack([(a.T @ b).square().sum() for a, b in batch.lanes()])


def gradient_sizes(batch: Batch, way: str) -> Tensor:
    """The sum of the absolute values of what a lane's way adds up."""
    if way == "direct":
        return torch.stack([2 * (a.abs().T @ b.abs()).square().sum() for a, b in batch.lanes()])
    return torch.stack(
        [((a.abs() @ a.abs().T) * (b.abs() @ b.abs().T)).sum() for a, b in batch.lanes()]
    )


def row_sum_truth(batch: Batch) -> Tensor:
    return torch.stack([b.sum(0).square().sum() for _, b in batch.lanes()])


def row_sum_sizes(batch: Batch) -> Tensor:
    return torch.stack([2 * b.abs().sum(0).square().sum() for _, b in batch.lanes()])


def longest_chain(depth: int, step: int, tile: int) -> int:
    """Roundings of one term: within a step, over the steps, in a tile of squares or products.

    Twice the first two, as there are two factors. The last is a tree on a device; in the
    interpreter NumPy's pairwise sums, eight running ones over at most 128 terms at their leaves.
    """
    return 2 * (step + math.ceil(depth / step) + 1) + 2 * 20 + 2 * math.ceil(math.log2(tile))


# Of a batch: what was found, the truth, the size of its terms and their longest chain of roundings.
Judged = Callable[[Batch], tuple[Tensor, Tensor, Tensor, int]]


def gradients_of(
    function: Callable[..., Tensor], way: str | None, configs: tuple[NormConfig, ...] | None
) -> Judged:
    """The call that a rule judges, and its truth, sizes and longest chain for a batch."""

    def judged(batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
        found = function(*batch, way=way, configs=configs)
        ways = WAYS if way is None else [way]
        sizes = torch.stack([gradient_sizes(batch, each) for each in ways]).amax(0)
        depth = max(batch.inputs.shape[1], batch.grads.shape[1], *map(len, batch.entries()))
        used = configs or [norm_config(each, batch.inputs.dtype) for each in ways]
        chain = max(longest_chain(depth, config.step, config.tile) for config in used)
        return found, gradient_truth(batch), sizes, chain

    return judged


def row_sums_of(function: Callable[..., Tensor]) -> Judged:
    def judged(batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
        found = function(batch.grads, batch.rows, batch.offsets)
        chain = longest_chain(max(map(len, batch.entries())), STEP_ROWS, STEP_COLUMNS)
        return found, row_sum_truth(batch), row_sum_sizes(batch), chain

    return judged


def equal_bits(judged: Judged, *arguments: Any) -> bool:
    batch = make_batch("integers", *arguments)
    found, truth, sizes, _ = judged(batch)
    assert float(sizes.max()) < 2**24, "not every sum is exact in float32"
    return torch.equal(found.cpu(), truth)


def within_bound(judged: Judged, *arguments: Any) -> bool:
    found, truth, sizes, chain = judged(make_batch("random", *arguments))
    alive = bool(found.isfinite().all()) and float(found.norm()) > 0
    return alive and bool(((found.cpu() - truth).abs() <= chain * UNIT * sizes).all())


RULES = [equal_bits, within_bound]
COUNTS = [0, 1, TILE - 1, TILE, TILE + 1, 0, 3 * TILE + 2, 2 * TILE, 5]
SUMMED = [0, 1, STEP_ROWS - 1, STEP_ROWS, STEP_ROWS + 1, 0, 3 * STEP_ROWS + 2]
