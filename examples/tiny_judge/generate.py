"""Generated English for the tiny judge: a question, a response of 1-7 sentences, rubric items.

`Generator(seed).record(sentences=5, items=4)` -> a Record. Each sentence gives advice on one
topic; an item asks whether the response gives the advice of one topic, in other words. True iff
one sentence does, and that sentence is the evidence, known by construction. A False item asks
about a topic of the same domain that the response leaves out.

Topics are drawn alike for True and False items, so neither the response nor the item says
anything about the verdict alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from topics import HELD_OUT, QUESTIONS, TOPICS, Topic

MAX_SENTENCES = 7

ADVISES = (
    "you should {vp}",
    "try to {vp}",
    "make sure you {vp}",
    "it is a good idea to {vp}",
    "I would {vp}",
    "please {vp}",
    "remember to {vp}",
    "{vp}",
    "the best thing you can do is to {vp}",
    "most people do well when they {vp}",
    "you will be glad if you {vp}",
    "it pays to {vp}",
)
OPENERS = ("", "", "", "", "first, ", "also, ", "then, ", "in your case, ", "in general, ")
CLOSERS = ("", "", "", "", " from now on", " this time", " whatever others say", ", to be honest")

ASKS = (
    "advises the user to {vp}",
    "response recommends to {vp}",
    "recommends that the user {vp}",
    "tells the user to {vp}",
    "states that the user should {vp}",
    "encourages the user to {vp}",
    "suggests to {vp}",
    "the response is in favour of the plan to {vp}",
)
# RaR writes the importance into the item's text and gives it this weight.
IMPORTANCE = {"Essential": 5, "Important": 3, "Optional": 1}
FOLLOW_UPS = (
    ("Can you tell me a little more?", "There is not much more to say, it is all new to me."),
    ("Of course. Is there anything special?", "No, just the usual."),
)


@dataclass(frozen=True)
class Sentence:
    text: str
    topic: int  # index into TOPICS
    span: tuple[int, int]  # characters of the response


@dataclass(frozen=True)
class Item:
    text: str
    points: int  # negative: a pitfall
    topic: int
    verdict: bool
    evidence: int | None  # index of the sentence, None for a False item


@dataclass(frozen=True)
class Record:
    prompt: str | list[dict[str, str]]
    response: str
    sentences: list[Sentence]
    items: list[Item] = field(default_factory=list)


class Generator:
    """A seeded stream of records; `said`/`asked` choose "seen" or "unseen" wordings per side."""

    def __init__(self, seed: int, said: str = "seen", asked: str = "seen") -> None:
        self.rng = random.Random(seed)
        self.said, self.asked = said, asked

    def record(self, sentences: int, items: int) -> Record:
        """One question, one response of `sentences` sentences, `items` rubric items (half True)."""
        if not 1 <= sentences <= MAX_SENTENCES:
            raise ValueError(f"sentences must be 1 to {MAX_SENTENCES}, got {sentences}")
        domain = self.rng.choice(list(QUESTIONS))
        here = [i for i, topic in enumerate(TOPICS) if topic.domain == domain]
        response, parts = self.response(self.rng.sample(here, sentences))
        first = self.rng.random() < 0.5  # an odd number cannot be balanced: a coin decides
        verdicts = [(i % 2 == 0) == first for i in range(items)]
        self.rng.shuffle(verdicts)
        asked = [self._ask(parts, here, verdict) for verdict in verdicts]
        return Record(self.prompt(domain), response, parts, asked)

    def prompt(self, domain: str) -> str | list[dict[str, str]]:
        question = self.rng.choice(QUESTIONS[domain])
        if self.rng.random() < 0.7:
            return question
        messages = [{"role": "user", "content": question}]
        if self.rng.random() < 0.5:
            reply, answer = self.rng.choice(FOLLOW_UPS)
            messages.append({"role": "assistant", "content": reply})
            messages.append({"role": "user", "content": answer})
        return messages

    def response(self, topics: list[int]) -> tuple[str, list[Sentence]]:
        """Topics in order -> the text and its sentences."""
        text, parts = "", []
        for topic in topics:
            sentence = self.sentence(topic)
            start = len(text) + bool(text)
            text = f"{text} {sentence}" if text else sentence
            parts.append(Sentence(sentence, topic, (start, len(text))))
        return text, parts

    def sentence(self, topic: int) -> str:
        phrase = self._phrase(TOPICS[topic].said, self.said)
        frame = self.rng.choice(ADVISES)
        text = self.rng.choice(OPENERS) + frame.format(vp=phrase) + self.rng.choice(CLOSERS)
        return f"{text[0].upper()}{text[1:]}."

    def item(self, topic: int, verdict: bool, evidence: int | None = None) -> Item:
        text = self.rng.choice(ASKS).format(vp=self._phrase(TOPICS[topic].asked, self.asked))
        text = f"{text[0].upper()}{text[1:]}."
        harmful = TOPICS[topic].harmful
        points = self.rng.randint(1, 10) * (-1 if harmful else 1)
        if self.rng.random() < 0.5:
            importance, points = "Pitfall", -self.rng.randint(1, 2)
            if not harmful:
                importance, points = self.rng.choice(list(IMPORTANCE.items()))
            text = f"{importance} Criteria: {text}"
        return Item(text, points, topic, verdict, evidence)

    def _ask(self, parts: list[Sentence], here: list[int], verdict: bool) -> Item:
        if verdict:
            chosen = self.rng.randrange(len(parts))
            return self.item(parts[chosen].topic, True, chosen)
        present = {s.topic for s in parts}
        return self.item(self.rng.choice([i for i in here if i not in present]), False)

    def _phrase(self, phrases: tuple[str, ...], which: str) -> str:
        return self.rng.choice(phrases[-HELD_OUT:] if which == "unseen" else phrases[:-HELD_OUT])


def domain_topics(domain: str) -> list[tuple[int, Topic]]:
    return [(i, topic) for i, topic in enumerate(TOPICS) if topic.domain == domain]


if __name__ == "__main__":
    generator = Generator(0)
    for _ in range(3):
        record = generator.record(sentences=4, items=4)
        print(f"\n{record.prompt}\n  {record.response}")
        for item in record.items:
            print(f"  {item.verdict!s:5} {item.points:+3d}  {item.text}")
