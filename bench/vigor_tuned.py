"""VIGOR's norms by the fastest stock PyTorch we could write.

The inside of the model is swapped as in `tuned.py`, with backwards that return the gradient for
their input and leave (inputs, output gradients) of every linear layer behind. Weight gradients are
formed one at a time and only where that is cheaper than the two Gram matrices. The prompt goes
forward once per group, as a graph of its own whose keys and values the completions attend to, and
comes back once per completion, as it must.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.cached import fork
from bench.signal_workload import Answer, Rollouts
from bench.tuned import product_nn, product_nt, product_tn, swapped_forwards, transposed, tuned
from g2r_fast.key_values import cache_of, cached

__all__ = ["head_only_norms", "whole_norms"]

Function = torch.autograd.Function


class Recorder:
    """What the backward of one completion leaves behind; prompt and completion are two visits."""

    def __init__(self) -> None:
        self.linears: dict[object, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.vectors: dict[object, Tensor] = {}  # gradients of norm weights and biases

    def vector(self, key: object, grad: Tensor) -> None:
        self.vectors[key] = self.vectors[key] + grad if key in self.vectors else grad

    def square(self) -> float:
        total = 0.0
        for visits in self.linears.values():
            x, g = (torch.cat(parts) for parts in zip(*visits, strict=True))
            total += linear_square(x, g)
        total += sum(float(grad.square().sum()) for grad in self.vectors.values())
        self.linears.clear()
        self.vectors.clear()
        return total


def linear_square(x: Tensor, g: Tensor) -> float:
    """`(g.T @ x).square().sum()` for inputs `[m, d]` and output gradients `[m, p]`."""
    rows, inputs, outputs = len(x), x.shape[1], g.shape[1]
    if rows * (inputs + outputs) < inputs * outputs:
        x, g = x.contiguous(), g.contiguous()
        return float((product_nt(x, x).float() * product_nt(g, g).float()).sum())
    wide, narrow = (x, g) if inputs > outputs else (g, x)
    return float(product_tn(wide, narrow).float().square().sum())


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, recorder: Recorder) -> Tensor:
        ctx.x, ctx.layer, ctx.recorder = x.detach().flatten(0, -2), layer, recorder
        out = product_nt(ctx.x, layer.weight)
        if layer.bias is not None:
            out = out + layer.bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].flatten(0, -2).contiguous()
        ctx.recorder.linears[ctx.layer].append((ctx.x, grad))
        if ctx.layer.bias is not None:
            ctx.recorder.vector((ctx.layer, "bias"), grad.float().sum(0))
        grad_x = product_nt(grad, transposed(ctx.layer))
        return grad_x.view(*grads[0].shape[:-1], -1), None, None


class _MLP(Function):
    """down(silu(gate(x)) * up(x)); gate and up in one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Any, gate_up: Tensor, recorder: Recorder) -> Tensor:
        rows = x.detach().flatten(0, -2)
        both = product_nt(rows, gate_up)
        gate, up = both.chunk(2, 1)
        act = torch.nn.functional.silu(gate)
        inner = act * up
        derivative = torch.ops.aten.silu_backward(up, gate)  # up * silu'(gate)
        ctx.kept = (rows, derivative, act, inner)
        ctx.mlp, ctx.recorder = mlp, recorder
        return product_nt(inner, mlp.down_proj.weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, derivative, act, inner = ctx.kept
        gate_up, down = ctx.mlp.bench_back
        grad = grads[0].flatten(0, -2).contiguous()
        ctx.recorder.linears[ctx.mlp.down_proj].append((inner, grad))
        grad = product_nt(grad, down)
        width = grad.shape[1]
        both = grad.new_empty(len(grad), 2 * width)
        torch.mul(grad, derivative, out=both[:, :width])
        torch.mul(grad, act, out=both[:, width:])
        ctx.recorder.linears[ctx.mlp].append((rows, both))
        return product_nt(both, gate_up).view(grads[0].shape), None, None, None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, recorder: Recorder) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        normed = wide * rstd
        ctx.kept, ctx.norm, ctx.recorder = (normed, rstd), norm, recorder
        return norm.weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, rstd = ctx.kept
        grad = grads[0].float()
        ctx.recorder.vector(ctx.norm, (grad * normed).flatten(0, -2).sum(0))
        grad = grad * ctx.norm.weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, along, value=-1).mul_(rstd).to(grads[0].dtype), None, None


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[tuple[Recorder, dict[str, Any]]]:
    """`tuned`, with parts that record; yields the recorder and the forward's keywords."""
    recorder = Recorder()

    def linear(layer: nn.Linear) -> Any:
        return lambda x: _Linear.apply(x, layer, recorder)

    def mlp(layer: Any) -> Any:
        return lambda x: _MLP.apply(x, layer, layer.bench_gate_up, recorder)

    def norm(layer: Any) -> Any:
        return lambda x: _RMSNorm.apply(x, layer, recorder)

    with tuned(model, parts=(linear, mlp, norm)) as extra:
        with swapped_forwards({model.model.norm: norm(model.model.norm)}):
            yield recorder, extra


def _cotangents(logits: Tensor, ids: Tensor) -> Tensor:
    """d mean NLL / d logits, `[T, V]` float32."""
    p = torch.softmax(logits.float(), -1)
    p[torch.arange(len(ids), device=ids.device), ids] -= 1
    return p.div_(len(ids))


def whole_norms(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """The norm of every parameter's gradient together, `[G]`."""
    embed, weight = model.get_input_embeddings(), model.lm_head.weight
    tied = weight is embed.weight
    found = []
    with _recorded(model) as (recorder, extra):
        tuning = extra["tuning"]
        tuning.last_rows = slice(0, 0)  # of the prompt's rows nobody reads the last layer's output
        leaf = embed(rollouts.prompt[None, :-1]).requires_grad_()
        prompt = cache_of(model.model(inputs_embeds=leaf, use_cache=True, **extra))
        tuning.last_rows = slice(None)
        for completion in rollouts.completions:
            ids = torch.cat([rollouts.prompt[-1:], completion[:-1]])
            own = embed(ids[None]).requires_grad_()
            hidden = model.model(
                inputs_embeds=own, **cached(model, fork(prompt)), use_cache=True, **extra
            ).last_hidden_state
            h = hidden.detach()[0]
            rho = _cotangents(product_nt(h, weight), completion).to(weight.dtype)
            back = product_nn(rho, weight)[None]
            leaves = [leaf, own] if leaf.numel() else [own]
            grads = torch.autograd.grad(hidden, leaves, back, retain_graph=True)
            g = torch.cat([grad[0] for grad in grads])
            at = torch.cat([rollouts.prompt[:-1], ids])
            square = recorder.square() + linear_square(h, rho)
            unique, places = at.unique(return_inverse=True)
            rows = torch.zeros(len(unique), g.shape[1], device=g.device)
            rows.index_add_(0, places, g.float())
            square += float(rows.square().sum())
            if tied:
                square += 2 * float((rho[:, unique].float() * (h.float() @ rows.T)).sum())
            found.append(square**0.5)
    return [torch.tensor(found)]


@torch.no_grad()
def head_only_norms(model: PreTrainedModel, rollouts: Rollouts, states: list[Tensor]) -> Answer:
    """The norm of the LM head's gradient, from the head's inputs of every completion."""
    weight = model.lm_head.weight
    found = []
    for h, completion in zip(states, rollouts.completions, strict=True):
        rho = _cotangents(product_nt(h, weight), completion).to(weight.dtype)
        found.append(linear_square(h, rho) ** 0.5)
    return [torch.tensor(found)]
