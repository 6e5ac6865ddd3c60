"""Rollouts: responses that the policy samples, as the ids it sampled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import InputError
from .config import TrainConfig
from .tasks import Task, prompt_ids

__all__ = ["Rollouts", "Sampler", "TransformersSampler", "VllmSampler", "new_sampler"]


@dataclass(frozen=True)
class Rollouts:
    """N rows; consecutive `group_size` rows answer one prompt."""

    tasks: list[Task]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]  # with the EOS, where there is one
    texts: list[str]
    finished: list[bool]  # False: cut at max_new_tokens
    group_size: int

    def __len__(self) -> int:
        return len(self.completion_ids)


class Sampler(Protocol):
    def __call__(self, policy: Any, tasks: Sequence[Task], group_size: int, seed: int) -> Rollouts:
        """`group_size` responses to every task, from the policy as it is now."""
        ...


def new_sampler(config: TrainConfig, tokenizer: Any, eos_ids: Sequence[int]) -> Sampler:
    kind = VllmSampler if config.sampler == "vllm" else TransformersSampler
    return kind(config, tokenizer, eos_ids)


class _Sampler:
    def __init__(self, config: TrainConfig, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        self.config, self.tokenizer, self.eos_ids = config, tokenizer, list(eos_ids)

    def _rollouts(
        self,
        tasks: Sequence[Task],
        prompts: list[list[int]],
        sampled: list[list[int]],
        group_size: int,
    ) -> Rollouts:
        completions, finished = [], []
        for ids in sampled:
            stop = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), None)
            completions.append(ids[:stop])
            finished.append(stop is not None)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        repeated = [task for task in tasks for _ in range(group_size)]
        return Rollouts(repeated, prompts, completions, texts, finished, group_size)


class TransformersSampler(_Sampler):
    """`policy.generate`, prompts padded on the left.

    The model's own generation config (a repetition penalty, say) has no part in it: the
    distribution that is sampled is the one whose log-probabilities are trained.
    """

    @torch.no_grad()
    def __call__(self, policy: Any, tasks: Sequence[Task], group_size: int, seed: int) -> Rollouts:
        from transformers import GenerationConfig

        config, pad = self.config, self.tokenizer.pad_token_id
        pad = self.eos_ids[0] if pad is None else pad
        settings = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=pad,
        )
        prompts = [
            ids for task in tasks for ids in [prompt_ids(self.tokenizer, task.prompt)] * group_size
        ]
        was_training, own = policy.training, policy.generation_config
        policy.eval()
        policy.generation_config = GenerationConfig()
        torch.manual_seed(seed)
        sampled: list[list[int]] = []
        try:
            self._sample(policy, prompts, settings, sampled)
        finally:
            policy.generation_config = own
            policy.train(was_training)
        return self._rollouts(tasks, prompts, sampled, group_size)

    def _sample(
        self, policy: Any, prompts: list[list[int]], settings: Any, sampled: list[list[int]]
    ) -> None:
        config, pad = self.config, settings.pad_token_id
        for start in range(0, len(prompts), config.sample_batch):
            chosen = prompts[start : start + config.sample_batch]
            width = max(map(len, chosen))
            ids = torch.full((len(chosen), width), pad)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(chosen):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            device = policy.get_input_embeddings().weight.device
            found = policy.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            sampled += found[:, width:].tolist()


class VllmSampler(_Sampler):
    """A vLLM engine in this process, given the policy's weights before every set of rollouts.

    The engine lies beside the policy on the same GPU, one per process. Not tried against a real
    vLLM: its tests run against a stand-in that has the calls used here.
    """

    memory_share = 0.3  # of the GPU, for the engine's weights and its KV cache

    def __init__(self, config: TrainConfig, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        super().__init__(config, tokenizer, eos_ids)
        # With its own process for the model, its weights are out of reach.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError:
            raise InputError(
                "sampler 'vllm' needs vLLM, which is not installed",
                fix="pip install vllm, or use sampler='transformers'.",
            ) from None
        self._vllm = vllm
        self._engine = vllm.LLM(
            model=config.model, dtype=config.dtype, gpu_memory_utilization=self.memory_share
        )

    def __call__(self, policy: Any, tasks: Sequence[Task], group_size: int, seed: int) -> Rollouts:
        weights = [(name, value.detach()) for name, value in policy.named_parameters()]
        self._engine.apply_model(lambda model: model.load_weights(weights))
        self._engine.reset_prefix_cache()
        config = self.config
        settings = self._vllm.SamplingParams(
            n=group_size, temperature=config.temperature, top_p=config.top_p,
            top_k=config.top_k or -1, max_tokens=config.max_new_tokens, seed=seed,
            stop_token_ids=self.eos_ids,
        )  # fmt: skip
        prompts = [prompt_ids(self.tokenizer, task.prompt) for task in tasks]
        found = self._engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False
        )
        sampled = [list(answer.token_ids) for request in found for answer in request.outputs]
        repeated = [ids for ids in prompts for _ in range(group_size)]
        return self._rollouts(tasks, repeated, sampled, group_size)
