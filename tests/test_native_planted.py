"""Planted bugs: the rules that judge the native ops catch them, in every dtype.

The bugs are planted into the oracle, rounded to the dtypes of the op's outputs, so that they are
caught whether the native ops are built or not. What is right passes every rule first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import native_oracles
import pytest
import torch
from native_arguments import Draw
from native_calls import DTYPES, IN_PLACE, Guarded, output_shapes
from native_cases import IN_FLOAT64, OPS, Case, many_rows, select, truth, yardstick
from native_oracles import EXACT, ORACLES, Arguments, Outputs, spread
from native_rules import equal_bits, judge, unbiased
from native_tries import given_lse_backward
from torch import Tensor

Implementation = Callable[[str, Arguments, bool], Outputs]

# Small ones of every kind of situation: the rules are the same for the others.
CHOSEN = {
    "qkv_forward": ["biases-norms", "large-eps", "rope-scaled"],
    "mlp_forward": ["biases", "large-eps"],
    "mlp_backward": ["d32-group2"],
    "qkv_backward": ["qk-norm-d32-group2", "rope-scaled"],
    "attention_forward": ["group", "group-window3", "softcap"],
    "attention_backward": ["group", "group-window3", "softcap"],
    "linear": ["13x208x97-bias"],
    "linear_backward": ["13x97x208"],
    "embedding_scores": ["dot-5x3x48", "l1-5x3x48", "l2-5x3x48"],
    "attribution_rewards": [
        "ragged",
        "ragged-sharp",
        "ragged-standardised",
        "ragged-standardised-sharp",
        "spread-below",
        "spread-above",
    ],
    "residual_sums": ["ragged", "ragged-2065", "plain"],
}
INTEGERS = {
    "qkv_forward": ["d32-group2", "biases", "rope-scaled"],
    "attention_forward": ["group", "group-window4"],
    "attention_backward": ["group", "group-window4"],
    "attribution_rewards": ["ragged", "ragged-standardised"],
    "residual_sums": ["ragged", "again"],
}


def chosen(op: str, integers: bool) -> list[Case]:
    names = INTEGERS.get(op, CHOSEN[op]) if integers else CHOSEN[op]
    return [case for case in select(op, integers) if case.name in names]


def exactly(op: str, a: Arguments, integers: bool) -> Outputs:
    ones = op == "attention_backward" and integers
    return given_lse_backward(a) if ones else ORACLES[op](a, EXACT)


def right(op: str, a: Arguments, integers: bool = False) -> Outputs:
    """The truth, rounded once to what the op writes."""
    return rounded(op, a, exactly(op, a, integers))


def rounded(op: str, a: Arguments, exact: Outputs) -> Outputs:
    shapes = output_shapes(op, a)
    wide = dict.fromkeys(IN_PLACE.get(op, []), torch.float32)
    return {n: x.to(wide.get(n) or shapes[n][1]) for n, x in exact.items()}


def refused(op: str, dtype: torch.dtype, implementation: Implementation) -> list[str]:
    """The rules that an implementation breaks."""
    broken = set()
    for case in chosen(op, integers=True):
        got, expected = implementation(op, case.arguments(dtype), True), truth(case, dtype)
        if any(equal_bits(got[n], expected[n]) for n in expected):
            broken.add("integers")
    for case in chosen(op, integers=False):
        a = case.arguments(dtype)
        got = implementation(op, a, False)
        if judge(op, a, got, truth(case, dtype), yardstick(case, dtype)):
            broken.add("random")
    if op in IN_FLOAT64:
        return sorted(broken)
    a = many_rows(op, Draw(dtype, 5))
    got, expected = implementation(op, a, False), ORACLES[op](a, EXACT)
    if any(unbiased(got[n], expected[n]) for n in expected):
        broken.add("mean")
    return sorted(broken)


@dataclass(frozen=True)
class Bug:
    name: str
    change: Callable[[str, Arguments, bool], Outputs]
    ops: tuple[str, ...] = OPS
    dtypes: tuple[torch.dtype, ...] = DTYPES


# --- in what comes out ----------------------------------------------------------------------------


def output_changed(change: Callable[[Tensor], Tensor]) -> Implementation:
    return lambda op, a, integers: {n: change(x) for n, x in right(op, a, integers).items()}


def one_output_scaled(factor: float) -> Implementation:
    """The last output only: the others are right."""

    def implementation(op: str, a: Arguments, integers: bool) -> Outputs:
        out = exactly(op, a, integers)
        last = list(out)[-1]
        # Before the one rounding, which would swallow 0.1 % if it came twice.
        return rounded(op, a, out | {last: out[last] * factor})

    return implementation


def _swap(x: Tensor) -> Tensor:
    # Rows that are written, and differ.
    rows = [i for i in range(len(x)) if x[i].isfinite().all()][-2:]
    out = x.clone()
    if len(rows) == 2:
        out[rows] = x[rows[::-1]]
    return out


def _row_missing(x: Tensor) -> Tensor:
    out = x.clone()
    out[-1:] = torch.nan
    return out


# --- in what goes in ------------------------------------------------------------------------------


def argument_changed(change: Callable[[str, Arguments], Arguments]) -> Implementation:
    return lambda op, a, integers: right(op, a | change(op, a), integers)


OPERANDS = {
    "qkv_forward": "wk", "mlp_forward": "w_up", "mlp_backward": "w_down", "qkv_backward": "wv",
    "attention_forward": "v", "attention_backward": "v", "linear": "weight",
    "linear_backward": "weight", "embedding_scores": "grads", "attribution_rewards": "weights",
    "residual_sums": "logits",
}  # fmt: skip


def _last_column_dropped(op: str, a: Arguments) -> Arguments:
    operand = a[OPERANDS[op]].clone()
    operand[..., -1] = 0
    return {OPERANDS[op]: operand}


def _segments_without_parents(op: str, a: Arguments) -> Arguments:
    segments = a["segments"].clone()
    segments[:, 3] = -1
    return {"segments": segments}


def _lanes_swapped_in_runs(op: str, a: Arguments) -> Arguments:
    lanes = a["run_lanes"].clone()
    for _, _, _, at, count in a["runs"].tolist():
        lanes[at : at + count] = lanes[at : at + count].flip(0)
    return {"run_lanes": lanes}


def _lanes_merged(op: str, a: Arguments, integers: bool) -> Outputs:
    """Keys of a shared segment get the first lane's gradient for every lane."""
    out = right(op, a, integers)
    for _, first, tokens, _, lanes in a["runs"].tolist():
        for name in ("dk", "dv"):
            rows = out[name][first : first + tokens * lanes].view(tokens, lanes, -1)
            rows[:] = rows[:, :1].clone()
    return out


