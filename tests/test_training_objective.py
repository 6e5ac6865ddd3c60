"""The clipped objective, against its definition token by token, and what it must not do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from g2r_fast.training.objective import kl_estimate, policy_loss, token_logps


def definition(
    logps: list[list[float]],
    old: list[list[float]],
    advantages: list[list[float]],
    low: float,
    high: float,
    reference: list[list[float]] | None = None,
    kl: float = 0.0,
    by_token: bool = False,
) -> float:
    """Eq. 10 as it stands, in Python floats; rows of any length."""
    rows = []
    for i, row in enumerate(logps):
        terms = []
        for t, logp in enumerate(row):
            ratio = math.exp(logp - old[i][t])
            a = advantages[i][t]
            term = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if reference is not None:
                difference = reference[i][t] - logp
                term -= kl * (math.exp(difference) - difference - 1)
            terms.append(term)
        rows.append(terms)
    if by_token:
        return -sum(map(sum, rows)) / max(1, sum(map(len, rows)))
    return -sum(sum(terms) / max(1, len(terms)) for terms in rows) / len(rows)


def padded(rows: list[list[float]], width: int, fill: float = 0.0) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


values = st.floats(-2.0, 2.0)
tokens = st.tuples(values, values, values, values)
ragged = st.lists(st.lists(tokens, max_size=5), min_size=1, max_size=4)


@given(ragged, st.floats(0.0, 0.9), st.floats(0.0, 0.9), st.floats(0.0, 1.0), st.booleans())
def test_is_the_equation(
    rows: list[list[tuple[float, ...]]], low: float, high: float, kl: float, by_token: bool
) -> None:
    parts = [[[token[k] for token in row] for row in rows] for k in range(4)]
    width = max(1, *map(len, rows))
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
    # What is padding may hold anything.
    fills = (-1e4, 1e4, math.nan, math.inf)
    logps, old, advantages, reference = (
        padded(part, width, fill) for part, fill in zip(parts, fills, strict=True)
    )
    logps.requires_grad_(True)
    loss = "token_mean" if by_token else "sequence_mean"
    options = {"clip_low": low, "clip_high": high, "loss": loss, "kl": kl}
    got = policy_loss(logps, old, advantages, mask, reference_logps=reference, **options)
    got.loss.backward()
    assert bool(logps.grad.isfinite().all()) and not bool(logps.grad[~mask].any())
    wanted = definition(*parts[:3], low, high, parts[3], kl, by_token)
    assert float(got.loss) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_gradient_is_that_of_the_unclipped_tokens() -> None:
    """By hand: d loss / d logp = -rho A / (T N), and 0 where the clip holds."""
    logps = torch.tensor([[0.0, 0.5, -0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0, 2.0, 2.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4)
    parts = policy_loss(logps, torch.zeros(1, 4, dtype=torch.float64), advantages, mask)
    parts.loss.backward()
    rho = logps.detach().exp()[0]
    # Too good already; too bad, and must come back; a bad token that got likelier must come back.
    expected = -torch.stack([rho[0] * 2, torch.tensor(0.0), rho[2] * 2, -rho[3]]) / 4
    torch.testing.assert_close(logps.grad[0], expected.double(), rtol=1e-12, atol=0)
    assert parts.clipped.tolist() == [[False, True, False, False]]


def test_at_ratio_one_it_is_the_policy_gradient() -> None:
    """Where the sampling policy is trained, gradients are those of -mean(A * logp)."""
    torch.manual_seed(0)
    logps = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    advantages, mask = torch.randn(3, 5, dtype=torch.float64), torch.ones(3, 5)
    loss = policy_loss(logps, logps.detach(), advantages, mask).loss
    (got,) = torch.autograd.grad(loss, logps)
    (wanted,) = torch.autograd.grad(-(advantages * logps).mean(1).mean(), logps)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_micro_batches_add_up() -> None:
    torch.manual_seed(1)
    logps, old, advantages = torch.randn(3, 4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.7
    for loss, count in (("sequence_mean", 4.0), ("token_mean", float(mask.sum()))):
        whole = policy_loss(logps, old, advantages, mask, loss=loss).loss
        parts = [
            policy_loss(
                logps[rows], old[rows], advantages[rows], mask[rows], loss=loss, normalizer=count
            ).loss
            for rows in ([0, 2], [1], [3])
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_token_logps_are_those_of_the_tempered_distribution() -> None:
    torch.manual_seed(2)
    logits, ids = torch.randn(2, 3, 7, dtype=torch.bfloat16), torch.randint(7, (2, 3))
    got = token_logps(logits, ids, temperature=0.7)
    wanted = (logits.double() / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=0)


def test_kl_estimate_is_unbiased() -> None:
    """Its mean under the policy is KL(policy || reference), exactly, over a small vocabulary."""
    torch.manual_seed(3)
    logps, reference = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    mean = (logps.exp() * kl_estimate(logps, reference)).sum()
    wanted = (logps.exp() * (logps - reference)).sum()
    torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=0)
    assert bool((kl_estimate(logps, reference) >= 0).all())
