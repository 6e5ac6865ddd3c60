"""Whether a trainer's loss gives every token its own advantage; refused where it does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .host import Host, evaluating, trl_version

__all__ = ["check_loss"]


def check_loss(host: Host) -> None:
    """Raise InputError for a loss that would spread, drop or mix up `[B, T]` advantages.

    Known cases are refused by name. The loss is then tried on three tokens: its gradient at each
    has to be the token's own advantage times what plain GRPO's gradient is there. That holds for
    every loss of TRL's on policy, whatever it clips, and fails in a subclass that has not heard of
    advantages per token.
    """
    trainer = host.trainer
    version = trl_version()
    if getattr(trainer.args, "use_liger_kernel", False) and hasattr(trainer, "compute_liger_loss"):
        raise InputError(
            "Liger's fused GRPO loss takes one advantage per sequence",
            expected="use_liger_kernel=False",
            got=f"use_liger_kernel=True in TRL {version}",
        )
    if trainer.importance_sampling_level != "token":
        raise InputError(
            "a ratio per sequence has no gradient of a single token: of the advantages within a "
            "response only their mean would be left",
            expected='importance_sampling_level="token"',
            got=repr(trainer.importance_sampling_level),
        )
    sequence = torch.ones(2)
    tokens = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 3.0, 0.0]])
    try:
        plain = _gradient(host, sequence)
    except Exception as error:
        raise _not_per_token(host, "a loss that can be tried on three tokens", error) from error
    try:
        dense = _gradient(host, tokens)
    except Exception as error:
        raise _not_per_token(host, "a loss that takes advantages of shape [B, T]", error) from error
    if not torch.allclose(dense, plain * tokens.to(plain.device), rtol=1e-4, atol=1e-7):
        raise _not_per_token(
            host, f"gradients {(plain * tokens.to(plain.device)).tolist()}", dense.tolist()
        )


def _not_per_token(host: Host, expected: str, got: Any) -> InputError:
    trainer, version = host.trainer, trl_version()
    fix = "Use TRL's own GRPOTrainer, or a subclass whose loss takes advantages [B, T]."
    if trainer.loss_type == "sapo":
        fix = "TRL 0.28 and newer take them with loss_type='sapo'."
    return InputError(
        f"the loss of {type(trainer).__name__} (TRL {version}, loss_type={trainer.loss_type!r}) "
        "does not give every token its own advantage",
        expected=expected,
        got=repr(got)[:300],
        fix=fix,
    )


def _gradient(host: Host, advantages: Tensor) -> Tensor:
    """`d loss / d logps [2, 3]` of two made-up completions, of 3 and 2 tokens, on policy."""
    trainer, device = host.trainer, host.device
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -1.5, 0.0]], device=device).requires_grad_()
    entropies = torch.tensor([[0.5, 2.0, 1.0], [1.5, 0.8, 0.0]], device=device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
    held = logps.detach()
    inputs = {
        "prompt_ids": torch.zeros(2, 1, dtype=torch.long, device=device),
        "prompt_mask": torch.ones(2, 1, dtype=torch.long, device=device),
        "completion_ids": torch.zeros(2, 3, dtype=torch.long, device=device),
        "completion_mask": mask,
        "tool_mask": torch.ones_like(mask),
        "advantages": advantages.to(device),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": held,
        "sampling_per_token_logps": held,
        "importance_sampling_ratio": torch.ones_like(held),
    }

    def answers(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        if "compute_aux_loss" in options:  # newer versions return it too
            return logps, entropies, torch.zeros((), device=device)
        return logps, entropies

    with torch.enable_grad(), evaluating(trainer.model), _without_traces(trainer, answers):
        loss = trainer.compute_loss(trainer.model, inputs)
        (gradient,) = torch.autograd.grad(loss, logps)
    return gradient


@contextmanager
def _without_traces(trainer: Any, answers: Any) -> Iterator[None]:
    """The trainer with made-up log-probabilities, and afterwards as it was, metrics included."""
    changed = {
        "_get_per_token_logps_and_entropies": answers,
        "_metrics": {mode: defaultdict(list) for mode in ("train", "eval")},
        # The Trainer sets it when training begins.
        "current_gradient_accumulation_steps": 1,
    }
    before = {name: vars(trainer)[name] for name in changed if name in vars(trainer)}
    try:
        vars(trainer).update(changed)
        yield
    finally:
        for name in changed:
            vars(trainer).pop(name, None)
        vars(trainer).update(before)
