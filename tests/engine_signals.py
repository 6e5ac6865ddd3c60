"""A signal that keeps everything it is shown, and what the packed engine shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patterns import Batch
from torch import Tensor

from g2r_fast.engine import PackedEngine
from g2r_fast.plan import PackedSequence, Read
from g2r_fast.signal import Cotangents, LeafRows


class Recorder:
    """A signal that keeps everything it is shown: log p(target) at every read."""

    def __init__(self, target_ids: Sequence[int], leaf: int = 0, reads_linears: bool = False):
        self.leaf, self.reads_linears = leaf, reads_linears
        self.target_ids = target_ids
        self.leaves: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.weight_grads: dict[tuple[int, str], Tensor] = {}

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents:
        values = -logits.softmax(-1)
        for i, read in enumerate(reads):
            values[i, self.target_ids[read.sequence]] += 1
        return Cotangents(range(len(reads)), values)

    def on_linear(self, name: str, inputs: Tensor, output_grads: Tensor, rows: LeafRows) -> None:
        for lane, sequence in enumerate(rows.lanes):
            grad = output_grads[:, lane].mT.to(inputs.dtype) @ inputs
            key = (sequence, name)
            self.weight_grads[key] = self.weight_grads.get(key, 0) + grad

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        for lane, sequence in enumerate(rows.lanes):
            for t in range(rows.stop - rows.start):
                self.leaves[sequence, rows.start + t] = (values[t].clone(), grads[t, lane].clone())


def record(model: Any, batch: Batch, reads: tuple[int, ...] = (-1,), **options: Any) -> Recorder:
    signal = Recorder(batch.target_ids, **options)
    sequences = [
        PackedSequence(ids, start, reads)
        for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
    ]
    PackedEngine(model).run(sequences, signal)
    return signal
