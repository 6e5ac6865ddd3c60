"""What must not change a native op's answer: another run, threads, company, order."""

from __future__ import annotations

from typing import Any

import native_arguments
import native_tries as attention
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_arguments import Draw, Sizes
from native_calls import DTYPES, TABLES, bits, kernels, native, run, threads, usable
from native_cases import (
    CASES,
    HEADS,
    MANY_ROWS,
    SHOWN,
    TRIES,
    VARIANTS,
    Case,
    many_rows,
    shared,
    truth,
    yardstick,
)
from native_oracles import EXACT, ORACLES, Arguments, Outputs, plain
from native_rules import FLOAT32, equal_bits, judge, near, relative_error
from native_tries import Trie

__all__ = ["native"]

pytestmark = pytest.mark.usefixtures("native")

# Arguments of which every row belongs to a row of the outputs, and outputs that are kept elsewhere.
ROW_ARGUMENTS = {
    "qkv_forward": ["x", "cos", "sin", "keep"],
    "mlp_forward": ["x", "attended", "keep"],
    "mlp_backward": ["dx", "saved"],
    "qkv_backward": ["dx", "saved", "dq", "dk", "dv"],
    "linear": ["x"],
    "linear_backward": ["grad"],
    "embedding_scores": ["values", "grads"],
}
KEPT = {"normed", "rstd", "q_normed", "q_rstd", "k_normed", "k_rstd", "d_gate", "d_up", "activated"}


def same(a: Outputs, b: Outputs) -> bool:
    """To the bit; what was not written holds the same NaN."""
    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shown"), VARIANTS)
@pytest.mark.parametrize("table", TABLES)
def test_runs_and_threads_change_no_bit(
    table: str, op: str, shown: bool, dtype: torch.dtype
) -> None:
    if usable(table):
        pytest.skip(str(usable(table)))
    with kernels(table):
        a = many_rows(op, Draw(dtype, 1), shown)
        once = run(op, a)
        assert same(run(op, a), once)
        for count in (1, 2, 3, 5):
            with threads(count):
                assert same(run(op, a), once), f"{count} threads"


# The other ops have no stages through which a thread could take rows of its own.
MANY = [c for c in CASES if c.name.startswith(("many-rows", f"{MANY_ROWS}x", "packed-ahead"))]


@pytest.mark.parametrize("case", MANY, ids=lambda case: f"{case}{'-integers' * case.integers}")
@pytest.mark.parametrize("table", TABLES)
def test_threads_that_take_rows_of_their_own_change_no_bit(table: str, case: Case) -> None:
    if usable(table):
        pytest.skip(str(usable(table)))
    dtype = torch.float32 if case.integers else torch.bfloat16
    a, expected = shared(case, dtype), truth(case, dtype)
    with kernels(table):
        with threads(1):
            once = run(case.op, a)
        if case.integers:
            assert {n: equal_bits(once[n], x) for n, x in expected.items()} == dict.fromkeys(once)
        else:
            assert judge(case.op, a, once, expected, yardstick(case, dtype)) == {}
        for count in (2, 3, 4):
            with threads(count):
                assert same(run(case.op, a), once), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trie", TRIES)
def test_sharing_lanes_out_over_threads_changes_no_bit(trie: str, dtype: torch.dtype) -> None:
    """With one kv head there is nothing but lanes to share out, however uneven they are."""
    a = attention.backward(Draw(dtype, 1), TRIES[trie], *HEADS["d16-group8"])
    once = run("attention_backward", a)
    for count in (2, 3, 8):
        with threads(count):
            assert same(run("attention_backward", a), once), f"{count} threads"


def rows_of(op: str, a: Arguments, rows: list[int]) -> Arguments:
    part = dict(a)
    for name in ROW_ARGUMENTS[op]:
        if part[name] is not None:
            part[name] = part[name][rows]
    return part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shown"), [v for v in VARIANTS if v[0] in ROW_ARGUMENTS])
