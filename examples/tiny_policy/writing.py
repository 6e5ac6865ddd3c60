"""What the tiny policy is taught to write, and the worse responses its judge has to read.

`Writer(seed).response(domain)` -> 2 to 4 short sentences on topics of the domain, drawn so that
a rubric of `environment.py` is rarely met: what it wants is not what is most often said.
`Writer(seed).any_response(domain)` -> 1 to 6 sentences, all topics alike, some of them damaged.
"""

from __future__ import annotations

import random

from environment import TOPIC, WANTED
from topics import TOPICS, Topic

FRAMES = ("{vp}", "try to {vp}", "you should {vp}", "please {vp}", "remember to {vp}")
SENTENCES = {2: 0.3, 3: 0.4, 4: 0.3}
MOST_SENTENCES = 6
WORDINGS = 3  # of a topic; more take longer to learn and change nothing
# How often a topic is drawn, next to one another: the room that training has.
UNWANTED, USEFUL, HARMFUL = 2.5, 1.0, 0.8


class Writer:
    """A seeded stream of responses, in the first WORDINGS wordings of a topic."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def response(self, domain: str) -> str:
        count = self.rng.choices(list(SENTENCES), list(SENTENCES.values()))[0]
        left = {topic.name: _weight(topic) for topic in TOPICS if topic.domain == domain}
        topics = []
        for _ in range(count):
            topics.append(self.rng.choices(list(left), list(left.values()))[0])
            del left[topics[-1]]
        return " ".join(self.sentence(self.phrase(TOPIC[name])) for name in topics)

    def any_response(self, domain: str) -> str:
        here = [topic for topic in TOPICS if topic.domain == domain]
        topics = self.rng.sample(here, self.rng.randint(1, MOST_SENTENCES))
        phrases = [self.phrase(topic) for topic in topics]
        for at in range(len(phrases)):
            if self.rng.random() < 0.3:
                phrases[at] = self.damaged(phrases[at], self.phrase(self.rng.choice(here)))
        if self.rng.random() < 0.2:
            phrases.insert(self.rng.randint(0, len(phrases)), self.rng.choice(phrases))
        text = " ".join(map(self.sentence, phrases))
        if self.rng.random() < 0.2:
            words = text.split(" ")
            text = " ".join(words[: self.rng.randint(1, len(words))])
        return text

    def damaged(self, phrase: str, other: str) -> str:
        """The phrase with a piece cut out, or a piece of the other's put in its place."""
        words, others = phrase.split(), other.split()
        start, stop = sorted(self.rng.sample(range(len(words) + 1), 2))
        first, last = sorted(self.rng.sample(range(len(others) + 1), 2))
        words[start:stop] = others[first:last] if self.rng.random() < 0.5 else []
        return " ".join(words or others)

    def sentence(self, phrase: str) -> str:
        text = self.rng.choice(FRAMES).format(vp=phrase)
        return f"{text[0].upper()}{text[1:]}."

    def phrase(self, topic: Topic) -> str:
        return self.rng.choice(topic.said[:WORDINGS])


def _weight(topic: Topic) -> float:
    if topic.harmful:
        return HARMFUL
    return USEFUL if topic.name.partition("/")[2] in WANTED[topic.domain] else UNWANTED
