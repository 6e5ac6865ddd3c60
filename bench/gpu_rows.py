"""The row kernels on a GPU, one by one, against the copy bandwidth of this run.

A kernel is timed once its answer is that of its line of PyTorch. Times are GPU times from events,
with the L2 cache written over in between.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_ceilings import seconds_of, short

__all__ = ["row_kernels"]


@dataclass(frozen=True)
class _Row:
    """A call, the bytes it cannot avoid, and tensors it writes with what they must be."""

    run: Callable[[], Any]
    bytes: float
    check: Callable[[], list[tuple[Tensor, Tensor]]]


def row_kernels(
    device: torch.device | str, copy_gb_per_s: float | None, *, small: bool = False
) -> dict[str, Any]:
    """GB/s of every row kernel in the sizes of a 7B model, and their share of the copy's."""
    device = torch.device(device)
    found: dict[str, Any] = {}
    for name, make in _ROWS.items():
        try:
            row = make(device, small)
            row.run()
            for have, want in row.check():
                error = float((have.float() - want.float()).norm() / want.float().norm())
                if not error < 0.01:
                    raise ArithmeticError(f"relative error {error:.1e}: not timed")
            seconds = seconds_of(row.run, device, repeats=2 if small else 20, flush=True)
            rate = row.bytes / statistics.median(seconds) / 1e9
            found[name] = {
                "ms": statistics.median(seconds) * 1e3,
                "gb_per_s": round(rate, 1),
                "share_of_copy": round(rate / copy_gb_per_s, 3) if copy_gb_per_s else None,
            }
        except Exception as error:
            found[name] = {"not_measured": short(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _sizes(small: bool) -> tuple[int, int, int]:
    """Rows, hidden and MLP width."""
    return (5, 64, 96) if small else (16384, 3584, 18944)


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _index(device: torch.device, rows: int) -> Tensor:
    return torch.arange(rows, dtype=torch.int32, device=device)


def _rms_norm(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.rms_norm import rms_norm

    rows, width, _ = _sizes(small)
    x, delta = _draw(device, rows, width, dtype=torch.float32), _draw(device, rows, width)
    weight, out, normed = _draw(device, width), torch.empty_like(delta), torch.empty_like(delta)
    rstd = torch.empty(rows, device=device)
    index = _index(device, rows)

    def check() -> list[tuple[Tensor, Tensor]]:
        want = torch.nn.functional.rms_norm(x, (width,), weight.float(), 1e-6)
        return [(out, want)]

    return _Row(
        lambda: rms_norm(x, weight, index, out, normed, rstd, eps=1e-6, delta=delta),
        rows * width * (4 + 4 + 2 + 2 + 2),
        check,
    )


def _rms_norm_backward(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.rms_norm_backward import rms_norm_backward

    rows, width, _ = _sizes(small)
    grad = _draw(device, rows, width, dtype=torch.float32)
    weight, normed = _draw(device, width), _draw(device, rows, width)
    rstd, dx = torch.rand(rows, device=device), torch.zeros(rows, width, device=device)
    rounded, index = torch.empty_like(normed), _index(device, rows)
    g = grad * weight
    want = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return _Row(
        lambda: rms_norm_backward(grad, weight, index, normed, rstd, dx, rounded),
        rows * width * (4 + 2 + 8 + 2),
        lambda: [(dx, want), (rounded, want)],
    )


def _gated(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.gated import gated

    rows, _, width = _sizes(small)
    gate, up = _draw(device, rows, width), _draw(device, rows, width)
    out, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
    index = _index(device, rows)
    return _Row(
        lambda: gated(gate, up, index, out, d_gate, d_up),
        rows * width * 2 * 5,
        lambda: [
            (out, torch.nn.functional.silu(gate.float()) * up),
            (d_up, torch.nn.functional.silu(gate.float())),
        ],
    )


def _gated_backward(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.gated_backward import gated_backward

    rows, _, width = _sizes(small)
    grad, d_gate, d_up = (_draw(device, rows, width) for _ in range(3))
    out, index = grad.new_empty(rows, 2, width), _index(device, rows)
    return _Row(
        lambda: gated_backward(grad, index, d_gate, d_up, out),
        rows * width * 2 * 5,
        lambda: [(out[:, 0], grad.float() * d_gate), (out[:, 1], grad.float() * d_up)],
    )


def _head_sizes(small: bool) -> tuple[int, int, int, int]:
    return (5, 4, 2, 16) if small else (32768, 28, 4, 128)


def _heads(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.heads import heads

    rows, count, kv, width = _head_sizes(small)
    source = _draw(device, rows, (count + 2 * kv) * width)
    cos, sin = (torch.rand(rows, width // 2, device=device) for _ in range(2))
    q = source.new_empty(rows, count, width)
    k, v = source.new_empty(rows, kv, width), source.new_empty(rows, kv, width)
    index = _index(device, rows)

    def check() -> list[tuple[Tensor, Tensor]]:
        first, second = source[:, : count * width].float().view_as(q).chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        want = torch.cat([first * c - second * s, second * c + first * s], -1)
        return [(q, want), (v, source[:, -kv * width :].view_as(v))]

    return _Row(
        lambda: heads(source, cos, sin, index, q=q, k=k, v=v),
        2 * source.numel() * 2 + 2 * cos.numel() * 4,
        check,
    )


def _heads_backward(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.heads_backward import heads_backward

    rows, count, kv, width = _head_sizes(small)
    dq = _draw(device, rows, count, width)
    dk, dv = (_draw(device, rows, kv, width, dtype=torch.float32) for _ in range(2))
    cos, sin = (torch.rand(rows, width // 2, device=device) for _ in range(2))
    out = dq.new_empty(rows, (count + 2 * kv) * width)
    index = _index(device, rows)

    def check() -> list[tuple[Tensor, Tensor]]:
        first, second = dq.float().chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        want = torch.cat([first * c + second * s, second * c - first * s], -1)
        return [(out[:, : count * width], want.flatten(1)), (out[:, -kv * width :], dv.flatten(1))]

    return _Row(
        lambda: heads_backward(cos, sin, index, out, dq=dq, dk=dk, dv=dv),
        dq.numel() * 2 + dk.numel() * 8 + out.numel() * 2 + 2 * cos.numel() * 4,
        check,
    )


def _row_dot(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.row_dot import row_dot

    rows, width, _ = _sizes(small)
    lanes = 8
    grad = _draw(device, rows, width, dtype=torch.float32)
    embed = _draw(device, -(-rows // lanes), width)
    row_map = _index(device, rows) // lanes
    out = torch.empty(rows, device=device)
    return _Row(
        lambda: row_dot(grad, embed, row_map, out=out),
        grad.numel() * 4 + embed.numel() * 2,
        lambda: [(out, (grad * embed[row_map.long()]).sum(-1))],
    )


def _attribution(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.attribution import attribution

    judgements, tokens = (3, 7) if small else (64, 450)
    width = _sizes(small)[1]
    rows = judgements * tokens
    grads, embed = _draw(device, rows, width, dtype=torch.float32), _draw(device, tokens, width)
    scores: list[Tensor] = []
    starts = [tokens * j for j in range(judgements)]
    row_map = _index(device, tokens).repeat(judgements)

    def run() -> None:
        b, _, _ = attribution(
            grads, [tokens] * judgements, [1.0] * judgements, starts, rows, starts,
            [1] * judgements, 1.0, True, embed, row_map,
        )  # fmt: skip
        scores[:] = [b]

    def check() -> list[tuple[Tensor, Tensor]]:
        return [(scores[0], (grads * embed.repeat(judgements, 1)).sum(-1))]

    return _Row(run, grads.numel() * 4 + embed.numel() * 2, check)


def _log_probabilities(device: torch.device, small: bool) -> _Row:
    from g2r_fast.kernels.log_probabilities import log_probabilities

    rows, words = (3, 500) if small else (2048, 152064)
    logits = _draw(device, rows, words)
    ids = torch.arange(rows, device=device)
    found: list[Tensor] = []

    def run() -> None:
        found[:] = [log_probabilities(logits, ids).logp]

    def check() -> list[tuple[Tensor, Tensor]]:
        return [(found[0], logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0])]

    return _Row(run, logits.numel() * 2, check)


_ROWS: dict[str, Callable[[torch.device, bool], _Row]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "gated": _gated,
    "gated_backward": _gated_backward,
    "heads": _heads,
    "heads_backward": _heads_backward,
    "row_dot": _row_dot,
    "attribution": _attribution,
    "log_probabilities": _log_probabilities,
}
