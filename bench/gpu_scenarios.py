"""Grad2Reward's attribution on a GPU: whole models with random weights, and every rival there.

As in `harness.py` nothing is timed before it has given the loop's answers. What differs: a float32
loop over all judgements of a large model takes longer than everything else, so that it runs for a
sample of them, and everything has to be done by a deadline; the other judgements are held to the
loop in the model's own dtype. And repetitions are not paired, as a card is steadier than a shared
CPU and its allocator is not: each rival runs several times in a row, and ratios are of medians.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.flops import Sizes, judgements_of, required_flops, share_of_peak
from bench.gate import LOW_PRECISION_FACTOR, GateError, relative_errors
from bench.gpu_ceilings import clocks, synchronise
from bench.ours import backend_of
from bench.rivals import RIVALS, Answer, Unavailable
from bench.scenarios import GPU_CORE, GPU_SCENARIOS, Scenario
from bench.tables import median_ratio
from bench.workload import Workload

__all__ = ["GPU_SCENARIOS", "compare_on_gpu", "gate_on_gpu", "rehearsal", "sampled_loop"]

# Timed in one repetition only, on a GPU: each takes as long as ten of ours, or longer.
ONCE = ("slow_loop", "padded", "cached_loop_simple", "ours_reference")

# Seconds from which one run is all that is timed.
SLOW = 1.5

# A verdict's log-probability: one rounding of bfloat16 is allowed whatever the loop's error was,
# as the largest of a few judgements' errors is small by luck now and then.
LOGP_FLOOR = 2.0**-8
# Judgements outside the sample: against the loop in the model's dtype, over the largest error that
# this loop itself has in the sample.
OUTSIDE_FACTOR = 6.0
# Attributions of fewer tokens than this are too few to average over: their sample is held to the
# limit together.
FEW_TOKENS = 60

# Parts of the time, which are given out in this order.
WEIGHTS = {"gpu-7b-all-true": 1.6, "gpu-7b-half-true": 1.4, "gpu-1.5b-short-one-item": 0.4}
# How many judgements are compared with float32.
SAMPLE = {"7b": 3, "1.5b": 8}


def rehearsal(scenario: Scenario) -> Scenario:
    """The same in a size for a CPU."""
    return replace(
        scenario, model="tiny", device="cpu", group_size=2, items=min(2, scenario.items),
        prompt=min(24, scenario.prompt), response=(60, 70), tail=4, rivals=GPU_CORE,
    )  # fmt: skip


def compare_on_gpu(
    scenario: Scenario,
    *,
    deadline: float,
    gflops: float | None,
    log: Callable[[str], None] = lambda line: None,
    repetitions: int = 4,
) -> dict[str, Any]:
    """Gate and time the rivals until `deadline` (of time.perf_counter).

    `gflops`: the matrix rate of this run. A rival with other answers becomes an entry of `refused`
    and is not timed; where ours is one, nothing is.
    """
    started = time.perf_counter()
    model, workload = scenario.build()
    synchronise(model.device)
    sample = _sample(workload, SAMPLE.get(scenario.model, 6))
    references = _references(model, workload, sample)
    log(f"reference of {len(sample)} judgements ready, {time.perf_counter() - started:.1f} s")

    measured: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    refused: dict[str, str] = {}
    whole: Answer | None = None
    for name in ("loop", *(name for name in scenario.rivals if name != "loop")):
        if name in ONCE and _left(deadline) < 0:
            unavailable[name] = "no time was left"
            continue
        try:
            seconds, peak, got = _timed(model, lambda n=name: RIVALS[n].run(model, workload))  # type: ignore[misc]
            got = _on_cpu(got)
            whole = got if name == "loop" else whole
            errors = gate_on_gpu(references, got, whole, sample, workload)
        except GateError as error:
            refused[name] = str(error)
            log(f"{name}: WRONG ANSWERS: {error}")
            continue
        except Exception as error:  # whatever it is, the others are still worth measuring
            if not isinstance(error, Unavailable):
                traceback.print_exc(limit=-4)
            short = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
            unavailable[name] = short
            log(f"{name}: not run: {short}")
            if name == "ours":
                refused[name] = short
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        measured[name] = {
            "title": RIVALS[name].title,
            **errors,
            "passes": asdict(RIVALS[name].passes(workload)),
            "first_seconds": seconds,
            "peak_bytes": peak,
            "seconds": [seconds] if name in ONCE else [],
            "cpu_seconds": [],
            "load_before": [],
        }
        log(f"{name}: answers agree, {errors['max_relative_error']:.1e}; first run {seconds:.2f} s")
    clocks_before = clocks()
    if "ours" in measured:
        _repeat(model, workload, measured, deadline, repetitions, log)
    else:
        log("ours has no right answers: nothing is timed")
        for entry in measured.values():
            entry["seconds"] = []
            del entry["first_seconds"]

    required = required_flops(Sizes.of(model.config), judgements_of(workload))
    result: dict[str, Any] = {
        "scenario": asdict(scenario),
        "workload": workload.describe(),
        "backend": backend_of(model),
        "required_gflop": required.describe(),
        "peak": {scenario.dtype: {"best_gflops": gflops} if gflops else {}},
        "sample": sample,
        "clocks": [clocks_before, clocks()],
        "rivals": {name: measured[name] for name in RIVALS if name in measured},
        "unavailable": unavailable,
        "refused": refused,
    }
    for name, entry in measured.items():
        ratio = median_ratio(result, name, "ours")
        entry["times_ours"] = None if ratio is None else round(ratio, 2)
        if entry["seconds"]:
            median = statistics.median(entry["seconds"])
            entry["median_seconds"] = round(median, 5)
            share = share_of_peak(required.total / 1e9, median, gflops) if gflops else None
            entry["share_of_peak"] = None if share is None else round(share, 4)
    result["seconds_in_all"] = round(time.perf_counter() - started, 1)
    return result


def _repeat(
    model: PreTrainedModel,
    workload: Workload,
    measured: dict[str, Any],
    deadline: float,
    repetitions: int,
    log: Callable[[str], None],
) -> None:
    """Blocks of one rival each, all rivals in one order and then in the other, while there is time.

    The first run of a block is not timed, as the allocator's cache is the last rival's, unless it
    takes so long that it is the only one.
    """
    names = [name for name in measured if name not in ONCE]
    for order in (names, names[::-1]):
        for name in order:
            entry = measured[name]
            done = entry["seconds"]
            if done and (min(done) > SLOW or _left(deadline) < (1 + repetitions) * min(done)):
                continue
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            for number in range(1 + repetitions):
                seconds, peak, _ = _timed(model, lambda n=name: RIVALS[n].run(model, workload))  # type: ignore[misc]
                if number or seconds > SLOW:
                    done.append(seconds)
                    entry["peak_bytes"] = peak
                if seconds > SLOW:
                    break
    for name in names:
        median = statistics.median(measured[name]["seconds"])
        log(f"{name}: {median:.3f} s, {len(measured[name]['seconds'])} times")


def _left(deadline: float) -> float:
    return deadline - time.perf_counter()


def _timed(model: PreTrainedModel, run: Callable[[], Answer]) -> tuple[float, int, Answer]:
    """Seconds from an idle device to an idle device, and what was allocated beyond the model."""
    gc.collect()
    cuda = model.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
    synchronise(model.device)
    start = time.perf_counter()
    got = run()
    synchronise(model.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(model.device) - before if cuda else 0
    return seconds, peak, got


def _on_cpu(answer: Answer) -> Answer:
    return [None if x is None else x.float().cpu() for x in answer[0]], answer[1].float().cpu()


def _sample(workload: Workload, count: int) -> list[int]:
    """Judgements from end to end, True ones and, where there are any, one in three False."""
    true = [j for j, wanted in enumerate(workload.true_mask) if wanted]
    false = [j for j, wanted in enumerate(workload.true_mask) if not wanted]
    of_false = min(len(false), count // 3)
    return sorted(_spread(true, count - of_false) + _spread(false, of_false))


def _spread(values: Sequence[int], count: int) -> list[int]:
    count = min(count, len(values))
    if count < 2:
        return list(values[:count])
    return sorted({values[round(n * (len(values) - 1) / (count - 1))] for n in range(count)})


def sampled_loop(model: PreTrainedModel, workload: Workload, sample: Sequence[int]) -> Answer:
    """The loop for some judgements, in their order."""
    attributions: list[Tensor | None] = []
    logps: list[Tensor] = []
    for j in sample:
        i, k = workload.judgements[j]
        embeds = model.get_input_embeddings()(workload.sequence(i, k)[None]).requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        logp = torch.log_softmax(logits[0, -1].float(), -1)[workload.target_id]
        logps.append(logp.detach())
        if not workload.is_true(i, k):
            attributions.append(None)
            continue
        (grad,) = torch.autograd.grad(logp, embeds)
        scores = (grad[0].float() * embeds[0].detach().float()).sum(-1)
        attributions.append(scores[workload.span(i)])
    return _on_cpu((attributions, torch.stack(logps)))


def _references(
    model: PreTrainedModel, workload: Workload, sample: list[int]
) -> tuple[Answer, Answer]:
    """The sampled loop in float32 on the same rounded weights, and in the model's dtype."""
    same = sampled_loop(model, workload, sample)
    if model.dtype == torch.float32:
        return same, same
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        wide = copy.deepcopy(model).float()
        found = sampled_loop(wide, workload, sample)
        del wide
    finally:
        torch.set_float32_matmul_precision(precision)
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return found, same


