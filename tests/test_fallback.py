"""The autograd engine on families that the packed engine does not know."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Starcoder2Config,
)

from g2r_fast import attribute_tokens
from g2r_fast.engine import PackedEngine, choose_engine
from g2r_fast.errors import UnsupportedModelError
from g2r_fast.fallback import AutogradEngine
from g2r_fast.grad2reward import TargetSignal
from g2r_fast.plan import PackedSequence, Read
from g2r_fast.reference import ReferenceDecoder, relative_error
from g2r_fast.signal import Cotangents, LeafRows

V = 97
FLOAT32 = 2e-5
FLOAT64 = 1e-12  # two ways through the same modules

COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
WINDOW = 6  # shorter than prompt and response
GEMMA = {**COMMON, **GROUPED, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]

# One record per thing that the packed engine does not have.
CONFIGS: dict[str, Callable[[], Any]] = {  # their keywords are checked when they are called
    "gpt2: learned positions, Conv1D": lambda: GPT2Config(
        vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=None,
    ),
    "opt: positions from the mask, flat rows": lambda: OPTConfig(
        **{**COMMON, "pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "phi: partial rotary, parallel blocks": lambda: PhiConfig(
        **{**COMMON, "partial_rotary_factor": 0.5}, intermediate_size=48
    ),
    "neox: partial rotary, untied": lambda: GPTNeoXConfig(
        **{**COMMON, "rotary_pct": 0.25}, intermediate_size=48
    ),
    "falcon: alibi": lambda: FalconConfig(**COMMON, alibi=True),
    "gemma2: windows, soft-caps, scaled embeddings": lambda: Gemma2Config(
        **GEMMA, layer_types=LAYERS, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3: windows, two rotary tables": lambda: Gemma3TextConfig(**GEMMA, layer_types=LAYERS),
    "starcoder2: windows, biases": lambda: Starcoder2Config(
        **COMMON, **GROUPED, sliding_window=WINDOW
    ),
    "mixtral: experts": lambda: MixtralConfig(
        **COMMON, **GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
}  # fmt: skip


# Whose norms and softmaxes stay in float32 when the model is asked for float64.
ROUNDED = tuple(name for name in CONFIGS if name.startswith(("gemma", "mixtral")))
GPT2, PHI, GEMMA3 = (
    next(name for name in CONFIGS if name.startswith(kind)) for kind in ("gpt2", "phi", "gemma3")
)


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose biases and norm weights are not the 0 and 1 they begin with."""
    # SDPA leaves soft-caps out; the eager softmax is float32 whatever the model's dtype.
    attention = "eager" if name in ROUNDED else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
        model = model.eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def exact_model_of(name: str) -> Any:
    """In float64 where that means something; mixtral's experts have no float64 product at all."""
    return model_of(name, torch.float32 if name in ROUNDED else torch.float64)


def group(prompt: int = 9) -> tuple[list[list[int]], list[tuple[int, int]], list[int]]:
    """Two responses of one prompt, three items each."""
    before = (2 + random_ids(prompt, 1, V - 2)).tolist()
    ids, spans = [], []
    for i in range(2):
        response = (2 + random_ids(5 + 2 * i, 10 + i, V - 2)).tolist()
        for k in range(3):
            ids.append([*before, *response, *(2 + random_ids(3 + k, 50 + k, V - 2)).tolist()])
            spans.append((prompt, prompt + len(response)))
    return ids, spans, [(7 * i + 3) % V for i in range(6)]


