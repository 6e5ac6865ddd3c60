"""Two watches over the judge of a training run: its weights, and what it says to worthless answers.

A judge that is trained along, or that can be gamed, spoils a run without any error. What the
watches measure goes into the figures of a step; `alarms.py` says what it means.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..adapters import adapters_off, named_modules
from ..canaries import CANARIES, canary_rates
from ..canary_report import CanaryReport
from ..checks import check_lengths
from ..errors import InputError
from ..judge import Judge, Prompt
from ..rubric import Rubric

__all__ = ["CanaryWatch", "JudgeWatch"]

_CHUNK = 2**18  # words of 8 bytes that are summed at a time: 4 MiB beside the model


class JudgeWatch:
    """`changed() == []` as long as every weight of a judge is, bit for bit, what it was at first.

    One pass over the weights where they lie: the sum of each tensor's words times odd random
    numbers, modulo 2^64, so that no change of a single word can hide. Buffers that no checkpoint
    holds (rotary tables, which some models stretch as they go) are left out.

    Args:
        model: the judge's model.
        adapters: `"off"`, the base weights alone, while adapters around them train; None or
            `"on"`, everything.

    Raises InputError for weights that are not in memory, and for merged adapters that shall be off.
    """

    def __init__(self, model: Any, adapters: str | None = None) -> None:
        if adapters not in (None, "off", "on"):
            raise InputError("unknown adapters", expected="None | 'off' | 'on'", got=repr(adapters))
        self.model, self.adapters = model, adapters
        self._first = self._sums()

    def fingerprint(self) -> str:
        """One hash of all weights as they are now, the same on every device."""
        text = "\n".join(f"{name} {value}" for name, value in sorted(self._sums().items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def changed(self) -> list[str]:
        """Names of the tensors that are no longer what they were, or no longer there, or new."""
        now = self._sums()
        return sorted(
            name
            for name in now.keys() | self._first.keys()
            if now.get(name) != self._first.get(name)
        )

    def figures(self) -> dict[str, float]:
        return {"judge/changed": float(len(self.changed()))}

    def _sums(self) -> dict[str, str]:
        with adapters_off(self.model) if self.adapters == "off" else nullcontext():
            tensors = list(_tensors(self.model))
        seen: dict[int, str] = {}  # tied weights are read once
        sums = {}
        for name, tensor in tensors:
            if id(tensor) not in seen:
                seen[id(tensor)] = _checksum(name, tensor)
            sums[name] = seen[id(tensor)]
        return sums


class CanaryWatch:
    """`canary_rates` of a fixed sample of the training prompts, as figures of a step.

    A frozen judge answers the same each time: measure it at the start and now and then. Canaries
    that may meet an item in truth are left out.

    Args:
        judge: the judge that pays the rewards.
        prompts, rubrics: N of each, as in `attribute_batch`.
        sample: how many of the prompts are asked about; which ones depends on N alone.
        engine, max_tokens: as in `attribute_batch`.
    """

    def __init__(
        self,
        judge: Judge,
        prompts: Sequence[Prompt],
        rubrics: Sequence[Sequence[Rubric | str | Mapping[str, Any]]],
        *,
        sample: int = 16,
        engine: str = "auto",
        max_tokens: int | None = None,
    ) -> None:
        check_lengths(prompts=prompts, rubrics=rubrics)
        if not prompts or sample < 1:
            raise InputError(
                "there is nothing to ask the judge about",
                expected="at least one prompt and sample >= 1",
                got=f"{len(prompts)} prompts, sample={sample}",
            )
        rows = range(len(prompts))
        self.rows = sorted(random.Random(0).sample(rows, min(sample, len(rows))))
        self.judge, self.engine, self.max_tokens = judge, engine, max_tokens
        self._prompts = [prompts[row] for row in self.rows]
        self._rubrics = [rubrics[row] for row in self.rows]
        self.report: CanaryReport | None = None  # of the latest measurement

    def figures(self) -> dict[str, float]:
        """`canaries/true_rate`, the share of True at items of positive weight; `canaries/score`,
        what a policy earns that gives the best of them to every prompt (0 where none earns)."""
        self.report = report = canary_rates(
            self.judge,
            self._prompts,
            self._rubrics,
            canaries=[canary for canary in CANARIES if not canary.debatable],
            engine=self.engine,
            max_tokens=self.max_tokens,
        )
        asked = sum(rate.judgements for rate in report.canaries)
        if not asked:  # pitfalls alone: nothing can be earned
            return {}
        true = sum(rate.false_positives for rate in report.canaries)
        score = 0.0 if report.best is None else report.best.mean_score or 0.0
        return {"canaries/true_rate": true / asked, "canaries/score": score}


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, parameter
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    """Mixed by arithmetic alone: a checkpoint's sums hold under another version's generator too."""
    numbers = torch.arange(1, _CHUNK + 1, device=device) * -7046029254386353131
    numbers = (numbers ^ (numbers >> 32)) * -4658895280553007687
    return (numbers ^ (numbers >> 29)) | 1


@torch.no_grad()
def _checksum(name: str, tensor: Tensor) -> str:
    """`dtype[shape]` and `sum(words * odd)`, each chunk's sum times an odd number of its own."""
    if tensor.is_meta:
        raise InputError(
            "a weight of the judge is not in memory",
            expected="a model that is loaded as a whole",
            got=f"{name} on the meta device",
        )
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()  # cannot be read as words where it lies
    whole = len(content) // 8 * 8
    # The few bytes that are left over are words of their own.
    words = [*content[:whole].view(torch.int64).split(_CHUNK), content[whole:].to(torch.int64)]
    odd = _odd_numbers(content.device)
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for index, chunk in enumerate(words):
        total += (chunk * odd[: len(chunk)]).sum() * (2 * index + 1)
    return f"{kind} {int(total) & (2**64 - 1):016x}"
