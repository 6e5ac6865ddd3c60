"""The stages of a decoder layer around attention, in pieces of rows; what each does: see ops.py.

Rows come in pieces, so that what lies between two products stays in the cache, and the lanes of a
token read what its one forward row kept by broadcasting.
"""

from __future__ import annotations

import torch

from ..families import LayerWeights, Linear
from ..tables import Piece, RowMap
from ..tape import MlpGrads, MlpTape, NormTape, QkvGrads, Rotary
from . import rows as rowwise

__all__ = [
    "linear",
    "linear_backward",
    "mlp_backward",
    "mlp_forward",
    "qkv_backward",
    "qkv_forward",
]


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
    for piece in rows.pieces:
        at = piece.rows
        h = _norm(x[at], eps, norm, piece).normed * layer.input_norm
        cos, sin = (table[at][:, None] for table in rotary)
        if q is not None:
            heads = _heads(h, layer.q, layer.q_norm, q_norm, piece, eps, q.shape[-1])
            q[at] = rowwise.rotary(heads, cos, sin, scaling)
        if k is not None:
            heads = _heads(h, layer.k, layer.k_norm, k_norm, piece, eps, k.shape[-1])
            k[at] = rowwise.rotary(heads, cos, sin)
        if v is not None:
            v[at] = _heads(h, layer.v, None, None, piece, eps, v.shape[-1])


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
    for piece in rows.pieces:
        at, saved = piece.rows, piece.saved
        x[at] += rowwise.project(attended[at].flatten(1), layer.o.weight, layer.o.bias)
        h = _norm(x[at], eps, norm, piece).normed * layer.post_norm
        gate = rowwise.project(h, layer.gate.weight, layer.gate.bias)
        up = rowwise.project(h, layer.up.weight, layer.up.bias)
        derivatives = None if saved is None else (mlp.d_gate[saved], mlp.d_up[saved])
        act = rowwise.gated(gate, up, derivatives, activation).to(attended.dtype)
        if mlp.activation is not None and saved is not None:
            mlp.activation[saved] = act
        x[at] += rowwise.project(act, layer.down.weight, layer.down.bias)


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
    for piece in rows.pieces:
        grad, saved, lanes = dx[piece.rows], piece.saved, piece.lanes
        act = rowwise.project_back(grad, layer.down.weight)
        gate, up = torch.empty_like(act), torch.empty_like(act)
        rowwise.gated_backward(
            _by_lane(act, lanes), mlp.d_gate[saved], mlp.d_up[saved],
            _by_lane(gate, lanes), _by_lane(up, lanes),
        )  # fmt: skip
        dh = rowwise.project_back(gate, layer.gate.weight)
        dh += rowwise.project_back(up, layer.up.weight)
        if shown is not None:
            width = gate.shape[1]
            shown.gate_up[piece.rows, :width] = gate
            shown.gate_up[piece.rows, width:] = up
            _scale_products(dh, norm, piece, shown.norm)
        _norm_back(layer.post_norm, norm, piece, dh, dx)
        grad_attended[piece.rows].flatten(1).copy_(rowwise.project_back(grad, layer.o.weight))


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
    for piece in rows.pieces:
        cos, sin = (table[piece.saved][:, None, None] for table in rotary)
        sent: list[tuple[Linear, torch.Tensor]] = []  # a linear layer, the gradient of its output
        if dq is not None:
            grad = rowwise.rotary_backward(_wide(dq, piece, dx), cos, sin, scaling)
            products = None if shown is None else shown.q_norm
            grad = _head_norm_back(layer.q_norm, q_norm, piece, grad, products)
            sent.append((layer.q, grad))
        if dk is not None:
            grad = rowwise.rotary_backward(_wide(dk, piece, dx), cos, sin)
            products = None if shown is None else shown.k_norm
            grad = _head_norm_back(layer.k_norm, k_norm, piece, grad, products)
            sent.append((layer.k, grad))
        if dv is not None:
            sent.append((layer.v, _wide(dv, piece, dx)))
        dh, column = None, 0
        for projection, grad in sent:
            grad = grad.reshape(piece.tokens * piece.lanes, -1)
            if shown is not None:
                shown.projected[piece.rows, column : column + grad.shape[1]] = grad
                column += grad.shape[1]
            part = rowwise.project_back(grad, projection.weight)
            dh = part if dh is None else dh.add_(part)
        if dh is not None:
            if shown is not None:
                _scale_products(dh, norm, piece, shown.norm)
            _norm_back(layer.input_norm, norm, piece, dh, dx)


