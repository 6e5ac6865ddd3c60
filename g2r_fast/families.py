"""Which decoder families the packed engine knows, as data, and how their live weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .plan import DecoderShape

__all__ = ["FAMILIES", "DecoderWeights", "Family", "LayerWeights", "Linear", "read_weights"]


@dataclass(frozen=True)
class Family:
    """One architecture: the classes its layers must be, and what distinguishes it."""

    layer_class: str
    attention_class: str
    qk_norm: bool = False
    window_in_config: bool = False  # one window for all layers, not one per layer


FAMILIES = {
    "llama": Family("LlamaDecoderLayer", "LlamaAttention"),
    "mistral": Family("MistralDecoderLayer", "MistralAttention", window_in_config=True),
    "qwen2": Family("Qwen2DecoderLayer", "Qwen2Attention"),
    "qwen3": Family("Qwen3DecoderLayer", "Qwen3Attention", qk_norm=True),
}

# Rotary tables that change with the length of the batch have no single answer for packed rows.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """The live parameters of one decoder layer; nothing is copied."""

    name: str
    input_norm: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    post_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear
    window: int | None


@dataclass(frozen=True)
class DecoderWeights:
    """The live parameters and constants of a decoder."""

    embed: torch.Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    inv_freq: torch.Tensor  # [head_dim / 2]
    rotary_scaling: float

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def shape(self) -> DecoderShape:
        statistics = torch.promote_types(self.dtype, torch.float32)
        return DecoderShape(
            layers=len(self.layers),
            hidden=self.embed.shape[1],
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.layers[0].gate.weight.shape[0],
            itemsize=self.dtype.itemsize,
            stat_itemsize=statistics.itemsize,
            qk_norm=self.layers[0].q_norm is not None,
        )


def read_weights(model: Any) -> DecoderWeights:
    """The weights of a Hugging Face causal LM, by reference.

    Raises UnsupportedModelError listing every reason why the packed engine cannot serve it.
    """
    reasons = _reasons(model)
    if reasons:
        raise UnsupportedModelError("packed", reasons)
    family = FAMILIES[model.config.model_type]
    decoder = model.model
    first = decoder.layers[0].self_attn
    return DecoderWeights(
        embed=decoder.embed_tokens.weight.detach(),
        layers=tuple(
            _layer(f"model.layers.{i}", layer, family, model.config)
            for i, layer in enumerate(decoder.layers)
        ),
        norm=decoder.norm.weight.detach(),
        head=_linear(model.lm_head),
        eps=float(model.config.rms_norm_eps),
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        head_dim=first.head_dim,
        scaling=float(first.scaling),
        inv_freq=decoder.rotary_emb.inv_freq,
        rotary_scaling=float(decoder.rotary_emb.attention_scaling),
    )


def _layer(name: str, layer: Any, family: Family, config: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    source = config if family.window_in_config else attention
    return LayerWeights(
        name=name,
        input_norm=layer.input_layernorm.weight.detach(),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        q_norm=attention.q_norm.weight.detach() if family.qk_norm else None,
        k_norm=attention.k_norm.weight.detach() if family.qk_norm else None,
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        window=getattr(source, "sliding_window", None),
    )


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _reasons(model: Any) -> list[str]:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        return [f"model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}"]
    family = FAMILIES[model_type]
    decoder: Any = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if decoder is None or not layers or not hasattr(model, "lm_head"):
        return ["it is wrapped, or is no causal LM: no model.layers with an lm_head"]
    reasons = []
    for layer in layers:
        for module, expected in (
            (layer, family.layer_class),
            (layer.self_attn, family.attention_class),
        ):
            if type(module).__name__ != expected:
                reasons.append(f"a layer is {type(module).__name__}, not {expected}")
    if getattr(config, "quantization_config", None) is not None:
        reasons.append("its weights are quantised")
    for name, module in decoder.layers.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            reasons.append(f"layers.{name} is {type(module).__name__}, not a plain Linear")
            break
    if type(model.lm_head) is not nn.Linear:
        reasons.append(f"lm_head is {type(model.lm_head).__name__}, not a plain Linear")
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act {config.hidden_act!r} is not 'silu'")
    reasons.extend(_rotary_reasons(decoder.rotary_emb, layers[0].self_attn.head_dim))
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        reasons.append("it is sharded or offloaded over " + ", ".join(sorted(map(str, devices))))
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        reasons.append("its weights are " + " and ".join(sorted(map(str, dtypes))))
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        reasons.append("it has forward hooks, which would be skipped")
    return reasons


def _rotary_reasons(rotary: Any, head_dim: int) -> list[str]:
    kind = getattr(rotary, "rope_type", "default")
    if kind in _LENGTH_DEPENDENT_ROPE:
        return [f"rope type {kind!r} depends on the length of the batch"]
    if 2 * rotary.inv_freq.numel() != head_dim:
        return ["only a part of each head is rotated"]
    return []
