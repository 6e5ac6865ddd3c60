"""What a native op cannot use it refuses, by name, before anything is written.

The kernels trust their pointers, sizes and tables, so everything that could lead outside has to be
found here. No test in this file may end in a crash: each bad call is refused, or does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import native_tries as attention
import pytest
import torch
from native_arguments import Draw
from native_calls import Guarded, call_arguments, native, output_shapes, overload, run, schema_names
from native_cases import HEADS, IN_FLOAT64, OPS, TRIES, many_rows, select
from native_oracles import Arguments
from torch import Tensor

__all__ = ["native"]

pytestmark = pytest.mark.usefixtures("native")

IN_FLOAT32 = ("embedding_scores", "residual_sums")  # whatever the model's dtype

# One case of every op that takes everything the op can take.
FULL = {
    "qkv_forward": "biases-norms",
    "mlp_forward": "biases-shown",
    "mlp_backward": "d32-group2-shown",
    "qkv_backward": "qk-norm-d32-group2-shown",
    "attention_forward": "group",
    "attention_backward": "group",
    "linear": "13x208x97-bias",
    "linear_backward": "13x97x208",
    "embedding_scores": "dot-5x3x48",
    "attribution_rewards": "ragged",
    "residual_sums": "ragged",
    "squared_gradient_norms": "65x97-shuffled",
    "squared_row_sums": "row-sums-80-shuffled",
}
# A table may be longer than what is read of it, rewards than what is earned, rows than are named.
MAY_BE_LONGER = {
    *(("attention_forward", name) for name in ("segments", "blocks")),
    *(("attention_backward", name) for name in ("segments", "blocks", "runs", "block_lanes")),
    ("attention_backward", "run_lanes"), ("attribution_rewards", "rewards"),
    ("squared_gradient_norms", "inputs"), ("squared_gradient_norms", "grads"),
    ("squared_row_sums", "x"), ("residual_sums", "sums"),
}  # fmt: skip
# And of any width.
MAY_BE_NARROWER = {("squared_gradient_norms", "inputs"), ("squared_gradient_norms", "grads")}
# Whose dtype is the model's: where it is another, another tensor is found not to agree.
TELLS = {"input_norm", "post_norm", "q", "weight", "inputs"}


def full_arguments(op: str) -> Arguments:
    (case,) = (c for c in select(op, integers=False) if c.name == FULL[op])
    a = call_arguments(op, case.arguments(torch.bfloat16))
    assert all(value is not None for value in a.values())
    return a


def tensors(op: str) -> list[str]:
    """Names of the op's tensors, from its schema-like arguments, without loading anything."""
    (case,) = (c for c in select(op, integers=False) if c.name == FULL[op])
    a = case.arguments(torch.bfloat16)
    names = [n for n, x in a.items() if isinstance(x, Tensor)]
    return list(dict.fromkeys([*names, *output_shapes(op, a)]))


def refuse(op: str, a: Arguments, match: str) -> None:
    """The op raises and writes nothing, neither to its tensors nor beside them."""
    guarded = {}
    for name, x in a.items():
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.is_contiguous():
            guarded[name] = Guarded(x)
    full = a | {name: guard.tensor for name, guard in guarded.items()}
    with pytest.raises((RuntimeError, NotImplementedError), match=match):
        overload(op)(*(full[name] for name in schema_names(op)))
    assert all(guard.unharmed() and guard.unchanged() for guard in guarded.values())


def strided(x: Tensor) -> Tensor | None:
    """The same values with other strides; None where that is not possible."""
    if x.ndim == 1 and len(x) > 1:
        return x.repeat_interleave(2)[::2]
    if x.ndim > 1 and min(x.shape[:2]) > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return None


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in tensors(op)], ids=str
)
def test_every_tensor_is_checked(op: str, name: str) -> None:
    a = full_arguments(op)
    x = a[name]
    other = {torch.bfloat16: torch.float16, torch.float32: torch.float64}.get(x.dtype, torch.int16)
    told = r"dtype" if name in TELLS else rf"\b{name}\b.*dtype"
    refuse(op, a | {name: x.to(other)}, told)
    refuse(op, a | {name: x.long() if x.is_floating_point() else x.float()}, "dtype")
    refuse(op, a | {name: x[None]}, rf"\b{name}\b")
    if (op, name) not in MAY_BE_LONGER:
        refuse(op, a | {name: torch.cat((x, x[-1:]))}, "shape|exist|end|reach|lanes|heads|multiple")
    if x.ndim > 1 and (op, name) not in MAY_BE_NARROWER:
        refuse(op, a | {name: x[..., :-1].contiguous()}, "shape|multiple|heads|suit")
    moved = strided(x)
    if moved is not None:
        refuse(op, a | {name: moved}, rf"\b{name}\b.*contiguous")


