"""The stages of a decoder layer around attention on a GPU; what each does: see ops.py.

Matrix products are PyTorch's, in the model's dtype; what lies between them are the Triton kernels
of kernels/. All rows of a pass are taken together, in a few even chunks that bound the memory of
what lies between two products. Gradients are float32 where rows are summed, and in the model's
dtype as the operands of products; where that is float16, every row is brought to a power of two
near one first, as small gradients would vanish, with operations of PyTorch's that others spare.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from g2r_fast.kernels.gated import gated
from g2r_fast.kernels.gated_backward import gated_backward
from g2r_fast.kernels.head_norm_products import head_norm_products
from g2r_fast.kernels.heads import heads
from g2r_fast.kernels.heads_backward import heads_backward
from g2r_fast.kernels.rms_norm import rms_norm
from g2r_fast.kernels.rms_norm_backward import rms_norm_backward
from g2r_fast.kernels.row_dot import row_dot

from .eager import rows as eager_rows
from .families import LayerWeights, Linear
from .tables import RowMap
from .tape import MlpGrads, MlpTape, NormTape, QkvGrads, Rotary

__all__ = [
    "embedding_scores",
    "linear",
    "linear_backward",
    "mlp_backward",
    "mlp_forward",
    "qkv_backward",
    "qkv_forward",
]

_CHUNK = 32768  # rows: enough for the full rate of a product
_BYTES = 4e9  # of the two widest temporaries of a chunk
_GRANULE = 128  # rows of a product's tile
# From this width on, two products are as fast as one with its operands side by side, whose making
# is then not free any more; below it, adding to a float32 result is what costs.
_WIDE = 4096
_LOGIT_BYTES = 1e9  # of the parts into which gradients of logits are split


def qkv_forward(
    layer: LayerWeights,
    x: torch.Tensor,
    rotary: Rotary,
    rows: RowMap,
    norm: NormTape,
    *,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_norm: NormTape | None,
    k_norm: NormTape | None,
    eps: float,
    scaling: float,
) -> None:
    index = rows.index_on(x.device)
    asked = [
        linear for linear, out in ((layer.q, q), (layer.k, k), (layer.v, v)) if out is not None
    ]
    if not len(x):
        return
    weight, bias = _joined(asked)
    cos, sin = rotary
    for at in _chunks(len(x), max(x.shape[1], len(weight)), norm.normed.element_size()):
        h = torch.empty_like(x[at], dtype=norm.normed.dtype)
        rms_norm(x[at], layer.input_norm, index[at], h, norm.normed, norm.rstd, eps=eps)
        if not asked:
            continue
        heads(
            _product(h, weight, bias),
            cos[at],
            sin[at],
            index[at],
            q=None if q is None else q[at],
            k=None if k is None else k[at],
            v=None if v is None else v[at],
            q_norm=_head_norm(layer.q_norm, q_norm),
            k_norm=_head_norm(layer.k_norm, k_norm),
            eps=eps,
            scaling=scaling,
        )


def mlp_forward(
    layer: LayerWeights,
    x: torch.Tensor,
    attended: torch.Tensor,
    rows: RowMap,
    norm: NormTape,
    mlp: MlpTape,
    *,
    eps: float,
    activation: str,
) -> None:
    index = rows.index_on(x.device)
    for at in _chunks(len(x), len(layer.gate.weight), attended.element_size()):
        delta = _product(attended[at].flatten(1), layer.o.weight, layer.o.bias)
        h = torch.empty_like(delta)
        rms_norm(x[at], layer.post_norm, index[at], h, norm.normed, norm.rstd, eps=eps, delta=delta)
        del delta
        act = _product(h, layer.gate.weight, layer.gate.bias)
        up = _product(h, layer.up.weight, layer.up.bias)
        gated(act, up, index[at], act, mlp.d_gate, mlp.d_up, mlp.activation, activation=activation)
        x[at].add_(_product(act, layer.down.weight, layer.down.bias))


def mlp_backward(
    layer: LayerWeights,
    dx: torch.Tensor,
    rows: RowMap,
    norm: NormTape,
    mlp: MlpTape,
    grad_attended: torch.Tensor,
    *,
    shown: MlpGrads | None,
) -> None:
    storage = norm.normed.dtype
    index = rows.index_on(dx.device)
    width = len(layer.gate.weight)
    joined = None
    if width < _WIDE and len(dx):
        joined = torch.cat([layer.gate.weight, layer.up.weight])
    for at in _chunks(len(dx), width, norm.normed.element_size()):
        grad = dx[at]
        # For float32 this is dx itself, as is what comes back rounded.
        narrow, factor = _operand(grad, storage)
        act = narrow @ layer.down.weight
        if shown is not None and factor is None:
            grads = shown.gate_up[at].view(-1, 2, width)
        else:
            grads = act.new_empty(len(act), 2, width)
        gated_backward(act, index[at], mlp.d_gate, mlp.d_up, grads)
        del act
        if shown is not None and factor is not None:
            torch.mul(grads.flatten(1), factor, out=shown.gate_up[at])
        if joined is not None:
            dh = _wide_product(grads.flatten(1), joined)
        else:
            dh = _wide_product(grads[:, 0], layer.gate.weight)
            dh = _wide_product(grads[:, 1], layer.up.weight, dh)
        del grads
        if factor is not None:
            dh.mul_(factor)
        if shown is not None:
            torch.mul(dh, norm.normed[index[at]], out=shown.norm[at])
        rounded = narrow if narrow is not grad and factor is None else None
        rms_norm_backward(dh, layer.post_norm, index[at], norm.normed, norm.rstd, grad, rounded)
        del dh
        if factor is not None:
            narrow, factor = _operand(grad, storage)
        _product_into(grad_attended[at].flatten(1), narrow, layer.o.weight, factor)


def qkv_backward(
    layer: LayerWeights,
    dx: torch.Tensor,
    rows: RowMap,
    norm: NormTape,
    rotary: Rotary,
    *,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    q_norm: NormTape | None,
    k_norm: NormTape | None,
    scaling: float,
    shown: QkvGrads | None,
) -> None:
    storage = norm.normed.dtype
    sent = [
        linear for linear, out in ((layer.q, dq), (layer.k, dk), (layer.v, dv)) if out is not None
    ]
    if not len(dx) or not sent:
        return
    index = rows.index_on(dx.device)
    weight, _ = _joined(sent, biases=False)
    cos, sin = rotary
    for at in _chunks(len(dx), max(dx.shape[1], len(weight)), norm.normed.element_size()):
        grad = dx[at]
        kind = torch.float32 if storage == torch.float16 else storage
        if shown is not None and kind == storage:
            source = shown.projected[at]
        else:
            source = grad.new_empty(len(grad), len(weight), dtype=kind)
        heads_backward(
            cos,
            sin,
            index[at],
            source,
            dq=None if dq is None else dq[at],
            dk=None if dk is None else dk[at],
            dv=None if dv is None else dv[at],
            q_norm=_head_norm(layer.q_norm, q_norm),
            k_norm=_head_norm(layer.k_norm, k_norm),
            scaling=scaling,
        )
        if shown is not None:
            if kind != storage:
                shown.projected[at].copy_(source)
            _show_head_norm(shown.q_norm, dq, q_norm, rotary, index, at, scaling)
            _show_head_norm(shown.k_norm, dk, k_norm, rotary, index, at, 1.0)
        source, factor = _operand(source, storage)
        dh = _wide_product(source, weight)
        if factor is not None:
            dh.mul_(factor)
        if shown is not None:
            torch.mul(dh, norm.normed[index[at]], out=shown.norm[at])
        rms_norm_backward(dh, layer.input_norm, index[at], norm.normed, norm.rstd, grad)


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    out = _wide_product(x, layer.weight.t())
    return out if layer.bias is None else out.add_(layer.bias)


def linear_backward(grad: torch.Tensor, layer: Linear) -> torch.Tensor:
    """For bfloat16 weights `grad` goes in as the sum of three bfloat16 parts, 24 bits together.

    Two would leave an error of 2^-17 of each gradient, above that of a float32 product.
    """
    weight = layer.weight
    if weight.dtype == torch.float32:
        return grad @ weight
    if weight.dtype != torch.bfloat16:  # the parts of a small gradient would vanish
        return eager_rows.linear_backward(grad, weight)
    out = grad.new_empty(len(grad), weight.shape[1])
    step = max(1, int(_LOGIT_BYTES / (6 * max(1, grad.shape[1]))))
    for start in range(0, len(grad), step):
        rest = grad[start : start + step]
        parts = weight.new_empty(3, *rest.shape)
        for i in range(3):
            parts[i] = rest
            if i < 2:
                rest = rest - parts[i]
        products = _wide_product(parts.flatten(0, 1), weight).view(3, len(rest), -1)
        # The small ones first.
        out[start : start + step] = products[2].add_(products[1]).add_(products[0])
    return out


def embedding_scores(values: torch.Tensor, grads: torch.Tensor, readout: str) -> torch.Tensor:
    rows, lanes, width = grads.shape
    flat = grads.reshape(rows * lanes, width)
    with torch.cuda.device_of(grads):  # Triton launches on the current device
        if readout != "dot":
            return row_dot(flat, readout=readout).view(rows, lanes)
        row_map = torch.arange(len(flat), dtype=torch.int32, device=grads.device) // max(1, lanes)
        return row_dot(flat, values.contiguous(), row_map).view(rows, lanes)


def _chunks(rows: int, width: int, itemsize: int) -> Iterator[slice]:
    """Even chunks of at most `_CHUNK` rows, and of `_BYTES` of `[rows, 2 * width]`."""
    most = min(_CHUNK, max(_GRANULE, int(_BYTES / (2 * width * itemsize))))
    count = -(-rows // most)
    if not count:
        return
    step = -(-rows // count)
    step = -(-step // _GRANULE) * _GRANULE
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _joined(linears: list[Linear], biases: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some linear layers as one; making it takes microseconds, its product far more."""
    if not linears:
        return torch.empty(0), None
    weight = torch.cat([linear.weight for linear in linears])
    if not biases or all(linear.bias is None for linear in linears):
        return weight, None
    none = [linear.weight.new_zeros(len(linear.weight)) for linear in linears]
    pairs = zip(linears, none, strict=True)
    return weight, torch.cat([zero if one.bias is None else one.bias for one, zero in pairs])


