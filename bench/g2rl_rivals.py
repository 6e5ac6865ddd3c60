"""Features for G2RL: a gradient through the logits, as is done today; our shortcut in PyTorch.

`rival(model, rollouts) -> Phi_i [H] per completion`, float32: the mean over tokens of
`W[y_t] - sum_v p_t(v) W[v]`, p at the sampling temperature. Where `rollouts.hidden` is given, the
LM head's inputs are there already; else the model is run for them. Nobody is asked for the
log-probabilities and entropies that g2r_fast returns besides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.cached import forked, padded_left, prompt_cache, together
from bench.flops import Sizes
from bench.ours import our_module, reference_backend
from bench.rivals import Unavailable
from bench.signal_flops import stock, swapped
from bench.signal_workload import Answer, Rollouts, SignalRival, hidden_states
from bench.tuned import product_nn, product_nt, tuned
from bench.workload import Workload
from g2r_fast.key_values import cached

__all__ = ["G2RL_RIVALS", "full_logits_gradient", "tuned_states"]

# Rows of logits at a time: of 64, 128, 256 and 512 no other was faster by more than the noise.
CHUNK = 128


def full_logits_gradient(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """All logits of a completion, log-softmax, autograd's gradient for the head's input."""
    found: Answer = []
    given = rollouts.hidden or hidden_states(model, rollouts)
    for states, ids in zip(given, rollouts.completions, strict=True):
        hidden = states.to(model.dtype).requires_grad_()
        logits = model.lm_head(hidden).float() / rollouts.temperature
        logps = torch.log_softmax(logits, -1).gather(-1, ids[:, None])
        (grad,) = torch.autograd.grad(logps.sum(), hidden)
        # The chain rule's 1 / temperature is no part of phi.
        found.append(grad.float().mean(0) * rollouts.temperature)
        states.requires_grad_(False)
    return found


def tuned_states(model: PreTrainedModel, rollouts: Rollouts) -> list[Tensor]:
    """`hidden_states` with the prompt's keys and values once and the model's inside swapped."""
    found: list[Tensor] = []
    pieces = [torch.cat([rollouts.prompt[-1:], c[:-1]]) for c in rollouts.completions]
    before = len(rollouts.prompt) - 1
    with tuned(model) as extra, torch.no_grad():
        tuning = extra["tuning"]
        tuning.last_rows = slice(0, 0)
        prompt = prompt_cache(model, Workload(rollouts.prompt[:-1], [], [], [], 0), **extra)
        tuning.prefix, tuning.last_rows = before, slice(None)
        for batch in together([len(piece) for piece in pieces]):
            ids, positions, padding = padded_left([pieces[i] for i in batch], before)
            tuning.hidden_keys = padding if len(batch) > 1 else None
            out = model.model(
                input_ids=ids,
                position_ids=positions,
                **cached(model, forked(prompt, len(batch))),
                use_cache=True,
                **extra,
            ).last_hidden_state
            found += [out[b, -len(pieces[i]) :] for b, i in enumerate(batch)]
    return found


@torch.no_grad()
def _chunked(model: PreTrainedModel, rollouts: Rollouts, *, summed_first: bool) -> Answer:
    weight = model.lm_head.weight.detach()
    states = rollouts.hidden or tuned_states(model, rollouts)
    hidden = torch.cat(states).to(weight.dtype)
    ids = torch.cat(rollouts.completions)
    lengths = torch.tensor([len(c) for c in rollouts.completions], device=ids.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
    share = (1.0 / lengths.float())[owner]
    width = weight.shape[0] if summed_first else weight.shape[1]
    sums = torch.zeros(len(lengths), width, device=ids.device)
    for rows in torch.arange(len(ids), device=ids.device).split(CHUNK):
        first, last = int(rows[0]), int(rows[-1]) + 1
        logits = product_nt(hidden[first:last], weight).float()
        if rollouts.temperature != 1.0:
            logits /= rollouts.temperature
        p = torch.softmax(logits, -1)
        if summed_first:
            mixing = torch.zeros(len(lengths), last - first, device=ids.device)
            mixing[owner[first:last], rows - first] = share[first:last]
            sums.addmm_(mixing, p)
        else:
            expected = product_nn(p.to(weight.dtype), weight).float()
            sums.index_add_(0, owner[first:last], expected * share[first:last, None])
    if summed_first:
        sums = product_nn(sums.to(weight.dtype), weight).float()
    chosen = torch.zeros(len(lengths), weight.shape[1], device=ids.device)
    chosen.index_add_(0, owner, weight[ids].float() * share[:, None])
    return list(chosen - sums)


def chunked_gradient(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """The gradient formed by hand, `p @ W`, in chunks of rows over all completions."""
    return _chunked(model, rollouts, summed_first=False)


def shortcut(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    """Our algebra without our kernels: p summed over tokens first, one product at the end."""
    return _chunked(model, rollouts, summed_first=True)


def liger(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    raise Unavailable("its kernels are Triton's, for GPUs: pip install liger-kernel")


def cut_cross_entropy(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    raise Unavailable("its kernels are Triton's, for GPUs: pip install cut-cross-entropy")


def ours(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    g2rl = our_module("g2rl")
    if rollouts.hidden:
        features = g2rl.features_from_hidden_states(
            model.lm_head,
            [states.to(model.dtype) for states in rollouts.hidden],
            rollouts.completion_ids,
            temperature=rollouts.temperature,
        )
    else:
        features = g2rl.gradient_features(
            model,
            rollouts.prompt_ids,
            rollouts.completion_ids,
            temperature=rollouts.temperature,
        )
    return list(features.features)


def ours_reference(model: PreTrainedModel, rollouts: Rollouts) -> Answer:
    with reference_backend():
        return ours(model, rollouts)


def _head(sizes: Sizes, rollouts: Rollouts, products: int) -> int:
    rows = sum(map(len, rollouts.completions))
    return 2 * products * rows * sizes.hidden * sizes.vocab


def _full_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    lengths = [] if rollouts.hidden else [len(c) for c in rollouts.completions]
    forward = sum(stock(sizes, len(rollouts.prompt) + length - 1) for length in lengths)
    return forward + _head(sizes, rollouts, 2)


def _tuned_states_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    if rollouts.hidden:
        return 0
    before = len(rollouts.prompt) - 1
    return swapped(sizes, before, reads=0) + sum(
        swapped(sizes, len(c), before=before, reads=len(c), head=0) for c in rollouts.completions
    )


def _chunked_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    return _tuned_states_flops(sizes, rollouts) + _head(sizes, rollouts, 2)


def _shortcut_flops(sizes: Sizes, rollouts: Rollouts) -> int:
    rows, count = sum(map(len, rollouts.completions)), len(rollouts.completions)
    # The sums over tokens are a product of their own, with a row per completion.
    mixing = 2 * rows * count * sizes.vocab + 2 * count * sizes.hidden * sizes.vocab
    return _tuned_states_flops(sizes, rollouts) + _head(sizes, rollouts, 1) + mixing


G2RL_RIVALS: dict[str, SignalRival] = {
    "ours": SignalRival("g2r_fast", ours),
    "ours_reference": SignalRival("g2r_fast, plain PyTorch", ours_reference),
    "full_logits_gradient": SignalRival(
        "gradient through all logits", full_logits_gradient, _full_flops
    ),
    "chunked_gradient": SignalRival("gradient in chunks", chunked_gradient, _chunked_flops),
    "shortcut": SignalRival("our shortcut in stock PyTorch", shortcut, _shortcut_flops),
    "liger": SignalRival("Liger's fused cross-entropy", liger, _chunked_flops),
    "cut_cross_entropy": SignalRival("cut-cross-entropy", cut_cross_entropy, _chunked_flops),
}
