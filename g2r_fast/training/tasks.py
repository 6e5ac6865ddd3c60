"""Prompts to train on: read from JSON Lines, drawn in an order that only the seed decides."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import InputError
from ..records import BadRecord, read_records
from ..rubric import Rubric

__all__ = [
    "Checker",
    "Task",
    "load_function",
    "prompt_ids",
    "read_tasks",
    "seed_of",
    "tasks_of_step",
]

Checker: TypeAlias = "Callable[[Mapping[str, Any], str], float]"


@dataclass(frozen=True)
class Task:
    """One prompt. rubrics: empty where the data needs none; record: the line it comes from, as a
    checker or a reward function sees it."""

    prompt: str | list[dict[str, str]]
    rubrics: list[Rubric]
    record: Mapping[str, Any]


def read_tasks(path: str | Path, need_rubrics: bool = True) -> list[Task]:
    """The prompts of a file of records (docs/records.md); responses in it are not used.

    Raises InputError for a file that is not there or empty, and for the first bad line: a run
    that trains for days should not have left out what somebody thinks it saw.
    """
    try:
        # A string of JSON may hold other ends of lines, as Unicode has them.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    tasks = []
    if need_rubrics:
        for found in read_records(path, need_responses=False):
            if isinstance(found, BadRecord):
                raise InputError(
                    f"{path} has a bad record: {found.reason}", index=f"line {found.line}"
                )
            items = [Rubric(text, weight) for text, weight in found.rubrics]
            tasks.append(Task(found.prompt, items, json.loads(lines[found.line - 1])))
    else:
        tasks = [_bare(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise InputError(f"{path} holds no records", expected="at least one")
    return tasks


def _bare(line: str, number: int) -> Task:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"a record is no JSON: {error}", index=f"line {number}") from None
    names = ("prompt", "question", "query", "instruction")
    prompt = (
        next((record[n] for n in names if n in record), None) if isinstance(record, dict) else None
    )
    if not prompt or not isinstance(prompt, (str, list)):
        expected = f"an object with one of {', '.join(names)}"
        raise InputError("a record has no prompt", expected=expected, index=f"line {number}")
    return Task(prompt, [], record)


def tasks_of_step(tasks: Sequence[Task], count: int, step: int, seed: int) -> list[Task]:
    """The `count` prompts of a step (from 1): every prompt once, in a new order, then again."""
    first = (step - 1) * count
    chosen: list[Task] = []
    orders: dict[int, list[int]] = {}
    for place in range(first, first + count):
        epoch, within = divmod(place, len(tasks))
        if epoch not in orders:
            orders[epoch] = list(range(len(tasks)))
            random.Random(seed_of(seed, "order", epoch)).shuffle(orders[epoch])
        chosen.append(tasks[orders[epoch][within]])
    return chosen


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """What the policy goes on from: its chat template around the turns, or the text as it is."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    if not isinstance(prompt, str):
        raise InputError(
            "a conversation needs a chat template, and the policy's tokenizer has none",
            expected="prompts as text",
            got=f"{len(prompt)} messages",
        )
    return list(tokenizer(prompt).input_ids)


def seed_of(*parts: object) -> int:
    """A seed that depends on every part: nothing drawn depends on what was drawn before, so a run
    goes on from a step number alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def load_function(where: str) -> Checker:
    """`FILE.py:FUNCTION`, imported from the file."""
    path, _, name = where.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise InputError("a function cannot be found", expected="FILE.py:FUNCTION", got=repr(where))
    spec = spec_from_file_location(f"_g2r_fast_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(Path(path).resolve().parent))  # its neighbours, as if it were run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path} has no function of that name", got=repr(name))
    return function
