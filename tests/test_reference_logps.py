"""reference_logps against the stock model, one row at a time and never padded."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_variant
from tiny_tokenizers import CHATML_THINKING, INST, byte_bpe, unigram
from torch import Tensor

import g2r_fast.decoder
import g2r_fast.eager.rows
from g2r_fast import (
    AttributionBatch,
    AttributionConfig,
    Judge,
    RewardModel,
    Rubric,
    attribute_batch,
)
from g2r_fast.errors import InputError
from g2r_fast.reference import ReferenceDecoder

NATS = 1e-5  # of log-probabilities down to about -20 nats, in float32
ITEMS = [Rubric("is kind", 2.0), Rubric("see a doctor", 3.0)]
SHARP = AttributionConfig(tau=0.05)


@cache
def judge_of(variant: str = "qwen3", dtype: torch.dtype = torch.float32, **options: Any) -> Judge:
    tokenizer = byte_bpe()
    model = tiny_variant(
        variant, dtype=dtype, vocab_size=len(tokenizer), max_position_embeddings=512, seed=5
    )
    return Judge(model, tokenizer, scaffold="continuation", **options)


def ids_of(*tokens: str) -> list[int]:
    return list(byte_bpe().convert_tokens_to_ids(list(tokens)))


START, END, OTHER_END, THINK = ids_of("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>")


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Ordinary ids: control ids have tests of their own."""
    generator = torch.Generator().manual_seed(seed)
    control = set(judge_of().encode_untrusted.control_ids)
    ordinary = [i for i in range(len(byte_bpe())) if i not in control]
    return [
        [ordinary[i] for i in torch.randint(len(ordinary), (n,), generator=generator).tolist()]
        for n in lengths
    ]


