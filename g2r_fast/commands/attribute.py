"""`g2r-fast attribute FILE.jsonl --judge NAME --out OUT.jsonl`, resumable."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InputError, InputTypeError, UnsupportedModelError
from ..records import (
    BadRecord,
    Record,
    Records,
    read_finished,
    read_records,
    record_key,
    result_line,
)
from .common import (
    Progress,
    UsageError,
    add_command,
    add_judge_options,
    add_method_options,
    check_engine,
    complain,
    load_judge,
    positive,
    printable,
    tell_dropped,
)

__all__ = ["add_to"]

# Written out because advantages.py, which owns them, imports torch; a test compares the two.
ESTIMATORS = ("returns_pooled", "rewards_pooled", "normalise_then_cumsum", "scaled_sequence")

EPILOG = """\
FILE holds one record a line, HealthBench's fields plus the responses:
  {"prompt": [{"role": "user", "content": "..."}], "prompt_id": "...",
   "rubrics": [{"criterion": "...", "points": 5}], "responses": ["...", "..."]}
("prompt" may be a string; "response" with one string does instead of "responses".)
Or, with the same responses, the fields of other data sets:
  rar         {"question": "...", "rubric": [{"title", "description", "weight"}]}
  researchqa  {"query": "...", "rubric": [{"rubric_item", "type"}]}
  criteria    {"prompt": "...", "criteria": [{"name", "description", "weight"}]}
              or "rubric": {"name": "description", ...}
The responses of one record form a group; advantages need at least two.
--verdict given takes "verdicts", [G][K] of true and false, from the record; this machine then
attributes and does not judge.

OUT gets one line per finished record:
  line, id, key, settings, scores [G], verdicts [G][K], verdict_logps [G][K] (nats),
  token_rewards [G][T], token_advantages [G][T] or null, tokens [G][T],
  and where the rubric items have names or types: labels [K]
An interrupted run goes on where it stopped when the same command is given again. Only --batch,
--max-tokens, --device, --show, --html and --compare may differ; --overwrite starts anew.

exit codes: 0 all done; 1 some records were bad (named on stderr), the others are done;
2 wrong usage; 130 interrupted

example:
  g2r-fast attribute examples.jsonl --judge tiny --out rewards.jsonl --show
