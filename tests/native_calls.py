"""Calls of the native ops between guards: every tensor lies in memory of its own that ends where
the tensor does, in NaN or in a number nobody wants, and outputs hold NaN before they are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from native_oracles import Arguments, Outputs
from torch import Tensor

from g2r_fast import native_ops

TABLES = ("avx512bf16", "avx512", "avx2", "plain")
# What the processor must list for each, as Linux spells it.
_NEEDS = {
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"},
    "avx2": {"avx2", "fma"},
    "plain": set(),
}
DTYPES = (torch.float32, torch.bfloat16)

# Elements in front of and behind every tensor; odd, so that nothing is aligned by luck.
_GUARD = 37


def unavailable() -> str | None:
    """Why the native ops cannot be tested here, or None; the first call may compile them."""
    reason = native_ops.load()
    return None if reason is None else f"no native ops here: {reason}"


@pytest.fixture(scope="session")
def native() -> None:
    """Skips where there is nothing to test; test_native_ops.py says where that is forbidden."""
    reason = unavailable()
    if reason:
        pytest.skip(reason)


COMPILER = shutil.which("g++") or shutil.which("clang++")


def usable(table: str) -> str | None:
    """Why a table cannot be tested here, or None."""
    if unavailable():
        return unavailable()
    if table not in torch.ops.g2r_fast.built_cpu_kernels().split(","):
        return f"{table} kernels are not built"
    try:
        with kernels(table):
            return None
    except RuntimeError as error:
        return f"this processor does not run {table} kernels ({error})"


def expected_tables() -> set[str]:
    """What must be there on this machine, by what the processor says of itself."""
    about = Path("/proc/cpuinfo")
    flags = set(about.read_text(encoding="utf-8").split()) if about.exists() else set()
    return {table for table, needs in _NEEDS.items() if needs <= flags}


@contextmanager
def kernels(table: str) -> Iterator[None]:
    before = torch.ops.g2r_fast.cpu_kernels()
    torch.ops.g2r_fast.use_cpu_kernels(table)
    try:
        assert torch.ops.g2r_fast.cpu_kernels() == table
        yield
    finally:
        torch.ops.g2r_fast.use_cpu_kernels(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What each op writes. "in place" comes with values, the others with NaN.
IN_PLACE = {"mlp_forward": ["x"], "mlp_backward": ["dx"], "qkv_backward": ["dx"]}
IN_PLACE |= {"residual_sums": ["sums"]}


def output_shapes(op: str, a: Arguments) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape and dtype of every output that is not in place; None: it is not asked for."""
    wide = torch.float32
    if op == "linear":
        return {"out": ((len(a["x"]), len(a["weight"])), wide)}
    if op == "linear_backward":
        return {"out": ((len(a["grad"]), a["weight"].shape[1]), wide)}
    if op == "embedding_scores":
        return {"scores": (tuple(a["grads"].shape[:2]), wide)}
    if op == "attribution_rewards":
        double = torch.float64
        return {"alpha": (tuple(a["scores"].shape), double), "rewards": ((a["count"],), double)}
    if op == "residual_sums":
        rows = (len(a["logits"]),)
        return {"logps": (rows, wide), "entropies": (rows, wide)}
    if op.startswith("squared"):
        return {"out": ((len(a["offsets"]) - 1,), torch.float64)}
    dtype = next(a[n] for n in ("input_norm", "post_norm", "q") if a.get(n) is not None).dtype
    if op == "attention_forward":
        return {"out": (tuple(a["q"].shape), wide), "lse": (tuple(a["q"].shape[:2]), wide)}
    if op == "attention_backward":
        keys = (a["key_rows"], *a["k"].shape[1:])
        return {"dq": (tuple(a["grad_out"].shape), dtype), "dk": (keys, wide), "dv": (keys, wide)}
    rows = len(a["x"] if "x" in a else a["dx"])
    if op.endswith("backward"):
        return _backward_shapes(op, a, rows, dtype)
    count, hidden = a["kept"], a["x"].shape[1]
    shapes: dict[str, Any] = {"normed": ((count, hidden), dtype), "rstd": ((count,), wide)}
    if op == "mlp_forward":
        width = len(a["w_gate"])
        activated = ((count, width), dtype) if a["shown"] else None
        slopes = dict.fromkeys(("d_gate", "d_up"), ((count, width), dtype))
        return shapes | slopes | {"activated": activated}
    for name in "qkv":
        weight = a[f"w{name}"]
        heads = None if weight is None else len(weight) // a["head_dim"]
        if name != "v":
            kept = heads if a[f"{name}_norm"] is not None else None
            there = kept is not None
            shapes[f"{name}_normed"] = ((count, kept, a["head_dim"]), dtype) if there else None
            shapes[f"{name}_rstd"] = ((count, kept), wide) if there else None
        shapes[name] = ((rows, heads, a["head_dim"]), dtype) if heads is not None else None
    return shapes


