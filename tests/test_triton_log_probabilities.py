"""Log-probabilities, entropies and cotangents of logits rows against float64 definitions.

Under the interpreter, or on a GPU if there is one. Rows whose exponentials are 0 and 1 give equal
bits, random rows stay within the forward-error bound, and both rules catch planted bugs.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import log_probabilities as module
from g2r_fast.kernels import objective_cotangents as cotangents_module
from g2r_fast.kernels.log_probabilities import CONFIG, OBJECTIVES, log_probabilities
from g2r_fast.kernels.objective_cotangents import objective_cotangents

from g2r_fast.cotangents import objective_cotangents as definition
from g2r_fast.errors import InputError, InputTypeError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = 2.0**-24
BLOCK_V = CONFIG.blocks["BLOCK_V"]
# One word; two; one short of a step; a step and a word; three steps and a bit.
SIZES = [1, 2, BLOCK_V - 1, BLOCK_V + 1, 3 * BLOCK_V + 17]


def inputs(kind, V, dtype):
    """Logits inside memory that is NaN elsewhere, and two ids a row."""
    generator = torch.Generator().manual_seed(V)
    rows = 7
    if kind == "integers":
        # Words at zero and words that have no probability in float32, nor in the sums.
        z = torch.where(torch.rand(rows, V, generator=generator) < 0.5, 0.0, -1000.0)
        z[:, 0] = 0.0
    else:
        z = torch.randn(rows, V, generator=generator) * torch.tensor([[0.1], [1], [3], [8]] * 2)[:7]
    ids = torch.randint(0, V, (rows,), generator=generator)
    other = torch.randint(0, V, (rows,), generator=generator)
    ids[0], other[0] = V - 1, 0
    if kind == "random":
        z[1, ids[1]] = 30.0  # sure: log p near 0
        z[2] -= 200.0
    else:
        z[1], z[1, ids[1]] = -1000.0, 0.0
        z[torch.arange(rows), ids] = 0.0
    memory = torch.full((rows + 1, V + 5), math.nan, dtype=dtype)
    memory[:rows, :V] = z.to(dtype)
    return memory.to(DEVICE)[:rows, :V], ids.to(DEVICE), other.to(DEVICE)


def logsumexp_without(z, ids, others=None):
    z = z.clone()
    z[torch.arange(len(z)), ids] = -torch.inf
    return z.logsumexp(-1)


def truth(logits, ids, other, temperature=1.0):
    z = logits.cpu().double() / temperature
    rows = torch.arange(len(z))
    found = {"lse": z.logsumexp(-1)}
    for name, at in (("logp", ids.cpu()), ("other_logp", other.cpu())):
        against = logsumexp_without(z, at)
        found[name] = -torch.nn.functional.softplus(against - z[rows, at])
        # softplus is linear beyond 20, and exp underflows nowhere near where it matters.
        sure = z[rows, at] - against > 18
        found[name] = torch.where(sure, -torch.log1p(torch.exp(against - z[rows, at])), found[name])
        found["against" if name == "logp" else "_"] = against
    logps = z - found["lse"][:, None]
    found["entropy"] = -(logps.exp() * torch.where(logps < -700, 0.0, logps)).sum(-1)
    found["margin"] = z[rows, ids.cpu()] - z[rows, other.cpu()]
    return found


def chain(V):
    """Roundings of a word's exponential, on its way through the sums, and of its exponent."""
    return 8 + math.ceil(V / BLOCK_V) + math.ceil(math.log2(BLOCK_V))


def within_bound(run, V, dtype, temperature=1.0):
    logits, ids, other = inputs("random", V, dtype)
    got = run(logits, ids, other, temperature=temperature, entropy=True)
    expected = truth(logits, ids, other, temperature)
    z = logits.cpu().double() / temperature
    # A logit is rounded when it is divided, its distance to the maximum when it is exponentiated.
    noise = UNIT * (chain(V) + 4 * z.abs().amax(-1))
    fine = [bool(got.finite.bool().all())]
    for name, size in (
        ("logp", -torch.expm1(expected["logp"])),
        ("other_logp", -torch.expm1(expected["other_logp"])),
        ("margin", torch.ones(())),
    ):
        error = (getattr(got, name).cpu().double() - expected[name]).abs()
        fine.append(bool((error <= 2 * UNIT * expected[name].abs() + 2 * noise * size).all()))
    error = (got.logsumexp.cpu().double() - expected["lse"]).abs()
    fine.append(bool((error <= UNIT * expected["lse"].abs() + noise).all()))
    logps = z - expected["lse"][:, None]
    size = 1 + (logps.exp() * logps.abs() * (1 + logps.abs())).sum(-1)
    error = (got.entropy.cpu().double() - expected["entropy"]).abs()
    fine.append(bool((error <= 2 * noise * size).all()))
    fine.append(V == 1 or float(got.logp.norm()) > 0)
    return all(fine)


