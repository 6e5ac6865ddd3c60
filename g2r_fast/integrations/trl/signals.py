"""A signal in a trainer: a reward function of `reward_funcs` that also may shape advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...errors import InputError
from .host import Host, Rollouts, has_moved

__all__ = ["AttachedSignal", "Signal", "attach_signal"]


class Signal:
    """What a user puts into `reward_funcs`; `Grad2RewardMixin` attaches it to its trainer."""

    @property
    def __name__(self) -> str:  # what TRL calls the reward in its logs
        return self.__class__.__qualname__.lower()

    def attach(self, host: Host, index: int) -> AttachedSignal:
        """This signal at place `index` of `reward_funcs`."""
        raise NotImplementedError

    def __call__(self, *args: Any, **columns: Any) -> list[float | None]:
        """Called by a trainer that does not know what it has."""
        raise InputError(
            f"{self.__class__.__qualname__} needs a trainer with Grad2RewardMixin",
            expected="class MyTrainer(Grad2RewardMixin, GRPOTrainer)",
            got="a call from elsewhere",
        )


class AttachedSignal:
    """A signal at work; TRL calls it as the reward function.

    rollouts: what `_generate` returned last, on this process. rewards: `[N, F]`, what all functions
    of `reward_funcs` returned for it on all processes. The mixin sets both.
    """

    per_token = False  # whether `token_advantages` returns any

    def __init__(self, name: str, host: Host, index: int) -> None:
        self.__name__ = name
        self.host = host
        self.index = index
        self.rollouts: Rollouts | None = None
        self.rewards: Tensor | None = None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Rewards of this process's rows; columns: those of the dataset, a list each."""
        raise NotImplementedError

    def token_advantages(self, advantages: Tensor) -> list[Tensor] | None:
        """B tensors `[T_i]` for this process's rows, or None: `advantages [B]` stay.

        advantages: TRL's own, from the sum of all rewards.
        """
        return None

    def sampled(self) -> Rollouts:
        """The rollouts that are scored."""
        if self.rollouts is None:
            raise has_moved("rewards are asked for before _generate", "_generate to come first")
        return self.rollouts

    def all_rewards(self) -> Tensor:
        """`[N, F]` of all processes."""
        if self.rewards is None:
            raise has_moved("advantages come before _calculate_rewards", "rewards to come first")
        return self.rewards


def attach_signal(host: Host) -> AttachedSignal:
    """The one signal among the trainer's `reward_funcs`, at work in its place."""
    functions = list(host.trainer.reward_funcs)  # the user's own list stays as it is
    places = [i for i, function in enumerate(functions) if isinstance(function, Signal)]
    if len(places) != 1:
        found = [type(functions[i]).__name__ for i in places]
        raise InputError(
            "reward_funcs has no signal" if not found else "reward_funcs has several signals",
            expected="one of Grad2Reward(...), Grail(...), G2RL(...) and Vigor(...), and any plain "
            "reward functions",
            got=", ".join(found) or "plain reward functions only",
        )
    (index,) = places
    attached: AttachedSignal = functions[index].attach(host, index)
    functions[index] = attached
    host.trainer.reward_funcs = functions
    return attached