def _heads_interleaved(op: str, a: Arguments) -> Arguments:
    _, kv_heads, _ = a["k"].shape
    heads = a["q"].shape[1]
    order = torch.arange(heads).view(kv_heads, -1).T.flatten()
    return {"q": a["q"][:, order]}


def _half_dropped(op: str, a: Arguments, integers: bool) -> Outputs:
    """The turn of the second half by the sine forgotten in the first half's formula."""
    return right(op, a | {"sin": -a["sin"]}, integers)


def _no_softcap_slope(op: str, a: Arguments, integers: bool) -> Outputs:
    attend = native_oracles.attend

    def flat(q: Tensor, k: Tensor, v: Tensor, softcap: float, at: native_oracles.Arithmetic):
        if not softcap:
            return attend(q, k, v, softcap, at)
        group = q.shape[0] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = at.einsum("hd,nhd->hn", q, k)
        scores = scores + (softcap * torch.tanh(scores / softcap) - scores).detach()
        return at.einsum("hn,nhd->hd", scores.softmax(-1), v), scores.logsumexp(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_oracles, "attend", flat)
        return right(op, a, integers)


def spread_as(measure: Callable[[list[float]], float]) -> Implementation:
    """Another measure of the spread of scores."""

    def implementation(op: str, a: Arguments, integers: bool) -> Outputs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_oracles, "spread", measure)
            return right(op, a, integers)

    return implementation


