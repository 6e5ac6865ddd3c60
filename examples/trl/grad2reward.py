"""The same with Grad2Reward: every token has an advantage of its own.

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

from g2r_fast import AttributionConfig, Judge
from g2r_fast.integrations.trl import Grad2Reward, Grad2RewardMixin

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


class Grad2RewardTrainer(Grad2RewardMixin, GRPOTrainer):
    pass


judge = Judge(judge_model.requires_grad_(False), judge_tokenizer)
trainer = Grad2RewardTrainer(
    model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    reward_funcs=Grad2Reward(judge, AttributionConfig(tau="auto")),
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