"""


def add_to(commands: Any) -> None:
    """Add `attribute` to the subcommands of a parser."""
    attribute = add_command(
        commands,
        "attribute",
        _attribute,
        "prompt, rubrics, responses",
        help="token rewards for the responses in a JSONL file",
        description="Judges every response against its rubric and writes token rewards.",
        epilog=EPILOG,
    )
    add = attribute.add_argument
    add("--out", required=True, metavar="OUT.jsonl", type=Path, help="results, appended to")
    add("--overwrite", action="store_true", help="discard what OUT holds and start anew")

    method = attribute.add_argument_group("method")
    add_method_options(method, ("dot", "l1", "l2", "uniform"))
    add = method.add_argument
    add(
        "--estimator",
        choices=ESTIMATORS,
        default="returns_pooled",
        help="token advantages (default returns_pooled)",
    )
    add("--no-std", action="store_true", help="advantages: do not divide by the std")
    add(
        "--verdict",
        choices=("argmax", "sample", "given"),
        default="argmax",
        help="the judge's own, or the verdicts in the records (default argmax)",
    )
    add("--seed", type=int, default=0, help="for --verdict sample (default 0)")

    add_judge_options(attribute)

    output = attribute.add_argument_group("output")
    add = output.add_argument
    add("--show", action="store_true", help="print a heat map of every response")
    add("--html", metavar="PAGE.html", type=Path, help="write a page of what this run attributes")
    add(
        "--html-records",
        metavar="N",
        type=positive,
        default=50,
        help="records on the page at most, the first ones (default 50)",
    )
    add(
        "--compare",
        action="store_true",
        help="afterwards, run the first --batch records as plain loops too and compare",
    )


def _attribute(args: argparse.Namespace) -> int:
    if not args.file.is_file():  # a pipe cannot be read again when a run is resumed
        raise UsageError(f"{args.file} is not a file")
    if args.out.exists() and args.out.samefile(args.file):
        raise UsageError("--out is the input file")
    if args.out.exists() and not args.out.is_file():
        raise UsageError(f"--out is not a file: {args.out}")
    if not args.out.parent.is_dir():
        raise UsageError(f"the folder of --out does not exist: {args.out.parent}")
    if args.html is not None:
        if args.html.suffix not in (".html", ".htm"):  # it is overwritten, whatever it holds
            raise UsageError(f"--html: {args.html} does not end in .html")
        if not args.html.parent.is_dir():
            raise UsageError(f"the folder of --html does not exist: {args.html.parent}")
    settings = _settings(args)
    finished: dict[int, str] = {}
    if not args.overwrite:
        finished, half_written = read_finished(args.out, settings)
        if half_written:
            print(f"dropped a half-written last line of {args.out}", file=sys.stderr)

    # A first pass over FILE, so that bad lines and a changed FILE show before hours of work.
    n_good, n_bad = 0, 0
    unseen = dict(finished)
    records = _records(args)
    for record in records:
        if isinstance(record, BadRecord):
            n_bad += 1
            complain(args.file, record.line, record.reason)
            continue
        n_good += 1
        if unseen.get(record.line) == record_key(record, settings):
            del unseen[record.line]
    if unseen:
        raise UsageError(
            f"line {min(unseen)} of {args.file} is not the record that {args.out} was computed "
            "from. Choose another --out, or --overwrite to start anew."
        )
    if finished:
        print(f"{len(finished)} of {n_good} records were done before", file=sys.stderr)
    args.out.touch()
    if len(finished) < n_good or args.overwrite or (args.compare and n_good):
        n_bad += _run(args, settings, finished, n_good)
    elif args.html is not None:
        _tell_no_page(args.html)
    tell_dropped(records.dropped)
    return 1 if n_bad else 0


def _run(
    args: argparse.Namespace, settings: dict[str, Any], finished: dict[int, str], n_good: int
) -> int:
    """Attributes what is not finished; returns how many records turned out bad on the way."""
    api = _api()
    calls = _Calls(api, args)
    compare = _import_compare() if args.compare else None
    page = None if args.html is None else _Page(args.html, args.html_records)
    n_bad = 0
    todo = (record for record in _good(args) if record.line not in finished)
    live = sys.stderr.isatty() and not args.show  # heat maps would run through the bar
    mode = "wb" if args.overwrite else "ab"
    with open(args.out, mode) as sink, Progress(n_good, live) as progress:
        progress.advance(len(finished))
        while batch := list(islice(todo, args.batch)):
            lines = {}
            calls.keep_attributions = page is not None and not page.is_full
            for record, result in calls.attribute(batch):
                if isinstance(result, str):
                    n_bad += 1
                    complain(args.file, record.line, result)
                else:
                    lines[record.line] = result_line(record, result, settings)
                    if page is not None:
                        page.add(record, result)
                    if args.show:
                        print(f"line {record.line}")
                        result.show()
            sink.write(b"".join(lines[number] for number in sorted(lines)))
            sink.flush()
            os.fsync(sink.fileno())
            progress.advance(len(batch))
    for alarm in calls.alarms:
        print(f"alarm: {alarm}", file=sys.stderr)
    if page is not None:
        page.write(printable(args.file.name))
    if compare is not None:
        sample = list(islice(_good(args), args.batch))
        options = {"engine": args.engine, "max_tokens": args.max_tokens}
        print(compare(calls.judge, sample, **options))
    return n_bad


def _records(args: argparse.Namespace) -> Records:
    return read_records(args.file, args.format, verdicts=args.verdict == "given")


def _good(args: argparse.Namespace) -> Iterator[Record]:
    return (record for record in _records(args) if isinstance(record, Record))


def _api() -> Any:
    """What the command needs of the library; imports torch and transformers."""
    from ..advantages import AdvantageConfig
    from ..api import attribute_batch
    from ..grad2reward import AttributionConfig
    from ..judge import Judge

    return SimpleNamespace(
        AdvantageConfig=AdvantageConfig,
        AttributionConfig=AttributionConfig,
        Judge=Judge,
        attribute_batch=attribute_batch,
        check_engine=check_engine,
    )


def _import_compare() -> Any:
    """`compare(judge, records, *, engine, max_tokens)` -> a printable summary."""
    from ..compare import compare

    return compare


def _import_write_page() -> Any:
    """`write_page(path, [(heading, batch), ...], title=...)`."""
    from ..html import write_page

    return write_page


def _tell_no_page(path: Path) -> None:
    print(f"{path} is not written: nothing was left to attribute", file=sys.stderr)


class _Page:
    """The first records of a run, for a page that is written when all of them are there."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.write_page = _import_write_page()  # now, as it would be a pity in the end
        self.groups: dict[int, tuple[str, Any]] = {}  # line -> (heading, batch)
        self.n_seen = 0

    @property
    def is_full(self) -> bool:
        return len(self.groups) >= self.limit

    def add(self, record: Record, result: Any) -> None:
        """A call may bring its records in any order, so a last call is taken as a whole."""
        self.n_seen += 1
        if result.attributions is not None:
            name = "" if record.id is None else f", {record.id}"
            self.groups[record.line] = (printable(f"line {record.line}{name}"), result.to("cpu"))

    def write(self, title: str) -> None:
        first = sorted(self.groups)[: self.limit]
        if not first:
            return _tell_no_page(self.path)
        self.write_page(self.path, [self.groups[line] for line in first], title=title)
        if len(first) < self.n_seen:
            told = f"{self.path} shows the first {len(first)} of {self.n_seen} records of this run"
            print(f"{told}; see --html-records", file=sys.stderr)


