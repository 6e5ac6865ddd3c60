"""A signal that keeps everything it is shown, and what the packed engine shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patterns import Batch
from torch import Tensor

from g2r_fast.engine import PackedEngine
from g2r_fast.plan import PackedSequence, Read
from g2r_fast.signal import Cotangents, LeafRows, LinearRows


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

    def on_linear(
        self, outputs: Mapping[str, int], inputs: Tensor, output_grads: Tensor, rows: LinearRows
    ) -> None:
        for lane, sequence in enumerate(rows.lanes):
            entries = slice(rows.offsets[lane], rows.offsets[lane + 1])
            grads = output_grads[rows.rows[entries]] * 2.0 ** rows.exponents[lane]
            formed = grads.mT @ inputs[rows.kept[entries]]
            for name, part in zip(outputs, formed.split(list(outputs.values())), strict=True):
                self.weight_grads[sequence, name] = part

    def on_scale(self, name: str, products: Tensor, rows: LinearRows) -> None:
        for lane, sequence in enumerate(rows.lanes):
            entries = slice(rows.offsets[lane], rows.offsets[lane + 1])
            grad = products[rows.rows[entries]].sum(0) * 2.0 ** rows.exponents[lane]
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
