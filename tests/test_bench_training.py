"""The statistics of the convergence experiment on curves that are known, and the arms it has."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest

from bench import training_kills, training_memory
from bench.convergence import SETTINGS, interval, paired_ratio, steps_to, summary
from bench.convergence_arms import ARMS, BASE, PLAIN
from bench.training_tables import ARM_TABLES
from g2r_fast.training.config import config_of, read_yaml

STEPS = [0, 5, 10, 15, 20]


def test_every_arm_is_a_run_and_changes_one_factor() -> None:
    shared = read_yaml(SETTINGS)
    configs = {name: config_of({**shared, **arm.changes}) for name, arm in ARMS.items()}
    assert configs[PLAIN].method == "grpo"
    base = configs[BASE]
    assert (base.method, base.tau) == ("grad2reward", 1.0)
    assert (base.objective, base.readout) == ("logp", "dot")
    assert base.estimator == "returns_pooled" and base.divide_by_std and not base.shuffle
    for name, config in configs.items():
        if name not in (BASE, PLAIN) and not name.startswith("sharp"):
            assert len(base.differences(config.to_dict())) == 1, name
    wanted = {"uniform", "shuffled", "l1", "l2", "tau-0.1", "tau-2", "auto", "logodds"}
    assert wanted < ARMS.keys()
    assert {c.estimator for c in configs.values()} > {"rewards_pooled", "normalise_then_cumsum"}
    assert all(arm in ARMS for arms, _ in ARM_TABLES.values() for arm in arms)
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS)


def test_steps_to_a_target_are_interpolated_on_a_smoothed_curve() -> None:
    line = [0.0, 0.1, 0.2, 0.3, 0.4]
    assert steps_to(0.2, STEPS, line) == pytest.approx(10.0)
    assert steps_to(0.25, STEPS, line) == pytest.approx(12.5)
    assert steps_to(0.01, STEPS, line) == 0.0
    assert steps_to(0.5, STEPS, line) is None
    # One lucky evaluation does not count.
    assert steps_to(0.3, STEPS, [0.0, 0.0, 0.4, 0.0, 0.0]) is None


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


def test_the_ratio_is_paired() -> None:
    plain = [10.0, 20.0, 30.0, 40.0, 50.0]
    ratio, low, high = paired_ratio(plain, [value / 2 for value in plain])
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0)), "pairs do not vary"


def curve(scores: list[float]) -> dict[str, Any]:
    return {"steps": STEPS, "scores": scores, "means": {"seconds/step": 1.0}, "length_last": 9.0}


def test_summary_by_hand() -> None:
    slow, fast, never = (
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [0.1, 0.45, 0.5, 0.5, 0.5],
        [0.1, 0.1, 0.1, 0.1, 0.1],
    )
    found = summary(
        {PLAIN: [curve(slow)] * 5, BASE: [curve(never)] * 5, "auto": [curve(fast)] * 5}, steps=20
    )
    # GRPO ends at 0.4, the mean of its last three: 90 % of the gain from 0.1 is 0.37.
    assert found[PLAIN]["target_score"] == pytest.approx(0.37)
    assert found[PLAIN]["final_score"] == pytest.approx([0.4, 0.4, 0.4])
    assert found[PLAIN]["steps_to_target"][0] == pytest.approx(13.5)
    assert found["auto"]["steps_to_target"][0] < 6.5
    assert found["auto"]["grpo_steps_over_its"][0] > 2
    assert found["auto"]["final_minus_grpo"] == pytest.approx([0.1, 0.1, 0.1])
    assert found[BASE]["never_reached"] == 5 and found[BASE]["steps_to_target"][0] == 20
    assert found[BASE]["seeds"] == 5 and found[BASE]["label"] == ARMS[BASE].label


def test_the_memory_arms_are_one_loop() -> None:
    separate, own = (
        config_of({**training_memory.COMMON, **training_memory.ARMS[name], "model": "m"})
        for name in ("separate reference", "self-judged")
    )
    assert separate.kl == own.kl > 0 and own.judge is None and own.reward is None
    names = {line.split(":")[0] for line in own.differences(separate.to_dict())}
    assert names == {"method", "reward"}


def test_a_difference_between_two_runs_is_seen(tmp_path: Any) -> None:
    import json

    import torch
    from safetensors.torch import save_file

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
