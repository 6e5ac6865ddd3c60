"""The Triton attention kernels: under the interpreter, or on the device if there is one.

The truths are those of the native ops. What a kernel's own rounding decides is held to a truth that
takes `out` and `lse` as they were kept: a dense float64 softmax under a mask of 0 and 1.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import (
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
)
from g2r_fast.kernels import configs as configurations
from g2r_fast.kernels.configs import ATTENTION, AttentionConfig, attention_config
from g2r_fast.kernels.launching import TRITON_DTYPES
from native_arguments import Draw
from native_calls import output_shapes
from native_cases import Case, select, truth
from native_oracles import EXACT, Arguments, Arithmetic, Outputs, attend, plain
from native_oracles import attention_forward as oracle_forward
from native_rules import equal_bits, judge
from native_tries import TRIES, Trie, backward, forward, given_lse_backward, seen
from torch import Tensor

from g2r_fast import device_tables, triton_attention
from g2r_fast.eager import attention as eager
from g2r_fast.errors import InputError
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.tables import backward_queries, backward_read_queries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def queries_of(a: Arguments) -> Any:
    """The tables of a case, as QueryTables holds them."""
    names = ("segments", "positions", "block_lanes", "runs", "run_lanes")
    tables = {name: a[name] for name in names if name in a}
    return SimpleNamespace(
        **tables, forward_blocks=a["blocks"], backward_blocks=a["blocks"], on_device={}
    )


def small(op: str, a: Arguments, rows: int = 0, keys: int = 0) -> AttentionConfig:
    """Tiles so small that a few tokens are many of them; by default 16 x 16 if they are few."""
    if not rows:
        rows, keys = (16, 16) if len(a["k"]) < 60 else (64, 32)
    config = attention_config(op, a["q"], a["softcap"])
    if DEVICE.type == "cuda":
        return config
    return dataclasses.replace(config, rows=rows, keys=keys)


def poisoned(op: str, a: Arguments) -> Outputs:
    """What is to be written, NaN."""
    shapes = output_shapes(op, a)
    return {n: torch.full(s[0], torch.nan, dtype=s[1], device=DEVICE) for n, s in shapes.items()}


def on_device(a: Arguments, *names: str) -> list[Tensor]:
    return [a[name].to(DEVICE) for name in names]


def run(op: str, a: Arguments, *tiles: int) -> Outputs:
    """Call a kernel's launcher; `a["out"]` is what the forward kept, by default the truth."""
    options = {"window": a["window"] or None, "softcap": a["softcap"]}
    outputs = poisoned(op, a)
    if op == "attention_forward":
        config = small("forward", a, *tiles)
        inputs = on_device(a, "q", "k", "v")
        triton_attention.attention_forward(
            queries_of(a), *inputs, *outputs.values(), **options, config=config
        )
    else:
        a = a | {"out": a["out"].to(a["q"].dtype)}  # as its forward writes it
        inputs = on_device(a, "q", "k", "v", "out", "lse", "grad_out")
        triton_attention.attention_backward(
            queries_of(a), *inputs, *outputs.values(), **options,
            configs=(small("queries", a, *tiles), small("keys", a, *tiles)),
        )  # fmt: skip
    return {name: x.cpu() for name, x in outputs.items()}


def dense_backward(a: Arguments, at: Arithmetic) -> Outputs:
    """Every formula once, with `lse` and `out` as they were kept, lane by lane."""
    q, k, v = (at.take(a[name]) for name in "qkv")
    out, grads, lse = at.take(a["out"].to(a["q"].dtype)), at.take(a["grad_out"]), at.take(a["lse"])
    group, softcap = q.shape[1] // k.shape[1], a["softcap"]
    dq = torch.full_like(grads, torch.nan)
    dk = k.new_zeros(a["key_rows"], *k.shape[1:])
    dv = torch.zeros_like(dk)
    sees = torch.zeros(len(q), len(k), dtype=torch.bool)
    for row, keys in seen(a):
        sees[row, keys] = True
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = at.einsum("qhd,khd->hqk", q, k)
    slope = torch.ones_like(s)
    if softcap:
        capped = torch.tanh(s / softcap)
        s, slope = softcap * capped, 1 - capped.square()
    p = torch.where(sees, (s - lse.T[..., None]).exp(), 0.0)
    block_lanes, run_lanes = a["block_lanes"].tolist(), a["run_lanes"].tolist()
    for lane in sorted({*block_lanes, *run_lanes}):
        queries, rows = [], []
        for _, first, count, row, lane_at, lanes in a["blocks"].tolist():
            names = block_lanes[lane_at : lane_at + lanes]
            if lane in names:
                queries += range(first, first + count)
                rows += range(row + names.index(lane), row + count * lanes, lanes)
        grad, mine = grads[rows], p[:, queries]
        delta = (grad * out[queries]).sum(-1).T[..., None]
        ds = mine * (at.einsum("qhd,khd->hqk", grad, v) - delta) * slope[:, queries]
        dq[rows] = at.einsum("hqk,khd->qhd", ds, k)
        to_k = at.einsum("hqk,qhd->khd", ds, q[queries]).unflatten(1, (-1, group)).sum(2)
        to_v = at.einsum("hqk,qhd->khd", mine, grad).unflatten(1, (-1, group)).sum(2)
        for segment, row, tokens, lane_at, lanes in a["runs"].tolist():
            names = run_lanes[lane_at : lane_at + lanes]
            if lane in names:
                first = int(a["segments"][segment, 2])
                at_rows = slice(row + names.index(lane), row + tokens * lanes, lanes)
                dk[at_rows], dv[at_rows] = (
                    to_k[first : first + tokens],
                    to_v[first : first + tokens],
                )
    return {"dq": dq, "dk": dk, "dv": dv}


