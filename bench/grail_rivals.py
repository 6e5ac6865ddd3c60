"""Saliencies for GRAIL: what the official code does, and what a skilled user would write.

`rival(model, rollouts) -> [T_i] per completion`, float32: `s_t = ||(dL/dE_p) * E_p||_2` with
p = t - 1 and L = -sum over the span of log pi; zero behind the span. The weights made of them cost
nothing and are not part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.cached import (
    fork,
    forked,
    grouped_query_sdpa,
    padded_left,
    prompt_cache,
    together,
)
from bench.flops import Sizes
from bench.ours import our_module, reference_backend
from bench.signal_flops import stock, swapped
from bench.signal_workload import Answer, Rollouts, SignalRival
from bench.tuned import tuned
from bench.workload import Workload
from g2r_fast.key_values import cached

__all__ = ["GRAIL_RIVALS", "loop"]


def _loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logps = torch.log_softmax(logits.float() / temperature, -1)
    return -logps.gather(-1, targets[:, None]).sum()


def _norms(grad: Tensor, embeds: Tensor) -> Tensor:
    return (grad.detach().float() * embeds.detach().float()).norm(dim=-1)


def loop(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """One completion at a time and the whole of it, frozen weights, the span's logits only."""
    found: Answer = []
    prompt = len(rollouts.prompt)
    for i, (start, _, _, stop) in enumerate(rollouts.spans):
        ids = rollouts.sequence(i)
        embeds = model.get_input_embeddings()(ids[None]).requires_grad_()
        reads = torch.arange(prompt + start - 1, prompt + stop - 1, device=ids.device)
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=reads).logits[0]
        loss = _loss(logits, rollouts.completions[i][start:stop], rollouts.temperature)
        (grad,) = torch.autograd.grad(loss, embeds)
        found.append(_norms(grad[0], embeds[0])[prompt - 1 : -1])
    return found


