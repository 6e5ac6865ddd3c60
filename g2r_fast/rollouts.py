"""Prompts and the completions that a policy sampled there, as ids: what GRAIL, G2RL, VIGOR take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .checks import (
    at_row,
    check_lengths,
    check_no_dropout,
    check_positions,
    check_vocabulary,
    position_limit,
    token_ids,
)
from .errors import InputError, InputTypeError
from .plan import PackedSequence

__all__ = ["Rollout", "check_temperature", "read_rollouts"]


@dataclass(frozen=True)
class Rollout:
    """A policy's context and what it sampled there, ids of the model's own vocabulary."""

    prompt_ids: Sequence[int]  # at least one
    response_ids: Sequence[int]
    label: str = ""  # what errors call it

    def sequence(self, backward_start: int | None = None) -> PackedSequence | None:
        """What an engine runs: up to the last token that predicts another, all of whose
        predictions are read; None for an empty response. By default nothing comes back."""
        if not self.response_ids:
            return None
        ids = [*self.prompt_ids, *self.response_ids[:-1]]
        reads = tuple(range(len(self.prompt_ids) - 1, len(ids)))
        start = len(ids) if backward_start is None else backward_start
        return PackedSequence(ids, start, reads, self.label)


def read_rollouts(
    policy: Any, prompt_ids: Sequence[Any], completion_ids: Sequence[Any]
) -> list[Rollout]:
    """The rows of a batch, checked: `N` prompts of at least one id, `N` completions.

    Raises InputError for lengths that differ, empty prompts, ids outside the vocabulary, sequences
    past the model's positions, a policy in train mode with dropout; InputTypeError for what is no
    list of ids. Each names its row.
    """
    check_lengths(prompt_ids=prompt_ids, completion_ids=completion_ids)
    check_no_dropout(policy.named_modules(), "policy")
    vocab_size, limit = len(policy.get_input_embeddings().weight), position_limit(policy)
    rollouts = []
    for row, pair in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        with at_row(row):
            prompt, completion = (
                _ids(value, name)
                for value, name in zip(pair, ("prompt_ids", "completion_ids"), strict=True)
            )
            if not prompt:
                raise InputError(
                    "a prompt is empty",
                    expected="at least one token, from which the first one is predicted",
                    fix="Give the begin-of-sequence token.",
                )
            check_vocabulary(prompt, vocab_size, "a prompt's id")
            check_vocabulary(completion, vocab_size, "a completion's id")
            check_positions(len(prompt) + len(completion), limit)
        rollouts.append(Rollout(prompt, completion, f"row {row}"))
    return rollouts


def check_temperature(temperature: Any) -> None:
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0.0 < temperature < float("inf"):
        raise InputError(
            "temperature is not positive", expected="a finite number > 0", got=repr(temperature)
        )


def _ids(value: Any, name: str) -> list[int]:
    ids = token_ids(value)
    if ids is None:
        raise InputTypeError(
            f"{name} cannot be read", expected="N lists of token ids", got=repr(value)[:80]
        )
    return ids
