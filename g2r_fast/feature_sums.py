"""Gradient features of sequences, from logits that come chunk by chunk and are not kept.

`Phi = W.T @ sum_t w_t (onehot(y_t) - p_t)`: the sum over the tokens comes first, in one row of the
vocabulary's size for each sequence, and the rows of some sequences go through the LM head together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from . import ops
from .adapters import is_active_adapter, plain
from .backends import Backend, Request, choose
from .errors import InputError, InputTypeError
from .families import Linear

__all__ = ["FeatureSums", "Stretch", "backend_of", "read_head", "rows_at_once", "stretches_of"]

Stretch = tuple[int, int, int]  # a sequence, the first of its tokens, how many of them

# Elements of one chunk of logits, and of the sums that wait for the LM head: on a CPU few enough to
# be read again from the cache.
_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
_STEP = 16  # a width that every backend serves: only the LM head's own is asked about


def read_head(lm_head: Any) -> Linear:
    """Weight `[V, H]` and bias of a linear layer, or of a model's LM head.

    Raises InputTypeError for what has no such weight, InputError for a weight that is not the whole
    layer (quantised, sharded, an adapter that is on).
    """
    expected = "a linear layer with a weight [V, H], or a model that has an LM head"
    module = lm_head
    if hasattr(lm_head, "get_output_embeddings"):
        module = lm_head.get_output_embeddings()
        if module is None:
            raise InputTypeError(
                "the model has no LM head", expected=expected, got=type(lm_head).__name__
            )
    if isinstance(module, torch.nn.Module) and is_active_adapter(module):
        raise InputError(
            "an adapter of the LM head is on: its weight is not the whole layer",
            expected="an LM head without an adapter",
            got=type(module).__name__,
            fix="Merge the adapter, or switch it off.",
        )
    module = plain(module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputTypeError("lm_head cannot be read", expected=expected, got=type(module).__name__)
    if not weight.is_floating_point() or weight.is_meta or weight.itemsize < 2:
        raise InputError(
            "the LM head's weight cannot be read",
            expected="float64, float32, bfloat16 or float16 on a device",
            got=f"{weight.dtype} on {weight.device}",
        )
    return Linear(weight.detach(), None if bias is None else bias.detach())


def backend_of(head: Linear) -> Backend:
    """What runs the products of an LM head that no decoder was read for."""
    scattered = () if head.weight.is_contiguous() else ("lm_head.weight",)
    device, dtype, hidden = head.weight.device, head.weight.dtype, head.weight.shape[1]
    return choose(Request(device, dtype, hidden, _STEP, _STEP, scattered))


def rows_at_once(head: Linear) -> int:
    """Rows of one chunk of logits."""
    return max(1, _ELEMENTS.get(head.weight.device.type, _ELEMENTS["cuda"]) // len(head.weight))


class FeatureSums:
    """Features, log-probabilities and entropies of N sequences of tokens.

    Logits come by sequence and position, and in pieces of any size. A sequence that comes again
    from its first token on is begun anew: an engine that ran out of memory does that.
    """

    def __init__(
        self,
        head: Linear,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[Tensor],  # N of [T_i], which add up to 1
        temperature: float,
        labels: Sequence[str] | None = None,
    ) -> None:
        self._head, self._temperature = head, temperature
        device = head.weight.device
        self.wide = torch.promote_types(head.weight.dtype, torch.float32)
        self._lengths = [len(ids) for ids in tokens]
        self._offsets = [0, *accumulate(self._lengths)]
        self._labels = labels or [f"row {i}" for i in range(len(tokens))]
        ids = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64)
        self._targets = ids.to(device)
        empty = torch.zeros(0, dtype=self.wide)
        self._weights = torch.cat([empty, *(w.to(self.wide).cpu() for w in weights)]).to(device)
        total = self._offsets[-1]
        # NaN is what a token that never came is found by.
        self._logps = torch.full((total,), torch.nan, dtype=self.wide, device=device)
        self._entropies = torch.full_like(self._logps, torch.nan)
        self._features = torch.zeros(
            len(tokens), head.weight.shape[1], dtype=self.wide, device=device
        )
        self._step = rows_at_once(head)
        begun = sum(length > 0 for length in self._lengths)
        slots = min(begun, self._step)
        self._sums = torch.empty(slots, len(head.weight), dtype=self.wide, device=device)
        self._free = list(range(slots))
        self._slots: dict[int, int] = {}  # of the sequences that are in `_sums`
        self._open: int | None = None  # the one of them that lacks tokens

    def add(self, logits: Tensor, stretches: Iterable[Stretch]) -> None:
        """Logits `[n, V]` that predict the tokens of these stretches, one after the other."""
        start = at = 0
        pending: list[Stretch] = []
        for sequence, first, count in stretches:
            stop = first + count
            while first < stop:
                if at - start == self._step or (first == 0 and self._must_make_room(sequence)):
                    self._reduce(logits[start:at], pending)
                    start, pending = at, []
                if first == 0:
                    self._begin(sequence)
                taken = min(stop - first, self._step - (at - start))
                pending.append((sequence, first, taken))
                first, at = first + taken, at + taken
            self._open = sequence if stop < self._lengths[sequence] else None
        self._reduce(logits[start:at], pending)

    def finish(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features `[N, H]`, and log-probabilities and entropies, N of `[T_i]` each.

        Raises InputError where logits were not finite.
        """
        self._flush()
        finite = self._entropies.isfinite()
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            row = next(i for i, stop in enumerate(self._offsets[1:]) if first < stop)
            raise InputError(
                "the policy's logits are not finite",
                expected="finite logits",
                index=f"{self._labels[row]}, token {first - self._offsets[row]}",
                fix="Check the policy's weights; float16 models may need bfloat16 or float32.",
            )
        logps, entropies = (x.split(self._lengths) for x in (self._logps, self._entropies))
        return self._features, list(logps), list(entropies)

    def _must_make_room(self, sequence: int) -> bool:
        """Whether a row of the sums is used anew, so that what is pending must be in it."""
        return not self._free or sequence in self._slots or self._open is not None

    def _begin(self, sequence: int) -> None:
        if self._open is not None and self._open != sequence:  # it will come again
            self._free.append(self._slots.pop(self._open))
        if sequence not in self._slots:
            if not self._free:
                self._flush()
            self._slots[sequence] = self._free.pop()
        self._sums[self._slots[sequence]] = 0.0
        self._open = sequence

    def _reduce(self, logits: Tensor, stretches: Sequence[Stretch]) -> None:
        if not stretches:
            return
        places = [
            slice(self._offsets[sequence] + first, self._offsets[sequence] + first + count)
            for sequence, first, count in stretches
        ]
        logps, entropies = ops.residual_sums(
            logits,
            torch.cat([self._targets[place] for place in places]),
            torch.cat([self._weights[place] for place in places]),
            [count for *_, count in stretches],
            [self._slots[sequence] for sequence, *_ in stretches],
            self._sums,
            temperature=self._temperature,
        )
        counts = [count for *_, count in stretches]
        for place, logp, entropy in zip(
            places, logps.split(counts), entropies.split(counts), strict=True
        ):
            self._logps[place], self._entropies[place] = logp, entropy

    def _flush(self) -> None:
        """Send all sums through the LM head: whoever calls this has no sequence open."""
        if not self._slots:
            return
        rows, slots = list(self._slots), list(self._slots.values())
        at = torch.tensor([rows, slots]).to(self._sums.device)
        features = ops.linear_backward(backend_of(self._head), self._sums[at[1]], self._head)
        self._features[at[0]] = features.to(self.wide)
        self._slots.clear()
        self._free.extend(slots)


def stretches_of(lengths: Sequence[int], step: int) -> Iterator[list[Stretch]]:
    """All tokens of all sequences in order, in lists of at most `step` tokens."""
    found: list[Stretch] = []
    room = step
    for sequence, length in enumerate(lengths):
        first = 0
        while first < length:
            count = min(room, length - first)
            found.append((sequence, first, count))
            first, room = first + count, room - count
            if not room:
                yield found
                found, room = [], step
    if found:
        yield found
