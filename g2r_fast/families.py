"""Which decoder families the packed engine knows, as data, and how their live weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .adapters import LowRank, is_active_adapter, low_rank, named_modules, plain
from .errors import UnsupportedModelError
from .plan import DecoderShape

__all__ = ["FAMILIES", "DecoderWeights", "Family", "LayerWeights", "Linear", "read_weights"]


@dataclass(frozen=True)
class Family:
    """One architecture: how its classes are called, and what distinguishes it."""

    prefix: str  # of its classes in transformers
    qk_norm: bool = False
    window_in_config: bool = False  # one window for all layers, not one per layer

    def expected_class(self, name: str) -> str | None:
        """Class of the module `name` inside a model; None for one the engine does not know."""
        last = name.rpartition(".")[2]
        if last.endswith("_proj") or name in _HEADS:
            return "Linear"
        if last.endswith("norm"):
            return f"{self.prefix}RMSNorm"
        if last.isdigit():
            return f"{self.prefix}DecoderLayer"
        known = {
            "model": "Model",
            "self_attn": "Attention",
            "mlp": "MLP",
            "rotary_emb": "RotaryEmbedding",
        }
        if last in known:
            return self.prefix + known[last]
        return {"embed_tokens": "Embedding", "layers": "ModuleList"}.get(last)


# Name of the output layer -> the model that has it: a causal LM, or a reward model of one output.
_HEADS = {"lm_head": "ForCausalLM", "score": "ForSequenceClassification"}

FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window_in_config=True),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", qk_norm=True),
}

# Rotary tables that change with the length of the batch have no single answer for packed rows.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None
    adapters: tuple[LowRank, ...] = ()  # that are on and not in `weight`

    def whole(self) -> Linear:
        """With its adapters in a weight of its own; itself where it has none."""
        if not self.adapters:
            return self
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        for adapter in self.adapters:
            change = adapter.b.detach().to(weight.dtype) @ adapter.a.detach().to(weight.dtype)
            weight = weight + adapter.scale * change
        return Linear(weight.to(self.weight.dtype), self.bias)


@dataclass(frozen=True)
class LayerWeights:
    """The live parameters of one decoder layer."""

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

    def whole(self) -> LayerWeights:
        """With adapters that are on in weights of their own: for the time of one layer, no second
        copy of the model. Of r ranks it costs r / rows of a product."""
        linears = {name: getattr(self, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        if not any(linear.adapters for linear in linears.values()):
            return self
        return replace(self, **{name: linear.whole() for name, linear in linears.items()})


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
    head_name: str = "lm_head"

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def scattered(self) -> tuple[str, ...]:
        """Names of the parameters that are not contiguous in memory."""
        return tuple(name for name, tensor in self._named() if not tensor.is_contiguous())

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter under the name that the model has for it."""
        yield "model.embed_tokens.weight", self.embed
        for layer in self.layers:
            for field, module in _MODULES.items():
                yield from _parameters(f"{layer.name}.{module}", getattr(layer, field))
        yield "model.norm.weight", self.norm
        yield from _parameters(self.head_name, self.head)

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


