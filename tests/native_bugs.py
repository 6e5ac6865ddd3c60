"""Bugs for the rules that judge the native ops, planted into the oracle."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise

import native_oracles
import pytest
import torch
from native_oracles import Arguments, Outputs, spread
from native_planting import Bug, Implementation, exactly, right, rounded
from torch import Tensor

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
    "squared_gradient_norms": "grads", "squared_row_sums": "x",
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


# --- in what a reader of linear layers asks for ---------------------------------------------------


def shown_changed(name: str, change: Callable[[str, Arguments, Outputs], Tensor]) -> Implementation:
    """One output, where it is asked for; the others are right."""

    def implementation(op: str, a: Arguments, integers: bool) -> Outputs:
        out = right(op, a, integers)
        return out | {name: change(op, a, out)} if name in out else out

    return implementation


def _halves_exchanged(op: str, a: Arguments, out: Outputs) -> Tensor:
    return out["gate_up"].roll(out["gate_up"].shape[1] // 2, 1)


def _with_the_weight(op: str, a: Arguments, out: Outputs) -> Tensor:
    weight = a["post_norm" if op == "mlp_backward" else "input_norm"]
    return out["norm_products"] * weight.float()


def _other_arguments(
    name: str, change: Callable[[Arguments], Arguments]
) -> Callable[[str, Arguments, Outputs], Tensor]:
    """That output for other arguments."""
    return lambda op, a, out: right(op, a | change(a))[name]


def _first_head(a: Arguments) -> Arguments:
    dq = torch.zeros_like(a["dq"])
    dq[:, 0] = a["dq"][:, 0]
    return {"dq": dq}


# --- in squared norms -----------------------------------------------------------------------------


def squares_from(total: Callable[[Tensor, Tensor], Tensor]) -> Implementation:
    """Another number for every lane, from its two Gram matrices, multiplied."""

    def implementation(op: str, a: Arguments, integers: bool) -> Outputs:
        inputs, grads, found = a["inputs"].double(), a["grads"].double(), []
        for start, stop in pairwise(a["offsets"].tolist()):
            x, g = inputs[a["kept"][start:stop]], grads[a["rows"][start:stop]]
            found.append(total((x @ x.T) * (g @ g.T), x.T @ g))
        return {"out": torch.stack(found)}

    return implementation


def _odd_entry_dropped(op: str, a: Arguments, integers: bool) -> Outputs:
    """The last entry of lanes with an odd number of them, which belongs to no pair."""
    lengths = a["offsets"].diff()
    lanes = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    last = torch.arange(len(lanes)) + 1 == a["offsets"][1:][lanes]
    keeps = ~(last & (lengths % 2 == 1)[lanes])
    shorter = torch.cat((torch.zeros(1, dtype=torch.int64), (lengths - lengths % 2).cumsum(0)))
    maps = {name: a[name][keeps] for name in ("kept", "rows") if name in a}
    return right(op, a | maps | {"offsets": shorter}, integers)


DENSE = ("qkv_forward", "mlp_forward", "mlp_backward", "qkv_backward")
FORWARD, BACKWARD = DENSE[:2], DENSE[2:]
SQUARED = ("squared_gradient_norms", "squared_row_sums")
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
    *(
        Bug(name, change, (op,))
        for op, name, change in (
            (
                "mlp_forward",
                "the activation without up",
                shown_changed("activated", lambda op, a, out: out["d_up"]),
            ),
            (
                "mlp_backward",
                "gate and up exchanged",
                shown_changed("gate_up", _halves_exchanged),
            ),
            (
                "mlp_backward",
                "products with the norm's weight",
                shown_changed("norm_products", _with_the_weight),
            ),
            (
                "qkv_backward",
                "products with the norm's weight",
                shown_changed("norm_products", _with_the_weight),
            ),
            (
                "qkv_backward",
                "output gradients before the turn back",
                shown_changed(
                    "projected",
                    _other_arguments(
                        "projected",
                        lambda a: {"cos": torch.ones_like(a["cos"]), "sin": 0 * a["sin"]},
                    ),
                ),
            ),
            (
                "qkv_backward",
                "output gradients before the heads' norms",
                shown_changed(
                    "projected",
                    _other_arguments("projected", lambda a: {"q_norm": None, "k_norm": None}),
                ),
            ),
            (
                "qkv_backward",
                "products of the first head alone",
                shown_changed("q_norm_products", _other_arguments("q_norm_products", _first_head)),
            ),
        )
    ),
    Bug("a lane that ends too soon", argument_changed(_first_segment_shorter), SQUARED),
    Bug("an odd entry dropped", _odd_entry_dropped, SQUARED),
    Bug("not squared", output_changed(Tensor.sqrt), SQUARED),
    Bug(
        "gradients of another entry",
        argument_changed(lambda op, a: {"rows": a["rows"].roll(1)}),
        SQUARED,
    ),
    Bug(
        "inputs of another entry",
        argument_changed(lambda op, a: {"kept": a["kept"].roll(1)}),
        SQUARED[:1],
    ),
    Bug(
        "gradients rounded to bfloat16",
        argument_changed(lambda op, a: {"grads": a["grads"].bfloat16().float()}),
        SQUARED[:1],
        (torch.float32,),
    ),
    *(
        Bug(name, squares_from(total), SQUARED[:1])
        for name, total in {
            "the tokens' norms, not that of their sum": lambda gram, _: gram.diagonal().sum(),
            "one triangle of the Gram matrices": lambda gram, _: gram.tril().sum(),
            "the diagonal twice": lambda gram, _: gram.sum() + gram.diagonal().sum(),
            "without its square": lambda _, grad: grad.sum().square(),
        }.items()
    ),
]
