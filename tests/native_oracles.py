"""Every native op from its definition, slowly: one lane, one query, one formula at a time.

The same formulas serve twice. In `EXACT` arithmetic (float64 throughout) they are the truth. In
`plain(dtype)` they are what anybody writes in PyTorch: products of operands in the model's dtype,
everything else in float32; its error is the yardstick of the low-precision rule.

No gradient is written down here: backward ops are automatic differentiation of the forward
formula, at the very point that the saved tensors describe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = dict[str, Any]
Outputs = dict[str, Tensor]

ACTIVATIONS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"))


@dataclass(frozen=True)
class Arithmetic:
    """`narrow`: what operands of products are rounded to; `wide`: everything else."""

    wide: torch.dtype
    narrow: torch.dtype

    def take(self, x: Tensor) -> Tensor:
        return x.to(self.wide)

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.narrow).to(self.wide)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(self.narrow)
        return F.linear(x.to(self.narrow), weight.to(self.narrow), bias).to(self.wide)

    def einsum(self, equation: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(equation, a.to(self.narrow), b.to(self.narrow)).to(self.wide)


EXACT = Arithmetic(torch.float64, torch.float64)


def plain(dtype: torch.dtype) -> Arithmetic:
    return Arithmetic(torch.float32, dtype)


# --- parts ----------------------------------------------------------------------------------------


def rms(x: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """`x * rsqrt(mean(x**2) + eps)` and the rsqrt."""
    rstd = (x.square().mean(-1) + eps).rsqrt()
    return x * rstd[..., None], rstd


def point_of_norm(normed: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The x and eps at which an RMSNorm gives exactly this `normed` and this `rstd`.

    Whatever was rounded when they were kept: the gradient at that point is the gradient that the
    kept tensors define.
    """
    return normed / rstd[..., None], (1 - normed.square().mean(-1)) / rstd.square()


def one_for_every_row(scale: Tensor, rows: int) -> Tensor:
    """A norm's weight, as a leaf: the gradient of each row's is that row's part of the whole."""
    return scale.expand(rows, -1).clone().requires_grad_(True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + head_dim / 2) of `[rows, heads, head_dim]` turned by `[rows, head_dim / 2]`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def kept(rows: Tensor, keep: Tensor, count: int) -> Tensor:
    """`rows[i]` at `keep[i]`; NaN where nothing is kept, as nothing may be written there."""
    out = rows.new_full((count, *rows.shape[1:]), torch.nan)
    for row, at in zip(rows, keep.tolist(), strict=True):
        if at >= 0:
            out[at] = row
    return out


# --- the decoder's halves -------------------------------------------------------------------------


def qkv_forward(a: Arguments, at: Arithmetic) -> Outputs:
    normed, rstd = rms(at.take(a["x"]), a["eps"])
    h = at.round(normed) * at.take(a["input_norm"])
    keep, count = a["keep"], a["kept"]
    out = {"normed": kept(normed, keep, count), "rstd": kept(rstd, keep, count)}
    cos, sin = at.take(a["cos"]), at.take(a["sin"])
    for name, scale in (("q", a["scaling"]), ("k", 1.0), ("v", 1.0)):
        if a[f"w{name}"] is None:
            continue
        y = at.linear(h, a[f"w{name}"], a[f"b{name}"]).unflatten(-1, (-1, a["head_dim"]))
        if name != "v":
            if a[f"{name}_norm"] is not None:
                y, head_rstd = rms(y, a["eps"])
                out[f"{name}_normed"] = kept(y, keep, count)
                out[f"{name}_rstd"] = kept(head_rstd, keep, count)
                y = at.round(y) * at.take(a[f"{name}_norm"])
            y = rotate(y, cos, sin) * scale
        out[name] = y
    return out


