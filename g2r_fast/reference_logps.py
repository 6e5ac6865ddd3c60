"""Log-probabilities of the policy's tokens under the judge, from the forward that judges them.

Where a judge continues the rollout itself (scaffold "continuation") and is the frozen initial
policy, its pass over prompt and response is the reference model's: a further sequence, prompt +
response, is a prefix of every judgement of that response, so a packed forward computes no row for
it, only the last layer's and the LM head's part over the response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import triton_scoring
from .cotangents import check_finite
from .plan import Read
from .rollouts import Rollout
from .signal import Cotangents, LeafRows, LinearRows, Signal

__all__ = ["WithReference"]


class WithReference:
    """A signal over the sequences it knows, and log-probabilities over the rollouts behind them."""

    def __init__(
        self, signal: Signal, count: int, rollouts: Sequence[Rollout], temperature: float
    ) -> None:
        self.leaf, self.reads_linears = signal.leaf, signal.reads_linears
        self._signal = signal
        self._count = count  # sequences of the signal
        self._temperature = temperature
        made = [(i, rollout.sequence()) for i, rollout in enumerate(rollouts)]
        self.sequences = [sequence for _, sequence in made if sequence is not None]
        self._rollout_of = [i for i, sequence in made if sequence is not None]
        self._rollouts = rollouts
        self._logps: dict[int, Tensor] = {}

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        inner = [i for i, read in enumerate(reads) if read.sequence < self._count]
        runs = [run for run in _runs(reads) if reads[run[0]].sequence >= self._count]
        if runs and triton_scoring.serves_logits(logits):
            self._read_on_device(logits, reads, runs)
        else:
            for start, stop in runs:
                self._read(logits[start:stop], reads[start:stop])
        if not inner:
            return None
        whole = len(inner) == len(reads)
        found = self._signal.cotangents(
            logits if whole else logits[inner], [reads[i] for i in inner]
        )
        if found is None:
            return None
        return replace(found, reads=[inner[i] for i in found.reads])

    def on_linear(
        self, outputs: Mapping[str, int], inputs: Tensor, output_grads: Tensor, rows: LinearRows
    ) -> None:
        self._signal.on_linear(outputs, inputs, output_grads, rows)

    def on_scale(self, name: str, products: Tensor, rows: LinearRows) -> None:
        self._signal.on_scale(name, products, rows)

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        self._signal.on_leaf(rows, values, grads)

    def logps(self, device: torch.device) -> list[Tensor]:
        """`log_softmax(logits / temperature)[token]`, `[T]` float32 per rollout, in nats."""
        return [
            self._logps.get(i, torch.zeros(0, device=device)).float()
            for i in range(len(self._rollouts))
        ]

    def _read(self, logits: Tensor, reads: Sequence[Read]) -> None:
        """Log-probabilities from logits of one sequence, whose positions follow each other."""
        rollout, tokens, _ = self._asked(reads)
        scaled = logits if self._temperature == 1.0 else logits / self._temperature
        targets = torch.tensor(tokens).to(logits.device)
        logps = -cross_entropy(scaled, targets, reduction="none")
        if not bool(logps.isfinite().all()):
            check_finite(logits, reads, {reads[0].sequence: rollout.label})
        self._keep(reads, logps)

    def _read_on_device(
        self, logits: Tensor, reads: Sequence[Read], runs: Sequence[tuple[int, int]]
    ) -> None:
        """The same for every stretch in one launch, and one wait."""
        rows = [row for start, stop in runs for row in range(start, stop)]
        tokens = [token for start, stop in runs for token in self._asked(reads[start:stop])[1]]
        logps, finite = triton_scoring.token_logps(logits, rows, tokens, self._temperature)
        if not bool(finite.all()):
            for start, stop in runs:
                label = self._asked(reads[start:stop])[0].label
                sequence = reads[start].sequence
                check_finite(logits[start:stop], reads[start:stop], {sequence: label})
        lengths = [stop - start for start, stop in runs]
        for (start, stop), found in zip(runs, logps.split(lengths), strict=True):
            self._keep(reads[start:stop], found)

    def _asked(self, reads: Sequence[Read]) -> tuple[Rollout, Sequence[int], int]:
        """Of a stretch: its rollout, the tokens that its reads predict, and the first's place."""
        rollout = self._rollouts[self._rollout_of[reads[0].sequence - self._count]]
        first = reads[0].position + 1 - len(rollout.prompt_ids)
        return rollout, rollout.response_ids[first : first + len(reads)], first

    def _keep(self, reads: Sequence[Read], logps: Tensor) -> None:
        rollout, _, first = self._asked(reads)
        index = self._rollout_of[reads[0].sequence - self._count]
        row = self._logps.setdefault(index, logps.new_empty(len(rollout.response_ids)))
        row[first : first + len(reads)] = logps


def _runs(reads: Sequence[Read]) -> list[tuple[int, int]]:
    """Stretches of reads of one sequence, whose positions follow each other."""
    cuts = [i for i in range(1, len(reads)) if reads[i].sequence != reads[i - 1].sequence]
    return list(zip([0, *cuts], [*cuts, len(reads)], strict=True))
