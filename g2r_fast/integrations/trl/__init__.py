"""The signals inside TRL's GRPOTrainer: a reward callable for `reward_funcs`, and a mixin.

class Grad2RewardTrainer(Grad2RewardMixin, GRPOTrainer): pass

Grad2RewardTrainer(model, reward_funcs=Grad2Reward(judge), args=..., train_dataset=...)
"""

from __future__ import annotations

from .grad2reward import Grad2Reward
from .mixin import Grad2RewardMixin
from .policy_signals import G2RL, Grail, Vigor

__all__ = ["G2RL", "Grad2Reward", "Grad2RewardMixin", "Grail", "Vigor"]
