"""The documents' tables of training: arms of bench/convergence.py, costs of training_cost.py."""

from __future__ import annotations

from typing import Any

from bench.cells import NOT_RUN, Cell, value
from bench.convergence_arms import ARMS, BASE, PLAIN, READOUTS, SHARP

__all__ = ["ARM_TABLES", "CONVERGENCE", "COST", "COST_TABLES", "METHODS"]

CONVERGENCE, COST = "convergence", "training-cost"  # files in bench/results


def _interval(path: str, form: str) -> Cell:
    return value(path, lambda found: f"{found[0]:{form}} [{found[1]:{form}}, {found[2]:{form}}]")


def _less(other: str) -> Cell:
    """The final score's difference to that of another arm, in pairs."""

    def cell(result: dict[str, Any]) -> str:
        itself = result.get("arm") == other
        return "–" if itself else _interval(f"final_minus.{other}", "+.3f")(result)

    return cell


def _steps(result: dict[str, Any]) -> str:
    """The median, or how many seeds never got there and the median of the others."""
    never = result.get("never_reached")
    median = value("median_steps_of_those_which_reached", lambda found: f"{found:.1f}")(result)
    if not never:
        return median
    others = "" if median == NOT_RUN else f", else {median}"
    return f"not reached ({never} of {result['seeds']}){others}"


def _by_mean(result: dict[str, Any]) -> str:
    return value("steps_of_the_mean_curve", lambda found: f"{found:.1f}")(result).replace(
        NOT_RUN, "not reached"
    )


def _ratio(result: dict[str, Any]) -> str:
    shown = _interval("grpo_steps_over_its", ".2f")(result)
    return "none" if shown == NOT_RUN else shown


def _entropy(result: dict[str, Any]) -> str:
    if result.get("arm") == PLAIN:
        return "–"
    return value("means.attribution/entropy", lambda found: f"{found:.3f}")(result)


_SCORE: dict[str, Cell] = {
    "seeds": value("seeds", str),
    "held-out score": _interval("final_score", ".3f"),
    "less plain GRPO's": _less(PLAIN),
}
_NOISE: dict[str, Cell] = {
    "noise": value("noise_floor", lambda found: f"±{found:.3f}"),
}
_ENTROPY: dict[str, Cell] = {
    "entropy of α": _entropy,
}
_COURSE: dict[str, Cell] = {
    "best score": _interval("peak_score", ".3f"),
    "steps to 90 % of GRPO's gain": _steps,
    "of the mean curve": _by_mean,
    "GRPO's steps over its": _ratio,
    "judge's reward at the end": value("reward_last", lambda found: f"{found:.3f}"),
    "length": value("length_last", lambda found: f"{found:.1f}"),
    "cut": value("truncated_last", lambda found: f"{found * 100:.1f} %"),
}

# Of each table: its rows' arms, and its columns.
ARM_TABLES: dict[str, tuple[tuple[str, ...], dict[str, Cell]]] = {
    "readouts": (
        READOUTS,
        {
            **_SCORE,
            "less the paper's base": _less(BASE),
            "less the base with τ = auto": _less(SHARP),
            **_NOISE,
            **_ENTROPY,
        },
    ),
    "convergence": (tuple(ARMS), {**_SCORE, **_NOISE, **_COURSE, **_ENTROPY}),
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
