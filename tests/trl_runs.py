"""Trainers of TRL on a tiny policy whose completions are written beforehand.

The same file serves every TRL that is tested, in one process and in several. Completions depend on
the prompt and on the place in its group alone, so that any trainer, with any number of processes,
is given the same rollouts.
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import warnings
from typing import Any

import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tiny_models import tiny_model
from tiny_tokenizers import byte_bpe
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from g2r_fast import Judge
from g2r_fast.integrations.trl import Grad2RewardMixin

# Every training begins with a garbage collection, which need not look at what was imported.
gc.freeze()

VERSION = Version(trl.__version__)
TRL_1 = VERSION >= Version("1.3")  # `_generate` returns images too, and no number of tokens
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]
LOSSES += ["luspo"] if Version("0.28") <= VERSION else []
LOSSES += ["vespo"] if Version("1.0") <= VERSION else []
SAPO_BREAKS = Version("0.28") > VERSION  # it takes no advantages per token, and is refused
GROUP = 4
PROMPTS = ["is a mild cough serious?", "hello world"]
ITEMS = [
    {"criterion": "is kind", "points": 2.0},
    {"criterion": "see a doctor", "points": -1.0},
    {"criterion": "The answer is good", "points": 3.0},
]


def model(seed: int = 13, **overrides: Any) -> Any:
    options = {"vocab_size": len(byte_bpe()), "max_position_embeddings": 512, **overrides}
    return tiny_model("qwen2", seed=seed, num_hidden_layers=2, **options)


def tokenizer() -> Any:
    """A copy: TRL writes into it."""
    twin = copy.deepcopy(byte_bpe())
    twin.model_input_names = ["input_ids", "attention_mask"]
    return twin


def judge(scaffold: str = "continuation", seed: int = 24, **options: Any) -> Judge:
    return Judge(model(seed), byte_bpe(), scaffold, **options)


def dataset(items: Any = ITEMS, prompts: Any = PROMPTS) -> Dataset:
    rows = items if isinstance(items[0], list) or items[0] is None else [items] * len(prompts)
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": messages, "rubrics": rows})


def completion(prompt: str, place: int) -> list[int]:
    """Of 5 to 12 tokens; every second one ends with EOS, the others were cut off. All but the last
    of a group have something in brackets."""
    generator = torch.Generator().manual_seed(1000 * len(prompt) + place)
    length = 5 + int(torch.randint(7, (), generator=generator))
    ids = torch.randint(256, (length,), generator=generator).tolist()
    if place < GROUP - 1:
        ids[1], ids[-2] = (byte_bpe().convert_tokens_to_ids(bracket) for bracket in "()")
    return [*ids, byte_bpe().eos_token_id] if place % 2 else ids


class Written(GRPOTrainer):
    """Rollouts as `completion` has them; tools write where `tool_mask` says so.

    `batches` keeps what was scored, `losses` every loss, in order.
    """

    tool_mask = staticmethod(lambda ids: None)  # ids -> a mask or None
    write = staticmethod(completion)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        texts = [prompt[-1]["content"] for prompt in prompts]
        first = self.accelerator.process_index * len(prompts)
        size = self.num_generations if self.model.training else self.num_generations_eval
        completion_ids = [self.write(text, (first + i) % size) for i, text in enumerate(texts)]
        prompt_ids = [
            self.processing_class.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for prompt in prompts
        ]
        masks = [self.tool_mask(ids) for ids in completion_ids]
        tools = None if masks[0] is None else masks
        completions = [
            [{"role": "assistant", "content": text}]
            for text in self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        ]
        count = sum(map(sum, tools)) if tools else sum(map(len, completion_ids))
        total = self.accelerator.gather(torch.tensor([count])).sum()
        tail = (None, {}, None, None) if TRL_1 else (total, None, {})
        return (prompt_ids, completion_ids, tools, completions, *tail)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.tool_mask([1]) is not None and not TRL_1:
            self.tools = [len]  # old versions ask for these before they look at masks
        output = super()._generate_and_score_completions(inputs)
        self.batches.append(dict(output))
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class Dense(Grad2RewardMixin, Written):
    """`batches` hold the mixin's advantages."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.batches[-1] = dict(output)
        return output


class Steps(TrainerCallback):
    """Gradients and weights before every step of the optimizer."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = dict(kwargs["model"].named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})


def config(**options: Any) -> GRPOConfig:
    defaults = {
        "output_dir": os.path.join(tempfile.gettempdir(), "g2r_fast-trl"),
        "per_device_train_batch_size": 2 * GROUP,
        "per_device_eval_batch_size": GROUP,
        "num_generations": GROUP,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "shuffle_dataset": False,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return GRPOConfig(**{**defaults, **options})


def trainer(kind: type, reward_funcs: Any, policy: Any = None, **options: Any) -> Any:
    """A trainer of this kind; options of GRPOTrainer by their names, all others of GRPOConfig."""
    names = ("train_dataset", "eval_dataset", "peft_config", "callbacks", "optimizers")
    given = {name: options.pop(name) for name in names if name in options}
    policy = model().requires_grad_(True) if policy is None else policy
    torch.manual_seed(0)
    return kind(
        model=policy,
        reward_funcs=reward_funcs,
        args=config(**options),
        processing_class=tokenizer(),
        **{"train_dataset": dataset(), **given},
    )


def trained(kind: type, reward_funcs: Any, policy: Any = None, **options: Any) -> Any:
    built = trainer(kind, reward_funcs, policy, **options)
    built.losses.clear()  # of the check when a trainer is built
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("error", message="g2r_fast uses the slower autograd engine")
        built.train()
    return built


def checkpoints(policy: Any) -> bool:
    """Whether any of its layers forgets its activations and computes them again."""
    return any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())


def length_reward(completion_ids: Any, **columns: Any) -> list[float]:
    return [len(ids) / 10 for ids in completion_ids]


def sign_reward(completion_ids: Any, **columns: Any) -> list[float]:
    return [1.0 if ids[0] % 2 else -1.0 for ids in completion_ids]
