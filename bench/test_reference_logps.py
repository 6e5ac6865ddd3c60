"""Log-probabilities of the reference model: from the judge's own forward, or by a pass of its own.

The judge is the frozen initial policy and continues the rollout, so prompt + response is a prefix
of every judgement. What asking for log-probabilities adds to the judge's pass stands against the
stock reference model run beside it: one response at a time; the prompt's keys and values once per
group; and the latter with its linear layers on oneDNN, the fastest stock PyTorch we could write.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.cached import fork, grouped_query_sdpa, prompt_cache
from bench.conftest import Results
from bench.scenarios import Scenario
from bench.tuned import onednn_linears
from bench.workload import Workload
from g2r_fast.engine import PackedEngine
from g2r_fast.grad2reward import AttributionConfig, VerdictSignal
from g2r_fast.key_values import cached
from g2r_fast.plan import PackedSequence
from g2r_fast.reference import ReferenceDecoder
from g2r_fast.reference_logps import WithReference
from g2r_fast.rollouts import Rollout

LIMIT = 1e-5  # nats per token, float32 against float64
TEMPERATURE = 0.7

SCENARIOS = {
    "half-true": Scenario(model="h512l8-v32k", true_share=0.5),
    "one-item": Scenario(model="h512l8-v32k", items=1),
}
QUICK = Scenario(model="tiny", group_size=2, items=2, prompt=12, response=(5, 9), tail=4)


def gather(logits: Tensor, response: Tensor) -> Tensor:
    logps = torch.log_softmax(logits.float() / TEMPERATURE, -1)
    return logps.gather(-1, response[:, None])[:, 0]


@torch.no_grad()
def separately(model: PreTrainedModel, workload: Workload) -> list[Tensor]:
    """One response at a time, only the logits that are needed."""
    found = []
    for response in workload.responses:
        ids = torch.cat([workload.prompt, response])[:-1]
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(response)).logits[0]
        found.append(gather(logits, response))
    return found


@torch.no_grad()
def prompt_cached(model: PreTrainedModel, workload: Workload) -> list[Tensor]:
    """The prompt but for its last token once per group."""
    found = []
    with grouped_query_sdpa(model):
        shorter = Workload(workload.prompt[:-1], [], [], [], 0)
        prompt = prompt_cache(model, shorter)
        for response in workload.responses:
            ids = torch.cat([workload.prompt[-1:], response[:-1]])
            logits = model(
                input_ids=ids[None], **cached(model, fork(prompt)), use_cache=True
            ).logits[0]
            found.append(gather(logits, response))
    return found


def tuned(model: PreTrainedModel, workload: Workload) -> list[Tensor]:
    """`prompt_cached` with the linear layers on oneDNN, where that is not PyTorch's own choice."""
    with onednn_linears(model) if model.dtype == torch.float32 else nullcontext():
        return prompt_cached(model, workload)


def ours(model: PreTrainedModel, workload: Workload, with_reference: bool) -> list[Tensor]:
    """The judgements of the workload, and the log-probabilities where they are asked for."""
    sequences = [
        PackedSequence(workload.sequence(i, k).tolist(), workload.span(i).start)
        for i, k in workload.judgements
    ]
    spans = [(workload.span(i).start, workload.span(i).stop) for i, _ in workload.judgements]
    signal = VerdictSignal(
        spans, workload.target_id, 0, AttributionConfig(), workload.true_mask, None, model.device
    )
    if not with_reference:
        PackedEngine(model).run(sequences, signal)
        return []
    rollouts = [Rollout(workload.prompt.tolist(), r.tolist()) for r in workload.responses]
    reference = WithReference(signal, len(sequences), rollouts, TEMPERATURE)
    PackedEngine(model).run([*sequences, *reference.sequences], reference)
    return reference.logps(model.device)


RIVALS: dict[str, Callable[[PreTrainedModel, Workload], list[Tensor]]] = {
    "separately": separately,
    "prompt_cached": prompt_cached,
    "tuned": tuned,
}


@torch.no_grad()
def truth(model: PreTrainedModel, workload: Workload) -> list[Tensor]:
    """The same in float64, by a decoder of its own."""
    decoder = ReferenceDecoder.from_model(model)
    found = []
    for response in workload.responses:
        ids = torch.cat([workload.prompt, response])[:-1]
        logits = decoder.logits(decoder.embed(ids), None)[-len(response) :] / TEMPERATURE
        found.append(torch.log_softmax(logits, -1).gather(-1, response[:, None])[:, 0])
    return found


def errors(model: PreTrainedModel, workload: Workload) -> dict[str, float]:
    """Largest error of every way against float64, in nats."""
    answers = {"ours": ours(model, workload, with_reference=True)}
    answers |= {name: way(model, workload) for name, way in RIVALS.items()}
    exact = truth(model, workload)
    assert all(len(a) > 0 and bool(a.isfinite().all()) for a in exact)
    return {
        name: max(float((a - b).abs().max()) for a, b in zip(answer, exact, strict=True))
        for name, answer in answers.items()
    }


def test_log_probabilities_agree() -> None:
    assert max(errors(*QUICK.build()).values()) <= LIMIT


@pytest.mark.full_size
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_the_log_probabilities_add(
    name: str, results: Results, request: pytest.FixtureRequest
) -> None:
    scenario = SCENARIOS[name]
    model, workload = scenario.build()
    found = errors(model, workload)
    assert max(found.values()) <= LIMIT
    ways: dict[str, Callable[[], Any]] = {
        "judge": lambda: ours(model, workload, False),
        "judge_with_reference": lambda: ours(model, workload, True),
        **{way: lambda run=run: run(model, workload) for way, run in RIVALS.items()},
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in ways}
    load_before = []
    for repetition in range(request.config.getoption("--repetitions")):
        for way in list(ways) if repetition % 2 == 0 else reversed(ways):
            gc.collect()
            load_before.append(round(os.getloadavg()[0], 2))
            cpu, started = time.process_time(), time.perf_counter()
            ways[way]()
            seconds[way].append(time.perf_counter() - started)
            cpu_seconds[way].append(time.process_time() - cpu)
    pairs = zip(seconds["judge_with_reference"], seconds["judge"], strict=True)
    added = statistics.median(a - b for a, b in pairs)
    medians = {way: round(statistics.median(values), 3) for way, values in seconds.items()}
    results.add(
        "reference_logps",
        name,
        {
            "scenario": asdict(scenario),
            "workload": workload.describe(),
            "temperature": TEMPERATURE,
            "largest_error_nats": found,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "load_before": load_before,
            "median_seconds": medians,
            "added_seconds": round(added, 3),
            "added_share_of_the_judges_pass": round(added / medians["judge"], 3),
            "times_added": {way: round(medians[way] / added, 2) for way in RIVALS},
        },
    )
