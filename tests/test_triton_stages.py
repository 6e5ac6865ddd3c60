"""The stages on Triton kernels against the plain PyTorch ones in float64.

Under the interpreter on the CPU, or on the device if there is one. Sizes are multiples of nothing;
some rows are kept, single rows are read by several lanes, and what nobody writes stays NaN.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast import triton_stages
from g2r_fast.eager import stages as eager_stages
from g2r_fast.families import LayerWeights, Linear
from g2r_fast.reference import relative_error
from g2r_fast.tables import Piece, RowMap
from g2r_fast.tape import MlpGrads, MlpTape, NormTape, QkvGrads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, M, A, V, D = 37, 53, 4, 2, 14  # hidden, intermediate, heads, kv heads, head_dim
EPS, SCALING = 1e-5, 0.3
NAN = float("nan")
# Against float64 from the same inputs. A stage rounds to the storage dtype six times or so; the
# interpreter cuts bfloat16, which is twice as far off, and always in one direction.
BOUND = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}

FORWARD = RowMap(
    (
        Piece(slice(0, 3), slice(0, 3)),
        Piece(slice(3, 7), None),
        Piece(slice(7, 12), slice(3, 8)),
        Piece(slice(12, 13), None),
    )
)
ROWS, KEPT = 13, 9  # the last kept row is nobody's
KEPT_ROWS = [0, 1, 2, 7, 8, 9, 10, 11]
# Single reads, one lane, two lanes of some, three of one; some kept rows have no lane at all.
BACKWARD = RowMap(
    (
        Piece(slice(0, 3), torch.tensor([6, 0, 6])),
        Piece(slice(3, 5), slice(1, 3)),
        Piece(slice(5, 11), slice(2, 5), 2),
        Piece(slice(11, 14), slice(7, 8), 3),
    )
)
COTANGENTS = 14


class Draw:
    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        value = torch.randn(shape, generator=self.generator) * scale
        return value.to(DEVICE, dtype or self.dtype)


def layer_of(draw: Draw, bias: bool, norms: bool) -> LayerWeights:
    def linear(n: int, k: int) -> Linear:
        return Linear(draw(n, k, scale=k**-0.5), draw(n) if bias else None)

    def norm(n: int) -> Tensor:
        return (1 + 0.1 * draw(n, dtype=torch.float32)).to(draw.dtype)

    # As Qwen2 has it: a bias for q and k; v has none where they have, to join both kinds.
    return LayerWeights(
        name="layer",
        input_norm=norm(H),
        q=linear(A * D, H),
        k=linear(V * D, H),
        v=replace(linear(V * D, H), bias=None),
        o=linear(H, A * D),
        q_norm=norm(D) if norms else None,
        k_norm=norm(D) if norms else None,
        post_norm=norm(H),
        gate=linear(M, H),
        up=linear(M, H),
        down=linear(H, M),
        window=None,
    )


def double(part: Any) -> Any:
    """The same, every float tensor in it float64."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if is_dataclass(part):
        values = {f.name: double(getattr(part, f.name)) for f in fields(part) if f.init}
        return type(part)(**values)
    if isinstance(part, (tuple, list)):
        return type(part)(double(one) for one in part)
    return {k: double(v) for k, v in part.items()} if isinstance(part, dict) else part


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=DEVICE)


def empty_norm(dtype: torch.dtype, *shape: int) -> NormTape:
    return NormTape(empty(*shape, dtype=dtype), empty(*shape[:-1], dtype=torch.float32))


