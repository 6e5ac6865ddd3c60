"""Does a reward per token learn faster? The paper's claim in miniature, with controls.

    python -m bench.convergence [--seeds 5] [--more-seeds 8] [--steps 40] [--save]

A tiny policy that judges itself (examples/tiny_policy) trains with equal rollouts in every arm: the
base is Grad2Reward as the paper has it, a second base has τ = auto, and the other arms change one
factor of their base (convergence_arms.py). Every arm of a seed draws the same prompts. What is
reported is the score of a rule checker on held-out prompts, which has no part in training: at the
end, at its best, and the steps until 90 % of what plain GRPO gains; 95 % intervals over seeds,
differences in pairs of one seed, and beside them how far arms lie apart that are the same up to
rounding. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from bench.convergence_arms import ARMS, PLAIN, READOUTS
from bench.convergence_stats import noise_floor, summary
from bench.facts import RESULTS, command, facts, save

__all__ = ["check_inputs", "curve_of", "inputs_of", "lines", "measure", "run_arm"]

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "examples" / "tiny_policy" / "convergence.yaml"
MEANS = (
    "attribution/entropy",
    "attribution/top10_mass",
    "verdict/true_share",
    "response/length",
    "seconds/sample",
    "seconds/judge",
    "seconds/gradient",
    "seconds/update",
    "seconds/step",
)
ENDS = 5  # steps that make a first or a last figure
NOTES = (
    "The policy's judge, its frozen initial self, was trained against attacks from policies that "
    "were trained in this very environment (examples/tiny_policy/attack.py): it is harder to fool "
    "here than a judge is elsewhere.",
    "Held-out prompts and criteria are worded otherwise than those of training, but the tasks are "
    "the same: what is wanted depends on the prompt's domain alone, and all six domains are in "
    "both files. The score tests wording, not new tasks.",
    "The learning rate and the weight of the KL term were chosen on one seed of plain GRPO.",
)


def run_arm(name: str, seed: int, steps: int, folder: Path, settings: Path = SETTINGS) -> Path:
    """Trains one arm with one seed, or goes on; the run's folder.

    Raises InputError where the folder holds a run with other settings.
    """
    import torch

    from g2r_fast.training import train
    from g2r_fast.training.config import config_of, read_yaml

    torch.set_num_threads(1)
    os.chdir(ROOT)  # the settings' paths are relative to it
    output = folder / f"{name}-{seed}"
    values = {**read_yaml(settings), **ARMS[name].settings}
    train(config_of({**values, "seed": seed, "steps": steps, "output": str(output)}))
    return output


def curve_of(output: Path, steps: int) -> dict[str, Any]:
    """What the log of a run says of its first `steps` steps: a run does not depend on how many
    are to come. Raises RuntimeError where it has fewer.
    """
    from g2r_fast.training.log import read_log

    logged = [line for line in read_log(output) if "note" not in line]
    last = max((line["step"] for line in logged), default=0)
    if last < steps:
        raise RuntimeError(
            f"the run in {output} has {last} steps, and {steps} are asked for: a finished run is "
            "not run further. Delete its folder, or ask for fewer."
        )
    kept = [line for line in logged if line["step"] <= steps]

    def of(name: str) -> list[float]:
        return [line[name] for line in kept if name in line]

    evaluated = [line for line in kept if "evaluation/score" in line]
    return {
        "steps": [int(line["step"]) for line in evaluated],
        "scores": [round(line["evaluation/score"], 6) for line in evaluated],
        "reward_first": round(statistics.fmean(of("reward/mean")[:ENDS]), 6),
        "reward_last": round(statistics.fmean(of("reward/mean")[-ENDS:]), 6),
        "length_last": round(statistics.fmean(of("response/length")[-ENDS:]), 3),
        "truncated_last": round(statistics.fmean(of("response/truncated")[-ENDS:]), 4),
        "seconds": round(sum(of("seconds/step") + of("seconds/evaluation")), 1),
        "means": {name: round(statistics.fmean(of(name)), 6) for name in MEANS if of(name)},
    }


def inputs_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of every file that a run's result comes from, by its path in the repository."""
    model = settings["model"]
    names = [
        *(f"{model}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
        settings["data"],
        settings["held_out"],
        settings["checker"].split(":")[0],
    ]
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in names}


