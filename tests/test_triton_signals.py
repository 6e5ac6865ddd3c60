"""The signals that call kernels, on a device: they say what they say on the CPU.

Under the interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast import triton_scoring
from g2r_fast.backends import VARIABLE
from g2r_fast.errors import InputError
from g2r_fast.grad2reward import OBJECTIVES, AttributionConfig, TargetSignal, VerdictSignal
from g2r_fast.plan import Read
from g2r_fast.reference_logps import WithReference
from g2r_fast.rewards import AttributionSummary, _figures
from g2r_fast.rollouts import Rollout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V = 50


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    assert triton_scoring.serves(DEVICE)


def test_who_is_served(monkeypatch):
    for wanted, served in (("triton", True), ("reference", False)):
        monkeypatch.setenv(VARIABLE, wanted)
        assert triton_scoring.serves(DEVICE) == served
        assert not triton_scoring.serves(torch.device("meta"))
        assert not triton_scoring.serves_logits(torch.zeros(1, 1, device=DEVICE).double())
    monkeypatch.delenv(VARIABLE)
    assert triton_scoring.serves(DEVICE) == (DEVICE.type == "cuda")


def verdict_signal(config, given=None, uniforms=None):
    spans = [(2, 5), (2, 2), (1, 4), (0, 3)]
    return VerdictSignal(spans, 7, 3, config, given, uniforms, DEVICE)


def asked(signal, logits):
    reads = [Read(sequence, 9, 0, 9) for sequence in (2, 0, 1, 3)]
    return signal.cotangents(logits.to(DEVICE), reads)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["argmax", "given", "sample", "uniform", "none"])
def test_verdicts_are_those_of_the_cpu(objective, kind, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, V, generator=generator) * 3
    logits[:, 7] = logits[:, 3] + torch.tensor([4.0, -1.0, 2.0, 0.0])  # the last is a tie: False
    if kind == "none":
        logits[:, 7] = -9.0
    config = AttributionConfig(
        objective=objective, readout="uniform" if kind == "uniform" else "dot"
    )
    given = [True, False, True, True] if kind == "given" else None
    uniforms = [0.1, 0.9, 0.5, 0.99] if kind == "sample" else None
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        signal = verdict_signal(config, given, uniforms)
        found.append((signal, asked(signal, logits)))
    (plain, expected), (signal, got) = found
    assert signal.verdicts == plain.verdicts and signal.margins == plain.margins
    for at, logp in plain.logps.items():
        assert math.isclose(signal.logps[at], logp, rel_tol=2e-6)
    assert signal.scale.keys() == plain.scale.keys()
    for at, scale in plain.scale.items():
        assert math.isclose(signal.scale[at], scale, rel_tol=2e-6)
    assert (got is None) == (expected is None) == (kind in ("uniform", "none"))
    if got is not None:
        assert list(got.reads) == list(expected.reads)
        assert got.values.dtype == torch.float32
        torch.testing.assert_close(got.values, expected.values, rtol=4e-6, atol=0.0)


def test_a_target_is_that_of_the_cpu(monkeypatch):
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    reads = [Read(1, 9, 0, 9), Read(0, 9, 0, 9)]
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        signal = TargetSignal([(0, 2), (0, 2)], [4, V - 1], "dot", DEVICE)
        found.append((signal.cotangents(logits.to(DEVICE), reads).values, signal.scale))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=4e-6, atol=0.0)
    for at, scale in found[0][1].items():
        assert math.isclose(found[1][1][at], scale, rel_tol=2e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_raise(odd, kernels):
    logits = torch.zeros(4, V)
    logits[1, V - 1] = odd
    with pytest.raises(InputError, match=r"logits are not finite.*first at sequence 0"):
        asked(verdict_signal(AttributionConfig()), logits)
    with pytest.raises(InputError, match="logits are not finite"):
        signal = TargetSignal([(0, 2)] * 4, [0] * 4, "dot", DEVICE)
        asked(signal, logits)
    with pytest.raises(InputError, match="row 1"):
        read_references(logits, [Rollout([1, 2], [3, 4]), Rollout([1], [5, 6], "row 1")], 1.0)


def read_references(logits, rollouts, temperature):
    inner = verdict_signal(AttributionConfig())
    signal = WithReference(inner, 4, rollouts, temperature)
    reads = [
        Read(4 + i, position, 0, position)
        for i, sequence in enumerate(signal.sequences)
        for position in sequence.reads
    ]
    if len(rollouts) == 2 and len(logits) == 4:
        logits = logits[[2, 3, 0, 1]]
    assert signal.cotangents(logits.to(DEVICE), reads) is None
    return signal.logps(DEVICE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_logps_are_those_of_the_cpu(temperature, monkeypatch):
    rollouts = [Rollout([1, 2], [3, 4, 49]), Rollout([1], []), Rollout([5], [0, 6])]
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(2)) * 4
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        found.append(read_references(logits, rollouts, temperature))
    assert [len(row) for row in found[1]] == [3, 0, 2]
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=4e-6, atol=0.0)


def test_figures_of_a_batch_are_those_one_by_one():
    generator = torch.Generator().manual_seed(5)
    alphas = [
        (3 * torch.randn(n, generator=generator).double()).softmax(0) for n in (40, 11, 10, 9, 2, 7)
    ]
    alphas.append(torch.tensor([0.0, 1.0, 0.0]).double())
    one_by_one = AttributionSummary(AttributionConfig())
    for alpha in alphas:
        one_by_one.add(alpha)
    figures = _figures([alpha.to(DEVICE) for alpha in alphas]).cpu()
    torch.testing.assert_close(figures, torch.stack(one_by_one._rows), rtol=1e-14, atol=0.0)
