"""Watches over a judge in training: no change of a weight is missed, canaries become figures."""

from __future__ import annotations

import pytest
import torch
from test_adapters import KINDS, adapted, judge_of, model
from test_canaries import PROMPTS, RUBRICS, constant_judge, make_judge

from g2r_fast.canaries import CANARIES, CanaryRun, canary_rates
from g2r_fast.errors import InputError, InputTypeError
from g2r_fast.training import watches
from g2r_fast.training.watches import CanaryWatch, JudgeWatch


def flip(tensor: torch.Tensor, index: int) -> None:
    """The smallest change there is: one bit of one element."""
    words = tensor.data.view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    words[index] ^= 1


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_any_tensor_is_seen_and_named(dtype: torch.dtype) -> None:
    judge = model().to(dtype)
    watch = JudgeWatch(judge)
    first = watch.fingerprint()
    assert watch.changed() == [] and watch.figures() == {"judge/changed": 0.0}
    for name, parameter in judge.named_parameters():
        for index in (0, parameter.numel() // 2, parameter.numel() - 1):
            flip(parameter, index)
            assert watch.changed() == [name]
            assert watch.fingerprint() != first
            flip(parameter, index)
    assert watch.changed() == [] and watch.fingerprint() == first


def test_chunks_do_not_hide_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "_CHUNK", 4)  # words of two elements each
    watches._odd_numbers.cache_clear()
    try:
        layer = torch.nn.Linear(5, 5)
        watch = JudgeWatch(layer)
        weight = layer.weight.data
        for i in range(25):
            flip(weight, i)
            assert watch.changed() == ["weight"], i
            flip(weight, i)
        # Elements that change places: within a chunk, between chunks, and whole chunks.
        for rows in ([1, 0, *range(2, 25)], [8, *range(1, 8), 0, *range(9, 25)]):
            before = weight.clone()
            weight.view(-1)[:] = before.view(-1)[rows]
            assert watch.changed() == ["weight"]
            weight[:] = before
        weight.view(-1)[:16] = weight.view(-1)[:16].roll(8)
        assert watch.changed() == ["weight"]
    finally:
        watches._odd_numbers.cache_clear()


