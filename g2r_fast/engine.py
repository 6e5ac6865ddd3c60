"""Which engine serves a model, and how a batch is cut to fit into memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from .decoder import FrozenDecoder
from .errors import InputError, UnsupportedModelError
from .fallback import AutogradEngine, EngineRun, Progress
from .plan import DecoderShape, PackedPlan, PackedSequence, Read, micro_batches
from .signal import Cotangents, LeafRows, Signal

__all__ = ["ENGINES", "Engine", "EngineRun", "PackedEngine", "choose_engine"]

logger = logging.getLogger("g2r_fast")

ENGINES = ("auto", "packed", "autograd")

# Share of the free memory that a batch's saved activations may take: the rest is for what lives
# within one layer, for logits, and for whoever else is on the machine.
_MEMORY_SHARE = 0.5
_MAX_ROWS = 2**17  # beyond this, products do not get faster and plans only get longer


class Engine(Protocol):
    name: str

    def run(
        self,
        sequences: Sequence[PackedSequence],
        signal: Signal,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> EngineRun:
        """Forward all sequences and bring back what the signal asks for."""
        ...


_told: set[str] = set()


def choose_engine(model: Any, engine: str = "auto") -> Engine:
    """The engine for a model; `"auto"` may fall back and says so once, with the reason.

    Raises InputError for an unknown name and UnsupportedModelError where a named engine cannot
    serve.
    """
    if engine not in ENGINES:
        raise InputError("unknown engine", expected=" | ".join(map(repr, ENGINES)), got=engine)
    if engine == "autograd":
        return AutogradEngine(model)
    try:
        return PackedEngine(model)
    except UnsupportedModelError as error:
        if engine == "packed":
            raise
        reason = "; ".join(error.reasons)
        if reason not in _told:
            _told.add(reason)
            warnings.warn(
                f"g2r_fast uses the slower autograd engine, same answers: {reason}",
                UserWarning,
                stacklevel=3,
            )
        return AutogradEngine(model)


class PackedEngine:
    """`FrozenDecoder` over micro-batches."""

    name = "packed"

    def __init__(self, model: Any) -> None:
        self.decoder = FrozenDecoder(model)

    def run(
        self,
        sequences: Sequence[PackedSequence],
        signal: Signal,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> EngineRun:
        """See `Engine.run`. Running out of CUDA memory halves max_tokens and goes on."""
        done = EngineRun(rows_unshared=sum(len(s.input_ids) for s in sequences))
        budget = max_tokens if max_tokens is not None else self._budget(sequences)
        pending = list(range(len(sequences)))
        while pending:
            waiting = pending
            for batch in micro_batches([sequences[i] for i in waiting], budget):
                chosen = [waiting[i] for i in batch]
                plan = PackedPlan.build([sequences[i] for i in chosen])
                logger.debug("packed engine: %s", plan.describe(self.decoder.shape))
                try:
                    backward_rows = self.decoder.run(plan, _Renamed(signal, chosen))
                except torch.cuda.OutOfMemoryError:
                    budget = _halved(plan, chosen)
                    torch.cuda.empty_cache()
                    break
                done.rows_forward += plan.rows
                done.rows_backward += backward_rows
                done.micro_batches += 1
                finished = set(chosen)
                pending = [i for i in pending if i not in finished]
                if progress is not None:
                    progress(len(chosen))
        return done

    def _budget(self, sequences: Sequence[PackedSequence]) -> int:
        """Rows that fit into a share of the free memory, at least the longest sequence."""
        shape = self.decoder.shape
        free = _free_bytes(self.decoder.weights.device)
        rows = min(_MAX_ROWS, int(free * _MEMORY_SHARE / _bytes_per_row(shape)))
        return max(rows, max((len(s.input_ids) + s.backward_rows for s in sequences), default=1))


class _Renamed:
    """A signal that sees a micro-batch under the whole batch's sequence numbers."""

    def __init__(self, signal: Signal, names: Sequence[int]) -> None:
        self.leaf, self.reads_linears = signal.leaf, signal.reads_linears
        self._signal, self._names = signal, names

    def cotangents(self, logits: torch.Tensor, reads: Sequence[Read]) -> Cotangents | None:
        renamed = [replace(read, sequence=self._names[read.sequence]) for read in reads]
        return self._signal.cotangents(logits, renamed)

    def on_linear(
        self, name: str, inputs: torch.Tensor, output_grads: torch.Tensor, rows: LeafRows
    ) -> None:
        self._signal.on_linear(name, inputs, output_grads, self._rename(rows))

    def on_leaf(self, rows: LeafRows, values: torch.Tensor, grads: torch.Tensor) -> None:
        self._signal.on_leaf(self._rename(rows), values, grads)

    def _rename(self, rows: LeafRows) -> LeafRows:
        return replace(rows, lanes=tuple(self._names[lane] for lane in rows.lanes))


def _halved(plan: PackedPlan, chosen: Sequence[int]) -> int:
    """Half the rows of a plan that did not fit; raises where it was one sequence already."""
    if len(chosen) == 1:
        raise InputError(
            "out of CUDA memory with a single sequence",
            got=f"{plan.rows + plan.backward_rows} rows",
            index=chosen[0],
            fix="Free memory on the device, or shorten the sequence.",
        )
    longest = max(len(s.input_ids) + s.backward_rows for s in plan.sequences)
    budget = max(longest, (plan.rows + plan.backward_rows) // 2)
    warnings.warn(
        f"out of CUDA memory: going on with max_tokens={budget}", ResourceWarning, stacklevel=4
    )
    return budget


def _bytes_per_row(shape: DecoderShape) -> int:
    """Saved activations of one row in all layers, and one row's gradients within a layer."""
    one = PackedPlan.build([PackedSequence([0], 0)])
    gradients = 8 * max(shape.hidden, shape.heads * shape.head_dim) * shape.stat_itemsize
    return one.saved_bytes(shape) + gradients


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30  # no way to ask: small enough for a laptop