def test_rows_are_the_same_alone_and_in_any_order(op: str, shown: bool, dtype: torch.dtype) -> None:
    """To the bit: a row's sums do not depend on which rows it is computed with."""
    a = many_rows(op, Draw(dtype, 2), shown)
    together = run(op, a)
    count = len(next(iter(rows_of(op, a, []).values()))) or len(a[ROW_ARGUMENTS[op][0]])
    order = Draw(dtype, 3).order(count).tolist()
    for rows in ([0], [count - 1], order, order[:13]):
        part = run(op, rows_of(op, a, rows))
        for name, values in part.items():
            if name in KEPT and op.endswith("forward"):
                at = a["keep"][rows].long()
                assert torch.equal(values[at], together[name][at]), (name, rows)
            else:
                assert torch.equal(values, together[name][rows]), (name, rows)


@pytest.mark.parametrize("standardise", [False, True])
def test_segments_are_the_same_alone_and_in_any_order(standardise: bool) -> None:
    lengths = [40, 7, 0, 450, 13, 1]
    a = native_arguments.attribution_rewards(
        Draw(torch.float32, 2), lengths, temperature=2e-4, standardise=standardise
    )
    together = run("attribution_rewards", a)["alpha"].split(lengths)
    for segments in ([0], [3], [5, 4, 3, 2, 1, 0], [1, 1, 2]):
        parts = [a["scores"].split(lengths)[j] for j in segments]
        offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        of = {name: a[name][segments] for name in ("weights", "starts")}
        part = a | of | {"scores": torch.cat(parts), "offsets": offsets}
        alpha = run("attribution_rewards", part)["alpha"]
        assert torch.equal(alpha, torch.cat([together[j] for j in segments]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("trie", ["nested", "deep", "group", "staggered", "tile-borders"])
def test_packed_lanes_equal_lanes_alone(trie: str, window: int, dtype: torch.dtype) -> None:
    a = attention.backward(Draw(dtype, 4), TRIES[trie], *HEADS["d32-group2"], window=window)
    got = run("attention_backward", a)
    segments = a["segments"].tolist()
    for lane in range(len(TRIES[trie].lanes)):
        alone, rows = attention.sliced(TRIES[trie], lane)
        part = attention.backward(Draw(dtype, 4), alone, *HEADS["d32-group2"], window=window)
        part["k"], part["v"] = a["k"][rows], a["v"][rows]
        # (backward row, row of q) of this lane's tokens, in the order of its path.
        queries: list[tuple[int, int]] = []
        for segment, row, count, first, lane_at, lanes in a["blocks"].tolist():
            names = a["block_lanes"][lane_at : lane_at + lanes].tolist()
            name = TRIES[trie].name(lane)
            if name in names:
                assert segments[segment][1] - segments[segment][0] == count
                queries += [(first + i * lanes + names.index(name), row + i) for i in range(count)]
        back, ask = (list(x) for x in zip(*queries, strict=True))
        part |= {name: a[name][ask] for name in ("q", "out", "lse")}
        part["grad_out"] = a["grad_out"][back]
        expected = run("attention_backward", part)
        limit = FLOAT32 if dtype == torch.float32 else 2.0**-7
        for name in ("dq", "dk", "dv"):
            assert near(got[name][back], expected[name].double(), limit=limit) is None, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_all_values_have_in_common_cancels(dtype: torch.dtype) -> None:
    """With the output that the kernels themselves gave: no gradient may feel how it rounds."""
    a = attention.backward(Draw(dtype, 5), TRIES["long"], *HEADS["d16-group4"])
    a["v"] = (a["v"] + 30).to(dtype)
    a |= run("attention_forward", a | {"blocks": a["blocks"][:, :3].contiguous()})
    truth, got = ORACLES["attention_backward"](a, EXACT), run("attention_backward", a)
    # In float32 the rounding of what cancels, of 30 times the size.
    limit = 30 * FLOAT32 if dtype == torch.float32 else 2.0**-7
    for name in ("dq", "dk"):
        assert near(got[name], truth[name], limit=limit) is None, name


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_keys_lie_and_what_lanes_are_called_does_not_matter(
    op: str, dtype: torch.dtype
) -> None:
    make = getattr(attention, op.removeprefix("attention_"))
    straight, elsewhere = (
        Trie(((-1, 5), (0, 3), (1, 4), (0, 2)), ((2, 0), (3, 0)), row_order=order, names=names)
        for order, names in ((None, None), ((3, 1, 0, 2), (4, 9)))
    )
    a, b = (make(Draw(dtype, 6), trie, 4, 2, 16) for trie in (straight, elsewhere))
    for name in ("k", "v"):
        for segment, (_, tokens) in enumerate(straight.segments):
            at, to = straight.first_row(segment), elsewhere.first_row(segment)
            b[name][to : to + tokens] = a[name][at : at + tokens]
    if op.endswith("backward"):
        b |= {name: a[name] for name in ("out", "lse")}
    assert same(run(op, a), run(op, b))


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_that_no_sequence_fills_is_none(op: str, dtype: torch.dtype) -> None:
    make = getattr(attention, op.removeprefix("attention_"))
    for trie in ("deep", "tile-borders", "long-branches"):
        a = make(Draw(dtype, 6), TRIES[trie], *HEADS["d32-group2"])
        once = run(op, a)
        for window in (2**31, 2**62, 2**63 - 100, 2**63 - 2, 2**63 - 1):
            assert same(run(op, a | {"window": window}), once), window


@pytest.mark.parametrize("trie", ["many-lanes", "group", "staggered"])
def test_lanes_in_another_order_are_refused_or_right(trie: str) -> None:
    """A block that names its lanes in another order than the runs do: no silent wrong answer."""
    a = attention.backward(Draw(torch.float32, 1), TRIES[trie], *HEADS["d16-group8"])
    for *_, at, count in a["blocks"].tolist():
        a["block_lanes"][at : at + count] = a["block_lanes"][at : at + count].flip(0)
    for count in (1, 3):
        with threads(count):
            try:
                got = run("attention_backward", a)
            except RuntimeError as error:
                assert "lane" in str(error)
                continue
        assert judge("attention_backward", a, got, ORACLES["attention_backward"](a, EXACT)) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_then_backward_is_the_gradient_of_the_layer(dtype: torch.dtype) -> None:
    """What a forward keeps is what the backward needs: against autograd through both halves."""
    rows, s = 23, Sizes(64, 4, 2, 16, 96)
    for op, inputs in (("mlp", ("x", "attended")), ("qkv", ("x",))):
        draw = Draw(dtype, 8)
        options = {"norms": True} if op == "qkv" else {"biases": True}
        a = getattr(native_arguments, f"{op}_forward")(draw, s, rows, keep="all", **options)
        grads = getattr(native_arguments, f"{op}_backward")(draw, s, rows)
        kept = run(f"{op}_forward", a)
        b = {**grads, **a, **kept, "saved": torch.arange(rows, dtype=torch.int32)}
        b |= {"dx": grads["dx"], "heads": s.heads, "head_dim": s.head_dim}
        if op == "qkv":
            # The op adds to dx what comes back through the heads.
            b |= {f"d{name}": grads[f"d{name}"] for name in "qkv"}
        got = run(f"{op}_backward", b)

        def gradient(at: Any, a=a, op=op, inputs=inputs, grads=grads) -> list[torch.Tensor]:
            leaves = [at.take(a[name]).requires_grad_(True) for name in inputs]
            point = a | dict(zip(inputs, leaves, strict=True))
            if op == "mlp":
                outs, cotangents = [_mlp(point, at)], [at.take(grads["dx"])]
            else:
                out = ORACLES["qkv_forward"](point, at)
                outs = [out[name] for name in "qkv"]
                cotangents = [at.take(grads[f"d{name}"]) for name in "qkv"]
            found = list(torch.autograd.grad(outs, leaves, cotangents))
            if op == "qkv":
                found[0] = found[0] + at.take(grads["dx"])
            return found

        exact, yardstick = gradient(EXACT), gradient(plain(dtype))
        names = ("dx", "grad_attended")
        for name, expected, loop in zip(names, exact, yardstick, strict=False):
            limit = 4 * FLOAT32
            if dtype != torch.float32:
                limit = 2 * relative_error(loop.double(), expected)
            assert near(got[name], expected, limit=limit) is None, (op, name)


def _mlp(a: Arguments, at: Any) -> torch.Tensor:
    """The forward alone: the oracle detaches, as it is asked for derivatives of its own."""
    from native_oracles import ACTIVATIONS, rms

    x = a["x"] + at.linear(a["attended"].flatten(1), a["wo"], a["bo"])
    h = at.round(rms(x, a["eps"])[0]) * at.take(a["post_norm"])
    gate, up = at.linear(h, a["w_gate"], a["b_gate"]), at.linear(h, a["w_up"], a["b_up"])
    return x + at.linear(ACTIVATIONS[a["activation"]](gate) * up, a["w_down"], a["b_down"])


# --- any shape ------------------------------------------------------------------------------------

multiples = st.integers(1, 9).map(lambda n: 16 * n)


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128]))
    return Sizes(draw(multiples), kv_heads * group, kv_heads, head_dim, draw(multiples))


