"""From scores to rewards: one call for a batch says what one softmax after the other says."""

from __future__ import annotations

import math

import pytest
import torch
from native_arguments import Draw, attribution_rewards
from native_calls import native
from native_oracles import EXACT, ORACLES
from native_rules import judge, near
from torch import Tensor

from g2r_fast import native_ops, ops
from g2r_fast.alignment import Alignment
from g2r_fast.backends import VARIABLE, native_is_there
from g2r_fast.grad2reward import AttributionConfig, EmbeddingScores, softmax_attribution
from g2r_fast.judgements import Judgements
from g2r_fast.reader import EncodedResponse, Request
from g2r_fast.rewards import AttributionSummary, PolicyAttributions

__all__ = ["native"]

ROUNDING = 1e-14  # of a few hundred float64 operations
CPU = torch.device("cpu")
BACKENDS = ("native", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        request.getfixturevalue("native")
    monkeypatch.setenv(VARIABLE, request.param)
    assert native_is_there(CPU) == (request.param == "native")
    return request.param


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [False, True])
def test_the_op_is_its_definition(backend: str, standardise: bool) -> None:
    lengths = [5, 0, 1, 40, 300, 7]
    a = attribution_rewards(
        Draw(torch.float32, 1), lengths, temperature=2e-4, standardise=standardise
    )
    alpha, rewards = ops.attribution_rewards(
        a["scores"], lengths, a["weights"].tolist(), a["starts"].tolist(), a["count"],
        temperature=a["temperature"], standardise=standardise,
    )  # fmt: skip
    expected = ORACLES["attribution_rewards"](a, EXACT)
    got = {"alpha": alpha, "rewards": rewards}
    assert judge("attribution_rewards", a, got, expected) == {}


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(
    "scores",
    [
        [0.1, math.nan, 0.3],
        [0.1, math.inf, 0.3],
        [0.1, -math.inf, 0.3],
        [-math.inf, -math.inf],
        [math.nan],
        [0.0, 0.0],
        [5.0],
        [1.0, 1.0 + 1.9e-6],
        [1.0, 1.0 + 2.1e-6],
        [1e300, -1e300],
        [1e-300, 0.0],
    ],
    ids=str,
)
def test_odd_scores_are_what_they_are_alone(
    backend: str, scores: list[float], standardise: bool
) -> None:
    """NaN stays within its segment."""
    b = torch.tensor([0.25, 1.0, *scores, 2.0], dtype=torch.float64)
    lengths = [2, len(scores), 1]
    alpha, _ = ops.attribution_rewards(
        b, lengths, [1.0] * 3, [0] * 3, 9, temperature=0.7, standardise=standardise
    )
    config = AttributionConfig(tau=("auto", 0.7) if standardise else 0.7)
    expected = torch.cat([softmax_attribution(part, config) for part in b.split(lengths)])
    # The exponents of scores with hardly a spread are a million: 1e-9 is their rounding.
    torch.testing.assert_close(alpha, expected, rtol=1e-9, atol=0.0, equal_nan=True)


def test_nothing_at_all(backend: str) -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    alpha, rewards = ops.attribution_rewards(
        nothing, [], [], [], 3, temperature=1.0, standardise=True
    )
    assert alpha.shape == (0,) and rewards.tolist() == [0.0, 0.0, 0.0]


REASON = "not there"


def test_nothing_is_compiled_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(native_ops, "_loaded", False)
    monkeypatch.setattr(native_ops, "_reason", None)
    monkeypatch.setattr(native_ops, "_load", lambda build: asked.append(build) or REASON)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not native_is_there(CPU) and not native_is_there(torch.device("meta"))
    assert asked == [False]
    # Who may compile it asks again.
    assert native_ops.load() == REASON and asked == [False, True]


# --- on policy tokens -----------------------------------------------------------------------------

PROMPT = 3
# Of each response: its alignment, the attributed parts of the model's tokens, the policy's own.
RESPONSES = {
    "same tokens": (Alignment.from_index(range(9), 9), [(0, 9)], [(0, 9)]),
    "an end that is not read": (Alignment.from_index(range(6), 7), [(0, 6)], [(0, 7)]),
    "two spans": (Alignment.from_index(range(12), 12), [(1, 4), (7, 12)], [(1, 4), (7, 12)]),
    "one span": (Alignment.from_index(range(8), 8), [(2, 6)], [(2, 6)]),
    "spelled out": (Alignment.from_index([0, 1, 1, 1, 2, 3], 4), [(0, 6)], [(0, 4)]),
    "another vocabulary": (
        Alignment.from_spans([(0, 3), (3, 4), (4, 9)], [(0, 1), (1, 5), (5, 9)]),
        [(0, 3)],
        [(0, 3)],
    ),
    "spans of another vocabulary": (
        Alignment.from_spans([(0, 2), (2, 4), (4, 6), (6, 9)], [(0, 1), (1, 5), (5, 6), (6, 9)]),
        [(0, 1), (3, 4)],
        [(0, 1), (3, 4)],
    ),
    "nothing": (Alignment.from_index([], 0), [], [(0, 0)]),
    "nothing read": (Alignment.from_index([], 1), [], [(0, 1)]),
}
WEIGHTS = [2.0, -0.5, 1.0, 0.0]


