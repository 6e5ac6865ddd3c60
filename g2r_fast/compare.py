"""The same judgements as plain loops over a stock model, for whoever wants to see the difference.

`loop` is what most code does today; `cached_loop` is what a skilled user writes in thirty lines.
Both are compared on the verdict's log-odds: stock float32 autograd loses the digits of
`1 - p(True)` where a judge is sure, so on log p it would be the loops that are off.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .engine import choose_engine
from .grad2reward import AttributionConfig, VerdictSignal
from .judge import Judge
from .key_values import cache_argument, cache_of, cached
from .plan import PackedSequence
from .records import Record

__all__ = ["JudgedGroup", "cached_loop", "compare", "fork_cache", "loop"]

REPEATS = 3
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # stock models keep float32 norms

# The scalar that is differentiated, from the logits [V] after the last token.
Objective: TypeAlias = Callable[[Tensor], Tensor]
# Whether judgement (i, k) comes back, from its logits.
Decision: TypeAlias = Callable[[Tensor, int, int], bool]
Answers: TypeAlias = tuple[list[Tensor | None], list[float]]


@dataclass(frozen=True)
class JudgedGroup:
    """One prompt, G responses, K items: judgement (i, k) is prompt + responses[i] + tails[k]."""

    prompt: Tensor  # [P] int64
    responses: Sequence[Tensor]  # G of [T_i]
    tails: Sequence[Tensor]  # K of [S_k]

    @property
    def judgements(self) -> list[tuple[int, int]]:
        return [(i, k) for i in range(len(self.responses)) for k in range(len(self.tails))]

    def sequence(self, i: int, k: int) -> Tensor:
        return torch.cat([self.prompt, self.responses[i], self.tails[k]])

    def span(self, i: int) -> tuple[int, int]:
        return len(self.prompt), len(self.prompt) + len(self.responses[i])


def loop(model: Any, group: JudgedGroup, objective: Objective, is_true: Decision) -> Answers:
    """One judgement after the other: `(autograd.grad(objective, embeds) * embeds).sum(-1)`.

    Returns the scores `[T_i]` of every judgement that `is_true`, else None, and every objective.
    """
    scores: list[Tensor | None] = []
    values: list[float] = []
    for i, k in group.judgements:
        embeds = model.get_input_embeddings()(group.sequence(i, k)[None]).requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[0, -1]
        value = objective(logits.float())
        values.append(float(value.detach()))
        if not is_true(logits.detach(), i, k):
            scores.append(None)
            continue
        (grad,) = torch.autograd.grad(value, embeds)
        scores.append((grad.float() * embeds.detach().float()).sum(-1)[0, slice(*group.span(i))])
    return scores, values


def cached_loop(model: Any, group: JudgedGroup, objective: Objective, is_true: Decision) -> Answers:
    """Prompt K/V once without gradient, each response once with its graph, one retained-graph
    backward per True item. Same answers as `loop`."""
    scores: list[Tensor | None] = []
    values: list[float] = []
    with torch.no_grad():
        prompt = cache_of(model(input_ids=group.prompt[None], use_cache=True, logits_to_keep=1))
    for i, response in enumerate(group.responses):
        embeds = model.get_input_embeddings()(response[None]).requires_grad_()
        prefix = cache_of(
            model(
                inputs_embeds=embeds,
                **cached(model, fork_cache(prompt)),
                use_cache=True,
                logits_to_keep=1,
            )
        )
        for k, tail in enumerate(group.tails):
            logits = model(
                input_ids=tail[None],
                **cached(model, fork_cache(prefix)),
                use_cache=True,
                logits_to_keep=1,
            ).logits[0, -1]
            value = objective(logits.float())
            values.append(float(value.detach()))
            if not is_true(logits.detach(), i, k):
                scores.append(None)
                continue
            (grad,) = torch.autograd.grad(value, embeds, retain_graph=True)
            scores.append((grad.float() * embeds.detach().float()).sum(-1)[0])
    return scores, values


def fork_cache(cache: Any) -> Any:
    """A cache that can be extended without touching the original; the tensors are shared."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