def alone(
    model: Any, ids: Sequence[int], target: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of log p(target) at the embeddings of one whole sequence, and the embeddings."""
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    (grads,) = torch.autograd.grad(logits.to(wide).log_softmax(-1)[target], embeds)
    return grads[0], embeds.detach()[0]


def run(
    model: Any, ids: list[list[int]], spans: list[tuple[int, int]], targets: list[int]
) -> tuple[TargetSignal, AutogradEngine, Any]:
    engine = AutogradEngine(model)
    signal = TargetSignal(spans, targets, "dot", torch.device("cpu"))
    sequences = [PackedSequence(i, start) for i, (start, _) in zip(ids, spans, strict=True)]
    return signal, engine, engine.run(sequences, signal)


@pytest.mark.parametrize("readout", ["dot", "l2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_one_sequence_at_a_time(name: str, readout: str) -> None:
    model, (ids, spans, targets) = model_of(name), group()
    scores = attribute_tokens(model, ids, spans, targets, readout=readout, engine="autograd")
    for i, span in enumerate(spans):
        grads, embeds = alone(model, ids[i], targets[i])
        expected = (grads * embeds).sum(-1) if readout == "dot" else grads.norm(dim=-1)
        assert relative_error(scores[i], expected[slice(*span)]) <= FLOAT32


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_central_differences(name: str) -> None:
    # Rounding of float32 over the step, truncation with its square: a larger step, a larger error.
    step, tolerance = (1e-2, 3e-3) if name in ROUNDED else (1e-4, 1e-6)
    model, (ids, spans, targets) = exact_model_of(name), group()
    signal, _, _ = run(model, ids[:1], spans[:1], targets[:1])
    embeds = model.get_input_embeddings()(torch.tensor(ids[0]))
    differences = []
    for position in range(*spans[0]):
        values = []
        for sign in (1.0, -1.0):
            moved = embeds.clone()
            moved[position] *= 1.0 + sign * step
            logits = model(inputs_embeds=moved[None], use_cache=False).logits[0, -1].double()
            values.append(logits.log_softmax(-1)[targets[0]])
        differences.append((values[0] - values[1]) / (2.0 * step))
    assert relative_error(signal.scores(0), torch.stack(differences)) <= tolerance


# --- prefixes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_prefix_runs_once_and_changes_nothing(name: str) -> None:
    model, (ids, spans, targets) = exact_model_of(name), group()
    shared, _, done = run(model, ids, spans, targets)
    assert done.rows_forward == spans[0][0] + sum(len(i) - spans[0][0] for i in ids)
    assert done.rows_unshared == sum(map(len, ids))
    assert done.rows_backward == sum(len(i) - spans[0][0] for i in ids)
    engine = AutogradEngine(model)
    engine._cache_works = False
    whole = TargetSignal(spans, targets, "dot", torch.device("cpu"))
    sequences = [PackedSequence(i, start) for i, (start, _) in zip(ids, spans, strict=True)]
    assert engine.run(sequences, whole).rows_forward == sum(map(len, ids))
    tolerance = FLOAT32 if name in ROUNDED else FLOAT64
    for i in range(len(ids)):
        assert relative_error(shared.scores(i), whole.scores(i)) <= tolerance


def breaks_its_cache(model: Any, how: Callable[[Any], Any]) -> Any:
    """A copy of the model whose forward does something to the cache it is given."""
    broken = copy.deepcopy(model)
    forward = broken.forward

    def wrong(
        input_ids: Any = None, inputs_embeds: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        if past_key_values is not None:
            past_key_values = how(past_key_values)
        return forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **kwargs,
        )

    broken.forward = wrong
    return broken


def forget(cache: Any) -> None:
    return None


def scale(cache: Any) -> Any:
    for layer in cache.layers:
        layer.values *= 1.1
    return cache


def shift(cache: Any) -> Any:
    """As a cache that counts a position too many."""
    for layer in cache.layers:
        layer.keys = layer.keys.roll(1, -2)
    return cache


def refuse(cache: Any) -> Any:
    raise ValueError("this model takes no cache")


@pytest.mark.parametrize("how", [forget, scale, shift, refuse])
@pytest.mark.parametrize("name", [GPT2, PHI])
def test_a_wrong_cache_is_found_out_and_not_used(
    name: str, how: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, (ids, spans, targets) = model_of(name), group()
    with caplog.at_level("INFO", logger="g2r_fast"):
        signal, engine, _ = run(breaks_its_cache(model, how), ids, spans, targets)
    assert engine._cache_works is False
    expected = "cannot be reused" if how is refuse else "changes its logits"
    assert [expected in record.message for record in caplog.records] == [True]
    for i, span in enumerate(spans):
        grads, embeds = alone(model, ids[i], targets[i])
        wanted = (grads * embeds).sum(-1)[slice(*span)]
        assert relative_error(signal.scores(i), wanted) <= FLOAT32


def test_a_cache_that_goes_wrong_only_when_it_is_long_is_found_out() -> None:
    def window(cache: Any) -> Any:
        for layer in cache.layers:
            layer.values[..., :-8, :] = 0.0
        return cache

    model = model_of(GPT2)
    broken = breaks_its_cache(model, window)
    short, long = group(prompt=5), group(prompt=20)
    ids, spans, targets = short[0] + long[0], short[1] + long[1], short[2] + long[2]
    signal, engine, _ = run(broken, ids, spans, targets)
    assert engine._cache_works is False
    for i, span in enumerate(spans):
        grads, embeds = alone(model, ids[i], targets[i])
        wanted = (grads * embeds).sum(-1)[slice(*span)]
        assert relative_error(signal.scores(i), wanted) <= FLOAT32


def test_no_cache_for_one_sequence_alone_or_from_its_beginning() -> None:
    model, (ids, spans, targets) = model_of(GPT2), group()
    calls: list[Any] = []

    def watch(cache: Any) -> Any:
        calls.append(cache)
        return cache

    watched = breaks_its_cache(model, watch)
    run(watched, ids[:1], spans[:1], targets[:1])
    run(watched, [i[9:] for i in ids], [(0, b - a) for a, b in spans], targets)
    assert not calls
    run(watched, ids, spans, targets)
    assert calls


# --- signals of other kinds ----------------------------------------------------------------------


class Anywhere(TargetSignal):
    """log p(target) after every read; keeps the leaf and what the linear layers saw."""

    def __init__(self, targets: dict[tuple[int, int], int], leaf: int = 0) -> None:
        super().__init__([], [], "dot", torch.device("cpu"))
        self.targets = targets
        self.leaf = leaf
        self.at_leaf: dict[int, tuple[LeafRows, Tensor, Tensor]] = {}
        self.linears: dict[str, list[tuple[Tensor, Tensor, LeafRows]]] = {}

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        targets = torch.tensor([self.targets[r.sequence, r.position] for r in reads])
        values = nn.functional.one_hot(targets, V) - logits.softmax(-1)
        return Cotangents(range(len(reads)), values.to(logits.dtype))

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        (sequence,) = rows.lanes
        self.at_leaf[sequence] = (rows, values.clone(), grads[:, 0].clone())

    def on_linear(self, name: str, inputs: Tensor, output_grads: Tensor, rows: LeafRows) -> None:
        seen = (inputs.clone(), output_grads[:, 0].clone(), rows)
        self.linears.setdefault(name, []).append(seen)


def losses(model: Any, ids: Sequence[int], targets: dict[int, int], **kwargs: Any) -> Any:
    output = model(input_ids=torch.tensor([ids]), use_cache=False, **kwargs)
    logps = output.logits[0].to(torch.float64).log_softmax(-1)
    return sum(logps[p, t] for p, t in targets.items()), output


@pytest.mark.parametrize("leaf", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_as_leaves_and_several_reads(name: str, leaf: int) -> None:
    """Shared prefixes; several reads, some of them inside the prefix and so without its cache."""
    # Else nothing asks for a graph here; the engine gets the frozen one.
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    ids, _, _ = group()
    starts = [9, 9, 9, 11, 7, 7]
    reads = [(-1,), (9, 12, -1), (-1,), (12, -1), (6, -1), (5, 8, -1)]
    sequences = [
        PackedSequence(i, start, read) for i, start, read in zip(ids, starts, reads, strict=True)
    ]
    targets = {
        (index, position): (3 * index + position) % V
        for index, sequence in enumerate(sequences)
        for position in sequence.reads
    }
    signal = Anywhere(targets, leaf)
    AutogradEngine(model_of(name)).run(sequences, signal)
    for index, sequence in enumerate(sequences):
        wanted = {p: t for (i, p), t in targets.items() if i == index}
        loss, output = losses(model, ids[index], wanted, output_hidden_states=True)
        hidden = output.hidden_states[leaf]
        (grads,) = torch.autograd.grad(loss, hidden)
        rows, values, actual = signal.at_leaf[index]
        start = sequence.backward_start
        assert (rows.start, rows.stop) == (start, len(ids[index]))
        assert relative_error(values, hidden[0, start:]) <= FLOAT32
        # What lies after the last read of a leaf so late gets no gradient at all.
        if grads[0, start:].any():
            assert relative_error(actual, grads[0, start:]) <= FLOAT32
        else:
            assert not actual.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_layer_is_read(name: str) -> None:
    """Sums over the tokens of inputs and output gradients are the weights' gradients."""
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:  # one gradient for two roles: take them apart
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    ids, _, _ = group()
    sequences = [PackedSequence(ids[0], 0, (4, 9, -1)), PackedSequence(ids[3], 0)]
    targets = {(0, 4): 3, (0, 9): 8, (0, len(ids[0]) - 1): 20, (1, len(ids[3]) - 1): 11}
    signal = Anywhere(targets)
    signal.reads_linears = True
    if any("experts." in n and isinstance(m, nn.Linear) for n, m in model.named_modules()):
        # transformers 4 has experts that are linear layers and see the rows sent to them.
        with pytest.raises(UnsupportedModelError, match="not one for each token"):
            AutogradEngine(model).run(sequences, signal)
        return
    AutogradEngine(model).run(sequences, signal)
    assert all(p.grad is None for p in model.parameters())
    names = {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }  # fmt: skip
    assert len(names) > 3 and set(signal.linears) == names
    total = sum(losses(model, ids[s], {p: t for (i, p), t in targets.items() if i == index})[0]
                for index, s in enumerate((0, 3)))  # fmt: skip
    total.backward()
    for layer in names:
        weight = model.get_submodule(layer).weight.grad
        if type(model.get_submodule(layer)).__name__ == "Conv1D":
            weight = weight.T
        products = [grads.T @ inputs for inputs, grads, _ in signal.linears[layer]]
        formed = torch.stack(products).sum(0)
        assert relative_error(formed, weight) <= FLOAT32
        for inputs, grads, rows in signal.linears[layer]:
            assert len(inputs) == len(grads) == rows.stop - rows.start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [GPT2, GEMMA3])
