"""Seeded inputs and randomly initialised models for the attribution benchmarks.

One workload is one group: G responses to one prompt, K rubric items each. Judgement (i, k) is the
sequence `prompt + responses[i] + tails[k]`, flat index `i * K + k`; its verdict token follows the
last tail token. Ids are drawn uniformly, so that no two tails share a first token by design and
nothing but the prompt and the (prompt, response) pairs can be shared.

Nothing is downloaded: weights are drawn at the scale of a trained decoder (see `build_model`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

__all__ = ["MODELS", "Workload", "build_model", "make_workload"]

SPECIAL_IDS = 4  # ids 0-3 are never drawn: rivals that need a tokenizer put control tokens there


@dataclass(frozen=True)
class Workload:
    """One prompt, G responses, K rubric items; ids are int64, one-dimensional."""

    prompt: Tensor  # [P]
    responses: list[Tensor]  # G of [T_i]
    tails: list[Tensor]  # K of [tail]
    true_mask: list[bool]  # [G * K], the verdicts; only True ones are attributed
    target_id: int  # the id of the word "True"
    host: Workload | None = None  # the same on the CPU, where this one lies elsewhere

    @property
    def judgements(self) -> list[tuple[int, int]]:
        """All (i, k), in the order of every result list."""
        return [(i, k) for i in range(len(self.responses)) for k in range(len(self.tails))]

    def sequence(self, i: int, k: int) -> Tensor:
        """The ids of judgement (i, k), [P + T_i + tail]."""
        return torch.cat([self.prompt, self.responses[i], self.tails[k]])

    def sequence_ids(self, i: int, k: int) -> list[int]:
        """The same as a list, without asking a device for it."""
        ids: list[int] = (self.host or self).sequence(i, k).tolist()
        return ids

    def to(self, device: str | torch.device) -> Workload:
        if torch.device(device) == self.prompt.device:
            return self
        return replace(
            self,
            prompt=self.prompt.to(device),
            responses=[response.to(device) for response in self.responses],
            tails=[tail.to(device) for tail in self.tails],
            host=self.host or self,
        )

    def span(self, i: int) -> slice:
        """Where the response's tokens lie in `sequence(i, k)`."""
        start = len(self.prompt)
        return slice(start, start + len(self.responses[i]))

    def is_true(self, i: int, k: int) -> bool:
        return self.true_mask[i * len(self.tails) + k]

    def describe(self) -> dict[str, object]:
        return {
            "G": len(self.responses),
            "K": len(self.tails),
            "prompt": len(self.prompt),
            "responses": [len(response) for response in self.responses],
            "tail": [len(tail) for tail in self.tails],
            "true_items": sum(self.true_mask),
        }


def make_workload(
    *,
    group_size: int,
    items: int,
    prompt: int,
    response: tuple[int, int],
    tail: int,
    true_share: float,
    vocab_size: int = 4096,
    seed: int = 0,
) -> Workload:
    """Draw a workload. Response lengths are uniform in `response`, both ends included.

    `true_share` of the judgements are True, rounded to a whole number, at random places. Every
    response has the same number of True items where that is possible, so that a schedule per
    response neither gains nor loses by the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> Tensor:
        return torch.randint(SPECIAL_IDS, vocab_size, (count,), generator=generator)

    shortest, longest = response
    lengths = torch.randint(shortest, longest + 1, (group_size,), generator=generator).tolist()
    true_count = round(true_share * group_size * items)
    per_response = [true_count // group_size] * group_size
    for i in range(true_count % group_size):
        per_response[i] += 1
    mask: list[bool] = []
    for count in per_response:
        chosen = set(torch.randperm(items, generator=generator)[:count].tolist())
        mask += [k in chosen for k in range(items)]
    return Workload(
        prompt=ids(prompt),
        responses=[ids(length) for length in lengths],
        tails=[ids(tail) for _ in range(items)],
        true_mask=mask,
        target_id=int(ids(1)),
    )


# Shapes only. But in the whole models the vocabularies are reduced to 4096: a verdict reads one row
# of logits, so the head is a rounding error of the cost, and a full embedding table would only fill
# memory.
MODELS: dict[str, dict[str, int | bool]] = {
    "tiny": {  # for --quick and unit tests
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 128,
        "tie_word_embeddings": False,
    },
    "h512l8": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "h512l8-v32k": {  # where the LM head counts
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
    },
    "h512l24": {
        "hidden_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "0.5b-layers": {  # the layer shapes of Qwen2.5-0.5B, 4 of its 24 layers
        "hidden_size": 896,
        "num_hidden_layers": 4,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "1.5b": {  # Qwen2.5-1.5B, whole
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {  # Qwen2.5-7B, whole
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "1.5b-layers": {  # the layer shapes of Qwen2.5-1.5B, 2 of its 28 layers
        "hidden_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
}

MODELS["h512l8-v32k-tied"] = MODELS["h512l8-v32k"] | {"tie_word_embeddings": True}
MODELS["tiny-tied"] = MODELS["tiny"] | {"tie_word_embeddings": True}


def build_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
    device: str | torch.device = "cpu",
) -> Qwen2ForCausalLM:
    """A stock Qwen2 decoder of the named shape with random weights, frozen and in eval mode.

    The default initialisation (0.02 everywhere) gives near-uniform attention and gradients that
    carry almost no token's identity. Here linear weights have std 1/sqrt(fan_in), so attention
    scores are of order 1; embeddings have std 0.02 as in trained models, and what the attention
    and the MLP write into the residual stream is of that same scale.

    On another device than the CPU the weights are made there, in their dtype: no float32 copy of
    a large model, and other random numbers.
    """
    shape: dict[str, Any] = dict(MODELS[name])
    if layers is not None:
        shape["num_hidden_layers"] = layers
    shape |= {"max_position_embeddings": 32768, "attn_implementation": "sdpa"}
    device = torch.device(device)
    made_there = device.type != "cpu"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype if made_there else torch.float32)
    try:
        with device:
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, device=device, dtype=torch.float32
            )
            if "norm" in key:
                parameter.copy_(1 + 0.1 * noise)
            elif "embed_tokens" in key:
                parameter.copy_(0.02 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                writes_residual = "o_proj" in key or "down_proj" in key
                scale = 0.02 if writes_residual else 1.0
                parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    return model.eval().requires_grad_(False)
