"""`g2r-fast build`: compile the native parts into the user's cache, now."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from .common import UsageError

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add `build` to the subcommands of a parser."""
    parser = commands.add_parser(
        "build",
        help="compile the native parts that are missing",
        description="Compiles the native parts that are missing into the cache of this user "
        "(G2R_CACHE, or g2r_fast in XDG_CACHE_HOME or ~/.cache), as their first use would. What "
        "failed before is tried again. The CUDA library is compiled where there is nvcc.",
        epilog="exit codes: 0 all that can be compiled here is there; 1 one could not be "
        "compiled; 2 wrong usage",
    )
    parser.add_argument(
        "--force", action="store_true", help="compile all of them, even where they are there"
    )
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> int:
    from .. import native
    from ..build_cache import build_in_cache, cached_path, last_output
    from ..building import CUDA_OPS, PARTS, parts_here
    from ..doctor import remedy
    from ..errors import InputError

    try:
        native.may_build()  # `never` is for first uses; what is no value at all is a mistake
    except InputError as error:
        raise UsageError(str(error)) from error
    here = parts_here()
    parts = [part for part in here if args.force or not native.status(part.name).built]
    for part in (*PARTS, CUDA_OPS):
        if part in parts:
            continue
        status = native.status(part.name)
        print(status)
        if not status.built:  # and there is no compiler for it
            print(f"  {remedy(part)}")
    if not parts:
        return 0
    began = time.monotonic()
    reasons = build_in_cache(parts, native.PACKAGE, force=True)
    seconds = time.monotonic() - began
    for part in parts:
        if part in reasons:
            print(f"g2r_fast.{part.name}: not compiled: {reasons[part]}")
            print(last_output(part, native.PACKAGE), file=sys.stderr, end="")
        else:
            print(f"g2r_fast.{part.name}: {cached_path(part, native.PACKAGE)}")
    print(f"{seconds:.0f} s")
    return 1 if reasons else 0
