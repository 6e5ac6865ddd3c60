"""One function per op of the packed engine; only here and in backends.py are devices known.

Every op writes into tensors that it is given. Rows are [rows, heads, head_dim] where they have
heads. Residual rows and their gradients are float32 (float64 for a float64 model), what is kept is
in the model's dtype, but for what attention gives (`backend.attended_dtype`) and statistics of
rows, which are float32 or wider. `rows` says, for each row, where it is kept or what of that it
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import (
    cuda_attention,
    native_residuals,
    native_stages,
    triton_attention,
    triton_norms,
    triton_residuals,
    triton_scoring,
    triton_stages,
)
from .backends import Backend, native_is_there, native_serves
from .eager import attention as eager_attention
from .eager import norms as eager_norms
from .eager import residuals as eager_residuals
from .eager import rows as eager_rows
from .eager import stages as eager_stages
from .eager.rows import attribution, rms_norm, rms_norm_backward
from .families import LayerWeights, Linear
from .signal import LinearRows
from .tables import QueryTables, RowMap
from .tape import MlpGrads, MlpTape, NormTape, QkvGrads, Rotary

__all__ = [
    "attention_backward",
    "attention_forward",
    "attribution",
    "attribution_rewards",
    "embedding_scores",
    "linear",
    "linear_backward",
    "mlp_backward",
    "mlp_forward",
    "qkv_backward",
    "qkv_forward",
    "residual_sums",
    "rms_norm",
    "rms_norm_backward",
    "squared_gradient_norms",
    "squared_row_sums",
]


_ANY_WIDTH = 16  # what is asked of the native backend by an op that takes every width


def qkv_forward(
    backend: Backend,
    layer: LayerWeights,
    x: torch.Tensor,
    rotary: Rotary,
    rows: RowMap,
    norm: NormTape,
    *,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    q_norm: NormTape | None = None,
    k_norm: NormTape | None = None,
    eps: float,
    scaling: float,
) -> None:
    """`q, k, v = rotated(heads(rms_norm(x) * input_norm @ [w_q, w_k, w_v].T))`, q times `scaling`.

    x `[rows, H]`; q `[rows, heads, D]`; k and v `[rows, kv_heads, D]`, which are not rotated for v.
    What is None is not computed. With `layer.q_norm` and `layer.k_norm`, heads are normalised
    before they are rotated, and `q_norm` and `k_norm` keep that.
    """
    _stages(backend).qkv_forward(
        layer, x, rotary, rows, norm,
        q=q, k=k, v=v, q_norm=q_norm, k_norm=k_norm, eps=eps, scaling=scaling,
    )  # fmt: skip


def mlp_forward(
    backend: Backend,
    layer: LayerWeights,
    x: torch.Tensor,
    attended: torch.Tensor,
    rows: RowMap,
    norm: NormTape,
    mlp: MlpTape,
    *,
    eps: float,
    activation: str = "silu",
) -> None:
    """`x += attended @ w_o.T`, then `x += (act(h @ w_gate.T) * (h @ w_up.T)) @ w_down.T`.

    `h = rms_norm(x) * post_norm`; x `[rows, H]` in place; attended `[rows, heads, D]`, as
    `attention_forward` gives it; activation `"silu"`, `"gelu"` or `"gelu_tanh"`. `mlp.activation`,
    unless None, gets the input of w_down.
    """
    _stages(backend).mlp_forward(
        layer, x, attended, rows, norm, mlp, eps=eps, activation=activation
    )


def mlp_backward(
    backend: Backend,
    layer: LayerWeights,
    dx: torch.Tensor,
    rows: RowMap,
    norm: NormTape,
    mlp: MlpTape,
    grad_attended: torch.Tensor,
    *,
    shown: MlpGrads | None = None,
) -> None:
    """The input gradients of `mlp_forward`: dx `[B, H]` in place, grad_attended `[B, heads, D]`.

    `shown`, where it is given, is filled. dx on entry is the output gradient of w_down, on return
    that of w_o.
    """
    _stages(backend).mlp_backward(layer, dx, rows, norm, mlp, grad_attended, shown=shown)


def qkv_backward(
    backend: Backend,
    layer: LayerWeights,
    dx: torch.Tensor,
    rows: RowMap,
    norm: NormTape,
    rotary: Rotary,
    *,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    q_norm: NormTape | None = None,
    k_norm: NormTape | None = None,
    scaling: float,
    shown: QkvGrads | None = None,
) -> None:
    """`dx +=` the input gradient of `qkv_forward`; what is None sends nothing.

    dx `[B, H]`; dq `[B, heads, D]`; dk and dv `[B, kv_heads, D]`; rotary of the rows that are kept.
    `shown`, where it is given, is filled.
    """
    _stages(backend).qkv_backward(
        layer, dx, rows, norm, rotary,
        dq=dq, dk=dk, dv=dv, q_norm=q_norm, k_norm=k_norm, scaling=scaling, shown=shown,
    )  # fmt: skip


def attention_forward(
    backend: Backend,
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None,
    softcap: float = 0.0,
) -> None:
    """`out = softmax(q @ k.T + causal mask) @ v` for every query over its own path; `lse` too.

    q, which comes scaled, and out `[queries, heads, D]`, out in `backend.attended_dtype`; k and v
    `[rows, kv_heads, D]`; lse `[queries, heads]`. A query sees the last `window` keys, its own
    included; None: all. With a `softcap` c the scores s are `c * tanh(s / c)`.
    """
    _attention(backend).attention_forward(
        queries, q, k, v, out, lse, window=window, softcap=softcap
    )


def attention_backward(
    backend: Backend,
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    window: int | None,
    softcap: float = 0.0,
) -> None:
    """The gradients of `attention_forward` for every lane.

    grad_out and dq `[B, heads, D]`, of the queries' backward rows; dk and dv `[B, kv_heads, D]`, of
    the plan's backward rows, float32 or wider. Every element of dq, dk and dv is written. `out`
    may be None only where not `backend.keeps_attended`.
    """
    read = (lse,) if backend.name == "reference" else (out, lse)
    _attention(backend).attention_backward(
        queries, q, k, v, *read, grad_out, dq, dk, dv, window=window, softcap=softcap
    )


def linear(backend: Backend, x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """`x @ weight.T + bias`, `[rows, out]`, float32 or wider whatever the dtype of `x`."""
    result: torch.Tensor = _stages(backend).linear(x, layer)
    return result


def linear_backward(backend: Backend, grad: torch.Tensor, layer: Linear) -> torch.Tensor:
    """`grad @ weight`, `[rows, in]`, in the dtype of `grad` `[rows, out]`, float32 or wider."""
    result: torch.Tensor = _stages(backend).linear_backward(grad, layer)
    return result


def embedding_scores(values: torch.Tensor, grads: torch.Tensor, readout: str) -> torch.Tensor:
    """`(grads * values[:, None]).sum(-1)`, or with `"l1"` and `"l2"` that norm of `grads`.

    values `[rows, H]`; grads `[rows, lanes, H]`; the result `[rows, lanes]`, float32 or wider.
    """
    run = eager_rows.embedding_scores
    if grads.dtype == values.dtype == torch.float32:
        if triton_scoring.serves(grads.device):
            run = triton_stages.embedding_scores
        elif native_serves(grads.device, grads.dtype, grads.shape[-1]):
            run = native_stages.embedding_scores
    return run(values, grads, readout)


def attribution_rewards(
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    *,
    temperature: float,
    standardise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`alpha_j = attribution(b_j)`, and `rewards[start_j : start_j + len(b_j)] += w_j * alpha_j`.

    b = scores.split(lengths); scores `[total]` float64; lengths, weights and starts J each.
    Returns alpha `[total]` and rewards `[count]`, float64, which start from 0 and are summed in the
    order of j, whatever the number of threads. `temperature`, `standardise`: see `attribution`.
    """
    run = eager_rows.attribution_rewards
    if triton_scoring.serves(scores.device):
        run = triton_scoring.attribution_rewards
    elif native_is_there(scores.device):
        run = native_stages.attribution_rewards
    return run(scores, lengths, weights, starts, count, temperature, standardise)


