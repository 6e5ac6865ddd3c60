"""PyTorch's own flash attention over packed sequences, whatever its signature in this release.

`torch.nn.attention.varlen.varlen_attn` has been there since 2.10: in 2.10 it takes `is_causal`,
from 2.11 on a window, later `enable_gqa`. What it does with fewer keys' heads than queries' heads,
and at which end it aligns the diagonal, is tried before it is trusted. Where it does not run (on a
CPU, in float32), `plain` does the same sequence by sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lengths", "attend", "plain", "route"]


class Lengths:
    """Queries and keys of sequences that follow each other; a query is one of the last keys."""

    def __init__(
        self, queries: list[int], keys: list[int], device: torch.device | str = "cpu"
    ) -> None:
        self.queries, self.keys = queries, keys
        self.cu_queries = _cumulated(queries, device)
        self.cu_keys = self.cu_queries if keys == queries else _cumulated(keys, device)
        self.most_queries, self.most_keys = max(queries, default=0), max(keys, default=0)


def _cumulated(lengths: list[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """Causal attention, aligned at the last query: q `[queries, heads, D]`, k, v `[keys, ...]`."""
    return _route(q.device, q.dtype, q.shape[1] // k.shape[1], q.shape[2])[1](
        q, k, v, lengths, scale
    )


def route(device: torch.device, dtype: torch.dtype, group: int, width: int) -> str:
    """What `attend` runs: "varlen_attn", "varlen_attn, keys repeated", or "plain" and why."""
    return _route(device, dtype, group, width)[0]


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    out = []
    parts = (q.split(lengths.queries), k.split(lengths.keys), v.split(lengths.keys))
    for query, key, value in zip(*parts, strict=True):
        rows, keys = len(query), len(key)
        seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, seen, scale=scale, enable_gqa=True
        )
        out.append(mixed[0].transpose(0, 1))
    return torch.cat(out)


Attend = Callable[[Tensor, Tensor, Tensor, Lengths, float], Tensor]


def _varlen(gqa: bool) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    )
    if gqa and "enable_gqa" in names:
        options["enable_gqa"] = True

    def run(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
        if not gqa:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        extra = {"scale": scale} if "scale" in names else {}
        if not extra:
            q = q * (scale * q.shape[2] ** 0.5)
        out: Tensor = varlen_attn(
            q, k, v, lengths.cu_queries, lengths.cu_keys, lengths.most_queries, lengths.most_keys,
            **options, **extra,
        )  # fmt: skip
        return out

    return run


@cache
def _route(device: torch.device, dtype: torch.dtype, group: int, width: int) -> tuple[str, Attend]:
    if device.type != "cuda" or dtype == torch.float32:
        return f"plain: {dtype} on {device.type}", plain
    reasons = []
    for title, gqa in (("varlen_attn", True), ("varlen_attn, keys repeated", False)):
        try:
            found = _varlen(gqa)
            _try(found, device, dtype, group, width)
            return title, found
        except Exception as error:
            reasons.append(f"{title}: {type(error).__name__}: {error}")
    return "plain: " + "; ".join(reasons), plain


def _try(run: Attend, device: torch.device, dtype: torch.dtype, group: int, width: int) -> None:
    """Raises where values or gradients are not those of `plain` in float32."""
    generator = torch.Generator(device).manual_seed(0)
    lengths = Lengths([5, 70, 1], [9, 70, 130], device)

    def draw(rows: int, heads: int) -> Tensor:
        values = torch.randn(rows, heads, width, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    inputs = [draw(76, 2 * group), draw(209, 2), draw(209, 2)]
    cotangent = torch.randn(76, 2 * group, width, generator=generator, device=device)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    with torch.enable_grad():
        got, expected = run(*inputs, lengths, 0.1), plain(*wide, lengths, 0.1)
        grads = torch.autograd.grad(got, inputs, cotangent.to(dtype))
        wide_grads = torch.autograd.grad(expected, wide, cotangent)
    for name, have, want in zip("odkv", (got, *grads), (expected, *wide_grads), strict=True):
        error = float((have.float() - want).norm() / want.norm())
        if not error < 0.02:
            raise ArithmeticError(f"{name} differs by {error:.1e}")
