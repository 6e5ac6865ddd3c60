"""VIGOR (arXiv 2605.09920): completions ranked by the norm of their gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapters import base_model, plain
from .ambient import plain_torch
from .checks import (
    at_row,
    check_group_size,
    check_lengths,
    check_max_tokens,
    check_no_dropout,
    check_positions,
    check_vocabulary,
    position_limit,
    token_ids,
)
from .engine import Engine, choose_engine
from .errors import InputError, InputTypeError
from .fallback import AutogradEngine
from .gradient_norms import NormSignal, Parameters, Scalar
from .plan import PackedSequence
from .rollouts import Rollout, read_rollouts
from .vigor_loop import loop_norms

__all__ = ["gradient_norms", "rank_rewards", "scalar_gradient_norms"]

# Share of the model's own bytes that what a micro-batch keeps may take: more gains nothing in speed
# from some hundred rows on. One sequence may need more.
_MEMORY_SHARE = 0.5
_STRETCH_ELEMENTS = 2**21  # of logits whose softmax is on its way
_LOWEST_EXPONENT = -100  # 2 ** 100 is a float32


def gradient_norms(
    policy: Any,
    prompt_ids: Sequence[Any],
    completion_ids: Sequence[Any],
    *,
    parameters: str = "trainable",
    engine: str = "auto",
    max_tokens: int | None = None,
) -> Tensor:
    """`torch.stack([g.square().sum() for g in grad(mean_nll, params)]).sum().sqrt()` per row.

    `mean_nll = -log_softmax(logits)[completion].mean()`, the mean over the completion's tokens, EOS
    included, given the prompt: `‖∂ℓ/∂θ‖₂` of arXiv 2605.09920, as in the official code. Computed in
    one packed pass, exact, with no weight gradient in memory; sums of squares are float64.

    Args:
        policy: a causal LM. Nothing of it changes.
        prompt_ids: N lists of at least one id.
        completion_ids: N lists of ids; an empty one has norm 0.
        parameters: `"trainable"`, those that require a gradient (of a model with LoRA, the
            adapters); `"all"`; `"lm_head"`, the head's weight alone (the paper's appendix), without
            the embedding's part where the two are tied.
        engine: `"packed"`, `"autograd"` (one backward per row), or `"auto"`.
        max_tokens: forward and backward rows alive together; None: what takes half of the model's
            own bytes, if so much memory is free.

    Returns:
        `[N]` float32 (float64 for a float64 model), on the policy's device.

    Raises:
        InputError: lengths that differ, empty prompts, ids outside the vocabulary, sequences past
            the model's positions, no trainable parameter (adapters that are off or merged do not
            count), logits or gradients that are not finite.
    """
    rollouts = read_rollouts(policy, prompt_ids, completion_ids)
    sequences = [rollout.sequence(backward_start=0) for rollout in rollouts]
    rows = [i for i, sequence in enumerate(sequences) if sequence is not None]
    chosen = choose_engine(base_model(policy), engine)
    norms = _norms(
        policy,
        [s for s in sequences if s is not None],
        _MeanNll([rollouts[i] for i in rows]),
        parameters,
        chosen,
        max_tokens,
    )
    with plain_torch():
        found = norms.new_zeros(len(rollouts))
        found[rows] = norms
    return found


def scalar_gradient_norms(
    policy: Any,
    input_ids: Sequence[Any],
    scalar: Callable[[int, Tensor], Tensor],
    *,
    reads: Sequence[Sequence[int]] | None = None,
    parameters: str = "trainable",
    engine: str = "auto",
    max_tokens: int | None = None,
) -> Tensor:
    """`torch.stack([g.square().sum() for g in grad(scalar(i, logits), params)]).sum().sqrt()`.

    The norms of `gradient_norms` for any scalar of a sequence's logits, one per sequence: a check
    of other code's per-sample gradients, and a place to start from for a method of your own.

    Args:
        policy: a causal LM.
        input_ids: N lists of at least one id.
        scalar: `scalar(i, logits)` for sequence i: a differentiable scalar of its logits
            `[reads, V]`, float32 (float64 for a float64 model). It may be called more than once.
        reads: N lists of ascending positions whose logits the scalar sees; None: all of them.
        parameters, engine, max_tokens: as for `gradient_norms`.

    Returns:
        `[N]` float32 (float64 for a float64 model), on the policy's device.

    Raises:
        InputError, InputTypeError: as `gradient_norms`; a scalar that is none, or does not depend
            on the logits.
    """
    if reads is None:
        check_lengths(input_ids=input_ids)
    else:
        check_lengths(input_ids=input_ids, reads=reads)
    check_no_dropout(policy.named_modules(), "policy")
    vocab_size, limit = len(policy.get_input_embeddings().weight), position_limit(policy)
    sequences = []
    for row, value in enumerate(input_ids):
        with at_row(row):
            ids = token_ids(value)
            at = range(len(ids or ())) if reads is None else token_ids(reads[row])
            if ids is None or at is None:
                raise InputTypeError(
                    f"{'input_ids' if ids is None else 'reads'} cannot be read",
                    expected="N lists of integers",
                    got=repr(value if ids is None else reads)[:80],
                )
            check_vocabulary(ids, vocab_size)
            check_positions(len(ids), limit)
            if not len(at):
                raise InputError("nothing is read", expected="at least one position")
            sequences.append(PackedSequence(ids, 0, tuple(at), f"row {row}"))
            if len(sequences[-1].reads) < len(at):
                raise InputError("a position is read twice", expected="ascending", got=list(at))
    chosen = choose_engine(base_model(policy), engine)
    return _norms(policy, sequences, _UserScalar(scalar), parameters, chosen, max_tokens)


def rank_rewards(norms: Any, lengths: Sequence[int], group_size: int) -> Tensor:
    """`2 * rank / (G - 1) - 1` with rank 0 for the lowest `S = -sqrt(T) * norm` of a group.

    The reward of arXiv 2605.09920: the completion with the smallest gradient is the best, +1, the
    worst -1; a group of one gets 0. Ties go by index, as the official stable argsort has them. An
    empty completion is the worst there is (our choice; its S would be the best).

    Args:
        norms: `[N]`, as `gradient_norms` returns them.
        lengths: N numbers of completion tokens, EOS included.
        group_size: G consecutive rows answer one prompt.

    Returns:
        `[N]` float32, on the device of `norms`.

    Raises:
        InputError: lengths that differ, norms or lengths that are negative or not finite, rows
            that do not divide into groups.
        InputTypeError: what is no list of numbers.
    """
    values = _numbers("norms", norms, None)
    counts = _numbers("lengths", lengths, values.device)
    if counts.shape != values.shape:
        raise InputError(
            "arguments differ in length",
            expected=f"{len(values)} rows, as many as norms",
            got=f"lengths with {len(counts)}",
        )
    check_group_size(len(values), group_size)
    for name, numbers in (("a norm", values), ("a length", counts)):
        odd = (~(numbers.isfinite() & (numbers >= 0))).nonzero()
        if len(odd):
            index = int(odd[0])
            raise InputError(
                f"{name} is not a finite number >= 0",
                expected="what gradient_norms returns, and counts of tokens",
                got=float(numbers[index]),
                index=index,
            )
    halves = (counts != counts.floor()).nonzero()
    if len(halves):
        index = int(halves[0])
        raise InputError(
            "a length is no whole number",
            expected="counts of tokens",
            got=float(counts[index]),
            index=index,
        )
    if group_size == 1:
        return torch.zeros_like(values, dtype=torch.float32)
    scores = torch.where(counts > 0, -counts.sqrt() * values, -torch.inf).view(-1, group_size)
    order = scores.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(group_size, device=order.device).expand_as(order))
    return (2.0 * ranks.flatten() / (group_size - 1) - 1.0).float()


def _numbers(name: str, values: Any, device: torch.device | None) -> Tensor:
    """`[N]` float64."""
    try:
        found = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0, 0)
    if found.ndim != 1 or found.is_complex() or found.dtype == torch.bool:
        raise InputTypeError(f"{name} cannot be read", expected="N numbers", got=repr(values)[:80])
    return found.detach().double()


def _norms(
    policy: Any,
    sequences: Sequence[PackedSequence],
    scalar: Scalar,
    parameters: str,
    engine: Engine,
    max_tokens: int | None,
) -> Tensor:
    check_max_tokens(max_tokens)
    policy = base_model(policy)
    if policy.get_output_embeddings() is None:
        raise InputError(
            "the policy has no LM head", expected="a causal LM", got=type(policy).__name__
        )
    wanted = Parameters.of(policy, parameters)
    own_bytes = sum(p.nbytes for p in policy.parameters())
    with plain_torch():
        if isinstance(engine, AutogradEngine):
            return _as_result(policy, sequences, loop_norms(policy, sequences, scalar, wanted))
        signal = NormSignal(policy, sequences, scalar, wanted)
        if signal.leaf is None:  # nothing goes back behind the head, so nothing is kept for it
            sequences = [
                PackedSequence(s.input_ids, len(s.input_ids), s.reads, s.label) for s in sequences
            ]
        engine.run(sequences, signal, max_tokens, max_bytes=int(_MEMORY_SHARE * own_bytes))
        return _as_result(policy, sequences, signal.norms())


def _as_result(policy: Any, sequences: Sequence[PackedSequence], norms: Tensor) -> Tensor:
    """float32, float64 for a float64 model."""
    odd = (~norms.isfinite()).nonzero()
    if len(odd):
        raise InputError(
            "gradients are not finite",
            expected="finite gradients",
            index=sequences[int(odd[0])].label,
            fix="Check the model's weights; float16 models may need bfloat16 or float32.",
        )
    dtype = plain(policy.get_input_embeddings()).weight.dtype
    return norms.to(torch.promote_types(dtype, torch.float32))


class _MeanNll:
    """Eq. of arXiv 2605.09920: `-log_softmax(logits)[completion].mean()`."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._rollouts = rollouts

    def __call__(self, sequence: int, logits: Tensor) -> tuple[Tensor, float]:
        """`softmax(logits) - onehot`, in the place of the logits; at the target minus the sum of
        the others' probabilities, which 1 - p would round away."""
        ids = torch.tensor(self._rollouts[sequence].response_ids, device=logits.device)[:, None]
        step = max(1, _STRETCH_ELEMENTS // logits.shape[1])
        largest = logits.new_zeros(())
        for start in range(0, len(ids), step):
            part, at = logits[start : start + step], ids[start : start + step]
            values = part.softmax(-1).scatter_(1, at, 0.0)
            others = values.sum(-1, keepdim=True)
            part.copy_(values).scatter_(1, at, -others)
            largest = torch.maximum(largest, others.max())
        # Those of a completion that the policy is sure of are brought near one.
        exponent = min(0, max(_LOWEST_EXPONENT, math.frexp(float(largest))[1]))
        if exponent:
            logits.mul_(2.0**-exponent)
        return logits, 2.0**exponent / len(ids)


class _UserScalar:
    """A differentiable function of one sequence's logits."""

    def __init__(self, function: Callable[[int, Tensor], Tensor]) -> None:
        if not callable(function):
            raise InputTypeError(
                "scalar is not a function",
                expected="scalar(i, logits) -> a scalar of the logits",
                got=type(function).__name__,
            )
        self._function = function

    def __call__(self, sequence: int, logits: Tensor) -> tuple[Tensor, float]:
        with torch.enable_grad():
            live = logits.detach().requires_grad_()
            value = self._function(sequence, live)
            grads = None
            if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
                (grads,) = torch.autograd.grad(value.sum(), live, allow_unused=True)
        if grads is not None and not bool(grads.isfinite().all()):
            raise InputError(
                "the scalar's gradient is not finite",
                expected="a finite gradient for the logits",
                index=f"row {sequence}",
            )
        if grads is None:
            raise InputTypeError(
                "scalar did not return a scalar of the logits",
                expected="a tensor of one element that depends on the logits",
                got=f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}",
                index=f"row {sequence}",
            )
        largest = float(grads.abs().max())
        return (grads / largest, largest) if largest > 0 else (grads, 1.0)
