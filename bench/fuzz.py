"""Hostile strings by the hundred thousand through every kind of tokenizer: none may act.

    python -m bench.fuzz [--strings 100000] [--in-python 2000] [--seed 0] [--save hostile-fuzz]

The strings and what is checked for each are those of tests/hostile.py, which the test suite runs
with fewer strings. A tokenizer in Python is asked less often: it decodes once per id.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.facts import command, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hostile import BUILT, Subject, fuzz, real

PACKAGES = ("tokenizers", "transformers", "mistral-common", "sentencepiece")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def subjects() -> dict[str, tuple[str, Subject]]:
    """Every tokenizer, and whether it was built here or is a published one."""
    found = {name: ("built", subject) for name, subject in BUILT.items()}
    try:
        found |= {name: ("real", subject) for name, subject in real().items()}
    except ImportError as error:
        print(f"no real tokenizers: {error}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="hostile strings through every tokenizer")
    parser.add_argument("--strings", type=int, default=100_000, help="per tokenizer")
    parser.add_argument("--in-python", type=int, default=2_000, help="per tokenizer in Python")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for name, (source, subject) in subjects().items():
        count = arguments.in_python if subject.in_python else arguments.strings
        started = time.process_time()
        found = fuzz(subject, count, arguments.seed)
        seconds = time.process_time() - started
        rows.append(
            {
                "tokenizer": name,
                "source": source,
                "kind": subject.kind,
                "in_python": subject.in_python,
                "clean": found.clean(),
                **found.as_dict(),
                "cpu_seconds": round(seconds, 1),
            }
        )
        state = "clean" if found.clean() else f"NOT CLEAN {found.examples}"
        print(f"{name}: {found.strings} strings, {state}, {seconds:.0f} s", flush=True)
    total = {
        source: sum(row["strings"] for row in rows if row["source"] == source)
        for source in ("built", "real")
    }
    if arguments.save:
        save(
            arguments.save,
            {
                "command": command(),
                "date": time.strftime("%Y-%m-%d"),
                "seed": arguments.seed,
                "versions": versions(),
                "strings": total,
                "control_ids": sum(row["control_ids"] for row in rows),
                "unfaithful": sum(row["unfaithful"] for row in rows),
                "tokenizers": rows,
            },
        )
    return 0 if all(row["clean"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