def residual_sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    lengths: Sequence[int],
    owners: Sequence[int],
    sums: torch.Tensor,
    *,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sums[owner] += (w[:, None] * (onehot(y) - softmax(z / temperature))).sum(0)` per stretch.

    z, y, w = logits `[n, V]`, targets `[n]` int64, weights `[n]`, split by `lengths`; `owners`, no
    two the same, are rows of sums `[S, V]`; logits, weights and sums float32 or all float64.
    Returns `log_softmax(z / temperature)[y]` and the entropy of that distribution, `[n]`, in nats.
    `1 - p` is the sum over the other words, and so are a log-probability near 0 and an entropy. A
    row with NaN or infinity gives NaN for both, and makes its sum NaN.
    """
    run = eager_residuals.residual_sums
    if triton_scoring.serves_logits(logits):
        run = triton_residuals.residual_sums
    elif logits.dtype == torch.float32 and native_is_there(logits.device):
        run = native_residuals.residual_sums
    return run(logits, targets, weights, lengths, owners, sums, temperature)


def squared_gradient_norms(
    inputs: torch.Tensor, grads: torch.Tensor, rows: LinearRows
) -> torch.Tensor:
    """`(inputs[kept].T @ grads[rows]).square().sum()` of every sequence's rows, `[lanes]` float64.

    inputs `[n, in]` and grads `[r, out]` of one dtype. No weight gradient is formed: for M rows
    either two symmetric Gram matrices, M² (in + out) FLOPs, `sum((A @ A.T) * (B @ B.T))`, or the
    gradient tile by tile, 2 M in out, whichever is less. Products are float32, their squares and
    sums float64 (within a Triton program float32): an entry of a gradient above 1e19 or below 1e-19
    has no room.
    """
    run = eager_norms.squared_gradient_norms
    if triton_norms.serves(inputs):
        run = triton_norms.squared_gradient_norms
    elif native_serves(grads.device, grads.dtype, _ANY_WIDTH):
        run = native_stages.squared_gradient_norms
    return _scaled_back(run(inputs, grads, rows), rows)


def squared_row_sums(x: torch.Tensor, rows: LinearRows) -> torch.Tensor:
    """`x[rows].sum(0).square().sum()` of every sequence's rows, `[lanes]` float64."""
    run = eager_norms.squared_row_sums
    if triton_norms.serves(x):
        run = triton_norms.squared_row_sums
    elif native_serves(x.device, x.dtype, x.shape[1]):
        run = native_stages.squared_row_sums
    return _scaled_back(run(x, rows), rows)


def _scaled_back(squares: torch.Tensor, rows: LinearRows) -> torch.Tensor:
    if not any(rows.exponents):
        return squares
    return squares.ldexp(torch.tensor(rows.exponents, device=squares.device) * 2)


def _stages(backend: Backend) -> Any:
    if backend.on_gpu:
        return triton_stages
    return native_stages if backend.name == "native" else eager_stages


def _attention(backend: Backend) -> Any:
    if backend.on_gpu:
        return cuda_attention if backend.name == "native" else triton_attention
    return native_stages if backend.name == "native" else eager_attention
