"""The arms of bench/convergence.py: two bases, plain GRPO, and twelve arms of one change each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALIKE", "ARMS", "BASE", "BASES", "PLAIN", "READOUTS", "SHARP", "Arm"]


@dataclass(frozen=True)
class Arm:
    """A run's settings: those of its base (None: what all arms share) with `change` on top."""

    label: str
    change: dict[str, Any] = field(default_factory=dict)  # of TrainConfig
    base: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that differs from what the arms share."""
        return {**(ARMS[self.base].settings if self.base else {}), **self.change}


# A sure judge's attribution at tau = 1 on log p is nearly flat, whatever is read: what differs
# between readouts there is small. So there is a second base where attribution says something, and
# its own controls. Uniform attribution knows no tau: that control is one run for both bases.
PLAIN, BASE, SHARP = "grpo", "base", "auto"
BASES = (BASE, SHARP)

ARMS: dict[str, Arm] = {
    PLAIN: Arm("plain GRPO, sequence rewards", {"method": "grpo"}),
    BASE: Arm("Grad2Reward as in the paper: dot, τ = 1, log p, returns_pooled"),
    "uniform": Arm("uniform attribution", {"readout": "uniform"}, BASE),
    "shuffled": Arm("shuffled attribution", {"shuffle": True}, BASE),
    "l1": Arm("L1 norm", {"readout": "l1"}, BASE),
    "l2": Arm("L2 norm", {"readout": "l2"}, BASE),
    "tau-0.1": Arm("τ = 0.1", {"tau": 0.1}, BASE),
    "tau-2": Arm("τ = 2", {"tau": 2.0}, BASE),
    "logodds": Arm("log-odds", {"objective": "logodds"}, BASE),
    "rewards-pooled": Arm("rewards_pooled", {"estimator": "rewards_pooled"}, BASE),
    "normalise-then-cumsum": Arm(
        "normalise_then_cumsum", {"estimator": "normalise_then_cumsum"}, BASE
    ),
    "scaled-sequence": Arm("scaled_sequence", {"estimator": "scaled_sequence"}, BASE),
    SHARP: Arm("second base, τ = auto: dot", {"tau": "auto"}, BASE),
    "auto-shuffled": Arm("τ = auto, shuffled attribution", {"shuffle": True}, SHARP),
    "auto-l2": Arm("τ = auto, L2 norm", {"readout": "l2"}, SHARP),
}

# What README's first table compares; these arms have more seeds than the rest.
READOUTS = (PLAIN, BASE, "uniform", "shuffled", "l2", SHARP, "auto-shuffled", "auto-l2")
# Where attribution is flat these are one arm up to rounding: what lies between them is noise.
ALIKE = (BASE, "uniform", "shuffled", "tau-2")
