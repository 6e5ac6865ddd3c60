"""Token advantages on a device against loops written from the definitions.

Under the interpreter, or on a GPU if there is one. Integer rewards give equal bits, others stay
within the rounding of the result and of what was added, and both rules catch planted bugs.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import advantages as module
from g2r_fast.kernels.advantages import CONFIG, ESTIMATORS, advantages
from test_advantages import slow

from g2r_fast.advantages import AdvantageConfig, token_advantages_with_counts
from g2r_fast.backends import VARIABLE
from g2r_fast.errors import InputError, InputTypeError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNIT, WIDE = 2.0**-24, 2.0**-53
BLOCK_T = CONFIG.blocks["BLOCK_T"]
# Empty, one token, one step less one and more one, several steps; two groups of four.
LENGTHS = [5, 0, 1, BLOCK_T + 1, 3, BLOCK_T - 1, 2 * BLOCK_T + 9, 2]


def inputs(kind="random", lengths=LENGTHS, seed=0):
    """Rewards of one sign in a response, scores, shares, and what is kept."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    if kind == "integers":
        rewards = torch.randint(0, 5, (total,), generator=generator).double()
        scores = torch.randint(-8, 9, (len(lengths),), generator=generator).double()
        shares = torch.randint(0, 9, (total,), generator=generator).double()
    else:
        rewards = torch.rand(total, generator=generator).double() / 3
        scores = torch.randn(len(lengths), generator=generator).double()
        shares = torch.rand(total, generator=generator).double()
    sign = torch.tensor([1.0, -1.0]).repeat(len(lengths))[: len(lengths)]
    rewards *= sign.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    keep = torch.rand(total, generator=generator) < 0.7
    keep[-1:] = True
    return rewards, scores, shares, keep


def expected_of(rewards, lengths, size, estimator, divide, scores, shares, keep):
    """The definition over the kept tokens, [M] float64, and zeros beside them."""
    kept = torch.ones(len(rewards), dtype=torch.bool) if keep is None else keep
    rows = [r[k] for r, k in zip(rewards.split(lengths), kept.split(lengths), strict=True)]
    if shares is None:
        wholes = [float(row.sum()) for row in rows]
        parts = [
            row / whole if whole else torch.full_like(row, 1.0 / max(1, len(row)))
            for row, whole in zip(rows, wholes, strict=True)
        ]
    else:
        each = zip(shares.split(lengths), kept.split(lengths), strict=True)
        parts = [share[k] for share, k in each]
    lists = [row.tolist() for row in rows]
    found = slow(lists, size, estimator, divide, scores.tolist(), [p.tolist() for p in parts])
    out = torch.zeros(len(rewards), dtype=torch.float64)
    out[kept] = torch.tensor([value for row in found for value in row], dtype=torch.float64)
    return out


def is_right(run, estimator, divide, masked, given_shares, kind="random"):
    rewards, scores, shares, keep = inputs(kind)
    shares, keep = shares if given_shares else None, keep if masked else None
    expected = expected_of(rewards, LENGTHS, 4, estimator, divide, scores, shares, keep)
    out, flat, mixed = run(
        rewards.to(DEVICE), LENGTHS, 4, estimator=estimator, divide_by_std=divide,
        scores=scores.to(DEVICE), shares=None if shares is None else shares.to(DEVICE),
        keep=None if keep is None else keep.to(DEVICE),
    )  # fmt: skip
    out = out.cpu().double()
    if flat.tolist() != [0, 0] or mixed.any():
        return False
    # Rounded to float32 at the end; before that sums of float64, relative to the largest addend.
    bound = UNIT * expected.abs() + 2 * len(rewards) * WIDE * expected.abs().max()
    alive = bool(out.isfinite().all()) and float(out.norm()) > 0
    return alive and bool(((out - expected).abs() <= bound).all())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_are_their_definition(estimator, divide, masked):
    for given_shares in (False, True) if estimator == "scaled_sequence" else (False,):
        for kind in ("random", "integers"):
            assert is_right(advantages, estimator, divide, masked, given_shares, kind)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_integers_give_equal_bits(estimator):
    """A power of two of tokens and of scores: means are exact, and so is everything else."""
    lengths = [0, 1, BLOCK_T + 3, BLOCK_T - 4, 512, 256, 255, 1]
    rewards, scores, shares, _ = inputs("integers", lengths)
    expected = expected_of(rewards, lengths, 4, estimator, False, scores, shares, None)
    got, _, _ = advantages(
        rewards.to(DEVICE), lengths, 4, estimator=estimator, divide_by_std=False,
        scores=scores.to(DEVICE), shares=shares.to(DEVICE),
    )  # fmt: skip
    assert torch.equal(got.cpu(), expected.float()) and float(got.norm()) > 0