def test_linears_behind_a_shared_prefix(name: str, dtype: torch.dtype) -> None:
    """Rows before the backward's start are not shown, with and without a cache; at unit scale."""
    model, (ids, spans, targets) = model_of(name), group()
    model = copy.deepcopy(model).to(dtype)

    def read(numbers: Sequence[int]) -> Anywhere:
        signal = Anywhere({(n, len(ids[i]) - 1): targets[i] for n, i in enumerate(numbers)})
        signal.reads_linears = True
        sequences = [PackedSequence(ids[i], spans[i][0]) for i in numbers]
        AutogradEngine(model).run(sequences, signal)
        return signal

    together = read(range(6))
    for i in range(6):
        single = read([i])
        for layer, ((inputs, grads, rows),) in single.linears.items():
            (found,) = [seen for seen in together.linears[layer] if seen[2].lanes == (i,)]
            assert (found[2].start, found[2].stop) == (rows.start, rows.stop)
            assert rows.start >= spans[i][0] and rows.stop == len(ids[i])
            assert grads.dtype == torch.float32
            tolerance = FLOAT32 if dtype == torch.float32 else 0.1
            assert relative_error(found[0], inputs) <= tolerance
            assert relative_error(found[1], grads) <= tolerance
    # The head's output gradients are the cotangents themselves, whatever scale float16 travels at.
    head = "lm_head"
    ((_, grads, _),) = read([0]).linears[head]
    assert 0.5 < float(grads[-1].abs().max()) <= 1.0


