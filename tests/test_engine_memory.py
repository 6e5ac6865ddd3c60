"""The packed engine's memory: what is announced, what runs out, and what is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_scores import FLOAT32, scores, worst
from patterns import PATTERNS, Batch, group
from tiny_models import VARIANTS, random_ids, tiny_model, tiny_variant
from torch import Tensor

from g2r_fast.decoder import FrozenDecoder
from g2r_fast.engine import PackedEngine
from g2r_fast.errors import InputError
from g2r_fast.grad2reward import AttributionConfig, TargetSignal, VerdictSignal
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.signal import LeafRows


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_the_bytes_that_were_announced(variant: str, dtype: torch.dtype) -> None:
    decoder = FrozenDecoder(tiny_variant(variant, dtype=dtype))
    for pattern in PATTERNS.values():
        batch = pattern()
        plan = PackedPlan.build(
            PackedSequence(ids, start)
            for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
        )
        assert decoder.forward(plan).saved_bytes == plan.saved_bytes(decoder.shape)
        reading = decoder.forward(plan, keep_linears=True)
        assert reading.saved_bytes == plan.saved_bytes(decoder.shape_for(reads_linears=True))


def test_nothing_uninitialised_is_read() -> None:
    """torch.empty comes filled with NaN here; one value that leaked would show."""
    model, batch = tiny_model("qwen3"), group()
    expected = scores(model, batch)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = scores(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(poisoned, expected, strict=True):
        assert torch.equal(a, e)


def test_a_readout_without_gradients_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("qwen3"), group()
    sequences = [
        PackedSequence(ids, start)
        for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
    ]
    run = FrozenDecoder.run
    plans: list[PackedPlan] = []

    def watched(self: FrozenDecoder, plan: PackedPlan, signal: Any) -> int:
        plans.append(plan)
        return run(self, plan, signal)

    monkeypatch.setattr(FrozenDecoder, "run", watched)
    found = []
    for readout in ("dot", "uniform"):
        config, given = AttributionConfig(readout=readout), [True] * len(sequences)
        signal = VerdictSignal(batch.spans, 5, 6, config, given, None, model.device)
        done = PackedEngine(model).run(sequences, signal)
        assert bool(done.rows_backward) == (readout == "dot")
        found.append(signal.margins)
    kept, nothing = plans
    assert kept.saved_rows > 0 and nothing.saved_rows == 0 and kept.rows == nothing.rows
    for sequence, value in found[0].items():
        assert found[1][sequence] == pytest.approx(value, rel=1e-5)


def mixed() -> Batch:
    """Short rows, one long one, and rows that nothing comes back to."""
    ids = random_ids(60, 9).tolist()
    short = [[*ids[:4], *random_ids(5, 300 + i).tolist()] for i in range(12)]
    spans = [(4, 9)] * 12
    return Batch([*short, ids, short[0], short[0]], [*spans, (10, 50), (9, 9), (9, 9)], [3] * 15)


@pytest.mark.parametrize("limit", [120, 60])
@pytest.mark.parametrize("pattern", ["group", "mixed"])
def test_running_out_of_cuda_memory_halves_and_goes_on(
    pattern: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("llama"), {"group": group, "mixed": mixed}[pattern]()
    expected = scores(model, batch)
    run = FrozenDecoder.run
    sizes = []

    def limited(self: FrozenDecoder, plan: PackedPlan, signal: Any) -> int:
        sizes.append(plan.rows + plan.backward_rows)
        done = run(self, plan, signal)
        # Late, so that half a batch's scores are there already; one sequence always fits.
        if sizes[-1] > limit and len(plan.sequences) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return done

    monkeypatch.setattr(FrozenDecoder, "run", limited)
    with pytest.warns(ResourceWarning, match="going on with half of its"):
        actual = scores(model, batch)
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if len(e)]
    assert worst(*zip(*pairs, strict=True)) <= FLOAT32
    assert max(sizes) > limit and len(sizes) < 3 * len(batch.input_ids)


def test_out_of_memory_ends_where_no_row_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal sequences that nothing comes back to need as many rows together as alone."""
    ids = random_ids(9, 1).tolist()
    batch = Batch([ids] * 5, [(9, 9)] * 5, [3] * 5)
    calls = []

    def never(self: FrozenDecoder, plan: PackedPlan, signal: Any) -> int:
        calls.append(len(plan.sequences))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FrozenDecoder, "run", never)
    with (
        pytest.warns(ResourceWarning),
        pytest.raises(InputError, match="out of CUDA memory with a single sequence"),
    ):
        scores(tiny_model("llama"), batch)
    assert len(calls) <= 4


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_gradients_that_are_not_finite_are_named(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_leaf = TargetSignal.on_leaf

    def broken(self: TargetSignal, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        on_leaf(self, rows, values, grads * (torch.inf if 2 in rows.lanes else 1.0))

    monkeypatch.setattr(TargetSignal, "on_leaf", broken)
    batch = Batch(*(part[:3] for part in (group().input_ids, group().spans, group().target_ids)))
    with pytest.raises(InputError, match=r"gradients are not finite; first at sequence \d"):
        scores(tiny_model("llama"), batch, engine)


def test_large_float16_gradients_come_back_finite() -> None:
    """Tiny embeddings mean huge gradients: the autograd engine's head room goes the other way."""
    model = tiny_model("llama", dtype=torch.float16)
    model.model.embed_tokens.weight.mul_(1e-3)
    batch = group()
    for engine in ("packed", "autograd"):
        for score in scores(model, batch, engine):
            assert torch.isfinite(score).all() and score.norm() > 0


def test_out_of_cuda_memory_with_one_sequence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: FrozenDecoder, plan: PackedPlan, signal: Any) -> int:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FrozenDecoder, "run", never)
    with pytest.raises(InputError, match="out of CUDA memory with a single sequence"):
        scores(tiny_model("llama"), PATTERNS["alone"]())


def test_max_tokens_below_one_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="one sequence needs more rows than max_tokens"):
        scores(tiny_model("llama"), group(), max_tokens=10)


def test_the_engine_counts_what_it_ran() -> None:
    batch = group()
    plan = PackedPlan.build(
        PackedSequence(ids, start)
        for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
    )
    signal = TargetSignal(batch.spans, batch.target_ids, "dot", torch.device("cpu"))
    run = PackedEngine(tiny_model("llama")).run(list(plan.sequences), signal)
    assert (run.rows_forward, run.rows_backward) == (plan.rows, plan.backward_rows)
    assert (run.rows_unshared, run.micro_batches) == (plan.unshared_rows, 1)