def linear_backward(grad: torch.Tensor, layer: Linear) -> torch.Tensor:
    return rowwise.linear_backward(grad, layer.weight)


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    return rowwise.linear(x, layer.weight, layer.bias)


def _norm(x: torch.Tensor, eps: float, tape: NormTape, piece: Piece) -> NormTape:
    """RMSNorm of a forward piece, written to where it is kept."""
    if isinstance(piece.saved, slice):
        kept = tape[piece.saved]
        kept.rstd.copy_(rowwise.rms_norm(x, eps, kept.normed))
        return kept
    normed = torch.empty_like(x, dtype=tape.normed.dtype)
    return NormTape(normed, rowwise.rms_norm(x, eps, normed))


def _heads(
    h: torch.Tensor,  # [n, H]
    projection: Linear,
    weight: torch.Tensor | None,
    tape: NormTape | None,
    piece: Piece,
    eps: float,
    head_dim: int,
) -> torch.Tensor:
    """A projection as `[n, heads, head_dim]`, normalised per head where the family does."""
    y = rowwise.project(h, projection.weight, projection.bias).view(len(h), -1, head_dim)
    if weight is None or tape is None:
        return y
    return (_norm(y, eps, tape, piece).normed * weight).to(y.dtype)


def _norm_back(
    weight: torch.Tensor,
    tape: NormTape,
    piece: Piece,
    grad: torch.Tensor,  # [rows, H] of the norm's output, overwritten
    out: torch.Tensor,  # [all rows, H], added to
) -> None:
    assert piece.saved is not None
    kept = tape[piece.saved]
    out = _by_lane(out[piece.rows], piece.lanes)
    rowwise.rms_norm_backward(_by_lane(grad, piece.lanes), weight, kept.normed, kept.rstd, out)


def _head_norm_back(
    weight: torch.Tensor | None,
    tape: NormTape | None,
    piece: Piece,
    grad: torch.Tensor,  # [tokens, lanes, heads, head_dim], overwritten
    products: torch.Tensor | None,  # [all rows, head_dim], where linear layers are read
) -> torch.Tensor:
    """Back through the per-head norm of families that have one."""
    if weight is None or tape is None:
        return grad
    assert piece.saved is not None
    kept = tape[piece.saved]
    if products is not None:
        by_lane = _by_lane(products[piece.rows], piece.lanes)
        by_lane.copy_((grad * kept.normed[:, None]).sum(2))
    out = torch.zeros_like(grad)
    # Heads are rows of their own: [tokens, heads, lanes, d] reads what [tokens, heads, d] saved.
    by_head = grad.transpose(1, 2)
    rowwise.rms_norm_backward(by_head, weight, kept.normed, kept.rstd, out.transpose(1, 2))
    return out


def _scale_products(
    grad: torch.Tensor,  # [rows, X] of the norm's output
    tape: NormTape,
    piece: Piece,
    out: torch.Tensor,  # [all rows, X]
) -> None:
    lanes = piece.lanes
    normed = tape.normed[piece.saved][:, None]
    torch.mul(_by_lane(grad, lanes), normed, out=_by_lane(out[piece.rows], lanes))


def _wide(grad: torch.Tensor, piece: Piece, dx: torch.Tensor) -> torch.Tensor:
    """A piece of `[B, heads, head_dim]` as `[tokens, lanes, heads, head_dim]`, float32 or wider."""
    part = grad[piece.rows].to(dx.dtype)
    return part.view(piece.tokens, piece.lanes, *part.shape[1:])


def _by_lane(rows: torch.Tensor, lanes: int) -> torch.Tensor:
    """`[tokens * lanes, X]` as `[tokens, lanes, X]`."""
    return rows.view(-1, lanes, rows.shape[-1])