def batch_and_signal(readout: str) -> tuple[Judgements, EmbeddingScores]:
    batch = Judgements([], [], [], [], [own for _, _, own in RESPONSES.values()])
    for alignment, parts, _ in RESPONSES.values():
        ids = list(range(alignment.judge_count))
        batch.responses.append(EncodedResponse(ids, alignment))
        first = len(batch.requests)
        for k in range(len(WEIGHTS)):
            spans = [(PROMPT + start, PROMPT + stop) for start, stop in parts]
            whole = (PROMPT, PROMPT + len(ids))
            batch.requests.append(Request([0] * (PROMPT + len(ids) + k), whole, spans))
        batch.items_of.append(range(first, len(batch.requests)))
    signal = EmbeddingScores(batch.attributed_spans(), readout, CPU)
    if readout != "uniform":
        for j, (start, stop) in enumerate(signal.spans):
            generator = torch.Generator().manual_seed(j)
            signal._scores[j] = torch.randn(stop - start, generator=generator)
            signal.scale[j] = 0.5 + j
    return batch, signal


def one_by_one(
    batch: Judgements, signal: EmbeddingScores, row: int, judgement: int, config: AttributionConfig
) -> Tensor:
    """alpha of one judgement per policy token: one softmax, then one alignment."""
    alignment, parts, own = list(RESPONSES.values())[row]
    scores, first = signal.scores(judgement), parts[0][0] if parts else 0
    inside = [scores[start - first : stop - first] for start, stop in parts] or [scores]
    alpha = softmax_attribution(torch.cat(inside), config)
    tokens = [token for start, stop in parts for token in range(start, stop)]
    if config.readout != "uniform":
        return alignment.to_policy(alpha, tokens, own)
    read = alignment.policy_tokens(tokens, own)
    return (
        torch.zeros(alignment.policy_count)
        .double()
        .index_fill_(0, torch.tensor(read, dtype=torch.int64), 1 / max(1, len(read)))
    )


@pytest.mark.parametrize("missing", [(), (1,), (0, 1, 2, 3), (5, 6, 7, 8, 20)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        AttributionConfig(tau=0.5),
        AttributionConfig(tau="auto"),
        AttributionConfig(readout="uniform"),
        AttributionConfig(readout="uniform", tau="auto"),
    ],
    ids=str,
)
def test_a_batch_is_its_judgements_one_by_one(
    backend: str, config: AttributionConfig, missing: tuple[int, ...]
) -> None:
    batch, signal = batch_and_signal(config.readout)
    weights = {
        j: weight
        for of in batch.items_of
        for j, weight in zip(of, WEIGHTS, strict=True)
        if j not in missing
    }
    summary = AttributionSummary(config)
    shares = PolicyAttributions(signal, batch, weights, config, summary)
    for row, of in enumerate(batch.items_of):
        true = {j: weights[j] for j in of if j in weights}
        alphas = {j: one_by_one(batch, signal, row, j, config) for j in true}
        zero = torch.zeros(batch.responses[row].token_count, dtype=torch.float64)
        for j, alpha in alphas.items():
            assert near(shares.alpha(j), alpha, limit=ROUNDING) is None
            assert torch.equal(shares.alpha(j) == 0, alpha == 0)
        for got, sign in (
            (shares.rewards(row), lambda weight: weight),
            (shares.magnitudes(row, true), abs),
        ):
            expected = sum((sign(true[j]) * alphas[j] for j in true), zero)
            assert near(got, expected, limit=ROUNDING) is None
    counted = sum(len(shares._alphas[j]) > 1 for j in weights)
    assert counted and len(summary._rows) == counted


def test_no_judgement_at_all(backend: str) -> None:
    batch, signal = batch_and_signal("dot")
    config = AttributionConfig()
    shares = PolicyAttributions(signal, batch, {}, config, AttributionSummary(config))
    for row, response in enumerate(batch.responses):
        assert shares.rewards(row).tolist() == [0.0] * response.token_count
        assert shares.magnitudes(row, {}).tolist() == [0.0] * response.token_count


@pytest.mark.parametrize(
    ("index", "identity"),
    [([], True), ([0], True), ([0, 1, 2], True), ([0, 0], False), ([1, 2], False)],
    ids=str,
)
def test_which_alignments_move_nothing(index: list[int], identity: bool) -> None:
    alignment = Alignment.from_index(index, 5)
    assert alignment.is_identity == identity
    values = torch.arange(1.0, len(index) + 1)
    assert torch.equal(alignment.to_policy(values)[: len(index)], values) == identity


def test_a_token_over_two_moves_something() -> None:
    assert Alignment.from_spans([(0, 1), (1, 2)], [(0, 1), (1, 2)]).is_identity
    assert not Alignment.from_spans([(0, 2)], [(0, 1), (1, 2)]).is_identity
