"""Writes examples/demo.jsonl: records in HealthBench's published form, with four responses each.

    python examples/tiny_judge/make_demo.py

Held out by their seed. Every response gives some of the advice that the rubric asks for, so that
verdicts differ within a group.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from generate import Generator, domain_topics
from topics import QUESTIONS, TOPICS

RECORDS, RESPONSES, ITEMS = 8, 4, 5
OUT = Path(__file__).resolve().parents[1] / "demo.jsonl"


def demo_record(generator: Generator, number: int) -> dict[str, Any]:
    domain = list(QUESTIONS)[number % len(QUESTIONS)]
    here = [index for index, _ in domain_topics(domain)]
    harmful = [index for index in here if TOPICS[index].harmful]
    asked = [generator.rng.choice(harmful)]
    asked += generator.rng.sample([i for i in here if i not in harmful], ITEMS - 1)
    generator.rng.shuffle(asked)
    responses = []
    for _ in range(RESPONSES):
        wanted = generator.rng.sample(asked, generator.rng.randint(1, 3))
        others = [i for i in here if i not in asked]
        topics = wanted + generator.rng.sample(others, min(len(others), 2))
        generator.rng.shuffle(topics)
        responses.append(generator.response(topics)[0])
    items = [generator.item(topic, verdict=False) for topic in asked]
    prompt = generator.prompt(domain)
    return {
        "prompt_id": f"demo-{number}",
        "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "responses": responses,
        "rubrics": [
            {
                "criterion": item.text,
                "points": item.points,
                "tags": ["level:example", f"axis:{'pitfall' if item.points < 0 else 'advice'}"],
            }
            for item in items
        ],
    }


def main() -> None:
    generator = Generator(31_415)
    with OUT.open("w", encoding="utf-8") as file:
        for number in range(RECORDS):
            record = demo_record(generator, number)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
