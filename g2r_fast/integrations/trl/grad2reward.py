"""Grad2Reward as a reward function, and its token rewards as advantages of TRL's loss."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...adapters import adapter_layers
from ...advantages import AdvantageConfig, token_advantages_with_counts
from ...api import attribute_batch
from ...errors import InputError, InputTypeError
from ...grad2reward import AttributionConfig
from ...judge import Judge
from ...result import AttributionBatch
from ...reward_model import RewardModel
from .host import Host, check_unsharded
from .signals import AttachedSignal, Signal

__all__ = ["Grad2Reward"]


@dataclass
class Grad2Reward(Signal):
    """`rewards = attribute_batch(judge, prompts, completions, rubrics).scores`

    A rubric judge for `reward_funcs`. In a plain GRPOTrainer it gives the score of each completion
    and nothing else; in a trainer with `Grad2RewardMixin` the same pass of the judge gives every
    token its reward, and the loss its own advantage for every token (arXiv 2602.01791).

    Args:
        judge: a `Judge`, a `RewardModel`, or None: the frozen initial policy judges, with
            `scaffold="continuation"` and `judge_options`. Of a policy with LoRA that is the base
            model, its adapters off; else the reference model of the KL term if there is one that
            stays as it is; else a copy.
        attribution, advantage: the options of the method. With the estimator `"scaled_sequence"`
            the sequence advantage is TRL's own, from all reward functions.
        rubrics: the column of the dataset that holds a list of rubric items for each prompt, as
            `attribute_batch` takes them. A row without any (None or []) has no score (None). A
            RewardModel reads no column.
        verdict: `"argmax"`, or `"sample"`: what is drawn follows from `seed`, the trainer's step,
            the process and the completions, so that a run repeats.
        judge_options: of the `Judge` that is made where none is given.
        engine, max_tokens: as in `attribute_batch`.
        seed: of sampled verdicts, an integer.
    """

    judge: Judge | RewardModel | None = None
    attribution: AttributionConfig = AttributionConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    rubrics: str = "rubrics"
    verdict: str = "argmax"
    judge_options: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "auto"
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.judge is not None and not isinstance(self.judge, (Judge, RewardModel)):
            raise InputTypeError(
                "judge is not a Judge",
                expected="Judge(model, tokenizer), RewardModel(model, tokenizer) or None",
                got=type(self.judge).__name__,
            )
        for name, kind in (("attribution", AttributionConfig), ("advantage", AdvantageConfig)):
            if not isinstance(getattr(self, name), kind):
                raise InputTypeError(
                    f"{name} cannot be read",
                    expected=f"{kind.__name__}(...)",
                    got=repr(getattr(self, name)),
                )
        if self.verdict not in ("argmax", "sample"):
            raise InputError(
                "unknown verdict", expected="'argmax' | 'sample'", got=repr(self.verdict)
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InputTypeError("seed is no integer", expected="int", got=repr(self.seed))
        if self.judge is not None and self.judge_options:
            raise InputError(
                "judge_options are for a judge that is made here",
                expected="judge=None",
                got=sorted(self.judge_options),
                fix="Give them to Judge(...).",
            )

    def attach(self, host: Host, index: int) -> AttachedSignal:
        return _Grad2Reward(self, host, index)

    def __call__(self, *args: Any, **columns: Any) -> list[float | None]:
        """The scores, without a gradient: what a plain GRPOTrainer calls, by keywords."""
        if self.judge is None:
            super().__call__()
        prompts, completion_ids = columns["prompts"], columns["completion_ids"]
        wanted, items = self._items(len(prompts), columns)
        scores: list[float | None] = [None] * len(prompts)
        if wanted:
            out = self.attribute(
                self.judge, _take(prompts, wanted), _take(completion_ids, wanted), items,
                AttributionConfig(readout="uniform"), columns.get("trainer_state"),
            )  # fmt: skip
            for row, score in zip(wanted, out.scores.tolist(), strict=True):
                scores[row] = score
        return scores

    def attribute(
        self,
        judge: Judge | RewardModel | None,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        items: list[Any] | None,
        attribution: AttributionConfig,
        state: Any,
        **options: Any,
    ) -> AttributionBatch:
        """Rows with a rubric, judged; advantages are formed later, over all processes."""
        assert judge is not None  # __call__ and attach see to it
        return attribute_batch(
            judge, prompts, completion_ids, items, 1, attribution, verdict=self.verdict,
            engine=self.engine, max_tokens=self.max_tokens,
            generator=self._generator(state, completion_ids) if self.verdict == "sample" else None,
            **options,
        )  # fmt: skip

    def _generator(self, state: Any, completion_ids: Sequence[Sequence[int]]) -> torch.Generator:
        """On the CPU, whose draws are the same for every device. Several batches may belong to one
        step (an evaluation): their completions tell them apart."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        step = getattr(state, "global_step", 0)
        drawn_from = (self.seed, step, rank, [list(map(int, ids)) for ids in completion_ids])
        digest = hashlib.sha256(repr(drawn_from).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _items(
        self, count: int, columns: Mapping[str, Any]
    ) -> tuple[list[int], list[list[Any]] | None]:
        """The rows that have a rubric, and their items; None for a RewardModel."""
        if isinstance(self.judge, RewardModel):
            return list(range(count)), None
        if self.rubrics not in columns:
            names = sorted(set(columns) - _NO_COLUMNS)
            raise InputError(
                f"the dataset has no column {self.rubrics!r}",
                expected="a list of rubric items for each prompt",
                got="columns " + (", ".join(names) or "that hold prompts only"),
                fix="Name the column that has them: Grad2Reward(judge, rubrics=...).",
            )
        of_rows = columns[self.rubrics]
        wanted = [row for row, items in enumerate(of_rows) if items]
        return wanted, [[_without_gaps(item) for item in of_rows[row]] for row in wanted]


# What TRL gives a reward function beside the columns of the dataset.
_NO_COLUMNS = {"prompts", "completions", "completion_ids", "trainer_state"}
_NO_COLUMNS |= {"log_extra", "log_metric", "environments"}


class _Grad2Reward(AttachedSignal):
    """Token rewards of the rows that were scored last, and advantages from them."""

    per_token = True

    def __init__(self, signal: Grad2Reward, host: Host, index: int) -> None:
        super().__init__(signal.__name__, host, index)
        self.signal = signal
        self.judge, self._trained = _judge_of(signal, host)
        self._scaled = signal.advantage.estimator == "scaled_sequence"
        self._uniform = signal.attribution.readout == "uniform"
        self._token_rewards: list[Tensor] = []
        self._shares: list[Tensor] = []  # mean attributions, for scaled_sequence
        _check_normalisation(signal.advantage, host)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        started = time.perf_counter()
        rollouts, signal = self.sampled(), self.signal
        spans = rollouts.spans
        # A judge that continues the rollout reads the policy's context id for id; a grader is shown
        # the conversation, in which the policy's chat template would only be noise.
        continues = self.judge.continues and not self.judge.other_vocabulary
        contexts: Sequence[Any] = rollouts.prompt_ids if continues else prompts
        wanted, items = signal._items(len(prompts), columns)
        scores: list[float | None] = [None] * len(prompts)
        self._token_rewards = [
            torch.zeros(len(own), device=self.host.device) for own in rollouts.own
        ]
        self._shares = [own / own.sum().clamp(min=1) for own in rollouts.own]
        figures: dict[str, float | None] = dict.fromkeys(("entropy", "top10_mass", "top1_mass"))
        if wanted:
            with self._as_judge():
                out = signal.attribute(
                    self.judge, _take(contexts, wanted), _take(rollouts.completion_ids, wanted),
                    items, signal.attribution, self.host.trainer.state,
                    spans=None if spans is None else _take(spans, wanted),
                    keep_attributions=self._scaled and not self._uniform,
                )  # fmt: skip
            out = out.to(self.host.device)
            figures.update((name, out.stats.get(name)) for name in figures)
            for place, row in enumerate(wanted):
                scores[row] = float(out.scores[place])
                self._token_rewards[row] = out.token_rewards[place]
            if out.attributions is not None:
                means = out.mean_attributions(_take(rollouts.own, wanted))
                for row, mean in zip(wanted, means, strict=True):
                    self._shares[row] = mean
        self.host.log(self.__name__, {**figures, "seconds": time.perf_counter() - started})
        return scores

    def token_advantages(self, advantages: Tensor) -> list[Tensor]:
        """`A * T * mean_attribution` of TRL's own A, or the estimator over all processes' rows."""
        own = self.sampled().own
        if self._scaled:
            rows = zip(advantages, own, self._shares, strict=True)
            return [advantage * mask.sum() * share for advantage, mask, share in rows]
        rewards = self._with_other_rewards(own)
        everywhere = self.host.gather_rows(rewards)
        masks = [mask != 0 for mask in self.host.gather_rows([mask.float() for mask in own])]
        found, counts = token_advantages_with_counts(
            everywhere, self.host.group_size, self.signal.advantage, mask=masks
        )
        if found is None:  # an evaluation with groups of one
            return [torch.zeros_like(row) for row in rewards]
        groups = len(everywhere) // self.host.group_size
        self.host.log(
            self.__name__, {"frac_groups_without_signal": counts["zero_spread_groups"] / groups}
        )
        local: list[Tensor] = self.host.local(found)
        return local

    def _with_other_rewards(self, own: Sequence[Tensor]) -> list[Tensor]:
        """`weight * r_t`, and what other reward functions gave on the last token of the policy.

        There every return before it has all of it: a reward of the whole response.
        """
        weights, rewards = self.host.reward_weights, self.all_rewards()
        names = self.host.reward_names
        if bool(rewards.isinf().any()):
            row, function = rewards.isinf().nonzero()[0].tolist()
            raise InputError(
                "a reward is not finite",
                expected="numbers, or None where a function has none to give",
                got=float(rewards[row, function]),
                index=f"row {row} of {names[function]}",
            )
        weighted = rewards * weights
        weighted[:, self.index] = 0.0
        others = self.host.local(weighted.nansum(dim=1))
        result = []
        for token_rewards, mask, other in zip(self._token_rewards, own, others, strict=True):
            row = weights[self.index] * token_rewards
            places = mask.nonzero()
            if len(places):
                row[places[-1]] += other
            result.append(row)
        return result

    def _as_judge(self) -> AbstractContextManager[None]:
        """A model that TRL runs too judges without what TRL has changed of it."""
        return nullcontext() if self._trained is None else self.host.at_rest(self._trained)


def _judge_of(signal: Grad2Reward, host: Host) -> tuple[Judge | RewardModel, Any]:
    """The judge, on the trainer's device, and the policy or the reference if it is one of them."""
    judge, tokenizer, policy = signal.judge, host.tokenizer, host.policy
    if judge is None:
        check_unsharded(host, "self-judging")
        options = {"scaffold": "continuation", **signal.judge_options}
        if adapter_layers(policy):
            with host.at_rest(policy):
                return Judge(policy, tokenizer, adapters="off", **options), policy
        if host.reference is not None:
            reference = host.reference.requires_grad_(False)
            return Judge(reference, tokenizer, **options), reference
        return Judge(_frozen_copy(policy, host), tokenizer, **options), None
    judged = {id(parameter) for parameter in judge.model.parameters()}
    shared = any(id(parameter) in judged for parameter in policy.parameters())
    if shared and judge.adapters != "off":
        raise InputError(
            "the judge is the policy in training: what it says would change with every step",
            expected="a frozen model of its own, or the policy's base with adapters='off'",
            got="a judge that shares the policy's weights",
            fix="Grad2Reward() without a judge takes the frozen initial policy.",
        )
    if not judge.other_vocabulary and judge.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            "the judge has another tokenizer than the policy, whose ids it is to read",
            expected="Judge(..., policy_tokenizer=tokenizer of the policy)",
            got="a judge without policy_tokenizer",
        )
    if judge.device != host.device and not hasattr(judge.model, "hf_device_map"):
        judge.model.to(host.device)
    return judge, policy if shared else None


