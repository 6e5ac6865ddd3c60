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
import tempfile
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

__all__ = [
    "build_in_cache",
    "cache_folder",
    "cached_path",
    "last_output",
    "problem_of_cache",
    "remembered_failure",
]

LOCK_SECONDS = 900.0  # many times the longest build; then something else is wrong
_FIX = "set G2R_CACHE to a folder that can be written"

_told: set[str] = set()


class _LockError(Exception):
    """Another process has what we need, and keeps it."""


def build_in_cache(parts: Sequence[Part], package: Path, force: bool = False) -> dict[Part, str]:
    """Build into the user's cache what is not there; returns the reasons of what is still missing.

    Of several processes that come here at once, one builds and the others wait for it. A failure
    is remembered beside the library and not tried again, except with `force`, or when there is
    another compiler. What keeps this process from using the cache is told on stderr, once.
    """
    reasons: dict[Part, str] = {}
    try:
        cache_folder(package).mkdir(parents=True, exist_ok=True)
        with _lock(cache_folder(package) / "lock") as alone:
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
            if not alone:
                _say(
                    "this folder has no file locks: every process that comes here meanwhile "
                    "compiles as well, which is slower, with the same answers; run `g2r-fast "
                    "build` beforehand, or set G2R_CACHE to a folder that has them"
                )
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
    except _LockError as error:
        _leave_out(parts, reasons, f"{error}; other processes may run what is compiled")
    except (BuildError, OSError) as error:
        _leave_out(parts, reasons, f"the cache folder cannot be used ({error}); {_FIX}")
    return reasons


def _leave_out(parts: Sequence[Part], reasons: dict[Part, str], why: str) -> None:
    missing = [part for part in parts if part not in reasons]
    reasons.update(dict.fromkeys(missing, why))
    if missing and why not in _told:
        _told.add(why)
        names = " and ".join(f"g2r_fast.{part.name}" for part in missing)
        _say(f"without {names} the reference path runs, slower, same answers: {why}")


def problem_of_cache(package: Path) -> str | None:
    """Why nothing can be built into the cache, and how to mend it; nothing is left behind."""
    try:
        folder = found = cache_folder(package)
        while not found.exists():
            found = found.parent
        # Permissions do not tell: root may write everywhere, but not where nobody can.
        with tempfile.TemporaryFile(dir=found):
            return None
    except BuildError as error:
        return f"there is no cache folder ({error}); {_FIX}"
    except OSError as error:
        return f"the cache folder {folder} cannot be used ({error.strerror}); {_FIX}"


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
            raise BuildError(str(error)) from error
    platform = sysconfig.get_platform()
    if hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        platform += "-" + (os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", "")
    return root.absolute() / f"{package_version(package)}-{platform}"


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Alone with `path`, on every machine that shares the folder; False where there are no locks.

    There too, a library appears whole or not at all. Raises _LockError after LOCK_SECONDS.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield False
        return
    with open(path, "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        waiting, alone = False, True
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _LockError(
                        f"another process has held {path} for {LOCK_SECONDS:.0f} s"
                    ) from None
                if not waiting:
                    _say("waiting for another process that compiles the native parts")
                waiting = True
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                alone = False
            yield alone
            return


def _say(line: str) -> None:
    print(f"g2r_fast: {line}", file=sys.stderr, flush=True)
