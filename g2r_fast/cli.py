"""The command line: `g2r-fast attribute FILE.jsonl --judge NAME --out OUT.jsonl`.

Exit codes: 0 all records done, 1 some records were bad and the others are done, 2 wrong usage,
130 interrupted. torch and transformers are imported only once there is work to do.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .errors import InputError, InputTypeError, UnsupportedModelError
from .records import (
    BadRecord,
    OutputFileError,
    Record,
    read_finished,
    read_records,
    record_key,
    result_line,
)

__all__ = ["main"]

# Written out because advantages.py, which owns them, imports torch; a test compares the two.
ESTIMATORS = ("returns_pooled", "rewards_pooled", "normalise_then_cumsum", "scaled_sequence")

EPILOG = """\
FILE holds one record a line, HealthBench's fields plus the responses:
  {"prompt": [{"role": "user", "content": "..."}], "prompt_id": "...",
   "rubrics": [{"criterion": "...", "points": 5}], "responses": ["...", "..."]}
("prompt" may be a string; "response" with one string does instead of "responses".)
The responses of one record form a group; advantages need at least two.

OUT gets one line per finished record:
  line, id, key, settings, scores [G], verdicts [G][K], verdict_logps [G][K] (nats),
  token_rewards [G][T], token_advantages [G][T] or null, tokens [G][T]
An interrupted run goes on where it stopped when the same command is given again. Only --batch,
--max-tokens, --device, --show and --compare may differ; --overwrite starts anew.

exit codes: 0 all done; 1 some records were bad (named on stderr), the others are done;
2 wrong usage; 130 interrupted

example:
  g2r-fast attribute examples.jsonl --judge tiny --out rewards.jsonl --show