def wrong(op: str, a: Arguments, got: Outputs) -> dict[str, str]:
    """By the rule for random inputs: 2e-6, or twice the error of plain PyTorch in the dtype."""
    dtype = a["q"].dtype
    oracle = oracle_forward if op == "attention_forward" else dense_backward
    yardstick = None if dtype == torch.float32 else oracle(a, plain(dtype))
    return judge(op, a, got, oracle(a, EXACT), yardstick)


def chosen(op: str, integers: bool, *names: str) -> list[Case]:
    cases = [case for case in select(op, integers) if case.name in names]
    assert len(cases) == len(names)
    return cases


OPS = ("attention_forward", "attention_backward")
RANDOM = (
    "single", "one-token", "branch-at-0", "deep", "staggered", "names", "rows-elsewhere", "reads",
    "reads-within", "group-window1", "deep-window3", "staggered-window8", "reads-window3",
    "largest-window", "softcap-window", "small-scores",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for op in OPS for case in chosen(op, False, *RANDOM)], ids=str
)
def test_float32_is_right_on_tries_of_every_kind(case: Case) -> None:
    a = case.arguments(torch.float32)
    assert judge(case.op, a, run(case.op, a), truth(case, torch.float32)) == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "case",
    [c for op in OPS for c in chosen(op, False, "siblings", "reads-window3", "softcap")],
    ids=str,
)
def test_narrow_dtypes_are_as_good_as_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    a = case.arguments(dtype)
    assert wrong(case.op, a, run(case.op, a)) == {}


INTEGERS = ("group", "deep-window4", "staggered", "reads-window1", "siblings-window200")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for op in OPS for case in chosen(op, True, *INTEGERS)], ids=str
)
def test_integers_give_equal_bits(case: Case, dtype: torch.dtype) -> None:
    a = case.arguments(dtype)
    if case.op == "attention_backward":
        expected = given_lse_backward(a)
    else:
        expected = truth(case, dtype)
    got = run(case.op, a)
    exact = [name for name in expected if name != "lse"]  # which is a logarithm
    assert {name: equal_bits(got[name], expected[name]) for name in exact} == dict.fromkeys(exact)


# Groups of 1, 2, 6 and 7; head dims of a power of two and not; tiles of a token's few heads, of
# several tokens, and larger than any segment.
DIVIDED = Trie(((-1, 19), (0, 23), (1, 1), (1, 9), (0, 5)), ((2, 0), (3, 1), (4, 4), (3, 3)))
SHAPES = [
    ((1, 1, 16), 0, 16, 16),
    ((2, 1, 48), 21, 16, 32),
    ((12, 2, 64), 0, 64, 32),
    ((6, 1, 10), 9, 32, 16),
    ((7, 1, 128), 0, 32, 64),
    ((2, 2, 80), 30, 128, 64),
]


