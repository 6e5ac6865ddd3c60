"""The plain PyTorch stages against automatic differentiation in float64.

What the four families use is compared with the reference decoder in test_engine.py; here is what
they do not use yet: other activations and capped scores.
"""

from __future__ import annotations

import pytest
import torch
from engine_scores import FLOAT64
from patterns import PATTERNS, Batch
from torch import Tensor
from torch.nn import functional as F

from g2r_fast import ops
from g2r_fast.backends import Backend
from g2r_fast.families import LayerWeights, Linear
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.reference import relative_error
from g2r_fast.tables import Piece, RowMap, backward_queries, forward_queries
from g2r_fast.tape import MlpTape, NormTape

REFERENCE = Backend("reference")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
H, M, A, V, D = 12, 20, 4, 2, 6  # hidden, intermediate, heads, kv heads, head_dim
EPS = 1e-5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_layer() -> LayerWeights:
    def linear(n: int, k: int, seed: int) -> Linear:
        return Linear(normal(n, k, seed=seed) * k**-0.5, normal(n, seed=seed + 1))

    return LayerWeights(
        name="layer",
        input_norm=1 + normal(H, seed=1),
        q=linear(A * D, H, 2),
        k=linear(V * D, H, 4),
        v=linear(V * D, H, 6),
        o=linear(H, A * D, 8),
        q_norm=None,
        k_norm=None,
        post_norm=1 + normal(H, seed=10),
        gate=linear(M, H, 11),
        up=linear(M, H, 13),
        down=linear(H, M, 15),
        window=None,
    )


