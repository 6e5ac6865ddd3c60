"""`attribute_batch` and `attribute_tokens`: a batch in, token rewards out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .advantages import AdvantageConfig, token_advantages_with_counts
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
from .judge import EncodedResponse, Judge, JudgeRequest, Prompt, Response, Rubric, Span, as_rubric
from .plan import PackedSequence
from .result import AttributionBatch

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
    _check_options(judge, reference_logps, reference_temperature)
    _check_lengths(prompts=prompts, responses=responses, rubrics=rubrics)
    items = _rubric_items(rubrics)
    if group_size < 1 or len(prompts) % group_size:
        raise InputError(
            "the batch does not divide into groups",
            expected=f"a multiple of group_size={group_size} rows, group_size >= 1",
            got=f"{len(prompts)} rows",
        )
    judge.check_frozen()
    batch = _Judgements.encode(judge, prompts, responses, items, spans)
    encoded = time.perf_counter()
    signal = VerdictSignal(
        [_whole(request) for request in batch.requests],
        judge.true_id,
        judge.false_id,
        attribution,
        _given_verdicts(verdict, items),
        _draws(verdict, len(batch.requests), generator),
        judge.device,
    )
    chosen_engine = choose_engine(judge.model, engine)
    sequences = [
        PackedSequence(request.input_ids, _whole(request)[0]) for request in batch.requests
    ]
    with _progress_bar(progress, len(sequences)) as advance:
        run = chosen_engine.run(sequences, signal, max_tokens, advance)
    attributed = time.perf_counter()

    own_tokens = batch.own_tokens(judge.device)
    summary = AttributionSummary()
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
    _check_lengths(input_ids=input_ids, spans=spans, target_ids=target_ids)
    AttributionConfig(readout=readout)
    if readout == "uniform":
        raise InputError("readout 'uniform' reads no gradient", expected="'dot' | 'l1' | 'l2'")
    embed = model.get_input_embeddings().weight
    sequences = []
    for index, (ids, span) in enumerate(zip(input_ids, spans, strict=True)):
        ids = _as_list(ids)
        _check_ids([*ids, target_ids[index]], len(embed), index)
        start, stop = span
        if not 0 <= start <= stop <= len(ids):
            raise InputError(
                "a span lies outside its sequence",
                expected=f"0 <= start <= stop <= {len(ids)}",
                got=(start, stop),
                index=index,
            )
        _check_positions(len(ids), getattr(model.config, "max_position_embeddings", None), index)
        sequences.append(PackedSequence(ids, start))
    signal = TargetSignal(
        [(start, stop) for start, stop in spans], target_ids, readout, embed.device
    )
    choose_engine(model, engine).run(sequences, signal, max_tokens)
    return [signal.scores(index) for index in range(len(sequences))]


@dataclass
class _Judgements:
    """All (response, item) pairs of a batch, flat, with what they were made of."""

    responses: list[EncodedResponse]
    requests: list[JudgeRequest]
    items_of: list[range]  # the judgements of each response
    spans: Sequence[Sequence[Span] | None] | None
    unfaithful: int = 0

    @classmethod
    def encode(
        cls,
        judge: Judge,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        items: list[list[Rubric]],
        spans: Sequence[Sequence[Span] | None] | None,
    ) -> _Judgements:
        if spans is not None:
            _check_lengths(responses=responses, spans=spans)
        prompt_ids: dict[str, list[int]] = {}
        rubric_ids: dict[str, list[int]] = {}
        batch = cls([], [], [], spans)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            with _at_row(i):
                key = repr(prompt)
                if key not in prompt_ids:
                    prompt_ids[key] = judge.encode_prompt(prompt)
                encoded = judge.encode_response(response)
                if isinstance(response, str):
                    batch.unfaithful += not judge.encode_untrusted.is_faithful(
                        response, encoded.ids
                    )
                first = len(batch.requests)
                for rubric in items[i]:
                    if rubric.text not in rubric_ids:
                        rubric_ids[rubric.text] = judge.encode_rubric(rubric)
                    request = judge.join(
                        prompt_ids[key],
                        encoded,
                        rubric_ids[rubric.text],
                        None if spans is None else spans[i],
                    )
                    _check_positions(len(request.input_ids), judge.max_positions, None)
                    batch.requests.append(request)
            batch.responses.append(encoded)
            batch.items_of.append(range(first, len(batch.requests)))
        return batch

    def own_tokens(self, device: torch.device) -> list[Tensor]:
        """Which policy tokens are the policy's own, N tensors `[T_i]`."""
        masks = []
        for i, response in enumerate(self.responses):
            spans = None if self.spans is None else self.spans[i]
            mask = torch.zeros(response.token_count, dtype=torch.bool, device=device)
            for start, stop in [(0, response.token_count)] if spans is None else spans:
                mask[start:stop] = True
            masks.append(mask)
        return masks

    def counts(self, items: list[list[Rubric]]) -> dict[str, int]:
        """Odd inputs, for stats."""
        return {
            "empty_responses": sum(not r.ids for r in self.responses),
            "respelled_control_ids": sum(r.respelled for r in self.responses),
            "unfaithful_texts": self.unfaithful,
            "rubrics_without_positive_weight": sum(
                all(r.weight <= 0 for r in row) for row in items
            ),
        }