@torch.enable_grad()
def compare(
    judge: Judge,
    records: Sequence[Record],
    *,
    engine: str = "auto",
    max_tokens: int | None = None,
) -> str:
    """Time and rows of these records by `loop`, `cached_loop` and g2r_fast, as a text.

    Answers are checked equal first; where they are not, the text says so and gives no times.
    Medians of 3 alternating runs, on the verdict's log-odds; every objective, readout and tau
    costs the same passes.
    """
    missing = {"logits_to_keep"} - set(inspect.signature(judge.model.forward).parameters)
    if cache_argument(judge.model) is None:
        missing.add("past_key_values")
    if missing:
        return f"compare: the loops need a model whose forward takes {', '.join(sorted(missing))}"
    if judge.model.dtype not in TOLERANCE:
        return f"compare: answers are compared in float32, the judge is in {judge.model.dtype}"
    groups = [_group(judge, record) for record in records]
    groups = [g for g in groups if g.responses]
    if not groups:
        return "compare: no record holds a response with tokens"
    true_id, false_id = judge.true_id, judge.false_id

    def log_odds(logits: Tensor) -> Tensor:
        return logits[true_id] - logits[false_id]

    def is_true(logits: Tensor, i: int, k: int) -> bool:
        return bool(logits[true_id] > logits[false_id])

    def by(run: Callable[..., Answers]) -> list[Tensor | None]:
        return [s for g in groups for s in run(judge.model, g, log_odds, is_true)[0]]

    rows: list[int] = []

    def packed() -> list[Tensor | None]:
        found, run_rows = _packed(judge, groups, engine, max_tokens)
        rows[:] = [run_rows]
        return found

    ways = {
        "loop": lambda: by(loop),
        "cached loop": lambda: by(cached_loop),
        "g2r_fast": packed,
    }
    answers = {name: way() for name, way in ways.items()}
    error = max(_difference(answers["loop"], answers[name]) for name in ways)
    tolerance = TOLERANCE[judge.model.dtype]
    if not error <= tolerance:
        return (
            f"compare: the answers differ by {error:.1e} (largest relative norm of a judgement, "
            f"allowed {tolerance:.0e}), so there is nothing to time"
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            _finish_device(judge)
            started = time.perf_counter()
            way()
            _finish_device(judge)
            seconds[name].append(time.perf_counter() - started)
    true = [s is not None for s in answers["loop"]]
    counts = {**_loop_rows(groups, true), "g2r_fast": rows[0]}
    ours = median(seconds["g2r_fast"])
    lines = [
        f"{len(true)} judgements, {sum(true)} True; largest difference {error:.1e}; "
        f"{torch.get_num_threads()} threads"
    ]
    for name in ways:
        lines.append(
            f"{name:12s} {median(seconds[name]):8.2f} s  {counts[name]:9,d} rows  "
            f"{median(seconds[name]) / ours:5.1f}x the time of g2r_fast"
        )
    return "\n".join(lines)


def _finish_device(judge: Judge) -> None:
    if judge.device.type == "cuda":
        torch.cuda.synchronize(judge.device)


def _group(judge: Judge, record: Record) -> JudgedGroup:
    def ids(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=judge.device)

    responses = [judge.encode_response(text).ids for text in record.responses]
    return JudgedGroup(
        ids(judge.encode_prompt(record.prompt)),
        [ids(r) for r in responses if r],
        [ids([*judge.turn_end, *judge.encode_rubric(text)]) for text, _ in record.rubrics],
    )


def _packed(
    judge: Judge, groups: Sequence[JudgedGroup], engine: str, max_tokens: int | None
) -> tuple[list[Tensor | None], int]:
    spans = [group.span(i) for group in groups for i, _ in group.judgements]
    sequences = [
        PackedSequence(group.sequence(i, k).tolist(), group.span(i)[0])
        for group in groups
        for i, k in group.judgements
    ]
    config = AttributionConfig(objective="logodds")
    signal = VerdictSignal(spans, judge.true_id, judge.false_id, config, None, None, judge.device)
    run = choose_engine(judge.model, engine).run(sequences, signal, max_tokens)
    found = [signal.scores(j) if signal.verdicts[j] else None for j in range(len(sequences))]
    return found, run.rows_forward + run.rows_backward


def _difference(expected: list[Tensor | None], actual: list[Tensor | None]) -> float:
    """Largest relative norm over judgements; infinite where the verdicts differ."""
    worst = 0.0
    for e, a in zip(expected, actual, strict=True):
        if (e is None) != (a is None):
            return float("inf")
        if e is not None and a is not None:
            gap = (a.double() - e.double()).norm()
            worst = max(worst, float(gap / e.double().norm()) if e.any() else float(gap))
    return worst


def _loop_rows(groups: Sequence[JudgedGroup], true: Sequence[bool]) -> dict[str, int]:
    """Forward + backward rows of the two loops."""
    plain = cached = judgement = 0
    for group in groups:
        cached += len(group.prompt)
        for response in group.responses:
            cached += len(response)
            for tail in group.tails:
                length = len(group.prompt) + len(response) + len(tail)
                comes_back = true[judgement]
                plain += length * (1 + comes_back)
                cached += len(tail) + comes_back * (len(response) + len(tail))
                judgement += 1
    return {"loop": plain, "cached loop": cached}