def zeros(*arguments, **options):
    return tuple(torch.zeros_like(part) for part in advantages(*arguments, **options))


def scale_off_by_0_1_percent(rewards, *arguments, **options):
    out, flat, mixed = advantages(rewards, *arguments, **options)
    return out * 1.001, flat, mixed


def groups_too_small(rewards, lengths, group_size, **options):
    out, flat, mixed = advantages(rewards, lengths, group_size // 2, **options)
    return out, flat[:2] * 0, mixed


def mask_ignored(*arguments, keep, **options):
    return advantages(*arguments, **options, keep=None if keep is None else ~keep)


def last_token_lost(rewards, *arguments, **options):
    rewards = rewards.clone()
    rewards[-1] = 0.0
    return advantages(rewards, *arguments, **options)


def std_ignored(*arguments, divide_by_std, **options):
    return advantages(*arguments, **options, divide_by_std=not divide_by_std)


def boundaries_off_by_one(rewards, lengths, group_size, **options):
    lengths = [lengths[0] - 1, lengths[1] + 1, *lengths[2:]]
    return advantages(rewards, lengths, group_size, **options)


def rounded_to_bfloat16(*arguments, **options):
    out, flat, mixed = advantages(*arguments, **options)
    return out.bfloat16().float(), flat, mixed


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "planted",
    [
        zeros, scale_off_by_0_1_percent, groups_too_small, mask_ignored, last_token_lost,
        std_ignored, boundaries_off_by_one, rounded_to_bfloat16,
    ],
)  # fmt: skip
def test_planted_bugs_are_caught(planted, estimator):
    if planted is boundaries_off_by_one and estimator == "rewards_pooled":
        pytest.skip("the pool is the group's, whatever its sequences")
    assert is_right(advantages, estimator, True, True, False)
    assert not is_right(planted, estimator, True, True, False)


