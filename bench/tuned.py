"""The fastest stock PyTorch we could write: `cached_loop` with the inside of the model swapped.

Everything below is PyTorch's own operations in autograd functions with hand-written backwards; the
weights, the cache, the graph and the K backwards of a response remain those of the cached loop.

- attention: keys of the prompt are constants, so no dK and dV for them; blocks of queries, so no
  keys above the diagonal; probabilities are kept, since one forward serves K backwards;
- linear layers and attention products: oneDNN in float32, see `_OneDNNLinear`;
- MLP: gate and up in one product, and their derivatives kept, so that a backward takes two products
  and two multiplications;
- last layer: nothing beyond keys and values for the response, the last row alone for the tails;
- short responses: a whole group in one padded batch, so that a backward serves all of them;
- one item: response and tail in one piece, as there is nothing to share.

README.md in this folder lists what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

__all__ = [
    "Tuning",
    "onednn_linears",
    "product_nn",
    "product_nt",
    "product_tn",
    "swapped_forwards",
    "transposed",
    "tuned",
]

# Rows of queries per block of attention: of 64, 128, 256 and all, 64 and 128 were fastest.
QUERY_BLOCK = 128
# Multiplications of a block below which all heads and sequences go through batched products.
SMALL_BLOCK = 2**21

Function = torch.autograd.Function


class Tuning:
    """What the swapped parts are told about the pass that is running."""

    prefix = 0  # keys in front that are constants
    hidden_keys: Tensor | None = None  # [B, keys behind the prefix], True: padding
    last_rows = slice(None)  # rows of the last layer whose output is wanted


def _on_onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and a.ndim == 2


def product_nt(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.mT`."""
    if _on_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT


def product_nn(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`."""
    if _on_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def product_tn(a: Tensor, b: Tensor) -> Tensor:
    """`a.mT @ b`; b is the narrow one."""
    if _on_onednn(a):
        a, b = a.contiguous(), b.t().contiguous()
        return torch.ops.mkldnn._linear_pointwise(b, a.t(), None, "none", [], "").t()
    return a.mT @ b


class _PrefixAttention(Function):
    """Causal attention whose first `prefix` keys are constants; output `[B, Q, heads, d]`.

    One kv head of one sequence at a time, so that a block stays in the cache; all in batched
    products where a block is too small for that to pay.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [B, heads, Q, d]
        key: Tensor,  # [B, kv_heads, S, d]
        value: Tensor,
        scaling: float,
        tuning: Tuning,
    ) -> Tensor:
        batch, heads, rows, width = query.shape
        kv_heads, keys = key.shape[1:3]
        group, pairs = heads // kv_heads, batch * kv_heads
        query = (query * scaling).reshape(pairs, group, rows, width)
        key, value = key.reshape(pairs, keys, width), value.reshape(pairs, keys, width)
        hidden = None
        if tuning.hidden_keys is not None:
            hidden = tuning.hidden_keys.repeat_interleave(kv_heads, 0)[:, None, None]
        out = query.new_empty(pairs, group, rows, width)
        kept = []
        small = group * min(rows, QUERY_BLOCK) * keys * width < SMALL_BLOCK
        for pair in [slice(None)] if small else range(pairs):
            for start in range(0, rows, QUERY_BLOCK):
                stop = min(rows, start + QUERY_BLOCK)
                seen = keys - rows + stop  # keys that the block's last query attends to
                q = query[pair, :, start:stop].flatten(-3, -2)
                scores = product_nt(q, key[pair, :seen])
                view = scores.unflatten(-2, (group, stop - start))
                if stop - start > 1:
                    view[..., seen - stop + start :] += _triangle(stop - start, q)
                if hidden is not None:
                    view[..., tuning.prefix :].masked_fill_(
                        hidden[pair, ..., : seen - tuning.prefix], float("-inf")
                    )
                p = torch.softmax(scores, -1)
                mixed = product_nn(p, value[pair, :seen])
                out[pair, :, start:stop] = mixed.unflatten(-2, (group, stop - start))
                kept.append((pair, start, stop, seen, q, p))
        ctx.kept, ctx.key, ctx.value = kept, key, value
        ctx.prefix, ctx.scaling, ctx.shape = tuning.prefix, scaling, (batch, kv_heads)
        return out.view(batch, heads, rows, width).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch, kv_heads = ctx.shape
        key, value, prefix = ctx.key, ctx.value, ctx.prefix
        _, rows, heads, width = grads[0].shape
        group = heads // kv_heads
        grad = grads[0].transpose(1, 2).reshape(-1, group, rows, width)
        dq, dk, dv = torch.empty_like(grad), torch.zeros_like(key), torch.zeros_like(value)
        for pair, start, stop, seen, q, p in ctx.kept:
            g = grad[pair, :, start:stop].flatten(-3, -2)
            dp = product_nt(g, value[pair, :seen])
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            block = product_nn(ds, key[pair, :seen]).unflatten(-2, (group, stop - start))
            torch.mul(block, ctx.scaling, out=dq[pair, :, start:stop])
            dk[pair, prefix:seen] += product_tn(ds[..., prefix:], q)
            dv[pair, prefix:seen] += product_tn(p[..., prefix:], g)
        dk, dv = (x.view(batch, kv_heads, -1, width) for x in (dk, dv))
        return dq.view(batch, heads, rows, width), dk, dv, None, None


def _triangle(rows: int, like: Tensor) -> Tensor:
    full = torch.full((rows, rows), float("-inf"), dtype=like.dtype, device=like.device)
    return full.triu(1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    tuning: Tuning,
    **_: Any,
) -> tuple[Tensor, None]:
    if module.layer_idx + 1 < module.config.num_hidden_layers:
        return _PrefixAttention.apply(query, key, value, scaling, tuning), None
    wanted = query[:, :, tuning.last_rows]
    if wanted.shape[2] == 0:
        return query.transpose(1, 2), None  # nobody looks at it
    mixed = _PrefixAttention.apply(wanted, key, value, scaling, tuning)
    return _in_place(mixed, query.shape[2], tuning.last_rows), None


AttentionInterface.register("bench_tuned", _attention)


def _in_place(part: Tensor, rows: int, where: slice) -> Tensor:
    """`part` [B, n, ...] at `where` in rows of zeros."""
    if part.shape[1] == rows:
        return part
    whole = part.new_zeros(part.shape[0], rows, *part.shape[2:])
    whole[:, where] = part
    return whole


class _OneDNNLinear(Function):
    """x @ weight.T + bias on oneDNN, gradient for x only.

    In float32 nn.Linear runs on MKL, which takes its AVX2 path on processors of another vendor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: Tensor
    ) -> Tensor:
        ctx.transposed = transposed
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        grad_x = torch.ops.mkldnn._linear_pointwise(grad, ctx.transposed, None, "none", [], "")
        return grad_x, None, None, None


class _MLP(Function):
    """down(silu(gate(x)) * up(x)), gradient for x only; `back`: the weights, transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, back: Any) -> Tensor:
        width = down.shape[1]
        rows = x.reshape(-1, x.shape[-1])
        both = product_nt(rows, gate_up)
        gate, up = both[:, :width], both[:, width:]
        act = torch.nn.functional.silu(gate)
        out = product_nt(act * up, down)
        ctx.back = back
        derivative = torch.ops.aten.silu_backward(up, gate)  # up * silu'(gate)
        ctx.kept = (derivative, act)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down = ctx.back
        derivative, act = ctx.kept
        inner = product_nt(grads[0].reshape(-1, grads[0].shape[-1]), down)
        width = inner.shape[1]
        both = inner.new_empty(len(inner), 2 * width)
        torch.mul(inner, derivative, out=both[:, :width])
        torch.mul(inner, act, out=both[:, width:])
        return product_nt(both, gate_up).view(grads[0].shape), None, None, None


class _RMSNorm(Function):
    """weight * (x * rsqrt(mean(x^2) + eps)), gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = wide * rstd
        ctx.kept = (normed, rstd, weight)
        return weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, rstd, weight = ctx.kept
        grad = grads[0].float() * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, along, value=-1).mul_(rstd).to(grads[0].dtype), None, None


@contextmanager
def swapped_forwards(replaced: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def transposed(layer: Any) -> Tensor:
    """Made once per model and kept on the layer."""
    if not hasattr(layer, "bench_transposed"):
        layer.bench_transposed = layer.weight.detach().t().contiguous()
    transposed: Tensor = layer.bench_transposed
    return transposed


def _onednn_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: _OneDNNLinear.apply(x, layer.weight, layer.bias, transposed(layer))


def _linears(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """Nothing to do in bfloat16, where nn.Linear runs on oneDNN already."""
    if model.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return {}
    return _all_linears(model, _onednn_forward)


def _all_linears(
    model: PreTrainedModel, forward: Callable[[Any], Any]
) -> dict[nn.Module, Callable[..., Any]]:
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    return {layer: forward(layer) for layer in layers}


@contextmanager
def onednn_linears(model: PreTrainedModel) -> Iterator[None]:
    """Replace the decoder's linear layers by `_OneDNNLinear` where that is not the default."""
    with swapped_forwards(_linears(model) if model.device.type == "cpu" else {}):
        yield


def _prepare_mlp(mlp: Any) -> None:
    """Gate and up as one matrix, and the weights transposed; made once and kept on the module."""
    if not hasattr(mlp, "bench_gate_up"):
        mlp.bench_gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        mlp.bench_back = (mlp.bench_gate_up.t().contiguous(), transposed(mlp.down_proj))


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: _MLP.apply(x, mlp.bench_gate_up, mlp.down_proj.weight, mlp.bench_back)


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def _some_rows(forward: Callable[[Tensor], Tensor], tuning: Tuning) -> Callable[[Tensor], Tensor]:
    """`forward` for the rows of the last layer that are wanted, zeros elsewhere."""

    def run(x: Tensor) -> Tensor:
        wanted = x[:, tuning.last_rows]
        return _in_place(forward(wanted), x.shape[1], tuning.last_rows) if wanted.numel() else x

    return run


# Of a linear layer, an MLP, a norm: what runs in place of its forward.
Parts = tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]


@contextmanager
def tuned(model: PreTrainedModel, parts: Parts | None = None) -> Iterator[dict[str, Any]]:
    """Swap the inside of a Qwen2 model; yields the keywords that its forward needs.

    `parts`: others than those of this file, for all linear layers, MLPs and norms of the layers.
    """
    tuning = Tuning()
    linear, mlp, norm = parts or (_onednn_forward, _mlp_forward, _norm_forward)
    replaced = _linears(model) if parts is None else _all_linears(model, linear)
    layers: list[Any] = list(model.model.layers)
    for layer in layers:
        _prepare_mlp(layer.mlp)
        replaced[layer.mlp] = mlp(layer.mlp)
        for one in (layer.input_layernorm, layer.post_attention_layernorm):
            replaced[one] = norm(one)
    last = layers[-1]
    replaced[last.mlp] = _some_rows(replaced[last.mlp], tuning)
    output = last.self_attn.o_proj
    replaced[output] = _some_rows(replaced.get(output, output.forward), tuning)
    before = model.config._attn_implementation
    model.set_attn_implementation("bench_tuned")
    try:
        with swapped_forwards(replaced):
            yield {"tuning": tuning}
    finally:
        model.set_attn_implementation(before)
