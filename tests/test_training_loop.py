"""Whole runs of the tiny policy: what they leave, what a kill changes, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import ROOT, TINY, small, weights, without_seconds

from g2r_fast.errors import InputError
from g2r_fast.training import loop, run_folder, train
from g2r_fast.training.log import read_log
from g2r_fast.training.processes import share_of_prompts

METHODS = {
    "grpo": {},
    "grad2reward": {"tau": "auto", "estimator": "rewards_pooled", "kl": 0.05},
    "grail": {"answer_marker": "you ... ", "polarity": "both"},
    "g2rl": {},
    "vigor": {"kl": 0.05},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    config = small(tmp_path / "run", method=method, canaries_every=3, **METHODS[method])
    final = train(config)
    lines = [line for line in read_log(tmp_path / "run") if "note" not in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if "evaluation/score" in line] == [0, 2]
    for line in lines:
        assert all(math.isfinite(v) for v in line.values())
    last = lines[-1]
    assert last["policy/gradient_norm"] > 0 and last["policy/ratio_max"] == pytest.approx(1)
    assert ("policy/kl" in last) == bool(config.kl)
    assert ("reward/mean" in last) == ("judge/changed" in last) == (method != "vigor")
    assert ("canaries/true_rate" in lines[1]) == (method != "vigor")
    assert ("attribution/entropy" in last) == (method == "grad2reward")
    before, after = weights(TINY / "model"), weights(final)
    moved = [name for name in after if not torch.equal(before[name].float(), after[name])]
    assert len(moved) == len(after) > 0
    assert (tmp_path / "run" / "plot.png").stat().st_size > 1000


def test_a_run_is_the_same_twice_and_another_seed_is_another(tmp_path: Path) -> None:
    one, two, other = (
        train(small(tmp_path / name, seed=seed))
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    logs = [without_seconds(read_log(folder.parent)) for folder in (one, two, other)]
    assert logs[0] == logs[1] != logs[2]
    a, b, c = map(weights, (one, two, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


class Killed(BaseException):
    pass


STOPPED = {"steps": 4, "checkpoint_every": 2, "iterations": 2, "evaluate_every": 1}
PLACES = ("before the log", "in the checkpoint", "behind it", "at the end")


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small(tmp_path_factory.mktemp("alone") / "run", **STOPPED))


@pytest.mark.parametrize("where", PLACES)
def test_a_run_goes_on_from_wherever_it_was_stopped(
    where: str, left_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 3 of 4, with a checkpoint every 2; or between the last step and the end."""
    config = small(tmp_path / "killed", **STOPPED)
    stop_at = 2 if where == "in the checkpoint" else 3
    with monkeypatch.context() as patch:
        if where == "before the log":
            write = loop.RunLog.write

            def stop(self, figures):
                if figures["step"] == stop_at:
                    raise Killed
                write(self, figures)

            patch.setattr(loop.RunLog, "write", stop)
        elif where == "in the checkpoint":
            save = torch.save

            def half(state, file):
                save(state, file)
                file.truncate(file.tell() // 2)
                file.flush()
                raise Killed

            patch.setattr(torch, "save", half)
        elif where == "behind it":
            write = loop.RunLog.write

            def log_and_stop(self, figures):
                write(self, figures)
                if figures["step"] == stop_at:
                    raise Killed

            patch.setattr(loop.RunLog, "write", log_and_stop)
        else:

            def never(*arguments):
                raise Killed

            patch.setattr(run_folder, "replace_folder", never)
        with pytest.raises(Killed):
            train(config)
    assert not (tmp_path / "killed" / "final").exists()
    resumed = train(config)
    a, b = weights(left_alone), weights(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    logs = [without_seconds(read_log(folder.parent)) for folder in (left_alone, resumed)]
    assert logs[0] == logs[1]


def test_forgetting_the_optimiser_would_be_seen(
    left_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug of the test above: a checkpoint without AdamW's moments."""
    config = small(tmp_path / "killed", **STOPPED)
    load = run_folder.load_checkpoint

    def forgetful(path, device):
        state = load(path, device)
        state["optimizer"]["state"] = {}
        return state

    monkeypatch.setattr(run_folder, "load_checkpoint", forgetful)
    write = loop.RunLog.write

    def stop(self, figures):
        if figures["step"] == 3:
            raise Killed
        write(self, figures)

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLog, "write", stop)
        with pytest.raises(Killed):
            train(config)
    a, b = weights(left_alone), weights(train(config))
    assert not all(torch.equal(a[name], b[name]) for name in a)


def test_kill_9_from_outside(tmp_path: Path) -> None:
    """As a user's machine does it; `python -m bench.training_kills` does it twenty times."""
    options = {"steps": 6, "checkpoint_every": 1, "evaluate_every": 0, "max_new_tokens": 12}
    alone = train(small(tmp_path / "alone", **options))
    config = small(tmp_path / "killed", **options)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))  # JSON is YAML
    command = [sys.executable, "-m", "g2r_fast.training", "--config", str(tmp_path / "run.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("*.pt")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = train(config)
    a, b = weights(alone), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert without_seconds(read_log(alone.parent)) == without_seconds(read_log(resumed.parent))


def test_what_a_folder_with_a_run_refuses(tmp_path: Path) -> None:
    config = small(tmp_path / "run", steps=1, evaluate_every=0)
    final = train(config)
    written = final.stat().st_mtime_ns
    assert train(config) == final and final.stat().st_mtime_ns == written, "it is over"
    other = dataclasses.replace(config, tau=2.0)
    with pytest.raises(InputError, match=r"other settings: tau: 1\.0 then, 2\.0 now"):
        train(other)


def test_what_lies_behind_the_settings_counts_too(tmp_path: Path) -> None:
    """The content of the data, where its name is the same; and a run that is over stays as long."""
    data = tmp_path / "data.jsonl"
    lines = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:6]), encoding="utf-8")
    config = small(tmp_path / "run", steps=1, evaluate_every=0, data=str(data))
    train(config)
    with pytest.raises(InputError, match=r"is over, after 1 steps; expected steps=1"):
        train(dataclasses.replace(config, steps=2))
    data.write_text("".join(lines[:5]), encoding="utf-8")
    with pytest.raises(InputError, match="data: not what it was then"):
        train(config)