def _of_a_sample(scores: list[float]) -> float:
    std = spread(scores)
    return std * math.sqrt(len(scores) / max(len(scores) - 1, 1))


def _last_of_what_overlaps(op: str, a: Arguments, integers: bool) -> Outputs:
    """Rewards that are written where they should be added to."""
    out = right(op, a, integers)
    parts = out["alpha"].split(a["offsets"].diff().tolist())
    for start, weight, alpha in zip(a["starts"].tolist(), a["weights"], parts, strict=True):
        out["rewards"][start : start + len(alpha)] = weight * alpha
    return out


def _unearned_left(op: str, a: Arguments, integers: bool) -> Outputs:
    out = right(op, a, integers)
    return out | {"rewards": torch.where(out["rewards"] == 0, torch.nan, out["rewards"])}


def _first_segment_shorter(op: str, a: Arguments) -> Arguments:
    offsets = a["offsets"].clone()
    offsets[1] -= 1
    return {"offsets": offsets}


def setting(**changed: object) -> Implementation:
    return argument_changed(lambda op, a: changed)


def dropped(*names: str) -> Implementation:
    """Biases of zero, norm weights of one."""

    def change(op: str, a: Arguments) -> Arguments:
        found = {n: a[n] for n in names if a.get(n) is not None}
        return {n: torch.ones_like(x) if "norm" in n else x * 0 for n, x in found.items()}

    return argument_changed(change)


def moved(name: str, by: int, least: int = 0) -> Implementation:
    return argument_changed(lambda op, a: {name: (a[name] + by).clamp_min(least)})


