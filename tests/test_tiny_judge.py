"""The judge that ships: it judges, nothing simpler does, and its card says what was measured."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from g2r_fast import Judge

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "g2r_fast" / "tiny_judge"
sys.path.insert(0, str(ROOT / "examples" / "tiny_judge"))

from bag_of_words import bag_of_words_accuracy, examples  # noqa: E402
from evaluate import accuracy, sentence_of_tokens  # noqa: E402
from generate import Generator  # noqa: E402
from topics import TOPICS  # noqa: E402


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.tiny()


def metrics() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))
    return content


def test_it_judges_records_it_has_never_seen(judge: Judge) -> None:
    found = accuracy(judge, seed=77_777, count=420)
    assert found["accuracy"] >= 0.95


def test_a_bag_of_words_does_not() -> None:
    assert bag_of_words_accuracy(examples(3, 2000), examples(4, 1000)) <= 0.65


def test_the_card_holds_what_was_measured() -> None:
    found = metrics()
    assert found["accuracy"]["seen wordings"]["accuracy"] >= 0.95
    assert found["accuracy"]["seen wordings"]["items"] >= 2000
    assert found["bag_of_words"] <= 0.65
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for name, row in found["accuracy"].items():
        assert f"| {name} | {row['items']} | {row['accuracy']:.4f} |" in card
    for name, row in found["evidence"]["table"].items():
        if name != "uniform":
            assert f"| {name} | {row['top']:.3f} | {row['mass']:.4f} |" in card
    assert f"mass {found['evidence']['table']['uniform']['mass']:.4f}" in card


def test_it_is_small_and_loads_as_any_judge() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size < 8 * 2**20
    judge = Judge.from_pretrained(SHIPPED)
    assert judge.model.dtype == torch.float32 and not judge.model.training
    assert not any(p.requires_grad for p in judge.model.parameters())


def test_evidence_is_where_the_generator_says(judge: Judge) -> None:
    generator = Generator(5)
    for _ in range(40):
        record = generator.record(4, 4)
        for sentence in record.sentences:
            start, stop = sentence.span
            assert record.response[start:stop] == sentence.text
        of_token = sentence_of_tokens(judge, record)
        ids = judge.encode_response(record.response).ids
        for index, sentence in enumerate(record.sentences):
            own = [i for i, s in zip(ids, of_token.tolist(), strict=True) if s == index]
            assert judge.tokenizer.decode(own).strip() == sentence.text
        for item in record.items:
            topics = [s.topic for s in record.sentences]
            assert item.verdict == (item.topic in topics)
            assert item.evidence == (topics.index(item.topic) if item.verdict else None)
            assert (item.points < 0) == TOPICS[item.topic].harmful


def test_both_sides_of_a_topic_share_no_content_word() -> None:
    small = {"the", "a", "an", "to", "of", "in", "on", "for", "with", "and", "or", "your", "you",
             "it", "at", "as", "from", "by", "up", "out", "is", "are", "be", "not", "than", "that",
             "what", "when", "before", "after", "every", "some", "any", "all", "more", "most", "no",
             "one", "off", "away", "own", "into", "down", "over", "without", "until", "if",
             "well"}  # fmt: skip
    for topic in TOPICS:
        said, asked = (
            {w for phrase in side for w in re.findall(r"[a-z]+", phrase.lower())} - small
            for side in (topic.said, topic.asked)
        )
        assert not said & asked, (topic.name, said & asked)


def test_items_are_balanced() -> None:
    generator = Generator(6)
    verdicts = Counter(i.verdict for _ in range(200) for i in generator.record(3, 4).items)
    assert verdicts[True] == verdicts[False]


def test_the_demo_file_is_as_healthbench_publishes_it(judge: Judge) -> None:
    lines = (ROOT / "examples" / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert 6 <= len(records) <= 12
    for record in records:
        assert {"prompt", "responses", "rubrics", "prompt_id"} <= set(record)
        assert len(record["responses"]) == 4
        assert all({"criterion", "points", "tags"} == set(r) for r in record["rubrics"])
        assert min(r["points"] for r in record["rubrics"]) < 0