def mlp(layer: LayerWeights, x: Tensor, attended: Tensor, activation: str) -> Tensor:
    """`mlp_forward` as anybody writes it."""
    x = x + F.linear(attended.flatten(1), layer.o.weight, layer.o.bias)
    h = F.rms_norm(x, (H,), layer.post_norm, EPS)
    gate, up = (F.linear(h, part.weight, part.bias) for part in (layer.gate, layer.up))
    return x + F.linear(ACTIVATIONS[activation](gate) * up, layer.down.weight, layer.down.bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str) -> None:
    """Rows 3 to 9 of 9 are kept; two lanes come back through them, the last row first."""
    layer, rows, kept, lanes = random_layer(), 9, 6, 2
    x, attended = normal(rows, H, seed=20), normal(rows, A, D, seed=21)
    expected = mlp(layer, x, attended, activation)
    done = x.clone()
    norm = NormTape(x.new_empty(kept, H), x.new_empty(kept))
    tape = MlpTape(x.new_empty(kept, M), x.new_empty(kept, M))
    forward = RowMap((Piece(slice(0, 3), None), Piece(slice(3, 9), slice(0, 6))))
    assert forward.index.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5]
    ops.mlp_forward(
        REFERENCE, layer, done, attended, forward, norm, tape, eps=EPS, activation=activation
    )
    assert relative_error(done, expected) <= FLOAT64

    order = torch.tensor([5, 0, 1, 2, 3, 4])
    backward = RowMap(
        (Piece(slice(0, 2), order[:1], lanes), Piece(slice(2, 12), slice(0, 5), lanes))
    )
    saved = backward.index.long()
    assert saved.tolist() == order.repeat_interleave(lanes).tolist()
    grad = normal(kept * lanes, H, seed=22)
    dx, grad_attended = grad.clone(), x.new_empty(kept * lanes, A, D)
    ops.mlp_backward(REFERENCE, layer, dx, backward, norm, tape, grad_attended)
    leaves = (x[3:][saved].requires_grad_(), attended[3:][saved].requires_grad_())
    expected = torch.autograd.grad(mlp(layer, *leaves, activation), leaves, grad)
    assert relative_error(dx, expected[0]) <= FLOAT64
    assert relative_error(grad_attended, expected[1]) <= FLOAT64


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float) -> Tensor:
    """One sequence, `[n, heads, D]`, by the definition."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qad,kad->aqk", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(q))
    hidden = at[None] > at[:, None]
    if window is not None:
        hidden |= at[None] <= at[:, None] - window
    return torch.einsum("aqk,kad->qad", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def planned(batch: Batch) -> PackedPlan:
    spans = zip(batch.input_ids, batch.spans, strict=True)
    return PackedPlan.build(PackedSequence(ids, start) for ids, (start, _) in spans)


def rows_of(plan: PackedPlan, sequence: int) -> Tensor:
    """Forward rows of a sequence, by position."""
    through = [s for s in plan.segments if sequence in s.members]
    return torch.cat([torch.arange(s.row, s.row + len(s)) for s in through])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention(pattern: str, softcap: float, window: int | None) -> None:
    plan = planned(PATTERNS[pattern]())
    q = normal(plan.rows, A, D, seed=30)
    k, v = (normal(plan.rows, V, D, seed=seed) for seed in (31, 32))
    out, lse = torch.empty_like(q), q.new_empty(plan.rows, A)
    options = {"window": window, "softcap": softcap}
    ops.attention_forward(REFERENCE, forward_queries(plan), q, k, v, out, lse, **options)

    kept = [s for s in plan.segments if s.saved_row is not None]
    saved_rows = torch.cat([torch.arange(s.row, s.row + len(s)) for s in kept])
    chosen = range(0, len(plan.sequences), 2)
    backward = plan.backward(chosen)
    grad_out = normal(backward.rows, A, D, seed=33)
    dq = torch.empty_like(grad_out)
    dk, dv = (q.new_empty(backward.rows, V, D) for _ in range(2))
    queries = backward_queries(plan, backward, saved_rows)
    ops.attention_backward(
        REFERENCE, queries, q[saved_rows], k, v, None, lse[saved_rows], grad_out, dq, dk, dv,
        **options,
    )  # fmt: skip
    for sequence in range(len(plan.sequences)):
        rows = rows_of(plan, sequence)
        leaves = [x[rows].requires_grad_() for x in (q, k, v)]
        expected = attention(*leaves, **options)
        assert relative_error(out[rows], expected.detach()) <= FLOAT64
        runs = [run for run in backward.runs if sequence in run.lanes]
        if sequence not in chosen or not runs:
            continue
        here = torch.cat(
            [
                run.row + run.lanes.index(sequence) + torch.arange(run.tokens) * len(run.lanes)
                for run in runs
            ]
        )
        start = runs[0].start
        grads = torch.autograd.grad(expected[start:], leaves, grad_out[here])
        for actual, grad in zip((dq, dk, dv), grads, strict=True):
            assert relative_error(actual[here], grad[start:]) <= FLOAT64


@pytest.mark.parametrize("readout", ["dot", "l1", "l2"])
def test_embedding_scores(readout: str) -> None:
    values, grads = normal(5, H, seed=40), normal(5, 3, H, seed=41)
    expected = {
        "dot": (values[:, None] * grads).sum(-1),
        "l1": grads.abs().sum(-1),
        "l2": grads.square().sum(-1).sqrt(),
    }[readout]
    assert relative_error(ops.embedding_scores(values, grads, readout), expected) <= FLOAT64
    narrow = ops.embedding_scores(values.float(), grads.float(), readout)
    assert narrow.dtype == torch.float32 and relative_error(narrow, expected) <= 1e-6


def test_a_weight_that_is_upcast_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2r_fast.eager.rows._STRETCH_ELEMENTS", 3 * H)
    head = Linear(normal(7, H, seed=50).bfloat16(), normal(7, seed=51).bfloat16())
    x, grad = normal(4, H, seed=52).bfloat16(), normal(4, 7, seed=53).float()
    logits = ops.linear(REFERENCE, x, head)
    assert logits.dtype == torch.float32
    expected = F.linear(x.double(), head.weight.double(), head.bias.double())
    assert relative_error(logits, expected) <= 1e-6
    back = ops.linear_backward(REFERENCE, grad, head)
    assert relative_error(back, grad.double() @ head.weight.double()) <= 1e-6