@pytest.mark.parametrize("op", [op for op in OPS if op not in IN_FLOAT32 + IN_FLOAT64])
def test_half_precision_of_the_other_kind_is_refused(op: str) -> None:
    def half(x: Any) -> Any:
        return x.half() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x

    refuse(op, {n: half(x) for n, x in full_arguments(op).items()}, "float32 or bfloat16")


def with_entry(name: str, at: tuple[int, ...], value: int) -> Callable[[Arguments], Arguments]:
    def change(a: Arguments) -> Arguments:
        table = a[name].clone()
        table[at] = value
        return {name: table}

    return change


FAR = 2**62
ROWS = [
    (op, name, change)
    for op, name in (
        ("qkv_forward", "keep"),
        ("mlp_forward", "keep"),
        ("qkv_backward", "saved"),
        ("mlp_backward", "saved"),
    )
    for change in (-2, 10**6, 2**31 - 1, -(2**31))
]


@pytest.mark.parametrize(("op", "name", "value"), ROWS)
def test_rows_that_do_not_exist_are_refused(op: str, name: str, value: int) -> None:
    a = full_arguments(op)
    refuse(op, a | with_entry(name, (1,), value)(a), f"{name}.*got {value}; first at index 1")
    if name == "saved":
        refuse(op, a | with_entry(name, (0,), -1)(a), "saved")
    kept = len(a["rstd"])
    refuse(op, a | with_entry(name, (2,), kept)(a), f"{name}.*got {kept}")


SQUARED = [("squared_gradient_norms", "kept"), ("squared_gradient_norms", "rows")]
SQUARED += [("squared_row_sums", "rows")]


