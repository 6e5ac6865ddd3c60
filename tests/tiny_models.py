"""Tiny random Hugging Face models with weights that hide nothing. Nothing is downloaded.

A freshly initialised model is a poor test object: its norm weights are 1, its biases 0 and its
attention uniform, so an engine that drops a bias or a norm weight passes. Here norm weights lie
around 1, biases are as large as what they are added to, and attention is peaked but not saturated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
FAMILIES = tuple(CONFIGS)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},  # not hidden_size / num_attention_heads
    "mistral": {"sliding_window": 7},  # shorter than the test sequences
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# One record per thing that a decoder can get wrong: family, overrides.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-on-upper-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-yarn-rope": ("qwen2", {"rope_scaling": YARN_ROPE}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "mistral": ("mistral", {}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
}


def tiny_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    head: str = "lm",
    attn_implementation: str | None = None,
    **overrides: Any,
) -> Any:
    """A random model of ``family``, in eval mode, nothing requiring a gradient.

    ``overrides`` go to the config. ``head="value"`` makes a reward model
    (``…ForSequenceClassification`` with one value) in place of a language model. The weights depend
    on ``seed``, the family and the shapes alone: the global random state is neither read nor moved,
    and another ``dtype`` holds the same weights rounded.
    """
    # Deep copies: configs write defaults into the rope dictionary they are given.
    settings = copy.deepcopy({**COMMON, **DEFAULTS[family], **overrides})
    if head == "value":
        settings["num_labels"] = 1
    if settings["num_attention_heads"] % settings["num_key_value_heads"] != 0:
        raise ValueError("num_key_value_heads does not divide num_attention_heads")
    config = CONFIGS[family](**settings)
    auto = {"lm": AutoModelForCausalLM, "value": AutoModelForSequenceClassification}[head]
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = auto.from_config(config, **extra)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = _random_weight(name, tuple(parameter.shape), generator)
        # Casting the parameters only: model.to(dtype) would also round the rotary frequencies.
        parameter.data = values.to(dtype)
        parameter.requires_grad_(False)
    return model.eval()


def tiny_variant(name: str, **kwargs: Any) -> Any:
    """``tiny_model`` of one record of VARIANTS."""
    family, overrides = VARIANTS[name]
    return tiny_model(family, **{**overrides, **kwargs})


def random_ids(length: int, seed: int = 0, vocab_size: int = COMMON["vocab_size"]) -> Tensor:
    """``[length]`` token ids, from a generator of their own."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # These alone set the sharpness of Qwen3's attention.
        return 1.4 + 0.3 * noise
    if name.endswith("norm.weight"):
        return 1.0 + 0.3 * noise
    if name.endswith(".bias"):
        return 0.5 * noise
    if name.endswith("embed_tokens.weight"):
        # Comparable to what one layer adds to it. Far smaller, and the first layer would drown the
        # embedding: b_t is the derivative in its length, to which a norm is almost blind.
        return 0.3 * noise
    # Linear layers: unit variance out for unit variance in, times a gain.
    gain = 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = 1.4  # attention scores with a standard deviation of about 2
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = 0.5  # the residual stream keeps its embedding visible
    elif name.endswith(("lm_head.weight", "score.weight")):
        gain = 1.5
    return gain * shape[-1] ** -0.5 * noise
