"""From gradients to rewards on a device: softmax over given scores, and all of it in one launch.

Under the interpreter, or on a GPU if there is one. Integer inputs give equal bits, random ones stay
within forward-error bounds, and both rules catch every bug planted below.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import attribution as module
from g2r_fast.kernels import softmax_rewards as softmax_module
from g2r_fast.kernels.attribution import CONFIG, READOUTS, attribution
from g2r_fast.kernels.softmax_rewards import CONFIG as SOFTMAX
from g2r_fast.kernels.softmax_rewards import softmax_rewards

from g2r_fast import triton_scoring
from g2r_fast.eager.rows import attribution_rewards as eager
from g2r_fast.errors import InputError, InputTypeError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNIT = 2.0**-24
WIDE = 2.0**-53
BLOCK_T, BLOCK_H = CONFIG.blocks["BLOCK_T"], CONFIG.blocks["BLOCK_H"]
BLOCK_S = SOFTMAX.blocks["BLOCK_S"]
# Empty, one token, a tile less one and more one, more than one step of the softmax.
LENGTHS = [5, 0, 1, BLOCK_T - 1, BLOCK_T + 1, BLOCK_S + 3, 7, 7]
# Two responses with three judgements each, one that overlaps two others in part, and one alone.
STARTS = [0, 2, 0, 10, 10, 30, BLOCK_S + 30, BLOCK_S + 40]
COUNT = BLOCK_S + 50
WEIGHTS = [1.0, 9.0, -2.0, 0.5, 3.0, 1.0, -1.0, 2.0]


# --- scores that are given ------------------------------------------------------------------------


def scores_of(lengths, scale=1e-3):
    generator = torch.Generator().manual_seed(len(lengths))
    return (torch.randn(sum(lengths), generator=generator).double() * scale / 3).to(DEVICE)


def near(got, expected, terms):
    """Within the rounding of `terms` operations in float64."""
    size = expected.abs().max() if len(expected) else torch.zeros(())
    alive = bool(got.isfinite().all()) and (not len(got) or float(got.norm()) > 0)
    return alive and bool(((got - expected).abs() <= terms * WIDE * size).all())


def softmax_is_right(run, standardise):
    scores = scores_of(LENGTHS)
    tau = 0.3 if standardise else 1e-3
    options = (LENGTHS, WEIGHTS, STARTS, COUNT, tau, standardise)
    expected = eager(scores.cpu(), *options)
    found = [part.cpu() for part in run(scores, *options)]
    each = zip(found[0].split(LENGTHS), expected[0].split(LENGTHS), strict=True)
    return all(near(a, b, 200) for a, b in each if len(b)) and near(found[1], expected[1], 400)


@pytest.mark.parametrize("standardise", [False, True])
def test_softmax_and_sums_are_their_definition(standardise):
    assert softmax_is_right(triton_scoring.attribution_rewards, standardise)


@pytest.mark.parametrize("standardise", [False, True])
def test_integers_give_equal_bits(standardise):
    """Scores are ±1, far apart at this temperature: alpha is 0 or 1 / n, n a power of two."""
    lengths, starts = [2, 8, 0, 64, 1024, 16], [0, 1, 4, 3, 20, 1060]
    parts = [torch.tensor([1.0, -1.0]).repeat(n // 2)[torch.randperm(n)] for n in lengths]
    scores = torch.cat(parts).double().to(DEVICE)
    weights = [2.0, -1.0, 5.0, 3.0, 1.0, -4.0]
    options = (lengths, weights, starts, 1080, 2.0**-11, standardise)
    each = zip(softmax_rewards(scores, *options), eager(scores, *options), strict=True)
    for got, expected in each:
        assert torch.equal(got, expected)
        assert float(got.norm()) > 0


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(
    "scores",
    [
        [0.1, math.nan, 0.3], [0.1, math.inf, 0.3], [0.1, -math.inf, 0.3], [-math.inf, -math.inf],
        [math.nan], [0.0, 0.0], [5.0], [1.0, 1.0 + 1.9e-6], [1.0, 1.0 + 2.1e-6], [1e300, -1e300],
        [1e-300, 0.0],
    ],
    ids=str,
)  # fmt: skip
def test_odd_scores_stay_in_their_segment(scores, standardise):
    b = torch.tensor([0.25, 1.0, *scores, 2.0], dtype=torch.float64)
    options = ([2, len(scores), 1], [1.0] * 3, [0, 3, 9], 12, 0.7, standardise)
    expected = eager(b, *options)
    for got, wanted in zip(softmax_rewards(b.to(DEVICE), *options), expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-9, atol=0.0, equal_nan=True)


@settings(max_examples=25)
@given(data=st.data(), standardise=st.booleans(), tau=st.sampled_from([1e-3, 0.5, 3.0]))
def test_any_segments(data, standardise, tau):
    lengths = data.draw(st.lists(st.integers(0, 12), max_size=6))
    starts = [data.draw(st.integers(0, 30)) for _ in lengths]
    weights = [data.draw(st.floats(-3, 3, width=16)) for _ in lengths]
    scores = scores_of(lengths)
    options = (lengths, weights, starts, 42, tau, standardise)
    expected = eager(scores.cpu(), *options)
    alpha, rewards = (part.cpu() for part in softmax_rewards(scores, *options))
    # exp(x - y) is off by as many roundings as x and y are large: many where tau is small.
    sizes = []
    for part in scores.cpu().double().split(lengths):
        unit = tau * (float(part.std(correction=0)) if standardise and len(part) > 1 else 1.0)
        sizes.append((part.abs().amax() / (unit or tau)).expand(len(part)) if len(part) else part)
    roundings = 16 + 8 * torch.cat([*sizes, torch.empty(0)])
    assert ((alpha - expected[0]).abs() <= roundings * WIDE * expected[0] + 1e-300).all()
    # A sum may cancel: what was added counts, each part as far off as above.
    bound, parts = torch.zeros(42, dtype=torch.float64), (expected[0] * roundings).split(lengths)
    for part, weight, start in zip(parts, weights, starts, strict=True):
        bound[start : start + len(part)] += abs(weight) * part
    assert ((rewards - expected[1]).abs() <= bound * WIDE + 1e-300).all()


def standardise_ignored(scores, lengths, weights, starts, count, tau, standardise):
    return softmax_rewards(scores, lengths, weights, starts, count, tau, not standardise)


def temperature_off_by_0_1_percent(scores, lengths, weights, starts, count, tau, standardise):
    return softmax_rewards(scores, lengths, weights, starts, count, tau * 1.001, standardise)


def weight_ignored(scores, lengths, weights, starts, count, tau, standardise):
    return softmax_rewards(scores, lengths, [1.0] * 8, starts, count, tau, standardise)


def start_off_by_one(scores, lengths, weights, starts, count, tau, standardise):
    moved = [start + 1 for start in starts]
    return softmax_rewards(scores, lengths, weights, moved, count, tau, standardise)


def last_judgement_lost(scores, lengths, weights, starts, count, tau, standardise):
    weights = [*weights[:-1], 0.0]
    return softmax_rewards(scores, lengths, weights, starts, count, tau, standardise)


def computed_in_float32(*arguments):
    alpha, rewards = softmax_rewards(*arguments)
    return alpha.float().double(), rewards.float().double()


def nothing_written(*arguments):
    return tuple(torch.zeros_like(part) for part in softmax_rewards(*arguments))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(
    "planted",
    [
        standardise_ignored, temperature_off_by_0_1_percent, weight_ignored, start_off_by_one,
        last_judgement_lost, computed_in_float32, nothing_written,
    ],
)  # fmt: skip
def test_planted_bugs_of_the_softmax_are_caught(planted, standardise):
    assert not softmax_is_right(planted, standardise)


# --- scores read out of gradients -----------------------------------------------------------------

# Two responses: three judgements as lanes of one, token-major, and one of the other.
F_LENGTHS = [BLOCK_T + 3] * 3 + [0, 2]
F_STARTS = [1, 1, 1, 1, 20]
F_FIRST = [4, 5, 6, 0, 1]
F_STRIDE = [3, 3, 3, 1, 2]
F_WEIGHTS = [1.0, -2.0, 0.5, 7.0, 4.0]
F_SCALES = [1.0, 0.5, 4.0, 1.0, 2.0]
F_COUNT, F_ROWS = 23, 40
WIDTHS = [1, BLOCK_H - 1, BLOCK_H + 1, 2 * BLOCK_H + 9]


def gradients(kind, width, dtype):
    generator = torch.Generator().manual_seed(width)

    def draw(count):
        if kind == "integers":
            return torch.randint(-4, 5, (count, width), generator=generator).float()
        return torch.randn(count, width, generator=generator) * 0.02

    memory = torch.full((F_ROWS + 1, width + 3), math.nan)
    memory[:F_ROWS, :width] = draw(F_ROWS)
    unread = sorted(set(range(F_ROWS)) - {r for rows in rows_of() for r in rows})
    memory[unread] = math.nan  # rows of nobody
    embed = torch.full((8, width + 5), math.nan, dtype=dtype)
    embed[:7, :width] = draw(7).to(dtype)
    row_map = torch.randint(0, 7, (F_COUNT,), generator=generator)
    return (
        memory.to(DEVICE)[:F_ROWS, :width],
        embed.to(DEVICE)[:7, :width],
        row_map.to(DEVICE),
    )


def rows_of():
    each = zip(F_FIRST, F_STRIDE, F_LENGTHS, strict=True)
    return [[first + t * stride for t in range(n)] for first, stride, n in each]


def run_fused(grads, embed, row_map, readout="dot", standardise=False, **changes):
    options = {
        "lengths": F_LENGTHS, "weights": F_WEIGHTS, "starts": F_STARTS, "count": F_COUNT,
        "first_rows": F_FIRST, "strides": F_STRIDE, "temperature": 0.3, "scales": F_SCALES,
    } | changes  # fmt: skip
    return attribution(
        grads, embed=embed, row_map=row_map, readout=readout, standardise=standardise, **options
    )


def fused_terms(grads, embed, row_map, readout):
    """[total, H] float64: what is summed for each score."""
    found = []
    for rows, start in zip(rows_of(), F_STARTS, strict=True):
        g = grads[torch.tensor(rows, dtype=torch.int64, device=DEVICE)].double()
        if readout == "dot":
            g = g * embed[row_map[start : start + len(rows)]].double()
        found.append(g if readout == "dot" else g.abs() if readout == "l1" else g.square())
    return torch.cat(found)


def scales():
    return torch.tensor(F_SCALES).repeat_interleave(torch.tensor(F_LENGTHS)).double().to(DEVICE)


def fused_is_right(run, readout, width, dtype, kind, standardise=False):
    inputs = gradients(kind, width, dtype)
    b, alpha, rewards = run(*inputs, readout=readout, standardise=standardise)
    terms = fused_terms(*inputs, readout)
    expected, size = terms.sum(-1), terms.abs().sum(-1)
    if readout == "l2":
        expected, size = expected.sqrt(), size.sqrt()
    if kind == "integers":
        exact = torch.equal(b, (expected.float().double() * scales()).float())
    else:
        steps = math.ceil(width / BLOCK_H) + math.ceil(math.log2(BLOCK_H)) + 16
        bound = (steps + 3) * UNIT * size * scales()
        exact = bool(((b.double() - expected * scales()).abs() <= bound).all())
    options = (F_LENGTHS, F_WEIGHTS, F_STARTS, F_COUNT, 0.3, standardise)
    of_b = eager(b.double().cpu(), *options)
    alive = bool(b.isfinite().all()) and float(b.norm()) > 0
    return alive and exact and near(alpha.cpu(), of_b[0], 200) and near(rewards.cpu(), of_b[1], 400)


@pytest.mark.parametrize("kind", ["integers", "random"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_scores_are_read_out_and_shared(readout, width, kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fused_is_right(run_fused, readout, width, dtype, kind)
        if readout != "dot":
            break


def test_standardised_scores_are_read_out():
    assert fused_is_right(run_fused, "dot", 40, torch.bfloat16, "random", standardise=True)


def last_column_dropped(grads, embed, row_map, **options):
    return run_fused(grads[:, :-1], embed[:, :-1], row_map, **options)


def scale_off_by_0_1_percent(*inputs, **options):
    return run_fused(*inputs, scales=[1.001 * scale for scale in F_SCALES], **options)


def lanes_swapped(*inputs, **options):
    return run_fused(*inputs, first_rows=[5, 4, 6, 0, 1], **options)


def rounded_to_bfloat16(*inputs, **options):
    b, alpha, rewards = run_fused(*inputs, **options)
    return b.bfloat16().float(), alpha, rewards


def row_map_shifted(grads, embed, row_map, **options):
    return run_fused(grads, embed, row_map.roll(1), **options)


@pytest.mark.parametrize("kind", ["integers", "random"])
@pytest.mark.parametrize(
    "planted",
    [
        last_column_dropped, scale_off_by_0_1_percent, lanes_swapped, rounded_to_bfloat16,
        row_map_shifted,
    ],
)  # fmt: skip
def test_planted_bugs_of_the_read_out_are_caught(planted, kind):
    width = 2 * BLOCK_H + 9
    assert fused_is_right(run_fused, "dot", width, torch.bfloat16, kind)
    assert not fused_is_right(planted, "dot", width, torch.bfloat16, kind)


@pytest.mark.parametrize("arrival", ["reversed", "shuffled"])
def test_whoever_comes_last_gives_the_same_bits(arrival, monkeypatch):
    inputs = gradients("random", 40, torch.float32)
    straight = run_fused(*inputs)
    made = module.segment_tables

    def reordered(*arguments, **options):
        tables = made(*arguments, **options)
        n = len(tables.tiles)
        order = torch.arange(n).flip(0) if arrival == "reversed" else torch.randperm(n)
        tables.tiles.copy_(tables.tiles[order.to(DEVICE)])
        return tables

    monkeypatch.setattr(module, "segment_tables", reordered)
    assert all(torch.equal(a, b) for a, b in zip(run_fused(*inputs), straight, strict=True))


def test_every_output_is_written(monkeypatch):
    inputs = gradients("random", 40, torch.float32)
    expected = run_fused(*inputs)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    got = run_fused(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_at_all():
    nothing = torch.zeros(0, dtype=torch.float64, device=DEVICE)
    alpha, rewards = softmax_rewards(nothing, [], [], [], 3, 1.0, True)
    assert alpha.shape == (0,) and rewards.tolist() == [0.0, 0.0, 0.0]
    alpha, rewards = softmax_rewards(nothing, [0, 0], [1.0, 1.0], [0, 3], 3, 1.0, True)
    assert alpha.shape == (0,) and rewards.tolist() == [0.0, 0.0, 0.0]


B = torch.zeros(4, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((B, [3], [1.0], [0], 4, 1.0, False), InputError, "do not add up"),
        ((B, [4], [1.0], [1], 4, 1.0, False), InputError, "outside the rewards"),
        ((B, [4], [1.0], [-1], 4, 1.0, False), InputError, "outside the rewards"),
        ((B, [4], [], [0], 4, 1.0, False), InputError, "differ in number"),
        ((B.half(), [4], [1.0], [0], 4, 1.0, False), InputTypeError, "unusable dtype"),
    ],
)
def test_bad_segments_are_told_apart(arguments, error, message):
    with pytest.raises(error, match=message):
        softmax_rewards(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"readout": "linf"}, InputError, "unknown readout"),
        ({"embed": None}, InputTypeError, "needs embed and row_map"),
        ({"first_rows": [4, 5, 38, 0, 1]}, InputError, "grads does not have"),
        ({"scales": [1.0]}, InputError, "another number"),
        ({"row_map": torch.zeros(3, dtype=torch.int64, device=DEVICE)}, InputError, "row_map"),
    ],
)
def test_bad_gradients_are_told_apart(changes, error, message):
    grads, embed, row_map = gradients("integers", 8, torch.float32)
    inputs = {"grads": grads, "embed": embed, "row_map": row_map} | changes
    with pytest.raises(error, match=message):
        run_fused(**inputs)


def test_every_case_is_listed_once():
    for part, forms in ((module, 5), (softmax_module, 2)):
        names = [case.name for case in part.compile_cases()]
        assert len(names) == len(set(names)) == forms * 2 * 2
