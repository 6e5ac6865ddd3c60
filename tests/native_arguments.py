"""Arguments of the native ops' dense halves: at the scale of a real model, or integers.

Integers are chosen so that every intermediate result is one that bfloat16 holds: norms meet rows of
±1, weights have few entries, activations are where they are exactly 0 or the identity. A kernel may
then sum in any order and round where it likes, and still has one right answer, to the bit.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]


class Sizes(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int  # of gate and up


class Draw:
    """Random tensors in the dtypes of the ops' arguments, from one generator."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=self.generator)

    def stored(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return self.normal(*shape, scale=scale, mean=mean).to(self.dtype)

    def weight(self, out: int, width: int, gain: float = 1.0) -> Tensor:
        return self.stored(out, width, scale=gain * width**-0.5)

    def integers(self, *shape: int, most: int = 2) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=self.generator).float()

    def signs(self, *shape: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=self.generator) - 1.0

    def one_of(self, values: list[float], *shape: int) -> Tensor:
        at = torch.randint(0, len(values), shape, generator=self.generator)
        return torch.tensor(values)[at]

    def sparse(self, rows: int, width: int, entries: int, size: float = 1.0) -> Tensor:
        """`entries` entries ±size in every row, at most."""
        out = torch.zeros(rows, width)
        at = torch.randint(0, width, (rows, entries), generator=self.generator)
        return out.scatter_(1, at, size * self.signs(rows, entries))

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def quarter_turns(self, rows: int, half: int) -> tuple[Tensor, Tensor]:
        quarter = torch.randint(0, 4, (rows, half), generator=self.generator)
        cos, sin = torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, 0, -1])
        return cos[quarter], sin[quarter]

    def turns(self, rows: int, half: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        angle = 6.3 * torch.rand(rows, half, generator=self.generator)
        return scaling * angle.cos(), scaling * angle.sin()


def where_kept(draw: Draw, rows: int, kind: str) -> tuple[Tensor, int]:
    """`keep` and how many rows are kept: "all", "none", "some" (out of order), "spare" (more rows
    than anybody writes)."""
    if kind == "all":
        return torch.arange(rows, dtype=torch.int32), rows
    if kind == "none":
        return torch.full((rows,), -1, dtype=torch.int32), 0
    chosen = draw.order(rows)[: (rows + 1) // 2]
    count = len(chosen) + (2 if kind == "spare" else 0)
    keep = torch.full((rows,), -1, dtype=torch.int32)
    keep[chosen] = draw.order(count)[: len(chosen)].int()
    return keep, count


def saved_rows(draw: Draw, rows: int, count: int) -> Tensor:
    """Lanes that read the same row, in no order."""
    return torch.randint(0, count, (rows,), generator=draw.generator, dtype=torch.int32)


# --- forward --------------------------------------------------------------------------------------


def qkv_forward(
    draw: Draw,
    s: Sizes,
    rows: int,
    *,
    keep: str = "some",
    present: str = "qkv",
    biases: bool = False,
    norms: bool = False,
    eps: float = 1e-5,
    rope: float = 1.0,
) -> Arguments:
    cos, sin = draw.turns(rows, s.head_dim // 2, rope)
    where, count = where_kept(draw, rows, keep)
    a: Arguments = {
        "x": draw.normal(rows, s.hidden, scale=0.3),
        "input_norm": draw.stored(s.hidden, scale=0.3, mean=1.0),
    }
    for name in "qkv":
        out = (s.heads if name == "q" else s.kv_heads) * s.head_dim
        there = name in present
        a[f"w{name}"] = draw.weight(out, s.hidden) if there else None
        a[f"b{name}"] = draw.stored(out, scale=0.5) if there and biases else None
    for name in "qk":
        there = norms and name in present
        a[f"{name}_norm"] = draw.stored(s.head_dim, scale=0.3, mean=1.4) if there else None
    return a | {
        "cos": cos, "sin": sin, "keep": where, "kept": count, "head_dim": s.head_dim, "eps": eps,
        "scaling": s.head_dim**-0.5,
    }  # fmt: skip


def qkv_forward_integers(draw: Draw, s: Sizes, rows: int, **options: Any) -> Arguments:
    a = qkv_forward(draw, s, rows, **options)
    normed = a["q_norm"] is not None or a["k_norm"] is not None
    size = draw.one_of([1.0, 2.0], rows, 1)
    a["x"], a["eps"] = size * draw.signs(rows, s.hidden), 0.0
    a["input_norm"] = draw.signs(s.hidden)
    for name in "qkv":
        if a[f"w{name}"] is not None:
            # Behind a norm of its own a head consists of ±2.
            entries, value = (1, 2.0) if normed and name != "v" else (3, 1.0)
            a[f"w{name}"] = draw.sparse(*a[f"w{name}"].shape, entries, value)
        if a[f"b{name}"] is not None:
            zero = normed and name != "v"
            a[f"b{name}"] = draw.integers(*a[f"b{name}"].shape, most=0 if zero else 2)
        if name != "v" and a[f"{name}_norm"] is not None:
            a[f"{name}_norm"] = draw.one_of([-2.0, -1, 1, 2], s.head_dim)
    a["cos"], a["sin"] = draw.quarter_turns(rows, s.head_dim // 2)
    return stored(a, draw.dtype) | {"scaling": 0.5}


def mlp_forward(
    draw: Draw,
    s: Sizes,
    rows: int,
    *,
    keep: str = "some",
    biases: bool = False,
    activation: int = 0,
    eps: float = 1e-5,
    shown: bool = False,
) -> Arguments:
    where, count = where_kept(draw, rows, keep)
    mixed = s.heads * s.head_dim

    def bias(width: int) -> Tensor | None:
        return draw.stored(width, scale=0.5) if biases else None

    return {
        "x": draw.normal(rows, s.hidden, scale=0.3),
        "attended": draw.normal(rows, s.heads, s.head_dim, scale=0.5),
        "wo": draw.weight(s.hidden, mixed), "bo": bias(s.hidden),
        "post_norm": draw.stored(s.hidden, scale=0.3, mean=1.0),
        "w_gate": draw.weight(s.width, s.hidden), "b_gate": bias(s.width),
        "w_up": draw.weight(s.width, s.hidden), "b_up": bias(s.width),
        "w_down": draw.weight(s.hidden, s.width), "b_down": bias(s.hidden),
        "keep": where, "kept": count, "eps": eps, "activation": activation,
        "shown": shown,
    }  # fmt: skip


def mlp_forward_integers(draw: Draw, s: Sizes, rows: int, **options: Any) -> Arguments:
    a = mlp_forward(draw, s, rows, **options)
    a["attended"] = draw.integers(*a["attended"].shape)
    a["wo"] = draw.sparse(*a["wo"].shape, 3)
    a["post_norm"] = draw.signs(s.hidden)
    a["w_gate"] = draw.sparse(s.width, s.hidden, 1, 128.0)
    a["w_up"] = draw.sparse(s.width, s.hidden, 2)
    a["w_down"] = draw.sparse(s.hidden, s.width, 3)
    for name, most in (("bo", 2), ("b_up", 2), ("b_down", 2)):
        if a[name] is not None:
            a[name] = draw.integers(*a[name].shape, most=most)
    if a["b_gate"] is not None:
        # Gates of -128, 0, 128 and 256: there every activation is 0 or the identity.
        a["b_gate"] = draw.one_of([0.0, 128.0], s.width)
    # What attention adds brings every row to ±1 or ±2.
    added = a["attended"].flatten(1) @ a["wo"].T + (0 if a["bo"] is None else a["bo"])
    a["x"] = draw.one_of([1.0, 2.0], rows, 1) * draw.signs(rows, s.hidden) - added
    return stored(a, draw.dtype) | {"eps": 0.0}


# --- backward -------------------------------------------------------------------------------------


def _norm_rows(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """What an RMSNorm of such rows keeps."""
    x = draw.normal(*shape, scale=0.4)
    rstd = (x.square().mean(-1) + 1e-5).rsqrt()
    return (x * rstd[..., None]).to(draw.dtype), rstd


def _one_hot_norms(draw: Draw, *shape: int) -> Tensor:
    """Rows with one entry ±n, so that n² is a multiple of their width: mean(g * normed) * normed
    is an integer. Zeros where that would be more than bfloat16 holds."""
    *rows, width = shape
    size = width // 4 if width <= 256 else 0
    return draw.sparse(math.prod(rows), width, 1, size).view(shape)


def mlp_backward(
    draw: Draw, s: Sizes, rows: int, *, count: int = 7, shown: bool = False
) -> Arguments:
    mixed = s.heads * s.head_dim
    normed, rstd = _norm_rows(draw, count, s.hidden)
    return {
        "dx": draw.normal(rows, s.hidden, scale=0.02),
        "saved": saved_rows(draw, rows, count),
        "wo": draw.weight(s.hidden, mixed),
        "post_norm": draw.stored(s.hidden, scale=0.3, mean=1.0),
        "w_gate": draw.weight(s.width, s.hidden), "w_up": draw.weight(s.width, s.hidden),
        "w_down": draw.weight(s.hidden, s.width),
        "normed": normed, "rstd": rstd,
        "d_gate": draw.stored(count, s.width, scale=0.6),
        "d_up": draw.stored(count, s.width, scale=0.4),
        "heads": s.heads, "head_dim": s.head_dim, "shown": shown,
    }  # fmt: skip


def mlp_backward_integers(draw: Draw, s: Sizes, rows: int, **options: Any) -> Arguments:
    a = mlp_backward(draw, s, rows, **options)
    count, most = len(a["rstd"]), 1 if a["shown"] else 2
    a["dx"] = draw.integers(rows, s.hidden, most=most)
    # Every column of a weight is a row of the product that comes back.
    a["wo"] = draw.sparse(s.heads * s.head_dim, s.hidden, 2).T.contiguous()
    a["w_gate"] = draw.sparse(s.hidden, s.width, 3).T.contiguous()
    a["w_up"] = draw.sparse(s.hidden, s.width, 3).T.contiguous()
    a["w_down"] = draw.sparse(s.width, s.hidden, 2).T.contiguous()
    a["post_norm"] = draw.signs(s.hidden)
    a["normed"], a["rstd"] = torch.zeros(count, s.hidden), draw.one_of([0.5, 1.0], count)
    if a["shown"]:
        a["normed"] = _one_hot_norms(draw, count, s.hidden)
    for name in ("d_gate", "d_up"):
        a[name] = draw.integers(count, s.width, most=most)
    return stored(a, draw.dtype)


def qkv_backward(
    draw: Draw,
    s: Sizes,
    rows: int,
    *,
    count: int = 7,
    present: str = "qkv",
    norms: bool = False,
    rope: float = 1.0,
    shown: bool = False,
) -> Arguments:
    cos, sin = draw.turns(count, s.head_dim // 2, rope)
    normed, rstd = _norm_rows(draw, count, s.hidden)
    a: Arguments = {
        "dx": draw.normal(rows, s.hidden, scale=0.02),
        "saved": saved_rows(draw, rows, count),
        "input_norm": draw.stored(s.hidden, scale=0.3, mean=1.0),
        "cos": cos, "sin": sin, "normed": normed, "rstd": rstd,
        "head_dim": s.head_dim, "scaling": s.head_dim**-0.5, "shown": shown,
    }  # fmt: skip
    for name in "qkv":
        heads = s.heads if name == "q" else s.kv_heads
        there = name in present
        grad = draw.normal(rows, heads, s.head_dim, scale=0.05)
        grad = grad.to(draw.dtype) if name == "q" else grad
        a[f"d{name}"] = grad if there else None
        a[f"w{name}"] = draw.weight(heads * s.head_dim, s.hidden) if there else None
        if name != "v":
            there = there and norms
            a[f"{name}_norm"] = draw.stored(s.head_dim, scale=0.3, mean=1.4) if there else None
            head_rows = _norm_rows(draw, count, heads, s.head_dim)
            a[f"{name}_normed"], a[f"{name}_rstd"] = head_rows if there else (None, None)
    return a


def qkv_backward_integers(draw: Draw, s: Sizes, rows: int, **options: Any) -> Arguments:
    a = qkv_backward(draw, s, rows, **options)
    count = len(a["rstd"])
    a["dx"] = draw.integers(rows, s.hidden)
    a["input_norm"] = draw.signs(s.hidden)
    a["normed"], a["rstd"] = torch.zeros(count, s.hidden), draw.one_of([0.5, 1.0], count)
    if a["shown"]:
        a["normed"] = _one_hot_norms(draw, count, s.hidden)
    a["cos"], a["sin"] = draw.quarter_turns(count, s.head_dim // 2)
    a["scaling"] = 0.5
    for name in "qkv":
        if a[f"d{name}"] is None:
            continue
        a[f"d{name}"] = draw.integers(*a[f"d{name}"].shape)
        out, width = a[f"w{name}"].shape
        a[f"w{name}"] = draw.sparse(width, out, 3).T.contiguous()
        if a.get(f"{name}_norm") is not None:
            a[f"{name}_norm"] = draw.one_of([-2.0, -1, 1, 2], s.head_dim)
            shape = a[f"{name}_normed"].shape
            rows_of_heads = _one_hot_norms(draw, *shape) if a["shown"] else torch.zeros(shape)
            a[f"{name}_normed"] = rows_of_heads
            a[f"{name}_rstd"] = draw.one_of([0.5, 1.0], *a[f"{name}_rstd"].shape)
    return stored(a, draw.dtype)


# --- products and read-outs -----------------------------------------------------------------------


def linear(draw: Draw, rows: int, width: int, out: int, *, bias: bool = False) -> Arguments:
    return {
        "x": draw.stored(rows, width),
        "weight": draw.weight(out, width),
        "bias": draw.stored(out, scale=0.5) if bias else None,
    }


def linear_integers(
    draw: Draw, rows: int, width: int, out: int, *, bias: bool = False
) -> Arguments:
    a: Arguments = {"x": draw.integers(rows, width, most=4)}
    a["weight"] = draw.integers(out, width, most=4)
    a["bias"] = draw.integers(out, most=9) if bias else None
    return stored(a, draw.dtype)


def linear_backward(draw: Draw, rows: int, out: int, width: int) -> Arguments:
    return {"grad": draw.normal(rows, out, scale=0.02), "weight": draw.weight(out, width)}


def linear_backward_integers(draw: Draw, rows: int, out: int, width: int) -> Arguments:
    """Gradients have more digits than bfloat16: they are float, and stay so."""
    a = {"grad": draw.integers(rows, out, most=999), "weight": draw.integers(out, width, most=4)}
    return stored(a, draw.dtype)


def embedding_scores(
    draw: Draw, rows: int, lanes: int, width: int, *, readout: int = 0
) -> Arguments:
    return {
        "values": draw.normal(rows, width, scale=0.02),
        "grads": draw.normal(rows, lanes, width, scale=0.02),
        "readout": readout,
    }


def embedding_scores_integers(
    draw: Draw, rows: int, lanes: int, width: int, *, readout: int = 0
) -> Arguments:
    a = embedding_scores(draw, rows, lanes, width, readout=readout)
    return a | {"values": draw.integers(rows, width), "grads": draw.integers(rows, lanes, width)}


def attribution_rewards(
    draw: Draw,
    lengths: list[int],
    *,
    temperature: float = 1.0,
    standardise: bool = False,
    spread: float = 1e-3,
    mean: float = 0.0,
) -> Arguments:
    """Three segments to a response, which begin at its first, second and third token."""
    starts, count = list[int](), 1
    for j, length in enumerate(lengths):
        first = count if j % 3 == 0 else starts[-1] - (j - 1) % 3
        starts.append(first + j % 3)
        count = max(count, starts[-1] + length)
    total = sum(lengths)
    return {
        # Digits that float32 does not hold.
        "scores": mean + spread / 3 * draw.normal(total).double(),
        "offsets": torch.tensor([0, *accumulate(lengths)]),
        "weights": draw.normal(len(lengths), scale=2.0).double() / 3,
        "starts": torch.tensor(starts, dtype=torch.int64),
        "count": count + 2,  # nobody earns the first and the last two
        "temperature": temperature,
        "standardise": standardise,
    }


def attribution_rewards_integers(
    draw: Draw, lengths: list[int], *, standardise: bool = False
) -> Arguments:
    """Alphas are 0 and 1 / n with n a power of two: scores are two numbers, far from each other.

    Lengths are powers of two, or 0. Standardised the scores are ±1, half of them each.
    """
    a = attribution_rewards(draw, lengths, temperature=2.0**-11, standardise=standardise)
    scores = []
    for length in lengths:
        high = length if length < 2 else length // 2
        part = torch.cat((torch.ones(high), -torch.ones(length - high)))
        scores.append(part[draw.order(length)].double())
    weights = draw.one_of([-3.0, -1.0, 1.0, 2.0], len(lengths)).double()
    return a | {"scores": torch.cat([torch.zeros(0).double(), *scores]), "weights": weights}


# Arguments that are float32 whatever the model's dtype.
FLOATS = {"x", "attended", "cos", "sin", "dx", "dk", "dv", "rstd", "q_rstd", "k_rstd", "grad"}


def stored(a: Arguments, dtype: torch.dtype) -> Arguments:
    """Integer-valued arguments in the dtypes the ops want; nothing is lost."""
    out = dict(a)
    for name, value in a.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wide = name in FLOATS and not (name == "x" and "weight" in a)
            out[name] = value.to(torch.float32 if wide else dtype)
            assert torch.equal(out[name].double(), value.double()), name
    return out