def test_another_estimator_is_caught():
    for name in ESTIMATORS[:3]:
        for other in ESTIMATORS[:3]:

            def swapped(*arguments, estimator, other=other, **options):
                return advantages(*arguments, **options, estimator=other)

            assert is_right(swapped, name, True, False, False) == (name == other)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=0, max_size=8).map(lambda x: x[: len(x) // 2 * 2]),
    estimator=st.sampled_from(ESTIMATORS),
    divide=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_lengths(lengths, estimator, divide, masked, seed):
    rewards, scores, _, keep = inputs("random", lengths, seed)
    keep = keep if masked else None
    expected = expected_of(rewards, lengths, 2, estimator, divide, scores, None, keep)
    got, _, mixed = advantages(
        rewards.to(DEVICE), lengths, 2, estimator=estimator, divide_by_std=divide,
        scores=scores.to(DEVICE), keep=None if keep is None else keep.to(DEVICE),
    )  # fmt: skip
    assert not mixed.any()
    # Two values of a pool may lie near each other: their difference keeps fewer digits.
    bound = UNIT * expected.abs() + 2**12 * WIDE * (expected.abs().max() if len(expected) else 0.0)
    assert ((got.cpu().double() - expected).abs() <= bound).all()


def test_a_large_neighbour_costs_no_digits():
    rewards = torch.tensor([1e12, 1e12, 1e-3, 2e-3]).double().to(DEVICE)
    got, _, _ = advantages(rewards, [2, 2], 2, estimator="returns_pooled", divide_by_std=False)
    alone, _, _ = advantages(rewards[2:].contiguous(), [1, 1], 2, divide_by_std=False)
    assert got[0] > 0 and torch.isfinite(got).all() and alone[1] == -alone[0] != 0
    small = rewards[2:].contiguous()
    got, _, _ = advantages(
        torch.cat([rewards[:2], small]), [2, 0, 2, 0], 2, estimator="returns_pooled"
    )
    alone, _, _ = advantages(small, [2, 0], 2, estimator="returns_pooled")
    assert torch.equal(got[2:], alone)


def test_groups_without_spread_are_told():
    rewards = torch.tensor([0.5, 0.5, 0.25, 0.75, 0.0, 0.0]).double().to(DEVICE)
    got, flat, _ = advantages(
        rewards, [1, 1, 2, 0, 0, 0, 2, 0], 2, estimator="rewards_pooled", divide_by_std=True
    )
    assert flat.tolist() == [1, 0, 1, 1]
    assert got.tolist() == [0.0, 0.0, -1.0, 1.0, 0.0, 0.0]


def test_every_output_is_written_and_masked_rewards_are_not_read(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(2**30))
    rewards = torch.tensor([1.0, math.nan, 3.0, 5.0]).double().to(DEVICE)
    keep = torch.tensor([True, False, True, True], device=DEVICE)
    for estimator in ESTIMATORS:
        got, flat, _ = advantages(
            rewards, [3, 1], 2, estimator=estimator, keep=keep, scores=rewards[[0, 2]]
        )
        assert got.isfinite().all() and got.abs().max() < 10 and flat.tolist() == [0]
        assert got[1] == 0.0


R = torch.zeros(4, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((R, [2, 2], 3), {}, InputError, "do not fit"),
        ((R, [2, 1], 2), {}, InputError, "do not fit"),
        ((R, [5, -1], 2), {}, InputError, "do not fit"),
        ((R, [2, 2], 0), {}, InputError, "do not fit"),
        ((R.half(), [2, 2], 2), {}, InputTypeError, "rewards has an unusable dtype"),
        ((R, [2, 2], 2), {"estimator": "gae"}, InputError, "unknown estimator"),
        ((R, [2, 2], 2), {"estimator": "scaled_sequence"}, InputTypeError, "needs scores"),
        (
            (R, [2, 2], 2), {"estimator": "scaled_sequence", "scores": R}, InputError,
            "one entry per sequence",
        ),
        ((R, [2, 2], 2), {"keep": R}, InputTypeError, "keep has an unusable dtype"),
        ((R, [2, 2], 2), {"shares": R[:3]}, InputError, "shares must be contiguous"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_apart(arguments, options, error, message):
    with pytest.raises(error, match=message):
        advantages(*arguments, **options)


# --- the public function --------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_advantages_are_those_of_the_cpu(estimator, divide, masked, monkeypatch):
    rewards, scores, shares, keep = inputs()
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        found.append(
            token_advantages_with_counts(
                [row.float().to(DEVICE) for row in rewards.split(LENGTHS)], 4,
                AdvantageConfig(estimator, divide), scores.to(DEVICE),
                mean_attributions=[row.float().to(DEVICE) for row in shares.split(LENGTHS)],
                mask=[row.to(DEVICE) for row in keep.split(LENGTHS)] if masked else None,
            )
        )  # fmt: skip
    assert found[0][1] == found[1][1]
    for got, expected in zip(found[1][0], found[0][0], strict=True):
        assert got.dtype == torch.float32 and got.device == expected.device
        torch.testing.assert_close(got, expected, rtol=2.5 * UNIT, atol=0.0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_token_advantages_raise_alike(backend, monkeypatch):
    monkeypatch.setenv(VARIABLE, backend)
    mixed = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])]
    config = AdvantageConfig("scaled_sequence")
    with pytest.raises(InputError, match=r"both signs.*first at index 1"):
        token_advantages_with_counts([row.to(DEVICE) for row in mixed], 2, config, [1.0, 2.0])
    with pytest.raises(InputError, match="needs the sequence scores"):
        token_advantages_with_counts([row.to(DEVICE) for row in mixed], 2, config)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_rows_and_no_tokens(estimator, monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    config = AdvantageConfig(estimator)
    assert token_advantages_with_counts([], 4, config, [])[0] == []
    empty = [torch.zeros(0, device=DEVICE)] * 2
    out, counts = token_advantages_with_counts(empty, 2, config, [1.0, 1.0])
    assert [len(row) for row in out] == [0, 0] and counts["zero_spread_groups"] == 1


def test_every_case_is_listed_once():
    names = [case.name for case in module.compile_cases()]
    assert len(names) == len(set(names)) == 5 * 4