@pytest.mark.parametrize(("shape", "window", "rows", "keys"), SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_groups_head_dims_and_tiles(
    op: str, shape: tuple[int, int, int], window: int, rows: int, keys: int
) -> None:
    make = forward if op == "attention_forward" else backward
    a = make(Draw(torch.float32, sum(shape)), DIVIDED, *shape, window=window)
    assert wrong(op, a, run(op, a, rows, keys)) == {}


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("op", OPS)
def test_segments_that_end_at_a_tile_or_beside_it(op: str, window: int) -> None:
    make = forward if op == "attention_forward" else backward
    a = make(Draw(torch.float32, 3), TRIES["tile-borders"], 2, 1, 16, window=window, gain=12.0)
    assert wrong(op, a, run(op, a, 32, 32)) == {}


# --- with the engine's tables, against the eager ops ----------------------------------------------


def plan_of(lengths: list[int], start: int = 10) -> PackedPlan:
    """Sequences that share a prompt of 9 tokens, in pairs 5 more."""
    prompt = list(range(100, 109))
    sequences = []
    for i, length in enumerate(lengths):
        ids = prompt + [200 + i // 2] * 5 + [300 + i] * length
        sequences.append(PackedSequence(ids, start + i, reads=(len(ids) - 2, len(ids) - 1)))
    return PackedPlan.build(sequences)


def tables(plan: PackedPlan, kind: str) -> tuple[Any, int, int]:
    """Query tables, backward rows of queries and of keys."""
    run_plan = plan.backward(range(len(plan.sequences)))
    if kind == "reads":
        reads = sorted(plan.reads, key=lambda r: (r.segment, r.sequence))
        return backward_read_queries(plan, run_plan, reads), len(reads), run_plan.rows
    saved = [
        row
        for s in plan.segments
        if s.saved_row is not None
        for row in range(s.row, s.row + len(s))
    ]
    return backward_queries(plan, run_plan, torch.tensor(saved)), run_plan.rows, run_plan.rows


@pytest.mark.parametrize("kind", ["rows", "reads"])
@pytest.mark.parametrize("window", [None, 6])
def test_the_engines_tables_give_what_the_eager_ops_give(kind: str, window: int | None) -> None:
    plan = plan_of([4, 1, 7, 2])
    queries, backward_rows, key_rows = tables(plan, kind)
    draw, heads, kv_heads, head_dim = Draw(torch.float32, 1), 2, 1, 16
    k, v = (draw.stored(plan.rows, kv_heads, head_dim) for _ in range(2))
    q = draw.stored(len(queries.positions), heads, head_dim, scale=0.3)
    grad_out = draw.stored(backward_rows, heads, head_dim, scale=0.02)
    options = {"window": window, "softcap": 0.0}

    results = []
    for module in (eager, triton_attention):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        dq = torch.full_like(grad_out, torch.nan)
        dk, dv = (torch.full((key_rows, kv_heads, head_dim), torch.nan) for _ in range(2))
        inputs = [x.to(DEVICE) for x in (q, k, v)]
        written = [x.to(DEVICE) for x in (out, lse, dq, dk, dv)]
        module.attention_forward(queries, *inputs, *written[:2], **options)
        kept = written[1:2] if module is eager else written[:2]
        module.attention_backward(
            queries, *inputs, *kept, grad_out.to(DEVICE), *written[2:], **options
        )
        results.append([x.cpu().double() for x in written])
    for expected, got in zip(*results, strict=True):
        assert float((got - expected).norm()) <= 4e-6 * float(expected.norm()) > 0


def test_nothing_to_do() -> None:
    plan = plan_of([2, 3])
    queries = dataclasses.replace(
        backward_read_queries(plan, plan.backward(()), ()), positions=plan.positions[:0]
    )
    none = torch.zeros(0, 2, 16, device=DEVICE)
    k = torch.zeros(plan.rows, 1, 16, device=DEVICE)
    lse, dk = torch.zeros(0, 2, device=DEVICE), torch.zeros(0, 1, 16, device=DEVICE)
    options: dict[str, Any] = {"window": None, "softcap": 0.0}
    triton_attention.attention_forward(queries, none, k, k, none, lse, **options)
    triton_attention.attention_backward(
        queries, none, k, k, none, lse, none, none, dk, dk, **options
    )
    # Keys that nobody asks get zeros, not what their memory held.
    queries = dataclasses.replace(queries, backward=plan.backward([0, 1]), on_device={})
    rows = plan.backward([0, 1]).rows
    dk, dv = (torch.full((rows, 1, 16), torch.nan, device=DEVICE) for _ in range(2))
    triton_attention.attention_backward(
        queries, none, k, k, none, lse, none, none, dk, dv, **options
    )
    assert not dk.any() and not dv.any()


def test_no_gradient_depends_on_the_run() -> None:
    a = backward(Draw(torch.float32, 7), TRIES["siblings"], 2, 1, 16)
    first, second = run("attention_backward", a), run("attention_backward", a)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- planted bugs ---------------------------------------------------------------------------------


def _tiles_lost(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = device_tables._tiles

    def fewer(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return counted((rows - step).clamp_min(1), step)

    monkeypatch.setattr(device_tables, "_tiles", fewer)


def _first_entry_late(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    made = device_tables._keys

    def late(*arguments: Any) -> Tensor:
        keys = made(*arguments)
        keys[:, 5] = (keys[:, 5] + 1).minimum(keys[:, 6])
        return keys

    monkeypatch.setattr(device_tables, "_keys", late)


def _entries_of_all_lanes(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    made = device_tables._keys

    def all_lanes(queries: Any, lanes: Tensor, positions: Tensor) -> Tensor:
        keys = made(queries, lanes, positions)
        keys[:, 6] = len(lanes)
        return keys

    monkeypatch.setattr(device_tables, "_keys", all_lanes)


def _stride_of_one(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    made = device_tables._entries

    def dense(queries: Any) -> Tensor:
        entries = made(queries)
        entries[:, 4] = 1
        return entries

    monkeypatch.setattr(device_tables, "_entries", dense)


def _no_parents(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    a["segments"] = a["segments"].clone()
    a["segments"][:, 3] = -1


def _positions_off(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    a["positions"] = (a["positions"] - 1).clamp_min(0)


def _window_off(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    a["window"] += 1


def _value_scaled(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    a["v"] = a["v"] * 1.001


def _out_not_kept(a: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    a["out"] = torch.zeros_like(a["q"])


@pytest.mark.parametrize(
    ("op", "bug"),
    [
        *((op, bug) for op in OPS for bug in (_tiles_lost, _no_parents, _positions_off)),
        *((op, bug) for op in OPS for bug in (_window_off, _value_scaled)),
        ("attention_backward", _first_entry_late),
        ("attention_backward", _entries_of_all_lanes),
        ("attention_backward", _stride_of_one),
        ("attention_backward", _out_not_kept),
    ],
)
def test_planted_bugs_are_caught(op: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = forward if op == "attention_forward" else backward
    a = make(Draw(torch.float32, 2), DIVIDED, 2, 1, 16, window=19)
    b = dict(a)
    bug(b, monkeypatch)
    assert wrong(op, a, run(op, b))


# --- what is shipped ------------------------------------------------------------------------------


def test_every_configuration_is_compiled() -> None:
    modules = (attention_forward, attention_backward_queries, attention_backward_keys)
    names = [case.name for module in modules for case in module.compile_cases()]
    assert len(names) == len(set(names))
    for config in ATTENTION:
        of_it = f"{config.op} bf16 d{config.head_dim} {config.rows}x{config.keys}"
        of_it = of_it if torch.bfloat16 in config.dtypes else of_it.replace("bf16", "fp32")
        compiled = [name for name in names if name.startswith(f"attention {of_it}")]
        assert {"window" in name for name in compiled} == {True, False}, f"{of_it} is never used"


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_what_a_call_launches_is_compiled_for_its_gpu(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every head_dim: the cases name the largest of each record."""
    monkeypatch.setattr(configurations, "_arch", lambda device: arch)
    modules = {
        "forward": attention_forward,
        "queries": attention_backward_queries,
        "keys": attention_backward_keys,
    }
    for op, module in modules.items():
        names = ("HEAD_DIM", "ROWS", "KEYS", "CAPPED", "WINDOWED")
        compiled = {
            (case.signature["q_ptr"], *map(case.constants.get, names), *case.options.values())
            for case in module.compile_cases()
            if case.is_launched_on(arch)
        }
        launched = set()
        for dtype, softcap in itertools.product(DTYPES, (0.0, 30.0)):
            for head_dim in range(1, 129 if dtype == torch.float32 else 257):
                q = torch.empty(0, 1, head_dim, dtype=dtype)
                config = attention_config(op, q, softcap)
                assert head_dim <= config.head_dim
                pointer, capped = f"*{TRITON_DTYPES[dtype]}", bool(softcap)
                tile = (pointer, config.head_dim, config.rows, config.keys, capped)
                options = config.options().values()
                launched |= {(*tile, windowed, *options) for windowed in (False, True)}
        assert launched == compiled


def test_queries_without_a_kernel_are_refused() -> None:
    for head_dim, dtype in ((257, torch.bfloat16), (129, torch.float32), (64, torch.float64)):
        q = torch.empty(0, 1, head_dim, dtype=dtype)
        with pytest.raises(InputError, match="no kernel for such queries"):
            attention_config("forward", q, 0.0)


def test_one_query_is_plain_attention() -> None:
    """The oracle itself, from its definition."""
    a = forward(Draw(torch.float32, 4), TRIES["long"], 2, 1, 16)
    got = run("attention_forward", a)
    q, k, v = (a[name].double() for name in "qkv")
    out, lse = attend(q[-1], k, v, 0.0, EXACT)
    assert float((got["out"][-1].double() - out).norm()) <= 2e-6 * float(out.norm())
    assert float((got["lse"][-1].double() - lse).norm()) <= 2e-6 * float(lse.norm())