def _backward_shapes(
    op: str, a: Arguments, rows: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Of the two dense halves; `shown`: what a reader of linear layers asks for too."""
    hidden, shown = a["dx"].shape[1], a["shown"]
    products = ((rows, hidden), torch.float32) if shown else None
    if op == "mlp_backward":
        return {
            "grad_attended": ((rows, a["heads"], a["head_dim"]), dtype),
            "gate_up": ((rows, 2 * len(a["w_gate"])), dtype) if shown else None,
            "norm_products": products,
        }
    width = sum(len(a[f"w{name}"]) for name in "qkv" if a[f"d{name}"] is not None)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {
        "projected": ((rows, width), dtype) if shown else None,
        "norm_products": products,
    }
    for name in "qk":
        there = shown and a[f"{name}_norm"] is not None
        of_heads = ((rows, a["head_dim"]), torch.float32)
        shapes[f"{name}_norm_products"] = of_heads if there else None
    return shapes


class Guarded:
    """A copy of a tensor with guards around it."""

    def __init__(self, like: Tensor) -> None:
        floating = like.is_floating_point()
        self.guard = torch.nan if floating else torch.iinfo(like.dtype).max - 1
        self.memory = torch.empty(like.numel() + 2 * _GUARD, dtype=like.dtype)
        self.memory[:_GUARD] = self.memory[-_GUARD:] = self.guard
        self.tensor = self.memory[_GUARD : self.memory.numel() - _GUARD].view(like.shape)
        self.tensor.copy_(like)
        self.like = like  # nobody but the caller can write there

    def unharmed(self) -> bool:
        around = torch.cat((self.memory[:_GUARD], self.memory[-_GUARD:]))
        if self.memory.is_floating_point():
            return bool(around.isnan().all())
        return bool((around == self.guard).all())

    def unchanged(self) -> bool:
        return torch.equal(bits(self.tensor), bits(self.like))


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def schema_names(op: str) -> list[str]:
    return [argument.name for argument in overload(op)._schema.arguments]


def overload(op: str) -> Any:
    return getattr(torch.ops.g2r_fast, op).default


def call_arguments(op: str, a: Arguments) -> Arguments:
    """What the op takes, outputs included: NaN, or a copy of what is updated in place."""
    full = dict(a)
    for name, asked in output_shapes(op, a).items():
        full[name] = None if asked is None else torch.full(asked[0], torch.nan, dtype=asked[1])
    for name in IN_PLACE.get(op, []):
        full[name] = a[name].clone()
    return {name: full[name] for name in schema_names(op)}


def run(op: str, a: Arguments) -> Outputs:
    """Call the op, see to it that nothing but its outputs was written, and return them."""
    written = {*IN_PLACE.get(op, []), *output_shapes(op, a)}
    full = call_arguments(op, a)
    guarded = {name: Guarded(x) for name, x in full.items() if isinstance(x, Tensor)}
    overload(op)(*(guarded[name].tensor if name in guarded else full[name] for name in full))
    for name, guard in guarded.items():
        assert guard.unharmed(), f"{op} wrote beside {name}"
        assert name in written or guard.unchanged(), f"{op} wrote to its input {name}"
    return {name: guarded[name].tensor.clone() for name in guarded if name in written}
