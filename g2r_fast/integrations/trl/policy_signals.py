"""GRAIL, G2RL and VIGOR in TRL: signals of the policy itself, around reward functions or alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import g2rl, grail, vigor
from ...checks import check_lengths
from ...errors import InputError
from .host import Host, check_function, check_unsharded
from .signals import AttachedSignal, Signal

__all__ = ["G2RL", "Grail", "Vigor"]


@dataclass
class Grail(Signal):
    """`advantages[i, t] = grail.token_weights(...)[i][t] * A[i]`, A of TRL (arXiv 2606.04889).

    Args:
        reward: a reward function; its rewards are passed on as they are.
        marker: where the answer lies, as `grail.find_answer_spans` takes it.
        polarity, leaf, shift, overrides, after_span, engine, max_tokens: of `grail.token_weights`.

    Saliencies are taken once per generated batch, from the policy that sampled it, at the sampling
    temperature.
    """

    reward: Callable[..., Any]
    marker: Any = "\\boxed{"
    polarity: str = "wrong"
    leaf: str | int = "embeddings"
    shift: int = 1
    overrides: bool = True
    after_span: str = "included"
    engine: str = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_function("Grail", self.reward)

    @property
    def __name__(self) -> str:
        return _name_of(self.reward)

    def attach(self, host: Host, index: int) -> AttachedSignal:
        return _Grail(self, host, index)


@dataclass
class G2RL(Signal):
    """`rewards = g2rl.shape_rewards(features, reward(...))` (arXiv 2512.15687).

    Args:
        reward: a reward function with rewards of -1 and 1, or any with `graded=True`; never None.
        lam, variant, clip, graded: of `g2rl.shape_rewards`.
        engine, max_tokens: of `g2rl.gradient_features`.

    Features are of the policy that sampled, at the sampling temperature, over its own tokens; the
    group is compared over all processes. Advantages stay TRL's, one per sequence.
    """

    reward: Callable[..., Any]
    lam: float = 1.0
    variant: str = "equation"
    clip: float = 3.0
    graded: bool = False
    engine: str = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_function("G2RL", self.reward)

    @property
    def __name__(self) -> str:
        return _name_of(self.reward)

    def attach(self, host: Host, index: int) -> AttachedSignal:
        return _G2RL(self, host, index)


@dataclass
class Vigor(Signal):
    """`rewards = vigor.rank_rewards(vigor.gradient_norms(...), lengths, G)` (arXiv 2605.09920).

    Args:
        parameters: `"trainable"`, `"all"` or `"lm_head"`.
        engine, max_tokens: of `vigor.gradient_norms`.

    The group is ranked over all processes. Advantages stay TRL's, one per sequence.
    """

    parameters: str = "trainable"
    engine: str = "auto"
    max_tokens: int | None = None

    def attach(self, host: Host, index: int) -> AttachedSignal:
        return _Vigor(self, host, index)


class _OfPolicy(AttachedSignal):
    def __init__(self, signal: Any, host: Host, index: int) -> None:
        super().__init__(signal.__name__, host, index)
        self.signal = signal
        check_unsharded(host, type(signal).__name__)

    def timed(self, started: float) -> None:
        self.host.log(
            type(self.signal).__name__.lower(), {"seconds": time.perf_counter() - started}
        )


class _Grail(_OfPolicy):
    per_token = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        rewards: list[float | None] = self.signal.reward(
            prompts=prompts, completions=completions, **columns
        )
        return rewards

    def token_advantages(self, advantages: Tensor) -> list[Tensor]:
        started = time.perf_counter()
        rollouts, signal, policy = self.sampled(), self.signal, self.host.policy
        spans = grail.find_answer_spans(
            self.host.tokenizer, rollouts.completion_ids, marker=signal.marker
        )
        with self.host.at_rest(policy):
            weights = grail.token_weights(
                policy, rollouts.prompt_ids, rollouts.completion_ids, spans, advantages,
                polarity=signal.polarity, leaf=signal.leaf, shift=signal.shift,
                overrides=signal.overrides, after_span=signal.after_span,
                temperature=self.host.temperature, engine=signal.engine,
                max_tokens=signal.max_tokens,
            )  # fmt: skip
        self.timed(started)
        rows = zip(weights, advantages, rollouts.own, strict=True)
        return [row.to(self.host.device) * advantage * own for row, advantage, own in rows]


class _G2RL(_OfPolicy):
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        rewards = self.signal.reward(prompts=prompts, completions=completions, **columns)
        started = time.perf_counter()
        rollouts, signal, policy = self.sampled(), self.signal, self.host.policy
        check_lengths(prompts=prompts, rewards=rewards)
        for row, reward in enumerate(rewards):
            if reward is None:
                raise InputError(
                    "G2RL needs a reward of every completion",
                    expected="a number",
                    got="None",
                    index=f"row {row} of {self.__name__}",
                )
        whole = rollouts.spans is None
        with self.host.at_rest(policy):
            found = g2rl.gradient_features(
                policy, rollouts.prompt_ids, rollouts.completion_ids,
                token_weights=None if whole else [own.tolist() for own in rollouts.own],
                temperature=self.host.temperature, engine=signal.engine,
                max_tokens=signal.max_tokens,
            )  # fmt: skip
        device = self.host.device
        shaped = g2rl.shape_rewards(
            self.host.gather(found.features.to(device)),
            self.host.gather(torch.tensor(rewards, dtype=torch.float32, device=device)),
            self.host.group_size,
            lam=signal.lam, variant=signal.variant, clip=signal.clip, graded=signal.graded,
        )  # fmt: skip
        self.timed(started)
        local: list[float | None] = self.host.local(shaped).tolist()
        return local


class _Vigor(_OfPolicy):
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        started = time.perf_counter()
        rollouts, signal, policy = self.sampled(), self.signal, self.host.policy
        if rollouts.spans is not None:
            raise InputError(
                "VIGOR differentiates the likelihood of whole completions, and tools wrote in some",
                expected="completions that are the policy's own",
                index=next(i for i, own in enumerate(rollouts.own) if not bool(own.all())),
            )
        with self.host.at_rest(policy):
            norms = vigor.gradient_norms(
                policy, rollouts.prompt_ids, rollouts.completion_ids,
                parameters=signal.parameters, engine=signal.engine, max_tokens=signal.max_tokens,
            )  # fmt: skip
        device = self.host.device
        lengths = torch.tensor([len(ids) for ids in rollouts.completion_ids], device=device)
        ranked = vigor.rank_rewards(
            self.host.gather(norms.to(device)),
            self.host.gather(lengths).tolist(),
            self.host.group_size,
        )
        self.timed(started)
        local: list[float | None] = self.host.local(ranked).tolist()
        return local


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
