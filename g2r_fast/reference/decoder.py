"""A plain decoder that computes in the dtype it is told to, from the embeddings to the logits.

A Hugging Face model in ``.double()`` is not a float64 model: its norms, its softmax and its rotary
angles stay in float32. This one has no such exceptions, no caches and no batches, and it is
differentiable in reverse and in forward mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from g2r_fast.errors import InputError, InputTypeError, UnsupportedModelError

__all__ = ["ReferenceDecoder"]

# model_type -> the class of its layers. A subclass with a layer of its own keeps the model_type of
# its parent, so the class name is what tells that these are the equations we know.
LAYER_CLASSES = {
    "llama": "LlamaDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "mistral": "MistralDecoderLayer",
}
# The rope types whose frequencies are constants of the model; those of "dynamic" and "longrope"
# change with the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class ReferenceDecoder:
    """Llama, Qwen2, Qwen3 or Mistral in plain PyTorch, one sequence at a time, all in one dtype.

    ``weights`` holds copies under the Hugging Face names without the leading ``model.``
    (``layers.0.self_attn.q_proj.weight``, ``norm.weight``, ``embed_tokens.weight``); the head is
    ``head.weight``, the very same tensor as ``embed_tokens.weight`` where the model ties them.
    Nothing requires a gradient; ``dataclasses.replace(decoder, weights=...)`` makes a decoder with
    other weights, for instance leaves of a graph.
    """

    weights: Mapping[str, Tensor]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    windows: tuple[int | None, ...]  # per layer; None: full causal attention
    inv_freq: Tensor  # [head_dim / 2], the model's float32 values in the reference dtype
    rope_scaling: float  # factor on cos and sin (yarn); 1.0 for the other rope types

    @classmethod
    def from_model(
        cls, hf_model: nn.Module, dtype: torch.dtype = torch.float64
    ) -> ReferenceDecoder:
        """Copy the weights of a Hugging Face model into a decoder that computes in ``dtype``.

        The head is ``hf_model.lm_head``, or ``hf_model.score`` for a reward model (a
        ``…ForSequenceClassification``), whose "logits" are then its values.

        Rotary frequencies are taken as the model holds them: float32 constants. Angles, cosines and
        sines are then computed in ``dtype``.

        Raises UnsupportedModelError, listing every reason, for a family, a rope type, an activation
        or a kind of layer (quantised, adapted, off-loaded) that these equations do not describe.
        """
        reasons = _reasons_against(hf_model)
        if reasons:
            raise UnsupportedModelError("reference", reasons)
        # Modules of the model are untyped on purpose: four families, one shape of attributes.
        model: Any = hf_model.model
        config: Any = hf_model.config
        copies: dict[int, Tensor] = {}

        def copy(parameter: Tensor) -> Tensor:
            # One copy per parameter, so that tied weights stay one tensor.
            if id(parameter) not in copies:
                copies[id(parameter)] = parameter.detach().to(dtype, copy=True)
            return copies[id(parameter)]

        weights = {name: copy(parameter) for name, parameter in model.named_parameters()}
        weights |= {f"head.{name}": copy(p) for name, p in _head(hf_model).named_parameters()}
        rotary = model.rotary_emb
        return cls(
            weights=weights,
            num_layers=len(model.layers),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=model.layers[0].self_attn.head_dim,
            norm_eps=config.rms_norm_eps,
            windows=tuple(_window(config, layer) for layer in range(len(model.layers))),
            inv_freq=rotary.inv_freq.detach().float().to(dtype),
            rope_scaling=float(rotary.attention_scaling),
        )

    # --- the whole decoder ---------------------------------------------------------------------

    def embed(self, input_ids: Tensor | Sequence[int]) -> Tensor:
        """``embed_tokens.weight[input_ids]`` → ``[T, H]``. InputError for an id out of range."""
        table = self.weights["embed_tokens.weight"]
        ids = torch.as_tensor(input_ids, dtype=torch.int64, device=table.device)
        if ids.dim() != 1:
            raise InputTypeError(
                "input_ids is not one sequence of token ids",
                expected="one dimension",
                got=f"shape {tuple(ids.shape)}",
            )
        outside = ((ids < 0) | (ids >= len(table))).nonzero()
        if len(outside) > 0:
            index = int(outside[0])
            raise InputError(
                "a token id is outside the vocabulary",
                expected=f"0 <= id < {len(table)}",
                got=int(ids[index]),
                index=index,
            )
        return table[ids]

    def hidden_states(self, embeds: Tensor) -> list[Tensor]:
        """The L + 1 hidden states, each ``[T, H]``, from the embeddings ``[T, H]``.

        As Hugging Face numbers them: entry 0 is ``embeds`` itself, entry l < L the input of layer
        l, the last entry what leaves the final norm and enters the head.
        """
        states = [embeds]
        for layer in range(self.num_layers):
            states.append(self.layer(layer, states[-1]))
        states[-1] = self.rms_norm(states[-1], "norm")
        return states

    def logits(self, embeds: Tensor, position: int | None = -1) -> Tensor:
        """``head(hidden_states(embeds)[-1][position])`` → ``[V]``; ``None``: all, ``[T, V]``."""
        states = self.hidden_states(embeds)[-1]
        return self.linear(states if position is None else states[position], "head")

    # --- its parts -----------------------------------------------------------------------------

    def layer(self, layer: int, states: Tensor) -> Tensor:
        """One block: ``x = x + attention(norm(x)); x = x + mlp(norm(x))``."""
        name = f"layers.{layer}"
        states = states + self.attention(layer, self.rms_norm(states, f"{name}.input_layernorm"))
        return states + self.mlp(layer, self.rms_norm(states, f"{name}.post_attention_layernorm"))

    def attention(self, layer: int, x: Tensor) -> Tensor:
        """``o_proj(softmax(q kᵀ / √head_dim + mask) v)``, the heads side by side."""
        name = f"layers.{layer}.self_attn"
        T = len(x)
        q = self.linear(x, f"{name}.q_proj").reshape(T, self.num_heads, self.head_dim)
        k = self.linear(x, f"{name}.k_proj").reshape(T, self.num_kv_heads, self.head_dim)
        v = self.linear(x, f"{name}.v_proj").reshape(T, self.num_kv_heads, self.head_dim)
        if f"{name}.q_norm.weight" in self.weights:  # Qwen3
            q = self.rms_norm(q, f"{name}.q_norm")
            k = self.rms_norm(k, f"{name}.k_norm")
        q, k = self.rotate(q), self.rotate(k)
        # Query head h reads key/value head h // heads_per_kv_head.
        heads_per_kv_head = self.num_heads // self.num_kv_heads
        k = k.repeat_interleave(heads_per_kv_head, dim=1)
        v = v.repeat_interleave(heads_per_kv_head, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.head_dim**0.5
        scores = scores.masked_fill(~self.visible(layer, T, x.device), float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)
        return self.linear(out.reshape(T, self.num_heads * self.head_dim), f"{name}.o_proj")

    def visible(self, layer: int, T: int, device: torch.device) -> Tensor:
        """``[T, T]`` bool: query q sees key k iff ``q - window < k <= q``."""
        query = torch.arange(T, device=device)[:, None]
        key = torch.arange(T, device=device)[None, :]
        visible = key <= query
        window = self.windows[layer]
        return visible if window is None else visible & (key > query - window)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""
        name = f"layers.{layer}.mlp"
        gate = self.linear(x, f"{name}.gate_proj")
        up = self.linear(x, f"{name}.up_proj")
        return self.linear(gate * gate.sigmoid() * up, f"{name}.down_proj")

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of ``[T, heads, head_dim]``; position = index in the sequence.

        The pairs are (i, i + head_dim / 2), as Hugging Face stores the weights.
        """
        positions = torch.arange(len(x), device=x.device).to(x.dtype)
        angles = positions[:, None, None] * self.inv_freq  # [T, 1, head_dim / 2]
        cos, sin = angles.cos() * self.rope_scaling, angles.sin() * self.rope_scaling
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """``x / √(mean(x²) + ε) * weight`` over the last dimension."""
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return x * (mean_square + self.norm_eps).rsqrt() * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ weight.T + bias``, the bias where there is one."""
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out


def _head(hf_model: Any) -> Any:
    return hf_model.lm_head if hasattr(hf_model, "lm_head") else hf_model.score


def _window(config: Any, layer: int) -> int | None:
    """The sliding window of one layer: Mistral has it everywhere, others by ``layer_types``."""
    layer_types = getattr(config, "layer_types", None)
    if config.model_type == "mistral" or (
        layer_types is not None and layer_types[layer] == "sliding_attention"
    ):
        window: int | None = getattr(config, "sliding_window", None)
        return window
    return None


def _reasons_against(hf_model: nn.Module) -> list[str]:
    """Why these equations do not describe this model; empty when they do."""
    model_type = getattr(getattr(hf_model, "config", None), "model_type", None)
    if model_type not in LAYER_CLASSES:
        known = ", ".join(LAYER_CLASSES)
        return [f"model_type {model_type!r} of {type(hf_model).__name__} is none of {known}"]
    config: Any = hf_model.config
    model: Any = getattr(hf_model, "model", None)
    if not all(hasattr(model, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return [f"{type(hf_model).__name__}.model is no decoder (embed_tokens, layers, norm, …)"]
    if not (hasattr(hf_model, "lm_head") or hasattr(hf_model, "score")):
        return [f"{type(hf_model).__name__} has no head (lm_head, or score for a reward model)"]

    reasons = []
    rope_type = getattr(model.rotary_emb, "rope_type", None)
    if rope_type in ("dynamic", "longrope"):
        reasons.append(f"the frequencies of rope type {rope_type!r} depend on the sequence length")
    elif rope_type not in ROPE_TYPES:
        reasons.append(f"rope type {rope_type!r} is none of {', '.join(ROPE_TYPES)}")
    if config.hidden_act not in ("silu", "swish"):
        reasons.append(f"the activation is {config.hidden_act!r}, not 'silu'")
    layer_types = set(getattr(config, "layer_types", None) or [])
    if model_type == "mistral" and layer_types:
        reasons.append("a Mistral model with layer_types is another family")
    elif layer_types - {"full_attention", "sliding_attention"}:
        reasons.append(f"layer types {sorted(layer_types)}: only full and sliding are known")

    head_name = "lm_head" if hasattr(hf_model, "lm_head") else "score"
    linears = {head_name: _head(hf_model)}
    for index, layer in enumerate(model.layers):
        if type(layer).__name__ != LAYER_CLASSES[model_type]:
            reasons.append(f"layer {index} is a {type(layer).__name__}")
            break
        linears |= {f"layers.{index}.{name}": layer.get_submodule(name) for name in LINEARS}
    odd = {name: module for name, module in linears.items() if type(module) is not nn.Linear}
    for name, module in list(odd.items())[:1]:
        reasons.append(
            f"{name} is a {type(module).__name__}, not torch.nn.Linear "
            f"({len(odd)} such modules; a quantised or adapted model?)"
        )
    if type(model.embed_tokens) is not nn.Embedding:
        reasons.append(f"embed_tokens is a {type(model.embed_tokens).__name__}")
    parameters = list(hf_model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        reasons.append("some weights are on the meta device (off-loaded)")
    elif len({parameter.device for parameter in parameters}) > 1:
        reasons.append("the weights are spread over several devices")
    return reasons
