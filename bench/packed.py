"""Rivals for a GPU, in stock PyTorch: many sequences in one call, and flash attention over them.

- `packed_loop`: judgements packed one behind the other, nothing shared; those that are not True
  run without a graph.
- `packed_cached_loop`: the cached loop as fast as we could make it there. The prompt runs once, all
  responses of the group in one packed pass with the prompt's keys in front, all tails of all
  responses in another. The graph is cut at the responses' keys and values: one backward through
  the tails gives every item's gradient there, then the n-th backward through the responses takes
  the n-th True item of every response. Gate and up are one product whose derivatives are kept,
  norms are PyTorch's fused ones, and the last layer computes what is read and no more.

Weights, graph and backwards are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from bench.flash import Lengths, attend
from bench.workload import Workload

__all__ = ["PACKED_TOKENS", "packed_cached_loop", "packed_loop", "tokens_that_fit"]

Answer = tuple[list[Tensor | None], Tensor]
Function = torch.autograd.Function

PACKED_TOKENS = 32768  # of one pass, where they fit


@dataclass
class Packing:
    """What the swapped parts are told about the pass that is running."""

    lengths: Lengths  # of the pass
    wanted: Tensor | None = None  # rows of the last layer that are read; None: all
    wanted_lengths: Lengths | None = None  # of those rows
    front: list[tuple[Tensor, Tensor]] | None = None  # of each layer: keys and values in front
    at: Tensor | None = None  # of each key: where it lies in front, or behind it among the own
    own: Tensor | None = None  # of each own key: which key it is
    grads_of: Tensor | None = None  # keys in front whose gradients are kept, by name below
    keep: bool = False  # whether the pass keeps its keys and values
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    grads: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class _Behind(Function):
    """Keys of the pass behind those in front; gradients of the latter go to `packing.grads`."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, front: Tensor, packing: Packing, name: tuple[int, str]
    ) -> Tensor:
        assert packing.at is not None
        ctx.packing, ctx.name = packing, name
        return torch.cat([front, own]).index_select(0, packing.at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packing = ctx.packing
        if packing.grads_of is not None:
            packing.grads[ctx.name] = grads[0].index_select(0, packing.grads_of)
        return grads[0].index_select(0, packing.own), None, None, None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packing: Packing,
    **_: Any,
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer = module.layer_idx
    if packing.keep:
        packing.kept.append((k, v))
    last = layer + 1 == module.config.num_hidden_layers
    lengths = packing.lengths
    if last and packing.wanted is not None:
        if len(packing.wanted) == 0:
            return torch.zeros_like(q)[None], None
        assert packing.wanted_lengths is not None
        q, lengths = q.index_select(0, packing.wanted), packing.wanted_lengths
    if packing.front is not None:
        k, v = (
            _Behind.apply(own, front, packing, (layer, name))
            for own, front, name in zip((k, v), packing.front[layer], "kv", strict=True)
        )
    mixed = attend(q, k, v, lengths, scaling)
    if last and packing.wanted is not None:
        mixed = torch.zeros_like(query[0].transpose(0, 1)).index_copy(0, packing.wanted, mixed)
    return mixed[None], None


AttentionInterface.register("bench_packed", _attention)


class _GatedMLP(Function):
    """down(silu(gate(x)) * up(x)), gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up = (rows @ gate_up.mT).chunk(2, -1)
        act = nn.functional.silu(gate)
        out = (act * up) @ down.mT
        ctx.kept = (torch.ops.aten.silu_backward(up, gate), act)  # up * silu'(gate)
        ctx.weights = (gate_up, down)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down = ctx.weights
        derivative, act = ctx.kept
        inner = grads[0].reshape(-1, grads[0].shape[-1]) @ down
        width = inner.shape[1]
        both = inner.new_empty(len(inner), 2 * width)
        torch.mul(inner, derivative, out=both[:, :width])
        torch.mul(inner, act, out=both[:, width:])
        return (both @ gate_up).view(grads[0].shape), None, None


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    if not hasattr(mlp, "bench_both"):
        mlp.bench_both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
    return lambda x: _GatedMLP.apply(x, mlp.bench_both, mlp.down_proj.weight)


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    shape = (norm.weight.shape[0],)
    return lambda x: nn.functional.rms_norm(x, shape, norm.weight, norm.variance_epsilon)


@contextmanager
def _swapped(model: PreTrainedModel, inside: bool) -> Iterator[Callable[..., Tensor]]:
    """Yields `run(packing, embeds, positions)`, the model's last hidden rows; with `inside`, norms
    and MLPs are swapped, and the last layer's MLP runs on the wanted rows alone."""
    replaced: dict[nn.Module, Callable[..., Any]] = {}
    running: list[Packing] = []

    def some_rows(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            wanted = running[-1].wanted
            if wanted is None:
                return forward(x)
            if len(wanted) == 0:
                return x
            found = forward(x.index_select(1, wanted))
            return torch.zeros_like(x).index_copy(1, wanted, found)

        return run

    if inside:
        layers: list[Any] = list(model.model.layers)
        for layer in layers:
            replaced[layer.mlp] = _mlp_forward(layer.mlp)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                replaced[norm] = _norm_forward(norm)
        replaced[layers[-1].mlp] = some_rows(replaced[layers[-1].mlp])

    def run(packing: Packing, embeds: Tensor, positions: Tensor) -> Tensor:
        running.append(packing)
        hidden: Tensor = model.model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        return hidden

    before = model.config._attn_implementation
    model.set_attn_implementation("bench_packed")
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield run
    finally:
        for module in replaced:
            del module.forward
        model.set_attn_implementation(before)
        for packing in running:  # nodes of a graph know it, and it knows their results: a cycle
            packing.kept.clear()
            packing.grads.clear()
            packing.front = None


def tokens_that_fit(model: PreTrainedModel) -> int:
    """Tokens of one pass with its graph: `PACKED_TOKENS`, or what six tenths of the free memory
    hold."""
    if model.device.type != "cuda":
        return PACKED_TOKENS
    config: Any = model.config
    # What stock PyTorch keeps of a row of a layer: about 16 of the hidden and 6 of the MLP's width.
    values = 16 * config.hidden_size + 6 * config.intermediate_size
    row = config.num_hidden_layers * values * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(PACKED_TOKENS, int(0.6 * free / row)))


def packed_loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """Judgements one behind the other in passes that fit, nothing shared."""
    judgements = workload.judgements
    attributions: list[Tensor | None] = [None] * len(judgements)
    logps = torch.zeros(len(judgements), device=model.device)
    limit = tokens_that_fit(model)
    with _swapped(model, inside=False) as run:
        for wanted in (True, False):
            chosen = [j for j, true in enumerate(workload.true_mask) if true == wanted]
            for batch in _batches(chosen, workload, limit):
                with torch.set_grad_enabled(wanted):
                    _one_pass(model, workload, run, batch, wanted, attributions, logps)
    return attributions, logps


def _batches(chosen: list[int], workload: Workload, limit: int) -> Iterator[list[int]]:
    batch: list[int] = []
    tokens = 0
    for j in chosen:
        length = len(workload.sequence(*workload.judgements[j]))
        if batch and tokens + length > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(j)
        tokens += length
    if batch:
        yield batch


def _one_pass(
    model: PreTrainedModel,
    workload: Workload,
    run: Callable[..., Tensor],
    batch: list[int],
    wanted: bool,
    attributions: list[Tensor | None],
    logps: Tensor,
) -> None:
    pairs = [workload.judgements[j] for j in batch]
    sequences = [workload.sequence(i, k) for i, k in pairs]
    counts = [len(ids) for ids in sequences]
    packing = Packing(Lengths(counts, counts, model.device))
    positions = torch.cat([torch.arange(n) for n in counts]).to(model.device)
    embeds = model.get_input_embeddings()(torch.cat(sequences)).requires_grad_(wanted)
    hidden = run(packing, embeds, positions)
    rows = packing.lengths.cu_queries[1:].long() - 1
    logp = _logps(model, hidden.index_select(0, rows), workload)
    logps[torch.tensor(batch, device=logps.device)] = logp.detach()
    if wanted:
        (grad,) = torch.autograd.grad(logp.sum(), embeds)
        scores = _dot(grad, embeds).split(counts)
        for j, (i, _), found in zip(batch, pairs, scores, strict=True):
            attributions[j] = found[workload.span(i)]


def _logps(model: PreTrainedModel, rows: Tensor, workload: Workload) -> Tensor:
    return torch.log_softmax(model.lm_head(rows).float(), -1)[:, workload.target_id]


def _dot(grad: Tensor, embeds: Tensor) -> Tensor:
    return (grad.float() * embeds.detach().float()).sum(-1)


def packed_cached_loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """The cached loop over the whole group at once."""
    with _swapped(model, inside=True) as run:
        return (_one_tail if len(workload.tails) == 1 else _many_tails)(model, workload, run)


def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.long, device=device)


