"""Our side of the benchmarks: the only file here that imports g2r_fast's engine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.workload import Workload
from g2r_fast.decoder import FrozenDecoder
from g2r_fast.engine import PackedEngine
from g2r_fast.grad2reward import AttributionConfig, VerdictSignal
from g2r_fast.plan import PackedPlan, PackedSequence

__all__ = [
    "backend_of",
    "our_module",
    "ours",
    "ours_reference",
    "ours_saved_bytes",
    "reference_backend",
]

BACKEND = "G2R_BACKEND"


def ours(model: PreTrainedModel, workload: Workload) -> tuple[list[Tensor | None], Tensor]:
    """The workload through the packed engine, planning included; same contract as every rival.

    Nothing is kept from one call to the next.
    """
    spans = [(workload.span(i).start, workload.span(i).stop) for i, _ in workload.judgements]
    sequences = [
        PackedSequence(workload.sequence_ids(i, k), workload.span(i).start)
        for i, k in workload.judgements
    ]
    other_id = (workload.target_id + 1) % model.config.vocab_size  # log p does not read it
    signal = VerdictSignal(
        spans,
        workload.target_id,
        other_id,
        AttributionConfig(),
        workload.true_mask,
        None,
        model.device,
    )
    PackedEngine(model).run(sequences, signal)
    chosen = [j for j, true in enumerate(workload.true_mask) if true]
    found = dict(zip(chosen, signal.all_scores(chosen), strict=True))
    scores = [found.get(j) for j in range(len(sequences))]
    return scores, torch.tensor([signal.logps[j] for j in range(len(sequences))])


def ours_reference(
    model: PreTrainedModel, workload: Workload
) -> tuple[list[Tensor | None], Tensor]:
    """The same with the engine's plain PyTorch operations, whatever else is there."""
    with reference_backend():
        return ours(model, workload)


def our_module(name: str) -> Any:
    """`g2r_fast.NAME`; imported when it is asked for, so that rivals can be tested without it."""
    return importlib.import_module(f"g2r_fast.{name}")


def backend_of(model: PreTrainedModel) -> str:
    """What runs the engine's operations for this model, and with which instructions."""
    return str(FrozenDecoder(model).backend())


@contextmanager
def reference_backend() -> Iterator[None]:
    """Inside, the engine runs on plain PyTorch operations."""
    before = os.environ.get(BACKEND)
    os.environ[BACKEND] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND]
        else:
            os.environ[BACKEND] = before


def ours_saved_bytes(model: PreTrainedModel, rows: int) -> int:
    """Activation bytes that stay alive between forward and backward for one sequence of `rows`.

    Every row carries gradient, as in `saved_bytes` of test_activation_bytes.py.
    """
    plan = PackedPlan.build([PackedSequence([i % 64 for i in range(rows)], 0)])
    return FrozenDecoder(model).forward(plan).saved_bytes