@pytest.mark.parametrize("value", [-1, 10**6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("op", "name"), SQUARED)
def test_entries_without_a_row_are_refused(op: str, name: str, value: int) -> None:
    a = full_arguments(op)
    refuse(op, a | with_entry(name, (7,), value)(a), f"{name}.*got {value}; first at index 7")
    of = {"kept": "inputs", "rows": "grads" if "grads" in a else "x"}[name]
    past = len(a[of])
    refuse(op, a | with_entry(name, (2,), past)(a), f"{name}.*row < {past}; got {past}")


# (table, column, values that cannot be): segments of TRIES["group"], in every column.
TABLES = {
    "attention_forward": {
        "segments": [(0, 0, 1), (1, 0, 16), (1, 1, 3), (1, 2, -1), (1, 2, 37), (1, 2, FAR),
                     (2, 3, 2), (2, 3, 6), (2, 3, -2), (2, 3, FAR), (1, 1, FAR), (0, 0, -1)],
        "blocks": [(0, 0, -1), (0, 0, 7), (1, 0, 3), (0, 1, -1), (6, 1, 39), (6, 2, FAR),
                   (0, 2, -1), (3, 1, FAR)],
        "positions": [(0, -1), (16, 17), (2, 0), (20, FAR), (17, 3)],
    },
    "attention_backward": {
        "segments": [(0, 0, 1), (1, 0, 16), (1, 1, 3), (1, 2, 37), (1, 2, FAR), (2, 3, 2),
                     (2, 3, -2), (1, 1, FAR)],
        "blocks": [(0, 0, -1), (0, 0, 7), (0, 1, -1), (5, 2, FAR), (0, 2, -1), (0, 3, -1),
                   (0, 3, FAR), (5, 3, 60), (0, 4, -1), (0, 4, FAR), (0, 5, -1), (0, 5, FAR),
                   (5, 4, 40), (0, 5, 100)],
        "runs": [(0, 0, -1), (0, 0, 7), (0, 0, 2), (0, 1, -1), (0, 1, FAR), (5, 1, 60), (0, 2, 4),
                 (0, 2, FAR), (0, 3, -1), (0, 3, FAR), (0, 4, -1), (0, 4, FAR), (0, 4, 100)],
        "positions": [(0, -1), (0, 3), (2, 17), (3, FAR)],
    },
    "attribution_rewards": {
        "offsets": [(0, 1), (0, -1), (1, -1), (1, 4), (1, FAR), (2, 2), (17, 0), (17, 1589),
                    (17, 1591), (17, FAR)],
        "starts": [(0, -1), (0, FAR), (0, -FAR), (12, 1500), (1, 10**4), (11, 2**63 - 1)],
    },
    "residual_sums": {
        "targets": [(0, -1), (0, FAR), (0, -FAR), (15, 97), (7, 2**63 - 1)],
        "owners": [(0, -1), (0, FAR), (15, -FAR), (3, 5), (15, 2**63 - 1)],
    },
    # Lanes of 5, 0, 1, 6, 63, 64, 65, 0, 2, 200, 71, 7 and no entries.
    "squared_gradient_norms": {
        "offsets": [(0, 1), (0, -1), (1, -1), (1, 6), (2, 4), (1, FAR), (1, -FAR), (13, 483),
                    (13, 485), (13, FAR), (12, 485)],
    },
    "squared_row_sums": {
        "offsets": [(0, 1), (1, 6), (2, 4), (1, FAR), (14, 1583), (14, 1585)],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "table", "entry"),
    [(op, table, entry) for op in TABLES for table in TABLES[op] for entry in TABLES[op][table]],
    ids=str,
)
def test_tables_that_lead_outside_are_refused(op: str, table: str, entry: tuple[int, ...]) -> None:
    a = full_arguments(op)
    *at, value = entry
    assert int(a[table][tuple(at)]) != value
    refuse(op, a | with_entry(table, tuple(at), value)(a), "expected .*; got .*")


@pytest.mark.parametrize("value", [-1, -FAR, FAR])
@pytest.mark.parametrize("table", ["block_lanes", "run_lanes"])
def test_lanes_that_cannot_be_names_are_refused(table: str, value: int) -> None:
    """A kernel may look lanes up in memory of its own."""
    a = full_arguments("attention_backward")
    refuse("attention_backward", a | with_entry(table, (0,), value)(a), "lane")


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("qkv_forward", {"head_dim": 0}, "head_dim"),
    ("qkv_forward", {"head_dim": -16}, "head_dim"),
    ("qkv_forward", {"head_dim": 8}, "head_dim"),
    ("qkv_forward", {"head_dim": 512}, "head_dim"),
    ("qkv_forward", {"head_dim": 48}, "multiple of 48"),
    ("qkv_forward", {"eps": -1.0}, "eps"),
    ("qkv_forward", {"eps": float("nan")}, "eps"),
    ("qkv_forward", {"scaling": float("inf")}, "scaling"),
    ("qkv_forward", {"q": None}, "q is missing"),
    ("qkv_forward", {"v": None}, "v is missing"),
    ("qkv_forward", {"q_normed": None}, "q_normed is missing"),
    ("qkv_forward", {"k_rstd": None}, "k_rstd is missing"),
    ("mlp_forward", {"activation": 3}, "activation"),
    ("mlp_forward", {"activation": -1}, "activation"),
    ("mlp_forward", {"eps": float("nan")}, "eps"),
    ("qkv_backward", {"head_dim": 24}, "head_dim"),
    ("qkv_backward", {"wq": None}, "wq is missing"),
    ("qkv_backward", {"wv": None}, "wv is missing"),
    ("qkv_backward", {"q_rstd": None}, "q_rstd is missing"),
    ("qkv_backward", {"k_normed": None}, "k_normed is missing"),
    ("mlp_backward", {"gate_up": None}, "gate_up is missing"),
    ("mlp_backward", {"norm_products": None}, "norm_products is missing"),
    ("qkv_backward", {"projected": None}, "projected is missing"),
    ("qkv_backward", {"norm_products": None}, "norm_products is missing"),
    ("qkv_backward", {"q_norm_products": None}, "q_norm_products is missing"),
    ("qkv_backward", {"k_norm_products": None}, "k_norm_products is missing"),
    ("qkv_backward", {"projected": None, "norm_products": None}, "projected is missing"),
    ("qkv_backward", {"dq": None}, "q_norm_products is there; expected None"),
    ("qkv_backward", {"dk": None}, "k_norm_products is there; expected None"),
    ("attention_forward", {"window": -1}, "window"),
    ("attention_forward", {"softcap": -1.0}, "softcap"),
    ("attention_forward", {"softcap": float("nan")}, "softcap"),
    ("attention_backward", {"window": -1}, "window"),
    ("attention_backward", {"softcap": float("inf")}, "softcap"),
    ("attention_backward", {"out": None}, "out is missing"),
    ("embedding_scores", {"readout": 3}, "readout"),
    ("embedding_scores", {"readout": -1}, "readout"),
    ("attribution_rewards", {"temperature": 0.0}, "temperature"),
    ("attribution_rewards", {"temperature": -1.0}, "temperature"),
    ("attribution_rewards", {"temperature": float("nan")}, "temperature"),
    ("attribution_rewards", {"temperature": float("inf")}, "temperature"),
    *(
        ("residual_sums", {"temperature": temperature}, "temperature")
        for temperature in (0.0, -1.0, 1e-31, 1e31, float("nan"), float("inf"))
    ),
]


