"""The tiny policy writes and judges, and its environment scores by a rule that is no judge."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from g2r_fast import Judge
from g2r_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "tiny_policy"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "tiny_judge")]

from environment import (  # noqa: E402
    CRITERIA,
    PHRASINGS,
    TOPIC,
    WANTED,
    make,
    named,
    read,
    score,
    write,
)
from measure import measure_records  # noqa: E402
from packed import Row, sample, verdict_logits  # noqa: E402
from writing import Writer  # noqa: E402


@pytest.fixture(scope="module")
def policy() -> Judge:
    return Judge.from_pretrained(FOLDER / "model", scaffold="continuation")


def record_of(domain: str) -> dict[str, Any]:
    return next(r for r in read(FOLDER / "train.jsonl") if f"{domain}/" in next(iter(r["wanted"])))


# The model ---------------------------------------------------------------------------------------


def test_it_loads_as_any_model_and_is_small(policy: Judge) -> None:
    assert policy.model.dtype == torch.float32
    assert all(torch.equal(p, p.bfloat16().float()) for p in policy.model.parameters())
    assert (FOLDER / "model" / "model.safetensors").stat().st_size < 2.2e6
    generation = policy.model.generation_config
    assert generation.eos_token_id == policy.tokenizer.eos_token_id
    assert generation.pad_token_id == policy.tokenizer.pad_token_id


def test_it_writes_and_judges_what_it_wrote(policy: Judge) -> None:
    torch.manual_seed(11)
    found = measure_records(policy, read(FOLDER / "train.jsonl")[::6])
    assert found["items"] == 16 * 8 * 6
    assert found["accuracy"] >= 0.95
    assert found["accuracy_true"] >= 0.85  # a judge that always says False is right in four of five
    assert found["ended"] >= 0.95
    assert 0.0 <= found["score"] <= 0.5 and found["score_sd_in_group"] >= 0.1


def test_packed_judgements_are_those_of_the_judge(policy: Judge) -> None:
    records = read(FOLDER / "train.jsonl")[::40]
    torch.manual_seed(3)
    responses = sample(policy, [record["prompt"] for record in records])
    responses[1] = responses[1][:9]  # cut off, without an end of turn
    criteria = [[rubric["criterion"] for rubric in record["rubrics"]] for record in records]
    rows = [Row(r["prompt"], *rest) for r, *rest in zip(records, responses, criteria, strict=True)]
    for row, packed in zip(rows, verdict_logits(policy, rows), strict=True):
        for criterion, logits in zip(row.criteria, packed, strict=True):
            ids = policy.encode(row.prompt, row.response, criterion).input_ids
            alone = policy.model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(logits, alone)


def test_the_card_holds_what_was_measured() -> None:
    found = json.loads((FOLDER / "model" / "metrics.json").read_text(encoding="utf-8"))
    card = (FOLDER / "model" / "README.md").read_text(encoding="utf-8")
    assert found["train"]["accuracy"] >= 0.95 and found["train"]["items"] >= 4000
    for name in ("train", "held-out"):
        row = found[name]
        assert (
            f"| {name} | {row['score']:.3f} | {row['score_by_judge']:.3f} | {row['accuracy']:.4f} |"
        ) in card
    assert f"{found['training']['seconds']:.0f} s" in card


# The rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "points"),
    [
        ("", 0),
        ("Check your temperature twice a day.", 5),
        ("please CHECK YOUR TEMPERATURE TWICE A DAY", 5),
        ("Check your temperature twice a day. Keep a thermometer by the bed.", 5),
        ("Check your temperature twice a night.", 0),
        ("Check your temperature twice a days.", 0),
        ("Monitor the fever.", 0),
        ("Drink plenty of water. Go to bed early tonight.", 0),
        ("Check the thermometer every morning.", 5),
        ("Swallow four at once.", -3),
        ("Call your doctor. Stay home from work. Swallow four at once.", 4),
        ("Check your temperature twice a day. Call your doctor. Stay home from work. "
         "Wash your hands with soap.", 14),
        ("Borrow antibiotics from a neighbour. Swallow four at once.", -7),
        ("Put three months of pay aside.", 0),
    ],
)  # fmt: skip
def test_the_rule_counts_topics_once_and_pitfalls_against(response: str, points: int) -> None:
    assert score(record_of("health"), response) == points / 14


def test_every_wording_of_a_topic_names_it_and_no_other() -> None:
    for topic in TOPIC.values():
        for phrase in topic.said:
            assert named(f"Try to {phrase}.") == {topic.name}
        for phrase in topic.asked:
            assert named(f"Try to {phrase}.") == set()


@pytest.mark.parametrize("wanted", [None, {}, {"health/rest": -1}, {"health/sleep": 2}])
def test_a_record_that_wants_nothing_known_is_refused(wanted: Any) -> None:
    with pytest.raises(InputError):
        score({"wanted": wanted}, "Go to bed early tonight.")


def test_the_rule_can_be_loaded_from_its_file_alone() -> None:
    spec = importlib.util.spec_from_file_location("rule_of_a_run", FOLDER / "environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.score(record_of("health"), "Call your doctor.") == 4 / 14


# The files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_the_files_are_what_the_script_writes(phrasing: str, tmp_path: Path) -> None:
    write(tmp_path / "records.jsonl", make(phrasing))
    assert (tmp_path / "records.jsonl").read_bytes() == (FOLDER / f"{phrasing}.jsonl").read_bytes()


def test_a_rubric_holds_what_its_domain_wants() -> None:
    for phrasing in PHRASINGS:
        for record in read(FOLDER / f"{phrasing}.jsonl"):
            (domain,) = {name.partition("/")[0] for name in record["wanted"]}
            names = {name.partition("/")[2]: points for name, points in record["wanted"].items()}
            assert names == WANTED[domain]
            assert [r["points"] for r in record["rubrics"]] == list(record["wanted"].values())
            for rubric, name in zip(record["rubrics"], record["wanted"], strict=True):
                asked = TOPIC[name].asked
                made = {frame.format(vp=phrase) for frame in CRITERIA for phrase in asked}
                assert rubric["criterion"] in made
                assert (rubric["points"] < 0) == TOPIC[name].harmful


def test_held_out_wordings_are_in_no_training_record() -> None:
    train, held_out = (
        {text for record in read(FOLDER / f"{phrasing}.jsonl") for text in texts(record)}
        for phrasing in PHRASINGS
    )
    assert train and held_out and not train & held_out


def texts(record: dict[str, Any]) -> list[str]:
    """Situation and request apart, follow-ups, and the criteria's frames and phrases."""
    question, *rest = [message["content"] for message in record["prompt"]]
    found = [part.strip() for part in question.replace(". ", ".\n").splitlines()]
    for rubric, name in zip(record["rubrics"], record["wanted"], strict=True):
        phrases = [phrase for phrase in TOPIC[name].asked if phrase in rubric["criterion"]]
        phrase = max(phrases, key=len)
        found += [phrase, rubric["criterion"].replace(phrase, "…")]
    return found + rest


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    good = (FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    for bad in ("not json", '{"id": 1}'):
        (tmp_path / "bad.jsonl").write_text(f"{good}\n{bad}\n", encoding="utf-8")
        with pytest.raises(InputError, match="first at index 1"):
            read(tmp_path / "bad.jsonl")


def test_what_is_wanted_is_not_what_is_mostly_written() -> None:
    """Room for training: regular responses meet little of a rubric, and all of it can be met."""
    writer, record = Writer(5), record_of("travel")
    scores = [score(record, writer.response("travel")) for _ in range(400)]
    assert 0.1 <= math.fsum(scores) / len(scores) <= 0.35
    best = [TOPIC[name].said[0] for name, points in record["wanted"].items() if points > 0]
    assert score(record, ". ".join(best)) == 1.0
