"""G2RL (arXiv 2512.15687): how new a response is, in the directions it would move the policy.

A response's feature is the gradient of its log-likelihood at the LM head's input, summed over its
tokens. It needs no backward, and the same forward gives every token's log-probability and entropy.
What is made of features within a group of responses is in `novelty.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .adapters import base_model
from .ambient import plain_torch
from .checks import at_row, check_lengths, check_max_tokens, check_vocabulary, token_ids
from .engine import choose_engine
from .errors import InputError, InputTypeError
from .families import Linear
from .feature_sums import FeatureSums, backend_of, read_head, rows_at_once, stretches_of
from .novelty import novelty, shape_rewards, similarity
from .plan import Read
from .rollouts import Rollout, check_temperature, read_rollouts
from .signal import Cotangents, LeafRows, ReadsNoLinears

__all__ = [
    "Features",
    "features_from_hidden_states",
    "gradient_features",
    "novelty",
    "shape_rewards",
    "similarity",
]

# Beyond these a temperature or its reciprocal leaves what float32 multiplies without loss.
_COLDEST, _HOTTEST = 1e-30, 1e30


@dataclass(frozen=True)
class Features:
    """What one forward tells of N completions; float32 (float64 for a float64 model), no graph."""

    features: Tensor  # [N, H], Phi (Eq. 8); zeros for an empty completion
    token_logps: list[Tensor]  # N of [T_i], nats
    token_entropies: list[Tensor]  # N of [T_i], nats


def gradient_features(
    policy: Any,
    prompt_ids: Sequence[Any],
    completion_ids: Sequence[Any],
    *,
    token_weights: Sequence[Any] | None = None,
    temperature: float = 1.0,
    engine: str = "auto",
    max_tokens: int | None = None,
) -> Features:
    """`Phi = W.T @ (a[:, None] * (onehot(y) - softmax(logits / temperature))).sum(0) / a.sum()`

    The gradient features of N completions (arXiv 2512.15687, Eqs. 7, 8, 14), with the
    log-probability and the entropy of every token from the same forward.

    Args:
        policy: a Hugging Face causal LM, in eval mode or without dropout; it gets no gradients. W
            `[V, H]` is its LM head's weight; a bias takes part in the logits and not in Phi.
        prompt_ids: N lists of at least one token id.
        completion_ids: N lists of ids; an empty one has a feature of zeros.
        token_weights: a, N lists `[T_i]` of numbers >= 0, not all of them 0; None: 1 each. They are
            divided by their sum.
        temperature: of sampling. It divides the logits; the 1 / temperature of the chain rule is
            left out, as in the paper.
        engine, max_tokens: as in `attribute_batch`.

    Returns Features: float32, float64 for a float64 policy; log-probabilities and entropies in
    nats, of the distribution at that temperature. Logits are float32 or wider whatever the policy's
    dtype, and at most one chunk of them is held.

    Raises InputError: lengths that differ, empty prompts, ids outside the vocabulary, weights that
    are negative, not finite or all 0, a temperature that is not positive, logits that are not
    finite, a policy in train mode with dropout. InputTypeError: what is no list of ids. Each names
    its row.
    """
    check_max_tokens(max_tokens)
    _check_temperature(temperature)
    policy = base_model(policy)
    rollouts = read_rollouts(policy, prompt_ids, completion_ids)
    weights = _read_weights(token_weights, [len(r.response_ids) for r in rollouts])
    chosen_engine = choose_engine(policy, engine)
    head = read_head(policy)
    if len(head.weight) < len(policy.get_input_embeddings().weight):
        for row, rollout in enumerate(rollouts):
            with at_row(row):
                check_vocabulary(rollout.response_ids, len(head.weight), "a completion's id")
    with plain_torch(), torch.no_grad(), _device_of(head):
        signal = _FeatureSignal(head, rollouts, weights, temperature)
        if signal.sequences:
            chosen_engine.run(signal.sequences, signal, max_tokens)
        return Features(*signal.sums.finish())


def features_from_hidden_states(
    lm_head: Any,
    hidden_states: Sequence[Tensor] | Tensor,
    completion_ids: Sequence[Any],
    *,
    token_weights: Sequence[Any] | None = None,
    temperature: float = 1.0,
) -> Features:
    """`gradient_features` of hidden states that are there: `logits = lm_head(hidden_states)`.

    For trainers whose forward has them already; nothing is computed twice.

    Args:
        lm_head: a linear layer (weight `[V, H]`, a bias or none), or the model that has it.
        hidden_states: what enters the LM head at the positions that predict the completions'
            tokens, so behind the final norm: N tensors `[T_i, H]` or all of them in one
            `[sum T_i, H]`; of the weight's dtype, or of one that it holds without loss.
        completion_ids, token_weights, temperature: as in `gradient_features`.

    Returns Features; the hidden states are detached. At most one chunk of logits is held, float32
    or wider. Raises as `gradient_features` does, and for hidden states of another shape, dtype or
    device than the LM head takes.
    """
    _check_temperature(temperature)
    head = read_head(lm_head)
    tokens = _read_tokens(completion_ids, len(head.weight))
    lengths = [len(ids) for ids in tokens]
    weights = _read_weights(token_weights, lengths)
    parts = _read_hidden(hidden_states, lengths, head)
    step = rows_at_once(head)
    with plain_torch(), torch.no_grad(), _device_of(head):
        backend = backend_of(head)
        sums = FeatureSums(head, tokens, weights, temperature)
        for stretches in stretches_of(lengths, step):
            rows = [parts[i][first : first + count] for i, first, count in stretches]
            hidden = torch.cat(rows).to(head.weight.dtype)
            sums.add(ops.linear(backend, hidden, head), stretches)
        return Features(*sums.finish())


class _FeatureSignal(ReadsNoLinears):
    """Reads every logit that predicts a token; nothing goes back."""

    leaf = None

    def __init__(
        self,
        head: Linear,
        rollouts: Sequence[Rollout],
        weights: Sequence[Tensor],
        temperature: float,
    ) -> None:
        made = [(i, rollout.sequence()) for i, rollout in enumerate(rollouts)]
        self.sequences = [sequence for _, sequence in made if sequence is not None]
        self._width = len(head.weight)
        self._rollout_of = [i for i, sequence in made if sequence is not None]
        self._rollouts = rollouts
        tokens = [rollout.response_ids for rollout in rollouts]
        self.sums = FeatureSums(
            head, tokens, weights, temperature, [rollout.label for rollout in rollouts]
        )

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        if logits.shape[1] != self._width:
            raise InputError(
                "the policy's logits are not those of its LM head",
                expected=f"{self._width}, as many as the LM head's weight has rows",
                got=logits.shape[1],
            )
        stretches, at = [], 0
        while at < len(reads):
            # A sequence reads everything from its first read on: no need to look at each.
            row = self._rollout_of[reads[at].sequence]
            rollout = self._rollouts[row]
            first = reads[at].position + 1 - len(rollout.prompt_ids)
            count = min(len(rollout.response_ids) - first, len(reads) - at)
            stretches.append((row, first, count))
            at += count
        self.sums.add(logits, stretches)
        return None

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        """Nothing comes back."""


def _device_of(head: Linear) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(head.weight) if head.weight.is_cuda else nullcontext()


def _check_temperature(temperature: Any) -> None:
    check_temperature(temperature)
    if not _COLDEST <= temperature <= _HOTTEST:
        raise InputError(
            "temperature is out of range",
            expected=f"{_COLDEST:g} <= temperature <= {_HOTTEST:g}",
            got=repr(temperature),
        )


def _read_tokens(completion_ids: Sequence[Any], vocab_size: int) -> list[list[int]]:
    check_lengths(completion_ids=completion_ids)
    tokens = []
    for row, value in enumerate(completion_ids):
        with at_row(row):
            ids = token_ids(value)
            if ids is None:
                raise InputTypeError(
                    "completion_ids cannot be read",
                    expected="N lists of token ids",
                    got=repr(value)[:80],
                )
            check_vocabulary(ids, vocab_size, "a completion's id")
        tokens.append(ids)
    return tokens


def _read_weights(token_weights: Any, lengths: Sequence[int]) -> list[Tensor]:
    """N of `[T_i]` float64, each divided by its sum."""
    if token_weights is None:
        return [torch.full((n,), 1.0 / max(n, 1), dtype=torch.float64) for n in lengths]
    check_lengths(completion_ids=lengths, token_weights=token_weights)
    found = []
    for row, (value, length) in enumerate(zip(token_weights, lengths, strict=True)):
        with at_row(row):
            try:
                weights = torch.as_tensor(value).detach().to("cpu", torch.float64)
            except (TypeError, ValueError, RuntimeError):
                raise InputTypeError(
                    "token_weights cannot be read",
                    expected="N lists of numbers",
                    got=repr(value)[:80],
                ) from None
            if weights.shape != (length,):
                raise InputError(
                    "token_weights has another shape than the completion",
                    expected=f"({length},)",
                    got=tuple(weights.shape),
                )
            bad = ~(weights.isfinite() & (weights >= 0))
            if bool(bad.any()):
                token = int(bad.nonzero()[0])
                raise InputError(
                    "a token's weight is negative or not finite",
                    expected="a finite number >= 0",
                    got=float(weights[token]),
                    index=f"token {token}",
                )
            # By the largest first: the sum of very large weights would not be finite.
            most = float(weights.max()) if length else 1.0
            if most == 0.0:
                raise InputError(
                    "token_weights are all 0", expected="a weight > 0", got=f"{length} zeros"
                )
            weights = weights / most
            found.append(weights / weights.sum() if length else weights)
    return found


def _read_hidden(hidden_states: Any, lengths: Sequence[int], head: Linear) -> Sequence[Tensor]:
    """N of `[T_i, H]`, detached."""
    weight = head.weight
    if isinstance(hidden_states, Tensor):
        total = sum(lengths)
        if hidden_states.shape != (total, weight.shape[1]):
            raise InputError(
                "hidden_states has another shape than the completions' tokens",
                expected=f"({total}, {weight.shape[1]}), or a list of N tensors",
                got=tuple(hidden_states.shape),
            )
        parts: Sequence[Tensor] = hidden_states.detach().split(list(lengths))
    else:
        check_lengths(completion_ids=lengths, hidden_states=hidden_states)
        parts = hidden_states
    found = []
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        with at_row(row):
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise InputTypeError(
                    "hidden_states cannot be read",
                    expected="N float tensors [T, H], or one",
                    got=part.dtype if isinstance(part, Tensor) else type(part).__name__,
                )
            if part.shape != (length, weight.shape[1]):
                raise InputError(
                    "hidden states have another shape than the completion's tokens",
                    expected=f"({length}, {weight.shape[1]})",
                    got=tuple(part.shape),
                    fix="Give the states of the positions that predict each of its tokens.",
                )
            if part.device != weight.device:
                raise InputError(
                    "hidden states are on another device than the LM head",
                    expected=str(weight.device),
                    got=part.device,
                )
            if torch.promote_types(part.dtype, weight.dtype) != weight.dtype:
                raise InputTypeError(
                    "hidden states have a dtype that the LM head's does not hold",
                    expected=str(weight.dtype),
                    got=part.dtype,
                    fix="Convert them to the LM head's dtype, as the model does.",
                )
        found.append(part.detach())
    return found
