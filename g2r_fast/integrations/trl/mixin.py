"""The mixin for TRL's GRPOTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...errors import InputError, InputTypeError
from .host import Host, Rollouts, check_class, check_rows, own_forward
from .signals import attach_signal
from .token_loss import check_loss

__all__ = ["Grad2RewardMixin"]

_Trainer: Any = object  # a GRPOTrainer, which need not be installed to import this


class Grad2RewardMixin(_Trainer):
    """`output["advantages"] = [B, T]` in place of TRL's `[B]`, from the signal in `reward_funcs`.

    class Grad2RewardTrainer(Grad2RewardMixin, GRPOTrainer): pass

    The trainer is built and used as a GRPOTrainer, with one of `Grad2Reward`, `Grail`, `G2RL` and
    `Vigor` among its `reward_funcs`, plain reward functions beside it. Whatever the signal needs is
    computed once per generated batch; num_iterations, steps_per_generation, truncation, KL and
    the loss are TRL's own. A group may be spread over processes.

    Raises InputError when the trainer is built: TRL older than 0.26, no signal or several, a loss
    that would not give every token its own advantage, settings that contradict each other.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(Grad2RewardMixin)]:
            if "_calculate_rewards" in vars(base) and not issubclass(base, Grad2RewardMixin):
                raise InputTypeError(
                    f"{cls.__name__} has the mixin behind {base.__name__}, which would not see it",
                    expected=f"class {cls.__name__}(Grad2RewardMixin, {base.__name__})",
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_class(type(self))
        given_forward = own_forward(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, **kwargs)
        self._g2r_host = Host(self, given_forward)
        self._g2r_signal = attach_signal(self._g2r_host)
        if self._g2r_signal.per_token:
            check_loss(self._g2r_host)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generated = super()._generate(*args, **kwargs)
        self._g2r_signal.rollouts = Rollouts.read(generated, self._g2r_host.device)
        return generated

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._g2r_signal.rewards = rewards
        return rewards

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        signal = self._g2r_signal
        signal.rollouts = signal.rewards = None  # of the batch before
        output = super()._generate_and_score_completions(*args, **kwargs)
        check_rows(output, signal.sampled())
        rows = signal.token_advantages(output["advantages"])
        if rows is not None:
            output["advantages"] = _padded(rows, output["completion_ids"])
        return output


def _padded(rows: list[torch.Tensor], completion_ids: torch.Tensor) -> torch.Tensor:
    """`[B, T]` float32, 0 behind each row, on the batch's device."""
    padded = pad_sequence([row.float().to(completion_ids.device) for row in rows], batch_first=True)
    if not bool(padded.isfinite().all()):
        raise InputError(
            "an advantage is not finite", index=f"row {int((~padded.isfinite()).nonzero()[0, 0])}"
        )
    return torch.nn.functional.pad(padded, (0, completion_ids.shape[1] - padded.shape[1]))
