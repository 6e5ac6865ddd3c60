"""Grad2Reward (arXiv 2602.01791) as a signal: verdicts from logits, scores from gradients.

The scalar is an objective of the verdict, one per judgement that comes out True; the backward
stops at the input embeddings of the response; the read-out is one number per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import triton_scoring
from .cotangents import check_finite, objective_cotangents
from .errors import InputError
from .ops import attribution, embedding_scores
from .plan import Read
from .signal import Cotangents, LeafRows, ReadsNoLinears

__all__ = [
    "OBJECTIVES",
    "READOUTS",
    "AttributionConfig",
    "EmbeddingScores",
    "OutcomeSignal",
    "TargetSignal",
    "VerdictSignal",
    "softmax_attribution",
]

OBJECTIVES = ("logp", "logp_two_way", "logodds")
READOUTS = ("dot", "l1", "l2", "uniform")


@dataclass(frozen=True)
class AttributionConfig:
    """How a verdict becomes one weight per token.

    tau: temperature of the softmax over the response's tokens (Eq. 4); a positive number,
        `"auto"` (scores divided by their own standard deviation first) or `("auto", number)`.
    objective: the scalar that is differentiated. `"logp"`, log p(verdict) over the full vocabulary
        (Eq. 2); `"logp_two_way"`, the same over the two verdict words; `"logodds"`, their logit
        difference, which does not fade where the judge is sure.
    readout: what is read at an embedding e with gradient g. `"dot"`, g . e (Eq. 3); `"l1"` and
        `"l2"`, the norms of g (Eqs. 11, 12); `"uniform"`, no gradient: every token alike.

    Raises InputError for unknown names and a tau that is not positive and finite.
    """

    tau: float | str | tuple[str, float] = 1.0
    objective: str = "logp"
    readout: str = "dot"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("readout", self.readout, READOUTS),
        ):
            if value not in known:
                raise InputError(
                    f"unknown {name}", expected=" | ".join(map(repr, known)), got=repr(value)
                )
        temperature = self.temperature
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, (int, float))
            or not 0.0 < temperature < math.inf
        ):
            raise InputError(
                "tau cannot be used",
                expected='a positive number, "auto" or ("auto", number)',
                got=repr(self.tau),
            )

    @property
    def standardise(self) -> bool:
        return self.tau == "auto" or (isinstance(self.tau, tuple) and self.tau[:1] == ("auto",))

    @property
    def temperature(self) -> float:
        if self.tau == "auto":
            return 1.0
        if self.standardise and isinstance(self.tau, tuple) and len(self.tau) == 2:
            return self.tau[1]
        return self.tau  # type: ignore[return-value]  # __post_init__ refuses what is no number


def softmax_attribution(scores: Tensor, config: AttributionConfig) -> Tensor:
    """`softmax(b / tau)` over the response's tokens (arXiv 2602.01791, Eq. 4), `[T]`.

    Float64. With `tau="auto"` b is divided by its population standard deviation first; scores
    without spread (<= 1e-6 of the largest) give a uniform result. Empty scores give an empty one.
    """
    wide = scores.double()
    if config.readout == "uniform" or not len(scores):
        return torch.full_like(wide, 1.0 / max(1, len(scores)))
    return attribution(wide, config.temperature, config.standardise)


class EmbeddingScores(ReadsNoLinears):
    """Reads one score per token at the input embeddings, for some spans of some sequences."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        readout: str,
        device: torch.device,
        labels: Sequence[str] | None = None,
    ):
        self.spans = spans
        self.labels = labels  # what errors call a sequence
        self.readout = readout
        self.leaf = None if readout == "uniform" else 0
        self.device = device
        self.scale: dict[int, float] = {}
        self._scores: dict[int, Tensor] = {}

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        """`b = (grads * values).sum(-1)` or a norm of grads; arXiv 2602.01791, Eqs. 3, 11, 12."""
        wanted = [s for s in rows.lanes if self._overlap(rows, s) is not None]
        if not wanted:
            return
        scores = embedding_scores(values, grads, self.readout)
        for lane, sequence in enumerate(rows.lanes):
            overlap = self._overlap(rows, sequence)
            if overlap is None:
                continue
            start, stop = overlap
            first, last = self.spans[sequence]
            column = scores[start - rows.start : stop - rows.start, lane]
            if overlap == (first, last):
                self._scores[sequence] = column  # all of it: nothing to copy
                continue
            if sequence not in self._scores:
                self._scores[sequence] = scores.new_zeros(last - first)
            self._scores[sequence][start - first : stop - first] = column

    def scores(self, sequence: int) -> Tensor:
        """b `[stop - start]` of one sequence, at its own scale; float32 or wider."""
        return self.all_scores([sequence])[0]

    def all_scores(self, sequences: Sequence[int]) -> list[Tensor]:
        """`scores` of several sequences; the device is waited for once."""
        if not sequences:
            return []
        spans = [self.spans[sequence] for sequence in sequences]
        found = [
            self._scores[sequence]
            if sequence in self._scores
            else torch.zeros(last - first, device=self.device)
            for sequence, (first, last) in zip(sequences, spans, strict=True)
        ]
        lengths = [len(scores) for scores in found]
        flat = torch.cat(found)
        if not bool(torch.isfinite(flat).all()):
            first = next(i for i, one in enumerate(found) if not bool(torch.isfinite(one).all()))
            raise InputError(
                "the judge's gradients are not finite",
                index=self._label(sequences[first]),
                fix="float16 judges may need bfloat16 or float32.",
            )
        scales = [self.scale.get(sequence, 1.0) for sequence in sequences]
        factors = torch.tensor(scales, dtype=flat.dtype).repeat_interleave(torch.tensor(lengths))
        return list((flat * factors.to(flat.device)).split(lengths))

    def _label(self, sequence: int) -> str:
        return f"sequence {sequence}" if self.labels is None else self.labels[sequence]

    def _overlap(self, rows: LeafRows, sequence: int) -> tuple[int, int] | None:
        first, last = self.spans[sequence]
        start, stop = max(first, rows.start), min(last, rows.stop)
        return (start, stop) if start < stop else None


