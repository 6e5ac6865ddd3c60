"""The arms of bench/convergence.py: what each changes of the base arm, and its label in tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARMS", "BASE", "PLAIN", "Arm"]


@dataclass(frozen=True)
class Arm:
    label: str
    changes: dict[str, Any] = field(default_factory=dict)  # of TrainConfig


PLAIN, BASE = "grpo", "base"

# A sure judge's attribution at tau = 1 on log p is flat, whatever is read: what is learnt about
# readouts there is learnt about nothing. So the last arms stand on a second base, where attribution
# says something and the estimator has no ramp; with uniform attribution that base is plain GRPO.
SHARP = {"estimator": "scaled_sequence", "tau": "auto"}

ARMS: dict[str, Arm] = {
    PLAIN: Arm("plain GRPO, sequence rewards", {"method": "grpo"}),
    BASE: Arm("Grad2Reward as in the paper: dot, τ = 1, log p, returns_pooled"),
    "uniform": Arm("uniform attribution", {"readout": "uniform"}),
    "shuffled": Arm("shuffled attribution", {"shuffle": True}),
    "l1": Arm("L1 norm", {"readout": "l1"}),
    "l2": Arm("L2 norm", {"readout": "l2"}),
    "tau-0.1": Arm("τ = 0.1", {"tau": 0.1}),
    "tau-2": Arm("τ = 2", {"tau": 2.0}),
    "auto": Arm("τ = auto", {"tau": "auto"}),
    "logodds": Arm("log-odds", {"objective": "logodds"}),
    "rewards-pooled": Arm("rewards_pooled", {"estimator": "rewards_pooled"}),
    "normalise-then-cumsum": Arm("normalise_then_cumsum", {"estimator": "normalise_then_cumsum"}),
    "scaled-sequence": Arm("scaled_sequence", {"estimator": "scaled_sequence"}),
    "sharp-dot": Arm("τ = auto and scaled_sequence: dot", SHARP),
    "sharp-shuffled": Arm("the same, shuffled", SHARP | {"shuffle": True}),
}