def check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Runs in a folder share their inputs, which `folder/inputs.json` keeps.

    Raises RuntimeError where they were others, or are not known.
    """
    kept = folder / "inputs.json"
    if not kept.is_file() and not any(folder.glob("*/log.jsonl")):
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(inputs, indent=1) + "\n")
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    if changed := [name for name in inputs if before.get(name) != inputs[name]]:
        raise RuntimeError(
            f"{folder} holds runs with another {', '.join(changed)}: delete it, or give another "
            "--folder"
        )


def measure(
    seeds: Mapping[str, int],
    steps: int,
    folder: Path,
    processes: int,
    log: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """Runs what is not run yet, a seed of all arms after the other; the curves of every arm."""
    jobs = [
        (arm, seed, steps, folder)
        for seed in range(max(seeds.values()))
        for arm, count in seeds.items()
        if seed < count
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=8) as pool:
        for done, output in enumerate(pool.imap_unordered(_run, jobs), start=1):
            log(f"{done}/{len(jobs)} {_line(output.name, curve_of(output, steps))}")
    return {
        arm: [curve_of(folder / f"{arm}-{seed}", steps) for seed in range(count)]
        for arm, count in seeds.items()
    }


def _run(job: tuple[str, int, int, Path]) -> Path:
    return run_arm(*job)


def _line(name: str, curve: dict[str, Any]) -> str:
    scores = " ".join(f"{score:.3f}" for score in curve["scores"])
    return (
        f"{name}: {scores}; judge's reward {curve['reward_first']:.3f} to "
        f"{curve['reward_last']:.3f}, length {curve['length_last']:.1f}, "
        f"cut {curve['truncated_last']:.0%}, {curve['seconds']:.0f} s"
    )


def lines(found: dict[str, dict[str, Any]], floor: dict[str, Any] | None) -> str:
    """The results as a table for a terminal, the noise floor under it."""
    row = "{:<62} {:>5} {:>22} {:>22} {:>24} {:>34} {:>18} {:>7} {:>7} {:>5} {:>8}"
    heads = (
        "arm", "seeds", "final score", "peak score", "final minus GRPO", "steps to 90 %",
        "GRPO / its steps", "reward", "length", "cut", "entropy",
    )  # fmt: skip
    text = [row.format(*heads)]
    for arm, one in found.items():
        entropy = one["means"].get("attribution/entropy")
        less, ratio = one["final_minus"].get(PLAIN), one["grpo_steps_over_its"]
        text.append(
            row.format(
                one["label"],
                one["seeds"],
                "{:.3f} [{:.3f}, {:.3f}]".format(*one["final_score"]),
                "{:.3f} [{:.3f}, {:.3f}]".format(*one["peak_score"]),
                "-" if arm == PLAIN else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*less),
                steps_text(one),
                "-" if ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio),
                f"{one['reward_last']:.3f}",
                f"{one['length_last']:.1f}",
                f"{one['truncated_last']:.0%}",
                "" if entropy is None else f"{entropy:.3f}",
            )
        )
    if floor is None:
        text.append("noise floor: unknown; no two arms have an attribution that is flat")
    else:
        half = ", ".join(
            f"±{width:.3f} with {count} seeds"
            for count, width in sorted({(o["seeds"], o["noise_floor"]) for o in found.values()})
        )
        text.append(
            f"noise floor: {', '.join(floor['arms'])} have entropies of {floor['lowest_entropy']} "
            f"and more; of one seed they differ by {floor['standard_deviation']:.3f} (sd), so that "
            f"a difference in final score is noise within {half}; the farthest apart are "
            f"{floor['farthest']}: {floor['farthest_difference']:+.3f}"
        )
    return "\n".join(text)


def steps_text(one: dict[str, Any]) -> str:
    """Median steps to the target, or how many runs never got there and the others' median."""
    never, median = one["never_reached"], one["median_steps_of_those_which_reached"]
    if not never:
        return f"{median:.1f}"
    others = "" if median is None else f", else {median:.1f}"
    return f"not reached ({never} of {one['seeds']}){others}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--more-seeds", type=int, default=8, help=f"of {', '.join(READOUTS)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "convergence")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/convergence.json and .log"
    )
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; known: {', '.join(ARMS)}")
    if PLAIN not in arms:
        parser.error(f"{PLAIN} is what the others are measured by")
    if not 2 <= arguments.seeds <= arguments.more_seeds:
        parser.error("an interval needs two seeds, and --more-seeds is no less than --seeds")
    seeds = {
        arm: arguments.more_seeds if arm in READOUTS else arguments.seeds
        for arm in ARMS
        if arm in arms
    }
    if arguments.save:
        with open(RESULTS / "convergence.log", "w", encoding="utf-8") as file:
            _report(seeds, arguments, file)
    else:
        _report(seeds, arguments, None)


def _report(seeds: dict[str, int], arguments: argparse.Namespace, file: TextIO | None) -> None:
    from g2r_fast.training.config import read_yaml

    def log(text: str) -> None:
        print(text, flush=True)
        if file is not None:
            print(text, file=file, flush=True)

    about, settings = facts(), read_yaml(SETTINGS)
    inputs, folder = inputs_of(settings), arguments.folder.resolve()
    check_inputs(folder, inputs)
    log(command())
    curves = measure(seeds, arguments.steps, folder, arguments.processes, log)
    found, floor = summary(curves), noise_floor(curves)
    log(lines(found, floor))
    if file is not None:
        content = {
            "facts": about,
            "notes": NOTES,
            "settings": {**settings, "steps": arguments.steps},
            "sha256": inputs,
            "noise_floor": floor,
            "scenarios": found,
        }
        print(f"saved {save('convergence', content)}")


if __name__ == "__main__":
    main()