def _frozen_copy(policy: Any, host: Host) -> Any:
    """The policy as it is now, apart from what a trainer has hung onto it."""
    if getattr(host.trainer.args, "cast_lm_head_to_fp32", False):
        raise InputError(
            "a policy with cast_lm_head_to_fp32 cannot be copied as its own judge",
            fix="Load the judge by itself: Grad2Reward(Judge(model, tokenizer, "
            "scaffold='continuation')).",
        )
    with host.at_rest(policy):
        return copy.deepcopy(policy).requires_grad_(False).to(host.device)


def _check_normalisation(advantage: AdvantageConfig, host: Host) -> None:
    """Raise InputError where settings of TRL would say one thing and ours another."""
    scale, aggregation = host.normalisation
    functions = len(host.reward_weights)
    pooled = advantage.estimator != "scaled_sequence"
    if pooled and scale == "batch":
        raise InputError(
            f'scale_rewards="batch" has no counterpart in the estimator {advantage.estimator!r}',
            expected='scale_rewards="group" or "none"',
            fix='AdvantageConfig(estimator="scaled_sequence") takes TRL\'s own normalisation.',
        )
    if (pooled and scale == "none" and advantage.divide_by_std) or (
        not pooled and scale != "none" and not advantage.divide_by_std
    ):
        raise InputError(
            "scale_rewards and divide_by_std contradict each other",
            expected='scale_rewards="group" and divide_by_std=True, or "none" and False',
            got=f"scale_rewards={scale!r} and divide_by_std={advantage.divide_by_std}",
        )
    if pooled and functions > 1 and aggregation != "sum_then_normalize":
        raise InputError(
            f"multi_objective_aggregation={aggregation!r} has no counterpart in the estimator "
            f"{advantage.estimator!r}",
            expected='"sum_then_normalize"',
            fix='AdvantageConfig(estimator="scaled_sequence") takes TRL\'s own normalisation.',
        )
    if functions > 1 and advantage.estimator == "rewards_pooled":
        raise InputError(
            "a reward of the whole response has no token to go to with the estimator "
            "'rewards_pooled', which forms no returns",
            expected="Grad2Reward as the only reward function",
            got=", ".join(host.reward_names),
            fix='Use "returns_pooled", "normalise_then_cumsum" or "scaled_sequence".',
        )


def _without_gaps(item: Any) -> Any:
    """A rubric item as written: Arrow gives every row the keys of all, None where it has none."""
    if not isinstance(item, Mapping):
        return item
    return {key: value for key, value in item.items() if value is not None}


def _take(rows: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [rows[i] for i in indices]
