"""How well the tiny policy writes and judges before any reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import torch
from environment import HERE, named, read, score
from packed import MAX_NEW_TOKENS, Row, sample, verdict_logits

from g2r_fast.judge import Judge

GROUP = 8
FILES = {"train": "train.jsonl", "held-out": "held_out.jsonl"}
CARD = """\
---
license: apache-2.0
language: en
---

# The tiny policy

A Llama decoder of {parameters:,} parameters that does both jobs of a self-judged run: it answers a
question with two to four short pieces of advice, and it says whether a response gives a piece of
advice, asked with `scaffold="continuation"`. For demonstrations and experiments on a CPU: it knows
generated English about six domains and nothing else.

Trained by `python examples/tiny_policy/pretrain.py` from the shipped tiny judge in {seconds:.0f} s
on one core of a busy machine, {steps} steps, seed {seed}. The file holds bfloat16 weights; they
load as float32, of which they are a rounding.

## Before any reinforcement learning

{group} responses to each prompt, temperature 1, nothing cut off the distribution, at most
{max_new_tokens} new tokens. *score* is the rule of `examples/tiny_policy/environment.py`, *by the
judge* the same sum with this model's own verdicts; *accuracy* is how often verdict and rule agree,
over all rubric items, over those that the rule calls True, and over the others; *sd* is the
standard deviation of the score within a prompt's responses, *no spread* the share of prompts whose
responses all score the same. Held-out prompts and rubric items are worded otherwise than in
training.

| records | score | by the judge | accuracy | of True | of False | sd | no spread | tokens |
|---|---|---|---|---|---|---|---|---|
{rows}

The best response seen scores {best:.3f}, the best possible 1. How often a rubric item is True, by
its points:

| points | {points} |
|{rules}|
| True | {shares} |

Median 1 − p of a True item judged True: {doubt:.1e}.
"""


def write_model_card(folder: Path, metrics: Mapping[str, Any]) -> None:
    """README.md of the model's folder, from metrics.json."""
    settings, found = metrics["training"]["settings"], metrics["train"]
    rows = [
        f"| {name} | {row['score']:.3f} | {row['score_by_judge']:.3f} | {row['accuracy']:.4f} "
        f"| {row['accuracy_true']:.4f} | {row['accuracy_false']:.4f} "
        f"| {row['score_sd_in_group']:.3f} | {row['groups_without_spread']:.3f} "
        f"| {row['tokens']:.1f} |"
        for name, row in ((name, metrics[name]) for name in FILES)
    ]
    shares = found["true_by_points"]
    card = CARD.format(
        parameters=metrics["parameters"],
        seconds=metrics["training"]["seconds"],
        steps=settings["steps"],
        seed=settings["seed"],
        group=GROUP,
        max_new_tokens=MAX_NEW_TOKENS,
        rows="\n".join(rows),
        best=found["best_score"],
        points=" | ".join(shares),
        rules="|".join(["---"] * (len(shares) + 1)),
        shares=" | ".join(f"{share:.1%}" for share in shares.values()),
        doubt=found["median_1_minus_p"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def measure(judge: Judge, seed: int = 1) -> dict[str, Any]:
    """Both files, a group of GROUP responses a prompt at temperature 1, nothing cut off."""
    torch.manual_seed(seed)
    return {
        "parameters": sum(p.numel() for p in judge.model.parameters()),
        **{name: measure_records(judge, read(HERE / file)) for name, file in FILES.items()},
    }


def measure_records(judge: Judge, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rule against judge on fresh responses to `records`."""
    repeated = [record for record in records for _ in range(GROUP)]
    responses = sample(judge, [record["prompt"] for record in repeated])
    texts = [judge.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    rows = [
        Row(record["prompt"], ids, [rubric["criterion"] for rubric in record["rubrics"]])
        for record, ids in zip(repeated, responses, strict=True)
    ]
    logits = [row.double() for row in verdict_logits(judge, rows)]
    log_odds = [row[:, judge.true_id] - row[:, judge.false_id] for row in logits]
    doubt = [1 - row.softmax(-1)[:, judge.true_id] for row in logits]

    scores, judged, right, shares, doubts = [], [], {True: [], False: []}, {}, []
    for record, text, odds, unsure in zip(repeated, texts, log_odds, doubt, strict=True):
        said = named(text)
        scores.append(score(record, text))
        best = sum(max(points, 0) for points in record["wanted"].values())
        total = 0
        for (name, points), value, left in zip(
            record["wanted"].items(), odds.tolist(), unsure.tolist(), strict=True
        ):
            true = name in said
            right[true].append((value > 0) == true)
            shares.setdefault(points, []).append(true)
            total += points * (value > 0)
            if true and value > 0:
                doubts.append(left)
        judged.append(total / best)
    groups = [scores[i : i + GROUP] for i in range(0, len(scores), GROUP)]
    eos = judge.tokenizer.eos_token_id
    return {
        "prompts": len(records),
        "responses": len(responses),
        "items": sum(map(len, right.values())),
        "accuracy": round(mean(right[True] + right[False]), 4),
        "accuracy_true": round(mean(right[True]), 4),
        "accuracy_false": round(mean(right[False]), 4),
        "true_by_points": {str(p): round(mean(shares[p]), 4) for p in sorted(shares, reverse=True)},
        "score": round(mean(scores), 4),
        "score_by_judge": round(mean(judged), 4),
        "best_score": round(max(scores), 4),
        "score_sd_in_group": round(mean(map(pstdev, groups)), 4),
        "groups_without_spread": round(mean(pstdev(group) == 0 for group in groups), 4),
        "median_1_minus_p": median(doubts),
        "tokens": round(mean(map(len, responses)), 2),
        "ended": round(mean(ids[-1] == eos for ids in responses), 4),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