def test_an_optimizer_step_is_seen() -> None:
    judge = model().requires_grad_(True)
    watch = JudgeWatch(judge)
    loss = judge(torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss
    loss.backward()
    torch.optim.AdamW(judge.parameters(), lr=1e-6).step()
    names = {name for name, _ in judge.named_parameters()}
    assert set(watch.changed()) == names
    assert watch.figures() == {"judge/changed": float(len(names))}


def test_tied_weights_are_named_twice_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = model(tied=True)
    read: list[str] = []
    checksum = watches._checksum
    monkeypatch.setattr(watches, "_checksum", lambda n, t: read.append(n) or checksum(n, t))
    watch = JudgeWatch(judge)
    assert len(read) == len(list(judge.parameters()))
    flip(judge.lm_head.weight, 3)
    assert watch.changed() == ["lm_head.weight", "model.embed_tokens.weight"]


def test_what_is_not_a_change() -> None:
    judge = model().requires_grad_(False)
    watch = JudgeWatch(judge)
    first = watch.fingerprint()
    judge.requires_grad_(True).train()
    weight = judge.lm_head.weight
    weight.data = weight.data.t().contiguous().t()  # the same values in another order in memory
    for name, buffer in judge.named_buffers():
        assert "inv_freq" in name  # rebuilt by some models as sequences grow
        buffer.mul_(2)
    assert watch.changed() == [] and watch.fingerprint() == first
    assert JudgeWatch(model()).fingerprint() == first  # by value, not by place
    assert JudgeWatch(model().double()).fingerprint() != first


def test_buffers_that_a_checkpoint_holds_are_watched() -> None:
    norm = torch.nn.BatchNorm1d(3)
    watch = JudgeWatch(norm)
    norm.train()(torch.randn(4, 3))
    assert watch.changed() == ["num_batches_tracked", "running_mean", "running_var"]


def test_shapes_and_names_count() -> None:
    judge = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    watch = JudgeWatch(judge)
    judge[0].weight = torch.nn.Parameter(judge[0].weight.data.view(1, 4))
    assert watch.changed() == ["0.weight"]
    judge[0].weight = torch.nn.Parameter(judge[0].weight.data.view(2, 2))
    judge[0].register_parameter("scale", torch.nn.Parameter(torch.zeros(1)))
    assert watch.changed() == ["0.scale"]
    del judge[0].weight, judge[0].scale
    assert watch.changed() == ["0.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_train_do_not_change_the_base(kind: str) -> None:
    policy = adapted(kind)
    judge = judge_of(policy, "off")
    watch, everything = JudgeWatch(judge.model, "off"), JudgeWatch(judge.model)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    assert watch.changed() == []
    assert everything.changed()
    assert watch.fingerprint() == JudgeWatch(model()).fingerprint()  # under the base's own names


def test_a_base_that_trains_under_its_adapters_is_seen() -> None:
    judge = judge_of(adapted(), "off")
    watch = JudgeWatch(judge.model, judge.adapters)
    flip(judge.model.model.layers[0].self_attn.q_proj.base_layer.weight, 5)
    assert watch.changed() == ["model.layers.0.self_attn.q_proj.weight"]


def test_judges_that_cannot_be_watched() -> None:
    with pytest.raises(InputError, match="unknown adapters"):
        JudgeWatch(model(), "no")
    with torch.device("meta"):
        absent = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"not in memory.* weight on the meta device"):
        JudgeWatch(absent)


# --- canaries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [True, False])
def test_canaries_of_a_judge_that_always_says_the_same(answer: bool) -> None:
    watch = CanaryWatch(constant_judge(answer), PROMPTS, RUBRICS)
    # True to all is worth (3 + 1 - 2) / 4 and (5 - 1) / 5.
    expected = {"canaries/true_rate": float(answer), "canaries/score": 0.65 * answer}
    assert watch.figures() == pytest.approx(expected)
    assert watch.figures() == pytest.approx(expected)
    assert watch.report is not None and watch.report.prompts == 2


def test_figures_are_those_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = make_judge()
    odds = {c.name: 1.0 if c.debatable or i % 3 else -1.0 for i, c in enumerate(CANARIES)}
    monkeypatch.setattr(
        CanaryRun,
        "_log_odds",
        lambda run, prompts, items, answers: [
            odds[a.canary.name] for a in answers for _ in a.items
        ],
    )
    figures = CanaryWatch(judge, PROMPTS, RUBRICS).figures()
    report = canary_rates(judge, PROMPTS, RUBRICS)
    told = [canary for canary in report.canaries if not canary.debatable]
    asked, true = (
        sum(getattr(c, name) for c in told) for name in ("judgements", "false_positives")
    )
    assert 0 < true < asked
    assert figures["canaries/true_rate"] == true / asked
    assert report.best is not None and figures["canaries/score"] == report.best.mean_score


def test_the_sample_is_fixed_and_keeps_prompts_with_their_rubrics() -> None:
    prompts, rubrics = [f"question {i}" for i in range(50)], [[f"item {i}"] for i in range(50)]
    judge = constant_judge(True)
    watch, again = (CanaryWatch(judge, prompts, rubrics, sample=5) for _ in range(2))
    assert watch.rows == again.rows and len(set(watch.rows)) == 5
    assert watch._prompts == [f"question {row}" for row in watch.rows]
    assert watch._rubrics == [[f"item {row}"] for row in watch.rows]
    assert CanaryWatch(judge, prompts[:3], rubrics[:3]).rows == [0, 1, 2]


def test_pitfalls_alone_give_no_rate() -> None:
    rubrics = [[{"criterion": "is rude", "points": -2.0}]]
    assert CanaryWatch(constant_judge(True), PROMPTS[:1], rubrics).figures() == {}


def test_the_judge_of_a_policy_in_training_is_the_base() -> None:
    judge = judge_of(adapted(), "off")
    base = judge_of(model(), None)
    prompts, rubrics = ["is a cough serious?"], [["is kind"]]
    reports = []
    for each in (judge, base):
        watch = CanaryWatch(each, prompts, rubrics)
        watch.figures()
        assert watch.report is not None
        reports.append([rate.mean_log_odds for rate in watch.report.canaries])
    assert reports[0] == pytest.approx(reports[1], rel=1e-4)


def test_canaries_need_prompts() -> None:
    judge = constant_judge(True)
    with pytest.raises(InputError, match="nothing to ask"):
        CanaryWatch(judge, [], [])
    with pytest.raises(InputError, match="sample=0"):
        CanaryWatch(judge, PROMPTS, RUBRICS, sample=0)
    with pytest.raises(InputError, match="differ in length"):
        CanaryWatch(judge, PROMPTS, RUBRICS[:1])
    with pytest.raises(InputTypeError, match="prompts is not a list"):
        CanaryWatch(judge, "one", RUBRICS)
