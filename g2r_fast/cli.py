"""The command `g2r-fast`: `g2r-fast COMMAND ...`, one module of `commands` each.

Exit codes: 0 all done, 1 some records were bad and the others are done, 2 wrong usage,
130 interrupted. torch and transformers are imported only once there is work to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import attribute, audit, build, canaries, doctor, train
from .commands.common import UsageError
from .records import OutputFileError

__all__ = ["main"]

COMMANDS = (attribute, audit, canaries, train, doctor, build)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code (`SystemExit(2)` for unknown options)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (UsageError, OutputFileError) as error:
        print(f"g2r-fast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = "; the same command goes on from here" if args.command == "attribute" else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="g2r-fast", description="Dense token rewards from the gradients of a frozen judge."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser
