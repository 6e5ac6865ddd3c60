"""Trains the tiny judge that ships with the package.

    python examples/tiny_judge/train.py            # tokenizer, model, evaluation, model card
    python examples/tiny_judge/train.py --out build/tiny --verdict-only   # the control

With the verdict as its only loss a model of this size stays at chance. So two auxiliary losses
name the topic, at the end of every sentence of the response and of the rubric item,
through a head that is thrown away; and responses grow from one sentence to seven on the way.

The rubric items of a response share its row: one prompt and response, then the items side by side,
each blind to the others (a 4-D mask) and at the positions it would have alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evaluate import evaluate
from generate import MAX_SENTENCES, Generator, Record
from make_tokenizer import make_tokenizer
from model_card import write_model_card
from topics import TOPICS
from transformers import LlamaConfig, LlamaForCausalLM

from g2r_fast.judge import Judge

SHIPPED = Path(__file__).resolve().parents[2] / "g2r_fast" / "tiny_judge"
IGNORE = -100


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    steps: int = 1800
    records: int = 12  # per step
    items: int = 8  # rubric items per record
    learning_rate: float = 1.5e-3
    warmup: int = 40
    grown_at: float = 0.9  # running accuracy at which responses get one sentence longer
    patience: int = 120  # steps after which they do in any case
    auxiliary: float = 0.5  # weight of each auxiliary loss
    verdict_only: bool = False  # the control: no auxiliary losses, seven sentences from the start


def new_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # the tokenizer knows
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """[B, T] throughout, but the mask [B, 1, T, T]; labels are IGNORE where nothing is asked."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    verdict_labels: torch.Tensor  # the verdict word's id, at the last token of an item
    sentence_labels: torch.Tensor  # the topic, at a sentence's last token
    item_labels: torch.Tensor  # the topic, at the rubric item's last token


def sentence_ends(judge: Judge, record: Record) -> list[int]:
    """Index of each sentence's last token within the response's ids."""
    encoded = judge.tokenizer(
        record.response, add_special_tokens=False, return_offsets_mapping=True
    )
    if encoded["input_ids"] != judge.encode_response(record.response).ids:
        raise RuntimeError("the judge reads the response in other tokens than its tokenizer")
    stops = [stop for _, stop in encoded["offset_mapping"]]
    return [stops.index(sentence.span[1]) for sentence in record.sentences]


def pack(judge: Judge, records: list[Record]) -> Batch:
    rows = []
    for record in records:
        prompt = judge.encode_prompt(record.prompt)
        ids = prompt + judge.encode_response(record.response).ids
        shared = len(ids)
        positions, segment = list(range(shared)), [0] * shared
        verdicts, sentences, items = {}, {}, {}
        for end, sentence in zip(sentence_ends(judge, record), record.sentences, strict=True):
            sentences[len(prompt) + end] = sentence.topic
        for number, item in enumerate(record.items, start=1):
            tail = judge.encode_rubric(item.text)
            text = judge.encode_untrusted(item.text)
            at = next(i for i in range(len(tail)) if tail[i : i + len(text)] == text)
            items[len(ids) + at + len(text) - 1] = item.topic
            ids = ids + tail
            positions += range(shared, shared + len(tail))
            segment += [number] * len(tail)
            verdicts[len(ids) - 1] = judge.true_id if item.verdict else judge.false_id
        rows.append((ids, positions, segment, verdicts, sentences, items))

    length = max(len(row[0]) for row in rows)
    pad = judge.tokenizer.pad_token_id
    ids_, positions_, segments_ = (
        torch.tensor([list(row[k]) + [fill] * (length - len(row[k])) for row in rows])
        for k, fill in ((0, pad), (1, 0), (2, -1))
    )
    labels = torch.full((3, len(rows), length), IGNORE)
    for i, row in enumerate(rows):
        for k, found in enumerate(row[3:]):
            labels[k, i, list(found)] = torch.tensor(list(found.values()))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments_[:, :, None] == segments_[:, None, :]
    allowed = causal & (same | (segments_ == 0)[:, None, :])
    return Batch(ids_, positions_, allowed[:, None], *labels)


