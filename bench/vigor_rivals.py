"""Gradient norms for VIGOR: the official trainer's way, faster ones, and a library's.

`rival(model, rollouts) -> [norms]`, one tensor [G] float32 for the group: the norm of the mean
negative log-probability's gradient over `rollouts.parameters`, "all" or "lm_head". A tied weight is
one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from bench.flops import Sizes
from bench.g2rl_rivals import tuned_states
from bench.ours import our_module, reference_backend
from bench.rivals import Unavailable
from bench.signal_flops import dense_norms, linear_norms, stock, swapped
from bench.signal_workload import Answer, Rollouts, SignalRival
from bench.vigor_tuned import head_only_norms, whole_norms

__all__ = ["VIGOR_RIVALS", "loop"]


@contextmanager
def _trainable(model: PreTrainedModel, parameters: str) -> Iterator[list[torch.nn.Parameter]]:
    """The chosen parameters, trainable inside; each once."""
    chosen = list((model if parameters == "all" else model.lm_head).parameters())
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        model.zero_grad()
        model.requires_grad_(False)


def _norm(grad: Tensor) -> Tensor:
    rows = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
    return rows.norm() if rows.ndim else rows


def loop(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """One completion at a time: forward and `.backward()` over prompt and completion.

    Norms are taken row by row and in float32: as fast as one of the whole, which is off by 7e-4 on
    a head of 16 million float32 elements, and by three digits in bfloat16, too much for a gate.
    """
    found = []
    with _trainable(model, rollouts.parameters) as parameters:
        for i, completion in enumerate(rollouts.completions):
            ids = rollouts.sequence(i)[None]
            out = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1)
            cross_entropy(out.logits[0, :-1].float(), completion).backward()
            norms = [_norm(p.grad) for p in parameters if p.grad is not None]
            found.append(torch.stack(norms).norm())
            model.zero_grad()
    return [torch.stack(found)]


def tuned_loop(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """The fastest stock PyTorch we could write, see vigor_tuned.py."""
    if rollouts.parameters == "lm_head":
        return head_only_norms(model, rollouts, tuned_states(model, rollouts))
    return whole_norms(model, rollouts)


def opacus(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """Ghost norms of opacus, the group in one padded batch."""
    try:
        from opacus.grad_sample import (  # type: ignore[import-not-found]
            GradSampleModuleFastGradientClipping,
        )
    except ImportError as error:
        raise Unavailable("opacus is not installed: pip install opacus") from error
    if model.lm_head.weight is model.get_input_embeddings().weight:
        raise Unavailable("opacus does not support tied weights")
    if model.dtype != torch.float32:
        raise Unavailable("opacus's Gram matrices in bfloat16 err too much for the gate")
    lengths = [len(c) for c in rollouts.completions]
    count = len(lengths)
    sequences = [rollouts.sequence(i) for i in range(count)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    ends = torch.tensor([len(s) for s in sequences], device=ids.device)[:, None]
    start = len(rollouts.prompt)
    mask = (places < ends).long()
    counted = (places >= start) & (places < ends)
    with _trainable(model, rollouts.parameters):
        wrapped: Any = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", strict=False, max_grad_norm=1.0, use_ghost_clipping=True
        )
        wrapped.train()  # its hooks look at nothing else; the model has no dropout
        try:
            # Padding on the right is in nobody's sight; positions of its own, as their embedding
            # would otherwise be taken for a batch of one.
            logits = wrapped(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places.expand(count, -1),
                use_cache=False,
            ).logits[:, start - 1 : -1]
            nll = cross_entropy(
                logits.flatten(0, 1).float(), ids[:, start:].flatten(), reduction="none"
            )
            nll = nll.view(count, -1) * counted[:, start:]
            (nll.sum(1) / torch.tensor(lengths, device=ids.device)).sum().backward()
            norms: Tensor = wrapped.get_norm_sample().detach().float()
        finally:
            wrapped.to_standard_module()
            model.eval()
            for parameter in model.parameters():
                for name in ("_norm_sample", "grad_sample", "_forward_counter"):
                    if hasattr(parameter, name):
                        delattr(parameter, name)
    return [norms]


def ours(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    found: Tensor = our_module("vigor").gradient_norms(
        model, rollouts.prompt_ids, rollouts.completion_ids, parameters=rollouts.parameters
    )
    return [found]


def ours_reference(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    with reference_backend():
        return ours(model, rollouts)


def _loop_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    whole = rollouts.parameters == "all"
    total = 0
    for i, completion in enumerate(rollouts.completions):
        head = len(completion) + 1
        rows = len(rollouts.sequence(i))
        total += stock(sizes, rows, head=head, backward=whole, weights=whole)
        if not whole:
            total += 2 * head * sizes.hidden * sizes.vocab
    return total


def _tuned_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    before, whole = len(rollouts.prompt) - 1, rollouts.parameters == "all"
    total = swapped(sizes, before, reads=0)
    for completion in rollouts.completions:
        rows = len(completion)
        total += swapped(sizes, rows, reads=rows, before=before, live=before, backward=whole)
        if whole:
            total += swapped(sizes, before, reads=0, forward=False, backward=True)
        total += linear_norms(sizes, before + 1, rows, dense_norms, head_only=not whole)
    return total


def _opacus_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    """Every row of the padded batch through everything; whole Gram matrices, however wide."""
    rows = len(rollouts.prompt) + max(map(len, rollouts.completions))
    query, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layer = 2 * (sizes.hidden + kv) + 2 * (sizes.hidden + query)
    layer += 3 * (sizes.hidden + sizes.intermediate)
    widths = sizes.layers * layer + sizes.hidden + sizes.vocab
    one = stock(sizes, rows, head=rows, backward=True, weights=True) + 2 * rows * rows * widths
    return len(rollouts.completions) * one


VIGOR_RIVALS: dict[str, SignalRival] = {
    "ours": SignalRival("g2r_fast", ours),
    "ours_reference": SignalRival("g2r_fast, plain PyTorch", ours_reference),
    "loop": SignalRival("loop, as the official code", loop, _loop_flops),
    "tuned_loop": SignalRival("loop, the model's inside swapped", tuned_loop, _tuned_flops),
    "opacus": SignalRival("opacus, ghost norms", opacus, _opacus_flops, slow=True),
}
