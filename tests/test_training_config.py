"""Settings from YAML and the command line, prompts in an order that only the seed decides."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from g2r_fast import Rubric
from g2r_fast.errors import InputError, InputTypeError
from g2r_fast.training.config import READ_BY, TrainConfig, add_options, config_of, read_yaml
from g2r_fast.training.tasks import Task, load_function, prompt_ids, read_tasks, tasks_of_step


def parsed(line: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return config_of(vars(parser.parse_args(shlex.split(line))))


def test_every_setting_has_an_option_and_a_help() -> None:
    for field in dataclasses.fields(TrainConfig):
        if field.name != "alarms":
            assert field.metadata["help"], field.name
    config = parsed(
        "--method grail --learning-rate 1e-3 --tau auto:0.5 --no-divide-by-std --shuffle "
        "--no-shuffle --trackers tensorboard,wandb --max-tokens 99 --judge some/model --top-p 1"
    )
    assert config.learning_rate == 1e-3 and config.attribution.tau == ("auto", 0.5)
    assert not config.divide_by_std and not config.shuffle
    assert config.trackers == ("tensorboard", "wandb") and config.max_tokens == 99
    assert parsed("--tau 0.1").attribution.tau == 0.1
    assert parsed("") == TrainConfig()


def test_yaml_and_back(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-6\ntau: auto\ntrackers: [wandb]\nalarms: {window: 5}\n")
    config = config_of(read_yaml(path))
    assert config.learning_rate == 1e-6 and config.tau == "auto" and config.alarms.window == 5
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metod": "grpo"}, "unknown settings: metod"),
        ({"method": "ppo"}, "unknown method"),
        ({"tau": -1.0}, "tau"),
        ({"tau": "sharp"}, "tau"),
        ({"group_size": 0}, "group_size is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate is out of range"),
        ({"top_p": 0.0}, "top_p is out of range"),
        ({"temperature": 0.0}, "temperature is out of range"),
        ({"reward": "a.py:f", "method": "grad2reward"}, "needs a judge"),
        ({"reward": "a.py:f", "judge": "x", "method": "grpo"}, "both given"),
        ({"shuffle": True, "method": "grpo"}, "shuffle needs attributions"),
        ({"shuffle": True, "readout": "uniform"}, "shuffle needs attributions"),
        ({"evaluate_every": 5}, "needs held_out"),
        ({"dtype": "bfloat16"}, "cannot be trained"),
        ({"method": "vigor", "judge": "x"}, "ranks by gradients"),
        ({"sampler": "vllm", "lora_rank": 4}, "does not take LoRA"),
        ({"scaffold": "poem"}, "unknown scaffold"),
        ({"alarms": {"loud": 1}}, "unknown alarms: loud"),
    ],
)
def test_what_no_run_can_have(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(values)


def test_what_a_run_does_not_read_is_said() -> None:
    assert TrainConfig().without_effect() == []
    everything = {name for names in READ_BY.values() for name in names}
    for method, own in READ_BY.items():
        given = {"tau": "auto", "objective": "logodds", "readout": "l2"}
        given |= {"estimator": "rewards_pooled", "answer_marker": "=", "polarity": "both"}
        given |= {"novelty": 0.5, "variant": "prose", "parameters": "all"}
        assert set(given) == everything
        (text,) = config_of({**given, "method": method}).without_effect()
        names, reason = text.split(": ")
        assert set(names.split(", ")) == everything - set(own) and method in reason
    config = TrainConfig(method="vigor", verdict="sample", lora_alpha=8.0, checker="a.py:f")
    assert config.without_effect() == [
        "verdict: without effect with no judge",
        "lora_alpha: without effect with lora_rank 0",
        "checker: without effect with evaluate_every 0",
    ]


@pytest.mark.parametrize(
    "values",
    [{"steps": "many"}, {"steps": True}, {"shuffle": 1}, {"trackers": "wandb"}, {"steps": 1.5}],
)
def test_wrong_types(values: dict[str, Any]) -> None:
    with pytest.raises(InputTypeError, match="wrong type"):
        config_of(values)


def test_bad_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in ("a: [", "- a\n- b\n", "just words"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"no YAML|no settings"):
            read_yaml(path)


def test_a_continued_run_may_differ_where_nothing_was_computed() -> None:
    then = TrainConfig().to_dict()
    free = TrainConfig(steps=500, output="elsewhere", progress=False)
    assert free.differences(then) == ([], [])
    differences = TrainConfig(seed=1, tau=2.0, sample_batch=8).differences(then)
    assert differences == (
        ["tau: 1.0 then, 2.0 now", "seed: 0 then, 1 now"],
        ["sample_batch: 64 then, 8 now"],
    )


def tasks(count: int) -> list[Task]:
    return [Task(f"prompt {i}", [Rubric("is kind")], {}) for i in range(count)]


def test_every_prompt_comes_once_an_epoch_whatever_the_step_size() -> None:
    given = tasks(10)
    drawn = [task.prompt for step in range(1, 16) for task in tasks_of_step(given, 4, step, seed=3)]
    for epoch in range(6):
        assert set(Counter(drawn[10 * epoch : 10 * epoch + 10]).values()) == {1}
    assert drawn[:10] != drawn[10:20], "a new order every epoch"
    assert drawn[8:12] == [task.prompt for task in tasks_of_step(given, 4, 3, seed=3)]
    assert (
        drawn[:10] != [t.prompt for s in (1, 2, 3) for t in tasks_of_step(given, 4, s, seed=4)][:10]
    )
    more = tasks_of_step(tasks(3), 8, 1, seed=0)
    assert len(more) == 8 and Counter(t.prompt for t in more).most_common()[0][1] <= 3


def test_tasks_are_read_or_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    good = {"prompt": "hi", "rubrics": [{"criterion": "is kind", "points": 2}], "extra": 7}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, "prompt": "ho"}) + "\n")
    found = read_tasks(path)
    assert [t.prompt for t in found] == ["hi", "ho"] and found[0].rubrics == [
        Rubric("is kind", 2.0)
    ]
    assert found[1].record["extra"] == 7
    path.write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "no rubric"}) + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_tasks(path)
    assert len(read_tasks(path, need_rubrics=False)) == 2
    path.write_text("{}\n")
    with pytest.raises(InputError, match="no prompt"):
        read_tasks(path, need_rubrics=False)
    path.write_text("")
    with pytest.raises(InputError, match="holds no records"):
        read_tasks(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")


def test_a_line_is_what_json_lines_call_one(tmp_path: Path) -> None:
    """Unicode's other ends of lines stand in strings as they are."""
    path = tmp_path / "tasks.jsonl"
    rubric = [{"criterion": "is kind", "points": 1}]
    records = [{"prompt": f"a\u2028b\x85{i}", "rubrics": rubric, "i": i} for i in range(3)]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    for found in (read_tasks(path), read_tasks(path, need_rubrics=False)):
        assert [task.record["i"] for task in found] == [0, 1, 2]
        assert [task.prompt for task in found] == [record["prompt"] for record in records]