def losses(
    model: LlamaForCausalLM, topic_head: torch.nn.Linear, batch: Batch
) -> dict[str, torch.Tensor]:
    """Mean negative log-likelihoods in nats, the verdict over the whole vocabulary."""
    forbidden = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo().min)
    states = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=forbidden,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    asked = batch.verdict_labels != IGNORE
    logits, labels = model.lm_head(states[-1][asked]), batch.verdict_labels[asked]
    found = {
        "verdict": F.cross_entropy(logits, labels),
        "accuracy": (logits.argmax(-1) == labels).float().mean().detach(),
    }
    # In the middle, so that the layers above can compare what has been named.
    middle = states[len(states) // 2]
    for name, labels in (("sentence", batch.sentence_labels), ("item", batch.item_labels)):
        asked = labels != IGNORE
        hidden = F.rms_norm(middle[asked], middle.shape[-1:])
        found[name] = F.cross_entropy(topic_head(hidden), labels[asked])
    return found


def train(judge: Judge, settings: Settings, log: Any = print) -> dict[str, Any]:
    """Train `judge.model` in place; returns seconds and the last running means."""
    model = judge.model
    torch.manual_seed(settings.seed)
    topic_head = torch.nn.Linear(model.config.hidden_size, len(TOPICS))
    parameters = [*model.parameters(), *topic_head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            1.0, (step + 1) / settings.warmup, (settings.steps - step) / (0.3 * settings.steps)
        ),
    )
    generator, lengths = Generator(settings.seed), random.Random(settings.seed)
    started, running = time.perf_counter(), {}
    model.train()
    longest = MAX_SENTENCES if settings.verdict_only else 1
    recent, since = 0.5, 0
    for step in range(settings.steps):
        records = [
            generator.record(lengths.randint(1, longest), settings.items)
            for _ in range(settings.records)
        ]
        found = losses(model, topic_head, pack(judge, records))
        weight = 0.0 if settings.verdict_only else settings.auxiliary
        loss = found["verdict"] + weight * (found["sentence"] + found["item"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent, since = 0.9 * recent + 0.1 * float(found["accuracy"]), since + 1
        ready = recent > settings.grown_at or since >= settings.patience
        # The first step, from chance to a comparison, takes as long as it takes.
        if longest < MAX_SENTENCES and ready and (longest > 1 or recent > settings.grown_at):
            longest, recent, since = longest + 1, 0.5, 0
        for name, value in found.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        if step % 50 == 49:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            log(f"{step + 1:5d}  up to {longest}  {shown}  {time.perf_counter() - started:.0f} s")
    model.eval().requires_grad_(False)
    return {"seconds": time.perf_counter() - started, "losses": running}


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """float32 weights; the config in a form that transformers 4.56 and 5 both read."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype", "float32"))
    for key in ("layer_types", "transformers_version", "_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verdict-only", action="store_true", help="the control run")
    parser.add_argument("--evaluate-only", action="store_true", help="of the judge in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    metrics = arguments.out / "metrics.json"
    if not arguments.evaluate_only:
        settings = Settings(
            seed=arguments.seed, steps=arguments.steps, verdict_only=arguments.verdict_only
        )
        run = make_judge(arguments.out, settings)
        metrics.write_text(json.dumps({"training": {"settings": asdict(settings), **run}}))
    training = json.loads(metrics.read_text())["training"]
    judge = Judge.from_pretrained(arguments.out)
    write_model_card(arguments.out, evaluate(judge, arguments.out, training))


def make_judge(folder: Path, settings: Settings) -> dict[str, Any]:
    """Tokenizer and model, trained and saved to `folder`; what the training took."""
    tokenizer = make_tokenizer(folder)
    model = new_model(len(tokenizer), settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trainable weights: this is the one place that wants them
        judge = Judge(model, tokenizer, scaffold="grader")
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}, {settings}")
    run = train(judge, settings)
    save(model, folder)
    return run


if __name__ == "__main__":
    main()
