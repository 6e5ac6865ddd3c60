"""Does a reward per token learn faster? The paper's claim in miniature, with controls.

    python -m bench.convergence [--arms base,grpo] [--seeds 5] [--steps 40] [--save]

A tiny policy that judges itself (examples/tiny_policy) trains with equal rollouts in every arm: the
base is Grad2Reward as the paper has it, the others change one factor of it (convergence_arms.py).
Every arm of a seed draws the same prompts. What is reported is the score of a rule checker on
held-out prompts, which has no part in training: at the end, and the steps until 90 % of what plain
GRPO gains, both with 95 % intervals over seeds. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.convergence_arms import ARMS, PLAIN
from bench.facts import facts, save

__all__ = ["interval", "measure", "run_arm", "steps_to", "summary"]

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "examples" / "tiny_policy" / "convergence.yaml"
SHARE = 0.9  # of plain GRPO's gain
MEANS = (
    "attribution/entropy",
    "attribution/top10_mass",
    "verdict/true_share",
    "response/length",
    "seconds/sample",
    "seconds/signal",
    "seconds/update",
    "seconds/step",
)
LAST = 3  # evaluations that make a final score
RESAMPLES = 10_000
# Student's t at 97.5 %, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
     10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 19: 2.093}  # fmt: skip


def run_arm(name: str, seed: int, steps: int, folder: Path, settings: Path = SETTINGS) -> Path:
    """Trains one arm with one seed, or goes on; the run's folder."""
    import torch

    from g2r_fast.training import train
    from g2r_fast.training.config import config_of, read_yaml

    torch.set_num_threads(1)
    os.chdir(ROOT)  # the settings' paths are relative to it
    output = folder / f"{name}-{seed}"
    values = {**read_yaml(settings), **ARMS[name].changes}
    train(config_of({**values, "seed": seed, "steps": steps, "output": str(output)}))
    return output


def curve_of(output: Path, steps: int) -> dict[str, Any]:
    """What the log of a run says: the held-out scores by step, and means over steps.

    Of its first `steps` steps: a run does not depend on how many are to come.
    """
    from g2r_fast.training.log import read_log

    lines = [line for line in read_log(output) if line["step"] <= steps]
    scores = [
        (int(line["step"]), line["evaluation/score"])
        for line in lines
        if "evaluation/score" in line
    ]
    means = {
        name: statistics.fmean(line[name] for line in lines if name in line)
        for name in MEANS
        if any(name in line for line in lines)
    }
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    lengths = [line["response/length"] for line in lines if "response/length" in line]
    return {
        "steps": [step for step, _ in scores],
        "scores": [round(score, 6) for _, score in scores],
        "reward_first": round(statistics.fmean(rewards[:5]), 6) if rewards else None,
        "reward_last": round(statistics.fmean(rewards[-5:]), 6) if rewards else None,
        "length_last": round(statistics.fmean(lengths[-5:]), 3),
        "means": {name: round(value, 6) for name, value in means.items()},
    }