def mlp_forward(a: Arguments, at: Arithmetic) -> Outputs:
    x = at.take(a["x"]) + at.linear(a["attended"].flatten(1), a["wo"], a["bo"])
    normed, rstd = rms(x, a["eps"])
    h = at.round(normed) * at.take(a["post_norm"])
    gate = at.linear(h, a["w_gate"], a["b_gate"]).requires_grad_(True)
    up = at.linear(h, a["w_up"], a["b_up"]).requires_grad_(True)
    activated = ACTIVATIONS[a["activation"]](gate) * up
    d_gate, d_up = torch.autograd.grad(activated.sum(), (gate, up))
    keep, count = a["keep"], a["kept"]
    return {
        "x": x + at.linear(activated.detach(), a["w_down"], a["b_down"]),
        "normed": kept(normed, keep, count),
        "rstd": kept(rstd, keep, count),
        "d_gate": kept(d_gate, keep, count),
        "d_up": kept(d_up, keep, count),
    } | ({"activated": kept(activated.detach(), keep, count)} if a["shown"] else {})


def mlp_backward(a: Arguments, at: Arithmetic) -> Outputs:
    saved = a["saved"].long()
    x, eps = point_of_norm(at.take(a["normed"])[saved], at.take(a["rstd"])[saved])
    x.requires_grad_(True)
    attended = torch.zeros(len(x), a["wo"].shape[1], dtype=at.wide, requires_grad=True)
    # Adding nothing: the point is x itself.
    mid = x + at.linear(attended, a["wo"])
    scale = one_for_every_row(at.take(a["post_norm"]), len(x))
    h = at.round(rms(mid, eps)[0]) * scale
    gate, up = at.linear(h, a["w_gate"]), at.linear(h, a["w_up"])
    # act(gate) * up around the point, whose slopes are what was kept.
    activated = at.take(a["d_gate"])[saved] * gate + at.take(a["d_up"])[saved] * up
    out = mid + at.linear(activated, a["w_down"])
    leaves = (x, attended, gate, up, scale)
    dx, grad, d_gate, d_up, d_scale = torch.autograd.grad(out, leaves, at.take(a["dx"]))
    found = {"dx": dx, "grad_attended": grad.unflatten(-1, (-1, a["head_dim"]))}
    if a["shown"]:
        found |= {"gate_up": torch.cat((d_gate, d_up), 1), "norm_products": d_scale}
    return found


def qkv_backward(a: Arguments, at: Arithmetic) -> Outputs:
    saved = a["saved"].long()
    x, eps = point_of_norm(at.take(a["normed"])[saved], at.take(a["rstd"])[saved])
    x.requires_grad_(True)
    scales = {"norm": one_for_every_row(at.take(a["input_norm"]), len(x))}
    h = at.round(rms(x, eps)[0]) * scales["norm"]
    cos, sin = at.take(a["cos"])[saved], at.take(a["sin"])[saved]
    projected, outputs, grads = [], [], []
    for name, scale in (("q", a["scaling"]), ("k", 1.0), ("v", 1.0)):
        if a[f"d{name}"] is None:
            continue
        projected.append(at.linear(h, a[f"w{name}"]))
        y = projected[-1].unflatten(-1, (-1, a["head_dim"]))
        if name != "v":
            if a[f"{name}_norm"] is not None:
                normed = at.take(a[f"{name}_normed"])[saved]
                point, head_eps = point_of_norm(normed, at.take(a[f"{name}_rstd"])[saved])
                y = y + (point - y).detach()
                of_heads = one_for_every_row(at.take(a[f"{name}_norm"]), len(x))
                scales[f"{name}_norm"] = of_heads
                y = at.round(rms(y, head_eps)[0]) * of_heads[:, None]
            y = rotate(y, cos, sin) * scale
        outputs.append(y)
        grads.append(at.take(a[f"d{name}"]))
    dx, *found = torch.autograd.grad(outputs, [x, *scales.values(), *projected], grads)
    products, sent = found[: len(scales)], found[len(scales) :]
    shown = {f"{name}_products": d for name, d in zip(scales, products, strict=True)}
    shown = {"projected": torch.cat(sent, 1)} | shown if a["shown"] else {}
    return {"dx": at.take(a["dx"]) + dx} | shown


# --- attention ------------------------------------------------------------------------------------


@cache
def path_keys(segments: tuple[tuple[int, ...], ...], segment: int) -> list[tuple[int, int]]:
    """(row of k and v, position) of every token from the root to the end of a segment."""
    start, stop, row, parent = segments[segment]
    before = path_keys(segments, parent) if parent >= 0 else []
    return before + [(row + position - start, position) for position in range(start, stop)]


