"""What people do today, one function per rival, all with the same signature.

`rival(model, workload) -> (attributions, verdict_logps)`: attributions is a list over all
judgements (i, k) of Tensor[T_i] float32, None where the item is False; verdict_logps is
Tensor[G * K], log p(target) in nats. Every rival computes the log-probability of *all* items and
runs a backward for the True ones only, where its way of working allows that.

All but `slow_loop` run with frozen weights; that is what `build_model` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.cached import (
    Answer,
    cached_loop,
    cached_loop_simple,
    fork,
    grouped_query_sdpa,
    prompt_cache,
    tuned_cached_loop,
)
from bench.ours import ours, ours_reference
from bench.packed import packed_cached_loop, packed_loop
from bench.workload import SPECIAL_IDS, Workload
from g2r_fast.key_values import cached

__all__ = ["RIVALS", "Answer", "Passes", "Rival", "Unavailable"]


class Unavailable(RuntimeError):
    """This rival cannot run here; the message says why."""


@dataclass(frozen=True)
class Passes:
    """Token passes a rival needs: one token through all layers, one way.

    `weights` counts tokens whose backward also forms weight gradients; each costs as much again.
    """

    forward: int
    backward: int
    weights: int = 0


@dataclass(frozen=True)
class Rival:
    title: str
    run: Callable[[PreTrainedModel, Workload], Answer]
    passes: Callable[[Workload], Passes]
    slow: bool = False  # gets fewer repetitions
    gpu: bool = False  # made for GPUs: on a CPU its answers are tested, and it is not measured


def _log_probability(logits: Tensor, workload: Workload) -> Tensor:
    return torch.log_softmax(logits.float(), -1)[workload.target_id]


def _dot(grad: Tensor, embeds: Tensor) -> Tensor:
    return (grad.detach().float() * embeds.detach().float()).sum(-1)


def loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """One judgement at a time, last logit only, gradient for `inputs_embeds` only."""
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    for i, k in workload.judgements:
        embeds = model.get_input_embeddings()(workload.sequence(i, k)[None]).requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        logp = _log_probability(logits[0, -1], workload)
        logps.append(logp.detach())
        if workload.is_true(i, k):
            (grad,) = torch.autograd.grad(logp, embeds)
            attributions.append(_dot(grad[0], embeds[0])[workload.span(i)])
        else:
            attributions.append(None)
    return attributions, torch.stack(logps)


def prompt_cached_loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """The prompt's K/V once per group; response and tail run for every item."""
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    prompt = prompt_cache(model, workload)
    for i, k in workload.judgements:
        ids = torch.cat([workload.responses[i], workload.tails[k]])
        embeds = model.get_input_embeddings()(ids[None]).requires_grad_()
        with grouped_query_sdpa(model):
            logits = model(
                inputs_embeds=embeds,
                **cached(model, fork(prompt)),
                use_cache=True,
                logits_to_keep=1,
            ).logits
        logp = _log_probability(logits[0, -1], workload)
        logps.append(logp.detach())
        if workload.is_true(i, k):
            (grad,) = torch.autograd.grad(logp, embeds)
            attributions.append(_dot(grad[0], embeds[0])[: len(workload.responses[i])])
        else:
            attributions.append(None)
    return attributions, torch.stack(logps)


def slow_loop(model: PreTrainedModel, workload: Workload) -> Answer:
    """The loop as usually written: trainable weights, all logits, `.backward()`."""
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    model.requires_grad_(True)
    try:
        for i, k in workload.judgements:
            embeds = model.get_input_embeddings()(workload.sequence(i, k)[None])
            embeds = embeds.detach().requires_grad_()
            logits = model(inputs_embeds=embeds, use_cache=False).logits
            logp = _log_probability(logits[0, -1], workload)
            logps.append(logp.detach())
            if not workload.is_true(i, k):
                attributions.append(None)
                continue
            model.zero_grad()
            logp.backward()
            assert embeds.grad is not None
            attributions.append(_dot(embeds.grad[0], embeds[0])[workload.span(i)])
    finally:
        model.zero_grad()
        model.requires_grad_(False)
    return attributions, torch.stack(logps)