DENSE = ("qkv_forward", "mlp_forward", "mlp_backward", "qkv_backward")
FORWARD, BACKWARD = DENSE[:2], DENSE[2:]
ATTENTION = ("attention_forward", "attention_backward")
BUGS = [
    Bug("all zeros", output_changed(torch.zeros_like)),
    Bug("rows swapped", output_changed(_swap)),
    Bug("last row not written", output_changed(_row_missing)),
    Bug("1 % scale of one output", one_output_scaled(1.01)),
    Bug("0.1 % scale of one output", one_output_scaled(1.001)),
    Bug(
        "rounded to bfloat16",
        output_changed(lambda x: x.bfloat16().to(x.dtype)),
        dtypes=(torch.float32,),
    ),
    Bug("last column dropped", argument_changed(_last_column_dropped)),
    Bug("causal mask off by one", moved("positions", -1), ATTENTION),
    Bug("causal mask off by one, the other way", moved("positions", 1), ATTENTION),
    Bug("own segment only", argument_changed(_segments_without_parents), ATTENTION),
    Bug("no window", setting(window=0), ATTENTION),
    Bug(
        "window off by one", argument_changed(lambda op, a: {"window": a["window"] + 1}), ATTENTION
    ),
    Bug("no softcap", setting(softcap=0.0), ATTENTION),
    Bug("softcap without its slope", _no_softcap_slope, ("attention_backward",)),
    Bug("key heads interleaved", argument_changed(_heads_interleaved), ("attention_forward",)),
    Bug("one lane's gradient for another", argument_changed(_lanes_swapped_in_runs), ATTENTION[1:]),
    Bug("one lane's gradient for all", _lanes_merged, ATTENTION[1:]),
    Bug("eps dropped", setting(eps=0.0), FORWARD),
    Bug("no query scaling", setting(scaling=1.0), ("qkv_forward", "qkv_backward")),
    Bug("rotary the wrong way", _half_dropped, ("qkv_forward", "qkv_backward")),
    Bug(
        "no rotary scaling",
        argument_changed(lambda op, a: {n: a[n] / 1.3 for n in ("cos", "sin")}),
        ("qkv_forward", "qkv_backward"),
    ),
    *(
        Bug(f"no {name}", dropped(name), (op,))
        for op, names in {
            "qkv_forward": ["bq", "bk", "bv", "input_norm", "q_norm", "k_norm"],
            "mlp_forward": ["bo", "b_gate", "b_up", "b_down", "post_norm"],
            "mlp_backward": ["post_norm"],
            "qkv_backward": ["input_norm", "q_norm", "k_norm"],
            "linear": ["bias"],
        }.items()
        for name in names
    ),
    Bug(
        "the first saved row for all",
        argument_changed(lambda op, a: {"saved": a["saved"] * 0}),
        BACKWARD,
    ),
    Bug(
        "kept in the order of the rows",
        argument_changed(
            lambda op, a: {
                "keep": torch.where(a["keep"] >= 0, (a["keep"] >= 0).cumsum(0).int() - 1, a["keep"])
            }
        ),
        FORWARD,
    ),
    Bug(
        "another activation",
        argument_changed(lambda op, a: {"activation": (a["activation"] + 1) % 3}),
        ("mlp_forward",),
    ),
    Bug(
        "the last term of a sum dropped",
        argument_changed(lambda op, a: {"grad": a["grad"][:, :-1], "weight": a["weight"][:-1]}),
        ("linear_backward",),
    ),
    Bug(
        "gradients rounded to bfloat16",
        argument_changed(lambda op, a: {"grad": a["grad"].bfloat16().float()}),
        ("linear_backward",),
    ),
    Bug(
        "another read-out",
        argument_changed(lambda op, a: {"readout": (a["readout"] + 1) % 3}),
        ("embedding_scores",),
    ),
    *(
        Bug(name, change, ("attribution_rewards",))
        for name, change in {
            "rounded to float32": output_changed(lambda x: x.float().double()),
            "no temperature": setting(temperature=1.0),
            "never standardised": setting(standardise=False),
            "always standardised": setting(standardise=True),
            "the sample's standard deviation": spread_as(_of_a_sample),
            "spread without its rule": spread_as(statistics.pstdev),
            "everything from the first token on": moved("starts", -(10**6)),
            "one token late": moved("starts", 1),
            "only the last of what overlaps": _last_of_what_overlaps,
            "what nobody earns not written": _unearned_left,
            "a token of the next segment": argument_changed(_first_segment_shorter),
        }.items()
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_is_right_breaks_no_rule(op: str, dtype: torch.dtype) -> None:
    assert chosen(op, True) and len(chosen(op, False)) == len(CHOSEN[op])
    assert refused(op, dtype, right) == []


@pytest.mark.parametrize(
    ("bug", "op", "dtype"),
    [
        pytest.param(bug, op, dtype, id=f"{bug.name}-{op}-{dtype}".replace("torch.", ""))
        for bug in BUGS
        for op in bug.ops
        for dtype in bug.dtypes
    ],
)
def test_planted_bugs_are_caught(bug: Bug, op: str, dtype: torch.dtype) -> None:
    assert refused(op, dtype, bug.change)


def test_writing_beside_a_tensor_is_seen() -> None:
    for like in (torch.zeros(3, 5), torch.zeros(4).bfloat16(), torch.zeros(4, dtype=torch.int32)):
        for index in (0, -1, 36):
            guard = Guarded(like)
            assert guard.unharmed() and guard.unchanged()
            guard.memory[index] = 0
            assert not guard.unharmed()
        guard = Guarded(like)
        guard.tensor.view(-1)[0] = 1
        assert guard.unharmed() and not guard.unchanged()


def test_the_two_gelus_are_told_apart() -> None:
    """They differ by less than bfloat16 shows: in float32."""
    (case,) = (c for c in select("mlp_forward", False) if c.name == "activation2-wide")
    a, expected = case.arguments(torch.float32), truth(case, torch.float32)
    assert judge("mlp_forward", a, right("mlp_forward", a), expected) == {}
    assert judge("mlp_forward", a, right("mlp_forward", a | {"activation": 1}), expected)
