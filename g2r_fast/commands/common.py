"""What the commands share: errors of usage, the judge and its options, progress, odd characters."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..records import FORMATS

__all__ = [
    "Progress",
    "UsageError",
    "add_command",
    "add_judge_options",
    "add_method_options",
    "check_engine",
    "complain",
    "load_judge",
    "positive",
    "printable",
    "tell_dropped",
]

DROPPED_NAMES = 20  # told by name; whoever has more knows best what they are


class UsageError(Exception):
    """The command cannot run as given; its message is all the user sees."""


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def tau_option(text: str) -> float | str | tuple[str, float]:
    if text == "auto":
        return text
    try:
        value = float(text.removeprefix("auto:"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, auto or auto:NUMBER")
    return ("auto", value) if text.startswith("auto:") else value


def complain(path: Path, line: int, reason: str) -> None:
    print(f"{path}:{line}: {printable(reason)}", file=sys.stderr, flush=True)


def tell_dropped(dropped: Counter[str]) -> None:
    """One line on stderr about what records held and nothing used: `Records.dropped`."""
    if not dropped:
        return
    told = [
        f"{name} in {count} record{'s' if count > 1 else ''}"
        for name, count in dropped.most_common(DROPPED_NAMES)
    ]
    if len(dropped) > DROPPED_NAMES:
        told.append(f"{len(dropped) - DROPPED_NAMES} other fields")
    print(printable(f"dropped: {', '.join(told)}"), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Control characters and lone surrogates spelled out: records quote what a stranger wrote."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], records: str, **texts: str
) -> argparse.ArgumentParser:
    """A subcommand that reads a file of `records`; `texts` are its help, description and epilog."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE.jsonl", type=Path, help=f"records: {records}")
    parser.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="of the records (default auto: told from the fields of each)",
    )
    return parser


def add_method_options(group: Any, readouts: Sequence[str]) -> None:
    """`--tau --objective --readout`, the fields of `AttributionConfig`."""
    group.add_argument(
        "--tau",
        type=tau_option,
        default=1.0,
        metavar="NUMBER|auto|auto:NUMBER",
        help="attribution temperature; auto divides by the std over the response first "
        "(default 1.0)",
    )
    group.add_argument(
        "--objective",
        choices=("logp", "logp_two_way", "logodds"),
        default="logp",
        help="what is differentiated; logodds does not fade where the judge is sure (default logp)",
    )
    group.add_argument(
        "--readout",
        choices=readouts,
        default="dot",
        help="gradient times embedding, norms of the gradient"
        + (", or no gradient" if "uniform" in readouts else "")
        + " (default dot)",
    )


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """`--judge --scaffold`, and in a group of their own what changes only speed and digits."""
    parser.add_argument(
        "--judge",
        required=True,
        metavar="NAME_OR_PATH",
        help='a Hugging Face causal LM, or "tiny": the small trained judge that is shipped',
    )
    parser.add_argument(
        "--scaffold",
        choices=("grader", "continuation"),
        default="grader",
        help="how it is asked: about the response, or as the next turn after it (default grader)",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--engine", choices=("auto", "packed", "autograd"), default="auto", help="(default auto)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the judge's weights (default: as stored)",
    )
    add("--device", help="for example cpu or cuda:0 (default: cuda where there is one)")
    add("--batch", type=positive, default=8, help="records per call (default 8)")
    add(
        "--max-tokens",
        type=positive,
        help="token rows alive together; lower it when memory runs out (default: from free memory)",
    )


def load_judge(args: argparse.Namespace, kind: Any = None) -> Any:
    """The judge that `add_judge_options` asked for; `kind` stands in for `Judge` in tests.

    Raises UsageError where it cannot be loaded.
    """
    import torch

    if kind is None:
        from ..judge import Judge

        kind = Judge
    if not sys.stderr.isatty():  # nobody watches the loading
        from transformers.utils import logging

        logging.disable_progress_bar()
    # Said only where it is not the default, as kinds of judges that stand in may not know it.
    asked = {} if args.scaffold == "grader" else {"scaffold": args.scaffold}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.judge != "tiny":
            return kind.from_pretrained(args.judge, dtype=args.dtype, device=device, **asked)
        judge = kind.tiny()
        judge = kind(judge.model, judge.tokenizer, **asked) if asked else judge
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        judge.model.to(device=device, dtype=dtype)
        return judge
    except (OSError, ValueError, RuntimeError) as error:  # hub, paths, dtypes, devices
        raise UsageError(f"cannot load the judge {args.judge!r}: {error}") from error


def check_engine(judge: Any, engine: str) -> None:
    """Raises UsageError where `--engine` or a setting (`G2R_BACKEND`, `G2R_CPU`, `G2R_BUILD`) rules
    the judge out: no record can mend that, and so it is no record's fault.
    """
    from ..engine import choose_engine
    from ..errors import InputError

    try:
        with judge.configured():
            choose_engine(judge.model, engine)
    except InputError as error:
        raise UsageError(str(error)) from error


class Progress:
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

    def __enter__(self) -> Progress:
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