def test_batches_may_be_cut_smaller_after_running_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", steps=2, evaluate_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_plot", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(config)
    train(dataclasses.replace(config, micro_batch_tokens=100, steps=3))
    notes = [line for line in read_log(tmp_path / "run") if line.get("note") == "settings"]
    assert [note["text"] for note in notes] == [
        "held_out, checker: without effect with evaluate_every 0",  # said once
        "micro_batch_tokens: 4096 then, 100 now",
    ]


def test_a_judge_that_answers_nan_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loop.load_models

    def broken(*arguments):
        models = load(*arguments)
        with torch.no_grad():
            models.judge.model.model.norm.weight.fill_(math.nan)
        return models

    monkeypatch.setattr(loop, "load_models", broken)
    with pytest.raises(InputError, match="finite"):
        train(small(tmp_path / "run", steps=1, evaluate_every=0, canaries_every=0))
    lines = read_log(tmp_path / "run")
    (note,) = [line["text"] for line in lines if line.get("note") == "alarm"]
    assert note.startswith("step 1 cannot be rewarded") and "finite" in note


def test_a_prompt_too_long_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"past the model's positions.*prompt 0"):
        train(small(tmp_path / "run", max_new_tokens=4090))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_truncated_responses_can_be_left_out_of_the_loss(tmp_path: Path) -> None:
    """All are cut: nothing is learnt."""
    options = {"max_new_tokens": 3, "mask_truncated": True, "steps": 2, "evaluate_every": 0}
    final = train(small(tmp_path / "run", **options))
    before, after = weights(TINY / "model"), weights(final)
    assert all(torch.equal(before[name].float(), after[name]) for name in after)


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    config = small(tmp_path / "run", steps=1, evaluate_every=0)
    (tmp_path / "run").mkdir()
    lock = run_folder._lock(tmp_path / "run")
    with pytest.raises(InputError, match="another process is training"):
        train(config)
    lock.close()
    assert train(config).is_dir()


def test_a_judge_that_is_not_the_one_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", steps=3, evaluate_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_plot", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(config)
    load = loop.load_models

    def another(*arguments):
        models = load(*arguments)
        with torch.no_grad():
            models.judge.model.lm_head.weight[0, 0] += 1
        return models

    monkeypatch.setattr(loop, "load_models", another)
    with pytest.raises(InputError, match="judge: not what it was then"):
        train(config)


def test_a_judge_that_is_trained_along_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm with the worst of bugs planted: policy and judge are one and the same model."""
    load = loop.load_models

    def shared(*arguments):
        models = load(*arguments)
        judge = type(models.judge)(models.policy, models.tokenizer, "continuation")
        return dataclasses.replace(models, judge=judge, frozen=models.policy)

    monkeypatch.setattr(loop, "load_models", shared)
    with pytest.warns(UserWarning, match="trainable weights"):
        train(small(tmp_path / "run", steps=2, evaluate_every=0))
    notes = [line["text"] for line in read_log(tmp_path / "run") if "note" in line]
    assert any("judge" in note and "frozen" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "no model is given"),
        ({"data": "nowhere.jsonl"}, "cannot be read"),
        ({"checker": "nowhere.py:score"}, "cannot be found"),
    ],
)
def test_settings_that_cannot_run(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(small(tmp_path / "run", **options))
    with pytest.raises(InputError, match="no output is given"):
        train(dataclasses.replace(small(tmp_path / "run"), output=""))


def test_prompts_that_processes_cannot_share(tmp_path: Path) -> None:
    config = small(tmp_path / "run", prompts_per_step=3)
    assert share_of_prompts(config, SimpleNamespace(num_processes=3)) == 1
    with pytest.raises(InputError, match="not a multiple of the number of processes"):
        share_of_prompts(config, SimpleNamespace(num_processes=2))


def test_lora_trains_adapters_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")
    options = {"lora_rank": 4, "kl": 0.1, "steps": 3, "learning_rate": 1e-2}
    final = train(small(tmp_path / "run", **options))
    assert (final / "adapter_model.safetensors").is_file()
    lines = [line for line in read_log(tmp_path / "run") if "policy/kl" in line]
    assert lines[0]["policy/kl"] == pytest.approx(0, abs=1e-4) and lines[-1]["policy/kl"] > 1e-4
    assert all(line["judge/changed"] == 0 for line in lines)
