"""The documents' tables of training: arms of bench/convergence.py, costs of training_cost.py."""

from __future__ import annotations

from typing import Any

from bench.cells import NOT_RUN, Cell, value
from bench.convergence_arms import ARMS

__all__ = ["ARM_TABLES", "CONVERGENCE", "COST", "COST_TABLES", "METHODS"]

CONVERGENCE, COST = "convergence", "training-cost"  # files in bench/results


def _interval(path: str, form: str) -> Cell:
    return value(path, lambda found: f"{found[0]:{form}} [{found[1]:{form}}, {found[2]:{form}}]")


def _steps(result: dict[str, Any]) -> str:
    """With how many seeds never got there, where there are any."""
    shown = _interval("steps_to_target", ".1f")(result)
    never = result.get("never_reached")
    return f"{shown}, {never} of {result['seeds']} never" if never else shown


_SCORE: dict[str, Cell] = {
    "held-out score": _interval("final_score", ".3f"),
    "less plain GRPO's": _interval("final_minus_grpo", "+.3f"),
    "steps to 90 % of GRPO's gain": _steps,
}
_ENTROPY: dict[str, Cell] = {
    "entropy of α": value("means.attribution/entropy", lambda found: f"{found:.3f}"),
}
_RATIO: dict[str, Cell] = {
    "GRPO's steps over its": _interval("grpo_steps_over_its", ".2f"),
    "length at the end": value("final_length", lambda found: f"{found:.1f}"),
}
_READOUTS = ("grpo", "base", "uniform", "shuffled", "l2")
_SHARP = ("sharp-dot", "sharp-shuffled")

# Of each table: its rows' arms, and its columns.
ARM_TABLES: dict[str, tuple[tuple[str, ...], dict[str, Cell]]] = {
    "readouts": ((*_READOUTS, *_SHARP), {**_SCORE, **_ENTROPY}),
    "convergence": (tuple(ARMS), {**_SCORE, **_RATIO, **_ENTROPY}),
}


def _added(way: str) -> Cell:
    def cell(result: dict[str, Any]) -> str:
        seconds = result.get("added_seconds", {}).get(way)
        if seconds is None:
            return NOT_RUN
        return f"{seconds:.2f} s, {result['added_share'][way] * 100:.0f} %"

    return cell


METHODS = {"grad2reward": "Grad2Reward", "grail": "GRAIL", "g2rl": "G2RL", "vigor": "VIGOR"}
COST_TABLES: dict[str, tuple[tuple[str, ...], dict[str, Cell]]] = {
    "training cost": (
        tuple(f"{COST}-{method}" for method in METHODS),
        {
            "step without it": value("step_seconds", lambda found: f"{found:.2f} s"),
            "g2r_fast adds": _added("ours"),
            "public way adds": _added("public"),
            "loop adds": _added("loop"),
            "cached loop adds": _added("cached_loop"),
            "tuned cached loop adds": _added("tuned_cached_loop"),
        },
    )
}