def steps_to(target: float, steps: Sequence[int], scores: Sequence[float]) -> float | None:
    """Where the curve, a mean of three neighbours, first reaches the target; None: never.

    Linear between evaluations. The mean keeps one lucky evaluation from being the answer.
    """
    smooth = [statistics.fmean(scores[max(0, i - 1) : i + 2]) for i in range(len(scores))]
    for i, value in enumerate(smooth):
        if value >= target:
            if i == 0:
                return float(steps[0])
            before = smooth[i - 1]
            part = (target - before) / (value - before)
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return None


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_ratio(plain: Sequence[float], arm: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of mean steps, plain over arm, and its 95 % bootstrap interval over seeds in pairs."""
    a, b = np.asarray(plain), np.asarray(arm)
    drawn = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    return float(a.mean() / b.mean()), low, high


def summary(curves: dict[str, list[dict[str, Any]]], steps: int) -> dict[str, dict[str, Any]]:
    """Of every arm: final score, gain over GRPO in pairs, steps to 90 % of GRPO's gain.

    A run that never gets there counts as having taken all steps, and is counted.
    """
    final = {
        arm: [statistics.fmean(curve["scores"][-LAST:]) for curve in of_arm]
        for arm, of_arm in curves.items()
    }
    start = statistics.fmean(curve["scores"][0] for curve in curves[PLAIN])
    target = start + SHARE * (statistics.fmean(final[PLAIN]) - start)
    reached = {
        arm: [steps_to(target, curve["steps"], curve["scores"]) for curve in of_arm]
        for arm, of_arm in curves.items()
    }
    taken = {arm: [float(steps) if s is None else s for s in of] for arm, of in reached.items()}
    found = {}
    for arm, of_arm in curves.items():
        pairs = list(zip(final[arm], final[PLAIN], strict=True))
        found[arm] = {
            "arm": arm,
            "label": ARMS[arm].label,
            "changes": ARMS[arm].changes,
            "seeds": len(of_arm),
            "start_score": round(start, 4),
            "target_score": round(target, 4),
            "final_score": _rounded(interval(final[arm])),
            "final_minus_grpo": _rounded(interval([a - b for a, b in pairs])),
            "steps_to_target": _rounded(interval(taken[arm]), 1),
            "final_length": round(statistics.fmean(c["length_last"] for c in of_arm), 2),
            "never_reached": sum(s is None for s in reached[arm]),
            "grpo_steps_over_its": _rounded(paired_ratio(taken[PLAIN], taken[arm]), 2),
            "means": {
                name: round(statistics.fmean(curve["means"][name] for curve in of_arm), 4)
                for name in of_arm[0]["means"]
            },
            "curves": of_arm,
        }
    return found


def _rounded(values: tuple[float, float, float], digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values]


def measure(
    arms: Sequence[str], seeds: int, steps: int, folder: Path, processes: int
) -> dict[str, dict[str, Any]]:
    """Runs what is not run yet, a seed of all arms after the other; `summary` of all of it."""
    jobs = [(arm, seed, steps, folder) for seed in range(seeds) for arm in arms]
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    with context.Pool(processes, maxtasksperchild=8) as pool:
        for done, output in enumerate(pool.imap_unordered(_run, jobs), start=1):
            curve = curve_of(output, steps)
            scores = " ".join(f"{score:.3f}" for score in curve["scores"])
            spent = time.perf_counter() - started
            print(f"{done}/{len(jobs)} {spent:6.0f} s {output.name}: {scores}", flush=True)
    curves = {
        arm: [curve_of(folder / f"{arm}-{seed}", steps) for seed in range(seeds)] for arm in arms
    }
    return summary(curves, steps)


def _run(job: tuple[str, int, int, Path]) -> Path:
    return run_arm(*job)


def lines(found: dict[str, dict[str, Any]]) -> str:
    row = "{:<58} {:>22} {:>24} {:>20} {:>6} {:>18} {:>8}"
    heads = ("arm", "final score", "minus GRPO", "steps to 90 %", "never", "GRPO / its steps")
    text = [row.format(*heads, "entropy")]
    for one in found.values():
        entropy = one["means"].get("attribution/entropy")
        text.append(
            row.format(
                one["label"],
                "{:.3f} [{:.3f}, {:.3f}]".format(*one["final_score"]),
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one["final_minus_grpo"]),
                "{:.1f} [{:.1f}, {:.1f}]".format(*one["steps_to_target"]),
                one["never_reached"],
                "{:.2f} [{:.2f}, {:.2f}]".format(*one["grpo_steps_over_its"]),
                "" if entropy is None else f"{entropy:.3f}",
            )
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "convergence")
    parser.add_argument("--save", action="store_true", help="write bench/results/convergence.json")
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; known: {', '.join(ARMS)}")
    if PLAIN not in arms:
        parser.error(f"{PLAIN} is what the others are measured by")
    about = facts()
    found = measure(
        arms, arguments.seeds, arguments.steps, arguments.folder.resolve(), arguments.processes
    )
    print(lines(found))
    if arguments.save:
        print(f"saved {save('convergence', {'facts': about, 'scenarios': found})}")


if __name__ == "__main__":
    main()
