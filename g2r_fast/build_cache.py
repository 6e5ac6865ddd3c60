"""The native parts in the user's cache: for installs that could not build them.

An isolated `pip install` does not see torch's headers, and a wheel may come to a machine that its
libraries do not suit. `g2r-fast build`, or the first use, then compiles the sources that are part
of the package; the next process finds the library there.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .building import (
    BuildError,
    Part,
    build,
    package_version,
    problem_of,
    source_folder,
    tools,
)

__all__ = ["build_in_cache", "cache_folder", "cached_path", "last_output", "remembered_failure"]

LOCK_SECONDS = 900.0  # many times the longest build; then something else is wrong


def build_in_cache(parts: Sequence[Part], package: Path, force: bool = False) -> dict[Part, str]:
    """Build into the user's cache what is not there; returns the reasons of what is still missing.

    Of several processes that come here at once, one builds and the others wait for it. A failure
    is remembered beside the library and not tried again, except with `force`, or when there is
    another compiler.
    """
    reasons: dict[Part, str] = {}
    try:
        cache_folder(package).mkdir(parents=True, exist_ok=True)
        with _lock(cache_folder(package) / "lock"):
            todo = {}
            for part in parts:
                path = _path(part, package, part.suffix)
                failure = None if force else remembered_failure(part, package)
                if failure is not None:
                    reasons[part] = failure
                elif force or problem_of(part, path, package) is not None:
                    todo[part] = path
            if not todo:
                return reasons
            names = " and ".join(f"g2r_fast.{part.name}" for part in todo)
            again = "" if force else ", once; G2R_BUILD=never keeps it from doing so"
            _say(f"compiling {names} into {cache_folder(package)}{again}")
            began = time.monotonic()
            failed = build(todo, package)
            for part in todo:
                if part in failed:
                    reasons[part] = str(failed[part])
                    if not failed[part].passing:
                        _remember_failure(part, package, failed[part])
                    _say(f"g2r_fast.{part.name} is left out ({failed[part]}); {part.cost}")
                else:
                    _failure_path(part, package).unlink(missing_ok=True)
            if len(failed) < len(todo):
                _say(f"compiled in {time.monotonic() - began:.0f} s")
    except (BuildError, OSError) as error:
        for part in parts:
            reasons.setdefault(part, f"the cache cannot be used ({error})")
    return reasons


def cached_path(part: Part, package: Path) -> Path | None:
    """Where this part lies in the cache, once it is built from the sources as they are.

    None where there is no place for a cache.
    """
    try:
        return _path(part, package, part.suffix)
    except BuildError:
        return None


def _path(part: Part, package: Path, suffix: str) -> Path:
    digest = part.digest(source_folder(package))
    return cache_folder(package) / f"{part.name}-{digest[:20]}{suffix}"


def remembered_failure(part: Part, package: Path) -> str | None:
    """Why an earlier attempt failed, where the next one would be the same."""
    try:
        note = json.loads(_failure_path(part, package).read_text(encoding="utf-8"))
    except (BuildError, OSError, ValueError):
        return None
    same = isinstance(note, dict) and note.get("tools") == tools()
    return str(note.get("reason")) if same else None


def last_output(part: Part, package: Path) -> str:
    """What the compiler said when it failed, all of it that was kept."""
    try:
        note = json.loads(_failure_path(part, package).read_text(encoding="utf-8"))
        return f"{note['output']}\n"
    except (BuildError, OSError, ValueError, KeyError):
        return ""


def _remember_failure(part: Part, package: Path, error: BuildError) -> None:
    note = {"reason": str(error), "tools": tools(), "output": error.output[-20_000:]}
    text = json.dumps(note, indent=1) + "\n"
    _failure_path(part, package).write_text(text, encoding="utf-8")


def _failure_path(part: Part, package: Path) -> Path:
    return _path(part, package, f"{part.suffix}.failed.json")


def cache_folder(package: Path) -> Path:
    """One folder for each version and platform: home folders are shared between machines."""
    if os.environ.get("G2R_CACHE"):
        root = Path(os.environ["G2R_CACHE"])
    else:
        try:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "g2r_fast")
        except RuntimeError as error:
            raise BuildError(f"{error}; set G2R_CACHE") from error
    platform = sysconfig.get_platform()
    if hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        platform += "-" + (os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", "")
    return root.absolute() / f"{package_version(package)}-{platform}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Alone with `path`, on every machine that shares the folder, where the file system can."""
    try:
        import fcntl
    except ImportError:  # not on this system: a library still appears whole or not at all
        yield
        return
    with open(path, "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for too long") from None
                if not waiting:
                    _say("waiting for another process that compiles the native parts")
                waiting = True
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                pass
            yield
            return


def _say(line: str) -> None:
    print(f"g2r_fast: {line}", file=sys.stderr, flush=True)
