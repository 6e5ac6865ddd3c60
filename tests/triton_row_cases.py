"""Calls of the Triton kernels of rows, with the truth in float64 and the size of its terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from g2r_fast.kernels.gated import gated
from g2r_fast.kernels.gated_backward import gated_backward
from g2r_fast.kernels.head_norm_products import head_norm_products
from g2r_fast.kernels.heads import heads
from g2r_fast.kernels.heads_backward import heads_backward
from g2r_fast.kernels.rms_norm import rms_norm
from g2r_fast.kernels.rms_norm_backward import rms_norm_backward
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT32 = 2.0**-24  # round to nearest
# Triton's interpreter cuts the bits that bfloat16 has not, a GPU rounds them to nearest.
STORAGE = {
    torch.float32: FLOAT32,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if ON_GPU else 2.0**-7,
}
# Roundings on the way of one term into a sum: a tree on the device; under the interpreter NumPy's
# pairwise sum, eight running sums over at most 128 terms at its leaves. The rest is elementwise.
CHAIN = 64
NAN = float("nan")


@dataclass
class Case:
    """One call: what it reads, what it writes; for each output the truth and its terms' size."""

    call: Callable[..., None]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    truth: dict[str, tuple[Tensor, Tensor]]  # float64, NaN where nothing is written
    settings: dict[str, object] = field(default_factory=dict)


Make = Callable[[str, torch.dtype], Case]


class Draw:
    def __init__(self, kind: str, seed: int) -> None:
        self.exact = kind == "exact"
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).double().to(DEVICE)

    def signs(self, *shape: int) -> Tensor:
        return self.integers(0, 1, *shape) * 2 - 1

    def values(self, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
        """Integers up to 4, or normal: exact in `dtype`."""
        if self.exact:
            return self.integers(-4, 4, *shape).to(dtype)
        return (torch.randn(shape, generator=self.generator) * scale).to(DEVICE, dtype)


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=DEVICE)


def index_of(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def kept_at(index: Tensor, kept: int, value: Tensor) -> Tensor:
    """`value` of every row at its place among what is kept."""
    out = torch.full((kept, *value.shape[1:]), NAN, dtype=torch.float64, device=DEVICE)
    out[index[index >= 0].long()] = value[index >= 0]
    return out


def sized(**values: Tensor | tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: v if isinstance(v, tuple) else (v, v.abs()) for n, v in values.items()}


KEPT = 5
FORWARD = [-1, 3, 0, -1, 4, 1]  # the third of what is kept is nobody's
BACKWARD = [3, 0, 0, 4, 1, 1, 1]


def rms_norm_case(width: int, add: bool) -> Make:
    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, width), index_of(FORWARD)
        rows = len(index)
        delta = draw.values(dtype, rows, width)
        if draw.exact:  # a row of one power of two has a root mean square of it
            x = draw.signs(rows, width) * 2.0 ** torch.arange(rows, device=DEVICE)[:, None]
            x = (x - delta.double() if add else x).float()
        else:
            x = draw.values(torch.float32, rows, width)
        weight = draw.values(dtype, width)
        eps = 0.0 if draw.exact else 1e-3
        total = x.double() + delta.double() if add else x.double()
        rstd = (total.square().mean(-1) + eps).rsqrt()
        normed = total * rstd[:, None]

        def call(x: Tensor, delta: Tensor, out: dict[str, Tensor], **inputs: Tensor) -> None:
            out["x"].copy_(x)
            rms_norm(
                out["x"], inputs["weight"], inputs["index"], out["out"], out["normed"],
                out["rstd"], eps=eps, delta=delta if add else None,
            )  # fmt: skip

        return Case(
            call,
            {"x": x, "delta": delta, "weight": weight, "index": index},
            {
                "x": empty(torch.float32, rows, width),
                "out": empty(dtype, rows, width),
                "normed": empty(dtype, KEPT, width),
                "rstd": empty(torch.float32, KEPT),
            },
            sized(
                x=total,
                out=normed * weight.double(),
                normed=kept_at(index, KEPT, normed),
                rstd=kept_at(index, KEPT, rstd),
            ),
        )

    return make


