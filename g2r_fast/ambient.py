"""Settings of PyTorch that a trainer may have switched on around us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["plain_torch", "without_checkpoints"]


@contextmanager
def plain_torch() -> Iterator[None]:
    """What a trainer may have switched on around us, off: autocast would round the gradients of a
    float32 judge to bfloat16, TF32 does as much to every float32 product, inference mode has no
    backward, and a default device moves indices.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
        for products in (backend.matmul for backend in backends):
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        yield


@contextmanager
def without_checkpoints(model: torch.nn.Module) -> Iterator[None]:
    """While inside, no gradient checkpoints: reentrant ones know only `backward()`, which writes to
    the parameters' `.grad`."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module in switched:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]