"""


class _UsageError(Exception):
    """The command cannot run as given; its message is all the user sees."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code (`SystemExit(2)` for unknown options)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (_UsageError, OutputFileError) as error:
        print(f"g2r-fast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="g2r-fast", description="Dense token rewards from the gradients of a frozen judge."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    attribute = commands.add_parser(
        "attribute",
        help="token rewards for the responses in a JSONL file",
        description="Judges every response against its rubric and writes token rewards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    attribute.set_defaults(run=_attribute)
    add = attribute.add_argument
    add("file", metavar="FILE.jsonl", type=Path, help="records: prompt, rubrics, responses")
    add(
        "--judge",
        required=True,
        metavar="NAME_OR_PATH",
        help='a Hugging Face causal LM, or "tiny": the small trained judge that is shipped',
    )
    add("--out", required=True, metavar="OUT.jsonl", type=Path, help="results, appended to")
    add("--overwrite", action="store_true", help="discard what OUT holds and start anew")

    method = attribute.add_argument_group("method")
    add = method.add_argument
    add(
        "--tau",
        type=_tau,
        default=1.0,
        metavar="NUMBER|auto|auto:NUMBER",
        help="attribution temperature; auto divides by the std over the response first "
        "(default 1.0)",
    )
    add(
        "--objective",
        choices=("logp", "logp_two_way", "logodds"),
        default="logp",
        help="what is differentiated; logodds does not fade where the judge is sure (default logp)",
    )
    add(
        "--readout",
        choices=("dot", "l1", "l2", "uniform"),
        default="dot",
        help="gradient times embedding, norms of the gradient, or no gradient (default dot)",
    )
    add(
        "--estimator",
        choices=ESTIMATORS,
        default="returns_pooled",
        help="token advantages (default returns_pooled)",
    )
    add("--no-std", action="store_true", help="advantages: do not divide by the std")
    add("--verdict", choices=("argmax", "sample"), default="argmax", help="(default argmax)")
    add("--seed", type=int, default=0, help="for --verdict sample (default 0)")

    machine = attribute.add_argument_group("machine")
    add = machine.add_argument
    add("--engine", choices=("auto", "packed", "autograd"), default="auto", help="(default auto)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the judge's weights (default: as stored)",
    )
    add("--device", help="for example cpu or cuda:0 (default: cuda where there is one)")
    add("--batch", type=_positive, default=8, help="records per call (default 8)")
    add(
        "--max-tokens",
        type=_positive,
        help="token rows alive together; lower it when memory runs out (default: from free memory)",
    )

    output = attribute.add_argument_group("output")
    add = output.add_argument
    add("--show", action="store_true", help="print a heat map of every response")
    add(
        "--compare",
        action="store_true",
        help="afterwards, run the first --batch records as plain loops too and compare",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def _tau(text: str) -> float | str | tuple[str, float]:
    if text == "auto":
        return text
    try:
        value = float(text.removeprefix("auto:"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, auto or auto:NUMBER")
    return ("auto", value) if text.startswith("auto:") else value


def _attribute(args: argparse.Namespace) -> int:
    if not args.file.is_file():  # a pipe cannot be read again when a run is resumed
        raise _UsageError(f"{args.file} is not a file")
    if args.out.exists() and args.out.samefile(args.file):
        raise _UsageError("--out is the input file")
    if args.out.exists() and not args.out.is_file():
        raise _UsageError(f"--out is not a file: {args.out}")
    if not args.out.parent.is_dir():
        raise _UsageError(f"the folder of --out does not exist: {args.out.parent}")
    settings = _settings(args)
    finished: dict[int, str] = {}
    if not args.overwrite:
        finished, half_written = read_finished(args.out, settings)
        if half_written:
            print(f"dropped a half-written last line of {args.out}", file=sys.stderr)

    # A first pass over FILE, so that bad lines and a changed FILE show before hours of work.
    n_good, n_bad = 0, 0
    unseen = dict(finished)
    for record in read_records(args.file):
        if isinstance(record, BadRecord):
            n_bad += 1
            _complain(args.file, record.line, record.reason)
            continue
        n_good += 1
        if unseen.get(record.line) == record_key(record, settings):
            del unseen[record.line]
    if unseen:
        raise _UsageError(
            f"line {min(unseen)} of {args.file} is not the record that {args.out} was computed "
            "from. Choose another --out, or --overwrite to start anew."
        )
    if finished:
        print(f"{len(finished)} of {n_good} records were done before", file=sys.stderr)
    args.out.touch()
    if len(finished) < n_good or args.overwrite or (args.compare and n_good):
        n_bad += _run(args, settings, finished, n_good)
    return 1 if n_bad else 0


def _run(
    args: argparse.Namespace, settings: dict[str, Any], finished: dict[int, str], n_good: int
) -> int:
    """Attributes what is not finished; returns how many records turned out bad on the way."""
    api = _api()
    calls = _Calls(api, args)
    compare = _import_compare() if args.compare else None
    n_bad = 0
    todo = (record for record in _good(args.file) if record.line not in finished)
    live = sys.stderr.isatty() and not args.show  # heat maps would run through the bar
    mode = "wb" if args.overwrite else "ab"
    with open(args.out, mode) as sink, _Progress(n_good, live) as progress:
        progress.advance(len(finished))
        while batch := list(islice(todo, args.batch)):
            lines = {}
            for record, result in calls.attribute(batch):
                if isinstance(result, str):
                    n_bad += 1
                    _complain(args.file, record.line, result)
                else:
                    lines[record.line] = result_line(record, result, settings)
                    if args.show:
                        print(f"line {record.line}")
                        result.show()
            sink.write(b"".join(lines[number] for number in sorted(lines)))
            sink.flush()
            os.fsync(sink.fileno())
            progress.advance(len(batch))
    for alarm in calls.alarms:
        print(f"alarm: {alarm}", file=sys.stderr)
    if compare is not None:
        sample = list(islice(_good(args.file), args.batch))
        options = {"engine": args.engine, "max_tokens": args.max_tokens}
        print(compare(calls.judge, sample, **options))
    return n_bad


def _good(path: Path) -> Iterator[Record]:
    return (record for record in read_records(path) if isinstance(record, Record))


def _complain(path: Path, line: int, reason: str) -> None:
    # Reasons may quote what a stranger wrote.
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in reason)
    print(f"{path}:{line}: {text}", file=sys.stderr, flush=True)


def _api() -> Any:
    """What the command needs of the library; imports torch and transformers."""
    from .advantages import AdvantageConfig
    from .api import attribute_batch
    from .grad2reward import AttributionConfig
    from .judge import Judge

    return SimpleNamespace(
        AdvantageConfig=AdvantageConfig,
        AttributionConfig=AttributionConfig,
        Judge=Judge,
        attribute_batch=attribute_batch,
    )


def _import_compare() -> Any:
    """`compare(judge, records, *, engine, max_tokens)` -> a printable summary."""
    from .compare import compare

    return compare


class _Calls:
    """The judge, and calls of attribute_batch that lose no good record to a bad one."""

    def __init__(self, api: Any, args: argparse.Namespace) -> None:
        self.api, self.args = api, args
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
            raise _UsageError(str(error)) from error
        try:
            self.judge = self._load_judge()
        except (OSError, ValueError, RuntimeError) as error:  # hub, paths, dtypes, devices
            raise _UsageError(f"cannot load the judge {args.judge!r}: {error}") from error

    def _load_judge(self) -> Any:
        import torch

        device = self.args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.args.judge == "tiny":
            judge = self.api.Judge.tiny()
            dtype = None if self.args.dtype is None else getattr(torch, self.args.dtype)
            judge.model.to(device=device, dtype=dtype)
            return judge
        return self.api.Judge.from_pretrained(self.args.judge, dtype=self.args.dtype, device=device)

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
            raise _UsageError(str(error)) from error
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
        options: dict[str, Any] = {}
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
            verdict=self.args.verdict,
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
    return settings


class _Progress:
    """A bar on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, total: int, live: bool) -> None:
        self.total, self.done = total, 0
        self.bar: Any = None
        if live:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

            self.bar = Progress(
                *Progress.get_default_columns()[:2],
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                redirect_stdout=False,
            )
            self.task = self.bar.add_task("records", total=total)

    def __enter__(self) -> _Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.task, count)
        elif count:
            print(f"{self.done} of {self.total} records", file=sys.stderr, flush=True)
