"""The policy's update on a step's rollouts: forward, clipped objective, backward, AdamW."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import base_model
from .config import TrainConfig
from .credit import Credit
from .objective import ObjectiveParts, policy_loss, token_logps
from .sampling import Rollouts

__all__ = ["Rows", "Updater", "learning_rate", "micro_batches", "padded_rows"]


ENTROPY_ROWS = 1024  # of logits that are float32 at a time, beside those of the update


@dataclass(frozen=True)
class Rows:
    """Some rollouts, prompts padded on the left and responses on the right: [B, ...]."""

    input_ids: Tensor  # [B, P + T]
    attention_mask: Tensor  # [B, P + T]
    completion_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 at the response's tokens

    def fill(self, rows: Sequence[Tensor]) -> Tensor:
        """[B, T] of B tensors [T_i], zeros behind them."""
        padded = torch.zeros(self.mask.shape, device=self.mask.device)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded


def padded_rows(rollouts: Rollouts, rows: Sequence[int], device: torch.device) -> Rows:
    prompts = [rollouts.prompt_ids[i] for i in rows]
    completions = [rollouts.completion_ids[i] for i in rows]
    before, after = max(map(len, prompts)), max(1, max(map(len, completions)))
    ids = torch.zeros((len(rows), before + after), dtype=torch.long)  # masked: any id does
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, stop = before - len(prompt), before + len(completion)
        ids[row, start:stop] = torch.tensor([*prompt, *completion])
        mask[row, start:stop] = 1
    ids, mask = ids.to(device), mask.to(device)
    return Rows(ids, mask, ids[:, before:], mask[:, before:].clone())


def micro_batches(rollouts: Rollouts, rows: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of like length together, each batch of at most `max_tokens` padded tokens."""
    sizes = {i: (len(rollouts.prompt_ids[i]), len(rollouts.completion_ids[i])) for i in rows}
    batches: list[list[int]] = []
    longest = (0, 0)
    for i in sorted(rows, key=lambda i: (sum(sizes[i]), i)):
        longest = max(longest[0], sizes[i][0]), max(longest[1], sizes[i][1])
        if batches and (len(batches[-1]) + 1) * sum(longest) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = sizes[i]
    return batches


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step (from 1): constant after a linear warm-up."""
    return config.learning_rate * min(1.0, step / max(config.warmup, 1))


@dataclass
class Updater:
    """What an update needs besides rollouts and credit; policy as `accelerator.prepare` gave it."""

    policy: Any
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    accelerator: Any

    def __call__(
        self, rollouts: Rollouts, credit: Credit, step: int, seed: int
    ) -> dict[str, float]:
        """`iterations` passes over the rollouts, `minibatches` optimiser steps each; the figures.

        A gradient that is not finite moves nothing: that optimiser step is left out and counted.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        several = config.iterations * config.minibatches > 1
        old = self._old_logps(rollouts) if several else None
        tally = _Tally()
        self.policy.train()
        for iteration in range(config.iterations):
            order = list(range(len(rollouts)))
            random.Random(f"{seed}/{iteration}").shuffle(order)
            for number in range(config.minibatches):
                rows = order[number :: config.minibatches]
                if rows:
                    self._step(rollouts, credit, rows, old, tally)
        self.policy.eval()
        return tally.figures() | {"policy/learning_rate": learning_rate(config, step)}

    def _step(
        self,
        rollouts: Rollouts,
        credit: Credit,
        rows: Sequence[int],
        old: list[Tensor] | None,
        tally: _Tally,
    ) -> None:
        """One optimiser step on `rows`, in micro-batches."""
        config, accelerator = self.config, self.accelerator
        normalizer = self._normalizer(rollouts, rows)
        batches = micro_batches(rollouts, rows, config.micro_batch_tokens)
        for batch in batches:
            last = batch is batches[-1]
            with nullcontext() if last else accelerator.no_sync(self.policy):
                padded = self._padded(rollouts, batch)
                logits = self._logits(padded)
                logps = token_logps(logits, padded.completion_ids, config.temperature)
                parts = policy_loss(
                    logps,
                    logps.detach() if old is None else padded.fill([old[i] for i in batch]),
                    padded.fill([credit.advantages[i] for i in batch]),
                    padded.mask,
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    loss=config.loss,
                    normalizer=normalizer,
                    reference_logps=None
                    if credit.reference_logps is None
                    else padded.fill([credit.reference_logps[i] for i in batch]),
                    kl=config.kl,
                )
                accelerator.backward(parts.loss)
            tally.add(parts, logits.detach(), padded.mask, config.temperature)
        norm = float(
            accelerator.clip_grad_norm_(self.policy.parameters(), config.max_gradient_norm)
        )
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        tally.norms.append(norm)

    def _padded(self, rollouts: Rollouts, batch: Sequence[int]) -> Rows:
        padded = padded_rows(rollouts, batch, self.accelerator.device)
        if self.config.mask_truncated:
            finished = [rollouts.finished[i] for i in batch]
            padded.mask.mul_(torch.tensor(finished, device=padded.mask.device)[:, None])
        return padded

    def _normalizer(self, rollouts: Rollouts, rows: Sequence[int]) -> float:
        """Sequences, or tokens, of one process: gradients are averaged over processes."""
        if self.config.loss == "sequence_mean":
            return float(len(rows))
        counted = [i for i in rows if rollouts.finished[i] or not self.config.mask_truncated]
        tokens = float(sum(len(rollouts.completion_ids[i]) for i in counted))
        if self.accelerator.num_processes > 1:
            tokens = float(
                self.accelerator.reduce(
                    torch.tensor(tokens, device=self.accelerator.device), "mean"
                )
            )
        return max(tokens, 1.0)

    def _logits(self, padded: Rows) -> Tensor:
        """[B, T, V], those that predict the response's tokens."""
        length = padded.completion_ids.shape[1]
        device = self.accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.autocast):
            logits: Tensor = self.policy(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                use_cache=False,
                **self._where_it_can(padded, length + 1),
            ).logits
        return logits[:, -length - 1 : -1]

    def _where_it_can(self, padded: Rows, kept: int) -> dict[str, Any]:
        """Arguments that not every model's forward has; some count positions by the mask."""
        model = base_model(self.accelerator.unwrap_model(self.policy))
        known = inspect.signature(type(model).forward).parameters
        positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
        wanted = {"position_ids": positions, "logits_to_keep": kept}
        return {name: value for name, value in wanted.items() if name in known}

    @torch.no_grad()
    def _old_logps(self, rollouts: Rollouts) -> list[Tensor]:
        """N of [T_i], before anything of this step is learnt."""
        found: dict[int, Tensor] = {}
        rows, limit = range(len(rollouts)), self.config.micro_batch_tokens
        for batch in micro_batches(rollouts, rows, limit):
            padded = padded_rows(rollouts, batch, self.accelerator.device)
            logps = token_logps(
                self._logits(padded), padded.completion_ids, self.config.temperature
            )
            for i, row in zip(batch, logps, strict=True):
                found[i] = row[: len(rollouts.completion_ids[i])]
        return [found[i] for i in rows]


