"""How good the tiny judge is, and whether its gradients find the evidence.

Everything here runs through the stock model and torch.autograd, one judgement at a time: the
numbers of the model card do not depend on the library's engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from bag_of_words import bag_of_words_accuracy, examples
from generate import MAX_SENTENCES, Generator, Item, Record
from torch import Tensor

from g2r_fast.grad2reward import AttributionConfig, softmax_attribution
from g2r_fast.judge import Judge
from g2r_fast.reference import objective_cotangent

WORDINGS = {  # name: (response wordings, rubric wordings)
    "seen wordings": ("seen", "seen"),
    "unseen response wordings": ("unseen", "seen"),
    "unseen rubric wordings": ("seen", "unseen"),
    "both unseen": ("unseen", "unseen"),
}
TAUS: dict[str, Any] = {"1": 1.0, "0.1": 0.1, "auto": "auto", "auto, 0.5": ("auto", 0.5)}


@dataclass
class Tally:
    right: int = 0
    count: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.count += 1

    @property
    def share(self) -> float:
        return round(self.right / max(1, self.count), 4)


def judged(
    seed: int, count: int, said: str = "seen", asked: str = "seen", shortest: int = 1
) -> Iterator[tuple[Record, Item]]:
    """`count` held-out judgements, half of them True, lengths in turn."""
    generator = Generator(seed, said, asked)
    done = 0
    while done < count:
        length = shortest + (done // 2) % (MAX_SENTENCES - shortest + 1)
        record = generator.record(length, items=2)
        for item in record.items:
            yield record, item
            done += 1


@torch.no_grad()
def logits_of(judge: Judge, record: Record, item: Item) -> Tensor:
    ids = judge.encode(record.prompt, record.response, item.text).input_ids
    logits: Tensor = judge.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def accuracy(
    judge: Judge, seed: int = 10_000, count: int = 2000, said: str = "seen", asked: str = "seen"
) -> dict[str, Any]:
    """Share of right verdicts, over all and by the response's number of sentences."""
    overall, by_length = Tally(), defaultdict(Tally)
    doubts = []
    for record, item in judged(seed, count, said, asked):
        logits = logits_of(judge, record, item)
        right = bool(logits[judge.true_id] > logits[judge.false_id]) == item.verdict
        overall.add(right)
        by_length[len(record.sentences)].add(right)
        if item.verdict and right:
            others = logits.double()
            others[judge.true_id] = -torch.inf
            odds = others.logsumexp(-1) - logits[judge.true_id].double()
            doubts.append(float(torch.sigmoid(odds)))
    return {
        "accuracy": overall.share,
        "items": overall.count,
        "by_sentences": {str(n): tally.share for n, tally in sorted(by_length.items())},
        "median_1_minus_p": median(doubts) if doubts else None,
    }


def sentence_of_tokens(judge: Judge, record: Record) -> Tensor:
    """Index of the sentence each response token belongs to, `[T]`."""
    offsets = judge.tokenizer(
        record.response, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    stops = torch.tensor([sentence.span[1] for sentence in record.sentences])
    return torch.searchsorted(stops, torch.tensor([end for _, end in offsets]))


def token_scores(judge: Judge, record: Record, item: Item) -> dict[tuple[str, str], Tensor]:
    """b of the response's tokens by (objective, readout), from one forward and two backwards."""
    request = judge.encode(record.prompt, record.response, item.text)
    embeds = judge.model.get_input_embeddings()(torch.tensor([request.input_ids]))
    embeds = embeds.detach().requires_grad_()
    logits = judge.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
    start, stop = request.response_span
    found = {}
    for objective in ("logp", "logodds"):
        cotangent = objective_cotangent(
            logits.detach().double(), judge.true_id, judge.false_id, objective
        )
        (grad,) = torch.autograd.grad(logits, embeds, cotangent.float(), retain_graph=True)
        grad, at = grad[0, start:stop], embeds.detach()[0, start:stop]
        found[objective, "dot"] = (grad * at).sum(-1)
        found[objective, "l1"] = grad.abs().sum(-1)
        found[objective, "l2"] = grad.square().sum(-1).sqrt()
    return found


def evidence(judge: Judge, seed: int = 20_000, count: int = 400) -> dict[str, Any]:
    """For True items judged True, 2 sentences and more: does attribution point at the evidence?

    `top`: share of items whose sentence with the largest mean alpha per token is the evidence;
    `mass`: mean share of alpha that lies on the evidence sentence.
    """
    tops: dict[str, list[bool]] = defaultdict(list)
    masses: dict[str, list[float]] = defaultdict(list)
    chance: list[float] = []
    for record, item in judged(seed, 2 * count, shortest=2):
        if not item.verdict or item.evidence is None:
            continue
        logits = logits_of(judge, record, item)
        if not logits[judge.true_id] > logits[judge.false_id]:
            continue
        sentence = sentence_of_tokens(judge, record)
        sizes = torch.bincount(sentence).double()
        chance.append(1 / len(sizes))
        for (objective, readout), scores in token_scores(judge, record, item).items():
            for name, tau in TAUS.items():
                alpha = softmax_attribution(scores, AttributionConfig(tau, objective, readout))
                mass = torch.zeros_like(sizes).index_add_(0, sentence, alpha)
                key = f"{readout} | {objective} | {name}"
                tops[key].append(int((mass / sizes).argmax()) == item.evidence)
                masses[key].append(float(mass[item.evidence]))
        masses["uniform"].append(float(sizes[item.evidence] / sizes.sum()))
    table = {
        f"{readout} | {objective} | {name}": {
            "top": round(mean(tops[f"{readout} | {objective} | {name}"]), 3),
            "mass": round(mean(masses[f"{readout} | {objective} | {name}"]), 4),
        }
        for readout, objective, name in product(("dot", "l1", "l2"), ("logp", "logodds"), TAUS)
    }
    # Uniform attribution prefers no sentence: its top is chance.
    table["uniform"] = {"top": round(mean(chance), 3), "mass": round(mean(masses["uniform"]), 4)}
    return {"items": len(chance), "chance": round(mean(chance), 3), "table": table}


def evaluate(judge: Judge, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Everything the model card says."""
    return {
        "training": training,
        "parameters": sum(p.numel() for p in judge.model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "accuracy": {
            name: accuracy(judge, said=said, asked=asked)
            for name, (said, asked) in WORDINGS.items()
        },
        "bag_of_words": round(bag_of_words_accuracy(examples(1, 4000), examples(2, 2000)), 3),
        "keyword_pairs": round(
            bag_of_words_accuracy(examples(1, 4000), examples(2, 2000), pairs=True), 3
        ),
        "evidence": evidence(judge),
    }
