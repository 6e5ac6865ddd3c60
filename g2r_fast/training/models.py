"""The models of a run: the policy that learns, and frozen beside it what judges and is kept to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import adapters_off, base_model
from ..checks import position_limit
from ..errors import InputError
from ..judge import Judge
from .config import TrainConfig
from .tasks import Task, prompt_ids

__all__ = ["Models", "check_positions", "load_models"]


@dataclass
class Models:
    """policy: what learns, unwrapped. frozen: its initial copy, where one is kept."""

    policy: Any
    tokenizer: Any
    judge: Judge | None
    frozen: Any | None
    judge_is_reference: bool  # the judge's forward gives the reference's log-probabilities

    @property
    def device(self) -> torch.device:
        device: torch.device = self.policy.get_input_embeddings().weight.device
        return device

    @property
    def eos_ids(self) -> list[int]:
        """What ends a response: the tokenizer's EOS and those of the generation config."""
        found = getattr(self.policy.generation_config, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])]
        ids = [i for i in dict.fromkeys(ids) if i is not None]
        if not ids:
            raise InputError("the policy's tokenizer has no EOS", expected="an eos_token")
        return ids

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The initial policy while inside: the frozen copy, or the policy with adapters off."""
        if self.frozen is not None:
            yield self.frozen
            return
        inner = base_model(self.policy)
        with adapters_off(inner):
            yield inner


def load_models(config: TrainConfig, device: torch.device) -> Models:
    """Policy, judge and reference of a run, sharing weights wherever they are the same.

    Self-judging without LoRA there are two copies, the policy and its frozen initial self, which
    is judge and KL reference in one; with LoRA there is one. A judge of its own is a further one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not config.model:
        raise InputError("no model is given", expected="model: a name on the hub or a folder")
    torch.manual_seed(config.seed)  # the adapters' initial weights
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    policy: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=getattr(torch, config.dtype)
    )
    policy = policy.to(device).eval()
    self_judging = config.judge is None and config.reward is None and config.method != "vigor"
    needs_frozen = self_judging or config.kl > 0
    frozen = None
    if config.lora_rank:
        policy = _with_lora(policy, config)
    elif needs_frozen:
        frozen = copy.deepcopy(policy).requires_grad_(False)
        frozen = frozen.to(getattr(torch, config.judge_dtype))
    if config.gradient_checkpointing:
        model = base_model(policy)
        # Its name from transformers 5.24 on, and before.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    judge = None
    options: dict[str, Any] = {
        "true": config.true_word,
        "false": config.false_word,
        "allow_tokens": config.allow_tokens,
    }
    if self_judging:
        judge = Judge(
            policy if frozen is None else frozen,
            tokenizer,
            config.scaffold or "continuation",
            adapters="off" if frozen is None else None,
            **options,
        )
    elif config.judge is not None:
        judge = Judge.from_pretrained(
            config.judge,
            config.scaffold or "grader",
            dtype=getattr(torch, config.judge_dtype),
            device=device,
            policy_tokenizer=tokenizer,
            **options,
        )
    is_reference = self_judging and judge is not None and judge.continues
    return Models(policy, tokenizer, judge, frozen, is_reference)


def check_positions(models: Models, config: TrainConfig, tasks: Sequence[Task]) -> None:
    """Raise InputError for a prompt whose response, and its judge's question, may run past the
    model's positions: better now than in the middle of the run."""
    limit, judge = position_limit(models.policy), models.judge
    if limit is None:
        return
    for index, task in enumerate(tasks):
        prompt = len(prompt_ids(models.tokenizer, task.prompt))
        asked = 0
        if judge is not None and judge.continues:
            questions = [len(judge.encode_rubric(rubric)) for rubric in task.rubrics]
            asked = len(judge.turn_end) + max(questions, default=0)
        if prompt + config.max_new_tokens + asked > limit:
            raise InputError(
                "a prompt and its response may run past the model's positions",
                expected=f"at most {limit} tokens",
                got=f"{prompt} + max_new_tokens {config.max_new_tokens} + judge's question {asked}",
                index=f"prompt {index}",
                fix="Lower max_new_tokens, or leave the prompt out.",
            )


def _with_lora(policy: Any, config: TrainConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            f"lora_rank needs PEFT, which cannot be imported: {error}", fix="pip install peft."
        ) from None
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=int(config.lora_alpha) if config.lora_alpha.is_integer() else config.lora_alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(policy, lora).eval()  # PEFT leaves it in train mode
