"""The norms of `vigor.py` one backward at a time, for models the packed engine cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .ambient import plain_torch
from .grad2reward import check_finite
from .gradient_norms import Parameters
from .plan import PackedSequence, Read

__all__ = ["loop_norms"]


class _Value(Protocol):
    def value(self, sequence: int, logits: Tensor) -> Tensor: ...


def loop_norms(
    policy: Any, sequences: Sequence[PackedSequence], scalar: _Value, parameters: Parameters
) -> Tensor:
    """`[N]` float64. One gradient of the parameters that count is in memory at a time."""
    chosen = [p for p in policy.parameters() if p in parameters]
    device = policy.get_input_embeddings().weight.device
    norms = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    with plain_torch(), torch.enable_grad(), _live(chosen), _cut_at_head(policy, parameters):
        for index, sequence in enumerate(sequences):
            ids = torch.tensor([sequence.input_ids], device=device)
            logits = policy(input_ids=ids, use_cache=False).logits[0, list(sequence.reads)]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            check_finite(
                logits, [Read(index, p, 0, p) for p in sequence.reads], {index: sequence.label}
            )
            value = scalar.value(index, logits)
            grads = torch.autograd.grad(value, chosen, allow_unused=True)
            squares = [g.square().sum(dtype=torch.float64) for g in grads if g is not None]
            norms[index] = torch.stack(squares).sum().sqrt() if squares else 0.0
    return norms


@contextmanager
def _live(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _cut_at_head(policy: Any, parameters: Parameters) -> Iterator[None]:
    """For the head alone: the graph begins at its input, so that a tied embedding has no part."""
    if not parameters.head_only:
        yield
        return
    head = policy.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda module, inputs: (inputs[0].detach(), *inputs[1:])
    )
    try:
        yield
    finally:
        handle.remove()
