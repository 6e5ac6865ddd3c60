"""Which engine serves a model, and how a batch is cut to fit into memory."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .backends import check_not_forced
from .decoder import FrozenDecoder
from .errors import InputError, UnsupportedModelError
from .fallback import AutogradEngine, EngineRun, Progress
from .plan import DecoderShape, PackedPlan, PackedSequence, Read, micro_batches
from .signal import Cotangents, LeafRows, LinearRows, Signal

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
        max_bytes: int | None = None,
    ) -> EngineRun:
        """Forward all sequences and bring back what the signal asks for.

        Without `max_tokens` what is kept for the backward takes at most half of the free memory,
        and at most `max_bytes`, or what a single sequence needs.
        """
        ...


_told: set[str] = set()


def choose_engine(model: Any, engine: str = "auto") -> Engine:
    """The engine for a model; `"auto"` may fall back and says so once, with the reason.

    Raises InputError for an unknown name or a setting (`G2R_BACKEND`, `G2R_CPU`, `G2R_BUILD`) that
    has no such value, UnsupportedModelError where a named engine cannot serve, and BackendError
    where the backend that `G2R_BACKEND` names cannot.
    """
    if engine not in ENGINES:
        raise InputError("unknown engine", expected=" | ".join(map(repr, ENGINES)), got=engine)
    if engine == "autograd":
        check_not_forced(["engine='autograd' runs the model's own operations"])
        return AutogradEngine(model)
    try:
        packed = PackedEngine(model)
    except UnsupportedModelError as error:
        if engine == "packed":
            raise
        check_not_forced(["the packed engine cannot serve this model", *error.reasons])
        reason = "; ".join(error.reasons)
        if reason not in _told:
            _told.add(reason)
            warnings.warn(
                f"g2r_fast uses the slower autograd engine, same answers: {reason}",
                UserWarning,
                stacklevel=3,
            )
        return AutogradEngine(model)
    packed.decoder.backend()  # now, and not when everything is encoded
    return packed


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
        max_bytes: int | None = None,
    ) -> EngineRun:
        """See `Engine.run`. Running out of CUDA memory halves the rows and goes on, with a
        warning; a single sequence that does not fit raises InputError."""
        backend = self.decoder.backend()
        done = EngineRun(
            rows_unshared=sum(len(s.input_ids) for s in sequences),
            backend=str(backend),
            backends_refused=dict(backend.refused),
        )
        logger.info("packed engine: backend %s", backend)
        if signal.leaf is None and not signal.reads_linears:  # nothing comes back, nothing is kept
            sequences = [replace(s, backward_start=len(s.input_ids)) for s in sequences]
        shape = self.decoder.shape_for(signal.reads_linears)
        weights = (1, 1)
        if max_tokens is None:
            max_bytes = sys.maxsize if max_bytes is None else max_bytes
            limit, weights = self._budget(sequences, shape, max_bytes)
        else:
            limit = max_tokens
        before = self.decoder.backward_seconds
        queue = deque(micro_batches(sequences, limit, weights))
        while queue:
            chosen = queue.popleft()
            names = sorted(chosen)
            plan = PackedPlan.build([sequences[i] for i in names])
            needed = weights[0] * plan.rows + weights[1] * plan.backward_rows
            backward_rows = None
            if needed <= limit or len(chosen) == 1:
                if logger.isEnabledFor(logging.INFO):
                    logger.info("packed engine: %s", plan.describe(shape))
                backward_rows = self._attempt(plan, _Renamed(signal, names))
                if backward_rows is None:
                    torch.cuda.empty_cache()
                    limit = needed // 2
                    rows = plan.rows + plan.backward_rows
                    going_on = (
                        f"half of its {rows} rows" if max_tokens is None else f"max_tokens={limit}"
                    )
                    _after_running_out(rows, going_on, sequences, chosen)
            if backward_rows is None:
                half = len(chosen) // 2
                queue.extendleft([chosen[half:], chosen[:half]])
                continue
            done.rows_forward += plan.rows
            done.rows_backward += backward_rows
            done.micro_batches += 1
            if progress is not None:
                progress(len(chosen))
        if self.decoder.weights.device.type == "cpu":
            done.backward_seconds = self.decoder.backward_seconds - before
        return done

    def _attempt(self, plan: PackedPlan, signal: Signal) -> int | None:
        """Backward rows, or None out of CUDA memory; what was allocated is free on return."""
        try:
            return self.decoder.run(plan, signal)
        except torch.cuda.OutOfMemoryError:
            return None

    def _budget(
        self, sequences: Sequence[PackedSequence], shape: DecoderShape, max_bytes: int
    ) -> tuple[int, tuple[int, int]]:
        """A share of the free memory, at least what the longest sequence needs, in bytes; and the
        bytes of a forward row, which is kept, and of a backward row, which is not."""
        forward, backward = weights = _bytes_per_row(shape)
        free = int(_free_bytes(self.decoder.weights.device) * _MEMORY_SHARE)
        limit = min(free, max_bytes, _MAX_ROWS * forward)
        logger.info("packed engine: %d forward rows fit into the free memory", limit // forward)
        alone = (forward * len(s.input_ids) + backward * s.backward_rows for s in sequences)
        return max(limit, max(alone, default=1)), weights


class _Renamed:
    """A signal that sees a micro-batch under the whole batch's sequence numbers."""

    def __init__(self, signal: Signal, names: Sequence[int]) -> None:
        self.leaf, self.reads_linears = signal.leaf, signal.reads_linears
        self._signal, self._names = signal, names

    def cotangents(self, logits: torch.Tensor, reads: Sequence[Read]) -> Cotangents | None:
        renamed = [replace(read, sequence=self._names[read.sequence]) for read in reads]
        return self._signal.cotangents(logits, renamed)

    def on_linear(
        self,
        outputs: Mapping[str, int],
        inputs: torch.Tensor,
        output_grads: torch.Tensor,
        rows: LinearRows,
    ) -> None:
        lanes = self._rename(rows.lanes)
        self._signal.on_linear(outputs, inputs, output_grads, replace(rows, lanes=lanes))

    def on_scale(self, name: str, products: torch.Tensor, rows: LinearRows) -> None:
        self._signal.on_scale(name, products, replace(rows, lanes=self._rename(rows.lanes)))

    def on_leaf(self, rows: LeafRows, values: torch.Tensor, grads: torch.Tensor) -> None:
        self._signal.on_leaf(replace(rows, lanes=self._rename(rows.lanes)), values, grads)

    def _rename(self, lanes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._names[lane] for lane in lanes)