def test_experts_that_see_other_rows_are_refused() -> None:
    class Experts(nn.Module):
        """Half of the tokens go to a linear layer of their own."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.expert = inner, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return torch.cat([out[:, :-3], out[:, -3:] + self.expert(x[0, -3:])], dim=1)

    model = copy.deepcopy(model_of(PHI))
    model.model.layers[1].mlp = Experts(model.model.layers[1].mlp).requires_grad_(False)
    ids, _, _ = group()
    signal = Anywhere({(0, len(ids[0]) - 1): 3})
    engine, sequences = AutogradEngine(model), [PackedSequence(ids[0], 4)]
    engine.run(sequences, signal)  # a signal that reads no linears does not mind
    signal.reads_linears = True

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.expert sees 3 rows"):
        engine.run(sequences, signal)
    assert hooks() == before


# --- what goes with it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_packed_engine_says_no(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type '.*' is not one of llama"):
        PackedEngine(model_of(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert choose_engine(model_of(name)).name == "autograd"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_the_plain_loop(dtype: torch.dtype) -> None:
    ids, spans, targets = group()
    model = tiny_model("qwen2", dtype=dtype)
    decoder = ReferenceDecoder.from_model(model)
    scores = attribute_tokens(model, ids, spans, targets, engine="autograd")
    ours, theirs = [], []
    for i, span in enumerate(spans):
        truth_embeds = decoder.embed(ids[i]).requires_grad_(True)
        logp = decoder.logits(truth_embeds).log_softmax(-1)[targets[i]]
        (truth,) = torch.autograd.grad(logp, truth_embeds)
        expected = (truth * truth_embeds).sum(-1).detach()[slice(*span)]
        grads, embeds = alone(model, ids[i], targets[i])
        plain = (grads.float() * embeds.float()).sum(-1)[slice(*span)]
        ours.append(relative_error(scores[i], expected))
        theirs.append(relative_error(plain, expected))
    # The mean over sequences: of a few tokens each, one of them may be lucky.
    assert 0.0 < sum(ours) <= 2 * sum(theirs)


def test_small_gradients_survive_float16() -> None:
    """What float16 rounds to zero at its own scale comes back at the scale cotangents travel at."""
    ids, spans, targets = group()
    model = tiny_model("llama", dtype=torch.float32)
    model.lm_head.weight.data *= 1e-4
    half = tiny_model("llama", dtype=torch.float16)
    half.lm_head.weight.data = model.lm_head.weight.data.half()
    scores = attribute_tokens(half, ids, spans, targets, engine="autograd")
    expected = attribute_tokens(model, ids, spans, targets, engine="autograd")
    grads, embeds = alone(half, ids[0], targets[0])
    plain = (grads.float() * embeds.float()).sum(-1)[slice(*spans[0])]
    assert relative_error(scores[0], expected[0]) < 0.2 * relative_error(plain, expected[0])


def test_a_trainable_model_gets_no_gradients() -> None:
    model = copy.deepcopy(model_of(GPT2)).requires_grad_(True)
    ids, spans, targets = group()
    frozen = attribute_tokens(model_of(GPT2), ids, spans, targets, engine="autograd")
    scores = attribute_tokens(model, ids, spans, targets, engine="autograd")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, scores, frozen))


def test_progress_counts_every_sequence() -> None:
    ids, spans, targets = group()
    model = model_of(GPT2)
    signal = TargetSignal(spans, targets, "dot", torch.device("cpu"))
    sequences = [PackedSequence(i, start) for i, (start, _) in zip(ids, spans, strict=True)]
    counted: list[int] = []
    AutogradEngine(model).run(sequences, signal, None, counted.append)
    assert sum(counted) == 6


def test_a_model_that_reads_more_than_embeddings_is_refused() -> None:
    """Per-layer embeddings and the like look ids up again; from embeddings alone they differ."""
    model = copy.deepcopy(model_of(next(iter(CONFIGS))))
    forward = model.forward

    def with_ids(*args: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        out = forward(*args, input_ids=input_ids, **kwargs)
        if input_ids is not None:
            out.logits = out.logits + 0.5 * input_ids[:, -1:, None]
        return out

    model.forward = with_ids
    ids, spans, targets = group()
    with pytest.raises(UnsupportedModelError, match="more of a token than its input embedding"):
        attribute_tokens(model, ids, spans, targets, engine="autograd")
