"""The reference against stock models, against forward mode, and against hand arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, random_ids, tiny_model, tiny_variant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from g2r_fast.errors import InputError, InputTypeError, UnsupportedModelError
from g2r_fast.reference import (
    ReferenceDecoder,
    aggregate_rewards,
    argmax_verdict,
    attribution,
    central_differences,
    forward_mode_scores,
    input_gradients,
    mean_attribution,
    objective_cotangent,
    objective_value,
    outcome_rewards,
    pullback,
    relative_error,
    response_reward,
    response_score,
    token_advantages,
    token_scores,
)
from g2r_fast.reference.advantages import ESTIMATORS
from g2r_fast.reference.grad2reward import OBJECTIVES, READOUTS, span_positions

TRUE, FALSE = 3, 5
SPAN = (6, 18)
LENGTH = 24
FLOAT32_TOLERANCE = 1e-5  # a whole model in float32 against float64
FLOAT64_TOLERANCE = 1e-10  # two ways of computing the same thing in float64
DIFFERENCES_TOLERANCE = 1e-6  # truncation of the central differences, h = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Models this small lose more to waking a second thread than it computes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stock_scores(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the log-odds at the embeddings, and b, through the stock model's autograd."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
    (grads,) = torch.autograd.grad(logits[TRUE] - logits[FALSE], embeds)
    return grads[slice(*SPAN)], (grads * embeds).detach()[slice(*SPAN)].sum(-1)


def reference_scores(decoder: ReferenceDecoder, ids: Tensor, objective: str = "logp") -> Tensor:
    return token_scores(*input_gradients(decoder, ids, SPAN, TRUE, FALSE, objective))


# --- the comparison rule -------------------------------------------------------------------------


def test_relative_error_is_the_ratio_of_norms() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    # Gradients may be tiny; the rule has no scale of its own.
    tiny = torch.tensor([3e-200, 4e-200], dtype=torch.float64)
    assert relative_error(1.01 * tiny, tiny) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([0.0, 0.0], [0.0, 0.0], "norm zero"),
        ([], [], "norm zero"),
        ([math.nan, 1.0], [1.0, 1.0], "actual .* not finite"),
        ([1.0, 1.0], [1.0, math.inf], "expected .* not finite"),
        ([1.0], [1.0, 1.0], "different shapes"),
    ],
)
def test_relative_error_refuses_what_proves_nothing(
    actual: list[float], expected: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        relative_error(torch.tensor(actual), torch.tensor(expected))


# --- the tiny models hide nothing ----------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_tiny_models_are_not_degenerate(name: str) -> None:
    model = tiny_variant(name, attn_implementation="eager")
    assert not model.training
    for parameter_name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        # No weight is constant: a norm of ones or a bias of zeros could be dropped unseen.
        assert parameter.std() > 0.1 * parameter.abs().max() > 0, parameter_name
    attentions = model(input_ids=random_ids(LENGTH)[None], output_attentions=True).attentions
    for probabilities in attentions:
        last = probabilities[0, :, -1]  # [heads, keys]
        entropy = -torch.special.xlogy(last, last).sum(-1).mean()
        uniform = math.log(int((last[0] > 0).sum()))
        assert 0.15 * uniform < entropy < 0.9 * uniform


def test_tiny_models_depend_on_their_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first = tiny_model("qwen2", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    again, other = tiny_model("qwen2", seed=1), tiny_model("qwen2", seed=2)
    rounded = tiny_model("qwen2", seed=1, dtype=torch.bfloat16)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
        assert torch.equal(weight.bfloat16(), rounded.state_dict()[name])
    # As from_pretrained leaves it: low-precision weights, float32 rotary frequencies.
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


# --- the decoder against the stock model ---------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree_with_the_stock_model(name: str) -> None:
    model, ids = tiny_variant(name), random_ids(LENGTH)
    decoder = ReferenceDecoder.from_model(model)
    embeds = decoder.embed(ids)
    stock = model(input_ids=ids[None], output_hidden_states=True)
    states = decoder.hidden_states(embeds)
    assert len(states) == len(stock.hidden_states)
    for state, expected in zip(states, stock.hidden_states, strict=True):
        assert relative_error(expected[0], state) < FLOAT32_TOLERANCE
    for position in range(LENGTH):
        logits = decoder.logits(embeds, position)
        assert relative_error(stock.logits[0, position], logits) < FLOAT32_TOLERANCE
    every = decoder.logits(embeds, position=None)
    assert every.shape == (LENGTH, 97)
    assert relative_error(every[-1], decoder.logits(embeds)) < 1e-14


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_agree_with_the_stock_model(name: str) -> None:
    # On the log-odds, where stock float32 autograd keeps its digits.
    model, ids = tiny_variant(name), random_ids(LENGTH)
    decoder = ReferenceDecoder.from_model(model)
    stock_grads, stock_b = stock_scores(model, ids)
    grads, embeds = input_gradients(decoder, ids, SPAN, TRUE, FALSE, "logodds")
    assert relative_error(stock_grads, grads) < FLOAT32_TOLERANCE
    assert relative_error(stock_b, token_scores(grads, embeds)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_models_have_a_value_head(family: str) -> None:
    model, ids = tiny_model(family, head="value"), random_ids(LENGTH)
    decoder = ReferenceDecoder.from_model(model)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    value = model(inputs_embeds=embeds[None], use_cache=False).logits[0]
    (stock,) = torch.autograd.grad(value[0], embeds)
    assert relative_error(value, decoder.logits(decoder.embed(ids))) < FLOAT32_TOLERANCE
    grads, _ = pullback(decoder, ids, torch.ones(1))
    assert relative_error(stock, grads) < FLOAT32_TOLERANCE


class RecordDtypes(TorchDispatchMode):
    """Collect the dtype of every floating tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.seen.add(value.dtype)
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2-yarn-rope", "qwen3", "mistral"])
def test_every_operation_runs_in_the_reference_dtype(name: str, dtype: torch.dtype) -> None:
    decoder = ReferenceDecoder.from_model(tiny_variant(name), dtype)
    with RecordDtypes() as record:
        input_gradients(decoder, random_ids(LENGTH), SPAN, TRUE)
    assert record.seen == {dtype}


