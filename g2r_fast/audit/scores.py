"""The engine's part of an audit: verdicts, log-odds and token scores of many judgements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias

from torch import Tensor

from ..engine import choose_engine
from ..errors import InputError, InputTypeError
from ..grad2reward import AttributionConfig, VerdictSignal
from ..judge import Judge
from ..judgements import Judgements
from ..plan import Read
from ..records import BadRecord, Record
from ..rubric import Rubric, rubric_items
from ..signal import Cotangents, LeafRows, ReadsNoLinears

__all__ = [
    "AuditSettings",
    "Judged",
    "Report",
    "Row",
    "Scores",
    "check_readable",
    "plain_settings",
    "rows_of",
    "run_engine",
    "silent",
]

Report = Callable[[str, int, int], None]  # what is being done, how many are done, of how many

# (prompt, response, rubric items), as attribute_batch takes them
Judged: TypeAlias = "tuple[Any, str, Sequence[Rubric | str | Mapping[str, Any]]]"

BASELINES = ("mean", "zero")


@dataclass(frozen=True)
class AuditSettings:
    """How the checks are done.

    attribution: tau, objective and readout that are looked at. everything: attribute all items,
        not only those judged True. seed: of noise, shuffles and the bootstrap. noise: sizes
        relative to the RMS of the judge's input embedding. steps, baseline: of integrated
        gradients; the response's tokens start from the mean of the vocabulary's embeddings
        (`"mean"`) or from `"zero"`. resamples: of the bootstrap. batch: records per engine call.

    Raises InputError for sizes, steps and baselines that cannot be used.
    """

    attribution: AttributionConfig = AttributionConfig()
    everything: bool = False
    seed: int = 0
    noise: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    steps: int = 32
    baseline: str = "mean"
    resamples: int = 1000
    batch: int = 8
    engine: str = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.attribution.readout == "uniform":
            raise InputError(
                "readout 'uniform' has nothing to audit", expected="'dot' | 'l1' | 'l2'"
            )
        if self.baseline not in BASELINES:
            raise InputError(
                "unknown baseline",
                expected=" | ".join(map(repr, BASELINES)),
                got=repr(self.baseline),
            )
        for name in ("steps", "resamples", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is not positive", got=getattr(self, name))
        if self.seed < 0:
            raise InputError("seed is negative", got=self.seed)
        if any(not size >= 0 for size in self.noise):
            raise InputError("a size of noise is negative", got=self.noise)


@dataclass(frozen=True)
class Row:
    """One response and the rubric items it is judged against; `record` groups rows."""

    prompt: Any  # as Judge.encode_prompt takes it
    response: str
    items: list[Rubric]
    record: int = 0


@dataclass
class Scores:
    """What one run of the engine says about every judgement, rows in order, items within."""

    input_ids: list[list[int]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # the response, in input_ids
    margins: list[float] = field(default_factory=list)  # z_true - z_false, the log-odds
    # b [T] by readout, float64 on the CPU; None where nothing was brought back
    tokens: dict[str, list[Tensor | None]] = field(default_factory=dict)

    @property
    def verdicts(self) -> list[bool]:
        return [margin > 0 for margin in self.margins]


def run_engine(
    judge: Judge,
    rows: Sequence[Row],
    settings: AuditSettings,
    report: Report,
    what: str,
    *,
    objective: str = "logp",
    readouts: Sequence[str] = (),
) -> Scores:
    """Judge every row; with `readouts`, one backward gives the token scores of all of them.

    Scores are wanted where the verdict is True, or everywhere with `settings.everything`.
    """
    found = Scores(tokens={readout: [] for readout in readouts})
    total = sum(len(row.items) for row in rows)
    for chunk in _chunks(rows, settings.batch):
        batch = _encode(judge, chunk)
        signals = [
            VerdictSignal(
                batch.attributed_spans(),
                judge.true_id,
                judge.false_id,
                AttributionConfig(objective=objective, readout=readout),
                [True] * len(batch.requests) if settings.everything else None,
                None,
                judge.device,
                batch.labels(),
            )
            for readout in (readouts or ("uniform",))  # uniform brings nothing back
        ]
        with judge.configured():
            engine = choose_engine(judge.model, settings.engine)
            engine.run(batch.sequences(), _Together(signals), settings.max_tokens)
        for j, request in enumerate(batch.requests):
            found.input_ids.append(list(request.input_ids))
            found.spans.append(request.response_span)
            found.margins.append(signals[0].margins[j])
            for signal in signals if readouts else ():
                wanted = signal.verdicts[j]
                scores = signal.scores(j).double().cpu() if wanted else None
                found.tokens[signal.readout].append(scores)
        report(what, len(found.margins), total)
    return found


def _encode(judge: Judge, rows: Sequence[Row]) -> Judgements:
    return Judgements.encode(
        judge,
        [row.prompt for row in rows],
        [row.response for row in rows],
        [row.items for row in rows],
        None,
    )


def rows_of(records: Iterable[Record | Judged]) -> list[Row]:
    """One row per response, with its record's items; InputTypeError names what is no record."""
    if isinstance(records, (Record, str)) or not isinstance(records, Iterable):
        raise _no_record("records cannot be read", "a list of ", records, None)
    prompts: list[Any] = []
    responses: list[list[str]] = []
    rubrics: list[Sequence[Any]] = []
    for number, record in enumerate(records):
        if isinstance(record, Record):
            prompts.append(record.prompt)
            responses.append(record.responses)
            rubrics.append([Rubric(text, weight) for text, weight in record.rubrics])
        elif isinstance(record, (tuple, list)) and len(record) == 3:
            prompts.append(record[0])
            responses.append([record[1]])
            rubrics.append(record[2])
        else:
            raise _no_record("a record cannot be read", "", record, number)
    return [
        Row(prompts[number], text, items, number)
        for number, items in enumerate(rubric_items(rubrics))
        for text in responses[number]
    ]


