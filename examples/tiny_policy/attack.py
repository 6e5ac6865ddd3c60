"""Responses of a policy that is trained against the judge: what the judge has to see through.

`attack(judge, rng, steps)` -> (domain, prompt, response ids) of every rollout of `steps` steps of
REINFORCE with group-normalised rewards, the judge's verdicts alone, on a copy of the judge's model.
Without them the judge falls for the broken sentences that such a policy soon writes.
"""

from __future__ import annotations

import copy
import random
import warnings

import torch
import torch.nn.functional as F
from environment import DOMAINS, TOPIC, WANTED, Messages, criterion, prompt
from packed import IGNORE, Row, hidden_states, pack_responses, sample, verdict_logits

from g2r_fast.judge import Judge

PROMPTS, GROUP = 8, 8
LEARNING_RATE = 5e-4

Rollout = tuple[str, Messages, list[int]]


def attack(judge: Judge, rng: random.Random, steps: int) -> list[Rollout]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trainable weights: this is a policy
        policy = Judge(
            copy.deepcopy(judge.model).requires_grad_(True), judge.tokenizer, judge.scaffold
        )
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    found: list[Rollout] = []
    for _ in range(steps):
        domains = [rng.choice(DOMAINS) for _ in range(PROMPTS)]
        asked = [one for d in domains for one in [(d, prompt(d, rng))] * GROUP]
        responses = sample(policy, [messages for _, messages in asked])
        found += [(*one, ids) for one, ids in zip(asked, responses, strict=True)]
        rewards = torch.tensor(_rewards(judge, rng, found[-len(asked) :])).view(PROMPTS, GROUP)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)

        batch = pack_responses(
            policy, [(messages, [ids]) for (_, messages), ids in zip(asked, responses, strict=True)]
        )
        logits = policy.model.lm_head(hidden_states(policy, batch))
        losses = F.cross_entropy(
            logits.transpose(1, 2), batch.next_token, ignore_index=IGNORE, reduction="none"
        )
        optimizer.zero_grad(set_to_none=True)
        (losses * advantages).sum().div((batch.next_token != IGNORE).sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
    return found


def _rewards(judge: Judge, rng: random.Random, rollouts: list[Rollout]) -> list[float]:
    rows, points = [], []
    for domain, messages, ids in rollouts:
        wanted = WANTED[domain]
        asked = [criterion(TOPIC[f"{domain}/{name}"], rng) for name in wanted]
        rows.append(Row(messages, ids, asked))
        points.append(torch.tensor(list(wanted.values())))
    verdicts = (
        logits[:, judge.true_id] > logits[:, judge.false_id]
        for logits in verdict_logits(judge, rows)
    )
    return [float(p[v].sum()) for p, v in zip(points, verdicts, strict=True)]