def test_a_stock_model_in_double_is_not_float64() -> None:
    # Why the reference has a decoder of its own. If this fails, Hugging Face has mended it.
    model, ids = tiny_model("qwen3"), random_ids(LENGTH)
    decoder = ReferenceDecoder.from_model(model)
    expected = decoder.logits(decoder.embed(ids))
    assert relative_error(model.double()(input_ids=ids[None]).logits[0, -1], expected) > 1e-9


def test_rotary_angles_use_the_models_float32_frequencies() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq.mul_(1.01)
    ids = random_ids(LENGTH)
    decoder = ReferenceDecoder.from_model(model)
    stock = model(input_ids=ids[None]).logits[0, -1]
    assert relative_error(stock, decoder.logits(decoder.embed(ids))) < FLOAT32_TOLERANCE


def test_a_reference_keeps_copies() -> None:
    model, ids = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=True), random_ids(8)
    decoder = ReferenceDecoder.from_model(model)
    before = decoder.logits(decoder.embed(ids))
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(decoder.logits(decoder.embed(ids)), before)
    assert decoder.weights["head.weight"] is decoder.weights["embed_tokens.weight"]
    assert not any(weight.requires_grad for weight in decoder.weights.values())


def test_window_mask() -> None:
    decoder = ReferenceDecoder.from_model(tiny_model("mistral", sliding_window=3))
    assert decoder.visible(0, 5, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    upper = ReferenceDecoder.from_model(tiny_variant("qwen2-window-on-upper-layers"))
    assert upper.windows == (None, 5, 5)


def test_nothing_before_a_token_depends_on_it() -> None:
    decoder, ids = ReferenceDecoder.from_model(tiny_model("llama")), random_ids(LENGTH)
    embeds = decoder.embed(ids)
    changed = embeds.clone()
    changed[10] += 1.0
    difference = (decoder.logits(changed, None) - decoder.logits(embeds, None)).abs().amax(-1)
    assert difference[:10].max() == 0 and difference[10:].min() > 0


# --- what the reference does not know ------------------------------------------------------------


def _dynamic_rope() -> Any:
    return tiny_model("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def _long_rope() -> Any:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    more = {"factor": 4.0, "original_max_position_embeddings": 64}
    return tiny_model("llama", rope_scaling={"rope_type": "longrope", **factors, **more})


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11))


def _adapted() -> Any:
    class Adapted(nn.Linear):
        pass

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(32, 32)
    return model


def _own_layer() -> Any:
    model = tiny_model("llama")

    class Ours(type(model.model.layers[0])):  # type: ignore[misc]
        pass

    model.model.layers[1].__class__ = Ours
    return model


def _off_loaded() -> Any:
    model = tiny_model("llama")
    model.model.norm.to("meta")
    return model