class _Tally:
    """Sums over the tokens of a step's micro-batches."""

    def __init__(self) -> None:
        self.tokens = self.clipped = self.entropy = self.kl = self.loss = 0.0
        self.ratio_max = 0.0
        self.norms: list[float] = []
        self.has_kl = False

    @torch.no_grad()
    def add(self, parts: ObjectiveParts, logits: Tensor, mask: Tensor, temperature: float) -> None:
        inside = mask.bool()
        for rows in logits[inside].split(ENTROPY_ROWS):
            logps = (rows.float() / temperature).log_softmax(-1)
            self.entropy -= float((logps.exp() * logps).sum())
        self.tokens += float(mask.sum())
        self.clipped += float(parts.clipped.sum())
        self.loss += float(parts.loss)
        if bool(inside.any()):
            self.ratio_max = max(self.ratio_max, float(parts.ratio[inside].max()))
        if parts.kl is not None:
            self.kl += float(parts.kl[inside].sum())
            self.has_kl = True

    def figures(self) -> dict[str, float]:
        """Means over tokens, and over the optimiser steps of loss and gradient norm."""
        tokens, steps = max(self.tokens, 1.0), max(len(self.norms), 1)
        found = {
            "policy/loss": self.loss / steps,
            "policy/entropy": self.entropy / tokens,
            "policy/clipped": self.clipped / tokens,
            "policy/ratio_max": self.ratio_max,
            "policy/gradient_norm": sum(self.norms) / steps,
            "policy/steps_left_out": float(sum(not math.isfinite(norm) for norm in self.norms)),
        }
        return found | ({"policy/kl": self.kl / tokens} if self.has_kl else {})
