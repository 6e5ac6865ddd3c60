"""`g2r-fast train --config run.yaml`: the reference training loop."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import UsageError

__all__ = ["add_to"]

EPILOG = """\
Settings come from --config, then from the command line. A run that was stopped goes on when the
same command is given again. Several processes: accelerate launch -m g2r_fast.training ...

exit codes: 0 trained; 2 wrong usage

example:
  g2r-fast train --config examples/tiny_policy/demo.yaml --output build/train-demo
"""


def add_to(commands: Any) -> None:
    """Add `train` to the subcommands of a parser; its settings are read only when it runs."""
    parser = commands.add_parser(
        "train",
        help="train a policy with token rewards: the reference loop",
        description="Reinforcement learning with rewards per token (docs/training.md).",
        add_help=False,
        prefix_chars="\0",  # nothing is an option here: all of it goes to the parser below
    )
    parser.add_argument("settings", nargs="*", metavar="--SETTING VALUE")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..errors import InputError, InputTypeError
    from ..training import train
    from ..training.config import add_options, config_of, read_yaml

    logging.disable_progress_bar()  # of loading weights; the run shows its own
    parser = argparse.ArgumentParser(
        prog="g2r-fast train",
        description="Reinforcement learning with rewards per token (docs/training.md).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", type=Path, help="settings, a line each")
    add_options(parser)
    given = vars(parser.parse_args(args.settings))
    path = given.pop("config")
    try:
        if path is not None and not path.is_file():
            raise UsageError(f"{path} is not a file")
        config = config_of({**({} if path is None else read_yaml(path)), **given})
        finished = (Path(config.output) / "final").is_dir()
        final = train(config)
    except (InputError, InputTypeError) as error:
        raise UsageError(str(error)) from None
    again = " (the run was finished; delete its folder to run it again)" if finished else ""
    print(f"final weights: {final}{again}", file=sys.stderr)
    return 0