def gate_on_gpu(
    references: tuple[Answer, Answer],
    got: Answer,
    whole: Answer | None,
    sample: list[int],
    workload: Workload,
) -> dict[str, float]:
    """The rule of gate.py for the sample; every other judgement against the loop, if it ran."""
    wide, same = references
    if len(got[0]) != len(workload.judgements) or len(got[1]) != len(workload.judgements):
        raise GateError(f"{len(got[0])} judgements answered, not {len(workload.judgements)}")
    mine: Answer = ([got[0][j] for j in sample], got[1][sample])
    errors, loops = relative_errors(wide, mine), relative_errors(wide, same)
    few = min(len(response) for response in workload.responses) < FEW_TOKENS
    if few:
        error, limit = (_together(wide, answer) for answer in (mine, same))
        if not error <= LOW_PRECISION_FACTOR * limit:
            raise GateError(f"relative error {error:.2e} > 2 * {limit:.2e}, of all that are True")
    for index, (error, limit) in enumerate(zip(errors, loops, strict=True)):
        if not few and not error <= LOW_PRECISION_FACTOR * limit + 2e-5:
            raise GateError(f"True judgement {index} of the sample: {error:.2e} > 2 * {limit:.2e}")
    error, limit = _logp_error(wide, mine), _logp_error(wide, same)
    if not error <= max(LOW_PRECISION_FACTOR * limit, LOGP_FLOOR):
        raise GateError(f"log-probabilities: {error:.2e} > 2 * {limit:.2e} and {LOGP_FLOOR:.1e}")
    outside = 0.0
    if whole is not None and whole is not got:
        outside = max(relative_errors(whole, got), default=0.0)
        limit = OUTSIDE_FACTOR * max(loops, default=0.0) + 2e-5
        if not outside <= limit:
            raise GateError(f"a judgement outside the sample: {outside:.2e} > {limit:.2e}")
    return {
        "max_relative_error": max(errors, default=0.0),
        "loops_relative_error": max(loops, default=0.0),
        "max_logp_error": error,
        "max_error_against_loop": outside,
    }


def _together(reference: Answer, got: Answer) -> float:
    want, have = (torch.cat([x for x in a[0] if x is not None]) for a in (reference, got))
    return float((have.double() - want.double()).norm() / want.double().norm())


def _logp_error(reference: Answer, got: Answer) -> float:
    want, have = reference[1].double(), got[1].double()
    return float(((have - want).abs() / want.abs()).max())
