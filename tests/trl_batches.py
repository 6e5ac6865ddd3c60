"""The rows that the trainers of `trl_runs` are given, and what `attribute_batch` says of them."""

from __future__ import annotations

import torch
from trl_runs import GROUP, ITEMS, PROMPTS, completion, judge, tokenizer

from g2r_fast import AdvantageConfig, AttributionConfig, attribute_batch

ROWS = [(text, place) for text in PROMPTS for place in range(GROUP)]
IDS = [completion(*row) for row in ROWS]
MESSAGES = [[{"role": "user", "content": text}] for text, _ in ROWS]
DENSE = AttributionConfig(tau="auto")
ALONE = AdvantageConfig("rewards_pooled")


def prompt_ids():
    options = {"add_generation_prompt": True, "return_dict": True}
    return [tokenizer().apply_chat_template(m, **options)["input_ids"] for m in MESSAGES]


def attributed(by=None, advantage=ALONE, group_size=GROUP, **options):
    """What `attribute_batch` says of the rows that the trainers are given."""
    return attribute_batch(
        judge() if by is None else by, prompt_ids(), IDS, [ITEMS] * len(IDS), group_size, DENSE,
        advantage, **options,
    )  # fmt: skip


def rows_of(built, batch=0):
    """The advantages of every completion; behind them there are none."""
    advantages = built.batches[batch]["advantages"]
    assert advantages.shape == built.batches[batch]["completion_ids"].shape
    assert advantages.dtype == torch.float32
    for row, ids in zip(advantages, IDS, strict=True):
        assert not row[len(ids) :].any()
    return [row[: len(ids)] for row, ids in zip(advantages, IDS, strict=True)]


def agree(ours, expected):
    assert any(row.abs().max() > 0.1 for row in expected)
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, expected, strict=True)
    )
