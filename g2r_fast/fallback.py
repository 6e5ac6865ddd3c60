"""The autograd engine: any causal LM, one sequence at a time, through its own forward.

Same answers as the packed engine, slower. Sequences that share everything before their first
attributed token share one key-value cache of it, where the model allows that.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .ambient import without_checkpoints
from .errors import UnsupportedModelError
from .key_values import cache_argument, cache_of, cached
from .plan import PackedSequence, Read
from .signal import Cotangents, LeafRows, LinearRows, Signal

__all__ = ["AutogradEngine", "EngineRun", "Progress"]

logger = logging.getLogger("g2r_fast")

Progress = Callable[[int], None]

# float16 has no room below 6e-8 for the gradients of a long sequence.
_COTANGENT_SCALE = {torch.float16: 1024.0}


@dataclass
class EngineRun:
    """What an engine did."""

    rows_forward: int = 0
    rows_backward: int = 0
    rows_unshared: int = 0
    micro_batches: int = 0
    backend: str = "transformers"  # what ran the operations
    backends_refused: dict[str, str] = field(default_factory=dict)  # those before it, and why
    # Of the way back alone. None where it cannot be told: on a GPU it would take a wait.
    backward_seconds: float | None = None


class AutogradEngine:
    """Plain `torch.autograd.grad` through a stock Hugging Face model."""

    name = "autograd"

    def __init__(self, model: Any) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        # Both ways are compared at the first shared prefix and at every longer one: a cache of a
        # sliding window may be right only while the window is not full.
        self._cache_works = cache_argument(model) is not None
        self._cache_works_to = 0

    def run(
        self,
        sequences: Sequence[PackedSequence],
        signal: Signal,
        max_tokens: int | None = None,
        progress: Progress | None = None,
        max_bytes: int | None = None,
    ) -> EngineRun:
        """One sequence after the other: `max_tokens` and `max_bytes` have nothing to cut."""
        done = EngineRun(rows_unshared=sum(len(s.input_ids) for s in sequences))
        if sequences:
            self._check_embeddings(sequences[0].input_ids)
        for prefix, members in _by_prefix(sequences):
            cache = None
            if len(members) > 1 and prefix and self._cache_works:
                cache = self._prefix_cache(sequences[members[0]], prefix)
                done.rows_forward += len(prefix)
            for index in members:
                forward, backward = self._one(index, sequences[index], signal, cache)
                done.rows_forward += forward
                done.rows_backward += backward
                done.micro_batches += 1
                if progress is not None:
                    progress(1)
        return done

    def _one(
        self, index: int, sequence: PackedSequence, signal: Signal, cache: Any
    ) -> tuple[int, int]:
        """Forward and, if the signal wants it, backward; the rows of both."""
        start, length = sequence.backward_start, len(sequence.input_ids)
        offset = start if cache is not None else 0  # position of the first row computed
        reads = [Read(index, p, 0, p) for p in sequence.reads]
        rows = LeafRows((index,), start, length)
        ids = torch.tensor(sequence.input_ids[offset:], device=self._device)
        keep = length - min(sequence.reads)
        hidden = (signal.leaf or 0) > 0
        # A sequence that nothing comes back from needs no graph.
        head_inputs: list[Tensor] = []
        with (
            without_checkpoints(self.model),
            self._head_watched(head_inputs, signal),
            torch.set_grad_enabled(start < length and signal.leaf is not None),
            self._linears_read(signal, rows, (len(ids), keep)),
        ):
            embeds = self.model.get_input_embeddings()(ids).detach()
            live = embeds[start - offset :].requires_grad_(True)
            output = self._forward(
                torch.cat([embeds[: start - offset].detach(), live]),
                cache,
                keep,
                output_hidden_states=hidden,
            )
            logits = _by_position(output)
            shift = length - len(logits)
            at = [p - shift for p in sequence.reads]
            logits = logits[torch.tensor(at)]
            leaf = live
            if hidden:
                leaf = output.hidden_states[signal.leaf]
            wide = torch.promote_types(logits.dtype, torch.float32)
            cotangents = signal.cotangents(logits.detach().to(wide), reads)
            if cotangents is None or not len(cotangents.reads):
                return len(ids), 0
            if signal.leaf is None:
                self._show_head(signal, index, head_inputs, cotangents, at)
            if signal.leaf is None or start == length:
                return len(ids), 0
            chosen = logits[torch.as_tensor(list(cotangents.reads), device=logits.device)]
            scale = _COTANGENT_SCALE.get(logits.dtype, 1.0)
            (grads,) = torch.autograd.grad(
                chosen,
                leaf,
                (cotangents.values * scale).to(logits.dtype),
                retain_graph=scale != 1.0 and not signal.reads_linears,
            )
            if scale != 1.0 and not signal.reads_linears and not grads.isfinite().all():
                scale = 1.0  # large gradients: no room above
                (grads,) = torch.autograd.grad(chosen, leaf, cotangents.values.to(logits.dtype))
        if hidden:
            leaf, grads = leaf[0, start - offset :], grads[0, start - offset :]
        grads = grads.to(wide) / scale
        signal.on_leaf(rows, leaf.detach().to(wide), grads[:, None])
        return len(ids), length - start

    @contextmanager
    def _head_watched(self, seen: list[Tensor], signal: Signal) -> Iterator[None]:
        """Keep what enters the LM head, for a signal that reads it and nothing behind it."""
        if signal.leaf is not None or not signal.reads_linears:
            yield
            return
        handle = self._head().register_forward_hook(
            lambda module, inputs, output: seen.append(inputs[0].detach())
        )
        try:
            yield
        finally:
            handle.remove()

    def _show_head(
        self,
        signal: Signal,
        sequence: int,
        seen: Sequence[Tensor],
        cotangents: Cotangents,
        at: Sequence[int],
    ) -> None:
        """`at`: rows of the head's input, one for each read."""
        if not signal.reads_linears:
            return
        named = [at[i] for i in cotangents.reads]
        values = cotangents.values
        inputs = seen[-1].flatten(0, -2)[torch.tensor(named)].to(values.dtype)
        every = torch.arange(len(named), dtype=torch.int32, device=values.device)
        rows = LinearRows((sequence,), (0, len(named)), every, every, (0,))
        head = self._head()
        name = next(name for name, module in self.model.named_modules() if module is head)
        signal.on_linear({name: values.shape[1]}, inputs, values, rows)

    def _head(self) -> nn.Module:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise UnsupportedModelError(self.name, ["it has no LM head to read"])
        return head

    def _forward(self, embeds: Tensor, cache: Any, keep: int, **kwargs: Any) -> Any:
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        if cache is not None:
            # A copy: attention appends to the cache, and the next sequence needs it as it was.
            kwargs |= cached(self.model, copy.deepcopy(cache))
        return self.model(inputs_embeds=embeds[None], use_cache=cache is not None, **kwargs)

    @torch.no_grad()
    def _prefix_cache(self, sequence: PackedSequence, prefix: tuple[int, ...]) -> Any:
        """The model's cache of a prefix, None where it has none or a wrong one."""
        ids = torch.tensor([prefix], device=self._device)
        kwargs = {"logits_to_keep": 1} if self._keeps_logits else {}
        try:
            output = self.model(input_ids=ids, use_cache=True, **kwargs)
            cache = cache_of(output)
            if cache is None:
                self._cache_works = False
            elif len(prefix) > self._cache_works_to:
                self._cache_works = self._agrees(sequence, prefix, cache)
                self._cache_works_to = len(prefix)
        except Exception as error:  # whatever a model raises here, the slow way still works
            logger.info("autograd engine: the model's cache cannot be reused: %s", error)
            self._cache_works = False
        return cache if self._cache_works else None

    def _agrees(self, sequence: PackedSequence, prefix: tuple[int, ...], cache: Any) -> bool:
        """Whether this model's cache gives the logits that the whole sequence gives."""
        embed = self.model.get_input_embeddings()
        ids = torch.tensor(sequence.input_ids, device=self._device)
        whole = _by_position(self._forward(embed(ids), None, keep=1))[-1].double()
        rest = _by_position(self._forward(embed(ids[len(prefix) :]), cache, keep=1))[-1].double()
        agrees = self._near(whole, rest)
        if not agrees:
            logger.info("autograd engine: the model's cache changes its logits; not reused")
        return agrees

    @torch.no_grad()
    def _check_embeddings(self, ids: Sequence[int]) -> None:
        """Refuse a model whose answer depends on more of a token than its input embedding."""
        at = torch.tensor([list(ids)], device=self._device)
        embed = self.model.get_input_embeddings()
        by_id = _by_position(self.model(input_ids=at, use_cache=False))[-1].double()
        by_embedding = _by_position(self._forward(embed(at[0]), None, keep=1))[-1].double()
        if bool(by_id.isfinite().all()) and not self._near(by_id, by_embedding):
            raise UnsupportedModelError(
                self.name, ["it reads more of a token than its input embedding"]
            )

    def _near(self, a: Tensor, b: Tensor) -> bool:
        """Equal logits up to what another order of the same operations changes."""
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 2e-2
        return bool((a - b).norm() <= tolerance * a.norm())

    @contextmanager
    def _linears_read(
        self, signal: Signal, rows: LeafRows, computed: tuple[int, int]
    ) -> Iterator[None]:
        """Show a signal that asks for it every linear layer's inputs and output gradients.

        `computed`: how many rows, up to the last, a layer may see: those of the forward, or of the
        logits.
        """
        handles = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if not output.requires_grad:
                    return
                seen = inputs[0].detach().flatten(0, -2)  # [1, rows, in], or [rows, in] as in OPT
                if len(seen) not in computed:
                    # Experts of a mixture: which token a row belongs to is not to be known here.
                    raise UnsupportedModelError(
                        self.name, [f"{name} sees {len(seen)} rows, not one for each token"]
                    )
                first = rows.stop - len(seen)  # the position of its first row
                skip = max(0, rows.start - first)
                wide = torch.promote_types(output.dtype, torch.float32)
                scale = _COTANGENT_SCALE.get(output.dtype, 1.0)

                def read(grad: Tensor) -> None:
                    grads = grad.flatten(0, -2)[skip:].to(wide) / scale
                    every = torch.arange(len(grads), dtype=torch.int32, device=grads.device)
                    where = LinearRows(rows.lanes, (0, len(grads)), every, every, (0,))
                    signal.on_linear({name: grads.shape[1]}, seen[skip:].to(wide), grads, where)

                output.register_hook(read)

            return hook

        if signal.reads_linears:
            for name, module in self.model.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    handles.append(module.register_forward_hook(watch(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def _by_position(output: Any) -> Tensor:
    """Logits `[positions, V]`; a classifier has those of the last position alone."""
    logits: Tensor = output.logits
    return logits[0] if logits.ndim == 3 else logits


def _by_prefix(
    sequences: Sequence[PackedSequence],
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Sequences by what lies before their first attributed token.

    A prefix must leave every read behind it, so a sequence that reads inside it goes alone.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        start = sequence.backward_start
        if start == 0 or start == len(sequence.input_ids) or min(sequence.reads) < start:
            yield (), [index]
        else:
            groups.setdefault(tuple(sequence.input_ids[:start]), []).append(index)
    yield from groups.items()
