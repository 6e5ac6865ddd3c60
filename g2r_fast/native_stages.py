"""The packed engine's operations on the C++ kernels of csrc/cpu; what each does: see ops.py.

Only calls: checks are in backends.py, layouts in csrc/cpu/kernels.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from .families import LayerWeights, Linear
from .plan import column
from .signal import LinearRows
from .tables import QueryTables, RowMap
from .tape import MlpGrads, MlpTape, NormTape, QkvGrads, Rotary

__all__ = [
    "attention_backward",
    "attention_forward",
    "attribution_rewards",
    "embedding_scores",
    "linear",
    "linear_backward",
    "mlp_backward",
    "mlp_forward",
    "qkv_backward",
    "qkv_forward",
    "squared_gradient_norms",
    "squared_row_sums",
]

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_READOUTS = {"dot": 0, "l1": 1, "l2": 2}


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
    if not len(x):
        return
    torch.ops.g2r_fast.qkv_forward(
        x,
        layer.input_norm,
        *_linear_if(layer.q, q),
        *_linear_if(layer.k, k),
        *_linear_if(layer.v, v),
        layer.q_norm if q is not None else None,
        layer.k_norm if k is not None else None,
        *rotary,
        rows.index,
        norm.normed,
        norm.rstd,
        *_norm(q_norm),
        *_norm(k_norm),
        q,
        k,
        v,
        2 * rotary[0].shape[-1],
        eps,
        scaling,
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
    if not len(x):
        return
    torch.ops.g2r_fast.mlp_forward(
        x,
        attended,
        layer.o.weight,
        layer.o.bias,
        layer.post_norm,
        layer.gate.weight,
        layer.gate.bias,
        layer.up.weight,
        layer.up.bias,
        layer.down.weight,
        layer.down.bias,
        rows.index,
        norm.normed,
        norm.rstd,
        mlp.d_gate,
        mlp.d_up,
        mlp.activation,
        eps,
        _ACTIVATIONS[activation],
    )


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
    torch.ops.g2r_fast.mlp_backward(
        dx,
        rows.index,
        layer.o.weight,
        layer.post_norm,
        layer.gate.weight,
        layer.up.weight,
        layer.down.weight,
        norm.normed,
        norm.rstd,
        mlp.d_gate,
        mlp.d_up,
        grad_attended,
        None if shown is None else shown.gate_up,
        None if shown is None else shown.norm,
    )


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
    torch.ops.g2r_fast.qkv_backward(
        dx,
        rows.index,
        dq,
        dk,
        dv,
        layer.input_norm,
        layer.q.weight if dq is not None else None,
        layer.k.weight if dk is not None else None,
        layer.v.weight if dv is not None else None,
        layer.q_norm if dq is not None else None,
        layer.k_norm if dk is not None else None,
        *rotary,
        norm.normed,
        norm.rstd,
        *_norm(q_norm),
        *_norm(k_norm),
        *((None,) * 4 if shown is None else (shown.projected, shown.norm, *_heads(shown))),
        2 * rotary[0].shape[-1],
        scaling,
    )


def attention_forward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
) -> None:
    if not len(q):
        return
    torch.ops.g2r_fast.attention_forward(
        q,
        k,
        v,
        queries.segments,
        queries.forward_blocks,
        queries.positions,
        out,
        lse,
        window or 0,
        softcap,
    )


def attention_backward(
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
    softcap: float,
) -> None:
    torch.ops.g2r_fast.attention_backward(
        q,
        k,
        v,
        out,
        lse,
        grad_out,
        queries.segments,
        queries.backward_blocks,
        queries.positions,
        queries.block_lanes,
        queries.runs,
        queries.run_lanes,
        dq,
        dk,
        dv,
        window or 0,
        softcap,
    )


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    out = torch.empty(len(x), len(layer.weight), dtype=torch.float32)
    torch.ops.g2r_fast.prefer_large_pages(out)  # logits of a vocabulary
    torch.ops.g2r_fast.linear(x, layer.weight, layer.bias, out)
    return out


def linear_backward(grad: torch.Tensor, layer: Linear) -> torch.Tensor:
    out = torch.empty(len(grad), layer.weight.shape[1], dtype=torch.float32)
    torch.ops.g2r_fast.linear_backward(grad.contiguous(), layer.weight, out)
    return out


def embedding_scores(values: torch.Tensor, grads: torch.Tensor, readout: str) -> torch.Tensor:
    scores = torch.empty(grads.shape[:2], dtype=torch.float32)
    torch.ops.g2r_fast.embedding_scores(
        values.contiguous(), grads.contiguous(), _READOUTS[readout], scores
    )
    return scores


def attribution_rewards(
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    temperature: float,
    standardise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    alpha = torch.empty(len(scores), dtype=torch.float64)
    rewards = torch.empty(count, dtype=torch.float64)
    torch.ops.g2r_fast.attribution_rewards(
        scores.contiguous(),
        torch.tensor([0, *accumulate(lengths)]),
        temperature,
        standardise,
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(starts, dtype=torch.int64),
        alpha,
        rewards,
    )
    return alpha, rewards


def squared_gradient_norms(
    inputs: torch.Tensor, grads: torch.Tensor, rows: LinearRows
) -> torch.Tensor:
    out = torch.empty(len(rows.lanes), dtype=torch.float64)
    torch.ops.g2r_fast.squared_gradient_norms(
        inputs.contiguous(), grads.contiguous(), rows.kept, rows.rows, column(rows.offsets), out
    )
    return out


def squared_row_sums(x: torch.Tensor, rows: LinearRows) -> torch.Tensor:
    out = torch.empty(len(rows.lanes), dtype=torch.float64)
    torch.ops.g2r_fast.squared_row_sums(x.contiguous(), rows.rows, column(rows.offsets), out)
    return out


def _heads(shown: QkvGrads) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return shown.q_norm, shown.k_norm


def _linear_if(
    layer: Linear, out: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if out is None else (layer.weight, layer.bias)


def _norm(tape: NormTape | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if tape is None else (tape.normed, tape.rstd)