def equal_bits(run, V, dtype):
    """Every exponential is 0 or 1: the sums are counts, and only one rounding is left."""
    logits, ids, other = inputs("integers", V, dtype)
    got = run(logits, ids, other, temperature=1.0, entropy=True)
    expected = truth(logits, ids, other)
    names = {"logp": "logp", "logsumexp": "lse", "entropy": "entropy", "margin": "margin"}
    names |= {"against": "against", "other_logp": "other_logp"}
    return bool(got.finite.all()) and all(
        torch.equal(getattr(got, name).cpu(), expected[wanted].float())
        for name, wanted in names.items()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", SIZES)
def test_rows_are_their_definition(V, dtype):
    assert within_bound(log_probabilities, V, dtype)
    assert within_bound(log_probabilities, V, dtype, temperature=0.7)
    assert equal_bits(log_probabilities, V, dtype)


def test_a_sure_judge_keeps_all_its_digits():
    """Where 1 - p is below float32's last place, log p is that small and not 0."""
    for gap in (5.0, 16.0, 25.0, 40.0, 80.0):
        z = torch.zeros(1, 9, device=DEVICE)
        z[0, 4] = gap
        four = torch.tensor([4], device=DEVICE)
        got = log_probabilities(z, four, four - 1, objective="logp", entropy=True)
        wanted = math.log1p(8 * math.exp(-gap))
        assert math.isclose(-got.logp.item(), wanted, rel_tol=1e-6)
        assert math.isclose(got.scale.item(), -math.expm1(-wanted), rel_tol=1e-6)
        q = math.exp(-wanted - gap)
        entropy = 8 * q * (gap + wanted) + math.exp(-wanted) * wanted
        assert math.isclose(got.entropy.item(), entropy, rel_tol=1e-6)


def all_zero(logits, ids, other, **options):
    found = log_probabilities(logits, ids, other, **options)
    return module.RowStatistics(*(torch.zeros_like(part) for part in found[:-1]), found.finite)


def last_word_dropped(logits, ids, other, **options):
    V = logits.shape[1] - 1
    return log_probabilities(logits[:, :-1], ids.clamp(max=V - 1), other, **options)


def logp_off_by_0_1_percent(logits, ids, other, **options):
    found = log_probabilities(logits, ids, other, **options)
    return found._replace(logp=found.logp * 1.001)


def entropy_off_by_0_1_percent(logits, ids, other, **options):
    found = log_probabilities(logits, ids, other, **options)
    return found._replace(entropy=found.entropy * 1.001)


def ids_swapped(logits, ids, other, **options):
    return log_probabilities(logits, other, ids, **options)


def rows_swapped(logits, ids, other, **options):
    order = [1, 0, 2, 3, 4, 5, 6]
    found = log_probabilities(logits, ids, other, **options)
    return module.RowStatistics(*(part[order] for part in found))


def temperature_inverted(logits, ids, other, temperature=1.0, **options):
    return log_probabilities(logits, ids, other, temperature=1 / temperature, **options)


def one_minus_p(logits, ids, other, **options):
    """What a softmax in float32 has left of a sure judge's log p."""
    found = log_probabilities(logits, ids, other, **options)
    return found._replace(logp=found.logp.exp().log())


@pytest.mark.parametrize(
    "planted",
    [
        all_zero, last_word_dropped, logp_off_by_0_1_percent, entropy_off_by_0_1_percent,
        ids_swapped, rows_swapped, one_minus_p,
    ],
)  # fmt: skip
def test_planted_bugs_are_caught(planted):
    V = 3 * BLOCK_V + 17
    assert not within_bound(planted, V, torch.float32)
    if planted is not one_minus_p:
        assert not equal_bits(planted, V, torch.float32)
    assert not within_bound(temperature_inverted, V, torch.float32, temperature=0.7)


@settings(max_examples=25)
@given(
    z=st.lists(st.floats(-50, 50, width=16), min_size=1, max_size=12),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    data=st.data(),
)
def test_any_row(z, temperature, data):
    one, two = (data.draw(st.integers(0, len(z) - 1)) for _ in range(2))
    logits = torch.tensor([z], device=DEVICE)
    ids, other = torch.tensor([one]).to(DEVICE), torch.tensor([two]).to(DEVICE)
    got = log_probabilities(logits, ids, other, temperature=temperature, entropy=True)
    expected = truth(logits, ids, other, temperature)
    noise = UNIT * (chain(len(z)) + 8 * max(map(abs, z)) / temperature)
    for name in ("logp", "other_logp"):
        error = (getattr(got, name).cpu().double() - expected[name]).abs()
        bound = 2 * UNIT * expected[name].abs() - noise * torch.expm1(expected[name])
        assert (error <= 2 * bound).all()
    assert (got.entropy.cpu().double() - expected["entropy"]).abs() <= 100 * noise
    assert got.entropy.item() >= 0.0 >= got.logp.item()


def test_rows_are_chosen_and_ids_may_be_32_bit():
    logits, ids, other = inputs("random", 40, torch.float32)
    rows = torch.tensor([6, 0, 6], device=DEVICE)
    whole = log_probabilities(logits, ids, other)
    got = log_probabilities(logits, ids[rows].int(), other[rows].int(), rows=rows.int())
    for a, b in zip(got, whole, strict=True):
        torch.testing.assert_close(a, b[rows], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, BLOCK_V])
