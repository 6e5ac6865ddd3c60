"""The tiny policy's tasks: prompts, rubrics, and a rule checker that no judge has a say in.

`score(record, response)` = Σ points of the topics the response names / Σ positive points: Eq. 1
summed over the rubric as the judge's rewards are, but with a rule in the judge's place, so it may
be negative. A topic is named iff one of its `said` phrases stands in the response, letter case
aside.

    python examples/tiny_policy/environment.py    # writes train.jsonl and held_out.jsonl

A line of these files is `{"id", "prompt": [messages], "rubrics": [{"criterion", "points"}],
"wanted": {topic: points}}`, rubrics and wanted in the same order. What is wanted depends on the
prompt's domain alone, and the prompt does not say it. Situations, requests, follow-ups and wordings
of a criterion in the held-out file are in no line of the training file.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from g2r_fast.errors import InputError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny_judge"))

from topics import HELD_OUT, TOPICS, Topic  # noqa: E402

Messages = list[dict[str, str]]
TOPIC = {topic.name: topic for topic in TOPICS}
PATTERNS = {
    topic.name: re.compile(rf"\b(?:{'|'.join(re.escape(said.lower()) for said in topic.said)})\b")
    for topic in TOPICS
}

# Four of a domain's seven useful topics, and both harmful ones as pitfalls.
WANTED: dict[str, dict[str, int]] = {
    "health": {
        "fever": 5,
        "doctor": 4,
        "isolation": 3,
        "hygiene": 2,
        "antibiotics": -4,
        "dose": -3,
    },
    "finance": {
        "reserve": 5,
        "pension": 4,
        "insurance": 3,
        "report": 2,
        "payday": -3,
        "gamble": -4,
    },
    "cooking": {"probe": 5, "resting": 4, "recipe": 3, "knife": 2, "rinsing": -4, "counter": -3},
    "travel": {"vaccine": 5, "papers": 4, "bank": 3, "language": 2, "tap": -4, "taxi": -3},
    "fitness": {"warmup": 5, "recovery": 4, "form": 3, "log": 2, "pain": -4, "crash": -3},
    "gardening": {"soil": 5, "rotation": 4, "mulch": 3, "natives": 2, "poison": -4, "salt": -3},
}
DOMAINS = tuple(WANTED)

# The last HELD_OUT of every list below are in the held-out file alone.
SITUATIONS: dict[str, tuple[str, ...]] = {
    "health": (
        "I think I caught the flu.",
        "My throat hurts and I feel hot.",
        "I have been coughing for three days.",
        "I have a bad cold.",
        "I feel ill and have to be well again by Monday.",
        "My head aches and my nose runs.",
        "I woke up with a cold and feel ill.",
        "I have been ill with the flu for three days.",
    ),
    "finance": (
        "I want to get better with money.",
        "I just got my first job and my first salary.",
        "I am always broke at the end of the month.",
        "I am a beginner with money.",
        "I want to be in a safer place financially next year.",
        "My salary is gone before the month is over.",
        "I got more salary and want to be good with money.",
        "I am broke and want to be safer financially.",
    ),
    "cooking": (
        "I want to cook a roast for my family.",
        "I want to become a better home cook.",
        "My dinners are never as good as in a restaurant.",
        "I am cooking for eight people on Sunday.",
        "I will cook a chicken tonight.",
        "My roast was dry last time.",
        "I am cooking a chicken dinner on Sunday.",
        "I want to cook as well as a restaurant.",
    ),
    "travel": (
        "I am going abroad for the first time.",
        "We fly to Asia in May.",
        "I have a long trip ahead.",
        "I will backpack alone for a month.",
        "I leave for another country next week.",
        "We travel to a far country this year.",
        "I travel abroad alone in May.",
        "We have a long trip to Asia ahead.",
    ),
    "fitness": (
        "I want to get fit this year.",
        "I train for my first ten kilometre race.",
        "I joined a gym yesterday.",
        "I want to get stronger without getting hurt.",
        "I have not done any sport for years.",
        "I want to run faster and get strong.",
        "I joined a gym to get fit and strong.",
        "I have not trained for a race for years.",
    ),
    "gardening": (
        "I have a new garden and no idea what to do with it.",
        "My vegetables looked sad last year.",
        "I want a garden that is easy to look after.",
        "I am a beginner in the garden this spring.",
        "We moved into a house with a neglected yard.",
        "Nothing grows in my yard.",
        "My new yard looked sad this spring.",
        "I want vegetables from my own garden.",
    ),
}
REQUESTS = (
    "What should I do?",
    "Any advice?",
    "What now?",
    "Can you help?",
    "Any tips?",
    "What do you suggest?",
)
FOLLOW_UPS = (
    ("Can you tell me a little more?", "There is not much more to say, it is all new to me."),
    ("Of course. Is there anything special?", "No, just the usual."),
    ("Can you tell me what is special?", "It is all just the usual, there is not much to say."),
    ("Of course. Is there more to say?", "No, it is new to me."),
)
CRITERIA = (
    "Advises the user to {vp}.",
    "Response recommends to {vp}.",
    "Recommends that the user {vp}.",
    "Tells the user to {vp}.",
    "States that the user should {vp}.",
    "Encourages the user to {vp}.",
    "Suggests to {vp}.",
    "The response is in favour of the plan to {vp}.",
)
PHRASINGS = ("train", "held_out")


def _of(phrasing: str, wordings: Sequence[Any]) -> Sequence[Any]:
    return wordings[:-HELD_OUT] if phrasing == "train" else wordings[-HELD_OUT:]


def prompt(domain: str, rng: random.Random, phrasing: str = "train") -> Messages:
    """A question of the domain, in half of the cases with a follow-up."""
    openings = _openings(domain, phrasing)
    return _conversation(rng.choice(openings), phrasing, rng.random() < 0.5, rng)


def criterion(topic: Topic, rng: random.Random, phrasing: str = "train") -> str:
    """What a rubric asks for, in words that share no content word with a response's."""
    return rng.choice(_of(phrasing, CRITERIA)).format(vp=rng.choice(_of(phrasing, topic.asked)))


