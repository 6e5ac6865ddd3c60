"""HealthBench records in, results out, one JSON object a line; read and checked one at a time.

    {"prompt": [{"role": "user", "content": "…"}, …] or "…",
     "rubrics": [{"criterion": "…", "points": 5, "tags": ["…"]}, …],
     "response": "…" or "responses": ["…", …],
     "prompt_id": "…"}

`prompt`, `rubrics` and `prompt_id` are as HealthBench (arXiv 2505.08775) is published; the
responses are what you add. `id` does instead of `prompt_id`; other fields are ignored.

A results file has one line per finished record, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .result import AttributionBatch

__all__ = [
    "BadRecord",
    "OutputFileError",
    "Record",
    "read_finished",
    "read_records",
    "record_key",
    "result_line",
]

LINE_START = b'{"line": '  # how every line of a results file begins


@dataclass(frozen=True)
class Record:
    """One prompt, its rubric items as (text, weight) and the responses to judge.

    line: line number in the file, from 1. digest: SHA-256 of the content; the spelling of the JSON
    and ignored fields do not change it.
    """

    line: int
    id: str | int | None
    prompt: str | list[dict[str, str]]
    responses: list[str]
    rubrics: list[tuple[str, float]]
    digest: str


@dataclass(frozen=True)
class BadRecord:
    """A line that holds no usable record, and why."""

    line: int
    reason: str


class OutputFileError(InputError):
    """A results file that must not be appended to."""


class _Bad(Exception):
    pass


def read_records(path: str | os.PathLike[str]) -> Iterator[Record | BadRecord]:
    """`[json.loads(line) for line in open(path) if line.strip()]`, streamed and validated.

    A line that is no valid record comes out as a BadRecord; the others are not affected. Blank
    lines are skipped. Raises OSError where the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield _record(number, _parse(raw))
            except _Bad as error:
                yield BadRecord(number, str(error))


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad(f"invalid UTF-8 at byte {error.start} of the line") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Bad(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond the parser's limits
        raise _Bad(f"invalid JSON: {error}") from None


def _record(line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise _Bad(f"expected a JSON object, got {_kind(value)}")
    prompt = _prompt(value)
    rubrics = _rubrics(value)
    responses = _responses(value)
    identity = _identity(value)
    content = {"prompt": prompt, "rubrics": rubrics, "responses": responses, "id": identity}
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    return Record(line, identity, prompt, responses, rubrics, digest)


def _prompt(value: dict[str, Any]) -> str | list[dict[str, str]]:
    prompt = _field(value, "prompt")
    if isinstance(prompt, str):
        return _text(prompt, "prompt")
    if not isinstance(prompt, list):
        raise _Bad(f"prompt: expected a string or a list of messages, got {_kind(prompt)}")
    if not prompt:
        raise _Bad("prompt: the list of messages is empty")
    messages = []
    for index, message in enumerate(prompt):
        where = f"prompt[{index}]"
        if not isinstance(message, dict):
            raise _Bad(f"{where}: expected an object, got {_kind(message)}")
        # Other keys of a message are dropped: the judge reads these two.
        messages.append(
            {
                key: _text(_field(message, key, f"{where}."), f"{where}.{key}")
                for key in ("role", "content")
            }
        )
    return messages


def _rubrics(value: dict[str, Any]) -> list[tuple[str, float]]:
    rubrics = _field(value, "rubrics")
    if not isinstance(rubrics, list):
        raise _Bad(f"rubrics: expected a list, got {_kind(rubrics)}")
    if not rubrics:
        raise _Bad("rubrics: the list is empty")
    items = []
    for index, item in enumerate(rubrics):
        where = f"rubrics[{index}]"
        if not isinstance(item, dict):
            raise _Bad(f"{where}: expected an object, got {_kind(item)}")
        criterion = _text(_field(item, "criterion", f"{where}."), f"{where}.criterion")
        if not criterion.strip():
            raise _Bad(f"{where}.criterion: empty")
        points = _field(item, "points", f"{where}.")
        if isinstance(points, bool) or not isinstance(points, (int, float)):
            raise _Bad(f"{where}.points: expected a number, got {_kind(points)}")
        try:
            weight = float(points)
        except OverflowError:
            weight = math.inf
        if not math.isfinite(weight):
            raise _Bad(f"{where}.points: expected a finite number")
        if not isinstance(item.get("tags", []), list):
            raise _Bad(f"{where}.tags: expected a list, got {_kind(item['tags'])}")
        items.append((criterion, weight))
    return items


def _responses(value: dict[str, Any]) -> list[str]:
    if "response" in value and "responses" in value:
        raise _Bad("both response and responses are there; keep one")
    if "response" in value:
        return [_text(value["response"], "response")]
    if "responses" not in value:
        raise _Bad("no response: add response (a string) or responses (a list of strings)")
    responses = value["responses"]
    if not isinstance(responses, list):
        raise _Bad(f"responses: expected a list, got {_kind(responses)}")
    if not responses:
        raise _Bad("no response: the list responses is empty")
    return [_text(response, f"responses[{index}]") for index, response in enumerate(responses)]


def _identity(value: dict[str, Any]) -> str | int | None:
    name = "prompt_id" if value.get("prompt_id") is not None else "id"
    identity = value.get(name)
    if isinstance(identity, bool) or not isinstance(identity, (str, int, type(None))):
        raise _Bad(f"{name}: expected a string or an integer, got {_kind(identity)}")
    return identity


def _field(value: dict[str, Any], name: str, where: str = "") -> Any:
    if name not in value:
        raise _Bad(f"missing field {where}{name}")
    return value[name]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{where}: expected a string, got {_kind(value)}")
    # JSON can spell half of a surrogate pair (\ud800), which no tokenizer can encode.
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise _Bad(f"{where}: holds a lone surrogate, which is no character")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


# --- results out --------------------------------------------------------------------------------


def record_key(record: Record, settings: dict[str, Any]) -> str:
    """What makes a result reusable: the record's place and content, and the settings."""
    text = json.dumps([record.line, record.digest, settings], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def result_line(record: Record, result: AttributionBatch, settings: dict[str, Any]) -> bytes:
    """One line of a results file. Floats keep all digits of a float32; infinities become null."""
    advantages = result.token_advantages
    entry: dict[str, Any] = {
        "line": record.line,
        "id": record.id,
        "key": record_key(record, settings),
        "settings": settings,
        "scores": _floats(result.scores.tolist()),
        "verdicts": result.verdicts,
        "verdict_logps": [_floats(row) for row in result.verdict_logps],
        "token_rewards": [_floats(row.tolist()) for row in result.token_rewards],
        "token_advantages": None
        if advantages is None
        else [_floats(row.tolist()) for row in advantages],
    }
    if result.tokens is not None:
        entry["tokens"] = result.tokens
    return json.dumps(entry, allow_nan=False).encode("ascii") + b"\n"


def _floats(values: Iterable[float]) -> list[float | None]:
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values]


def read_finished(path: Path, settings: dict[str, Any]) -> tuple[dict[int, str], bool]:
    """`{entry["line"]: entry["key"] for entry in map(json.loads, open(path))}`

    A half-written last line, as a killed run leaves it, is cut off the file; the second value says
    whether there was one. Raises OutputFileError where the file holds anything but results, or
    results of other settings; then nothing is cut off.
    """
    finished: dict[int, str] = {}
    if not path.exists():
        return finished, False
    advice = "Choose another --out, or --overwrite to discard what is there."
    whole = 0  # bytes up to the end of the last whole line
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            # Only what looks like ours counts as half-written: --out may be a slip of the pen.
            if not (raw.startswith(LINE_START) or LINE_START.startswith(raw)):
                raise OutputFileError(f"{path}, line {number}, is no result of ours", fix=advice)
            if not raw.endswith(b"\n"):
                break
            try:
                entry = json.loads(raw)
                line, key, before = entry["line"], entry["key"], dict(entry["settings"])
            except (ValueError, KeyError, TypeError) as error:
                raise OutputFileError(
                    f"{path}, line {number}, is no result of ours", fix=advice
                ) from error
            if before != settings:
                names = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
                raise OutputFileError(
                    f"{path} was computed with other settings",
                    expected=", ".join(f"{name}={before.get(name)!r}" for name in names),
                    got=", ".join(f"{name}={settings.get(name)!r}" for name in names),
                    fix=advice,
                )
            finished[line] = key
            whole += len(raw)
    half_written = path.stat().st_size > whole
    if half_written:
        os.truncate(path, whole)
    return finished, half_written