def assert_close(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Tensor by tensor, and NaN where the truth is."""
    if isinstance(got, Tensor):
        assert torch.equal(got.isnan(), expected.isnan())
        assert got.nan_to_num().norm() > 0
        error = relative_error(got.nan_to_num().double(), expected.nan_to_num())
        assert error <= BOUND[dtype], error
    elif is_dataclass(got):
        for f in fields(got):
            assert_close(getattr(got, f.name), getattr(expected, f.name), dtype)
    elif isinstance(got, (tuple, list)):
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, dtype)
    else:
        assert got is None and expected is None


def tables(draw: Draw, rows: int) -> tuple[Tensor, Tensor]:
    angles = draw(rows, D // 2, dtype=torch.float32)
    return angles.cos(), angles.sin()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("asked", ["qkv", "kv", "q", ""])
@pytest.mark.parametrize(("bias", "norms"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_forward(dtype: torch.dtype, bias: bool, norms: bool, asked: str) -> None:
    draw = Draw(dtype)
    layer, x, rotary = layer_of(draw, bias, norms), draw(ROWS, H).float(), tables(draw, ROWS)
    counts = {"q": A, "k": V, "v": V}
    made = {n: empty(ROWS, c, D, dtype=dtype) if n in asked else None for n, c in counts.items()}
    made |= {
        f"{n}_norm": empty_norm(dtype, KEPT, counts[n], D) if norms and n in asked else None
        for n in "qk"
    }
    norm = empty_norm(dtype, KEPT, H)
    before = x.clone()
    expected, expected_norm = double(made), double(norm)
    options = {"eps": EPS, "scaling": SCALING}
    eager_stages.qkv_forward(
        double(layer), x.double(), double(rotary), FORWARD, expected_norm, **expected, **options
    )
    triton_stages.qkv_forward(layer, x, rotary, FORWARD, norm, **made, **options)
    assert torch.equal(x, before)
    assert_close(norm, expected_norm, dtype)
    assert_close(list(made.values()), list(expected.values()), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("bias", "keep"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_forward(dtype: torch.dtype, bias: bool, keep: bool, activation: str) -> None:
    draw = Draw(dtype)
    layer, x, attended = layer_of(draw, bias, False), draw(ROWS, H).float(), draw(ROWS, A, D)
    norm = empty_norm(dtype, KEPT, H)
    mlp = MlpTape(*(empty(KEPT, M, dtype=dtype) for _ in range(3 if keep else 2)))
    expected = double((x, norm, mlp))
    options = {"eps": EPS, "activation": activation}
    eager_stages.mlp_forward(
        double(layer), expected[0], attended.double(), FORWARD, *expected[1:], **options
    )
    triton_stages.mlp_forward(layer, x, attended, FORWARD, norm, mlp, **options)
    assert_close((x, norm, mlp), expected, dtype)


def saved_norm(draw: Draw, *shape: int) -> NormTape:
    rstd = draw(*shape[:-1], dtype=torch.float32).abs() + 0.5
    return NormTape(draw(*shape), rstd)


@pytest.mark.parametrize("reads", [False, True])  # whether linear layers are read
@pytest.mark.parametrize("width", [M, 4096])  # one product, two products
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_backward(
    dtype: torch.dtype, width: int, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_stages, "_WIDE", 0 if width > M else 4096)
    draw = Draw(dtype)
    layer, dx = layer_of(draw, True, False), draw(COTANGENTS, H, dtype=torch.float32)
    norm, mlp = saved_norm(draw, KEPT, H), MlpTape(draw(KEPT, M), draw(KEPT, M))
    grad_attended = empty(COTANGENTS, A, D, dtype=dtype)
    shown = None
    if reads:
        made = empty(COTANGENTS, 2 * M, dtype=dtype), empty(COTANGENTS, H, dtype=torch.float32)
        shown = MlpGrads(*made)
    expected = double((dx, grad_attended, shown))
    eager_stages.mlp_backward(
        double(layer), expected[0], BACKWARD, double(norm), double(mlp), expected[1],
        shown=expected[2],
    )  # fmt: skip
    triton_stages.mlp_backward(layer, dx, BACKWARD, norm, mlp, grad_attended, shown=shown)
    assert_close((dx, grad_attended, shown), expected, dtype)


@pytest.mark.parametrize("sent", ["qkv", "kv", "q"])
@pytest.mark.parametrize(("norms", "reads"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_backward(dtype: torch.dtype, norms: bool, reads: bool, sent: str) -> None:
    draw = Draw(dtype)
    layer, dx = layer_of(draw, True, norms), draw(COTANGENTS, H, dtype=torch.float32)
    given = {
        f"d{n}": draw(COTANGENTS, c, D, dtype=dtype if n == "q" else torch.float32)
        if n in sent
        else None
        for n, c in (("q", A), ("k", V), ("v", V))
    }
    given |= {
        f"{n}_norm": saved_norm(draw, KEPT, c, D) if norms and n in sent else None
        for n, c in (("q", A), ("k", V))
    }
    norm, rotary = saved_norm(draw, KEPT, H), tables(draw, KEPT)
    shown = None
    if reads:
        width = sum(D * heads for n, heads in (("q", A), ("k", V), ("v", V)) if n in sent)
        wide = {"dtype": torch.float32}
        shown = QkvGrads(
            empty(COTANGENTS, width, dtype=dtype),
            empty(COTANGENTS, H, **wide),
            *(empty(COTANGENTS, D, **wide) if n in sent else None for n in "qk"),
        )
    expected = double((dx, shown))
    eager_stages.qkv_backward(
        double(layer), expected[0], BACKWARD, double(norm), double(rotary),
        **double(given), scaling=SCALING, shown=expected[1],
    )  # fmt: skip
    triton_stages.qkv_backward(
        layer, dx, BACKWARD, norm, rotary, **given, scaling=SCALING, shown=shown
    )
    assert_close((dx, shown), expected, dtype)


def test_small_gradients_do_not_vanish_in_float16() -> None:
    """As small as 2^-40, from row to row: below what float16 holds."""
    draw = Draw(torch.float16)
    layer, norm = layer_of(draw, True, True), saved_norm(draw, KEPT, H)
    mlp, rotary = MlpTape(draw(KEPT, M), draw(KEPT, M)), tables(draw, KEPT)
    tiny = 2.0 ** (-40 + 3 * torch.arange(COTANGENTS, device=DEVICE).float())
    dx, again = (draw(COTANGENTS, H, dtype=torch.float32) * tiny[:, None] for _ in range(2))
    grad_attended = empty(COTANGENTS, A, D, dtype=torch.float32)
    expected, expected_again = double((dx, grad_attended)), again.double()
    eager_stages.mlp_backward(
        double(layer), expected[0], BACKWARD, double(norm), double(mlp), expected[1],
        shown=None,
    )  # fmt: skip
    triton_stages.mlp_backward(layer, dx, BACKWARD, norm, mlp, grad_attended, shown=None)
    given = {
        "dq": None,
        "dk": draw(COTANGENTS, V, D, dtype=torch.float32) * tiny[:, None, None],
        "dv": draw(COTANGENTS, V, D, dtype=torch.float32) * tiny[:, None, None],
        "q_norm": None,
        "k_norm": saved_norm(draw, KEPT, V, D),
    }
    eager_stages.qkv_backward(
        double(layer), expected_again, BACKWARD, double(norm), double(rotary),
        **double(given), scaling=SCALING, shown=None,
    )  # fmt: skip
    triton_stages.qkv_backward(
        layer, again, BACKWARD, norm, rotary, **given, scaling=SCALING, shown=None
    )
    for row in range(COTANGENTS):
        got, truth = (dx, grad_attended, again), (*expected, expected_again)
        for one, other in zip(got, truth, strict=True):
            assert relative_error(one[row].double(), other[row]) <= BOUND[torch.float16]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most in (32768, 5):
        monkeypatch.setattr(triton_stages, "_CHUNK", most)
        monkeypatch.setattr(triton_stages, "_GRANULE", 1)
        draw = Draw(torch.float32)
        layer, x, attended = layer_of(draw, True, True), draw(ROWS, H), draw(ROWS, A, D)
        norm, mlp = empty_norm(torch.float32, KEPT, H), MlpTape(draw(KEPT, M), draw(KEPT, M))
        triton_stages.mlp_forward(
            layer, x, attended, FORWARD, norm, mlp, eps=EPS, activation="silu"
        )
        dx, grad = draw(COTANGENTS, H), draw(COTANGENTS, A, D)
        filled = NormTape(norm.normed.nan_to_num(1), norm.rstd.nan_to_num(1))
        triton_stages.mlp_backward(layer, dx, BACKWARD, filled, mlp, grad, shown=None)
        results.append((x, norm, mlp, dx, grad))
    assert_close(results[1], double(results[0]), torch.float32)


@pytest.mark.parametrize(
    ("rows", "width", "itemsize"),
    [(0, 8, 2), (1, 8, 2), (32768, 8, 2), (32769, 8, 2), (90000, 60000, 4)],
)
def test_chunks_are_even_and_bounded(rows: int, width: int, itemsize: int) -> None:
    chunks = list(triton_stages._chunks(rows, width, itemsize))
    assert [i for c in chunks for i in range(rows)[c]] == list(range(rows))
    sizes = [c.stop - c.start for c in chunks]
    assert all(0 < size <= 32768 + 127 for size in sizes)
    assert all(2 * size * width * itemsize <= 4.1e9 for size in sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool, dtype: torch.dtype) -> None:
    """Float32 from what the storage dtype holds, whichever that is."""
    draw = Draw(dtype)
    layer = Linear(draw(41, H), draw(41) if bias else None)
    x = draw(6, H)
    logits = triton_stages.linear(x, layer)
    assert logits.dtype == torch.float32
    assert relative_error(logits, eager_stages.linear(x.double(), double(layer))) <= 5e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1e9, 500])  # bytes: all rows at once, two at a time
def test_linear_backward(step: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient keeps all of its bits, and loses none by being small."""
    monkeypatch.setattr(triton_stages, "_LOGIT_BYTES", step)
    draw = Draw(dtype)
    layer = Linear(draw(41, H), None)
    grad = draw(7, 41, dtype=torch.float32) * 10.0 ** -torch.arange(7, device=DEVICE)[:, None] / 100
    before = grad.clone()
    back = triton_stages.linear_backward(grad, layer)
    assert back.dtype == torch.float32 and torch.equal(grad, before)
    expected = grad.double() @ layer.weight.double()
    for row, truth in zip(back.double(), expected, strict=True):
        assert relative_error(row, truth) <= 5e-7


@pytest.mark.parametrize("readout", ["dot", "l1", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_scores(dtype: torch.dtype, readout: str) -> None:
    """Values in the storage dtype, gradients in float32; lanes share the values of their token."""
    draw = Draw(dtype)
    values, grads = draw(5, H), draw(5, 3, H, dtype=torch.float32)
    scores = triton_stages.embedding_scores(values, grads, readout)
    expected = eager_stages.rowwise.embedding_scores(values.double(), grads.double(), readout)
    assert scores.dtype == torch.float32
    assert relative_error(scores, expected) <= 5e-7
    assert triton_stages.embedding_scores(values[:0], grads[:0], readout).shape == (0, 3)


def test_no_rows() -> None:
    draw, nothing = Draw(torch.float32), RowMap(())
    layer, x, heads = layer_of(draw, True, True), draw(0, H), draw(0, A, D)
    norm, mlp = empty_norm(torch.float32, 0, H), MlpTape(draw(0, M), draw(0, M))
    rotary, none = tables(draw, 0), {"k_norm": None, "q_norm": None, "scaling": 1.0}
    triton_stages.qkv_forward(
        layer, x, rotary, nothing, norm, q=heads, k=None, v=None, eps=EPS, **none
    )
    triton_stages.mlp_forward(layer, x, heads, nothing, norm, mlp, eps=EPS, activation="silu")
    triton_stages.mlp_backward(layer, x, nothing, norm, mlp, heads, shown=None)
    triton_stages.qkv_backward(
        layer, x, nothing, norm, rotary, dq=heads, dk=None, dv=None, shown=None, **none
    )
    assert triton_stages.linear_backward(draw(0, 41), Linear(draw(41, H), None)).shape == (0, H)


def test_an_index_is_copied_to_a_device_once() -> None:
    device = torch.device(DEVICE)
    index = BACKWARD.index_on(device)
    assert index is BACKWARD.index_on(device)
    assert index.device.type == device.type and torch.equal(index.cpu(), BACKWARD.index)
    assert replace(BACKWARD) == BACKWARD