def slow_loop(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """As the official code does it: trainable weights, all logits, `.backward()`."""
    found: Answer = []
    prompt = len(rollouts.prompt)
    model.requires_grad_(True)
    try:
        for i, (start, _, _, stop) in enumerate(rollouts.spans):
            embeds = model.get_input_embeddings()(rollouts.sequence(i)[None])
            embeds = embeds.detach().requires_grad_()
            logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
            reads = logits[prompt + start - 1 : prompt + stop - 1]
            model.zero_grad()
            _loss(reads, rollouts.completions[i][start:stop], rollouts.temperature).backward()
            assert embeds.grad is not None
            found.append(_norms(embeds.grad[0], embeds[0])[prompt - 1 : -1])
    finally:
        model.zero_grad()
        model.requires_grad_(False)
    return found


def _shorter(rollouts: Rollouts) -> Workload:
    """All of the prompt but its last token, whose gradient is wanted."""
    return Workload(rollouts.prompt[:-1], [], [], [], 0)


def _needed(rollouts: Rollouts, i: int) -> Tensor:
    """The prompt's last token and the completion up to the span's last token but one."""
    stop = rollouts.spans[i][3]
    return torch.cat([rollouts.prompt[-1:], rollouts.completions[i][: stop - 1]])


def _with_zeros(norms: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(norms, (0, length - len(norms)))


def cached_loop(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """The prompt's K/V once and without a graph; nothing behind the span."""
    found: Answer = []
    with grouped_query_sdpa(model):
        prompt = prompt_cache(model, _shorter(rollouts))
        for i, (start, _, _, stop) in enumerate(rollouts.spans):
            embeds = model.get_input_embeddings()(_needed(rollouts, i)[None]).requires_grad_()
            hidden = model.model(
                inputs_embeds=embeds, **cached(model, fork(prompt)), use_cache=True
            ).last_hidden_state[0, start:stop]
            logits = model.lm_head(hidden)
            loss = _loss(logits, rollouts.completions[i][start:stop], rollouts.temperature)
            (grad,) = torch.autograd.grad(loss, embeds)
            found.append(_with_zeros(_norms(grad[0], embeds[0]), len(rollouts.completions[i])))
    return found


def tuned_cached_loop(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """`cached_loop` with the inside of the model swapped for faster stock PyTorch; short
    completions in one padded batch."""
    found: Answer = []
    pieces = [_needed(rollouts, i) for i in range(len(rollouts.completions))]
    before = len(rollouts.prompt) - 1
    with tuned(model) as extra:
        tuning = extra["tuning"]
        tuning.last_rows = slice(0, 0)
        prompt = prompt_cache(model, _shorter(rollouts), **extra)
        tuning.prefix = before
        for batch in together([len(piece) for piece in pieces]):
            ids, positions, padding = padded_left([pieces[i] for i in batch], before)
            tuning.hidden_keys = padding if len(batch) > 1 else None
            # Padded on the left, all spans end with the last row.
            spans = [(i, *rollouts.spans[i][::3]) for i in batch]
            tuning.last_rows = slice(-max(stop - start for _, start, stop in spans), None)
            embeds = model.get_input_embeddings()(ids).requires_grad_()
            hidden = model.model(
                inputs_embeds=embeds,
                position_ids=positions,
                **cached(model, forked(prompt, len(batch))),
                use_cache=True,
                **extra,
            ).last_hidden_state
            logits = model.lm_head(
                torch.cat([hidden[b, start - stop :] for b, (_, start, stop) in enumerate(spans)])
            )
            targets = torch.cat([rollouts.completions[i][start:stop] for i, start, stop in spans])
            # The sum over completions: no one's loss reaches another's embeddings.
            loss = _loss(logits, targets, rollouts.temperature)
            (grads,) = torch.autograd.grad(loss, embeds)
            for b, i in enumerate(batch):
                norms = _norms(grads[b], embeds[b])[-len(pieces[i]) :]
                found.append(_with_zeros(norms, len(rollouts.completions[i])))
    return found


def ours(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    found: Answer = our_module("grail").token_saliencies(
        model,
        rollouts.prompt_ids,
        rollouts.completion_ids,
        [our_module("grail").AnswerSpan(*span) for span in rollouts.spans],
        leaf="embeddings",
        shift=1,
        temperature=rollouts.temperature,
    )
    return found


def ours_reference(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    with reference_backend():
        return ours(model, rollouts)


def _loop_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    return sum(
        stock(sizes, len(rollouts.sequence(i)), head=stop - start, backward=True)
        for i, (start, _, _, stop) in enumerate(rollouts.spans)
    )


def _slow_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    lengths = [len(rollouts.sequence(i)) for i in range(len(rollouts.completions))]
    return sum(stock(sizes, n, head=n, backward=True, weights=True) for n in lengths)


def _cached_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    before = len(rollouts.prompt) - 1
    return stock(sizes, before) + sum(
        stock(sizes, stop, before=before, head=stop - start, backward=True)
        for start, _, _, stop in rollouts.spans
    )


def _tuned_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    before = len(rollouts.prompt) - 1
    return swapped(sizes, before, reads=0) + sum(
        swapped(sizes, stop, before=before, reads=stop - start, backward=True)
        for start, _, _, stop in rollouts.spans
    )


GRAIL_RIVALS: dict[str, SignalRival] = {
    "ours": SignalRival("g2r_fast", ours),
    "ours_reference": SignalRival("g2r_fast, plain PyTorch", ours_reference),
    "loop": SignalRival("loop", loop, _loop_flops),
    "cached_loop": SignalRival("cached loop", cached_loop, _cached_flops),
    "tuned_cached_loop": SignalRival(
        "cached loop, the model's inside swapped", tuned_cached_loop, _tuned_flops
    ),
    "slow_loop": SignalRival("slow loop, as the official code", slow_loop, _slow_flops, slow=True),
}
