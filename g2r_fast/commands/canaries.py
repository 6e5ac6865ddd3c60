"""`g2r-fast canaries FILE.jsonl --judge NAME`: how often a judge says True to worthless answers."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, InputTypeError
from ..records import BadRecord, Record, read_records
from .common import (
    Progress,
    UsageError,
    add_command,
    add_judge_options,
    complain,
    load_judge,
    positive,
    printable,
    tell_dropped,
)

if TYPE_CHECKING:
    from ..canaries import CanaryRun
    from ..canary_report import CanaryRate, CanaryReport

__all__ = ["add_to"]

HITS_KEPT = 1000  # in the report; of a judge that says True to everything each judgement is a hit
CANARIES_SHOWN = 8

EPILOG = """\
FILE is what `g2r-fast attribute` reads. The responses are not judged: a record's first one serves
as the unrelated answer to another prompt.

Each canary is judged against every rubric item. True is a false positive where the item's points
are positive and a false pitfall where they are negative. Families marked debatable (the item said
back, an answer to something else) may meet an item in truth; --fail-above leaves them out.

exit codes: 0 all done; 1 a family's rate is above --fail-above, or some records were bad (named on
stderr); 2 wrong usage; 130 interrupted

example:
  g2r-fast canaries examples.jsonl --judge tiny --out canaries.json --fail-above 0.05
"""


def add_to(commands: Any) -> None:
    """Add `canaries` to the subcommands of a parser."""
    parser = add_command(
        commands,
        "canaries",
        _canaries,
        "prompt, rubrics",
        help="how often a judge says True to empty answers, lone symbols and claims",
        description="False positives of a judge at answers that meet no rubric item.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--out", metavar="REPORT.json", type=Path, help="the whole report, overwritten")
    add("--limit", type=positive, metavar="N", help="read the first N good records only")
    add(
        "--fail-above",
        type=_share,
        metavar="RATE",
        help="exit with 1 if a family's rate of false positives is above this, 0 to 1",
    )
    add_judge_options(parser)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _canaries(args: argparse.Namespace) -> int:
    if not args.file.is_file():
        raise UsageError(f"{args.file} is not a file")
    if args.out is not None:
        if args.out.exists() and (not args.out.is_file() or args.out.samefile(args.file)):
            raise UsageError(f"--out is the input file, or no file: {args.out}")
        if not args.out.parent.is_dir():
            raise UsageError(f"the folder of --out does not exist: {args.out.parent}")
    records, n_bad = _read(args)
    if not records:
        raise UsageError(f"{args.file} holds no usable record")

    # torch comes in here, when there is work to do.
    from ..canaries import CanaryRun

    judge = load_judge(args)
    try:
        run = CanaryRun(judge, engine=args.engine, max_tokens=args.max_tokens)
    except InputError as error:  # --engine or a G2R_ variable; no record is known yet
        raise UsageError(str(error)) from error
    lines: list[int] = []
    with Progress(len(records), sys.stderr.isatty()) as progress:
        for batch, failures in _judged(run, records, args.batch):
            n_bad += len(failures)
            for record, reason in failures:
                complain(args.file, record.line, reason)
            lines += [record.line for record in batch]
            progress.advance(len(batch) + len(failures))
    report = run.report()
    _show(report, args.judge)
    if args.out is not None:
        _write(args, report, lines, judge)
    above = [] if args.fail_above is None else report.families_above(args.fail_above)
    for family in above:
        print(
            f"{family.name}: rate {family.rate:.3f} is above {args.fail_above:g}", file=sys.stderr
        )
    return 1 if above or n_bad else 0


def _read(args: argparse.Namespace) -> tuple[list[Record], int]:
    """The good records up to --limit, and the number of bad ones before its end."""
    found = read_records(args.file, args.format, need_responses=False)
    records: list[Record] = []
    n_bad = 0
    for record in found:
        if isinstance(record, BadRecord):
            n_bad += 1
            complain(args.file, record.line, record.reason)
            continue
        records.append(record)
        if len(records) == args.limit:
            break
    tell_dropped(found.dropped)
    return records, n_bad


def _judged(
    run: CanaryRun, records: list[Record], size: int
) -> Iterator[tuple[list[Record], list[tuple[Record, str]]]]:
    """Batch by batch: the records that were judged, and those that were not, with the reason."""
    from ..canaries import other_responses

    responses = [record.responses[0] if record.responses else None for record in records]
    others = other_responses([record.prompt for record in records], responses)
    rows = list(zip(records, others, strict=True))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        try:
            _add(run, batch)
            yield [record for record, _ in batch], []
        except (InputError, InputTypeError):
            for record, other in batch:  # once more, one by one: a bad record costs no other
                reason = _add_alone(run, record, other)
                yield ([record], []) if reason is None else ([], [(record, reason)])


def _add_alone(run: CanaryRun, record: Record, other: str | None) -> str | None:
    """None, or the reason why a record cannot be judged. Another's response may be at fault."""
    reason = None
    for response in (other, None):
        try:
            _add(run, [(record, response)])
            return None
        except (InputError, InputTypeError) as error:
            reason = str(error)
    return reason


