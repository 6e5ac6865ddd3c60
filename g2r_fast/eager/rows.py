"""Row-wise operations of the packed engine: norms, rotary, gated activations, projections.

In every backward here the gradient of C lanes, `[n, C, X]`, reads what one forward row saved,
`[n, X]`, by broadcasting: nothing is gathered and nothing saved is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .products import product, product_nt

__all__ = [
    "attribution",
    "attribution_rewards",
    "embedding_scores",
    "gated",
    "gated_backward",
    "linear",
    "linear_backward",
    "project",
    "project_back",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_backward",
]

_STRETCH_ELEMENTS = 2**25  # of one upcast stretch of a weight


def rms_norm(x: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """`x * rsqrt(mean(x**2) + eps)` into `out`; returns the rsqrt, `x.shape[:-1]`."""
    rstd = x.square().mean(-1).add_(eps).rsqrt_()
    torch.mul(x, rstd[..., None], out=out)
    return rstd


def rms_norm_backward(
    grad: torch.Tensor,  # [..., C, X], of the normalised rows times their weight; overwritten
    weight: torch.Tensor,  # [X]
    normed: torch.Tensor,  # [..., X]
    rstd: torch.Tensor,  # [...]
    out: torch.Tensor,  # [..., C, X], added to
) -> None:
    """`out += rstd * (g - normed * mean(g * normed))` with `g = grad * weight`."""
    grad *= weight
    normed, rstd = normed[..., None, :], rstd[..., None, None]
    mean = (grad * normed).mean(-1, keepdim=True)
    out.addcmul_(grad, rstd)
    out.addcmul_(normed.to(grad.dtype), mean.mul_(rstd).neg_())


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """`(x1 cos - x2 sin, x2 cos + x1 sin) * scale` with x1, x2 the halves of the last axis."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out[..., half:]).addcmul_(x1, sin)
    return out if scale == 1.0 else out.mul_(scale)


def rotary_backward(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """The transpose of `rotary`, which is the rotation backwards."""
    return rotary(grad, cos, -sin, scale)


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor] | None,
    activation: str = "silu",
) -> torch.Tensor:
    """`activation(gate) * up`, overwriting both; saves `d/dgate` and `d/dup` of it.

    The two derivatives are what a backward needs, so it evaluates no exponential.
    """
    act, slope = _ACTIVATIONS[activation](gate, saved is not None)
    if saved is not None and slope is not None:
        d_gate, d_up = saved
        d_up.copy_(act)
        torch.mul(slope, up, out=d_gate)
    return act.mul_(up)


def _silu(x: torch.Tensor, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x * sigmoid(x)`, overwriting x, and its derivative `sigmoid + silu * (1 - sigmoid)`."""
    sigmoid = torch.sigmoid(x)
    silu = x.mul_(sigmoid)
    return silu, torch.addcmul(sigmoid, silu, 1 - sigmoid) if with_slope else None


def _gelu(x: torch.Tensor, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x * Phi(x)` and `Phi(x) + x * phi(x)`, of the standard normal distribution."""
    below = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
    slope = None
    if with_slope:
        density = x.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        slope = torch.addcmul(below, x, density)
    return x.mul_(below), slope


def _gelu_tanh(x: torch.Tensor, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x * w` with `w = (1 + tanh(u)) / 2`, `u = sqrt(2 / pi) * (x + 0.044715 x**3)`, and its
    derivative `w + 2 x u' w (1 - w)`."""
    square = x.square()
    scale = math.sqrt(2 / math.pi)
    share = torch.tanh((0.044715 * square + 1).mul_(x).mul_(scale)).add_(1).mul_(0.5)
    slope = None
    if with_slope:
        inner = square.mul_(3 * 0.044715).add_(1).mul_(2 * scale).mul_(x)
        slope = torch.addcmul(share, inner, share * (1 - share))
    return x.mul_(share), slope


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


def gated_backward(
    grad: torch.Tensor,  # [n, C, I]
    d_gate: torch.Tensor,  # [n, I]
    d_up: torch.Tensor,
    out_gate: torch.Tensor,  # [n, C, I]
    out_up: torch.Tensor,
) -> None:
    """`(grad * d_gate, grad * d_up)` for every lane."""
    torch.mul(grad, d_gate[:, None], out=out_gate)
    torch.mul(grad, d_up[:, None], out=out_up)


def project(
    x: torch.Tensor,  # [n, in], the weight's dtype
    weight: torch.Tensor,  # [out, in]
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, `[n, out]`, float32 or wider."""
    return product_nt(x, weight, bias).to(_wide(weight))


def project_back(
    grad: torch.Tensor,  # [n, out], float32 or wider
    weight: torch.Tensor,  # [out, in]
) -> torch.Tensor:
    """`grad @ weight`, `[n, in]`, float32 or wider.

    Gradients are float32 between products. For float16 weights every row is brought to a power
    of two near one first and back afterwards, so that small gradients neither round away nor
    vanish.
    """
    if weight.dtype == torch.float16:
        exponent = torch.frexp(grad.abs().amax(-1, keepdim=True)).exponent
        scaled = torch.ldexp(grad, -exponent).to(torch.float16)
        return torch.ldexp(product(scaled, weight).to(grad.dtype), exponent)
    return product(grad.to(weight.dtype), weight).to(grad.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`, all of it in float32 or wider."""
    x = x.to(_wide(weight))
    parts = [project(x, part, None) for part in _stretches(weight, x.dtype)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias is None else out.add_(bias)


def linear_backward(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`grad @ weight`, all of it in the dtype of `grad`, float32 or wider."""
    out = grad.new_zeros(len(grad), weight.shape[1])
    column = 0
    for stretch in _stretches(weight, grad.dtype):
        out.addmm_(grad[:, column : column + len(stretch)], stretch)
        column += len(stretch)
    return out


def embedding_scores(values: torch.Tensor, grads: torch.Tensor, readout: str) -> torch.Tensor:
    """See `ops.embedding_scores`."""
    if readout == "dot":
        return torch.einsum("nch,nh->nc", grads, values)
    return torch.linalg.vector_norm(grads, ord=1 if readout == "l1" else 2, dim=-1)


def attribution(scores: torch.Tensor, temperature: float, standardise: bool) -> torch.Tensor:
    """`softmax(scores / temperature)`, with `standardise` of scores / their population std.

    Scores `[T]` without spread, std <= 1e-6 of the largest |score|, count as zeros then.
    """
    if standardise and len(scores):
        std = scores.std(correction=0)
        flat = std <= 1e-6 * scores.abs().max()
        scores = torch.zeros_like(scores) if flat else scores / std
    return (scores / temperature).softmax(-1)


def attribution_rewards(
    scores: torch.Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    starts: Sequence[int],
    count: int,
    temperature: float,
    standardise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.attribution_rewards`."""
    alphas = [attribution(part, temperature, standardise) for part in scores.split(list(lengths))]
    rewards = scores.new_zeros(count)
    for alpha, weight, start in zip(alphas, weights, starts, strict=True):
        rewards[start : start + len(alpha)].add_(alpha, alpha=weight)
    return torch.cat([scores[:0], *alphas]), rewards


def _stretches(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The weight in `dtype`: as it is, or in upcast stretches of bounded size."""
    if weight.dtype == dtype:
        yield weight
        return
    step = max(1, _STRETCH_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        yield weight[start : start + step].to(dtype)


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