def test_a_file_of_functions_is_imported_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    (tmp_path / "rules.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from beside import HALF\n\n@dataclass\nclass Rule:\n    x: float = HALF\n\n"
        "def score(record, response):\n    return Rule().x\n"
    )
    assert load_function(f"{tmp_path}/rules.py:score")({}, "") == 0.5
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="cannot be imported: ModuleNotFoundError"):
        load_function(f"{tmp_path}/broken.py:score")


def test_functions_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "rules.py"
    path.write_text("def score(record, response):\n    return len(response) / record['n']\n")
    assert load_function(f"{path}:score")({"n": 2}, "abcd") == 2.0
    for where in (f"{path}:other", str(path), f"{tmp_path}/none.py:score"):
        with pytest.raises(InputError):
            load_function(where)


def test_prompts_are_rendered_as_the_policy_sees_them() -> None:
    from g2r_fast import Judge

    tokenizer = Judge.tiny().tokenizer
    text = tokenizer.decode(prompt_ids(tokenizer, "How are you?"))
    assert text.endswith("How are you?<|im_end|>\n<|im_start|>assistant\n")
    turns = [{"role": "user", "content": "How are you?"}]
    assert prompt_ids(tokenizer, turns) == prompt_ids(tokenizer, "How are you?")
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, "How") == tokenizer("How").input_ids
    with pytest.raises(InputError, match="needs a chat template"):
        prompt_ids(tokenizer, turns)