@pytest.mark.parametrize(("op", "changed", "message"), SETTINGS, ids=str)
def test_settings_that_cannot_be_are_refused(
    op: str, changed: dict[str, Any], message: str
) -> None:
    refuse(op, full_arguments(op) | changed, message)


def narrowed(a: Arguments, sizes: dict[str, tuple[int, int]]) -> Arguments:
    return {n: a[n].narrow(axis, 0, size).contiguous() for n, (axis, size) in sizes.items()}


@pytest.mark.parametrize(
    ("op", "sizes", "message"),
    [
        ("linear", {"x": (1, 40), "weight": (1, 40)}, "multiple of 16"),
        ("linear", {"x": (1, 0), "weight": (1, 0)}, "multiple of 16"),
        ("linear_backward", {"weight": (1, 40), "out": (1, 40)}, "multiple of 16"),
        ("linear_backward", {"weight": (1, 0), "out": (1, 0)}, "multiple of 16"),
        ("linear_backward", {"weight": (0, 96)}, "shape"),
        ("linear_backward", {"grad": (1, 96)}, "shape"),
        ("embedding_scores", {"values": (1, 33), "grads": (2, 33)}, "multiple of 16"),
        ("squared_row_sums", {"x": (1, 72)}, "the width of x.*multiple of 16; got 72"),
        ("squared_row_sums", {"x": (1, 0)}, "multiple of 16; got 0"),
        ("squared_gradient_norms", {"out": (0, 12)}, r"offsets has the wrong shape.*\[13\]"),
        ("squared_gradient_norms", {"rows": (0, 480)}, r"rows has the wrong shape.*\[484\]"),
        ("squared_gradient_norms", {"offsets": (0, 13)}, r"offsets has the wrong shape.*\[14\]"),
        (
            "attention_forward",
            {"q": (2, 8), "k": (2, 8), "v": (2, 8), "out": (2, 8)},
            "head_dim",
        ),
        ("attention_forward", {"k": (1, 0), "v": (1, 0)}, "kv heads"),
        ("attention_forward", {"q": (1, 0), "out": (1, 0), "lse": (1, 0)}, "heads"),
    ],
    ids=str,
)
def test_sizes_the_kernels_do_not_serve_are_refused(op, sizes, message) -> None:
    a = full_arguments(op)
    refuse(op, a | narrowed(a, sizes), message)


def test_heads_that_kv_heads_do_not_divide_are_refused() -> None:
    a = attention.forward(Draw(torch.float32, 0), TRIES["group"], 3, 2, 16)
    refuse("attention_forward", call_arguments("attention_forward", a), "number of heads")


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_nothing_to_do_is_done(op: str) -> None:
    """No segments, blocks or queries: what gets no gradient is still set to zero."""
    make = getattr(attention, op.removeprefix("attention_"))
    a = make(Draw(torch.float32, 0), TRIES["group"], *HEADS["d16"])
    rows = len(a["grad_out"]) if op.endswith("backward") else 0
    a["blocks"] = a["blocks"][:0]
    got = run(op, a)
    if op.endswith("forward"):
        assert got["out"].isnan().all() and got["lse"].isnan().all()
        return
    assert rows and got["dq"].isnan().all() and not got["dk"].any() and not got["dv"].any()
    without_runs = a | {"runs": a["runs"][:0], "key_rows": 0}
    assert run(op, without_runs)["dk"].shape[0] == 0


# --- what torch asks of an op ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    """Schema, aliasing, tracing. It says nothing about the numbers."""
    small = next(c for c in select(op, integers=False) if c.name == FULL[op])
    a = call_arguments(op, small.arguments(dtype))
    # NaN is not equal to itself, and a copy is compared.
    a = {n: x.nan_to_num() if isinstance(x, Tensor) else x for n, x in a.items()}
    torch.library.opcheck(overload(op), tuple(a.values()))


@pytest.mark.parametrize("op", OPS)
def test_ops_can_be_compiled_into_a_graph(op: str) -> None:
    torch.compiler.reset()  # else the ops before it count as recompilations of one function
    a = many_rows(op, Draw(torch.float32, 1))
    once = run(op, a)
    full = call_arguments(op, a)
    compiled = torch.compile(lambda *x: overload(op)(*x), backend="aot_eager", fullgraph=True)
    compiled(*full.values())
    for name, expected in once.items():
        assert torch.equal(full[name].nan_to_num(), expected.nan_to_num()), name