def _head_norm(
    weight: torch.Tensor | None, tape: NormTape | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if weight is None or tape is None:
        return None
    return weight, tape.normed, tape.rstd


def _show_head_norm(
    out: torch.Tensor | None,  # [B, D]
    grad: torch.Tensor | None,  # [B, heads, D], of the rotated heads
    tape: NormTape | None,
    rotary: Rotary,
    index: torch.Tensor,
    at: slice,
    scaling: float,
) -> None:
    """Some rows of `out`, gradient of the norm's output * `normed` summed over the heads."""
    if out is None or grad is None or tape is None:
        return
    head_norm_products(grad[at], *rotary, index[at], tape.normed, out[at], scaling=scaling)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` in the dtype of both."""
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias, x, weight.t())


def _operand(rows: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients as the operand of a product, and what to multiply its rows with afterwards."""
    if storage != torch.float16:
        return rows.to(storage), None
    exponent = torch.frexp(rows.abs().amax(-1, keepdim=True)).exponent
    return torch.ldexp(rows, -exponent).to(storage), torch.ldexp(
        torch.ones_like(rows[:, :1]), exponent
    )


def _product_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor | None
) -> None:
    """`out = x @ weight * factor`, rounded to the dtype of `out`."""
    if factor is not None:
        out.copy_(_wide_product(x, weight).mul_(factor))
    elif out.dtype == x.dtype:
        torch.mm(x, weight, out=out)
    else:
        out.copy_(_wide_product(x, weight))


def _wide_product(
    a: torch.Tensor, b: torch.Tensor, add: torch.Tensor | None = None
) -> torch.Tensor:
    """`a @ b + add` in float32, the operands in the model's dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b) if add is None else add.addmm_(a, b)
    if a.device.type == "cuda":
        if add is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        # In place: torch.addmm would copy `add` first.
        return torch.ops.aten.addmm.dtype_out(add, a, b, torch.float32, out=add)
    # The CPU has no such product; here only under Triton's interpreter.
    return torch.mm(a.float(), b.float()) if add is None else add.addmm_(a.float(), b.float())
