"""What the rewards of attribute_batch add up to, and which tokens get none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from api_runs import (
    FLOAT32,
    ITEMS,
    OTHER_PROMPT,
    PROMPT,
    RESPONSES,
    ROUNDING,
    SHARP,
    assert_equals_reference,
    judge_of,
    reference,
    run,
)
from tiny_models import tiny_model
from tiny_tokenizers import byte_bpe

from g2r_fast import AttributionConfig, Judge, RewardModel, Rubric, attribute_batch
from g2r_fast.reference import relative_error
from g2r_fast.rewards import OutcomeRewards, TokenRewards, VerdictRewards


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_rewards_add_up_to_the_score(engine: str) -> None:
    verdicts = [list(z) for z in itertools.product([True, False], repeat=3)]
    responses = (RESPONSES * 2)[: len(verdicts)]
    table = torch.tensor(verdicts)  # as a trainer may hold them
    out = run(judge_of(), responses, verdict=table, engine=engine, attribution=SHARP)
    for row, given in enumerate(verdicts):
        earned = [item.weight for item, z in zip(ITEMS, given, strict=True) if z]
        score = sum(earned) / 5.0  # 2 + 3: what is positive
        assert float(out.scores[row]) == pytest.approx(score, rel=1e-6)
        rewards = out.token_rewards[row].double()
        assert abs(float(rewards.sum()) - score) <= 1e-6 * sum(map(abs, earned)) / 5.0
        if earned == [-1.0]:
            assert bool((rewards < 0).all())
        if not earned:
            assert not rewards.any()
    assert out.scores.dtype == torch.float32 and out.scores.shape == (8,)


def test_positive_rewards_add_up_to_1e_6_relative() -> None:
    items = [[Rubric("is kind", 0.3), Rubric("see a doctor", 7.0)]]
    text = " ".join(RESPONSES * 3)
    out = attribute_batch(judge_of(), [PROMPT], [text], items, 1, verdict=[[True, True]])
    assert len(out.token_rewards[0]) > 50
    assert float(out.token_rewards[0].double().sum()) == pytest.approx(1.0, rel=1e-6)
    assert float(out.scores[0]) == 1.0


def test_all_false_sends_nothing_back() -> None:
    out = run(judge_of(), verdict=[[False] * 3] * 4)
    assert out.stats["rows_backward"] == 0
    assert not out.scores.any() and out.attributions == [[None] * 3] * 4
    for rewards, response in zip(out.token_rewards, RESPONSES, strict=True):
        assert rewards.shape == (len(judge_of().encode_untrusted(response)),)
        assert not rewards.any()
    assert out.token_advantages is not None
    assert not any(advantages.any() for advantages in out.token_advantages)
    assert out.stats["counts"]["zero_spread_groups"] == 2
    assert out.stats["alarms"] == []


def test_only_true_items_come_back() -> None:
    one = run(judge_of(), verdict=[[True, False, False]] * 4).stats["rows_backward"]
    assert 0 < one < run(judge_of(), verdict=[[True] * 3] * 4).stats["rows_backward"]
    uniform = AttributionConfig(readout="uniform")
    out = run(judge_of(), verdict=[[True] * 3] * 4, attribution=uniform)
    assert out.stats["rows_backward"] == 0
    rewards = out.token_rewards[0]
    assert torch.allclose(rewards, torch.full_like(rewards, 0.8 / len(rewards)), rtol=1e-6, atol=0)


def test_no_positive_weight_is_zero_and_counted() -> None:
    items = [[Rubric("is kind", -1.0), Rubric("see", 0.0)], [Rubric("is kind", 1.0)]] * 2
    out = attribute_batch(
        judge_of(), [PROMPT] * 4, RESPONSES, items, 4, verdict=[[True, True], [True]] * 2
    )
    assert out.scores.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert not out.token_rewards[0].any() and out.token_rewards[1].any()
    assert out.stats["counts"]["rubrics_without_positive_weight"] == 2


def test_empty_responses_and_responses_of_eos_alone() -> None:
    judge = judge_of()
    (end,) = judge.eos_ids
    responses = ["", [], [end], RESPONSES[0]]
    out = run(judge, responses, verdict=[[True] * 3] * 4, group_size=4)
    assert [len(r) for r in out.token_rewards[:3]] == [0, 0, 1]
    assert out.scores.tolist() == pytest.approx([0.8] * 4)
    assert not out.token_rewards[2].any()  # there is no token the judge could have read
    assert out.token_rewards[3].any() and out.stats["counts"]["empty_responses"] == 3
    assert out.token_advantages is not None
    assert [len(a) for a in out.token_advantages[:3]] == [0, 0, 1]
    for tensors in (out.token_rewards, out.token_advantages):
        assert all(torch.isfinite(t).all() for t in tensors)
    expected = reference(judge, OTHER_PROMPT, RESPONSES[0], ITEMS, [True] * 3)
    assert_equals_reference(out, 3, expected, FLOAT32)
    empty = run(judge, ["", ""], verdict=[[True] * 3] * 2)
    assert empty.stats["rows_backward"] == 0 and empty.stats["counts"]["zero_spread_groups"] == 1


def test_no_rows_at_all() -> None:
    out = attribute_batch(judge_of(), [], [], [])
    assert len(out) == 0 and out.token_rewards == [] and out.scores.shape == (0,)


def test_a_final_eos_has_reward_zero_and_counts() -> None:
    judge = judge_of()
    (end,) = judge.eos_ids
    ids = judge.encode_untrusted(RESPONSES[0])
    out = run(judge, [[*ids, end], ids], verdict=[[True] * 3] * 2, attribution=SHARP)
    with_eos, without = out.token_rewards
    assert with_eos.shape == (len(ids) + 1,) and float(with_eos[-1]) == 0.0
    assert torch.equal(with_eos[:-1], without)
    assert out.token_advantages is not None
    # It takes part in the statistics of Eq. 9: 2 T + 1 tokens.
    pooled = torch.cat(out.token_advantages)
    assert abs(float(pooled.double().mean())) <= 1e-6
    assert float(pooled.double().std(correction=0)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("kind", ["verdicts", "outcomes"])
def test_mean_attributions_are_those_that_the_advantages_are_made_from(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch makes from its attributions what `scaled_sequence` was given."""
    formed: list[torch.Tensor] = []
    rewards = VerdictRewards if kind == "verdicts" else OutcomeRewards
    rows = rewards.rows

    def kept(self: Any, own_tokens: list[torch.Tensor], keep: bool = False) -> list[TokenRewards]:
        found = rows(self, own_tokens, keep)
        formed.extend(row.mean_attribution for row in found)
        return found

    monkeypatch.setattr(rewards, "rows", kept)
    judge: Judge | RewardModel = judge_of()
    items, verdict = None, "argmax"
    if kind == "verdicts":
        weights = [[2.0, -1.0, 0.0], [0.0, 0.0, 3.0], [0.0, 5.0, 1.0], [-1.0, -2.0, 1.0]]
        items = [[Rubric(f"item {w} {i}", w) for i, w in enumerate(row)] for row in weights]
        verdict = [[True, True, True], [True, True, False], [True, False, True], [False] * 3]
    else:
        scorer = tiny_model("llama", vocab_size=len(byte_bpe()), head="value")
        judge = RewardModel(scorer, byte_bpe())
    ids = [byte_bpe().encode(text) for text in RESPONSES]
    spans = [[(0, len(row))] for row in ids]
    spans[0], spans[1] = [(0, 2), (4, len(ids[0]))], [(1, 3)]  # a tool wrote the rest
    out = attribute_batch(
        judge, [PROMPT] * 4, ids, items, 1, SHARP, verdict=verdict, spans=spans,
        keep_attributions=True,
    )  # fmt: skip
    own = [torch.zeros(len(row), dtype=torch.bool) for row in ids]
    for mask, of_row in zip(own, spans, strict=True):
        for start, stop in of_row:
            mask[start:stop] = True
    found = out.mean_attributions(own)
    assert len(formed) == len(found) == 4
    for mean, expected, mask in zip(found, formed, own, strict=True):
        assert mean.dtype == torch.float32 and not mean[~mask].any()
        assert float(mean.sum()) == pytest.approx(1.0, rel=1e-6)
        assert relative_error(mean, expected) < ROUNDING
    assert float(found[0].std()) > 0.01