class TargetSignal(EmbeddingScores):
    """log p(target) at the last position of every sequence."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        target_ids: Sequence[int],
        readout: str,
        device: torch.device,
    ):
        super().__init__(spans, readout, device)
        self.target_ids = target_ids

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        target = torch.tensor([self.target_ids[r.sequence] for r in reads], device=logits.device)
        if triton_scoring.serves_logits(logits):
            found = triton_scoring.row_statistics(logits, target, None, "logp")
            finite, scales = torch.stack([found.finite, found.scale]).tolist()  # the only wait
            if not all(finite):
                check_finite(logits, reads, self.labels)
            self.scale.update(zip((read.sequence for read in reads), scales, strict=True))
            rows = range(len(reads))
            values = triton_scoring.objective_cotangents(logits, target, None, "logp", found, rows)
            return Cotangents(rows, values)
        check_finite(logits, reads, self.labels)
        values, scale = objective_cotangents(logits, target, None, "logp")
        for read, factor in zip(reads, scale.tolist(), strict=True):
            self.scale[read.sequence] = factor
        return Cotangents(range(len(reads)), values)


class VerdictSignal(EmbeddingScores):
    """Verdicts of every judgement, and the objective of those that come out True.

    A judgement is True as `given` says, where verdicts are given; where `uniforms` are, if its
    number is below the two-way probability `sigmoid(z_true - z_false)`; else if z_true > z_false.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        true_id: int,
        false_id: int,
        config: AttributionConfig,
        given: Sequence[bool] | None,
        uniforms: Sequence[float] | None,
        device: torch.device,
        labels: Sequence[str] | None = None,
    ):
        super().__init__(spans, config.readout, device, labels)
        self.true_id, self.false_id = true_id, false_id
        self.config = config
        self.given = given
        self.uniforms = uniforms
        self.verdicts: dict[int, bool] = {}
        self.logps: dict[int, float] = {}
        self.margins: dict[int, float] = {}  # z_true - z_false, the log-odds

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        if triton_scoring.serves_logits(logits):
            return self._on_device(logits, reads)
        check_finite(logits, reads, self.labels)
        margin = (logits[:, self.true_id] - logits[:, self.false_id]).tolist()
        chosen = self._chosen(reads, margin, _log_probability(logits, self.true_id).tolist())
        if not chosen:
            return None
        rows = logits[torch.tensor(chosen, device=logits.device)]
        target = torch.full((len(chosen),), self.true_id, device=logits.device)
        other = torch.full((len(chosen),), self.false_id, device=logits.device)
        values, scale = objective_cotangents(rows, target, other, self.config.objective)
        for i, factor in zip(chosen, scale.tolist(), strict=True):
            self.scale[reads[i].sequence] = factor
        return Cotangents(chosen, values)

    def _on_device(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        """The same with one pass over all logits, one over the chosen ones, and one wait."""
        objective = self.config.objective
        target = torch.full((len(reads),), self.true_id, device=logits.device)
        other = torch.full((len(reads),), self.false_id, device=logits.device)
        found = triton_scoring.row_statistics(logits, target, other, objective)
        wanted = [found.finite, found.margin, found.logp, found.scale]
        finite, margin, logps, scale = torch.stack(wanted).tolist()
        if not all(finite):
            check_finite(logits, reads, self.labels)
        chosen = self._chosen(reads, margin, logps)
        if not chosen:
            return None
        for i in chosen:
            self.scale[reads[i].sequence] = scale[i]
        values = triton_scoring.objective_cotangents(
            logits, target, other, objective, found, chosen
        )
        return Cotangents(chosen, values)

    def _chosen(
        self, reads: Sequence[Read], margin: Sequence[float], logps: Sequence[float]
    ) -> list[int]:
        """Takes down every verdict; the reads that something comes back from."""
        chosen = []
        for i, read in enumerate(reads):
            at = read.sequence
            self.logps[at], self.margins[at] = logps[i], margin[i]
            self.verdicts[at] = self._verdict(at, margin[i])
            start, stop = self.spans[at]
            if self.verdicts[at] and start < stop and self.readout != "uniform":
                chosen.append(i)
        return chosen

    def _verdict(self, sequence: int, margin: float) -> bool:
        if self.given is not None:
            return bool(self.given[sequence])
        if self.uniforms is not None:
            return self.uniforms[sequence] < 1.0 / (1.0 + math.exp(min(-margin, 700.0)))
        return margin > 0  # a tie is False


class OutcomeSignal(EmbeddingScores):
    """The value V of a reward model, which has one output; arXiv 2602.01791, Eq. 14."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        readout: str,
        device: torch.device,
        labels: Sequence[str] | None = None,
    ):
        super().__init__(spans, readout, device, labels)
        self.values: dict[int, float] = {}

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        check_finite(logits, reads, self.labels)
        for read, value in zip(reads, logits[:, 0].tolist(), strict=True):
            self.values[read.sequence] = value
        spans = [self.spans[read.sequence] for read in reads]
        chosen = [i for i, (start, stop) in enumerate(spans) if start < stop]
        if not chosen or self.readout == "uniform":
            return None
        return Cotangents(chosen, logits.new_ones(len(chosen), 1))


def _log_probability(logits: Tensor, token_id: int) -> Tensor:
    """`log_softmax(logits)[:, token_id]` with all its digits when the probability is near one."""
    others = logits.clone()
    others[:, token_id] = -torch.inf
    return -torch.nn.functional.softplus(others.logsumexp(-1) - logits[:, token_id])
