"""Similarity, novelty and shaped rewards against the reference, by hand, and with bugs planted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from g2r_fast import g2rl
from g2r_fast import novelty as module
from g2r_fast.g2rl import Features, novelty, shape_rewards, similarity
from g2r_fast.reference import (
    bounded_novelty,
    cosine_similarities,
    response_novelty,
    shaped_rewards,
)

DOUBLE = 1e-12


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def group(rows: int, seed: int = 0, width: int = 12) -> Tensor:
    """Features in float64, of which some point the same way and one is zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=generator).double()
    if rows > 2:
        found[2] = -3.0 * found[0]
    if rows > 4:
        found[4] = 0.0
    return found


def verdicts(rows: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(0, 2, (rows,), generator=generator) - 1.0).tolist()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64])
def test_similarities_are_cosines(rows: int) -> None:
    features = group(rows)
    got = similarity(features)
    assert got.shape == (rows, rows) and got.dtype == torch.float64
    expected = double(cosine_similarities(list(features)))
    assert (got - expected).abs().max() <= 1e-14
    assert similarity(features.float()).dtype == torch.float32
    assert similarity(Features(features, [], [])).equal(got)
    if rows > 4:
        assert not got[4].any() and not got[:, 4].any()


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_similarities_do_not_depend_on_lengths(factor: float) -> None:
    """Features of a sure policy are tiny: their squares would be 0, or infinite."""
    features = group(5)
    scaled = features * double([factor, 1.0, 1.0, 1 / factor, 1.0])[:, None]
    assert (similarity(scaled) - similarity(features)).abs().max() <= 1e-14


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("variant", ["equation", "prose"])
def test_groups_are_what_the_reference_makes_of_each(size: int, variant: str) -> None:
    groups = 3
    features = torch.cat([group(size, seed) for seed in range(groups)])
    rewards = verdicts(groups * size)
    nu = novelty(features, rewards, size)
    shaped = shape_rewards(features, rewards, size, lam=0.6, variant=variant)
    assert nu.shape == shaped.shape == (groups * size,)
    assert nu.dtype == torch.float64 and shaped.dtype == torch.float32
    for start in range(0, groups * size, size):
        rows, of_group = list(features[start : start + size]), rewards[start : start + size]
        expected = double(response_novelty(rows, of_group))
        assert (nu[start : start + size] - expected).abs().max() <= DOUBLE
        wanted = torch.tensor(shaped_rewards(rows, of_group, 0.6, variant))
        assert (shaped[start : start + size] - wanted).abs().max() <= 1e-6


def test_by_hand() -> None:
    """Two answers alike, one at a right angle; the last is wrong."""
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    rewards = [1.0, 1.0, -1.0]
    heavy, light = math.e / (math.e + 1 / math.e), (1 / math.e) / (math.e + 1 / math.e)
    assert novelty(features, rewards, 3).tolist() == pytest.approx([1 - heavy, 1 - heavy, 1.0])
    assert light < heavy
    # nu_bar is 0, 0, 1.
    for options, last in (
        ({"lam": 0.5}, -0.5),
        ({"lam": 0.5, "variant": "prose"}, -1.5),
        ({"lam": 9.0}, 3.0),
        ({"lam": 9.0, "variant": "prose"}, -3.0),
        ({"lam": 0.0}, -1.0),
    ):
        assert shape_rewards(features, rewards, 3, **options).tolist() == [1.0, 1.0, last]
    assert shape_rewards(features, rewards, 3, lam=9.0, clip=0.25).tolist() == [0.25] * 3


def test_rewards_come_in_any_form() -> None:
    features, rewards = group(4).float(), [1, -1, 1, 1]
    once = shape_rewards(features, rewards, 2)
    for form in (torch.tensor(rewards), torch.tensor(rewards).half(), tuple(map(float, rewards))):
        assert shape_rewards(features, form, 2).equal(once)
    whole = Features(features.requires_grad_(True), [], [])
    assert shape_rewards(whole, rewards, 2).equal(once)
    assert not shape_rewards(whole, rewards, 2).requires_grad


