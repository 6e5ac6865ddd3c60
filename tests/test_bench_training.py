"""The statistics of the convergence experiment on curves that are known, the arms it has, and what
the benchmarks of training refuse."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import convergence, training_kills, training_memory
from bench.convergence import SETTINGS, check_inputs, curve_of, inputs_of, lines, steps_text
from bench.convergence_arms import ALIKE, ARMS, BASE, BASES, PLAIN, READOUTS, SHARP
from bench.convergence_stats import (
    interval,
    mean_curve,
    noise_floor,
    ratio,
    smoothed,
    spread,
    steps_to,
    summary,
)
from bench.training_tables import ARM_TABLES
from g2r_fast.errors import InputError
from g2r_fast.training.config import config_of, read_yaml
from g2r_fast.training.log import read_log
from g2r_fast.training.models import load_models

STEPS = [0, 5, 10, 15, 20]


def test_every_arm_is_a_run_and_changes_one_factor_of_its_base() -> None:
    shared = read_yaml(SETTINGS)
    configs = {name: config_of({**shared, **arm.settings}) for name, arm in ARMS.items()}
    assert configs[PLAIN].method == "grpo"
    base = configs[BASE]
    assert (base.method, base.tau) == ("grad2reward", 1.0)
    assert (base.objective, base.readout) == ("logp", "dot")
    assert base.estimator == "returns_pooled" and base.divide_by_std and not base.shuffle
    assert {name for name, arm in ARMS.items() if arm.base is None} == {PLAIN, BASE}
    for name, arm in ARMS.items():
        if arm.base is not None:
            assert arm.base in BASES
            assert len(configs[arm.base].differences(configs[name].to_dict())[0]) == 1, name
    assert len(ARMS.keys() - {PLAIN, *BASES}) <= 12
    wanted = {"uniform", "shuffled", "l1", "l2", "tau-0.1", "tau-2", "logodds"}
    assert wanted | {SHARP, *READOUTS, *ALIKE} <= ARMS.keys()
    assert configs[SHARP].tau == "auto" and configs["auto-shuffled"].tau == "auto"
    estimators = {"rewards_pooled", "normalise_then_cumsum", "scaled_sequence"}
    assert {c.estimator for c in configs.values()} > estimators
    assert all(arm in ARMS for arms, _ in ARM_TABLES.values() for arm in arms)
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS)


def test_steps_to_a_target_are_interpolated_on_a_smoothed_curve() -> None:
    line = [0.0, 0.1, 0.2, 0.3, 0.4]
    assert steps_to(0.2, STEPS, line) == pytest.approx(10.0)
    assert steps_to(0.25, STEPS, line) == pytest.approx(12.5)
    assert steps_to(0.5, STEPS, line) is None
    # The start is no mean with what comes behind it.
    assert steps_to(0.05, STEPS, line) == pytest.approx(2.5)
    assert smoothed([0.0, 0.3, 0.3]) == pytest.approx([0.0, 0.2, 0.3])
    # One lucky evaluation does not count, and what is lost later was reached all the same.
    assert steps_to(0.3, STEPS, [0.0, 0.0, 0.4, 0.0, 0.0]) is None
    assert steps_to(0.19, STEPS, [0.0, 0.1, 0.2, 0.3, 0.0]) == pytest.approx(9.5)


def test_the_interval_is_students() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    mean, low, high = interval(values)
    half = 2.776 * statistics.stdev(values) / math.sqrt(5)
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert interval([1.0])[1:] == (-math.inf, math.inf)
    # It holds the truth about as often as it says.
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        _, low, high = interval(rng.normal(size=5).tolist())
        inside += low <= 0.0 <= high
    assert 0.93 < inside / 2000 < 0.97


def test_the_ratio_is_of_pairs_and_none_where_a_run_never_got_there() -> None:
    plain = [10.0, 20.0, 30.0, 40.0, 50.0]
    halves = [value / 2 for value in plain]
    assert ratio(plain, halves) == pytest.approx((2.0, 2.0, 2.0)), "pairs do not vary"
    found = ratio(plain, plain[::-1])
    assert found is not None and found[0] == pytest.approx(1.0)
    assert found[0] / found[1] == pytest.approx(found[2] / found[0]), "symmetric as a logarithm"
    assert ratio(plain, [*halves[:4], None]) is None
    assert ratio([None, *plain[1:]], halves) is None
    # Further seeds of one of them have no partner.
    assert ratio([*plain, 99.0], halves) == pytest.approx((2.0, 2.0, 2.0))


def curve(scores: list[float], entropy: float = 0.5) -> dict[str, Any]:
    return {
        "steps": STEPS,
        "scores": scores,
        "reward_first": 0.1,
        "reward_last": 0.4,
        "length_last": 9.0,
        "truncated_last": 0.25,
        "means": {"seconds/step": 1.0, "attribution/entropy": entropy},
    }


SLOW, FAST, NEVER = (
    [0.1, 0.2, 0.3, 0.4, 0.3],
    [0.1, 0.45, 0.5, 0.5, 0.5],
    [0.1, 0.1, 0.1, 0.1, 0.1],
)


def test_summary_by_hand() -> None:
    curves = {
        PLAIN: [curve(SLOW)] * 3,
        BASE: [curve(NEVER)] * 3,
        SHARP: [curve(FAST)] * 2,
        "uniform": [curve(FAST), curve(NEVER), curve(FAST)],
    }
    found = summary(curves)
    # GRPO's smoothed curve is 0.1, 0.2, 0.3, 1/3, 0.35; 90 % of the gain at its best, from 0.1.
    assert found[PLAIN]["target_score"] == pytest.approx(0.1 + 0.9 * 0.25)
    assert found[PLAIN]["final_score"] == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert found[PLAIN]["peak_score"] == pytest.approx([0.35] * 3)
    assert found[PLAIN]["median_steps_of_those_which_reached"] == pytest.approx(13.8, abs=0.06)
    fast = found[SHARP]
    assert fast["never_reached"] == 0 and fast["grpo_steps_over_its"][0] > 2
    assert fast["steps_of_the_mean_curve"] == pytest.approx(fast["steps_to_target"][0])
    assert fast["final_minus"][PLAIN] == pytest.approx([1 / 6] * 3, abs=1e-3)
    assert fast["final_minus"][BASE] == pytest.approx([0.4] * 3)
    assert (fast["seeds"], fast["base"], fast["change"]) == (2, BASE, {"tau": "auto"})
    assert (fast["length_last"], fast["truncated_last"], fast["reward_last"]) == (9.0, 0.25, 0.4)
    # Runs that never get there have no steps, and no number is made of them.
    never, part = found[BASE], found["uniform"]
    assert never["never_reached"] == 3 and never["steps_to_target"] == [None] * 3
    assert never["median_steps_of_those_which_reached"] is never["grpo_steps_over_its"] is None
    assert steps_text(never) == "not reached (3 of 3)"
    assert part["never_reached"] == 1 and part["grpo_steps_over_its"] is None
    assert steps_text(part).startswith("not reached (1 of 3), else ")
    shown = lines(found, None)
    assert "not reached (3 of 3)" in shown and "noise floor: unknown" in shown
    columns = ARM_TABLES["convergence"][1]
    assert columns["steps to 90 % of GRPO's gain"](never) == "not reached (3 of 3)"
    assert columns["GRPO's steps over its"](never) == "none"
    assert columns["of the mean curve"](never) == "not reached"
    assert (
        columns["less plain GRPO's"](found[PLAIN]) == columns["entropy of α"](found[PLAIN]) == "–"
    )
    assert columns["entropy of α"](fast) == "0.500"


def test_a_gain_that_is_none_is_no_target() -> None:
    with pytest.raises(RuntimeError, match="plain GRPO gains nothing: its mean score starts at"):
        summary({PLAIN: [curve([0.3, 0.2, 0.1, 0.1, 0.1])] * 2})


def test_runs_of_an_arm_have_the_same_steps() -> None:
    with pytest.raises(RuntimeError, match="different steps"):
        mean_curve([curve(SLOW), {**curve(SLOW), "steps": [0, 4, 8, 12, 16]}])


def test_the_noise_floor_is_the_spread_of_arms_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 1.0, 400)  # what a seed does to all arms is no noise between them
    alike = {name: (seeds + rng.normal(0, 0.1, 400)).tolist() for name in ("a", "b", "c")}
    deviation, degrees = spread({**alike, "c": alike["c"][:200]})
    assert deviation == pytest.approx(0.1, rel=0.1) and degrees == 600

    def flat(scores: list[float], entropy: float) -> dict[str, Any]:
        return curve([0.1, 0.1, *scores], entropy)

    curves = {
        PLAIN: [curve(SLOW)] * 2,
        BASE: [flat([0.3] * 3, 0.9999), flat([0.4] * 3, 0.9998)],
        "uniform": [flat([0.34] * 3, 1.0), flat([0.44] * 3, 1.0)],
        "tau-2": [flat([0.9] * 3, 0.9)] * 2,  # not flat, so not alike
    }
    floor = noise_floor(curves)
    assert floor is not None and floor["arms"] == [BASE, "uniform"]
    assert floor["standard_deviation"] == pytest.approx(0.04 / math.sqrt(2), abs=1e-5)
    assert (floor["degrees_of_freedom"], floor["lowest_entropy"]) == (2, 0.9998)
    assert floor["farthest"] == f"uniform and {BASE}"
    assert floor["farthest_difference"] == pytest.approx(0.04)
    found = summary(curves)
    assert found[PLAIN]["noise_floor"] == pytest.approx(4.303 * 0.04 / math.sqrt(2), abs=1e-4)
    assert "noise floor: base, uniform" in lines(found, floor)
    assert noise_floor({**curves, "uniform": [curve(SLOW)] * 2}) is None


def logged(folder: Path, steps: int) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": 0, "evaluation/score": 0.1}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "reward/mean": step / 10, "response/length": 7.0})
        rows[-1] |= {"response/truncated": 0.5, "seconds/step": 2.0, "evaluation/score": 0.2}
        rows.append({"step": step, "note": "alarm", "text": "look"})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_curve_has_the_steps_that_are_asked_for(tmp_path: Path) -> None:
    run = logged(tmp_path / "run", 8)
    found = curve_of(run, 6)
    assert found["steps"] == list(range(7)) and found["scores"][0] == 0.1
    assert found["reward_last"] == pytest.approx(0.4), "the mean of steps 2 to 6"
    assert (found["truncated_last"], found["seconds"]) == (0.5, 12.0)
    with pytest.raises(RuntimeError, match="has 8 steps, and 9 are asked for"):
        curve_of(run, 9)


def test_runs_of_other_inputs_or_settings_are_not_taken(tmp_path: Path) -> None:
    inputs = inputs_of(read_yaml(SETTINGS))
    assert {len(digest) for digest in inputs.values()} == {64} and len(inputs) == 6
    check_inputs(tmp_path / "new", inputs)
    check_inputs(tmp_path / "new", inputs)
    name = "examples/tiny_policy/model/model.safetensors"
    with pytest.raises(RuntimeError, match=f"runs with another {name}"):
        check_inputs(tmp_path / "new", {**inputs, name: "0" * 64})
    logged(tmp_path / "old" / "base-0", 1)
    with pytest.raises(RuntimeError, match="holds runs with another"):
        check_inputs(tmp_path / "old", inputs)


def test_a_run_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(convergence.ROOT)
    other = config_of({**read_yaml(SETTINGS), **ARMS[BASE].settings, "kl": 0.7, "seed": 0})
    (tmp_path / "base-0" / "final").mkdir(parents=True)
    content = {"settings": other.to_dict(), "begun with": {}}
    (tmp_path / "base-0" / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="holds a run with other settings"):
        convergence.run_arm(BASE, 0, 1, tmp_path)


def test_the_memory_arms_are_one_loop_with_one_copy_beside_the_policy(tmp_path: Path) -> None:
    """Both run, at a size of seconds; what holds the frozen weights is what is compared."""
    sizes = {**training_memory.SIZES, "hidden_size": 64, "intermediate_size": 96}
    model = tmp_path / "model"
    training_memory.make_model(model, {**sizes, "num_hidden_layers": 2})
    configs = {}
    for arm in training_memory.ARMS:
        training_memory.run_arm(arm, model, 1, 6, tmp_path / arm)
        configs[arm] = config_of(json.loads((tmp_path / arm / "run.json").read_text())["settings"])
        (line,) = (line for line in read_log(tmp_path / arm) if "policy/kl" in line)
        assert line["step"] == 1 and line["response/length"] <= 6
    separate, own = configs["separate reference"], configs["self-judged"]
    assert separate.kl == own.kl > 0
    names = {line.split(":")[0] for line in own.differences(separate.to_dict())[0]}
    assert names == {"method", "reward"}
    of_separate, of_own = (load_models(config, torch.device("cpu")) for config in (separate, own))
    assert of_separate.frozen is not None and of_separate.judge is None
    assert of_own.judge is not None and of_own.judge.model is of_own.frozen is not of_own.policy


def test_what_is_beyond_the_reference_is_counted_in_copies() -> None:
    peaks = {"separate reference": [100, 900, 110], "self-judged": [150, 130, 140]}
    assert training_memory.beyond(peaks, 200) == pytest.approx(0.15)


def test_a_difference_between_two_runs_is_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "final").mkdir(parents=True)
        save_file({"w": torch.ones(3)}, tmp_path / name / "final" / "model.safetensors")
        line = {"step": 1, "reward/mean": 0.5, "seconds/step": 1.0 if name == "one" else 2.0}
        (tmp_path / name / "log.jsonl").write_text(json.dumps(line) + "\n")
    one, two = tmp_path / "one", tmp_path / "two"
    assert training_kills.differences(one, two) == []
    save_file({"w": torch.tensor([1, 1, 1 + 1e-7])}, two / "final" / "model.safetensors")
    (two / "log.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.6}) + "\n")
    assert training_kills.differences(one, two) == ["w", "log.jsonl"]


def test_a_kills_phase_is_what_the_killed_process_was_at(tmp_path: Path) -> None:
    phase = training_kills.phase_of
    assert phase(tmp_path, False, 0.0) == "start-up"
    assert phase(tmp_path, True, 0.0) == "training"
    (tmp_path / "checkpoints").mkdir()
    unfinished = tmp_path / "checkpoints" / "step-3.unfinished"
    unfinished.touch()
    assert phase(tmp_path, True, 0.0) == "writing a checkpoint"
    later = unfinished.stat().st_mtime + 1
    assert phase(tmp_path, True, later) == "training", "another process left it there"
    (tmp_path / "final.unfinished").mkdir()
    assert phase(tmp_path, True, 0.0) == "writing the final weights"
    (tmp_path / "final").mkdir()
    assert phase(tmp_path, True, 0.0) == "behind the end"


def test_a_processs_own_first_line_is_waited_for(tmp_path: Path) -> None:
    """A run that goes on writes what it keeps of the old log first: that is no line of its own."""
    log = logged(tmp_path / "run", 2) / "log.jsonl"
    writes = "import os, sys, time\nnew = sys.argv[1] + '.new'\nopen(new, 'w').write('kept')\n"
    writes += "os.replace(new, sys.argv[1])\ntime.sleep(float(sys.argv[2]))\n"
    writes += "open(sys.argv[1], 'a').write('own')\ntime.sleep(60)"
    for pause, seconds, seen in (("0.3", None, True), ("60", 1.0, False)):
        before = log.stat().st_ino
        process = subprocess.Popen([sys.executable, "-c", writes, str(log), pause])
        assert training_kills.wait_for_log(process, log, before, seconds) is seen
        process.kill()
        process.wait()
    assert not training_kills.wait_for_log(process, log, 0, None), "it has ended"