@given(
    op=st.sampled_from(["qkv_forward", "mlp_forward", "mlp_backward", "qkv_backward"]),
    sizes=sizes(),
    rows=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    shown=st.booleans(),
)
@settings(max_examples=120)
def test_dense_halves_of_any_shape_are_exact_on_integers(
    op, sizes, rows, dtype, seed, shown
) -> None:
    options = {"shown": shown} if op in SHOWN else {}
    if op.startswith("qkv"):
        options["norms"] = seed % 2 == 1
    a = getattr(native_arguments, f"{op}_integers")(Draw(dtype, seed), sizes, rows, **options)
    got, expected = run(op, a), ORACLES[op](a, EXACT)
    assert {n: equal_bits(got[n], expected[n]) for n in expected} == dict.fromkeys(expected)


@given(
    rows=st.integers(0, 30),
    width=multiples,
    out=st.integers(1, 140),
    lanes=st.integers(0, 9),
    readout=st.integers(0, 2),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80)
def test_products_and_scores_of_any_shape(
    rows, width, out, lanes, readout, bias, dtype, seed
) -> None:
    draw = Draw(dtype, seed)
    for op, a in (
        ("linear", native_arguments.linear_integers(draw, rows, width, out, bias=bias)),
        ("linear_backward", native_arguments.linear_backward_integers(draw, rows, out, width)),
        (
            "embedding_scores",
            native_arguments.embedding_scores_integers(draw, rows, lanes, width, readout=readout),
        ),
    ):
        got, expected = run(op, a), ORACLES[op](a, EXACT)
        assert {n: equal_bits(got[n], expected[n]) for n in expected} == dict.fromkeys(expected)