def test_without_spread_there_is_no_novelty() -> None:
    rewards = [1.0, -1.0]
    assert shape_rewards(torch.ones(2, 3), rewards, 2).tolist() == rewards
    assert shape_rewards(torch.zeros(2, 3), rewards, 2).tolist() == rewards
    assert shape_rewards(group(2), rewards, 1).tolist() == rewards
    assert novelty(group(2), rewards, 1).tolist() == [1.0, 1.0]
    # Two of a pair are equally new: nothing to tell them apart by.
    assert shape_rewards(group(2), rewards, 2).tolist() == rewards
    assert shape_rewards(torch.zeros(0, 3), [], 2).tolist() == []


@pytest.mark.parametrize(("spread", "counts"), [(0.5e-6, False), (2e-6, True)])
def test_where_a_spread_begins(spread: float, counts: bool) -> None:
    values = torch.tensor([[1.0, 1.0 - spread, 1.0 - spread / 2]], dtype=torch.float64)
    got = module._min_max(values)
    assert bool(got.any()) == counts
    assert got[0].tolist() == pytest.approx(bounded_novelty(values[0].tolist()), abs=1e-9)


def test_graded_rewards() -> None:
    features, rewards = group(4), [0.25, -700.0, 1e6, 1e6 - 1]
    got = novelty(features, rewards, 4)
    expected = response_novelty(list(features), rewards)
    assert (got - double(expected)).abs().max() <= DOUBLE
    # The largest reward's own weights are those of far smaller ones, and still add up to 1.
    alone = novelty(features[:3], [0.0, 1.0, 5000.0], 3)
    assert alone.isfinite().all() and 0.0 < float(alone[1]) < 1.0
    shaped = shape_rewards(features, rewards, 4, graded=True, clip=math.inf)
    assert shaped.tolist() == pytest.approx(shaped_rewards(list(features), rewards, clip=math.inf))


@given(
    rows=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=6
    ),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6),
    lam=st.floats(0.0, 8.0),
    variant=st.sampled_from(["equation", "prose"]),
)
def test_any_group(rows: list[list[float]], signs: list[float], lam: float, variant: str) -> None:
    features, rewards = torch.tensor(rows).double(), signs[: len(rows)]
    nu = novelty(features, rewards, len(rows))
    assert ((nu >= 0.0) & (nu <= 1.0)).all()
    assert (nu - double(response_novelty(list(features), rewards))).abs().max() <= 1e-9
    shaped = shape_rewards(features, rewards, len(rows), lam=lam, variant=variant)
    assert ((shaped.abs() <= 3.0) & shaped.isfinite()).all()


# --- planted bugs ---------------------------------------------------------------------------------


def wrong(shape: Any) -> bool:
    """Whether an implementation of `shape_rewards` breaks the rule of the tests above."""
    for size in (3, 8):
        features, rewards = torch.cat([group(size, 1), group(size, 2)]), verdicts(2 * size, 3)
        for variant in ("equation", "prose"):
            got = shape(features, rewards, size, variant)
            for start in (0, size):
                rows, own = list(features[start : start + size]), rewards[start : start + size]
                wanted = torch.tensor(shaped_rewards(rows, own, 0.6, variant))
                if not bool((got[start : start + size] - wanted).abs().max() <= 1e-6):
                    return True
    return False


def patched(**changes: Any) -> Any:
    def shape(features: Tensor, rewards: Sequence[float], size: int, variant: str) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for name, change in changes.items():
                patch.setattr(module, name, change)
            return shape_rewards(features, rewards, size, lam=0.6, variant=variant)

    return shape


def _itself_counted(rows: Tensor, rewards: Tensor, size: int) -> Tensor:
    squares = module._cosines(rows.view(-1, size, rows.shape[1])).square()
    weights = rewards.view(-1, 1, size).softmax(-1)
    return (1.0 - (weights * squares).sum(-1)).clamp_min(0.0).flatten()


def _not_squared(rows: Tensor, rewards: Tensor, size: int) -> Tensor:
    cosines = module._cosines(rows.view(-1, size, rows.shape[1]))
    itself = torch.eye(size, dtype=torch.bool)
    weights = rewards.view(-1, 1, size).masked_fill(itself, -math.inf).softmax(-1)
    return (1.0 - (weights * cosines).sum(-1)).clamp_min(0.0).flatten()


def _correct_ones_alone(rows: Tensor, rewards: Tensor, size: int) -> Tensor:
    return module_novelty(rows, rewards.clamp_min(-1e3).where(rewards > 0, -1e3), size)


