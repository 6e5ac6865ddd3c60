"""Adapters (LoRA and its kin) of a model that judges: off, or on, and back as they were.

With adapters off, the judge is the base model: one copy of the weights serves the policy in
training and its frozen judge. Adapter layers are known by what they are made of, as PEFT and
transformers both inject them; PEFT need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import InputError

__all__ = [
    "LowRank",
    "adapter_layers",
    "adapters_off",
    "base_model",
    "check_adapters",
    "is_active_adapter",
    "low_rank",
    "named_modules",
    "plain",
]


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Modules that stand in for another module and can be switched off."""
    return [module for module in model.modules() if _inner(module) is not None]


def base_model(model: Any) -> Any:
    """The model inside a PEFT wrapper, its adapter layers left in place; any other model itself.

    Raises InputError for prompt tuning and the like, which add positions of their own.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            "the model has a prompt-learning adapter, which adds positions of its own",
            expected="an adapter inside the layers, such as LoRA, or none",
            fix="Pass model.get_base_model().",
        )
    return model.base_model.model


def check_adapters(model: nn.Module, wanted: str | None, wrapped: bool, what: str) -> None:
    """Raise InputError where a model's adapters are not as a user said: "off", "on" or none.

    wrapped: the model came in a PEFT wrapper, so that it has adapters of some kind.
    """
    layers = adapter_layers(model)
    present = bool(layers) or wrapped
    if wanted not in (None, "off", "on"):
        raise InputError("unknown adapters", expected="None | 'off' | 'on'", got=repr(wanted))
    if wanted is None and present:
        raise InputError(
            f"the {what}'s model has adapters, which may be the policy in training or the {what}",
            expected="adapters='off' (the base model) or adapters='on'",
            got="adapters=None",
        )
    if wanted is not None and not present:
        raise InputError(
            f"the {what}'s model has no adapters", expected="adapters=None", got=repr(wanted)
        )
    if wanted == "off" and not layers:
        raise InputError(
            f"the {what}'s model has no adapters that can be switched off",
            expected="adapter layers, such as LoRA's, that are not merged and unloaded",
            got="adapters='off'",
        )
    if wanted == "on" and layers and all(getattr(layer, _FLAG) for layer in layers):
        raise InputError(
            f"the {what}'s adapters are switched off",
            expected="adapters that are on, as adapters='on' says",
            got=f"{len(layers)} adapter layers that are off",
        )


_FLAG = "_disable_adapters"  # of an adapter layer, or of its class until it is first switched


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model while inside; afterwards every adapter is as it was, whatever happened.

    Only a flag of each adapter layer is set: no weight changes and no `requires_grad`, which
    `PeftModel.disable_adapter` rewrites. Raises InputError where an adapter is merged into the
    weights.
    """
    layers = adapter_layers(model)
    merged = [layer for layer in layers if getattr(layer, "merged", False)]
    if merged:
        raise InputError(
            "an adapter is merged into the weights, so the base model is not there",
            expected="adapters that are not merged",
            got=f"{len(merged)} merged layers",
            fix="Call model.unmerge_adapter() first.",
        )
    before = [vars(layer).get(_FLAG) for layer in layers]  # None: the class has it
    try:
        for layer in layers:
            vars(layer)[_FLAG] = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            if was is None:
                vars(layer).pop(_FLAG, None)
            else:
                vars(layer)[_FLAG] = was


def plain(module: Any) -> Any:
    """What an adapter layer that is off, or merged into its weights, stands in for; any other
    module itself."""
    while isinstance(module, nn.Module) and not is_active_adapter(module):
        inner = _inner(module)
        if inner is None:
            break
        module = inner
    return module


def named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the adapters that are switched off or merged."""
    module: nn.Module = plain(model)
    yield name, module
    for child_name, child in module.named_children():
        yield from named_modules(child, f"{name}.{child_name}" if name else child_name)


def is_active_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapter layer that computes more than what it stands in for."""
    if _inner(module) is None or getattr(module, _FLAG):
        return False
    return not getattr(module, "merged", False)


@dataclass(frozen=True)
class LowRank:
    """A LoRA adapter that is on: its layer computes `base(x) + scale * (x @ a.T) @ b.T`."""

    a: nn.Parameter  # [r, in]
    b: nn.Parameter  # [out, r]
    scale: float


def low_rank(module: nn.Module) -> tuple[LowRank, ...] | None:
    """The adapters that are on at a plain linear layer; None where a module computes anything else,
    as DoRA and other variants do, or drops inputs in train mode."""
    if not is_active_adapter(module) or type(module).__name__ != "Linear":
        return None
    if not type(module).__module__.startswith("peft.tuners.lora"):
        return None
    adapted: Any = module
    if type(adapted.base_layer) is not nn.Linear or getattr(adapted, "fan_in_fan_out", False):
        return None
    found = []
    for name in adapted.active_adapters:
        if name not in adapted.lora_A:
            continue
        a, b, dropout = adapted.lora_A[name], adapted.lora_B[name], adapted.lora_dropout[name]
        varied = name in getattr(adapted, "lora_variant", {}) or adapted.use_dora.get(name)
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        plain_pair = type(a) is type(b) is nn.Linear and a.bias is None and b.bias is None
        if varied or drops or not plain_pair:
            return None
        found.append(LowRank(a.weight, b.weight, float(adapted.scaling[name])))
    return tuple(found)


def _inner(module: nn.Module) -> nn.Module | None:
    """The module an adapter layer stands in for; None where the module is no adapter layer."""
    if not hasattr(module, _FLAG):
        return None
    for name in ("original_module", "base_layer"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return inner
    return None