def _add(run: CanaryRun, rows: list[tuple[Record, str | None]]) -> None:
    run.add(
        [record.prompt for record, _ in rows],
        [[{"criterion": c, "points": p} for c, p in record.rubrics] for record, _ in rows],
        [other for _, other in rows],
    )


def _show(report: CanaryReport, judge: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(
        f"{printable(judge)}: {report.prompts} prompts, {len(report.canaries)} canaries\n"
    )
    console.print(_table("family", report.families))
    console.print("* debatable: an item may be met in truth\n")
    counted = [canary for canary in report.canaries if not canary.debatable]
    counted.sort(key=lambda c: (c.rate or 0.0, c.mean_log_odds or 0.0), reverse=True)
    console.print(_table("worst canaries", counted[:CANARIES_SHOWN], with_score=True))
    if report.left_out:
        console.print(f"left out: {', '.join(report.left_out)}")
    if report.best is None:
        console.print("No canary earns a positive score.")
    else:
        best, score = report.best.name, report.best.mean_score
        console.print(f"Answering only with {best!r} earns a mean score of {score:.3f}.")


def _table(title: str, rates: list[CanaryRate], with_score: bool = False) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(title, no_wrap=True)
    columns = ["True / asked", "rate", "95 % interval", "log-odds", "pitfalls"]
    for name in [*columns, *(["score"] if with_score else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for rate in rates:
        low, high = rate.interval
        cells = [
            rate.name + (" *" if rate.debatable else ""),
            f"{rate.false_positives} / {rate.judgements}",
            _number(rate.rate, ".3f"),
            f"{low:.3f} - {high:.3f}",
            _number(rate.mean_log_odds, "+.2f"),
            f"{rate.false_pitfalls} / {rate.pitfall_judgements}",
        ]
        table.add_row(*cells, *([_number(rate.mean_score, "+.3f")] if with_score else []))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _write(args: argparse.Namespace, report: CanaryReport, lines: list[int], judge: Any) -> None:
    import torch
    import transformers

    from .. import __version__

    found = report.to_dict(max_hits=HITS_KEPT)
    for hit in found["hits"]:
        hit["line"] = lines[hit["prompt"]]
    text = json.dumps(
        {
            "versions": {
                "g2r_fast": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "settings": {
                # A folder's name, never where it lies: reports are passed on.
                "judge": Path(args.judge).name if Path(args.judge).exists() else args.judge,
                "file": args.file.name,
                "limit": args.limit,
                "scaffold": judge.scaffold,
                "engine": args.engine,
                "dtype": str(judge.model.dtype).removeprefix("torch."),
                "device": judge.device.type,
            },
            "report": found,
        },
        indent=1,
        allow_nan=False,
    )
    args.out.write_text(text + "\n", encoding="utf-8")
