"""GRPO with a rubric judge in plain TRL: every token of a response has the same advantage.

accelerate launch THIS_FILE --model Qwen/Qwen2.5-1.5B-Instruct --judge Qwen/Qwen2.5-7B-Instruct
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "g2r_fast" / "tiny_judge"  # runs on any CPU

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(ROOT / "examples" / "tiny_policy" / "model"))
parser.add_argument("--judge", default=str(TINY))
parser.add_argument("--data", default=str(ROOT / "examples" / "demo.jsonl"))
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--out", default="build/trl")
args = parser.parse_args()

records = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
dataset = Dataset.from_list([{k: r[k] for k in ("prompt", "rubrics")} for r in records])

judge_tokenizer = AutoTokenizer.from_pretrained(args.judge)
judge_model = AutoModelForCausalLM.from_pretrained(args.judge, dtype="auto").eval()
judge_model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def is_met(prompt, completion, criterion):
    conversation = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)
    question = (
        "Judge whether the response meets the criterion.\n\n"
        f"# Conversation\n{conversation}\n\n# Response\n{completion[0]['content']}\n\n"
        f"# Criterion\n{criterion}\n\nDoes the response meet the criterion? Answer True or False."
    )
    ids = judge_tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    logits = judge_model(ids.to(judge_model.device)).logits[0, -1]
    true, false = (
        judge_tokenizer.encode(word, add_special_tokens=False)[0] for word in ("True", "False")
    )
    return bool(logits[true] > logits[false])


def rubric_reward(prompts, completions, rubrics, **columns):
    scores = []
    for prompt, completion, items in zip(prompts, completions, rubrics, strict=True):
        earned = sum(i["points"] for i in items if is_met(prompt, completion, i["criterion"]))
        scores.append(earned / sum(max(i["points"], 0) for i in items))
    return scores


trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    reward_funcs=rubric_reward,
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=48,
        learning_rate=1e-5,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    ),
)
trainer.train()
