"""The tiny judge's model card and metrics.json, from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD = """\
---
license: apache-2.0
language: en
---

# The tiny judge

A Llama decoder of {parameters:,} parameters that says whether a short advice text gives one
piece of advice. It ships with g2r_fast so that its demo and its tests have a judge:
`Judge.tiny()`. It knows generated English about six domains and nothing else; do not judge real
answers with it.

Trained by `python examples/tiny_judge/train.py` in {seconds:.0f} s on two CPU cores, {steps}
steps, seed {seed}. Responses of one to seven sentences, a sentence per topic; a rubric item asks
for one topic in words that share no content word with the response's. Half of the items are
True; a False item asks about a topic of the same domain that the response leaves out. Two
auxiliary losses name the topic at the end of every sentence and of the item, through a head that
is thrown away.

## Accuracy

Held-out records, half of the items True, as many of each length.

| wordings | items | accuracy | 1 sentence | 4 sentences | 7 sentences | median 1 − p, True items |
|---|---|---|---|---|---|---|
{accuracy}

Without a model: a logistic regression over the bag of words of response and item reaches
{bag_of_words:.1%}. Given every pair of a response word and an item word as a feature it reaches
{keyword_pairs:.1%}: that is a table of synonyms, which is what this judge has to learn.

## Does attribution find the evidence?

{items} True items judged True, 2 to 7 sentences, seen wordings. *top*: the sentence with the
largest mean α per token is the evidence; *mass*: share of α on the evidence sentence. Chance for
top is {chance:.3f}; uniform α has mass {uniform:.4f}.

| readout | objective | τ | top | mass |
|---|---|---|---|---|
{evidence}

Read the mass column against uniform's: where the judge is sure, α at τ = 1 on log p is next to
uniform, and only the order of the tokens says something.
"""


def write_model_card(folder: Path, metrics: dict[str, Any]) -> None:
    """README.md and metrics.json of the shipped folder."""
    accuracy = "\n".join(
        f"| {name} | {row['items']} | {row['accuracy']:.4f} | {row['by_sentences']['1']:.4f} "
        f"| {row['by_sentences']['4']:.4f} | {row['by_sentences']['7']:.4f} "
        f"| {row['median_1_minus_p']:.1e} |"
        for name, row in metrics["accuracy"].items()
    )
    found = metrics["evidence"]
    evidence = "\n".join(
        f"| {name} | {row['top']:.3f} | {row['mass']:.4f} |"
        for name, row in found["table"].items()
        if name != "uniform"
    )
    card = CARD.format(
        parameters=metrics["parameters"],
        seconds=metrics["training"]["seconds"],
        steps=metrics["training"]["settings"]["steps"],
        seed=metrics["training"]["settings"]["seed"],
        accuracy=accuracy,
        bag_of_words=metrics["bag_of_words"],
        keyword_pairs=metrics["keyword_pairs"],
        items=found["items"],
        chance=found["chance"],
        uniform=found["table"]["uniform"]["mass"],
        evidence=evidence,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
