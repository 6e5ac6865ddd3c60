"""Row-wise operations of the packed engine: norms, rotary, SwiGLU, projections.

In every backward here the gradient of C lanes, `[n, C, X]`, reads what one forward row saved,
`[n, X]`, by broadcasting: nothing is gathered and nothing saved is overwritten.
"""

from __future__ import annotations

import torch

from .products import product, product_nt

__all__ = [
    "project",
    "project_back",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_backward",
    "swiglu",
    "swiglu_backward",
]


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


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """`silu(gate) * up`, overwriting both; saves `d/dgate` and `d/dup` of it.

    The two derivatives are what a backward needs, so it evaluates no exponential.
    """
    sigmoid = torch.sigmoid(gate)
    silu = gate.mul_(sigmoid)
    if saved is not None:
        d_gate, d_up = saved
        d_up.copy_(silu)
        # silu' = sigmoid + silu * (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        torch.mul(slope, up, out=d_gate)
    return silu.mul_(up)


def swiglu_backward(
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


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