def padded(model: PreTrainedModel, workload: Workload, batch_size: int = 8) -> Answer:
    """Batches of 8 judgements, padded on the right, frozen weights, one logit per sequence.

    A batch with a True item runs its backward for all of its rows: that is what batching costs.
    """
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    judgements = workload.judgements
    for start in range(0, len(judgements), batch_size):
        batch = judgements[start : start + batch_size]
        sequences = [workload.sequence(i, k) for i, k in batch]
        lengths = torch.tensor([len(ids) for ids in sequences])
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths = lengths.to(ids.device)
        rows = torch.arange(len(batch), device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        hidden = model.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[rows, lengths - 1])
        logp = torch.log_softmax(logits.float(), -1)[:, workload.target_id]
        logps.append(logp.detach())
        chosen = [row for row, (i, k) in enumerate(batch) if workload.is_true(i, k)]
        found: list[Tensor | None] = [None] * len(batch)
        if chosen:
            (grads,) = torch.autograd.grad(logp[chosen].sum(), embeds)
            for row in chosen:
                found[row] = _dot(grads[row], embeds[row])[workload.span(batch[row][0])]
        attributions += found
    return attributions, torch.cat(logps)


def captum(model: PreTrainedModel, workload: Workload) -> Answer:
    """captum's LayerGradientXActivation on the embedding layer."""
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError as error:
        raise Unavailable("captum is not installed: pip install captum") from error
    seen: list[Tensor] = []  # captum returns attributions only; the forward leaves log p here

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        logp = _log_probability(logits[0, -1], workload)
        seen.append(logp.detach())
        return logp[None]

    method = LayerGradientXActivation(forward, model.get_input_embeddings())
    attributions: list[Tensor | None] = []
    for i, k in workload.judgements:
        ids = workload.sequence(i, k)[None]
        if workload.is_true(i, k):
            values = method.attribute(ids)
            attributions.append(values[0].detach().float().sum(-1)[workload.span(i)])
        else:
            with torch.no_grad():
                forward(ids)
            attributions.append(None)
    return attributions, torch.stack(seen)


def inseq(model: PreTrainedModel, workload: Workload) -> Answer:
    """inseq's input_x_gradient of log p(target), one judgement at a time.

    inseq takes text, so the ids are spelled as words of a made-up tokenizer. False items run a
    plain forward: inseq has no call for that.
    """
    try:
        import inseq as library  # type: ignore[import-not-found]
    except ImportError as error:
        raise Unavailable("inseq is not installed: pip install inseq") from error
    from inseq.attr.step_functions import probability_fn  # type: ignore[import-not-found]

    seen: list[Tensor] = []

    def log_probability(args: Any) -> Tensor:
        logp = probability_fn(args, logprob=True)
        seen.append(logp.detach().float()[0])
        return logp

    library.register_step_function(log_probability, "bench_logp", overwrite=True)
    bos_before = model.config.bos_token_id
    model.config.bos_token_id = 1  # asked for at load, never put into a sequence
    try:
        attributed = library.load_model(
            model, "input_x_gradient", tokenizer=_word_tokenizer(model.config.vocab_size)
        )
        attributions: list[Tensor | None] = []
        for i, k in workload.judgements:
            ids = workload.sequence(i, k)
            if not workload.is_true(i, k):
                with torch.no_grad():
                    logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits
                seen.append(_log_probability(logits[0, -1], workload))
                attributions.append(None)
                continue
            text = " ".join(f"t{token}" for token in ids.tolist())
            out = attributed.attribute(
                text,
                f"{text} t{workload.target_id}",
                attributed_fn="bench_logp",
                show_progress=False,
            )
            values = out.sequence_attributions[0].target_attributions  # [length, 1, H]
            attributions.append(values[:, 0].float().sum(-1)[workload.span(i)])
    finally:
        model.config.bos_token_id = bos_before
    return attributions, torch.stack(seen)