class _Calls:
    """The judge, and calls of attribute_batch that lose no good record to a bad one."""

    def __init__(self, api: Any, args: argparse.Namespace) -> None:
        self.api, self.args = api, args
        self.keep_attributions = False
        self.alarms: dict[str, None] = {}  # distinct, in the order of their first time
        logging.getLogger("g2r_fast").setLevel(logging.ERROR)  # alarms are told once, at the end
        try:
            self.attribution = api.AttributionConfig(
                tau=args.tau, objective=args.objective, readout=args.readout
            )
            self.advantage = api.AdvantageConfig(
                estimator=args.estimator, divide_by_std=not args.no_std
            )
        except (InputError, InputTypeError) as error:
            raise UsageError(str(error)) from error
        self.judge = load_judge(args, api.Judge)
        api.check_engine(self.judge, args.engine)

    def attribute(self, batch: list[Record]) -> Iterator[tuple[Record, Any]]:
        """Each record with its AttributionBatch, or with the reason why it has none.

        Records of equally many responses share a call. Sampled verdicts get a call and a generator
        for each record, so that they depend neither on --batch nor on where a run was interrupted.
        """
        groups: dict[int, list[Record]] = {}
        for record in batch:
            together = len(record.responses) if self.args.verdict != "sample" else -record.line
            groups.setdefault(together, []).append(record)
        for records in groups.values():
            yield from self._attribute_or_split(records)

    def _attribute_or_split(self, records: list[Record]) -> Iterator[tuple[Record, Any]]:
        try:
            result = self._call(records)
        except UnsupportedModelError as error:
            raise UsageError(str(error)) from error
        except (InputError, InputTypeError) as error:
            if len(records) == 1:
                yield records[0], str(error)
                return
            for record in records:
                yield from self._attribute_or_split([record])
            return
        yield from zip(records, result, strict=True)

    def _call(self, records: list[Record]) -> list[Any]:
        group_size = len(records[0].responses)
        options: dict[str, Any] = {"verdict": self.args.verdict}
        if self.keep_attributions:
            options["keep_attributions"] = True
        if self.args.verdict == "given":
            options["verdict"] = [row for record in records for row in record.verdicts or ()]
        if self.args.verdict == "sample":
            import torch

            seed = hashlib.sha256(f"{self.args.seed} {records[0].digest}".encode()).digest()
            options["generator"] = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        items = [[{"criterion": c, "points": p} for c, p in record.rubrics] for record in records]
        result = self.api.attribute_batch(
            self.judge,
            [record.prompt for record in records for _ in record.responses],
            [response for record in records for response in record.responses],
            [item for item in items for _ in range(group_size)],
            group_size=group_size,
            attribution=self.attribution,
            advantage=self.advantage,
            max_tokens=self.args.max_tokens,
            engine=self.args.engine,
            **options,
        )
        self.alarms.update(dict.fromkeys(result.stats.get("alarms", ())))
        return [result.select(i * group_size, (i + 1) * group_size) for i in range(len(records))]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on: --batch, --max-tokens and --device change only the speed."""
    settings: dict[str, Any] = {
        "judge": args.judge,
        "tau": list(args.tau) if isinstance(args.tau, tuple) else args.tau,
        "objective": args.objective,
        "readout": args.readout,
        "estimator": args.estimator,
        "divide_by_std": not args.no_std,
        "verdict": args.verdict,
        "engine": args.engine,
        "dtype": args.dtype,
    }
    if args.verdict == "sample":
        settings["seed"] = args.seed
    if args.scaffold != "grader":
        settings["scaffold"] = args.scaffold
    return settings
