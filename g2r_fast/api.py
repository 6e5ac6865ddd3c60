"""`attribute_batch` and `attribute_tokens`: a batch in, token rewards out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .advantages import AdvantageConfig, token_advantages_with_counts
from .ambient import plain_torch
from .checks import (
    Span,
    at_row,
    check_group_size,
    check_lengths,
    check_max_tokens,
    check_no_dropout,
    check_positions,
    check_vocabulary,
    position_limit,
    read_span,
    token_ids,
)
from .engine import EngineRun, choose_engine
from .errors import InputError, InputTypeError
from .grad2reward import AttributionConfig, TargetSignal
from .judge import Judge
from .judgements import Judgements
from .plan import PackedSequence
from .reader import FrozenReader, Prompt, Response
from .reference_logps import WithReference
from .result import AttributionBatch
from .reward_model import RewardModel
from .rewards import AttributionSummary, OutcomeRewards, VerdictRewards
from .rubric import Rubric, rubric_items

__all__ = ["attribute_batch", "attribute_tokens"]

logger = logging.getLogger("g2r_fast")


def attribute_batch(
    judge: Judge | RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    rubrics: Sequence[Sequence[Rubric | str | Mapping[str, Any]]] | None = None,
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
    With a `RewardModel` of value V it is `r[i] = V softmax(b / tau)`, b = (dV/de * e).sum(-1),
    and V once more on the last token (Eqs. 14, 15).

    Args:
        judge: a frozen `Judge`, or a `RewardModel`.
        prompts, responses: N each; text, message lists (prompts), or policy token ids.
        rubrics: N lists of items: `Rubric`, str, {"criterion", "points"} or
            {"description", "weight"}. At least one item each. None for a `RewardModel`.
        group_size: consecutive rows that answer one prompt; 1: no advantages.
        attribution, advantage: the options of the method, `AttributionConfig`, `AdvantageConfig`.
        verdict: `"argmax"` (a tie is False), `"sample"` (from the two-way probability, one draw
            per judgement from `generator` in row order), or N lists of K bools.
        spans: N lists of (start, stop) in response tokens: the policy's own, where other tokens
            (tool output) lie between. Others get reward and advantage 0. None: all of it.
        reference_logps: also return the judge's own log-probabilities of the response's tokens
            (scaffold `"continuation"`, whose context is the policy's: give prompts and responses
            as the ids it saw, as text may be tokenised otherwise).
        reference_temperature: divides the logits of reference_logps, as the trainer's do.
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
    _check_options(judge, attribution, advantage)
    _check_reference(judge, reference_logps, reference_temperature)
    check_lengths(prompts=prompts, responses=responses)
    check_group_size(len(prompts), group_size)
    check_max_tokens(max_tokens)
    items = _items(judge, prompts, rubrics, attribution, verdict)
    judge.check_frozen()
    with plain_torch(), judge.configured():
        chosen_engine = choose_engine(judge.model, engine)
        batch = Judgements.encode(judge, prompts, responses, items, spans)
        encoded = time.perf_counter()
        method: VerdictRewards | OutcomeRewards
        if isinstance(judge, Judge):
            assert items is not None
            method = VerdictRewards(judge, batch, items, attribution, verdict, generator)
        else:
            method = OutcomeRewards(judge, batch, attribution)
        sequences = batch.sequences()
        reference = WithReference(
            method.signal,
            len(sequences),
            batch.rollouts() if reference_logps else [],
            reference_temperature,
        )
        signal = reference if reference_logps else method.signal
        sequences += reference.sequences
        with _progress_bar(progress, len(sequences)) as advance:
            run = chosen_engine.run(sequences, signal, max_tokens, advance)
        attributed = time.perf_counter()

        own_tokens = batch.own_tokens(judge.device)
        rows = method.rows(own_tokens, keep_attributions)
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
        counts = {**counts, **batch.counts(), **method.counts()}
        stats = _stats(chosen_engine.name, judge, run, method.summary, counts)
        for alarm in stats["alarms"]:
            logger.warning("%s", alarm)
        stats["seconds"] = {
            "encode": encoded - started,
            "engine": attributed - encoded,
            "total": time.perf_counter() - started,
        }
        if run.backward_seconds is not None:
            stats["seconds"]["backward"] = run.backward_seconds
        logger.info(
            "%s engine (%s): %d sequences, %d of %d forward rows, %d backward rows, %.2f s",
            chosen_engine.name, run.backend, len(sequences), run.rows_forward, run.rows_unshared,
            run.rows_backward, stats["seconds"]["engine"],
        )  # fmt: skip
        return AttributionBatch(
            scores=scores,
            verdicts=method.verdicts(),
            verdict_logps=method.verdict_logps(),
            token_rewards=token_rewards,
            token_advantages=advantages,
            attributions=[row.attributions for row in rows] if keep_attributions else None,
            reference_logps=reference.logps(judge.device) if reference_logps else None,
            stats=stats,
            tokens=[judge.token_strings(response) for response in responses],
            rubrics=[
                [(r.text, float(r.weight)) for r in row]
                for row in (items if items is not None else [[]] * len(rows))
            ],
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
    check_no_dropout(model.named_modules(), "model")
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
    with plain_torch():
        chosen_engine.run(sequences, signal, max_tokens)
        return [signal.scores(index) for index in range(len(sequences))]


def _stats(
    engine: str,
    judge: FrozenReader,
    run: EngineRun,
    summary: AttributionSummary,
    counts: dict[str, int],
) -> dict[str, Any]:
    return {
        "engine": engine,
        "backend": run.backend,
        "backends_refused": run.backends_refused,
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


def _check_options(judge: Any, attribution: Any, advantage: Any) -> None:
    if not isinstance(judge, (Judge, RewardModel)):
        raise InputTypeError(
            "judge is not a Judge",
            expected="g2r_fast.Judge or g2r_fast.RewardModel",
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


def _check_reference(judge: Judge | RewardModel, wanted: bool, temperature: float) -> None:
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise InputError(
            "reference_temperature is not positive", expected="a number > 0", got=repr(temperature)
        )
    scaffold = judge.scaffold if isinstance(judge, Judge) else None
    if wanted and scaffold != "continuation":
        raise InputError(
            "reference_logps needs a scaffold that continues the rollout itself",
            expected="a Judge with scaffold='continuation'",
            got="a RewardModel" if scaffold is None else f"scaffold={scaffold!r}",
            fix="Leave reference_logps=False and run the reference model on its own.",
        )


def _items(
    judge: Judge | RewardModel,
    prompts: Sequence[Prompt],
    rubrics: Sequence[Sequence[Any]] | None,
    attribution: AttributionConfig,
    verdict: str | Sequence[Sequence[bool]],
) -> list[list[Rubric]] | None:
    """The rubric items of a Judge; None for a RewardModel, which takes none."""
    if isinstance(judge, Judge):
        if rubrics is None:
            raise InputTypeError("a Judge needs rubrics", expected="N lists of items", got="None")
        check_lengths(prompts=prompts, rubrics=rubrics)
        return rubric_items(rubrics)
    for name, value, default in (
        ("rubrics", rubrics, None),
        ("verdict", verdict, "argmax"),
        ("objective", attribution.objective, "logp"),
    ):
        if value is not default and value != default:
            raise InputError(
                f"{name} is for a Judge; a RewardModel has one value per response",
                expected=repr(default),
                got=repr(value)[:80],
            )
    return None


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
