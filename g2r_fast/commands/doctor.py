"""`g2r-fast doctor`: what is built, what runs, and why not something faster."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add `doctor` to the subcommands of a parser."""
    parser = commands.add_parser(
        "doctor",
        help="what is built, what runs, and why not something faster",
        description="Tells versions, what of the package is compiled and where it lies, which CPU "
        "kernels are in use, and for every device and dtype which implementation runs and why the "
        "others do not. It compiles nothing and changes nothing.",
        epilog="exit codes: 0 all is as asked for; 1 something that G2R_BACKEND, G2R_CPU or "
        "G2R_BUILD asks for cannot be had; 2 wrong usage",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from ..doctor import as_text, examine

    report = examine()
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 1 if report["problems"] else 0
