"""The strongest rivals: cached loops in stock PyTorch.

Three of them, from what the first attempt looks like to the fastest we could write:

- `cached_loop_simple`: prompt K/V once per group without gradient, response once with its graph,
  one tail at a time on a copy of the cache, one retained-graph backward per True item.
- `cached_loop`: the same, with the K tails of a response in one batch. The graph is cut at the
  response's K/V: one backward through the batched tails gives every item's K/V gradient, then one
  retained-graph backward of the response per True item. The model is untouched.
- `tuned_cached_loop`: `cached_loop` with the inside of the model swapped; see `tuned.py`.

README.md in this folder lists what else was tried.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from bench.tuned import Tuning, tuned
from bench.workload import Workload
from g2r_fast.compare import fork_cache as fork
from g2r_fast.key_values import cache_of, cached

__all__ = [
    "Answer",
    "cached_loop",
    "cached_loop_simple",
    "fork",
    "forked",
    "grouped_query_sdpa",
    "padded_left",
    "prompt_cache",
    "together",
    "tuned_cached_loop",
]

Answer = tuple[list[Tensor | None], Tensor]

# Responses up to this long run as one padded batch: what a call costs outweighs the padding.
SHORT = 128


@torch.no_grad()
def prompt_cache(model: PreTrainedModel, workload: Workload, **extra: Any) -> Cache:
    """K and V of the prompt, computed once, without a graph."""
    prompt = workload.prompt[None]
    return cache_of(model.model(input_ids=prompt, use_cache=True, **extra))


@contextmanager
def grouped_query_sdpa(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers pass `enable_gqa=True` although there is a mask.

    By default it repeats K and V for every query head instead. Costs nothing to ask for:
    releases that do not know the variable ignore it. On a GPU the default is faster: no fused
    attention there takes both.
    """
    if model.device.type != "cpu":
        yield
        return
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def cached_loop_simple(model: PreTrainedModel, workload: Workload) -> Answer:
    """The thirty lines: tails one at a time, one backward per True item."""
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    embed = model.get_input_embeddings()
    with grouped_query_sdpa(model):
        prompt = prompt_cache(model, workload)
        for i, response in enumerate(workload.responses):
            embeds = embed(response[None]).requires_grad_()
            prefix = cache_of(
                model.model(inputs_embeds=embeds, **cached(model, fork(prompt)), use_cache=True)
            )
            for k, tail in enumerate(workload.tails):
                logits = model(
                    input_ids=tail[None],
                    **cached(model, fork(prefix)),
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[0, -1]
                logp = torch.log_softmax(logits.float(), -1)[workload.target_id]
                logps.append(logp.detach())
                if not workload.is_true(i, k):
                    attributions.append(None)
                    continue
                (grad,) = torch.autograd.grad(logp, embeds, retain_graph=True)
                attributions.append((grad[0].float() * embeds[0].detach().float()).sum(-1))
    return attributions, torch.stack(logps)


def cached_loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """All tails of a response in one batch; the fastest we found with the model untouched."""
    with grouped_query_sdpa(model):
        return _batched_tails(model, workload, Tuning(), {})


def tuned_cached_loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """`cached_loop` with the inside of the model swapped for faster stock PyTorch."""
    with tuned(model) as extra:
        run = _single_tail if len(workload.tails) == 1 else _batched_tails
        return run(model, workload, extra["tuning"], extra)


def _batches(workload: Workload, tuning: Tuning, extra: dict[str, Any]) -> list[range]:
    """Which responses run together; one at a time where the model knows nothing of padding."""
    lengths = [len(response) for response in workload.responses]
    return together(lengths) if extra else [range(i, i + 1) for i in range(len(lengths))]


def together(lengths: Sequence[int]) -> list[range]:
    """Which sequences of these lengths run as one padded batch: short ones all, others none."""
    count = len(lengths)
    return [range(count)] if max(lengths) <= SHORT else [range(i, i + 1) for i in range(count)]


def padded_left(pieces: list[Tensor], start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[B, longest]`, their positions from `start` on, and where there is padding."""
    longest = max(len(piece) for piece in pieces)
    device = pieces[0].device
    missing = torch.tensor([longest - len(piece) for piece in pieces], device=device)[:, None]
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in pieces])
    places = torch.arange(longest, device=device)[None] - missing
    return ids, start + places.clamp(min=0), places < 0


def forked(prompt: Cache, count: int) -> Cache:
    """A copy of a cache of batch size one, for `count` sequences."""
    cache = fork(prompt)
    cached: list[Any] = cache.layers
    for layer in cached:
        layer.keys = layer.keys.expand(count, -1, -1, -1)
        layer.values = layer.values.expand(count, -1, -1, -1)
    return cache


def _dot(grad: Tensor, embeds: Tensor) -> Tensor:
    return (grad.float() * embeds.detach().float()).sum(-1)


def _batched_tails(
    model: PreTrainedModel, workload: Workload, tuning: Tuning, extra: dict[str, Any]
) -> Answer:
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    items = len(workload.tails)
    embed = model.get_input_embeddings()
    tuning.last_rows = slice(0, 0)
    prompt = prompt_cache(model, workload, **extra)
    tuning.prefix = len(workload.prompt)
    for batch in _batches(workload, tuning, extra):
        ids, positions, padding = padded_left(
            [workload.responses[i] for i in batch], len(workload.prompt)
        )
        tuning.last_rows = slice(0, 0)
        tuning.hidden_keys = padding if len(batch) > 1 else None
        embeds = embed(ids).requires_grad_()
        prefix = cache_of(
            model.model(
                inputs_embeds=embeds,
                position_ids=positions,
                **cached(model, forked(prompt, len(batch))),
                use_cache=True,
                **extra,
            )
        )
        shared = [x for layer in prefix.layers for x in (layer.keys, layer.values)]

        # Cut the graph: every item gets its own K/V leaf, so that one backward through the
        # batch of tails returns the K items' gradients apart.
        leaves = [_repeated(x.detach(), items).requires_grad_() for x in shared]
        cache = fork(prefix)
        own: list[Any] = cache.layers
        for layer, keys, values in zip(own, leaves[::2], leaves[1::2], strict=True):
            layer.keys, layer.values = keys, values
        tails = torch.stack(workload.tails * len(batch))
        behind = torch.arange(1, 1 + tails.shape[1], device=tails.device)
        positions = positions[:, -1:].repeat_interleave(items, 0) + behind
        tuning.last_rows = slice(-1, None)
        if tuning.hidden_keys is not None:
            padding = torch.cat([padding, padding.new_zeros(len(batch), tails.shape[1])], 1)
            tuning.hidden_keys = padding.repeat_interleave(items, 0)
        hidden = model.model(
            input_ids=tails, position_ids=positions, **cached(model, cache), use_cache=True, **extra
        ).last_hidden_state[:, -1]
        logp = torch.log_softmax(model.lm_head(hidden).float(), -1)[:, workload.target_id]
        logps.append(logp.detach())

        true_items = [[k for k in range(items) if workload.is_true(i, k)] for i in batch]
        found: list[Tensor | None] = [None] * (len(batch) * items)
        true_rows = [b * items + k for b, chosen in enumerate(true_items) for k in chosen]
        if true_rows:
            leaf_grads = torch.autograd.grad(logp[true_rows].sum(), leaves)
            # The n-th backward takes the n-th True item of every response of the batch.
            for n in range(max(len(chosen) for chosen in true_items)):
                rows = [b * items + c[n] for b, c in enumerate(true_items) if n < len(c)]
                at = [b for b, chosen in enumerate(true_items) if n < len(chosen)]
                grads = [_placed(g, rows, at, len(batch)) for g in leaf_grads]
                (grad,) = torch.autograd.grad(shared, embeds, grads, retain_graph=True)
                for row, b in zip(rows, at, strict=True):
                    length = len(workload.responses[batch[b]])
                    found[row] = _dot(grad[b], embeds[b])[-length:]
        attributions += found
    return attributions, torch.cat(logps)


def _repeated(x: Tensor, items: int) -> Tensor:
    """Every sequence of a batch `items` times in a row; a view where there is one sequence."""
    return x.expand(items, -1, -1, -1) if len(x) == 1 else x.repeat_interleave(items, 0)


def _placed(grads: Tensor, rows: list[int], at: list[int], count: int) -> Tensor:
    """`grads[rows]` at the places `at` of `count`, zeros elsewhere."""
    if count == 1:
        return grads[rows[0] : rows[0] + 1]
    whole = grads.new_zeros(count, *grads.shape[1:])
    whole[at] = grads[rows]
    return whole


def _single_tail(
    model: PreTrainedModel, workload: Workload, tuning: Tuning, extra: dict[str, Any]
) -> Answer:
    """One item: response and tail in one piece, and one graph for one backward."""
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    tuning.last_rows = slice(0, 0)
    prompt = prompt_cache(model, workload, **extra)
    tuning.prefix, tuning.last_rows = len(workload.prompt), slice(-1, None)
    for batch in _batches(workload, tuning, extra):
        pieces = [torch.cat([workload.responses[i], workload.tails[0]]) for i in batch]
        ids, positions, padding = padded_left(pieces, len(workload.prompt))
        tuning.hidden_keys = padding if len(batch) > 1 else None
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        hidden = model.model(
            inputs_embeds=embeds,
            position_ids=positions,
            **cached(model, forked(prompt, len(batch))),
            use_cache=True,
            **extra,
        ).last_hidden_state[:, -1]
        logp = torch.log_softmax(model.lm_head(hidden).float(), -1)[:, workload.target_id]
        logps.append(logp.detach())
        chosen = [b for b, i in enumerate(batch) if workload.is_true(i, 0)]
        found: list[Tensor | None] = [None] * len(batch)
        if chosen:
            (grads,) = torch.autograd.grad(logp[chosen].sum(), embeds)
            for b in chosen:
                scores = _dot(grads[b], embeds[b])[-len(pieces[b]) :]
                found[b] = scores[: len(workload.responses[batch[b]])]
        attributions += found
    return attributions, torch.cat(logps)