def _after_running_out(
    rows: int, going_on: str, sequences: Sequence[PackedSequence], chosen: Sequence[int]
) -> None:
    """Warns that half as much is tried next; raises where it was one sequence already."""
    if len(chosen) == 1:
        raise InputError(
            "out of CUDA memory with a single sequence",
            got=f"{rows} rows",
            index=sequences[chosen[0]].label or chosen[0],
            fix="Free memory on the device, or shorten the sequence.",
        )
    warnings.warn(f"out of CUDA memory: going on with {going_on}", ResourceWarning, stacklevel=4)


def _bytes_per_row(shape: DecoderShape) -> tuple[int, int]:
    """Of a forward row, its saved activations in all layers; of each, its gradients or residuals
    within a layer. What lies between two products within a layer is bounded by itself."""
    one = PackedPlan.build([PackedSequence([0], 0)])
    within = 8 * max(shape.hidden, shape.heads * shape.head_dim) * shape.stat_itemsize
    if shape.keeps_linears:  # output gradients of a layer, and of its norms
        widths = 2 * shape.intermediate + (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        within += widths * shape.itemsize + 2 * shape.hidden * shape.stat_itemsize
    return one.saved_bytes(shape) + within, within


def _free_bytes(device: torch.device) -> int:
    """Memory this process may still take on a device."""
    if device.type == "cuda":
        # What PyTorch holds and does not use is free for it, but not for the driver.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    found = [_available(), *_cgroup_left()]
    known = [bytes_ for bytes_ in found if bytes_ is not None]
    return min(known, default=4 * 2**30)  # no way to ask: small enough for a laptop


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")), None)


def _cgroup_left() -> Iterator[int]:
    """What a container's limit leaves, version 2 and version 1."""
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        try:
            yield int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