@pytest.mark.parametrize(
    ("build", "reasons"),
    [
        (_gpt2, ["model_type 'gpt2' of GPT2LMHeadModel"]),
        (lambda: nn.Linear(2, 2), ["model_type None of Linear"]),
        (lambda: tiny_model("llama").model, ["LlamaModel.model is no decoder"]),
        (_dynamic_rope, ["'dynamic' depend on the sequence length"]),
        (_long_rope, ["'longrope' depend on the sequence length"]),
        (lambda: tiny_model("qwen2", hidden_act="gelu"), ["activation is 'gelu'"]),
        (_adapted, [r"layers.0.self_attn.q_proj is a Adapted.*\(3 such modules"]),
        (_own_layer, ["layer 1 is a Ours"]),
        (_off_loaded, ["meta device"]),
        (
            lambda: tiny_model(
                "llama", hidden_act="relu", rope_scaling={"rope_type": "dynamic", "factor": 2.0}
            ),
            ["'dynamic'", "'relu'"],
        ),
    ],
)
def test_unsupported_models_are_told_every_reason(
    build: Callable[[], Any], reasons: list[str]
) -> None:
    with pytest.raises(UnsupportedModelError, match=".*".join(reasons)) as error:
        ReferenceDecoder.from_model(build())
    assert len(error.value.reasons) == len(reasons)


def test_bad_ids_and_spans() -> None:
    decoder = ReferenceDecoder.from_model(tiny_model("llama"))
    with pytest.raises(InputError, match=r"outside the vocabulary.*got 97.*index 1"):
        decoder.embed([0, 97])
    with pytest.raises(InputError, match=r"got -1.*index 0"):
        decoder.embed([-1])
    with pytest.raises(InputTypeError, match="one sequence"):
        decoder.embed(torch.zeros(1, 4, dtype=torch.int64))
    for span in [(2, 9), (3, 2), (-1, 2), [(0, 3), (2, 4)]]:
        with pytest.raises(InputError, match="does not lie inside"):
            span_positions(span, 8)  # type: ignore[arg-type]
    assert span_positions([(1, 3), (5, 6)], 8).tolist() == [1, 2, 5]
    assert span_positions([(1, 3)], 8).tolist() == span_positions((1, 3), 8).tolist() == [1, 2]


# --- b_t by three roads --------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", VARIANTS)
def test_reverse_mode_equals_forward_mode(name: str, objective: str) -> None:
    decoder, ids = ReferenceDecoder.from_model(tiny_variant(name)), random_ids(LENGTH)
    oracle = forward_mode_scores(decoder, ids, SPAN, TRUE, FALSE, objective)
    assert oracle.shape == (SPAN[1] - SPAN[0],)
    assert relative_error(reference_scores(decoder, ids, objective), oracle) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-yarn-rope", "qwen3-tied", "mistral"])
def test_reverse_mode_equals_central_differences(name: str, objective: str) -> None:
    decoder, ids = ReferenceDecoder.from_model(tiny_variant(name)), random_ids(LENGTH)
    differences = central_differences(decoder, ids, SPAN, TRUE, FALSE, objective)
    actual = reference_scores(decoder, ids, objective)
    assert relative_error(actual, differences) < DIFFERENCES_TOLERANCE


def test_several_spans_are_read_in_order() -> None:
    decoder, ids = ReferenceDecoder.from_model(tiny_model("qwen3")), random_ids(LENGTH)
    whole = reference_scores(decoder, ids)
    spans = [(SPAN[0], 9), (12, SPAN[1])]
    parts = token_scores(*input_gradients(decoder, ids, spans, TRUE))
    assert torch.equal(parts, torch.cat((whole[:3], whole[6:])))
    oracle = forward_mode_scores(decoder, ids, spans, TRUE)
    assert relative_error(parts, oracle) < FLOAT64_TOLERANCE
    assert forward_mode_scores(decoder, ids, (4, 4), TRUE).shape == (0,)
    assert central_differences(decoder, ids, (4, 4), TRUE).shape == (0,)


def test_central_differences_need_float64() -> None:
    decoder = ReferenceDecoder.from_model(tiny_model("llama"), torch.float32)
    with pytest.raises(InputError, match="rounding"):
        central_differences(decoder, random_ids(LENGTH), SPAN, TRUE)