def stock_logps(
    judge: Judge, prompt: list[int], response: list[int], temperature: float = 1.0
) -> Tensor:
    """`log_softmax(logits / temperature)[token]`, from the stock model's own forward."""
    with torch.no_grad():
        logits = judge.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    logps = (logits.double() / temperature).log_softmax(-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logps[at, torch.tensor(response, dtype=torch.long)]


def run(judge: Judge, prompts: Any, responses: Any, **options: Any) -> AttributionBatch:
    n = len(prompts)
    options = {"group_size": 1, "reference_logps": True, "attribution": SHARP, **options}
    options.setdefault("verdict", [[True, True]] * n)
    return attribute_batch(judge, prompts, responses, [ITEMS] * n, **options)


def assert_stock(
    out: AttributionBatch, judge: Judge, prompts: Any, responses: Any, temperature: float = 1.0
) -> None:
    assert out.reference_logps is not None and len(out.reference_logps) == len(prompts)
    rows = zip(out.reference_logps, prompts, responses, strict=True)
    for row, (logps, prompt, response) in enumerate(rows):
        assert logps.dtype == torch.float32 and logps.shape == (len(response),)
        assert not logps.requires_grad and logps.device == judge.device
        wanted = stock_logps(judge, prompt, response, temperature)
        assert len(response) < 9 or float(wanted.std()) > 0.3  # a shift would show
        error = (logps.double() - wanted).abs()
        assert float(error.max() if len(error) else 0.0) <= NATS, row


LENGTHS = (0, 1, 2, 17, 40)
TIED = ("llama-tied", "qwen2-tied", "mistral-tied")
VARIANTS = (*FAMILIES, *TIED, "qwen2-window-on-upper-layers", "llama-llama3-rope")


@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_engine_and_length(variant: str, temperature: float, engine: str) -> None:
    judge = judge_of(variant)
    prompts, responses = random_rows(9, 9, 1, 4, 12), random_rows(*LENGTHS, seed=1)
    out = run(judge, prompts, responses, engine=engine, reference_temperature=temperature)
    assert out.stats["engine"] == engine
    assert_stock(out, judge, prompts, responses, temperature)


@pytest.mark.parametrize("variant", FAMILIES)
def test_float64_to_the_rounding_of_float32(variant: str) -> None:
    judge = judge_of(variant, torch.float64)
    prompts, responses = random_rows(9, 4), random_rows(17, 30, seed=1)
    out = run(judge, prompts, responses, reference_temperature=0.7)
    assert out.reference_logps is not None
    decoder = ReferenceDecoder.from_model(judge.model)
    for logps, prompt, response in zip(out.reference_logps, prompts, responses, strict=True):
        logits = decoder.logits(decoder.embed([*prompt, *response]), None)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        wanted = (logits / 0.7).log_softmax(-1)[at, torch.tensor(response)]
        assert torch.allclose(logps.double(), wanted, rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_control_ids_are_those_that_were_sampled(engine: str) -> None:
    judge = judge_of()
    a, b = random_rows(5, 6)
    responses = [
        [*a, START, *b, END, *a, END],
        [END],
        [END, END],
        [START],
        [*a, THINK, *b],
        [*a, OTHER_END],
        [OTHER_END, *a, END, START],
        [*a, END],
    ]
    prompts = random_rows(7) * len(responses)
    out = run(judge, prompts, responses, engine=engine)
    assert out.stats["counts"]["respelled_control_ids"] > 4
    assert_stock(out, judge, prompts, responses)


@pytest.mark.parametrize("template", [None, INST])
def test_an_end_of_turn_that_the_judge_does_not_read(template: str | None) -> None:
    tokenizer = unigram(template)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, seed=5)
    judge = Judge(model, tokenizer, scaffold="continuation")
    responses = [[20, 30, 2], [2], [20, 2, 2]]
    prompts = [[1, 9, 8, 7]] * 3
    assert not judge.encode_response(responses[0]).keeps_end
    out = run(judge, prompts, responses)
    assert_stock(out, judge, prompts, responses)
    assert float(out.token_rewards[0][-1]) == 0.0


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_spans_leave_the_rollout_as_it_was(engine: str) -> None:
    judge = judge_of()
    a, b, c = random_rows(5, 6, 4)
    response = [*a, END, START, *b, END, START, THINK, *c, END]
    spans = [(0, 6), (13, len(response))]
    out = run(judge, random_rows(7), [response], spans=[spans], engine=engine)
    assert_stock(out, judge, random_rows(7), [response])
    without = run(judge, random_rows(7), [response], spans=[[]], engine=engine)
    assert_stock(without, judge, random_rows(7), [response])


def test_duplicates_order_and_company() -> None:
    judge = judge_of("mistral")
    prompts = [p for p in random_rows(9, 4) for _ in range(4)]
    a, b, c = random_rows(30, 12, 1, seed=1)
    responses = [a, a, [*a[:20], *b], b, a, b, c, []]
    whole = run(judge, prompts, responses)
    assert_stock(whole, judge, prompts, responses)
    assert whole.reference_logps is not None
    assert torch.equal(whole.reference_logps[0], whole.reference_logps[1])
    order = [5, 0, 7, 3, 6, 1, 4, 2]
    mixed = run(judge, [prompts[i] for i in order], [responses[i] for i in order])
    assert mixed.reference_logps is not None
    for at, i in enumerate(order):
        alone = run(judge, [prompts[i]], [responses[i]])
        assert alone.reference_logps is not None
        for found in (mixed.reference_logps[at], alone.reference_logps[0]):
            assert torch.allclose(found, whole.reference_logps[i], rtol=0.0, atol=NATS)


@pytest.mark.parametrize("max_tokens", [180, 260])
@pytest.mark.parametrize("elements", [1, 387 * 3, 387 * 16, 2**25])
def test_micro_batches_and_chunks(
    max_tokens: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(g2r_fast.decoder._LOGIT_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(g2r_fast.eager.rows, "_STRETCH_ELEMENTS", elements)
    judge = judge_of("llama-tied")
    prompts = [p for p in random_rows(9, 4) for _ in range(2)]
    responses = [*random_rows(17, 40, 1, seed=1), [5, END, 6]]
    out = run(judge, prompts, responses, max_tokens=max_tokens)
    assert out.stats["micro_batches"] > 1
    assert_stock(out, judge, prompts, responses)
    whole = run(judge, prompts, responses)
    for a, b in zip(out.token_rewards, whole.token_rewards, strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(b.norm())


@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_as_text_and_messages(thinking: bool) -> None:
    tokenizer = byte_bpe(CHATML_THINKING) if thinking else byte_bpe()
    model = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=512, seed=5)
    judge = Judge(model, tokenizer, scaffold="continuation")
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "is it a cough?"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
    alone = tokenizer.apply_chat_template(talk[1:], add_generation_prompt=True, return_dict=True)
    prompts: list[Any] = [talk, "is it a cough?"]
    contexts = [ids["input_ids"], alone["input_ids"]]
    responses = [*random_rows(12), "see a doctor"]
    out = run(judge, prompts, responses)
    assert_stock(out, judge, contexts, [responses[0], judge.encode_untrusted("see a doctor")])


def test_text_around_a_judge_without_a_template() -> None:
    tokenizer = byte_bpe(None)
    model = tiny_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=512, seed=5)
    judge = Judge(model, tokenizer, scaffold="continuation")
    out = run(judge, ["is it a cough?"], ["see a doctor"])
    wanted = [tokenizer.encode(t) for t in ("is it a cough?", "see a doctor")]
    assert_stock(out, judge, wanted[:1], wanted[1:])


# --- what it costs, and what it leaves alone -----------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_asking_changes_nothing_else(engine: str) -> None:
    judge = judge_of()
    prompts = [p for p in random_rows(9, 4) for _ in range(2)]
    responses = [*random_rows(17, 30, seed=1), [5, START, 6, END], []]
    options: dict[str, Any] = {"engine": engine, "group_size": 2, "keep_attributions": True}
    asked = run(judge, prompts, responses, **options)
    plain = run(judge, prompts, responses, reference_logps=False, **options)
    assert plain.reference_logps is None
    assert asked.verdicts == plain.verdicts and asked.tokens == plain.tokens
    assert torch.equal(asked.scores, plain.scores)
    assert asked.stats["rows_backward"] == plain.stats["rows_backward"]
    assert asked.stats["counts"] == plain.stats["counts"]
    for a, b in zip(
        itertools.chain.from_iterable(asked.verdict_logps),
        itertools.chain.from_iterable(plain.verdict_logps),
        strict=True,
    ):
        assert a == pytest.approx(b, rel=1e-6)
    assert asked.token_advantages is not None and plain.token_advantages is not None
    assert asked.attributions is not None and plain.attributions is not None
    for a, b in [
        *zip(asked.token_rewards, plain.token_rewards, strict=True),
        *zip(asked.token_advantages, plain.token_advantages, strict=True),
        *((x[0], y[0]) for x, y in zip(asked.attributions, plain.attributions, strict=True)),
    ]:
        assert a is not None and b is not None
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_no_forward_row_more() -> None:
    judge = judge_of()
    prompts = [p for p in random_rows(9, 4) for _ in range(3)]
    responses = [*random_rows(17, 30, 1, seed=1), [*random_rows(8)[0], END], [], [5, OTHER_END]]
    asked, plain = (
        run(judge, prompts, responses, reference_logps=wanted) for wanted in (True, False)
    )
    assert asked.stats["rows_forward"] == plain.stats["rows_forward"]
    # A control id that is spelled out parts the two: what follows it is computed for both.
    parted = [[5, 6, START, 7, 8, 9]]
    asked, plain = (
        run(judge, prompts[:1], parted, reference_logps=wanted) for wanted in (True, False)
    )
    assert asked.stats["rows_forward"] == plain.stats["rows_forward"] + 3  # START, 7, 8


def test_saved_padded_and_moved(tmp_path: Path) -> None:
    judge = judge_of()
    responses = random_rows(17, 3, 0, seed=1)
    out = run(judge, random_rows(9) * 3, responses)
    assert out.reference_logps is not None
    out.save(tmp_path / "batch")
    loaded = AttributionBatch.load(tmp_path / "batch")
    assert loaded.reference_logps is not None
    for a, b in zip(loaded.reference_logps, out.reference_logps, strict=True):
        assert torch.equal(a, b)
    for side in ("right", "left"):
        values, mask = out.padded("reference_logps", 20, side=side)
        assert values.shape == mask.shape == (3, 20)
        assert mask.sum(1).tolist() == [17, 3, 0]
        for row, logps in enumerate(out.reference_logps):
            assert torch.equal(values[row][mask[row].bool()], logps)
    moved = out.to("cpu").reference_logps
    assert moved is not None and len(moved) == 3


# --- what is refused -----------------------------------------------------------------------------


def test_what_continues_nothing_has_no_reference() -> None:
    grader = Judge(judge_of().model, byte_bpe())
    with pytest.raises(InputError, match=r"scaffold='continuation'; got scaffold='grader'"):
        run(grader, ["a"], ["b"])
    values = tiny_model("qwen2", vocab_size=len(byte_bpe()), head="value")
    with pytest.raises(InputError, match=r"a Judge with scaffold=.*; got a RewardModel"):
        attribute_batch(RewardModel(values, byte_bpe()), ["a"], ["b"], None, 1,
                        reference_logps=True)  # fmt: skip


def test_an_empty_context_is_refused() -> None:
    for prompt in ([], torch.tensor([], dtype=torch.long)):
        with pytest.raises(InputError, match=r"expected a prompt of at least one.*row 1"):
            run(judge_of(), [[5], prompt], [[6], [7]])
    run(judge_of(), [[]], [[7]], reference_logps=False)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_divide_nothing(temperature: float) -> None:
    with pytest.raises(InputError, match="reference_temperature"):
        run(judge_of(), [[5]], [[6]], reference_temperature=temperature)


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_logits_that_are_not_finite_name_their_row(engine: str) -> None:
    tokenizer = byte_bpe()
    model = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=512, seed=5)
    # Only the rollout holds this id: the judgement reads it spelled out.
    judge = Judge(model, tokenizer, scaffold="continuation")
    model.model.embed_tokens.weight[START] = torch.nan
    with pytest.raises(InputError, match=r"logits are not finite.*row 1, reference"):
        run(judge, [[5, 6]] * 2, [[7, 8], [7, START, 8, 9]], engine=engine)
