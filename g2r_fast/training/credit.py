"""From rollouts to one advantage per token: what each method makes of the judge or the policy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import g2rl, grail, vigor
from ..advantages import AdvantageConfig, token_advantages
from ..api import attribute_batch
from ..errors import InputError
from ..grad2reward import AttributionConfig
from ..judge import Judge
from ..result import AttributionBatch
from .config import TrainConfig
from .models import Models
from .sampling import Rollouts
from .tasks import Checker, seed_of

__all__ = ["Credit", "assign_credit", "sequence_advantages", "shuffled"]

UNIFORM = AttributionConfig(readout="uniform")
SEQUENCE = "scaled_sequence"  # with uniform attributions it is the advantage of plain GRPO


@dataclass
class Credit:
    """N rows as in the rollouts; tensors on the policy's device."""

    advantages: list[Tensor]  # N of [T_i] float32
    scores: Tensor | None  # [N], where something was judged
    reference_logps: list[Tensor] | None = None  # N of [T_i], nats
    figures: dict[str, float] = field(default_factory=dict)


def assign_credit(
    rollouts: Rollouts,
    models: Models,
    config: TrainConfig,
    seed: int,
    reward: Checker | None = None,
) -> Credit:
    """Token advantages of a step's rollouts by `config.method`.

    Self-judging, the judge's forward is the reference model's too: with a KL term its
    log-probabilities come from there (scaffold "continuation").
    """
    credit = _METHODS[config.method](rollouts, models, config, seed, reward)
    if config.kl and credit.reference_logps is None:
        started = time.perf_counter()
        with models.reference() as reference:
            credit.reference_logps = g2rl.gradient_features(
                reference,
                rollouts.prompt_ids,
                rollouts.completion_ids,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
            ).token_logps
        credit.figures["seconds/reference"] = time.perf_counter() - started
    if credit.scores is not None:
        groups = credit.scores.view(-1, rollouts.group_size)
        spread = groups.std(1, correction=0)
        credit.figures |= {
            "reward/mean": float(credit.scores.mean()),
            "reward/std": float(spread.mean()),
            "reward/groups_without_spread": float(
                (spread <= 1e-6 * groups.abs().amax(1)).float().mean()
            ),
        }
    return credit


def sequence_advantages(
    scores: Tensor, lengths: Sequence[int], group_size: int, divide_by_std: bool = True
) -> list[Tensor]:
    """`((s - s[group].mean()) / s[group].std(correction=0)).expand(T_i)`: plain GRPO's."""
    if group_size == 1:
        return [scores.new_zeros(length) for length in lengths]
    uniform = [scores.new_full((length,), 1 / max(length, 1)) for length in lengths]
    config = AdvantageConfig(SEQUENCE, divide_by_std)
    found = token_advantages(uniform, group_size, config, scores, mean_attributions=uniform)
    assert found is not None
    return found


def _grpo(
    rollouts: Rollouts, models: Models, config: TrainConfig, seed: int, reward: Checker | None
) -> Credit:
    scores, batch = _scores(rollouts, models, config, seed, reward)
    lengths = [len(ids) for ids in rollouts.completion_ids]
    advantages = sequence_advantages(scores, lengths, rollouts.group_size, config.divide_by_std)
    return _credit(advantages, scores, batch)


def _grad2reward(
    rollouts: Rollouts, models: Models, config: TrainConfig, seed: int, reward: Checker | None
) -> Credit:
    batch = _judged(rollouts, models, config, seed, config.attribution, config.shuffle)
    advantages = batch.token_advantages
    if config.shuffle and rollouts.group_size > 1:
        advantages = shuffled(batch, rollouts.group_size, config.advantage, seed)
    if advantages is None:
        advantages = [torch.zeros_like(row) for row in batch.token_rewards]
    credit = _credit(advantages, batch.scores, batch)
    for name in ("entropy", "top10_mass", "top1_mass"):
        if name in batch.stats:
            credit.figures[f"attribution/{name}"] = batch.stats[name]
    if "backward" in batch.stats["seconds"]:
        credit.figures["seconds/gradient"] = batch.stats["seconds"]["backward"]
    control = config.shuffle or config.readout == "uniform"
    credit.figures["attribution/control"] = float(control)
    return credit


def _grail(
    rollouts: Rollouts, models: Models, config: TrainConfig, seed: int, reward: Checker | None
) -> Credit:
    credit = _grpo(rollouts, models, config, seed, reward)
    opens, dots, closes = config.answer_marker.partition("...")
    spans = grail.find_answer_spans(
        models.tokenizer, rollouts.completion_ids, marker=(opens, closes) if dots else opens
    )
    signs = [float(row[0]) if len(row) else 0.0 for row in credit.advantages]
    started = time.perf_counter()
    weights = grail.token_weights(
        models.policy,
        rollouts.prompt_ids,
        rollouts.completion_ids,
        spans,
        signs,
        polarity=config.polarity,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )
    credit.advantages = [w * a for w, a in zip(weights, credit.advantages, strict=True)]
    credit.figures |= {
        "seconds/gradient": time.perf_counter() - started,
        "grail/answered": sum(span is not None for span in spans) / len(spans),
    }
    return credit


