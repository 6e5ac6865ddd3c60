"""The Triton kernels of rows against float64: under the interpreter, or on a GPU.

Two rules judge a kernel, and neither has an absolute tolerance: inputs for which float32 is exact
give equal bits; random inputs stay within a forward-error bound. Every output starts as NaN, and
what no row of the index names must still be NaN afterwards. Both rules must catch every bug planted
below.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import gated as gated_module
from g2r_fast.kernels import gated_backward as gated_backward_module
from g2r_fast.kernels import head_norm_products as head_norm_products_module
from g2r_fast.kernels import heads as heads_module
from g2r_fast.kernels import heads_backward as heads_backward_module
from g2r_fast.kernels import rms_norm as rms_norm_module
from g2r_fast.kernels import rms_norm_backward as rms_norm_backward_module
from g2r_fast.kernels.configs import WIDEST, row_config
from g2r_fast.kernels.gated import gated
from g2r_fast.kernels.gated_backward import gated_backward
from g2r_fast.kernels.head_norm_products import head_norm_products
from g2r_fast.kernels.heads import heads
from g2r_fast.kernels.heads_backward import heads_backward
from g2r_fast.kernels.rms_norm import rms_norm
from g2r_fast.kernels.rms_norm_backward import rms_norm_backward
from triton_row_cases import (
    CASES,
    CHAIN,
    DEVICE,
    DTYPES,
    FLOAT32,
    KEPT,
    NAN,
    ON_GPU,
    STORAGE,
    Case,
    Make,
    index_of,
)

from g2r_fast.errors import InputError, InputTypeError

# Padding, and activations at their limits, in NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def run(case: Case, bug: Callable[..., None] | None = None) -> dict[str, Tensor]:
    """The outputs of a call; a planted bug may change what it reads or what it wrote."""
    inputs = {name: value.clone() for name, value in case.inputs.items()}
    outputs = {name: value.clone() for name, value in case.outputs.items()}
    if bug in MISREADS:
        bug(inputs)
    case.call(out=outputs, **inputs)
    if bug is not None and bug not in MISREADS:
        for out in outputs.values():
            bug(out)
    return outputs


def near(value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """`value` as `dtype` may hold it; it is exact in float32."""
    nearest = [value.float().to(dtype)]
    if dtype == torch.bfloat16 and not ON_GPU:
        nearest.append((value.float().view(torch.int32) & -65536).view(torch.float32).to(dtype))
    return nearest


def equal_bits(make: Make, dtype: torch.dtype, bug: Callable[..., None] | None = None) -> bool:
    case = make("exact", dtype)
    for name, out in run(case, bug).items():
        value = case.truth[name][0]
        same = out.isnan() & value.isnan()
        for rounded in near(value, out.dtype):
            same |= out == rounded
        if not same.all():
            return False
    return True


def within_bound(make: Make, dtype: torch.dtype, bug: Callable[..., None] | None = None) -> bool:
    case = make("random", dtype)
    for name, out in run(case, bug).items():
        value, size = case.truth[name]
        # The rows of a norm, their product with the weight and the result are rounded; what is
        # too small for float16 as a normal number keeps no relative precision.
        bound = CHAIN * FLOAT32 * size + 3 * (STORAGE[out.dtype] * size)
        if out.dtype == torch.float16:
            bound += 2.0**-24
        fine = (out.isnan() & value.isnan()) | ((out.double() - value).abs() <= bound)
        if not fine.all() or not out.nan_to_num().norm() > 0:
            return False
    return True


RULES = [equal_bits, within_bound]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_right(case, dtype, rule):
    assert rule(CASES[case], dtype)


# Each changes what a kernel wrote, or what it reads, and has the fault in its name.
def last_column_not_written(out):
    out[..., -1] = NAN


def scale_off_by_1_percent(out):
    out *= 1.01


def scale_off_by_0_1_percent(out):
    out *= 1.001


def two_rows_swapped(out):
    out[[0, 1]] = out[[1, 0]]


def all_zero(out):
    out.zero_()


def index_ignored(inputs):
    inputs["index"] = torch.arange(len(inputs["index"]), device=DEVICE, dtype=torch.int32) % KEPT


def next_row_read(inputs):
    inputs["index"] = torch.where(inputs["index"] < 0, -1, (inputs["index"] + 1) % KEPT)


def last_column_not_read(inputs):
    for name in ("x", "grad", "gate", "source", "dq"):
        if name in inputs:
            inputs[name][..., -1] = 0


def sign_of_the_rotation(inputs):
    inputs["sin"].neg_()


def weight_ignored(inputs):
    for name in inputs:
        if name.endswith("weight"):
            inputs[name].fill_(1)


MISREADS = [
    index_ignored,
    next_row_read,
    last_column_not_read,
    sign_of_the_rotation,
    weight_ignored,
]
PLANTED = [
    last_column_not_written,
    scale_off_by_1_percent,
    scale_off_by_0_1_percent,
    two_rows_swapped,
    all_zero,
    *MISREADS,
]
WITNESSES = [
    "rms_norm 1100 add",
    "rms_norm_backward 1100 rounded",
    "gated 1037 silu keep",
    "gated_backward 1037",
    "heads (3, 1, 1) 16 norm",
    "heads_backward (3, 1, 1) 16 norm",
    "products of heads 3 14",
]


def concerns(bug: Callable[..., None], case: str) -> bool:
    if bug is sign_of_the_rotation:
        return "heads" in case
    return bug is not weight_ignored or "norm" in case


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("case", "bug"), [(c, bug) for c in WITNESSES for bug in PLANTED if concerns(bug, c)]
)
def test_every_rule_catches_every_planted_bug(case, bug, rule):
    assert not rule(CASES[case], torch.float32, bug)


def test_inputs_are_left_as_they_were():
    for name in WITNESSES:
        case = CASES[name]("random", torch.bfloat16)
        before = {key: value.clone() for key, value in case.inputs.items()}
        outputs = {key: value.clone() for key, value in case.outputs.items()}
        case.call(out=outputs, **case.inputs)
        assert all(torch.equal(before[key], case.inputs[key]) for key in before), name


def test_a_gate_may_be_overwritten():
    case = CASES["gated 1037 silu keep"]("random", torch.float32)
    expected = run(case)
    gate = case.inputs["gate"].clone()
    d_gate, d_up = (torch.empty_like(expected[name]) for name in ("d_gate", "d_up"))
    gated(gate, case.inputs["up"], case.inputs["index"], gate, d_gate, d_up)
    assert torch.equal(gate, expected["out"])


def test_no_rows():
    nothing = torch.zeros(0, 8, device=DEVICE)
    index, kept, ones = index_of([]), torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    rstd = torch.ones(2, device=DEVICE)
    rms_norm(nothing, ones, index, nothing, kept, rstd, eps=1e-5)
    rms_norm_backward(nothing, ones, index, kept, rstd, nothing)
    gated(nothing, nothing, index, nothing, kept, kept)
    gated_backward(nothing, index, kept, kept, nothing.view(0, 2, 8)[:, :, :8])
    heads(
        nothing, nothing[:, :4].contiguous(), nothing[:, :4].contiguous(), index, q=nothing[:, None]
    )
    heads_backward(
        kept[:, :4].contiguous(), kept[:, :4].contiguous(), index, nothing, dq=nothing[:, None]
    )
    four = kept[:, :4].contiguous()
    head_norm_products(nothing[:, None], four, four, index, kept[:, None], nothing)
    assert kept.eq(1).all()


X = torch.ones(2, 8, device=DEVICE)
W, RSTD, INDEX = X[0], torch.ones(2, device=DEVICE), index_of([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(X.double(), W, INDEX, X, X, RSTD, eps=0.0), InputError, "x has an"),
        (lambda: rms_norm(X, W, INDEX, X.half(), X, RSTD, eps=0.0), InputError, "normed has an"),
        (lambda: rms_norm(X, W[:7], INDEX, X, X, RSTD, eps=0.0), InputError, "weight has another"),
        (lambda: rms_norm(X, W, INDEX.long(), X, X, RSTD, eps=0.0), InputTypeError, "index"),
        (lambda: rms_norm(X, W, INDEX[:1], X, X, RSTD, eps=0.0), InputError, "index"),
        (lambda: rms_norm(X, W, INDEX, X, X, RSTD[:1], eps=0.0), InputError, "rstd has another"),
        (lambda: rms_norm_backward(X.T, W, INDEX, X, RSTD, X), InputError, "grad has an unusable"),
        (lambda: rms_norm_backward(X, W, INDEX, X, RSTD, X, X[:1]), InputError, "rounded has an"),
        (lambda: row_config(WIDEST + 1), InputError, "unusable width"),
        (lambda: gated(X, X, INDEX, X, X, X, activation="relu"), InputError, "unknown activation"),
        (lambda: gated(X, X[:1], INDEX, X, X, X), InputError, "up has another shape"),
        (lambda: gated(X, X, INDEX, X, X, X, X[:1]), InputError, "kept_out has another shape"),
        (lambda: gated_backward(X, INDEX, X, X, X), InputError, "out has another shape"),
        (lambda: heads(X, X, X, INDEX, q=X[:, None]), InputError, "q has another shape"),
        (
            lambda: head_norm_products(X[:, None], X, X, INDEX, X[:, None], X),
            InputError,
            "cos has another shape",
        ),
        (
            lambda: head_norm_products(
                X[:, None], X.view(4, 4), X.view(4, 4), INDEX, X[:, None], X
            ),
            InputError,
            "normed has another shape",
        ),
        (
            lambda: heads(
                X, X[:, :2].contiguous(), X[:, :2].contiguous(), INDEX, q=X.view(2, 1, 8)
            ),
            InputError,
            "q has another shape",
        ),
        (
            lambda: heads_backward(
                X.view(4, 4), X.view(4, 4), INDEX, X, dq=X[:, None], dk=X[:, None]
            ),
            InputError,
            "out does not hold the heads",
        ),
    ],
)
def test_bad_arguments_are_told_apart(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_kernel_file_lists_what_it_ships():
    modules = [
        rms_norm_module,
        rms_norm_backward_module,
        gated_module,
        gated_backward_module,
        heads_module,
        heads_backward_module,
        head_norm_products_module,
    ]
    names = [case.name for module in modules for case in module.compile_cases()]
    assert len(names) == len(set(names)) > 100