def _policy_attribution(
    signal: VerdictSignal,
    batch: _Judgements,
    judgement: int,
    config: AttributionConfig,
    summary: AttributionSummary,
) -> Tensor | None:
    """alpha of one judgement per policy token `[T]` float64; None where it is False."""
    if not signal.verdicts[judgement]:
        return None
    request = batch.requests[judgement]
    scores = signal.scores(judgement)
    start, _ = _whole(request)
    inside = [slice(a - start, b - start) for a, b in request.response_spans]
    alpha = softmax_attribution(
        torch.cat([scores[part] for part in inside]) if inside else scores, config
    )
    summary.add(alpha)
    policy = alpha.new_zeros(request.token_count)
    first = request.response_span[0]
    index = [
        t for a, b in request.response_spans for t in request.token_index[a - first : b - first]
    ]
    # Several judge tokens may spell one policy token: their shares add up on it.
    return policy.index_add_(0, torch.tensor(index, dtype=torch.int64, device=alpha.device), alpha)


def _stats(
    engine: str, judge: Judge, run: EngineRun, summary: AttributionSummary, counts: dict[str, int]
) -> dict[str, Any]:
    return {
        "engine": engine,
        "backend": "eager",
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


def _check_options(judge: Any, reference_logps: bool, reference_temperature: float) -> None:
    if not isinstance(judge, Judge):
        raise InputTypeError(
            "judge is not a Judge",
            expected="g2r_fast.Judge",
            got=type(judge).__name__,
            fix="Wrap the model: Judge(model, tokenizer).",
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


def _check_lengths(**arguments: Sequence[Any]) -> None:
    (first, expected), *rest = ((name, len(value)) for name, value in arguments.items())
    for name, length in rest:
        if length != expected:
            raise InputError(
                "arguments differ in length",
                expected=f"{expected} rows, as many as {first}",
                got=f"{name} with {length}",
            )


def _check_ids(ids: Sequence[int], vocab_size: int, row: int) -> None:
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InputError(
                "an id is outside the vocabulary",
                expected=f"0 <= id < {vocab_size}",
                got=token_id,
                index=f"row {row}, position {position}",
                fix="Are the ids from another tokenizer, or padded with -100?",
            )


def _check_positions(length: int, limit: int | None, row: int | None) -> None:
    if limit is not None and length > limit:
        raise InputError(
            "a sequence is longer than the model's positions",
            expected=f"at most {limit} tokens",
            got=length,
            index=row,
            fix="Shorten the prompt or the response.",
        )


def _rubric_items(rubrics: Sequence[Sequence[Any]]) -> list[list[Rubric]]:
    items = []
    for row, of_row in enumerate(rubrics):
        if isinstance(of_row, (str, Mapping, Rubric)) or not isinstance(of_row, Sequence):
            raise InputTypeError(
                "rubrics must be a list of items per row",
                expected="N lists",
                got=type(of_row).__name__,
                index=row,
            )
        if not of_row:
            raise InputError("a row has no rubric items", expected="at least one", index=row)
        with _at_row(row):
            items.append([as_rubric(item) for item in of_row])
    return items


def _given_verdicts(
    verdict: str | Sequence[Sequence[bool]], items: list[list[Rubric]]
) -> list[bool] | None:
    if isinstance(verdict, str):
        if verdict not in ("argmax", "sample"):
            raise InputError(
                "unknown verdict",
                expected="'argmax' | 'sample' | N lists of K bools",
                got=repr(verdict),
            )
        return None
    _check_lengths(rubrics=items, verdict=verdict)
    for row, (given, of_row) in enumerate(zip(verdict, items, strict=True)):
        if len(given) != len(of_row):
            raise InputError(
                "a row has another number of verdicts than rubric items",
                expected=str(len(of_row)),
                got=len(given),
                index=row,
            )
    return [bool(v) for given in verdict for v in given]


def _draws(
    verdict: str | Sequence[Sequence[bool]], count: int, generator: torch.Generator | None
) -> list[float] | None:
    """One uniform number per judgement, in row order, so that packing cannot change a draw."""
    if verdict != "sample":
        return None
    device = generator.device if generator is not None else "cpu"
    draws: list[float] = torch.rand(count, generator=generator, device=device).tolist()
    return draws


def _whole(request: JudgeRequest) -> Span:
    """From the first attributed token to behind the last."""
    if not request.response_spans:
        return (len(request.input_ids), len(request.input_ids))
    return (request.response_spans[0][0], request.response_spans[-1][1])


def _as_list(ids: Any) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


@contextmanager
def _at_row(row: int) -> Iterator[None]:
    """Name the row in the errors of what happens inside."""
    try:
        yield
    except (InputError, InputTypeError) as error:
        raise type(error)(f"row {row}: {error}".removesuffix(".")) from error


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
