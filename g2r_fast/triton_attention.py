"""Attention over a trie of segments by the Triton kernels, forward and multi-lane backward.

The gradient of the keys comes in a launch of its own, key tile by key tile, so that nothing is
added up by atomics and every run gives the same bits.
"""

from __future__ import annotations

import torch

from g2r_fast.kernels import attention_forward as forward_kernel
from g2r_fast.kernels.attention_backward_keys import attention_backward_keys
from g2r_fast.kernels.attention_backward_queries import attention_backward_queries
from g2r_fast.kernels.configs import AttentionConfig, attention_config

from .device_tables import backward_tiles, forward_tiles
from .tables import QueryTables

__all__ = ["attention_backward", "attention_forward"]


def attention_forward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    config: AttentionConfig | None = None,
) -> None:
    """`out = softmax(q @ k.T + causal mask) @ v` for every query over its own path; `lse` too.

    Args:
        queries: who attends to what.
        q, k, v, out, lse, window, softcap: as in kernels/attention_forward.py.
        config: launch configuration; by default that of configs.py.
    """
    config = config or attention_config("forward", q, softcap)
    tiles = forward_tiles(queries, q.shape[1] // k.shape[1], config.rows, q.device)
    forward_kernel.attention_forward(
        tiles, q, k, v, out, lse, window=window, softcap=softcap, config=config
    )


def attention_backward(
    queries: QueryTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    window: int | None,
    softcap: float,
    configs: tuple[AttentionConfig, AttentionConfig] | None = None,
) -> None:
    """The gradients of `attention_forward` with respect to q, k and v, lane by lane.

    Args:
        queries: who comes back where.
        q, k, v, out, lse: as attention_forward took and wrote them.
        grad_out: [B, heads, D] in q's dtype.
        dq: [B, heads, D] in q's dtype, written.
        dk, dv: [B_keys, kv_heads, D] float32, written.
        window, softcap: as in attention_forward.
        configs: launch configurations of queries and keys; by default those of configs.py.
    """
    for_queries, for_keys = configs or (
        attention_config("queries", q, softcap),
        attention_config("keys", q, softcap),
    )
    group = q.shape[1] // k.shape[1]
    tiles = backward_tiles(queries, group, for_queries.rows, for_keys.keys, q.device)
    delta = torch.empty(grad_out.shape[:2], dtype=torch.float32, device=q.device)
    attention_backward_queries(
        tiles, q, k, v, out, lse, grad_out, dq, delta,
        window=window, softcap=softcap, config=for_queries,
    )  # fmt: skip
    attention_backward_keys(
        tiles, q, k, v, lse, grad_out, delta, dk, dv,
        window=window, softcap=softcap, config=for_keys,
    )  # fmt: skip
