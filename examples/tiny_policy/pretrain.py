"""Trains the tiny policy, one model that writes advice and judges it.

    python examples/tiny_policy/pretrain.py                  # model, measurement, model card
    python examples/tiny_policy/pretrain.py --measure-only

It starts from the shipped tiny judge, which knows what the phrases mean, and learns two things at
once: to answer a prompt (log-likelihood of a response, end of turn included) and to judge with
`Judge(model, tokenizer, scaffold="continuation")`, the question as the next turn after the
response, several rubric items to a pass and half of them True.

Responses to judge are written as the policy should write, or in every other way; after a while also
sampled from the policy itself, and from policies trained against the judge (`attack.py`). The rule
of `environment.py` says what is True.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attack import attack
from environment import DOMAINS, HERE, TOPIC, Messages, criterion, named, prompt
from measure import measure, write_model_card
from packed import IGNORE, Row, hidden_states, pack_judgements, pack_responses, sample
from train import save
from transformers import AutoModelForCausalLM, AutoTokenizer
from writing import Writer

from g2r_fast.judge import Judge

START = HERE.parents[1] / "g2r_fast" / "tiny_judge"
MODEL = HERE / "model"


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    steps: int = 1200
    prompts: int = 8  # to learn writing from, per step
    written: int = 5  # responses to each of them
    judged: int = 9  # responses to judge, per step
    items: int = 4  # rubric items to each of them
    learning_rate: float = 2e-3
    warmup: int = 30
    own_after: int = 400  # steps after which a third of what is judged is the policy's own
    attacked_after: int = 600  # and another third comes from policies trained against the judge
    every: int = 100  # steps after which both are sampled anew
    attack: int = 20  # steps of training against the judge


@dataclass(frozen=True)
class Judged:
    row: Row
    verdicts: list[bool]


class Examples:
    """A seeded stream of prompts, responses and rubric items with their verdicts."""

    def __init__(self, judge: Judge, settings: Settings) -> None:
        self.judge, self.items = judge, settings.items
        self.rng, self.writer = random.Random(settings.seed), Writer(settings.seed)

    def written(self, count: int) -> tuple[Messages, list[list[int]]]:
        """A prompt and responses as the policy is to write them."""
        domain = self.rng.choice(DOMAINS)
        responses = [self._ids(self.writer.response(domain), ended=True) for _ in range(count)]
        return prompt(domain, self.rng), responses

    def judged(self) -> Judged:
        """A response as it should be written, or any other, and what it is asked about."""
        domain = self.rng.choice(DOMAINS)
        regular = self.rng.random() < 0.3
        text = self.writer.response(domain) if regular else self.writer.any_response(domain)
        ended = regular or self.rng.random() < 0.8  # or cut off, as by a limit on new tokens
        return self._ask(domain, prompt(domain, self.rng), self._ids(text, ended))

    def own(self, count: int) -> list[Judged]:
        """Sampled from the policy, half of them at a temperature that breaks sentences."""
        domains = [self.rng.choice(DOMAINS) for _ in range(count)]
        prompts = [prompt(domain, self.rng) for domain in domains]
        half = count // 2
        responses = sample(self.judge, prompts[:half]) + sample(self.judge, prompts[half:], 1.4)
        return [self._ask(*one) for one in zip(domains, prompts, responses, strict=True)]

    def attacked(self, steps: int) -> list[Judged]:
        return [self._ask(*rollout) for rollout in attack(self.judge, self.rng, steps)]

    def _ids(self, text: str, ended: bool) -> list[int]:
        ids = self.judge.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.judge.tokenizer.eos_token_id] if ended else list(ids)

    def _ask(self, domain: str, asked: Messages, ids: list[int]) -> Judged:
        said = named(self.judge.tokenizer.decode(ids, skip_special_tokens=True))
        here = [topic for topic in TOPIC.values() if topic.domain == domain]
        met = [topic for topic in here if topic.name in said]
        unmet = [topic for topic in here if topic.name not in said]
        first = self.rng.random() < 0.5
        verdicts = [(i % 2 == 0) == first for i in range(self.items)]
        verdicts = [verdict if met and unmet else bool(met) for verdict in verdicts]
        topics = [self.rng.choice(met if verdict else unmet) for verdict in verdicts]
        return Judged(Row(asked, ids, [criterion(topic, self.rng) for topic in topics]), verdicts)


def losses(
    judge: Judge,
    written: Sequence[tuple[Messages, list[list[int]]]],
    judged: Sequence[Judged],
) -> dict[str, torch.Tensor]:
    """Mean negative log-likelihoods in nats over the whole vocabulary."""
    head = judge.model.lm_head
    batch = pack_responses(judge, written)
    follows = batch.next_token != IGNORE
    writing = F.cross_entropy(head(hidden_states(judge, batch)[follows]), batch.next_token[follows])

    batch = pack_judgements(judge, [example.row for example in judged])
    verdicts = torch.tensor([verdict for example in judged for verdict in example.verdicts])
    labels = torch.where(verdicts, judge.true_id, judge.false_id)
    logits = head(hidden_states(judge, batch)[batch.last])
    return {
        "writing": writing,
        "verdict": F.cross_entropy(logits, labels),
        "accuracy": (logits.argmax(-1) == labels).float().mean().detach(),
    }


def train(judge: Judge, settings: Settings, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train `judge.model` in place; returns seconds and the last running means."""
    torch.manual_seed(settings.seed)
    model = judge.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            1.0, (step + 1) / settings.warmup, (settings.steps - step) / (0.5 * settings.steps)
        ),
    )
    examples = Examples(judge, settings)
    started, running = time.perf_counter(), {}
    own: list[Judged] = []
    attacked: list[Judged] = []
    for step in range(settings.steps):
        if step % settings.every == 0:
            if step >= settings.own_after:
                own = examples.own(settings.every * settings.judged // 3)
            if step >= settings.attacked_after:
                attacked += examples.attacked(settings.attack)
        third = settings.judged // 3
        judged = examples.rng.sample(own, third) if own else []
        judged += examples.rng.sample(attacked, third) if attacked else []
        judged += [examples.judged() for _ in range(settings.judged - len(judged))]
        written = [examples.written(settings.written) for _ in range(settings.prompts)]
        found = losses(judge, written, judged)
        optimizer.zero_grad(set_to_none=True)
        (found["verdict"] + found["writing"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in found.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        if step % 50 == 49:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            log(f"{step + 1:5d}  {shown}  {time.perf_counter() - started:.0f} s")
    model.eval().requires_grad_(False)
    return {"seconds": round(time.perf_counter() - started, 1), "losses": running}


def save_policy(judge: Judge, folder: Path) -> None:
    """Weights in bfloat16 to keep the file small; the config asks for float32 when they load."""
    save(judge.model.to(torch.bfloat16), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2) + "\n")
    generation = {
        "do_sample": True,
        "eos_token_id": judge.tokenizer.eos_token_id,
        "pad_token_id": judge.tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(START / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure-only", action="store_true", help="the policy in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    metrics = arguments.out / "metrics.json"
    if arguments.measure_only:
        training = json.loads(metrics.read_text())["training"]
    else:
        settings = Settings(seed=arguments.seed, steps=arguments.steps)
        tokenizer = AutoTokenizer.from_pretrained(START)
        model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trainable weights: here they are to be trained
            judge = Judge(model.eval(), tokenizer, scaffold="continuation")
        training = {"settings": asdict(settings), **train(judge, settings)}
        save_policy(judge, arguments.out)
    judge = Judge.from_pretrained(arguments.out, scaffold="continuation")
    found = {"training": training, **measure(judge)}
    metrics.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_model_card(arguments.out, found)


if __name__ == "__main__":
    main()