@pytest.mark.parametrize("name", ["qwen2-window-on-upper-layers", "qwen3"])
def test_gradcheck_of_the_decoder(name: str) -> None:
    small = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": 7, "num_hidden_layers": 2}
    decoder = ReferenceDecoder.from_model(tiny_variant(name, **small))
    embeds = decoder.embed(random_ids(6, vocab_size=7)).requires_grad_()
    assert torch.autograd.gradcheck(decoder.logits, (embeds,), check_forward_ad=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck_of_the_objectives(objective: str) -> None:
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(logits: Tensor) -> Tensor:
        return objective_value(logits, TRUE, FALSE, objective)

    assert torch.autograd.gradcheck(value, (logits.requires_grad_(),), check_forward_ad=True)


# --- objectives ----------------------------------------------------------------------------------


def test_objectives_by_hand() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).log_softmax(0) + 5.0
    total = math.exp(2) + math.exp(1) + 1.0
    expected = {
        "logp": math.log(math.exp(1) / total),
        "logp_two_way": math.log(math.exp(1) / (math.exp(1) + 1.0)),
        "logodds": 1.0,
    }
    cotangents = {
        "logp": [-math.exp(2) / total, (math.exp(2) + 1.0) / total, -1.0 / total],
        "logp_two_way": [0.0, 1 / (1 + math.e), -1 / (1 + math.e)],
        "logodds": [0.0, 1.0, -1.0],
    }
    for objective in OBJECTIVES:
        value = objective_value(logits, 1, 2, objective)
        assert float(value) == pytest.approx(expected[objective], rel=1e-14)
        cotangent = objective_cotangent(logits, 1, 2, objective)
        assert cotangent.tolist() == pytest.approx(cotangents[objective], rel=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("margin", [-300.0, -30.0, 0.0, 5.0, 17.0, 30.0, 300.0])
def test_cotangent_is_the_derivative_however_sure_the_judge(margin: float, objective: str) -> None:
    logits = torch.tensor([0.5, -1.0, margin, 0.0], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(objective_value(logits, 2, 3, objective), logits)
    cotangent = objective_cotangent(logits.detach(), 2, 3, objective)
    # The exponential turns the rounding of a margin of 300 into 300 roundings.
    assert relative_error(cotangent, derivative) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_saturated_judge_keeps_its_digits(dtype: torch.dtype) -> None:
    # 1 - p = 2e-16 here: as 1 - p it is 0 in float32 and has one digit in float64.
    logits = torch.tensor([36.0, 0.0, -1.0], dtype=dtype)
    rest = math.exp(-36.0) * (1.0 + math.exp(-1.0))
    expected = [rest, -math.exp(-36.0), -math.exp(-37.0)]
    unit = torch.finfo(dtype).eps
    assert objective_cotangent(logits, 0).tolist() == pytest.approx(expected, rel=8 * unit)
    one_minus_p = 1.0 - logits.softmax(0)[0]
    assert abs(float(one_minus_p) / rest - 1.0) > 0.1


def test_objectives_refuse_bad_arguments() -> None:
    logits = torch.zeros(4)
    with pytest.raises(InputError, match="unknown objective"):
        objective_value(logits, 0, 1, "logit")
    with pytest.raises(InputError, match="needs the id of the other"):
        objective_cotangent(logits, 0, None, "logodds")
    with pytest.raises(InputError, match="target_id is outside"):
        objective_value(logits, 4)
    with pytest.raises(InputError, match="other_id is outside"):
        objective_value(logits, 0, -1, "logodds")


def test_a_tie_is_false() -> None:
    assert argmax_verdict(torch.tensor([1.0, 2.0]), 1, 0)
    assert not argmax_verdict(torch.tensor([1.0, 2.0]), 0, 1)
    assert not argmax_verdict(torch.tensor([2.0, 2.0]), 0, 1)


# --- read-outs, attribution, rewards -------------------------------------------------------------


def test_readouts_by_hand() -> None:
    grads = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    embeds = torch.tensor([[1.0, 2.0], [5.0, 6.0]], dtype=torch.float64)
    expected = {"dot": [-5.0, 0.0], "l1": [7.0, 0.0], "l2": [5.0, 0.0], "uniform": [0.0, 0.0]}
    for readout in READOUTS:
        assert token_scores(grads, embeds, readout).tolist() == expected[readout]
    with pytest.raises(InputError, match="unknown readout"):
        token_scores(grads, embeds, "linf")


def test_attribution_by_hand() -> None:
    b = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    assert attribution(b).tolist() == pytest.approx([0.25, 0.75])
    assert attribution(b, 0.5).tolist() == pytest.approx([0.1, 0.9])
    # Standardised, two different scores are always ±1 apart from their mean, whatever their scale.
    for scale in (1.0, 1e-9, -1e9):
        low, high = 1 / (1 + math.e**2), 1 / (1 + math.e**-2)
        pair = [low, high] if scale > 0 else [high, low]
        assert attribution(scale * b, "auto").tolist() == pytest.approx(pair)
        low, high = 1 / (1 + math.e**4), 1 / (1 + math.e**-4)
        pair = [low, high] if scale > 0 else [high, low]
        assert attribution(scale * b, ("auto", 0.5)).tolist() == pytest.approx(pair)


def test_attribution_without_spread_is_uniform() -> None:
    for scores in ([0.0, 0.0], [7.0, 7.0], [1.0, 1.0 + 1e-7]):
        alpha = attribution(torch.tensor(scores, dtype=torch.float64), "auto")
        assert alpha.tolist() == [0.5, 0.5]
    barely = attribution(torch.tensor([1.0, 1.0 + 1e-5], dtype=torch.float64), "auto")
    assert barely[1] > 0.8
    assert attribution(torch.zeros(1), "auto").tolist() == [1.0]
    assert attribution(torch.zeros(0), "auto").shape == attribution(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan, "Auto", ("auto", 0.0), ("x", 1.0)])
def test_attribution_refuses_other_temperatures(tau: Any) -> None:
    with pytest.raises(InputError, match="tau cannot be used"):
        attribution(torch.zeros(3), tau)


def test_rubric_by_hand() -> None:
    alphas = [
        torch.tensor([0.5, 0.5]),
        None,
        torch.tensor([0.25, 0.75]),
    ]
    verdicts, weights = [True, False, True], [3.0, 5.0, -4.0]
    # 3 earned, 5 missed, 4 lost, of 8 possible.
    assert response_score(verdicts, weights) == -1 / 8
    rewards = aggregate_rewards(alphas, verdicts, weights, 2)
    assert rewards.tolist() == [(1.5 - 1.0) / 8, (1.5 - 3.0) / 8]
    assert float(rewards.sum()) == response_score(verdicts, weights)
    bar = mean_attribution(alphas, verdicts, weights, 2)
    assert bar.tolist() == pytest.approx([(1.5 + 1.0) / 7, (1.5 + 3.0) / 7])
    assert mean_attribution([None], [False], [1.0], 4).tolist() == [0.25] * 4
    # Nothing to win: no reward, not a division by zero.
    assert response_score([True], [-2.0]) == 0.0
    assert aggregate_rewards([torch.ones(1)], [True], [-2.0], 1).tolist() == [0.0]
    with pytest.raises(InputError, match="no attribution"):
        aggregate_rewards([None], [True], [1.0], 1)


def test_outcome_rewards_by_hand() -> None:
    alpha = torch.tensor([0.25, 0.75])
    assert outcome_rewards(alpha, -2.0).tolist() == [-0.5, -3.5]  # literally: they add up to 2 V
    assert outcome_rewards(alpha, -2.0, add_value=False).tolist() == [-0.5, -1.5]
    assert outcome_rewards(torch.zeros(0), 1.0).shape == (0,)


def items(count: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """K judge inputs that share prompt and response and end in different items."""
    shared = random_ids(SPAN[1])
    return [torch.cat((shared, random_ids(4 + k, seed=9 + k))) for k in range(count)], [
        SPAN
    ] * count


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("tau", [1.0, 0.01, "auto", ("auto", 0.5)])
def test_token_rewards_add_up_to_the_score(readout: str, tau: Any) -> None:
    decoder = ReferenceDecoder.from_model(tiny_model("qwen2"))
    ids, spans = items(4)
    weights, verdicts = [3.0, 1.0, -2.5, 0.5], [True, False, True, True]
    reward = response_reward(
        decoder, ids, spans, weights, TRUE, FALSE, tau=tau, readout=readout, verdicts=verdicts
    )
    assert reward.score == (3.0 - 2.5 + 0.5) / 4.5
    assert float(reward.token_rewards.sum()) == pytest.approx(reward.score, rel=1e-12)
    assert reward.token_rewards.shape == (SPAN[1] - SPAN[0],)
    assert [alpha is None for alpha in reward.attributions] == [False, True, False, False]
    spread = float(reward.token_rewards.std())
    assert spread < 1e-15 if readout == "uniform" else spread > 1e-6


def test_response_reward_is_its_equations_put_together() -> None:
    decoder = ReferenceDecoder.from_model(tiny_model("llama"))
    ids, spans = items(3)
    # The verdict words that make the argmax differ between the items.
    logits = [decoder.logits(decoder.embed(one)) for one in ids]
    true_id, false_id = next(
        (a, b)
        for a in range(97)
        for b in range(97)
        if [bool(one[a] > one[b]) for one in logits] == [True, False, True]
    )
    weights = [2.0, 1.0, 1.0]
    reward = response_reward(
        decoder, ids, spans, weights, true_id, false_id, objective="logodds", tau=0.1
    )
    assert reward.verdicts == [True, False, True]
    for k in range(3):
        logp = float(logits[k].log_softmax(0)[true_id])
        assert reward.verdict_logps[k] == pytest.approx(logp, rel=1e-12)
    expected = torch.zeros(SPAN[1] - SPAN[0], dtype=torch.float64)
    for k in (0, 2):
        b = forward_mode_scores(decoder, ids[k], SPAN, true_id, false_id, "logodds")
        expected += weights[k] / 4.0 * (b / 0.1).softmax(0)
    assert relative_error(reward.token_rewards, expected) < FLOAT64_TOLERANCE
    with pytest.raises(InputError, match="one entry per rubric item"):
        response_reward(decoder, ids, spans, weights[:2], true_id, false_id)


# --- advantages ----------------------------------------------------------------------------------

REWARDS = [torch.tensor([1.0, 3.0]), torch.tensor([2.0])]


@pytest.mark.parametrize(
    ("estimator", "centred"),
    [
        # Returns (4, 3 | 2): mean 3, std √(2/3).
        ("returns_pooled", [[1.0, 0.0], [-1.0]]),
        # Rewards (1, 3 | 2): mean 2, std √(2/3).
        ("rewards_pooled", [[-1.0, 1.0], [0.0]]),
        ("normalise_then_cumsum", [[0.0, 1.0], [0.0]]),
    ],
)
def test_pooled_estimators_by_hand(estimator: str, centred: list[list[float]]) -> None:
    std = math.sqrt(2 / 3)
    plain = token_advantages(REWARDS, 2, estimator, divide_by_std=False)
    divided = token_advantages(REWARDS, 2, estimator)
    assert plain is not None and divided is not None
    for row, expected in zip(plain, centred, strict=True):
        assert row.tolist() == pytest.approx(expected)
    for row, expected in zip(divided, centred, strict=True):
        assert row.tolist() == pytest.approx([value / std for value in expected])


def test_scaled_sequence_by_hand() -> None:
    alphas = [torch.tensor([0.25, 0.75]), torch.tensor([1.0])]
    scores = [1.0, 5.0]
    plain = token_advantages(REWARDS, 2, "scaled_sequence", False, scores, alphas)
    divided = token_advantages(REWARDS, 2, "scaled_sequence", True, torch.tensor(scores), alphas)
    assert plain is not None and divided is not None
    assert [row.tolist() for row in plain] == [[-2 * 2 * 0.25, -2 * 2 * 0.75], [2.0]]
    assert [row.tolist() for row in divided] == [[-2 * 0.25, -2 * 0.75], [1.0]]
    # A token-mean of the advantages gives the sequence's advantage back.
    assert divided[0].mean() == -1.0


@pytest.mark.parametrize("T", [2, 7, 100])
def test_returns_have_a_position_bias(T: int) -> None:
    # Equal rewards, equal lengths, uniform attributions: nothing distinguishes the tokens, and yet.
    rewards = [torch.full((T,), 0.3 / T, dtype=torch.float64)] * 4
    bound = math.sqrt(3 * (T - 1) / (T + 1))
    for sign in (1.0, -1.0):
        advantages = token_advantages([sign * row for row in rewards], 4)
        assert advantages is not None
        for row in advantages:
            assert float(row[0]) == pytest.approx(sign * bound)
            assert float(row[-1]) == pytest.approx(-sign * bound)
            steps = row.diff()
            assert relative_error(steps, torch.full_like(steps, -sign * 2 * bound / (T - 1))) < 1e-9
    # The other estimators have none.
    scores, alphas = [0.3] * 4, [torch.full((T,), 1 / T)] * 4
    for estimator in ESTIMATORS[1:]:
        flat = token_advantages(rewards, 4, estimator, True, scores, alphas)
        assert flat is not None and all(not row.any() for row in flat)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_advantages_without_spread_are_zero(estimator: str, divide_by_std: bool) -> None:
    # One token a response, so that the returns have no spread either; and rounding is no spread.
    rewards = [torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.7 * (1 + 1e-9)]).double()]
    alphas = [torch.ones(1), torch.ones(1)]
    scores = [0.7, 0.7 * (1 + 1e-9)]
    flat = token_advantages(rewards, 2, estimator, divide_by_std, scores, alphas)
    assert flat is not None and [row.tolist() for row in flat] == [[0.0], [0.0]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_are_separate_and_may_be_empty(estimator: str) -> None:
    rewards = [*REWARDS, torch.zeros(0), torch.tensor([5.0, 1.0, 1.0])]
    scores = [float(row.sum()) for row in rewards]
    alphas = [row.abs() / row.abs().sum() for row in rewards]
    both = token_advantages(rewards, 2, estimator, True, scores, alphas)
    first = token_advantages(rewards[:2], 2, estimator, True, scores[:2], alphas[:2])
    assert both is not None and first is not None
    assert all(torch.equal(a, b) for a, b in zip(both[:2], first, strict=True))
    assert [len(row) for row in both] == [2, 1, 0, 3]
    assert all(row.dtype == torch.float64 and row.isfinite().all() for row in both)
    assert token_advantages(rewards, 1, estimator, True, scores, alphas) is None
    nothing = token_advantages([torch.zeros(0)] * 2, 2, estimator, True, [0.0] * 2, alphas[2:3] * 2)
    assert nothing is not None and [row.shape for row in nothing] == [(0,), (0,)]


def test_advantages_refuse_bad_arguments() -> None:
    with pytest.raises(InputError, match="unknown advantage estimator"):
        token_advantages(REWARDS, 2, "gae")
    with pytest.raises(InputError, match=r"divide into groups.*2 rows, group_size 3"):
        token_advantages(REWARDS, 3)
    with pytest.raises(InputError, match=r"not finite.*nan.*index \(1, 0\)"):
        token_advantages([REWARDS[0], torch.tensor([math.nan])], 2)
    with pytest.raises(InputError, match="needs scores"):
        token_advantages(REWARDS, 2, "scaled_sequence")
    with pytest.raises(InputError, match="do not match"):
        token_advantages(REWARDS, 2, "scaled_sequence", True, [1.0, 2.0], REWARDS[::-1])
    with pytest.raises(InputError, match="do not match"):
        token_advantages(REWARDS, 2, "scaled_sequence", True, [1.0], REWARDS)


# --- planted bugs: a rule that lets one through fails --------------------------------------------


def with_weight(
    suffix: str, change: Callable[[Tensor], Tensor | None]
) -> Callable[[ReferenceDecoder], ReferenceDecoder]:
    """Change one weight of the middle layer (or of the model); None drops it."""

    def plant(decoder: ReferenceDecoder) -> ReferenceDecoder:
        name = suffix if suffix in decoder.weights else f"layers.1.{suffix}"
        weights = dict(decoder.weights)
        changed = change(weights.pop(name).clone())
        if changed is not None:
            weights[name] = changed
        return dataclasses.replace(decoder, weights=weights)

    return plant


def with_field(**fields: Any) -> Callable[[ReferenceDecoder], ReferenceDecoder]:
    return lambda decoder: dataclasses.replace(decoder, **fields)


def drop_last_column(weight: Tensor) -> Tensor:
    weight[:, -1] = 0.0
    return weight


def swap_rows(weight: Tensor) -> Tensor:
    # TRUE's row among them: the log-odds read only two rows of the head.
    weight[[TRUE, 0]] = weight[[0, TRUE]]
    return weight


class LateTokensShifted(ReferenceDecoder):
    """Positions off by one from token 15 on, as when a segment starts at the wrong place."""

    def rotate(self, x: Tensor) -> Tensor:
        padded = torch.cat((x[:15], x[:1], x[15:]))
        rotated = super().rotate(padded)
        return torch.cat((rotated[:15], rotated[16:]))


class InterleavedHeads(ReferenceDecoder):
    """Query head h reads key/value head h % num_kv_heads."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = super().linear(x, name)
        if name.endswith("q_proj"):
            order = torch.arange(self.num_heads).reshape(self.num_kv_heads, -1).T.flatten()
            out = out.reshape(len(x), self.num_heads, -1)[:, order].flatten(1)
        return out


def as_class(kind: type[ReferenceDecoder]) -> Callable[[ReferenceDecoder], ReferenceDecoder]:
    return lambda decoder: kind(**{f.name: getattr(decoder, f.name) for f in _fields})


_fields = dataclasses.fields(ReferenceDecoder)

BIASES = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLANTED_IN_MODEL: dict[str, tuple[str, Callable[[ReferenceDecoder], ReferenceDecoder]]] = {
    **{
        f"no {name} bias": ("llama-biases", with_weight(f"self_attn.{name}.bias", lambda w: None))
        for name in BIASES
    },
    **{
        f"no {name} bias": ("llama-biases", with_weight(f"mlp.{name}.bias", lambda w: None))
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    **{
        f"no {name} weight": ("qwen3", with_weight(f"{name}.weight", torch.ones_like))
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "norm",
        )
    },
    "no epsilon": ("llama", with_field(norm_eps=0.0)),
    "last column dropped": ("llama", with_weight("mlp.down_proj.weight", drop_last_column)),
    "last column of the head dropped": ("llama", with_weight("head.weight", drop_last_column)),
    "1 % scale": ("llama", with_weight("self_attn.v_proj.weight", lambda w: 1.01 * w)),
    "0.1 % scale": ("llama", with_weight("self_attn.v_proj.weight", lambda w: 1.001 * w)),
    "rows swapped": ("llama", with_weight("mlp.gate_proj.weight", swap_rows)),
    "rows of a tied head swapped": ("qwen2-tied", with_weight("head.weight", swap_rows)),
    "all zeros": ("llama", with_weight("self_attn.o_proj.weight", torch.zeros_like)),
    "positions off by one": ("llama", as_class(LateTokensShifted)),
    "key heads interleaved": ("llama", as_class(InterleavedHeads)),
    "no window": ("mistral", with_field(windows=(None, None, None))),
    "no window in one layer": ("mistral", with_field(windows=(7, None, 7))),
    "window off by one": ("mistral", with_field(windows=(8, 8, 8))),
    "window in every layer": ("qwen2-window-on-upper-layers", with_field(windows=(5, 5, 5))),
    "no yarn factor": ("qwen2-yarn-rope", with_field(rope_scaling=1.0)),
}


@pytest.mark.parametrize("bug", PLANTED_IN_MODEL)
def test_planted_bugs_in_the_model_are_caught(bug: str) -> None:
    name, plant = PLANTED_IN_MODEL[bug]
    model, ids = tiny_variant(name), random_ids(LENGTH)
    decoder = ReferenceDecoder.from_model(model)
    broken = plant(decoder)
    # Twice the tolerance: the rule must catch the bug with room to spare.
    stock = model(input_ids=ids[None]).logits[0]
    assert relative_error(stock, broken.logits(broken.embed(ids), None)) > 2 * FLOAT32_TOLERANCE
    _, stock_b = stock_scores(model, ids)
    assert relative_error(stock_b, reference_scores(decoder, ids, "logodds")) < FLOAT32_TOLERANCE
    assert relative_error(stock_b, reference_scores(broken, ids, "logodds")) > 2 * FLOAT32_TOLERANCE


PLANTED_IN_READOUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last column dropped": lambda g, e: (g * e)[:, :-1].sum(-1),
    "1 % scale": lambda g, e: 1.01 * (g * e).sum(-1),
    "0.1 % scale": lambda g, e: 1.001 * (g * e).sum(-1),
    "rows swapped": lambda g, e: (g * e).sum(-1)[[1, 0, *range(2, len(g))]],
    "all zeros": lambda g, e: torch.zeros(len(g)),
    "off by one": lambda g, e: (g * e).sum(-1).roll(1),
    "embedding of the next token": lambda g, e: (g * e.roll(-1, dims=0)).sum(-1),
    "sign lost": lambda g, e: (g * e).sum(-1).abs(),
}


@pytest.mark.parametrize("bug", PLANTED_IN_READOUT)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_bugs_in_the_readout_are_caught(family: str, bug: str) -> None:
    decoder, ids = ReferenceDecoder.from_model(tiny_model(family)), random_ids(LENGTH)
    oracle = forward_mode_scores(decoder, ids, SPAN, TRUE)
    grads, embeds = input_gradients(decoder, ids, SPAN, TRUE)
    # At the scale of real embeddings and gradients an absolute tolerance would let these pass.
    for scale in (1.0, 1e-6):
        broken = PLANTED_IN_READOUT[bug](scale * grads, embeds)
        assert relative_error(broken, scale * oracle) > 2 * FLOAT32_TOLERANCE
        right = (scale * grads * embeds).sum(-1)
        assert relative_error(right, scale * oracle) < FLOAT64_TOLERANCE


def test_the_verdict_read_one_position_early_is_caught() -> None:
    decoder, ids = ReferenceDecoder.from_model(tiny_model("llama")), random_ids(LENGTH)
    oracle = forward_mode_scores(decoder, ids, SPAN, TRUE)
    early = forward_mode_scores(decoder, ids[:-1], SPAN, TRUE)
    assert relative_error(early, oracle) > 2 * FLOAT32_TOLERANCE