def rms_norm_backward_case(width: int, with_rounded: bool) -> Make:
    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, width), index_of(BACKWARD)
        rows = len(index)
        grad = draw.values(torch.float32, rows, width, scale=0.02)
        dx = draw.values(torch.float32, rows, width, scale=0.02)
        weight, normed = draw.values(dtype, width), draw.values(dtype, KEPT, width)
        rstd = draw.values(torch.float32, KEPT).abs() + 1
        saved = index.long()
        if draw.exact:  # the sums become multiples of the width
            rstd = 2.0 ** torch.arange(KEPT, device=DEVICE)
            weight[-1], normed[:, -1] = 1, 1
            terms = grad.double() * weight.double() * normed.double()[saved]
            grad[:, -1] -= torch.remainder(terms.sum(-1), width).float()
        g, n = grad.double() * weight.double(), normed.double()[saved]
        r = rstd.double()[saved, None]
        done = dx.double() + r * (g - n * (g * n).mean(-1, keepdim=True))
        size = dx.double().abs() + r * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True))

        def call(out: dict[str, Tensor], **inputs: Tensor) -> None:
            out["dx"].copy_(inputs["dx"])
            rms_norm_backward(
                inputs["grad"], inputs["weight"], inputs["index"], inputs["normed"],
                inputs["rstd"], out["dx"], out.get("rounded"),
            )  # fmt: skip

        outputs = {"dx": empty(torch.float32, rows, width)}
        truth = sized(dx=(done, size))
        if with_rounded:
            outputs["rounded"] = empty(dtype, rows, width)
            truth |= sized(rounded=(done, size))
        inputs = {"grad": grad, "dx": dx, "weight": weight, "index": index, "normed": normed}
        return Case(call, {**inputs, "rstd": rstd}, outputs, truth)

    return make


def activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, its slope and the size of the share of x that it is, float64."""
    if activation == "silu":
        share = torch.sigmoid(x)
        return x * share, share + x * share * (1 - share), share
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return x * share, share + x * density, torch.ones_like(x)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    share = 0.5 * (1 + torch.tanh(inner))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
    return x * share, share + x * slope * (1 - torch.tanh(inner).square()) / 2, torch.ones_like(x)


def gated_case(width: int, activation: str, keep_out: bool = False) -> Make:
    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, width), index_of(FORWARD)
        rows = len(index)
        if draw.exact:  # where every activation is 0, x or 0 and its slope 1/2, 1 or 0
            choices = torch.tensor([0.0, 64.0, -128.0], dtype=dtype, device=DEVICE)
            gate = choices[draw.integers(0, 2, rows, width).long()]
        else:
            gate = draw.values(dtype, rows, width, scale=2.0)
        up = draw.values(dtype, rows, width)
        x, u = gate.double(), up.double()
        act, slope, share = activated(x, activation)
        if draw.exact:
            act, slope = torch.where(x > 0, x, 0), torch.where(x > 0, 1, (x == 0) * 0.5)
        size = (1 + x.abs()) * share  # of the slope; an exponential is off by its argument
        keep = lambda value: kept_at(index, KEPT, value)  # noqa: E731

        def call(out: dict[str, Tensor], **inputs: Tensor) -> None:
            gated(
                inputs["gate"], inputs["up"], inputs["index"], out["out"], out["d_gate"],
                out["d_up"], out.get("kept_out"), activation=activation,
            )  # fmt: skip

        outputs = {"out": empty(dtype, rows, width)}
        names = ("d_gate", "d_up", *["kept_out"] * keep_out)
        outputs |= {name: empty(dtype, KEPT, width) for name in names}
        truth = {
            "out": (act * u, size * (x * u).abs()),
            "d_gate": (keep(slope * u), keep(size * (1 + x.abs()) * u.abs())),
            "d_up": (keep(act), keep(size * x.abs())),
        }
        truth["kept_out"] = tuple(keep(part) for part in truth["out"])
        inputs = {"gate": gate, "up": up, "index": index}
        return Case(call, inputs, outputs, {name: truth[name] for name in outputs})

    return make


def gated_backward_case(width: int) -> Make:
    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, width), index_of(BACKWARD)
        rows = len(index)
        grad = draw.values(dtype, rows, width, scale=0.02)
        kept = {name: draw.values(dtype, KEPT, width) for name in ("d_gate", "d_up")}
        parts = [grad.double() * part.double()[index.long()] for part in kept.values()]

        def call(out: dict[str, Tensor], **inputs: Tensor) -> None:
            gated_backward(
                inputs["grad"], inputs["index"], inputs["d_gate"], inputs["d_up"], out["out"]
            )

        return Case(
            call,
            {"grad": grad, "index": index, **kept},
            {"out": empty(dtype, rows, 2, width)},
            sized(out=torch.stack(parts, 1)),
        )

    return make


def turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = y.chunk(2, -1)
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1)


def turned_size(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y1, y2 = y.abs().chunk(2, -1)
    cos, sin = cos[:, None].double().abs(), sin[:, None].double().abs()
    return torch.cat([y1 * cos + y2 * sin, y2 * cos + y1 * sin], -1)


def heads_case(counts: tuple[int, int, int], d: int, norm: bool) -> Make:
    """`counts` heads of q, k and v, of which 0: missing."""

    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, d), index_of(FORWARD)
        rows, scaling, eps = len(index), 2.0, 1e-3
        if draw.exact:
            eps = 0.0
            cos, sin = (draw.integers(-1, 1, rows, d // 2).float() for _ in range(2))
        else:
            cos, sin = (draw.values(torch.float32, rows, d // 2) for _ in range(2))
        y = draw.values(dtype, rows, sum(counts), d)
        if draw.exact and norm:
            y = (draw.signs(*y.shape) * 2.0 ** draw.integers(0, 3, *y.shape[:2], 1)).to(dtype)
        inputs = {"source": y.flatten(1), "cos": cos, "sin": sin, "index": index}
        outputs, truth = {}, {}
        for name, count, part in zip("qkv", counts, y.double().split(counts, 1), strict=True):
            if not count:
                continue
            outputs[name] = empty(dtype, rows, count, d)
            if norm and name != "v":
                weight = draw.values(dtype, d)
                rstd = (part.square().mean(-1) + eps).rsqrt()
                part = part * rstd[..., None]
                inputs[f"{name}_weight"] = weight
                outputs[f"{name}_normed"] = empty(dtype, KEPT, count, d)
                outputs[f"{name}_rstd"] = empty(torch.float32, KEPT, count)
                truth |= sized(
                    **{
                        f"{name}_normed": kept_at(index, KEPT, part),
                        f"{name}_rstd": kept_at(index, KEPT, rstd),
                    }
                )
                part = part * weight.double()
            if name != "v":
                scale = scaling if name == "q" else 1.0
                size = turned_size(part, cos, sin) * scale
                truth[name] = (turned(part, cos, sin) * scale, size)
            else:
                truth |= sized(v=part)

        def call(out: dict[str, Tensor], **inputs: Tensor) -> None:
            def kept(name: str) -> tuple[Tensor, Tensor, Tensor] | None:
                if f"{name}_weight" not in inputs:
                    return None
                return inputs[f"{name}_weight"], out[f"{name}_normed"], out[f"{name}_rstd"]

            heads(
                inputs["source"], inputs["cos"], inputs["sin"], inputs["index"],
                **{name: out.get(name) for name in "qkv"},
                q_norm=kept("q"), k_norm=kept("k"), eps=eps, scaling=scaling,
            )  # fmt: skip

        return Case(call, inputs, outputs, truth)

    return make


def heads_backward_case(counts: tuple[int, int, int], d: int, norm: bool) -> Make:
    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, d), index_of(BACKWARD)
        rows, scaling, saved = len(index), 2.0, index.long()
        if draw.exact:
            cos, sin = (draw.integers(-1, 1, KEPT, d // 2).float() for _ in range(2))
        else:
            cos, sin = (draw.values(torch.float32, KEPT, d // 2) for _ in range(2))
        inputs = {"cos": cos, "sin": sin, "index": index}
        parts, sizes = [], []
        for name, count in zip("qkv", counts, strict=True):
            if not count:
                continue
            kind_of = dtype if name == "q" else torch.float32
            grad = inputs[f"d{name}"] = draw.values(kind_of, rows, count, d, scale=0.02)
            g = grad.double()
            size = g.abs()
            if name != "v":
                scale = scaling if name == "q" else 1.0
                size = turned_size(g, cos[saved], sin[saved]) * scale
                g = turned(g, cos[saved], -sin[saved]) * scale
            if norm and name != "v":
                weight, normed = draw.values(dtype, d), draw.values(dtype, KEPT, count, d)
                rstd = 2.0 ** draw.integers(0, 3, KEPT, count).float()
                inputs |= {f"{name}_weight": weight, f"{name}_normed": normed}
                inputs[f"{name}_rstd"] = rstd
                g, size = g * weight.double(), size * weight.double().abs()
                n, r = normed.double()[saved], rstd.double()[saved][..., None]
                g = r * (g - n * (g * n).mean(-1, keepdim=True))
                size = r * (size + n.abs() * (size * n.abs()).mean(-1, keepdim=True))
            parts.append(g.flatten(1))
            sizes.append(size.flatten(1))

        def call(out: dict[str, Tensor], **inputs: Tensor) -> None:
            def kept(name: str) -> tuple[Tensor, Tensor, Tensor] | None:
                if f"{name}_weight" not in inputs:
                    return None
                return tuple(inputs[f"{name}_{part}"] for part in ("weight", "normed", "rstd"))

            heads_backward(
                inputs["cos"], inputs["sin"], inputs["index"], out["out"],
                **{name: inputs.get(name) for name in ("dq", "dk", "dv")},
                q_norm=kept("q"), k_norm=kept("k"), scaling=scaling,
            )  # fmt: skip

        return Case(
            call,
            inputs,
            {"out": empty(dtype, rows, sum(counts) * d)},
            sized(out=(torch.cat(parts, 1), torch.cat(sizes, 1))),
        )

    return make


def head_products_case(count: int, d: int) -> Make:
    def make(kind: str, dtype: torch.dtype) -> Case:
        draw, index = Draw(kind, d), index_of(BACKWARD)
        rows, scaling, saved = len(index), 2.0, index.long()
        if draw.exact:
            cos, sin = (draw.integers(-1, 1, KEPT, d // 2).float() for _ in range(2))
        else:
            cos, sin = (draw.values(torch.float32, KEPT, d // 2) for _ in range(2))
        grad = draw.values(dtype, rows, count, d, scale=0.02)
        normed = draw.values(dtype, KEPT, count, d)
        n = normed.double()[saved] * scaling
        g = turned(grad.double(), cos[saved], -sin[saved])
        size = turned_size(grad.double(), cos[saved], sin[saved])

        def call(out: dict[str, Tensor], **inputs: Tensor) -> None:
            head_norm_products(*inputs.values(), out["out"], scaling=scaling)

        return Case(
            call,
            {"dq": grad, "cos": cos, "sin": sin, "index": index, "normed": normed},
            {"out": empty(torch.float32, rows, d)},
            sized(out=((g * n).sum(1), (size * n.abs()).sum(1))),
        )

    return make


# Rows of one column; of less than a program's; a program's; a row each; not whole vectors.
CASES: dict[str, Make] = {
    **{f"rms_norm {w}{' add' * a}": rms_norm_case(w, a) for w in (1, 48, 1100) for a in (0, 1)},
    **{
        f"rms_norm_backward {w}{' rounded' * r}": rms_norm_backward_case(w, bool(r))
        for w in (1, 48, 1100)
        for r in (0, 1)
    },
    **{
        f"gated {w} {a}{' keep' * keep}": gated_case(w, a, bool(keep))
        for w in (1, 1037)
        for a, keep in (("silu", 0), ("silu", 1), ("gelu", 0), ("gelu_tanh", 1))
    },
    **{f"gated_backward {w}": gated_backward_case(w) for w in (1, 1024, 1037)},
    # One head; not whole vectors; more heads than a step takes.
    **{
        f"products of heads {n} {d}": head_products_case(n, d)
        for n, d in ((1, 2), (3, 14), (5, 256))
    },
    # All of it; what a last layer asks for; more heads than a program takes.
    **{
        f"{name} {counts} {d}{' norm' * norm}": case(counts, d, bool(norm))
        for name, case in (("heads", heads_case), ("heads_backward", heads_backward_case))
        for counts, d, norm in (
            ((3, 1, 1), 14, 0),
            ((3, 1, 1), 16, 1),
            ((4, 0, 0), 2, 0),
            ((0, 2, 2), 16, 1),
            ((5, 3, 3), 256, 1),
        )
    },
}