def _over_the_batch(values: Tensor) -> Tensor:
    least, most = values.min(), values.max()
    return (values - least) / (most - least)


module_novelty = module._novelty


@pytest.mark.parametrize(
    "shape",
    [
        patched(_novelty=_itself_counted),
        patched(_novelty=_not_squared),
        patched(_novelty=_correct_ones_alone),
        patched(_novelty=lambda rows, rewards, size: module_novelty(rows, 0 * rewards, size)),
        patched(_cosines=lambda rows: rows.double() @ rows.double().mT),
        patched(_min_max=_over_the_batch),
        patched(_min_max=lambda values: values),
        lambda f, r, size, variant: shape_rewards(f, r, size, lam=0.6),
        lambda f, r, size, variant: shape_rewards(f, r, size, lam=1.0, variant=variant),
        lambda f, r, size, variant: shape_rewards(f, r, size, lam=0.6, variant=variant, clip=1.0),
        lambda f, r, size, variant: shape_rewards(f, r, len(r), lam=0.6, variant=variant),
    ],
    ids=[
        "itself counted", "not squared", "only correct ones", "no weights", "no cosine",
        "over the batch", "no min-max", "one variant", "another lam", "another clip", "one group",
    ],
)  # fmt: skip
def test_planted_bugs_are_caught(shape: Any) -> None:
    assert not wrong(patched())
    assert wrong(shape)


# --- what cannot be used --------------------------------------------------------------------------

GOOD: dict[str, Any] = {"features": group(4), "rewards": [1, -1, 1, 1], "group_size": 2}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rewards": [1, 0, 1, 1]}, ValueError, "neither -1 nor 1; .*got 0.0; first at row 1"),
    ({"rewards": [1, 1, 1, 0.5]}, ValueError, "neither -1 nor 1; .*first at row 3"),
    ({"rewards": [1, -1, math.nan, 1]}, ValueError, "a reward is not finite.*row 2"),
    ({"rewards": [1, -1, math.inf, 1], "graded": True}, ValueError, "not finite.*row 2"),
    ({"rewards": [1, -1, 1]}, ValueError, r"differ in length.*\(4,\).*\(3,\)"),
    ({"rewards": [[1, -1], [1, 1]]}, ValueError, r"differ in length.*got \(2, 2\)"),
    ({"rewards": "good"}, TypeError, "rewards cannot be read"),
    ({"rewards": torch.ones(4) * 1j}, TypeError, "rewards are complex"),
    ({"group_size": 3}, ValueError, "does not divide"),
    ({"group_size": 0}, ValueError, "group_size"),
    ({"group_size": 2.0}, TypeError, "group_size is not an integer"),
    ({"lam": -1.0}, ValueError, "lam is out of range.*got -1.0"),
    ({"lam": math.nan}, ValueError, "lam is out of range"),
    ({"lam": "much"}, ValueError, "lam is out of range"),
    ({"clip": 0.0}, ValueError, "clip is out of range"),
    ({"clip": True}, ValueError, "clip is out of range"),
    ({"variant": "text"}, ValueError, "unknown variant; expected 'equation' | 'prose'; got 'text'"),
    ({"features": [1, 2]}, TypeError, "features cannot be read"),
    ({"features": torch.ones(4)}, TypeError, "features cannot be read.*float32"),
    ({"features": torch.ones(4, 3).long()}, TypeError, "features cannot be read.*int64"),
    ({"features": group(4).index_fill(0, torch.tensor([3]), math.nan)}, ValueError,
     "a feature is not finite.*row 3"),
    ({"features": group(4).index_fill(0, torch.tensor([1]), math.inf)}, ValueError, "row 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_cannot_be_used_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    shape_rewards(**GOOD)
    with pytest.raises(error, match=message):
        shape_rewards(**{**GOOD, **changed})
    if not changed.keys() & {"lam", "clip", "variant", "graded"} and "neither" not in message:
        with pytest.raises(error, match=message):
            novelty(**{**GOOD, **changed})
    if "features" in changed:
        with pytest.raises(error, match=message):
            similarity(changed["features"])


def test_the_methods_names_are_in_one_place() -> None:
    assert g2rl.shape_rewards is module.shape_rewards and g2rl.novelty is module.novelty