def test_rows_that_are_not_finite_are_told(odd, at):
    logits = torch.zeros(3, BLOCK_V + 1, device=DEVICE)
    logits[1, at] = odd
    ids = torch.tensor([3, 3, 3], device=DEVICE)
    got = log_probabilities(logits, ids, ids - 3, entropy=True)
    assert got.finite.tolist() == [1.0, 0.0, 1.0]
    for part in got:
        assert part[[0, 2]].isfinite().all()


def test_words_out_of_the_vocabulary_are_not_read_at():
    memory = torch.zeros(3, 30, device=DEVICE)
    memory[:, 20:] = 7.0
    ids = torch.tensor([-1, 20, 2**40], device=DEVICE)
    got = log_probabilities(memory[:, :20], ids, torch.zeros_like(ids))
    assert got.logp.isnan().all() and got.margin.isnan().all()
    assert got.finite.tolist() == [1.0, 1.0, 1.0]
    got = log_probabilities(memory[:, :20], torch.zeros_like(ids), ids)
    assert got.other_logp.isnan().all()
    values = objective_cotangents(
        memory[:, :20], ids, torch.full((3,), math.log(20.0), device=DEVICE), ids * 0
    )
    torch.testing.assert_close(values, torch.full((3, 20), -0.05, device=DEVICE))


# --- cotangents -----------------------------------------------------------------------------------