# Fields of LayerWeights, and the modules of a layer that they come from.
_MODULES = {
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def _parameters(
    module: str, found: Linear | torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    weight, bias = (found.weight, found.bias) if isinstance(found, Linear) else (found, None)
    if weight is not None:
        yield f"{module}.weight", weight
    if bias is not None:
        yield f"{module}.bias", bias


def read_weights(model: Any) -> DecoderWeights:
    """The weights of a Hugging Face causal LM or sequence classifier, by reference.

    Adapters that are switched off are read through. Raises UnsupportedModelError listing every
    reason why the packed engine cannot serve the model.
    """
    reasons = _reasons(model)
    if reasons:
        raise UnsupportedModelError("packed", reasons)
    family = FAMILIES[model.config.model_type]
    decoder = model.model
    first = decoder.layers[0].self_attn
    return DecoderWeights(
        embed=plain(decoder.embed_tokens).weight.detach(),
        layers=tuple(
            _layer(f"model.layers.{i}", layer, family, model.config)
            for i, layer in enumerate(decoder.layers)
        ),
        norm=plain(decoder.norm).weight.detach(),
        head=_linear(getattr(model, str(_head_name(model)))),
        eps=float(model.config.rms_norm_eps),
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        head_dim=first.head_dim,
        scaling=float(first.scaling),
        inv_freq=decoder.rotary_emb.inv_freq,
        rotary_scaling=float(decoder.rotary_emb.attention_scaling),
        head_name=str(_head_name(model)),
    )


def _layer(name: str, layer: Any, family: Family, config: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    source = config if family.window_in_config else attention
    return LayerWeights(
        name=name,
        input_norm=plain(layer.input_layernorm).weight.detach(),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        q_norm=plain(attention.q_norm).weight.detach() if family.qk_norm else None,
        k_norm=plain(attention.k_norm).weight.detach() if family.qk_norm else None,
        post_norm=plain(layer.post_attention_layernorm).weight.detach(),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        window=getattr(source, "sliding_window", None),
    )


def _linear(module: Any) -> Linear:
    module = plain(module)
    adapters = low_rank(module)
    base = module if adapters is None else module.base_layer
    bias = None if base.bias is None else base.bias.detach()
    return Linear(base.weight.detach(), bias, adapters or ())


def _reasons(model: Any) -> list[str]:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        return [f"model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}"]
    family = FAMILIES[model_type]
    decoder: Any = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if decoder is None or not layers or _head_name(model) is None:
        return ["it is wrapped, or is no causal LM: no model.layers with an lm_head"]
    modules = list(_low_rank_aside(named_modules(model)))
    parameters = [p for _, module in modules for p in module.parameters(recurse=False)]
    reasons = []
    if getattr(config, "quantization_config", None) is not None:
        reasons.append("its weights are quantised")
    surprises = _module_reasons(model, modules, family, float(config.rms_norm_eps))
    reasons.extend(surprises)
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act {config.hidden_act!r} is not 'silu'")
    if not surprises:  # what follows reads attributes that only the known classes have
        attentions = [layer.self_attn for layer in layers]
        if len({(a.head_dim, float(a.scaling)) for a in attentions}) > 1:
            reasons.append("its layers scale attention differently")
        reasons.extend(_rotary_reasons(decoder.rotary_emb, attentions[0].head_dim))
    devices = {p.device for p in parameters}
    if len(devices) > 1 or torch.device("meta") in devices:
        reasons.append("it is sharded or offloaded over " + ", ".join(sorted(map(str, devices))))
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        reasons.append("its weights are " + " and ".join(sorted(map(str, dtypes))))
    return reasons


def _head_name(model: Any) -> str | None:
    return next((name for name in _HEADS if hasattr(model, name)), None)


def _module_reasons(
    model: Any, modules: Sequence[tuple[str, nn.Module]], family: Family, eps: float
) -> list[str]:
    """What of the model is not as the family has it, one reason per kind of surprise."""
    reasons: dict[str, str] = {}
    strange: list[str] = []  # what lies inside such a module is no surprise of its own
    for name, module in modules:
        if any(name.startswith(f"{outer}.") for outer in strange):
            continue
        shown = name or "the model"
        last = name.rpartition(".")[2]
        found = type(module).__name__
        expected = family.expected_class(name)
        if not name:
            expected = family.prefix + _HEADS[str(_head_name(model))]
        if is_active_adapter(module):
            reasons.setdefault(
                "adapter", f"{shown} has an adapter that is on and not merged into its weights"
            )
            strange.append(name)
            continue
        if last == "act_fn":  # its class differs between versions; config.hidden_act names it
            expected = found if found in ("SiLU", "SiLUActivation") else "SiLU"
        if expected is None:
            reasons.setdefault("unknown", f"it has a module {shown} ({found})")
            strange.append(name)
        elif found != expected or type(module).__module__.split(".")[0] not in (
            "torch",
            "transformers",
        ):
            wanted = "a plain Linear" if expected == "Linear" else f"transformers' {expected}"
            reasons.setdefault(expected, f"{shown} is {found}, not {wanted}")
            strange.append(name)
        elif getattr(module, "variance_epsilon", eps) != eps:
            reasons.setdefault("eps", f"{shown} has an epsilon of its own")
        # transformers 4 puts a module's own method back as an attribute after capturing outputs.
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            reasons.setdefault("forward", f"{shown} has a forward of its own")
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(map(_changes_nothing, hooks)):
            reasons.setdefault("hooks", f"{shown} has forward hooks, which would be skipped")
    return list(reasons.values())


def _low_rank_aside(
    modules: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[str, nn.Module]]:
    """In the place of a projection with plain LoRA adapters, which `Linear.whole` knows, the layer
    that they adapt."""
    adapted = ""
    for name, module in modules:
        if adapted and name.startswith(f"{adapted}."):
            continue
        hooks = module._forward_hooks or module._forward_pre_hooks
        if name.endswith("_proj") and low_rank(module) is not None and not hooks:
            adapted, inner = name, module.base_layer
            yield name, inner  # type: ignore[misc]
        else:
            yield name, module


def _changes_nothing(hook: Any) -> bool:
    """transformers 5 leaves its capture hooks on a model that was once asked for hidden states;
    gradient checkpointing with adapters marks the embeddings as requiring a gradient."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing" or (
        getattr(hook, "__qualname__", "").rpartition(".")[2].startswith("make_inputs_require_grad")
    )


def _rotary_reasons(rotary: Any, head_dim: int) -> list[str]:
    kind = getattr(rotary, "rope_type", "default")
    if kind in _LENGTH_DEPENDENT_ROPE:
        return [f"rope type {kind!r} depends on the length of the batch"]
    if 2 * rotary.inv_freq.numel() != head_dim:
        return ["only a part of each head is rotated"]
    return []