def visible_rows(a: Arguments, segment: int, position: int) -> list[int]:
    """Rows of the keys that a query at `position` of a segment sees."""
    window, segments = a["window"], tuple(map(tuple, a["segments"].tolist()))
    return [
        row
        for row, at in path_keys(segments, segment)
        if at <= position and (window == 0 or at > position - window)
    ]


def attend(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, at: Arithmetic
) -> tuple[Tensor, Tensor]:
    """One query `[heads, head_dim]` over its keys `[n, kv_heads, head_dim]`."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = at.einsum("hd,nhd->hn", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    out = at.einsum("hn,nhd->hd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def attention_forward(a: Arguments, at: Arithmetic) -> Outputs:
    q, k, v = (at.take(a[name]) for name in "qkv")
    out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:2], torch.nan)
    for segment, first, count in a["blocks"].tolist():
        for row in range(first, first + count):
            rows = visible_rows(a, segment, int(a["positions"][row]))
            out[row], lse[row] = attend(q[row], k[rows], v[rows], a["softcap"], at)
    return {"out": out, "lse": lse}


def attention_backward(a: Arguments, at: Arithmetic) -> Outputs:
    """One lane after the other: what comes back to its own queries and to its own keys."""
    q, k, v = (at.take(a[name]) for name in "qkv")
    grad_out = at.take(a["grad_out"])
    dq = torch.full_like(grad_out, torch.nan)
    dk = k.new_zeros(a["key_rows"], *k.shape[1:])
    dv = torch.zeros_like(dk)
    block_lanes, run_lanes = a["block_lanes"].tolist(), a["run_lanes"].tolist()
    for lane in sorted({*block_lanes, *run_lanes}):
        keys, values = (x.clone().requires_grad_(True) for x in (k, v))
        queries, backward_rows, outs = [], [], []
        for segment, first, count, backward_row, lane_at, lanes in a["blocks"].tolist():
            names = block_lanes[lane_at : lane_at + lanes]
            if lane not in names:
                continue
            for i in range(count):
                query = q[first + i].clone().requires_grad_(True)
                rows = visible_rows(a, segment, int(a["positions"][first + i]))
                outs.append(attend(query, keys[rows], values[rows], a["softcap"], at)[0])
                queries.append(query)
                backward_rows.append(backward_row + i * lanes + names.index(lane))
        if not queries:
            continue
        grads = torch.autograd.grad(outs, [*queries, keys, values], list(grad_out[backward_rows]))
        for row, grad in zip(backward_rows, grads, strict=False):
            dq[row] = grad
        for segment, backward_row, tokens, lane_at, lanes in a["runs"].tolist():
            names = run_lanes[lane_at : lane_at + lanes]
            if lane in names:
                first = int(a["segments"][segment, 2])
                for t in range(tokens):
                    at_row = backward_row + t * lanes + names.index(lane)
                    dk[at_row], dv[at_row] = grads[-2][first + t], grads[-1][first + t]
    return {"dq": dq, "dk": dk, "dv": dv}


# --- read-outs ------------------------------------------------------------------------------------


def linear(a: Arguments, at: Arithmetic) -> Outputs:
    return {"out": at.linear(a["x"], a["weight"], a["bias"])}


def linear_backward(a: Arguments, at: Arithmetic) -> Outputs:
    """Float products in every dtype: nothing is rounded to it."""
    return {"out": at.take(a["grad"]) @ at.take(a["weight"])}


def embedding_scores(a: Arguments, at: Arithmetic) -> Outputs:
    grads = at.take(a["grads"])
    if a["readout"] == 0:
        return {"scores": (at.take(a["values"])[:, None] * grads).sum(-1)}
    if a["readout"] == 1:
        return {"scores": grads.abs().sum(-1)}
    return {"scores": grads.square().sum(-1).sqrt()}


def squared_gradient_norms(a: Arguments, at: Arithmetic) -> Outputs:
    """The gradient of `sum(grads * linear(inputs))`, squared, lane by lane; nothing is rounded."""
    inputs, grads = at.take(a["inputs"]), at.take(a["grads"])
    found = []
    for start, stop in pairwise(a["offsets"].tolist()):
        x, cotangent = inputs[a["kept"][start:stop]], grads[a["rows"][start:stop]]
        weight = torch.zeros(grads.shape[1], inputs.shape[1], dtype=at.wide, requires_grad=True)
        (grad,) = torch.autograd.grad(F.linear(x, weight), weight, cotangent)
        found.append(grad.double().square().sum())
    return {"out": torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)}


def squared_row_sums(a: Arguments, at: Arithmetic) -> Outputs:
    x = at.take(a["x"])
    spans = pairwise(a["offsets"].tolist())
    sums = [x[a["rows"][start:stop]].sum(0).double() for start, stop in spans]
    found = [total.square().sum() for total in sums]
    return {"out": torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)}


def spread(scores: list[float]) -> float:
    """The population standard deviation, 0 where it is at most 1e-6 of the largest |score|."""
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / len(scores))
    return std if std > 1e-6 * max(map(abs, scores)) else 0.0


def tempered(a: Arguments) -> list[list[float]]:
    """What the exponents of every segment are, before their maximum is taken away."""
    scores, found = a["scores"].tolist(), []
    for start, stop in pairwise(a["offsets"].tolist()):
        std = spread(scores[start:stop]) if a["standardise"] and start < stop else 1.0
        found.append([x / std / a["temperature"] if std else 0.0 for x in scores[start:stop]])
    return found


def attribution_rewards(a: Arguments, at: Arithmetic) -> Outputs:
    """Float64 whatever the arithmetic; sums are exact before they are rounded."""
    alpha: list[float] = []
    earned: list[list[float]] = [[] for _ in range(a["count"])]
    weights, starts = a["weights"].tolist(), a["starts"].tolist()
    for segment, weight, start in zip(tempered(a), weights, starts, strict=True):
        most = max(segment, default=0.0)
        shares = [math.exp(x - most) for x in segment]
        total = math.fsum(shares)
        for i, share in enumerate(shares):
            alpha.append(share / total)
            earned[start + i].append(weight * alpha[-1])
    found = {"alpha": alpha, "rewards": [math.fsum(terms) for terms in earned]}
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in found.items()}


# --- at the LM head -------------------------------------------------------------------------------


def residual_sums(a: Arguments, at: Arithmetic) -> Outputs:
    """One row after the other; the probability of all other words comes from those words."""
    sums = at.take(a["sums"]).clone()
    logps, entropies = [], []
    of_row = zip(a["targets"].tolist(), at.take(a["weights"]), a["owners"].tolist(), strict=True)
    for z, (target, weight, owner) in zip(at.take(a["logits"]), of_row, strict=True):
        z = z / a["temperature"]
        left = -z.softmax(-1)
        left[target] = torch.sigmoid(_all_but(z, target) - z[target])
        sums[owner] += weight * left
        logps.append(-_log_total(z, target))
        top = int(z.argmax())
        gaps, log_total = z[top] - z, _log_total(z, top)
        entropies.append(log_total + (gaps * torch.exp(-gaps - log_total)).sum())
    none = sums.new_zeros(0)
    return {
        "sums": sums,
        "logps": torch.stack(logps) if logps else none,
        "entropies": torch.stack(entropies) if entropies else none,
    }


def _all_but(z: Tensor, word: int) -> Tensor:
    """The log-sum-exp of all other words; nothing is taken away from 1."""
    others = z.clone()
    others[word] = -torch.inf
    return others.logsumexp(-1)


def _log_total(z: Tensor, word: int) -> Tensor:
    """`logsumexp(z) - z[word]`."""
    return torch.logaddexp(_all_but(z, word) - z[word], z.new_zeros(()))


ORACLES = {
    f.__name__: f
    for f in (
        qkv_forward,
        mlp_forward,
        mlp_backward,
        qkv_backward,
        attention_forward,
        attention_backward,
        linear,
        linear_backward,
        embedding_scores,
        attribution_rewards,
        residual_sums,
        squared_gradient_norms,
        squared_row_sums,
    )
}