def cotangents_are_right(run, objective, V, dtype):
    logits, ids, other = inputs("random", V, dtype)
    two = None if objective == "logp" else other
    found = log_probabilities(logits, ids, two, objective=objective)
    rows = torch.tensor([1, 5, 0], device=DEVICE)
    got = run(logits, ids, found.against, rows, two, objective=objective)
    z = logits.double().cpu()
    values, scale = definition(z, ids.cpu(), other.cpu(), objective)
    expected = values[rows.cpu()]
    # exp of an exponent that is rounded once as a number and once as a difference.
    noise = UNIT * (chain(V) + 4 * z.abs().amax(-1) + found.against.cpu().double().abs())
    error = (found.scale.cpu().double() - scale).abs()
    fine = [bool((error <= 2 * noise * scale).all())]
    size = expected.abs()
    error = (got.cpu().double() - expected).abs()
    depth = 1 - expected.abs().clamp(min=1e-300).log()  # an exponent's rounding grows with it
    fine.append(bool((error <= 3 * noise[rows.cpu()][:, None] * size * depth).all()))
    return all(fine) and got.dtype == torch.float32 and (V == 1 or float(got.norm()) > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("V", SIZES[1:])
def test_cotangents_are_their_definition(V, objective, dtype):
    assert cotangents_are_right(objective_cotangents, objective, V, dtype)


def test_integer_cotangents_give_equal_bits():
    z = torch.zeros(4, 9, device=DEVICE)
    ids, other = torch.tensor([0, 8, 4, 4]).to(DEVICE), torch.tensor([1, 0, 4, 8]).to(DEVICE)
    rows = torch.tensor([3, 0, 2, 1], device=DEVICE)
    found = log_probabilities(z, ids, other, objective="logp_two_way")
    for objective in OBJECTIVES[1:]:
        got = objective_cotangents(z, ids, found.against, rows, other, objective=objective)
        expected, scale = definition(z, ids, other, objective)
        if objective == "logp_two_way":
            assert torch.equal(found.scale, scale)
        assert torch.equal(got, expected[rows])


def cotangent_zero(*arguments, **options):
    return torch.zeros_like(objective_cotangents(*arguments, **options))


def cotangent_off_by_0_1_percent(*arguments, **options):
    return objective_cotangents(*arguments, **options) * 1.001


def id_not_set(logits, ids, against, rows, other, **options):
    return objective_cotangents(logits, (ids + 1) % 2, against, rows, other, **options)


def row_off_by_one(logits, ids, against, rows, other, **options):
    return objective_cotangents(logits, ids, against, (rows + 1) % 7, other, **options)


def against_all_words(logits, ids, against, rows, other, **options):
    lse = log_probabilities(logits, ids).logsumexp
    return objective_cotangents(logits, ids, lse, rows, other, **options)


@pytest.mark.parametrize("objective", ["logp", "logodds"])
@pytest.mark.parametrize(
    "planted",
    [cotangent_zero, cotangent_off_by_0_1_percent, id_not_set, row_off_by_one, against_all_words],
)
def test_planted_cotangents_are_caught(planted, objective):
    if planted is against_all_words and objective == "logodds":
        objective = "logp"  # the other objectives do not read it
    V = BLOCK_V + 1
    assert cotangents_are_right(objective_cotangents, objective, V, torch.float32)
    assert not cotangents_are_right(planted, objective, V, torch.float32)


# --- both -----------------------------------------------------------------------------------------


def test_every_output_is_written(monkeypatch):
    logits, ids, other = inputs("random", BLOCK_V + 1, torch.float32)
    rows = torch.arange(7, device=DEVICE)
    expected = log_probabilities(logits, ids, other, entropy=True, objective="logp")
    values = objective_cotangents(logits, ids, expected.against, rows)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    got = log_probabilities(logits, ids, other, entropy=True, objective="logp")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(objective_cotangents(logits, ids, got.against, rows), values)


def test_no_rows():
    logits = torch.zeros(0, 5, device=DEVICE)
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    found = log_probabilities(logits, ids)
    assert all(part.shape == (0,) for part in found)
    assert objective_cotangents(logits, ids, found.against, ids).shape == (0, 5)


Z = torch.zeros(2, 5, device=DEVICE)
I = torch.zeros(2, dtype=torch.int64, device=DEVICE)  # noqa: E741


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z.double(), I), {}, InputTypeError, "logits has an unusable dtype"),
        ((Z, I.float()), {}, InputTypeError, "ids has an unusable dtype"),
        ((Z, I[:1]), {}, InputError, "ids must be contiguous"),
        ((Z, I, I[:1]), {}, InputError, "other_ids must be contiguous"),
        ((Z, I), {"rows": I[:1]}, InputError, "rows must be contiguous"),
        ((Z[:, ::2], I), {}, InputError, "contiguous columns"),
        ((Z, I), {"temperature": 0.0}, InputError, "temperature is not positive"),
        ((Z, I), {"objective": "p"}, InputError, "unknown objective"),
        ((Z, I), {"objective": "logp_two_way"}, InputTypeError, "needs other_ids"),
    ],
)
def test_bad_arguments_are_told_apart(arguments, options, error, message):
    with pytest.raises(error, match=message):
        log_probabilities(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z, I, Z[0, :2].double(), I), {}, InputError, "against must be float32"),
        ((Z, I, Z[0, :1], I), {}, InputError, "against must be float32"),
        ((Z, I, Z[0, :2], I.float()), {}, InputTypeError, "rows has an unusable dtype"),
        ((Z, I, Z[0, :2], I), {"objective": "logp_two_way"}, InputTypeError, "needs other_ids"),
    ],
)
def test_bad_cotangents_are_told_apart(arguments, options, error, message):
    with pytest.raises(error, match=message):
        objective_cotangents(*arguments, **options)


def test_every_case_is_listed_once():
    for part, count in ((module, 9 * 3), (cotangents_module, 3 + 1 + 1)):
        names = [case.name for case in part.compile_cases()]
        assert len(names) == len(set(names)) == count
