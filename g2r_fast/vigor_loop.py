"""The norms of `vigor.py` one backward at a time, for models the packed engine cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .adapters import plain
from .ambient import without_checkpoints
from .cotangents import check_finite
from .errors import InputError
from .gradient_norms import Parameters, Scalar
from .plan import PackedSequence, Read

__all__ = ["loop_norms"]

_STRETCH_ELEMENTS = 2**22  # of a gradient in float64


def loop_norms(
    policy: Any, sequences: Sequence[PackedSequence], scalar: Scalar, parameters: Parameters
) -> Tensor:
    """`[N]` float64. One gradient of the parameters that count is in memory at a time."""
    chosen = [p for p in policy.parameters() if p in parameters]
    device = plain(policy.get_input_embeddings()).weight.device
    norms = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    with (
        torch.enable_grad(),
        _live(chosen),
        without_checkpoints(policy),
        _cut_at_head(policy, parameters),
    ):
        for index, sequence in enumerate(sequences):
            ids = torch.tensor([sequence.input_ids], device=device)
            logits = policy(input_ids=ids, use_cache=False).logits[0, list(sequence.reads)]
            dtype = logits.dtype
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            check_finite(
                logits, [Read(index, p, 0, p) for p in sequence.reads], {index: sequence.label}
            )
            if not logits.requires_grad:
                raise InputError(
                    "no parameter that counts has a part in the logits",
                    expected="parameters that the model's forward uses",
                    got=f"{len(chosen)} others",
                )
            values, factor = scalar(index, logits.detach())
            norm = _norm(logits, values, chosen, keep=dtype == torch.float16)
            if dtype == torch.float16 and not norm.isfinite():
                # The sum over many rows had no room: as a mean it has.
                small = 2.0 ** -len(sequence.reads).bit_length()
                norm = _norm(logits, values * small, chosen) / small
            norms[index] = norm * factor
    return norms


def _norm(logits: Tensor, cotangents: Tensor, chosen: Sequence[Tensor], keep: bool = False) -> Any:
    grads = torch.autograd.grad(logits, chosen, cotangents, retain_graph=keep, allow_unused=True)
    squares = [_square(g).to(logits.device) for g in grads if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _square(grad: Tensor) -> Tensor:
    """`grad.double().square().sum()`: a float16 square has no room, and a copy of a head little."""
    parts = grad.reshape(-1).split(_STRETCH_ELEMENTS)
    return torch.stack([part.double().square().sum() for part in parts]).sum()


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