def _openings(domain: str, phrasing: str) -> list[str]:
    pairs = product(_of(phrasing, SITUATIONS[domain]), _of(phrasing, REQUESTS))
    return [" ".join(pair) for pair in pairs]


def _conversation(question: str, phrasing: str, follow_up: bool, rng: random.Random) -> Messages:
    messages = [{"role": "user", "content": question}]
    if follow_up:
        reply, answer = rng.choice(_of(phrasing, FOLLOW_UPS))
        messages.append({"role": "assistant", "content": reply})
        messages.append({"role": "user", "content": answer})
    return messages


def make(phrasing: str) -> list[dict[str, Any]]:
    """The records of `train.jsonl` (96) or `held_out.jsonl` (48), the same in every run."""
    rng = random.Random(f"tiny policy, {phrasing}")
    records = []
    for domain in DOMAINS:
        openings = _openings(domain, phrasing)
        if phrasing == "train":
            asked = [(question, i % 2 == 1) for i, question in enumerate(rng.sample(openings, 16))]
        else:
            asked = list(product(openings, (False, True)))
        for question, follow_up in asked:
            wanted = [(f"{domain}/{name}", points) for name, points in WANTED[domain].items()]
            rng.shuffle(wanted)
            records.append(
                {
                    "id": f"{phrasing}-{len(records):03d}",
                    "prompt": _conversation(question, phrasing, follow_up, rng),
                    "rubrics": [
                        {"criterion": criterion(TOPIC[name], rng, phrasing), "points": points}
                        for name, points in wanted
                    ],
                    "wanted": dict(wanted),
                }
            )
    return records


def write(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, UTF-8."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    Path(path).write_text("".join(lines), encoding="utf-8")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file; InputError for a line that is no record of this environment."""
    records = []
    for index, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"a line of {path} is no JSON", expected="an object", got=line[:80], index=index
            ) from error
        missing = {"id", "prompt", "rubrics", "wanted"} - set(record)
        if missing:
            raise InputError(
                f"a line of {path} lacks a field",
                expected="id, prompt, rubrics, wanted",
                got=f"no {', '.join(sorted(missing))}",
                index=index,
            )
        records.append(record)
    return records


def domain_of(record: Mapping[str, Any]) -> str:
    return TOPIC[next(iter(record["wanted"]))].domain


def named(response: str) -> set[str]:
    """Names of the topics that the response names, by the rule."""
    text = response.lower()
    return {name for name, pattern in PATTERNS.items() if pattern.search(text)}


def score(record: Mapping[str, Any], response: str) -> float:
    """Σ points of the topics named / Σ positive points, at most 1; pitfalls may make it negative.

    InputError where the record names a topic that is none, or no topic is worth anything.
    """
    wanted = record.get("wanted") or {}
    if unknown := sorted(set(wanted) - set(TOPIC)):
        raise InputError(
            "a record wants an unknown topic",
            expected="names of examples/tiny_judge/topics.py, such as 'health/rest'",
            got=repr(unknown[0]),
        )
    best = sum(max(points, 0) for points in wanted.values())
    if best <= 0:
        raise InputError(
            "a record wants nothing",
            expected="`wanted` with a topic of positive points",
            got=repr(wanted),
            fix="Take a line of train.jsonl or held_out.jsonl.",
        )
    return sum(wanted[name] for name in named(response) & set(wanted)) / best


if __name__ == "__main__":
    for phrasing in PHRASINGS:
        write(HERE / f"{phrasing}.jsonl", make(phrasing))
