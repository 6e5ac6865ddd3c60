"""One record per native op and situation; `integers` are those with one right answer to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import native_arguments as arguments
import native_norms as norms
import native_residuals as residuals
import native_tries as attention
import torch
from native_arguments import Arguments, Draw, Sizes
from native_oracles import EXACT, ORACLES, Outputs, plain
from native_tries import CROWD, FAR_READS, TRIES


@dataclass(frozen=True, eq=False)
class Case:
    op: str
    name: str
    make: Callable[[Draw], Arguments]
    integers: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        return self.make(Draw(dtype, seed))


# hidden, heads, kv_heads, head_dim, width: heads in groups of 1, 2, 4 and 8, every head_dim that
# models have, widths that are no multiple of a vector or of a tile.
SIZES = {
    "d16": Sizes(16, 1, 1, 16, 16),
    "d32-group2": Sizes(48, 2, 1, 32, 80),
    "d64-group4": Sizes(80, 4, 1, 64, 112),
    "d16-group8": Sizes(112, 8, 1, 16, 208),
    "d80": Sizes(208, 2, 2, 80, 48),
    "d96-group2": Sizes(64, 4, 2, 96, 64),
    "d128-group2": Sizes(32, 2, 1, 128, 144),
    "d256": Sizes(16, 2, 2, 256, 32),
    "d16-group4": Sizes(128, 8, 2, 16, 336),
}
SMALL, MIDDLE, WIDE = SIZES["d16"], SIZES["d32-group2"], SIZES["d16-group4"]
# None, one, around the rows of a tile, and past a chunk.
ROWS = (0, 1, 2, 5, 6, 7, 13, 33, 67)
# So many that each of three threads takes chunks of its own through a whole stage.
MANY_ROWS = 1100
# So many that a stage packs its weights once for all chunks.
MOST_ROWS = 3030


def _situations(op: str) -> dict[str, tuple[Sizes, int, dict[str, Any]]]:
    """Sizes, rows and options of the four dense halves."""
    found: dict[str, tuple[Sizes, int, dict[str, Any]]] = {}
    for i, (name, sizes) in enumerate(SIZES.items()):
        found[name] = (sizes, 5 + 6 * i, {})
    for rows in ROWS:
        found[f"rows{rows}"] = (MIDDLE, rows, {})
    # Beyond what a kernel takes at once of rows, of a sum, of the width in between, of the heads.
    found["chunks"] = (SMALL, 300, {})
    found["many-chunks"] = (SMALL, 1100, {})
    options = {"norms": True} if op.startswith("qkv") else {}
    if op.endswith("forward"):
        options |= {"biases": True, "keep": "all"}
    found["many-rows"] = (MIDDLE, MANY_ROWS, options)
    found["deep-sums"] = (Sizes(1040, 2, 1, 16, 1104), 13, {})
    found["packed-ahead"] = (Sizes(48, 2, 1, 16, 1104), MOST_ROWS, {})
    found["packed-ahead-deep"] = (Sizes(1040, 2, 1, 16, 48), MOST_ROWS, {})
    found["many-heads"] = (Sizes(16, 72, 9, 16, 1072), 7, {})
    if op.startswith("qkv"):
        for i, (name, sizes) in enumerate(SIZES.items()):
            found[f"qk-norm-{name}"] = (sizes, 9 + i, {"norms": True})
        for present in ("q", "k", "v", "kv", "qk"):
            found[f"only-{present}"] = (WIDE, 11, {"present": present})
            found[f"only-{present}-norms"] = (MIDDLE, 7, {"present": present, "norms": True})
        found["rope-scaled"] = (MIDDLE, 9, {"rope": 1.3})
    if op.endswith("forward"):
        found["biases"] = (WIDE, 19, {"biases": True})
        for keep in ("all", "none", "spare"):
            found[f"keep-{keep}"] = (MIDDLE, 12, {"keep": keep})
        found["large-eps"] = (MIDDLE, 9, {"eps": 0.1})
    else:
        found["one-row-read-by-all"] = (WIDE, 26, {"count": 1})
        found["many-saved-rows"] = (MIDDLE, 20, {"count": 90})
    if op == "qkv_forward":
        found["biases-norms"] = (WIDE, 14, {"biases": True, "norms": True})
        found["biases-only-kv"] = (MIDDLE, 14, {"biases": True, "present": "kv"})
    if op == "mlp_forward":
        for activation in (1, 2):
            for name, sizes in (("", MIDDLE), ("-wide", WIDE)):
                found[f"activation{activation}{name}"] = (sizes, 13, {"activation": activation})
    return found


# Ops with outputs that only a reader of linear layers asks for.
SHOWN = ("mlp_forward", "mlp_backward", "qkv_backward")
_NOT_AGAIN = {
    "chunks",
    "packed-ahead-deep",
    *(f"rows{rows}" for rows in ROWS if rows not in (0, 1, 6, 67)),
}


def _with_shown(op: str) -> dict[str, tuple[Sizes, int, dict[str, Any]]]:
    """The same situations, and most of them again with everything asked for."""
    found = _situations(op)
    if op not in SHOWN:
        return found
    again = {name: found[name] for name in found if name not in _NOT_AGAIN}
    return found | {
        f"{name}-shown": (sizes, rows, options | {"shown": True})
        for name, (sizes, rows, options) in again.items()
    }


def _dense() -> list[Case]:
    cases = []
    for op in ("qkv_forward", "mlp_forward", "mlp_backward", "qkv_backward"):
        random, integers = getattr(arguments, op), getattr(arguments, f"{op}_integers")
        for name, (sizes, rows, options) in _with_shown(op).items():
            cases.append(Case(op, name, _bound(random, sizes, rows, **options)))
            if "eps" not in options:  # integers come without
                cases.append(Case(op, name, _bound(integers, sizes, rows, **options), True))
    return cases


def _bound(make: Callable[..., Arguments], *sizes: Any, **options: Any) -> Callable[..., Arguments]:
    return lambda draw, **more: make(draw, *sizes, **options, **more)


HEADS = {name: (s.heads, s.kv_heads, s.head_dim) for name, s in SIZES.items()}


def _attention(op: str, make: Callable[..., Arguments]) -> list[Case]:
    found: dict[str, Callable[..., Arguments]] = {}
    for name, trie in TRIES.items():
        found[name] = _bound(make, trie, *HEADS["d32-group2"])
        for window in (1, 3, 8):
            if name in ("long", "group", "deep", "staggered", "reads", "tile-borders"):
                sizes = HEADS["d16"] if window == 3 else HEADS["d16-group4"]
                found[f"{name}-window{window}"] = _bound(make, trie, *sizes, window=window)
    for name, sizes in HEADS.items():
        found[f"heads-{name}"] = _bound(make, TRIES["group"], *sizes)
        found[f"reads-heads-{name}"] = _bound(make, TRIES["reads"], *sizes)
    group, sizes = TRIES["group"], HEADS["d16-group4"]
    found["crowd"] = _bound(make, CROWD, *sizes)
    found["far-reads"] = _bound(make, FAR_READS, *sizes)
    found["far-reads-window20"] = _bound(make, FAR_READS, *sizes, window=20)
    found["softcap-long"] = _bound(make, TRIES["long-branches"], *sizes, softcap=2.0, gain=3.0)
    if op == "attention_backward":
        for name in ("long", "group", "deep", "reads", "long-branches"):
            found[f"{name}-formed"] = _bound(make, TRIES[name], *sizes, keeps_out=False)
        found["formed-window"] = _bound(make, FAR_READS, *sizes, window=20, keeps_out=False)
        found["formed-softcap"] = _bound(
            make, group, *sizes, softcap=2.0, gain=3.0, keeps_out=False
        )
    found["window-over-all"] = _bound(make, group, *sizes, window=500)
    found["largest-window"] = _bound(make, group, *sizes, window=2**63 - 1)
    found["softcap"] = _bound(make, group, *sizes, softcap=2.0, gain=3.0)
    found["softcap-window"] = _bound(make, TRIES["deep"], *sizes, softcap=1.5, window=4, gain=3.0)
    found["large-scores"] = _bound(make, TRIES["tile-borders"], *sizes, gain=25.0)
    found["small-scores"] = _bound(make, group, *sizes, gain=1e-3)
    found["equal-keys"] = _bound(make, group, *sizes, equal_keys=True)
    found["equal-keys-window"] = _bound(make, TRIES["long"], *sizes, equal_keys=True, window=5)
    return [Case(op, name, make) for name, make in found.items()]


def _attention_integers() -> list[Case]:
    cases = []
    options: list[dict[str, Any]] = [{}, {"window": 1}, {"window": 4}, {"window": 200}]
    for name, trie in TRIES.items():
        for i, option in enumerate(options):
            sizes = HEADS[("d16-group4", "d32-group2", "d16", "d80")[i]]
            label = name + "".join(f"-{k}{v}" for k, v in option.items())
            one_hot = _bound(attention.forward_one_hot, trie, *sizes, **option)
            cases.append(Case("attention_forward", label, one_hot, True))
            ones = _bound(attention.backward_of_ones, trie, *sizes, **option)
            cases.append(Case("attention_backward", label, ones, True))
    crowd = _bound(attention.backward_of_ones, CROWD, *HEADS["d16-group4"])
    cases.append(Case("attention_backward", "crowd", crowd, True))
    for name in ("group", "long-branches"):
        trie, sizes = TRIES[name], HEADS["d16-group4"]
        formed = _bound(attention.backward_of_ones, trie, *sizes, keeps_out=False)
        cases.append(Case("attention_backward", f"{name}-formed", formed, True))
    for name, sizes in HEADS.items():
        for op, make in (
            ("attention_forward", attention.forward_one_hot),
            ("attention_backward", attention.backward_of_ones),
        ):
            cases.append(Case(op, f"heads-{name}", _bound(make, TRIES["siblings"], *sizes), True))
    return cases


def _products() -> list[Case]:
    shapes = [(0, 16, 5), (1, 16, 1), (2, 48, 7), (5, 80, 64), (6, 112, 65), (13, 208, 97)]
    shapes += [(33, 64, 130), (67, 16, 33), (7, 256, 191), (300, 32, 16)]
    shapes += [(9, 1040, 1030), (MANY_ROWS, 16, 17), (5, 1104, 33)]
    cases = []
    for make, integers in ((arguments.linear, False), (arguments.linear_integers, True)):
        for bias in (False, True):
            for rows, width, out in shapes:
                name = f"{rows}x{width}x{out}" + "-bias" * bias
                cases.append(
                    Case("linear", name, _bound(make, rows, width, out, bias=bias), integers)
                )
    # The same products backwards: sums over `out`, which may be any number, into the width.
    for make, integers in (
        (arguments.linear_backward, False),
        (arguments.linear_backward_integers, True),
    ):
        for rows, width, out in [*shapes, (3, 16, 0)]:
            bound = _bound(make, rows, out, width)
            cases.append(Case("linear_backward", f"{rows}x{out}x{width}", bound, integers))
    sizes = [(0, 1, 16), (1, 1, 16), (3, 0, 16), (5, 3, 48), (17, 8, 80), (2, 33, 208), (70, 2, 64)]
    for make, integers in (
        (arguments.embedding_scores, False),
        (arguments.embedding_scores_integers, True),
    ):
        for readout, word in enumerate(("dot", "l1", "l2")):
            for rows, lanes, width in sizes:
                bound = _bound(make, rows, lanes, width, readout=readout)
                cases.append(
                    Case("embedding_scores", f"{word}-{rows}x{lanes}x{width}", bound, integers)
                )
    return cases


def _attributions() -> list[Case]:
    # None, one, around eight, and past what a response has.
    ragged = [3, 0, 1, 2, 7, 8, 9, 16, 17, 0, 31, 450, 1030, 5, 5, 5, 1]
    found: dict[str, Callable[..., Arguments]] = {}
    for name, lengths in {"ragged": ragged, "one": [13], "empty": [0, 0], "none": []}.items():
        for standardise in (False, True):
            label = name + "-standardised" * standardise
            for word, temperature in (("", 1.0), ("-warm", 30.0), ("-sharp", 0.2), ("-cold", 1e-3)):
                options = {"temperature": temperature * (1 if standardise else 1e-3)}
                found[label + word] = _bound(
                    arguments.attribution_rewards, lengths, standardise=standardise, **options
                )
    for word, spread in (("none", 0.0), ("below", 2e-6), ("above", 4e-6), ("ample", 1e-3)):
        found[f"spread-{word}"] = _bound(
            arguments.attribution_rewards, [40, 41, 0, 1], standardise=True, spread=spread, mean=-1
        )
    cases = [Case("attribution_rewards", name, make) for name, make in found.items()]
    powers = [2, 1, 0, 4, 16, 512, 8, 8, 64, 32, 1, 128]
    for name, lengths in {"ragged": powers, "one": [16], "none": []}.items():
        for standardise in (False, True):
            make = _bound(arguments.attribution_rewards_integers, lengths, standardise=standardise)
            label = name + "-standardised" * standardise
            cases.append(Case("attribution_rewards", label, make, True))
    return cases


def _squared_norms() -> list[Case]:
    # Widths around a vector, a panel and the rows of a task (1008), odd ones, and those whose Gram
    # matrices cost less than the gradient up to 63, 64 and 199 entries on the widest panels.
    shapes = [(1, 1), (7, 33), (16, 16), (48, 80), (65, 97), (128, 128), (200, 1030), (1040, 48)]
    shapes += [(264, 264), (127, 129), (31, 2064)]
    found: dict[str, tuple[str, Callable[..., Arguments]]] = {}
    for width, out in shapes:
        for layout in norms.LAYOUTS:
            make = _bound(norms.gradient_norms, width, out, [*norms.RAGGED], layout=layout)
            found[f"{width}x{out}-{layout}"] = ("squared_gradient_norms", make)
    some: dict[str, list[int]] = {"none": [], "empty": [0, 0], "one": [1], "alone": [64]}
    for name, lengths in some.items():
        make = _bound(norms.gradient_norms, 48, 80, lengths)
        found[name] = ("squared_gradient_norms", make)
    # Both beyond what a task takes: of the rows of a Gram matrix, and of the terms of a gradient.
    make = _bound(norms.gradient_norms, 1280, 1280, [1100])
    found["long-gram"] = ("squared_gradient_norms", make)
    make = _bound(norms.gradient_norms, 48, 80, [1100, 513])
    found["long-gradient"] = ("squared_gradient_norms", make)
    for width in (16, 48, 64, 80, 208):
        for layout in norms.LAYOUTS:
            make = _bound(norms.row_sums, width, [*norms.RAGGED, 1100], layout=layout)
            found[f"row-sums-{width}-{layout}"] = ("squared_row_sums", make)
    for name, lengths in some.items():
        found[f"row-sums-{name}"] = ("squared_row_sums", _bound(norms.row_sums, 48, lengths))
    return [
        Case(op, name, partial(make, integers=integers), integers)
        for name, (op, make) in found.items()
        for integers in (False, True)
    ]


CASES = [
    *_dense(),
    *_attention("attention_forward", attention.forward),
    *_attention("attention_backward", attention.backward),
    *_attention_integers(),
    *_products(),
    *_attributions(),
    *(Case("residual_sums", *record) for record in residuals.cases()),
    *_squared_norms(),
]
OPS = tuple(dict.fromkeys(case.op for case in CASES))


# Each op as it is, and again with everything that may be asked of it.
VARIANTS = [(op, False) for op in OPS] + [(op, True) for op in SHOWN]

# All of it in float64, whatever the model's dtype: held to a number, and nothing to average out.
IN_FLOAT64 = ("attribution_rewards",)


def select(op: str | None = None, integers: bool | None = None) -> list[Case]:
    return [case for case in CASES if op in (None, case.op) and integers in (None, case.integers)]


def many_rows(op: str, draw: Draw, shown: bool = False) -> Arguments:
    """Arguments with many complete rows: for what is a matter of statistics, and for threads.

    `shown`: with everything that a reader of linear layers asks for.
    """
    sizes = Sizes(64, 4, 2, 16, 96)
    if op == "linear":
        return arguments.linear(draw, 150, 64, 80, bias=True)
    if op == "linear_backward":
        return arguments.linear_backward(draw, 150, 83, 64)
    if op == "embedding_scores":
        return arguments.embedding_scores(draw, 150, 2, 64)
    if op == "attribution_rewards":
        return arguments.attribution_rewards(draw, [40] * 150, temperature=1e-3)
    if op == "residual_sums":
        stretches = [(owner, 2) for owner in range(75)]
        return residuals.residual_sums(draw, stretches, 96, owners=75)
    # Rows of their answers are lanes: as Gram matrices the shorter ones, on panels of every width.
    lengths = [3 + 7 * lane % 50 for lane in range(150)]
    if op == "squared_gradient_norms":
        return norms.gradient_norms(draw, 80, 112, lengths)
    if op == "squared_row_sums":
        return norms.row_sums(draw, 80, lengths)
    if op == "attention_forward":
        return attention.forward(draw, TRIES["tile-borders"], 4, 2, 16)
    if op == "attention_backward":
        return attention.backward(draw, TRIES["tile-borders"], 4, 2, 16)
    options: dict[str, Any] = {"keep": "all"} if op.endswith("forward") else {"count": 150}
    if shown:
        options |= {"shown": True} | ({"norms": True} if op == "qkv_backward" else {})
    make: Callable[..., Arguments] = getattr(arguments, op)
    return make(draw, sizes, 150, **options)


@cache
def _made(case: Case, dtype: torch.dtype) -> Arguments:
    return case.arguments(dtype)


def shared(case: Case, dtype: torch.dtype) -> Arguments:
    """The case's arguments, made once: for who writes to no tensor of theirs."""
    return dict(_made(case, dtype))


@cache
def truth(case: Case, dtype: torch.dtype) -> Outputs:
    """The op's outputs in float64, for arguments in `dtype`."""
    a = shared(case, dtype)
    if case.integers and case.op == "attention_backward":
        return attention.given_lse_backward(a)
    return ORACLES[case.op](a, EXACT)


@cache
def yardstick(case: Case, dtype: torch.dtype) -> Outputs | None:
    """What plain PyTorch makes of it in low precision; float32 is held to a number instead."""
    if dtype == torch.float32 or case.op in IN_FLOAT64:
        return None
    return ORACLES[case.op](shared(case, dtype), plain(dtype))