@torch.no_grad()
def _prompt(
    model: PreTrainedModel, workload: Workload, run: Callable[..., Tensor]
) -> list[tuple[Tensor, Tensor]]:
    count = len(workload.prompt)
    packing = Packing(Lengths([count], [count], model.device), keep=True)
    packing.wanted = _nothing(model.device)
    embeds = model.get_input_embeddings()(workload.prompt)
    run(packing, embeds, torch.arange(count, device=model.device))
    return packing.kept


def _with_front(
    pieces: list[tuple[list[range], int]], front: int, device: torch.device
) -> tuple[Lengths, Tensor, Tensor, Tensor]:
    """Lengths, positions, `at` and `own` of sequences: ranges of rows in front, own rows."""
    at: list[Tensor] = []
    own: list[Tensor] = []
    positions: list[Tensor] = []
    queries, keys, first = [], [], 0
    for ranges, count in pieces:
        before = sum(len(rows) for rows in ranges)
        own.append(torch.arange(sum(keys) + before, sum(keys) + before + count))
        at += [torch.arange(rows.start, rows.stop) for rows in ranges]
        at.append(torch.arange(front + first, front + first + count))
        positions.append(torch.arange(before, before + count))
        queries.append(count)
        keys.append(before + count)
        first += count
    lengths = Lengths(queries, keys, device)
    joined = (torch.cat(parts).to(device) for parts in (positions, at, own))
    return lengths, *joined  # type: ignore[return-value]