@given(
    powers=st.lists(st.integers(-1, 9), max_size=20),
    standardise=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attribution_of_any_lengths_is_exact_on_integers(powers, standardise, seed) -> None:
    lengths = [0 if power < 0 else 2**power for power in powers]
    a = native_arguments.attribution_rewards_integers(
        Draw(torch.float32, seed), lengths, standardise=standardise
    )
    got = run("attribution_rewards", a)
    expected = ORACLES["attribution_rewards"](a, EXACT)
    assert {n: equal_bits(got[n], expected[n]) for n in expected} == dict.fromkeys(expected)


@st.composite
def tries(draw: st.DrawFn) -> Trie:
    """Any tree of ragged segments in depth-first order, and lanes that end and begin anywhere."""
    segments: list[tuple[int, int]] = []
    path: list[int] = []
    for index in range(draw(st.integers(1, 7))):
        path = path[: draw(st.integers(0, len(path)))]
        segments.append((path[-1] if path else -1, draw(st.integers(1, 9))))
        path.append(index)
    whole = Trie(tuple(segments))
    lanes = []
    for leaf in draw(st.lists(st.integers(0, len(segments) - 1), min_size=1, max_size=5)):
        lanes.append((leaf, draw(st.sampled_from(whole.path(leaf)))))
    # Lanes lie in the order of their leaves, as in a depth-first walk.
    return Trie(tuple(segments), tuple(sorted(lanes)))


@given(
    trie=tries(),
    sizes=sizes(),
    window=st.integers(0, 12),
    softcap=st.sampled_from([0.0, 0.0, 3.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_attention_over_any_trie(trie, sizes, window, softcap, dtype, seed) -> None:
    heads = sizes[1:4]
    draw = Draw(dtype, seed)
    a = attention.forward_one_hot(draw, trie, *heads, window=window)
    got, expected = run("attention_forward", a), ORACLES["attention_forward"](a, EXACT)
    assert {n: equal_bits(got[n], expected[n]) for n in expected} == dict.fromkeys(expected)
    a = attention.backward(draw, trie, *heads, window=window, softcap=softcap)
    got, expected = run("attention_backward", a), ORACLES["attention_backward"](a, EXACT)
    loop = None if dtype == torch.float32 else ORACLES["attention_backward"](a, plain(dtype))
    assert judge("attention_backward", a, got, expected, loop) == {}