def _no_record(what: str, many: str, got: Any, number: int | None) -> InputTypeError:
    if isinstance(got, (tuple, list)):
        came = f"a {type(got).__name__} of {len(got)}"
    else:
        came = type(got).__name__
    bad = f"Line {got.line} of its file: {got.reason}" if isinstance(got, BadRecord) else None
    expected = f"{many}Record or (prompt, response, rubric items)"
    return InputTypeError(what, expected=expected, got=came, index=number, fix=bad)


def check_readable(judge: Judge, record: Record) -> None:
    """Raise InputError or InputTypeError for a record that this judge cannot be asked about."""
    _encode(judge, rows_of([record]))


class _Together(ReadsNoLinears):
    """Several signals of one objective as one: each reads the same gradient its own way."""

    leaf = 0

    def __init__(self, signals: Sequence[VerdictSignal]) -> None:
        self.signals = signals

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        # Every one of them is asked, as each notes verdicts and scales of its own.
        answers = [signal.cotangents(logits, reads) for signal in self.signals]
        return answers[0]

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        for signal in self.signals:
            signal.on_leaf(rows, values, grads)


def _chunks(rows: Sequence[Row], records: int) -> Iterator[list[Row]]:
    groups: list[list[Row]] = [list(group) for _, group in groupby(rows, lambda row: row.record)]
    for start in range(0, len(groups), records):
        yield [row for group in groups[start : start + records] for row in group]


def silent(what: str, done: int, total: int) -> None:
    """A report that nobody reads."""


def plain_settings(settings: AuditSettings) -> dict[str, Any]:
    """What the numbers depend on, for JSON; batch and max_tokens change only the speed."""
    chosen = settings.attribution
    return {
        "tau": list(chosen.tau) if isinstance(chosen.tau, tuple) else chosen.tau,
        "objective": chosen.objective,
        "readout": chosen.readout,
        "all": settings.everything,
        "seed": settings.seed,
        "noise": list(settings.noise),
        "steps": settings.steps,
        "baseline": settings.baseline,
        "resamples": settings.resamples,
        "engine": settings.engine,
    }