def _one_tail(model: PreTrainedModel, workload: Workload, run: Callable[..., Tensor]) -> Answer:
    """Response and tail in one piece, and one backward."""
    device = model.device
    prompt = range(len(workload.prompt))
    ids = [torch.cat([response, workload.tails[0]]) for response in workload.responses]
    lengths, positions, at, own = _with_front(
        [([prompt], len(piece)) for piece in ids], len(prompt), device
    )
    ends = lengths.cu_queries[1:].long() - 1
    packing = Packing(
        lengths, ends, Lengths([1] * len(ids), lengths.keys, device),
        _prompt(model, workload, run), at, own,
    )  # fmt: skip
    embeds = model.get_input_embeddings()(torch.cat(ids)).requires_grad_()
    logp = _logps(model, run(packing, embeds, positions).index_select(0, ends), workload)
    chosen = [i for i in range(len(ids)) if workload.is_true(i, 0)]
    found: list[Tensor | None] = [None] * len(ids)
    if chosen:
        (grad,) = torch.autograd.grad(logp[chosen].sum(), embeds)
        scores = _dot(grad, embeds).split(lengths.queries)
        for i in chosen:
            found[i] = scores[i][: len(workload.responses[i])]
    return found, logp.detach()


def _many_tails(model: PreTrainedModel, workload: Workload, run: Callable[..., Tensor]) -> Answer:
    device, items = model.device, len(workload.tails)
    embed = model.get_input_embeddings()
    prompt = _prompt(model, workload, run)
    front = range(len(workload.prompt))
    counts = [len(response) for response in workload.responses]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()

    lengths, positions, at, own = _with_front([([front], n) for n in counts], len(front), device)
    packing = Packing(lengths, _nothing(device), None, prompt, at, own, keep=True)
    embeds = embed(torch.cat(workload.responses)).requires_grad_()
    run(packing, embeds, positions)
    shared = [x for pair in packing.kept for x in pair]

    with torch.no_grad():
        before = [
            (torch.cat([old_k, k]), torch.cat([old_v, v]))
            for (old_k, old_v), (k, v) in zip(prompt, packing.kept, strict=True)
        ]
    here = [range(len(front) + starts[i], len(front) + starts[i + 1]) for i in range(len(counts))]
    pieces = [([front, here[i]], len(workload.tails[k])) for i, k in workload.judgements]
    lengths, positions, at, own = _with_front(pieces, len(front) + starts[-1], device)
    ends = lengths.cu_queries[1:].long() - 1
    true = [j for j, wanted in enumerate(workload.true_mask) if wanted]
    behind = torch.tensor([0, *lengths.keys]).cumsum(0).tolist()
    keys_of = [
        torch.arange(behind[j] + len(front), behind[j] + len(front) + counts[j // items])
        for j in true
    ]
    tails = Packing(
        lengths, ends, Lengths([1] * len(pieces), lengths.keys, device), before, at, own,
        grads_of=torch.cat(keys_of).to(device) if true else None,
    )  # fmt: skip
    tail_embeds = embed(torch.cat(workload.tails * len(counts))).requires_grad_(bool(true))
    logp = _logps(model, run(tails, tail_embeds, positions).index_select(0, ends), workload)
    found: list[Tensor | None] = [None] * len(workload.judgements)
    if true:
        torch.autograd.grad(logp[true].sum(), tail_embeds)
        offsets = torch.tensor([0, *(len(keys) for keys in keys_of)]).cumsum(0).tolist()
        place = {j: (offsets[n], offsets[n + 1]) for n, j in enumerate(true)}
        per_response = [[j for j in true if j // items == i] for i in range(len(counts))]
        for n in range(max(map(len, per_response))):
            chosen = {i: js[n] for i, js in enumerate(per_response) if n < len(js)}
            source = torch.cat([torch.arange(*place[j]) for j in chosen.values()]).to(device)
            rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen]).to(device)
            grads = [
                _placed(tails.grads[index // 2, "kv"[index % 2]], source, rows, like)
                for index, like in enumerate(shared)
            ]
            (grad,) = torch.autograd.grad(shared, embeds, grads, retain_graph=True)
            scores = _dot(grad, embeds)
            for i, j in chosen.items():
                found[j] = scores[starts[i] : starts[i + 1]]
    return found, logp.detach()


def _placed(grads: Tensor, source: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """`grads[source]` at `rows`, zeros elsewhere, in the shape of `like`."""
    taken = grads.index_select(0, source)
    if len(taken) == len(like):
        return taken
    return like.new_zeros(like.shape).index_copy(0, rows, taken)