def _g2rl(
    rollouts: Rollouts, models: Models, config: TrainConfig, seed: int, reward: Checker | None
) -> Credit:
    scores, batch = _scores(rollouts, models, config, seed, reward)
    started = time.perf_counter()
    features = g2rl.gradient_features(
        models.policy,
        rollouts.prompt_ids,
        rollouts.completion_ids,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )
    # A score in [0, 1] becomes the paper's -1 and 1 at its ends, and what lies between in between.
    rewards = g2rl.shape_rewards(
        features, 2 * scores - 1, rollouts.group_size,
        lam=config.novelty, variant=config.variant, graded=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    lengths = [len(ids) for ids in rollouts.completion_ids]
    advantages = sequence_advantages(rewards, lengths, rollouts.group_size, config.divide_by_std)
    credit = _credit(advantages, scores, batch)
    credit.figures["seconds/gradient"] = seconds
    return credit


def _vigor(
    rollouts: Rollouts, models: Models, config: TrainConfig, seed: int, reward: Checker | None
) -> Credit:
    started = time.perf_counter()
    norms = vigor.gradient_norms(
        models.policy,
        rollouts.prompt_ids,
        rollouts.completion_ids,
        parameters=config.parameters,
        max_tokens=config.max_tokens,
    )
    lengths = [len(ids) for ids in rollouts.completion_ids]
    ranks = vigor.rank_rewards(norms, lengths, rollouts.group_size)
    seconds = time.perf_counter() - started
    advantages = sequence_advantages(ranks, lengths, rollouts.group_size, config.divide_by_std)
    figures = {"seconds/gradient": seconds, "vigor/gradient_norm": float(norms.mean())}
    return Credit(advantages, None, figures=figures)


_METHODS = {
    "grpo": _grpo, "grad2reward": _grad2reward, "grail": _grail, "g2rl": _g2rl, "vigor": _vigor,
}  # fmt: skip


def shuffled(
    batch: AttributionBatch, group_size: int, config: AdvantageConfig, seed: int
) -> list[Tensor]:
    """Advantages of a batch whose token rewards were put in random order, per response.

    One order for all items of a response: scores and the size of every reward stay as they are,
    only which token has it does not. The batch needs its attributions.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "shuffle"))
    rewards, means = [], []
    for row, mean in zip(batch.token_rewards, batch.mean_attributions(), strict=True):
        order = torch.randperm(len(row), generator=generator).to(row.device)
        rewards.append(row[order])
        means.append(mean[order])
    found = token_advantages(rewards, group_size, config, batch.scores, mean_attributions=means)
    assert found is not None
    return found


def _judged(
    rollouts: Rollouts,
    models: Models,
    config: TrainConfig,
    seed: int,
    attribution: AttributionConfig,
    keep: bool = False,
) -> AttributionBatch:
    judge = models.judge
    assert isinstance(judge, Judge)
    # What continues the rollout is given the ids that the policy saw; a grader reads the turns.
    prompts: list[Any] = [task.prompt for task in rollouts.tasks]
    return attribute_batch(
        judge,
        rollouts.prompt_ids if judge.continues else prompts,
        rollouts.completion_ids,
        [task.rubrics for task in rollouts.tasks],
        rollouts.group_size,
        attribution,
        config.advantage,
        config.verdict,
        reference_logps=bool(config.kl) and models.judge_is_reference,
        reference_temperature=config.temperature,
        max_tokens=config.max_tokens,
        keep_attributions=keep,
        generator=torch.Generator(judge.device).manual_seed(seed),
    )


def _scores(
    rollouts: Rollouts, models: Models, config: TrainConfig, seed: int, reward: Checker | None
) -> tuple[Tensor, AttributionBatch | None]:
    """[N] float32, from the reward function or the judge's verdicts; no gradient of it."""
    if reward is None:
        batch = _judged(rollouts, models, config, seed, UNIFORM)
        return batch.scores, batch
    found = [
        float(reward(task.record, text))
        for task, text in zip(rollouts.tasks, rollouts.texts, strict=True)
    ]
    scores = torch.tensor(found, dtype=torch.float32, device=models.device)
    if not bool(scores.isfinite().all()):
        at = int((~scores.isfinite()).nonzero()[0])
        raise InputError(
            "the reward function gave a value that is not finite",
            expected="a number",
            got=found[at],
            index=f"response {rollouts.texts[at][:60]!r}",
        )
    return scores, None


def _credit(advantages: list[Tensor], scores: Tensor, batch: AttributionBatch | None) -> Credit:
    if batch is None:
        return Credit(advantages, scores)
    verdicts = [verdict for row in batch.verdicts for verdict in row]
    figures = {"verdict/true_share": sum(verdicts) / max(len(verdicts), 1)}
    return Credit(advantages, scores, batch.reference_logps, figures)
