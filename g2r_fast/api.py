"""`attribute_batch` and `attribute_tokens`: a batch in, token rewards out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .advantages import AdvantageConfig, token_advantages_with_counts
from .checks import (
    Span,
    at_row,
    check_group_size,
    check_lengths,
    check_max_tokens,
    check_no_dropout,
    check_positions,
    check_vocabulary,
    given_verdicts,
    position_limit,
    read_span,
    token_ids,
)
from .engine import EngineRun, choose_engine
from .errors import InputError, InputTypeError
from .grad2reward import (
    AttributionConfig,
    AttributionSummary,
    TargetSignal,
    VerdictSignal,
    rubric_rewards,
    softmax_attribution,
)
from .judge import Judge, Prompt, Response
from .judgements import Judgements
from .plan import PackedSequence
from .result import AttributionBatch
from .rubric import Rubric, rubric_items

__all__ = ["attribute_batch", "attribute_tokens"]

logger = logging.getLogger("g2r_fast")


def attribute_batch(
    judge: Judge,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    rubrics: Sequence[Sequence[Rubric | str | Mapping[str, Any]]],
    group_size: int = 8,
    attribution: AttributionConfig = AttributionConfig(),
    advantage: AdvantageConfig = AdvantageConfig(),
    verdict: str | Sequence[Sequence[bool]] = "argmax",
    spans: Sequence[Sequence[Span] | None] | None = None,
    reference_logps: bool = False,
    reference_temperature: float = 1.0,
    max_tokens: int | None = None,
    keep_attributions: bool = False,
    progress: bool = False,
    generator: torch.Generator | None = None,
    *,
    engine: str = "auto",
) -> AttributionBatch:
    """`r[i] = sum_k 1[z_k] w_k softmax(b_k / tau) / sum_k max(w_k, 0)`, b_k = (grad * e).sum(-1).

    Every response is judged against every item of its rubric; the gradient of the verdict's log
    probability at the response's input embeddings becomes one reward per policy token
    (arXiv 2602.01791, Eqs. 1-5), and the rewards of a group become token advantages (Eq. 9).

    Args:
        judge: a frozen `Judge`.
        prompts, responses: N each; text, message lists (prompts), or policy token ids.
        rubrics: N lists of items: `Rubric`, str, {"criterion", "points"} or
            {"description", "weight"}. At least one item each.
        group_size: consecutive rows that answer one prompt; 1: no advantages.
        attribution, advantage: the options of the method, `AttributionConfig`, `AdvantageConfig`.
        verdict: `"argmax"` (a tie is False), `"sample"` (from the two-way probability, one draw
            per judgement from `generator` in row order), or N lists of K bools.
        spans: N lists of (start, stop) in response tokens: the policy's own, where other tokens
            (tool output) lie between. Others get reward and advantage 0. None: all of it.
        reference_logps, reference_temperature: for a scaffold whose shared prefix is the
            reference model's own pass over the rollout; `"grader"` is none.
        max_tokens: forward + backward rows alive together; None: from free memory.
        keep_attributions: keep the softmax of every True item, `out.attributions`.
        progress: show a progress bar on stderr.
        engine: `"auto"`, `"packed"` or `"autograd"`; auto may fall back, and says so once.

    Returns an `AttributionBatch` with tensors on the judge's device; rewards are float32 `[T_i]`,
    log-probabilities are in nats. Row order does not matter to a row's result.

    Raises InputError (a ValueError) or InputTypeError for input that cannot be used, naming the
    first offender; UnsupportedModelError where a named engine cannot serve the judge.
    """
    started = time.perf_counter()
    _check_options(judge, attribution, advantage, reference_logps, reference_temperature)
    check_lengths(prompts=prompts, responses=responses, rubrics=rubrics)
    check_group_size(len(prompts), group_size)
    check_max_tokens(max_tokens)
    items = rubric_items(rubrics)
    given = given_verdicts(verdict, [len(row) for row in items])
    judge.check_frozen()
    chosen_engine = choose_engine(judge.model, engine)
    with _plain_torch():
        batch = Judgements.encode(judge, prompts, responses, items, spans)
        encoded = time.perf_counter()
        signal = VerdictSignal(
            batch.attributed_spans(),
            judge.true_id,
            judge.false_id,
            attribution,
            given,
            _draws(verdict, len(batch.requests), generator),
            judge.device,
            batch.labels(),
        )
        sequences = batch.sequences()
        with _progress_bar(progress, len(sequences)) as advance:
            run = chosen_engine.run(sequences, signal, max_tokens, advance)
        attributed = time.perf_counter()

        own_tokens = batch.own_tokens(judge.device)
        summary = AttributionSummary(attribution)
        rows = [
            rubric_rewards(
                [
                    _policy_attribution(signal, batch, j, attribution, summary)
                    for j in batch.items_of[i]
                ],
                [signal.verdicts[j] for j in batch.items_of[i]],
                [rubric.weight for rubric in items[i]],
                own_tokens[i],
            )
            for i in range(len(prompts))
        ]
        scores = torch.tensor([row.score for row in rows], dtype=torch.float32, device=judge.device)
        token_rewards = [row.token_rewards for row in rows]
        advantages, counts = token_advantages_with_counts(
            token_rewards,
            group_size,
            advantage,
            scores,
            mean_attributions=[row.mean_attribution for row in rows],
            mask=own_tokens,
        )
        counts = {**counts, **batch.counts(items)}
        stats = _stats(chosen_engine.name, judge, run, summary, counts)
        for alarm in stats["alarms"]:
            logger.warning("%s", alarm)
        stats["seconds"] = {
            "encode": encoded - started,
            "engine": attributed - encoded,
            "total": time.perf_counter() - started,
        }
        logger.info(
            "%s engine: %d judgements, %d of %d forward rows, %d backward rows, %.2f s",
            chosen_engine.name, len(sequences), run.rows_forward, run.rows_unshared,
            run.rows_backward, stats["seconds"]["engine"],
        )  # fmt: skip
        return AttributionBatch(
            scores=scores,
            verdicts=[[signal.verdicts[j] for j in of] for of in batch.items_of],
            verdict_logps=[[signal.logps[j] for j in of] for of in batch.items_of],
            token_rewards=token_rewards,
            token_advantages=advantages,
            attributions=[row.attributions for row in rows] if keep_attributions else None,
            stats=stats,
            tokens=[judge.token_strings(response) for response in responses],
            rubrics=[[(r.text, float(r.weight)) for r in row] for row in items],
        )


def attribute_tokens(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    spans: Sequence[Span],
    target_ids: Sequence[int],
    *,
    readout: str = "dot",
    engine: str = "auto",
    max_tokens: int | None = None,
) -> list[Tensor]:
    """`b = (grad * embeds).sum(-1)[start:stop]`, grad of `log_softmax(logits[-1])[target]`.

    Gradient times input embedding of log p(target at the next position), for any causal LM
    (arXiv 2602.01791, Eqs. 2 and 3).

    Args:
        model: a Hugging Face causal LM; its weights get no gradients.
        input_ids: N lists of token ids.
        spans: N (start, stop), the positions whose scores are wanted.
        target_ids: N ids, the next token after each list.
        readout: `"dot"`, or `"l1"`, `"l2"`: norms of the gradient (Eqs. 11, 12).
        engine, max_tokens: as in `attribute_batch`.

    Returns N tensors `[stop - start]` float32 (float64 for a float64 model), in nats.

    Raises InputError for lengths that differ, empty sequences, ids outside the vocabulary, spans
    outside their sequence, and non-finite logits.
    """
    check_lengths(input_ids=input_ids, spans=spans, target_ids=target_ids)
    check_max_tokens(max_tokens)
    AttributionConfig(readout=readout)
    if readout == "uniform":
        raise InputError("readout 'uniform' reads no gradient", expected="'dot' | 'l1' | 'l2'")
    check_no_dropout(model, "model")
    targets = token_ids(target_ids)
    if targets is None:
        raise InputTypeError("target_ids cannot be read", expected="N token ids", got=target_ids)
    embed = model.get_input_embeddings().weight
    check_vocabulary(targets, len(embed), "a target id")
    limit = position_limit(model)
    sequences: list[PackedSequence] = []
    checked: list[Span] = []
    for row, (of_row, span) in enumerate(zip(input_ids, spans, strict=True)):
        with at_row(row):
            ids = token_ids(of_row)
            if ids is None:
                raise InputTypeError(
                    "input_ids cannot be read", expected="N lists of token ids", got=repr(of_row)
                )
            check_vocabulary(ids, len(embed))
            check_positions(len(ids), limit)
            checked.append(read_span(span, 0, len(ids)))
            sequences.append(PackedSequence(ids, checked[-1][0]))
    signal = TargetSignal(checked, targets, readout, embed.device)
    chosen_engine = choose_engine(model, engine)
    with _plain_torch():
        chosen_engine.run(sequences, signal, max_tokens)
        return [signal.scores(index) for index in range(len(sequences))]


def _policy_attribution(
    signal: VerdictSignal,
    batch: Judgements,
    judgement: int,
    config: AttributionConfig,
    summary: AttributionSummary,
) -> Tensor | None:
    """alpha of one judgement per policy token `[T]` float64; None where it is False."""
    if not signal.verdicts[judgement]:
        return None
    request = batch.requests[judgement]
    scores = signal.scores(judgement)
    start, _ = signal.spans[judgement]
    inside = [slice(a - start, b - start) for a, b in request.response_spans]
    alpha = softmax_attribution(
        torch.cat([scores[part] for part in inside]) if inside else scores, config
    )
    summary.add(alpha)
    policy = alpha.new_zeros(request.token_count)
    first = request.response_span[0]
    tokens = [
        t for a, b in request.response_spans for t in request.token_index[a - first : b - first]
    ]
    index = torch.tensor(tokens, dtype=torch.int64, device=alpha.device)
    if config.readout == "uniform":  # over policy tokens: spelling one out must not pay
        policy[index] = 1.0 / max(1, len(set(tokens)))
        return policy
    # Several judge tokens may spell one policy token: their shares add up on it.
    return policy.index_add_(0, index, alpha)


def _stats(
    engine: str, judge: Judge, run: EngineRun, summary: AttributionSummary, counts: dict[str, int]
) -> dict[str, Any]:
    return {
        "engine": engine,
        "backend": "eager" if engine == "packed" else "transformers",
        "device": str(judge.device),
        "dtype": str(judge.model.dtype).removeprefix("torch."),
        "rows_forward": run.rows_forward,
        "rows_backward": run.rows_backward,
        "rows_unshared": run.rows_unshared,
        "micro_batches": run.micro_batches,
        **summary.figures(),
        "alarms": summary.alarms(),
        "counts": counts,
    }


def _check_options(
    judge: Any,
    attribution: Any,
    advantage: Any,
    reference_logps: bool,
    reference_temperature: float,
) -> None:
    if not isinstance(judge, Judge):
        raise InputTypeError(
            "judge is not a Judge",
            expected="g2r_fast.Judge",
            got=type(judge).__name__,
            fix="Wrap the model: Judge(model, tokenizer).",
        )
    for name, config, kind in (
        ("attribution", attribution, AttributionConfig),
        ("advantage", advantage, AdvantageConfig),
    ):
        if not isinstance(config, kind):
            raise InputTypeError(
                f"{name} cannot be read", expected=f"{kind.__name__}(...)", got=repr(config)
            )
    if not reference_temperature > 0:
        raise InputError(
            "reference_temperature is not positive", expected="> 0", got=reference_temperature
        )
    if reference_logps:
        raise InputError(
            "reference_logps needs a scaffold that continues the rollout itself",
            got=f"scaffold={judge.scaffold!r}",
            fix="Leave reference_logps=False and run the reference model on its own.",
        )


def _draws(
    verdict: str | Sequence[Sequence[bool]], count: int, generator: torch.Generator | None
) -> list[float] | None:
    """One uniform number per judgement, in row order, so that packing cannot change a draw."""
    if verdict != "sample":
        return None
    device = generator.device if generator is not None else "cpu"
    draws: list[float] = torch.rand(count, generator=generator, device=device).tolist()
    return draws


@contextmanager
def _plain_torch() -> Iterator[None]:
    """What a trainer may have switched on around us, off: autocast would round the gradients of a
    float32 judge to bfloat16, TF32 does as much to every float32 product, inference mode has no
    backward, and a default device moves indices.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
        for products in (backend.matmul for backend in backends):
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        yield


@contextmanager
def _progress_bar(wanted: bool, total: int) -> Iterator[Callable[[int], None] | None]:
    if not wanted:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("judgements", total=total)
        yield lambda done: bar.advance(task, done)
