"""Ranks and rewards by hand, and whatever cannot be ranked or differentiated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fallback_models import GPT2, model_of
from hypothesis import given
from hypothesis import strategies as st
from official_rules import vigor_rank_rewards
from tiny_models import tiny_model

from g2r_fast import reference, vigor
from g2r_fast.errors import InputError, InputTypeError, UnsupportedModelError

INF, NAN = float("inf"), float("nan")

# name -> norms, lengths, group_size, rewards
BY_HAND: dict[str, tuple[list[float], list[int], int, list[float]]] = {
    "the smallest gradient is the best": ([3, 1, 2], [4, 4, 4], 3, [-1, 1, 0]),
    "the root of the length": ([1.0, 1.9, 0.6], [4, 1, 16], 3, [0, 1, -1]),  # 2, 1.9, 2.4
    "not the length itself": ([1, 3], [4, 1], 2, [1, -1]),  # 2 and 3, not 4 and 3
    "ties by index": ([1, 1, 1, 1], [2, 2, 2, 2], 4, [-1, -1 / 3, 1 / 3, 1]),
    "a tie of different parts": ([2, 1], [1, 4], 2, [-1, 1]),
    "a tie in the middle": ([5, 2, 2, 1], [1, 1, 1, 1], 4, [-1, -1 / 3, 1 / 3, 1]),
    "a group of one": ([7], [3], 1, [0]),
    "groups of one": ([7, 1], [3, 1], 1, [0, 0]),
    "two groups": ([1, 2, 200, 100], [1, 1, 1, 1], 2, [1, -1, -1, 1]),
    "an empty completion is the worst": ([0, 9, 4], [0, 5, 5], 3, [-1, 0, 1]),
    "empty ones by index": ([0, 4, 0], [0, 1, 0], 3, [-1, 1, 0]),
    "a gradient of zero is the best": ([1, 0], [1, 1], 2, [-1, 1]),
    "no rows": ([], [], 4, []),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    norms, lengths, size, expected = BY_HAND[name]
    found = vigor.rank_rewards(norms, lengths, size)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    for i in range(0, len(norms), size):
        group = slice(i, i + size)
        ours = reference.rank_rewards(norms[group], lengths[group])
        assert ours == pytest.approx(expected[group], rel=1e-12, abs=0)


def test_whatever_holds_numbers() -> None:
    expected = [1.0, -1.0]
    for norms in ([1, 2], (1.0, 2.0), torch.tensor([1.0, 2.0]), np.array([1.0, 2.0])):
        for lengths in ([4, 4], torch.tensor([4, 4]), torch.tensor([4.0, 4.0]), np.array([4, 4])):
            assert vigor.rank_rewards(norms, lengths, 2).tolist() == expected
    live = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not vigor.rank_rewards(live, [1, 1], 2).requires_grad


@given(
    st.integers(1, 5).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(
                st.lists(
                    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([1, 4, 16])),
                    min_size=size,
                    max_size=size,
                ),
                max_size=3,
            ),
        )
    )
)
def test_as_the_official_rule(drawn: Any) -> None:
    """Also where S is equal though norms and lengths differ; every group holds all ranks."""
    size, groups = drawn
    flat = [pair for group in groups for pair in group]
    found = vigor.rank_rewards([n for n, _ in flat], [t for _, t in flat], size)
    for group, rewards in zip(groups, found.view(-1, size), strict=True):
        expected = vigor_rank_rewards([n for n, _ in group], [t for _, t in group])
        assert rewards.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=0)
        assert abs(float(rewards.sum())) < 1e-6 * size


BAD_RANKS: dict[str, tuple[tuple[Any, Any, Any], type[Exception], str]] = {
    "lengths that are fewer": (([1.0, 2.0], [1], 2), InputError, "got lengths with 1"),
    "one length is not broadcast": (([1.0, 2.0], 3, 2), InputTypeError, "lengths cannot be read"),
    "a table of norms": (([[1.0, 2.0]], [1, 1], 2), InputTypeError, "norms cannot be read"),
    "norms in words": (("ab", [1, 1], 2), InputTypeError, "norms cannot be read"),
    "no norms": ((None, [1, 1], 2), InputTypeError, "norms cannot be read"),
    "no lengths": (([1.0, 2.0], None, 2), InputTypeError, "lengths cannot be read"),
    "completions for lengths": (
        ([1.0, 2.0], [[1], [2, 3]], 2), InputTypeError, "lengths cannot be read",
    ),
    "truths": (([True, False], [1, 1], 2), InputTypeError, "norms cannot be read"),
    "NaN": (([1.0, NAN], [1, 1], 2), InputError, "a norm is not a finite.*nan; first at index 1"),
    "infinity": (([INF, 1.0], [1, 1], 2), InputError, "a norm is not a finite.*first at index 0"),
    "a negative norm": (([1.0, -1.0], [1, 1], 2), InputError, "a norm .*-1.0; first at index 1"),
    "a negative length": (([1.0, 1.0], [1, -2], 2), InputError, "a length .*-2.0; first at"),
    "half a token": (([1.0, 1.0], [1, 2.5], 2), InputError, "a length is no whole number"),
    "rows that do not divide": (([1.0] * 3, [1] * 3, 2), InputError, "does not divide into groups"),
    "groups of none": (([1.0], [1], 0), InputError, "does not divide into groups"),
    "groups of a float": (([1.0], [1], 1.0), InputTypeError, "group_size is not an integer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RANKS)
def test_what_cannot_be_ranked(name: str) -> None:
    arguments, error, message = BAD_RANKS[name]
    with pytest.raises(error, match=message):
        vigor.rank_rewards(*arguments)


# Of gradient_norms -------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "prompt_ids": [[1, 2], [3]],
    "completion_ids": [[4, 5, 6], [7]],
    "parameters": "all",
}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fewer completions": ({"completion_ids": [[4]]}, InputError, "got completion_ids with 1"),
    "no list": ({"completion_ids": None}, InputTypeError, "completion_ids is not a list"),
    "an empty prompt": ({"prompt_ids": [[1], []]}, InputError, "row 1: a prompt is empty"),
    "an id too large": ({"completion_ids": [[4, 97], [7]]}, InputError, "row 0: .*got 97"),
    "padding": ({"completion_ids": [[4, -100], [7]]}, InputError, "row 0: .*got -100"),
    "too long": ({"completion_ids": [[4] * 255, [7]]}, InputError, "row 0: .*at most 256"),
    "text": ({"prompt_ids": ["ab", [3]]}, InputTypeError, "row 0: prompt_ids cannot be read"),
    "other parameters": (
        {"parameters": "head"}, InputError, r"unknown parameters; expected 'trainable' \| 'all'",
    ),
    "parameters by the list": ({"parameters": []}, InputError, "unknown parameters"),
    "nothing trainable": (
        {"parameters": "trainable"}, InputError, "the policy has no trainable parameters",
    ),
    "max_tokens": ({"max_tokens": 0}, InputError, "max_tokens is too small"),
    "a float of max_tokens": ({"max_tokens": 9.0}, InputTypeError, "max_tokens is not an integer"),
    "engine": ({"engine": "fast"}, InputError, "unknown engine"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, engine: str) -> None:
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        vigor.gradient_norms(tiny_model("llama"), **{**GOOD, "engine": engine, **change})


def test_the_good_arguments_are_good() -> None:
    assert bool((vigor.gradient_norms(tiny_model("llama"), **GOOD) > 0).all())


def test_a_row_that_max_tokens_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"one sequence needs more rows than max_tokens.*row 0"):
        vigor.gradient_norms(tiny_model("llama"), **GOOD, max_tokens=5)


def test_a_policy_that_drops() -> None:
    model = tiny_model("llama", attention_dropout=0.1).train()
    with pytest.raises(InputError, match="the policy is in train mode and has dropout"):
        vigor.gradient_norms(model, **GOOD)


def test_a_named_engine_that_cannot_serve() -> None:
    with pytest.raises(UnsupportedModelError, match="engine='packed' cannot serve"):
        vigor.gradient_norms(model_of(GPT2), **GOOD, engine="packed")


@pytest.mark.parametrize("parameters", ["all", "lm_head"])
@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_what_is_not_finite_is_named(engine: str, parameters: str) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight[3] = NAN  # of the second prompt
    with pytest.raises(InputError, match=r"logits are not finite.*first at row 1"):
        vigor.gradient_norms(model, **{**GOOD, "parameters": parameters}, engine=engine)


def test_weights_that_have_no_gradient() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.packed = torch.nn.Parameter(torch.ones(3).byte(), requires_grad=False)
    with pytest.raises(InputError, match=r"can have no gradient; .*layers.1.mlp.packed of torch.u"):
        vigor.gradient_norms(model, **GOOD)
