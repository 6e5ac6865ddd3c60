"""The packed engine: one forward over a plan's rows, many cotangents back.

A frozen decoder needs no weight gradients, so it saves, per row that something comes back to, only
what the input gradients read; rows before the first attributed token leave keys and values behind
and nothing else. The last layer is computed for the rows that are read, beyond keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch

from . import ops
from .backends import Backend, Request, choose
from .families import read_weights
from .packed_backward import PackedBackward
from .packed_forward import PackedForward
from .plan import DecoderShape, PackedPlan, Read
from .signal import Cotangents, Signal
from .tables import read_linears
from .tape import PassContext, Tape

__all__ = ["FrozenDecoder", "Tape"]

# Elements of one chunk of logits: on a CPU few enough to be read again from the cache.
_LOGIT_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


Method = TypeVar("Method", bound=Callable[..., Any])


def _on_its_device(method: Method) -> Method:
    """Triton launches on the current device: for the call, that is the weights' one."""

    @wraps(method)
    def call(self: FrozenDecoder, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(self.weights.embed):
            return method(self, *arguments, **options)

    return call  # type: ignore[return-value]


class FrozenDecoder:
    """A causal LM of a known family, frozen: its live weights, and no gradient for any of them.

    Raises UnsupportedModelError where `families.read_weights` cannot read the model.
    """

    def __init__(self, model: Any) -> None:
        self.weights = read_weights(model)
        self.backward_seconds = 0.0  # of every run so far; on a GPU, of its launches

    @property
    def shape(self) -> DecoderShape:
        return self.shape_for(reads_linears=False)

    def shape_for(self, reads_linears: bool) -> DecoderShape:
        """Its sizes, for counting what a pass keeps."""
        backend = self.backend()
        return replace(
            self.weights.shape,
            attended_itemsize=backend.attended_dtype(self.weights.dtype).itemsize,
            keeps_attended=backend.keeps_attended,
            keeps_linears=reads_linears,
        )

    def backend(self) -> Backend:
        """What runs the operations; see `backends.choose`, also for what is raised."""
        shape = self.weights.shape
        return choose(
            Request(
                device=self.weights.device,
                dtype=self.weights.dtype,
                hidden=shape.hidden,
                intermediate=shape.intermediate,
                head_dim=shape.head_dim,
                scattered=self.weights.scattered,
            )
        )

    @_on_its_device
    def run(self, plan: PackedPlan, signal: Signal) -> int:
        """Forward, ask the signal, and back to its leaf; the number of backward rows."""
        tape = self.forward(plan, leaf=signal.leaf, keep_linears=signal.reads_linears)
        backend = tape.context.backend
        chosen: list[int] = []
        grads: list[torch.Tensor] = []
        for start, stop in self._chunks(plan, whole=signal.reads_linears):
            reads = plan.reads[start:stop]
            cotangents = signal.cotangents(self.logits(tape, reads), reads)
            if cotangents is not None and len(cotangents.reads):
                self._show_head(tape, reads, cotangents, signal)
                if signal.leaf is not None:
                    chosen.extend(start + i for i in cotangents.reads)
                    grads.append(ops.linear_backward(backend, cotangents.values, self.weights.head))
                del cotangents  # [reads, V]: the next one needs the room
        if not chosen:
            return 0
        started = time.perf_counter()
        rows = self.backward(tape, chosen, torch.cat(grads), signal)
        self.backward_seconds += time.perf_counter() - started
        return rows

    def _chunks(self, plan: PackedPlan, whole: bool) -> Iterator[tuple[int, int]]:
        """Stretches of the plan's reads whose logits are alive together; with `whole`, none ends
        within a sequence, however many logits that makes."""
        elements = _LOGIT_ELEMENTS.get(self.weights.device.type, _LOGIT_ELEMENTS["cuda"])
        step = max(1, elements // len(self.weights.head.weight))
        if not whole:
            for start in range(0, len(plan.reads), step):
                yield start, min(len(plan.reads), start + step)
            return
        start = stop = 0
        for sequence in plan.sequences:
            if stop > start and stop - start + len(sequence.reads) > step:
                yield start, stop
                start = stop
            stop += len(sequence.reads)
        if stop > start:
            yield start, stop

    @_on_its_device
    @torch.no_grad()
    def forward(
        self, plan: PackedPlan, *, leaf: int | None = 0, keep_linears: bool = False
    ) -> Tape:
        """One pass over the plan's rows, keeping what a backward to `leaf` reads."""
        context = PassContext(self.weights, plan, self.backend())
        return PackedForward(context, leaf, keep_linears).run()

    @_on_its_device
    @torch.no_grad()
    def logits(self, tape: Tape, reads: Sequence[Read]) -> torch.Tensor:
        """`hidden @ lm_head.T`, `[len(reads), V]`, float32 or wider whatever the model's dtype."""
        return ops.linear(tape.context.backend, self._hidden(tape, reads), self.weights.head)

    @_on_its_device
    @torch.no_grad()
    def backward(
        self, tape: Tape, chosen: Sequence[int], grads: torch.Tensor, signal: Signal
    ) -> int:
        """Send `grads` `[len(chosen), H]`, gradients of the final norm's output at the chosen
        reads, to the signal's leaf; the number of backward rows."""
        return PackedBackward(tape, chosen, signal).run(grads)

    def _hidden(self, tape: Tape, reads: Sequence[Read]) -> torch.Tensor:
        """Inputs of the LM head, rounded to the model's dtype as the stock model's are."""
        place = tape.plan.read_places
        at = torch.tensor([place[read.row] for read in reads], device=tape.norm.normed.device)
        return tape.norm.normed[at] * self.weights.norm

    @torch.no_grad()
    def _show_head(
        self, tape: Tape, reads: Sequence[Read], cotangents: Cotangents, signal: Signal
    ) -> None:
        """The LM head to a signal that reads linear layers."""
        if not signal.reads_linears:
            return
        named = [reads[i] for i in cotangents.reads]
        hidden = self._hidden(tape, named)
        rows = read_linears(named, torch.arange(len(named)), {}).to(self.weights.device)
        outputs = {self.weights.head_name: cotangents.values.shape[1]}
        signal.on_linear(outputs, hidden, cotangents.values.to(hidden.dtype), rows)