def _word_tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{token}": token for token in range(SPECIAL_IDS, vocab_size)}
    special = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "<pad>": 3}
    tokenizer = Tokenizer(models.WordLevel({**words, **special}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


def _judgement_passes(w: Workload, *, prompt: bool = True) -> Passes:
    """Every judgement on its own, with or without the prompt."""
    skip = 0 if prompt else len(w.prompt)
    lengths = {(i, k): len(w.sequence(i, k)) - skip for i, k in w.judgements}
    forward = sum(lengths.values()) + skip
    backward = sum(length for (i, k), length in lengths.items() if w.is_true(i, k))
    return Passes(forward, backward)


def _slow_passes(w: Workload) -> Passes:
    passes = _judgement_passes(w)
    return Passes(passes.forward, passes.backward, weights=passes.backward)


def _padded_passes(w: Workload, batch_size: int = 8) -> Passes:
    forward = backward = 0
    for start in range(0, len(w.judgements), batch_size):
        batch = w.judgements[start : start + batch_size]
        rows = len(batch) * max(len(w.sequence(i, k)) for i, k in batch)
        forward += rows
        backward += rows if any(w.is_true(i, k) for i, k in batch) else 0
    return Passes(forward, backward)


def _shared_passes(w: Workload, *, tails_together: bool) -> Passes:
    """Prompt and responses once. `tails_together`: a backward takes all K tails or none."""
    tails = sum(len(tail) for tail in w.tails)
    forward = len(w.prompt) + sum(len(response) + tails for response in w.responses)
    backward = 0
    for i, response in enumerate(w.responses):
        true_items = [k for k in range(len(w.tails)) if w.is_true(i, k)]
        backward += len(true_items) * len(response)
        if tails_together:
            backward += tails if true_items else 0
        else:
            backward += sum(len(w.tails[k]) for k in true_items)
    return Passes(forward, backward)


def _simple_cached_passes(w: Workload) -> Passes:
    return _shared_passes(w, tails_together=False)


def _batched_cached_passes(w: Workload) -> Passes:
    return _shared_passes(w, tails_together=True)


def _prompt_cached_passes(w: Workload) -> Passes:
    return _judgement_passes(w, prompt=False)


# "ours" comes first in tables; its passes are those of a loop that shares every prefix.
RIVALS: dict[str, Rival] = {
    "ours": Rival("g2r_fast", ours, _simple_cached_passes),
    "ours_reference": Rival("g2r_fast, plain PyTorch", ours_reference, _simple_cached_passes),
    "loop": Rival("loop", loop, _judgement_passes),
    "prompt_cached_loop": Rival("prompt-cached loop", prompt_cached_loop, _prompt_cached_passes),
    "cached_loop_simple": Rival(
        "cached loop, one tail at a time", cached_loop_simple, _simple_cached_passes
    ),
    "cached_loop": Rival("cached loop", cached_loop, _batched_cached_passes),
    "tuned_cached_loop": Rival(
        "cached loop, the model's inside swapped", tuned_cached_loop, _batched_cached_passes
    ),
    "packed_loop": Rival("packed loop, varlen flash", packed_loop, _judgement_passes, gpu=True),
    "packed_cached_loop": Rival(
        "packed cached loop, the model's inside swapped",
        packed_cached_loop,
        _batched_cached_passes,
        gpu=True,
    ),
    "slow_loop": Rival("slow loop", slow_loop, _slow_passes, slow=True),
    "padded": Rival("padded, batches of 8", padded, _padded_passes, slow=True),
    "captum": Rival("captum LayerGradientXActivation", captum, _judgement_passes, slow=True),
    "inseq": Rival("inseq input_x_gradient", inseq, _judgement_passes, slow=True),
}
