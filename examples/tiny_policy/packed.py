"""Many judgements, or many responses, in one pass of the stock model; and rollouts of a policy.

A row is what its branches share, then the branches side by side, each blind to the others (a 4-D
mask) and at the positions it would have alone.

`verdict_logits(judge, rows)` = the logits that one pass for each of
`judge.encode(prompt, response, criterion)` ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from g2r_fast.judge import Judge

IGNORE = -100
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """A response's ids as sampled or written (EOS included), and what it is asked about."""

    prompt: list[dict[str, str]]
    response: list[int]
    criteria: list[str]


@dataclass(frozen=True)
class Batch:
    """[B, T] throughout, but the mask [B, 1, T, T]."""

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor  # 0 where a token may look, the lowest float32 elsewhere
    next_token: Tensor  # what follows in the same branch, else IGNORE
    last: Tensor  # whether a branch ends here


def pack(rows: Sequence[tuple[list[int], list[list[int]]]]) -> Batch:
    """Rows of (shared ids, ids of each branch)."""
    packed = []
    for shared, branches in rows:
        ids, positions = list(shared), list(range(len(shared)))
        segment, following, last = [0] * len(ids), [IGNORE] * len(ids), [False] * len(ids)
        for number, branch in enumerate(branches, start=1):
            ids += branch
            positions += range(len(shared), len(shared) + len(branch))
            segment += [number] * len(branch)
            following += [*branch[1:], IGNORE]
            last += [False] * (len(branch) - 1) + [True]
        packed.append((ids, positions, segment, following, last))

    length = max(len(row[0]) for row in packed)
    ids_, positions_, segments, following_, last_ = (
        torch.tensor([row[k] + [fill] * (length - len(row[k])) for row in packed])
        for k, fill in enumerate((0, 0, -1, IGNORE, False))
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    allowed = causal & (same | (segments == 0)[:, None, :])
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return Batch(ids_, positions_, mask[:, None], following_, last_)


def pack_judgements(judge: Judge, rows: Sequence[Row]) -> Batch:
    """Criteria behind what they share: prompt, response and turn end."""
    packed = []
    for row in rows:
        start, response = judge.encode_prompt(row.prompt), judge.encode_response(row.response)
        shared = judge.join(start, response, []).input_ids
        packed.append((shared, [judge.encode_rubric(criterion) for criterion in row.criteria]))
    return pack(packed)


def pack_responses(judge: Judge, groups: Sequence[tuple[Any, list[list[int]]]]) -> Batch:
    """Responses behind their prompt, whose last token each has to itself: it predicts the first."""
    packed = []
    for prompt, responses in groups:
        ids = judge.encode_prompt(prompt)
        packed.append((ids[:-1], [[ids[-1], *response] for response in responses]))
    return pack(packed)


def hidden_states(judge: Judge, batch: Batch) -> Tensor:
    states: Tensor = judge.model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.mask,
        use_cache=False,
    ).last_hidden_state
    return states


@torch.no_grad()
def verdict_logits(judge: Judge, rows: Sequence[Row], at_once: int = 32) -> list[Tensor]:
    """Per row the logits at the verdict of each criterion, [items, V]."""
    found = []
    for begin in range(0, len(rows), at_once):
        batch = pack_judgements(judge, rows[begin : begin + at_once])
        for states, last in zip(hidden_states(judge, batch), batch.last, strict=True):
            found.append(judge.model.lm_head(states[last]))
    return found


@torch.no_grad()
def sample(
    judge: Judge,
    prompts: Sequence[Any],
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[int]]:
    """One response per prompt, ids up to and with EOS; from the whole distribution."""
    encoded = [judge.encode_prompt(prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad, eos = judge.tokenizer.pad_token_id, judge.tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    generated = judge.model.generate(
        input_ids=ids,
        attention_mask=seen,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
    )[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in generated]
