"""The build of the native parts: what is compiled, when again, and what a failure leaves behind.

The sources here are a few lines, as what is tested is how they become a library and are found.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from g2r_fast import build_cache, building, native
from g2r_fast.building import CORE, CPU_OPS, CUDA_OPS
from g2r_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    building.find_compiler() is None, reason="no C++ compiler on this machine"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two tiny libraries, in a checkout of its own, and an empty cache."""
    folder = tmp_path / "checkout" / "g2r_fast"
    (folder.parent / "csrc" / "cpu").mkdir(parents=True)
    folder.mkdir()
    (folder / "__init__.py").write_text('__version__ = "7.8"\n')
    answers(folder, 1)
    write(folder, "torch_ops.cpp", '#include "cpu/table.h"\nint used() { return table(); }')
    write(folder, "cpu/table.h", "int table();")
    write(folder, "cpu/dispatch.cpp", "int table() { return 3; }")
    for name in ("G2R_BUILD", "XDG_CACHE_HOME", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("G2R_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "PACKAGE", folder)
    monkeypatch.setattr(build_cache, "_told", set())
    return folder


def write(package, name, text):
    (package.parent / "csrc" / name).write_text(text + "\n")


def answers(package, number):
    exported = 'extern "C" __attribute__((visibility("default")))'
    write(package, "core.cpp", f"{exported} int answer() {{ return {number}; }}")


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def load(part, build=True, use=lambda path: path):
    return native.load_part(part, use, build)


def test_each_part_is_made_of_its_own_files():
    folder = building.source_folder(ROOT / "g2r_fast")
    core, ops, cuda = (
        {path.relative_to(folder).as_posix() for path in part.files(folder)}
        for part in (CORE, CPU_OPS, CUDA_OPS)
    )
    assert {"core.cpp", "prefixes.h"} <= core
    assert {"torch_ops.cpp", "cpu/kernels.h", "cpu/dispatch.cpp"} <= ops
    assert not core & ops and not cuda & (core | ops)
    everything = {
        path.relative_to(folder).as_posix()
        for pattern in ("**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh")
        for path in folder.glob(pattern)
    }
    assert core | ops | cuda == everything, "a source that no library is made of"


def test_a_library_says_what_it_was_built_from(package, tmp_path):
    path = tmp_path / "out" / "library.so"
    assert building.build({CORE: path}, package) == {}
    assert building.problem_of(CORE, path, package) is None
    assert answer(path) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["library.so"], "left something over"
    assert str(package).encode() not in path.read_bytes(), "holds a path of this machine"
    assert "built from other sources" in building.problem_of(CPU_OPS, path, package)
    answers(package, 2)
    assert "built from other sources (of version 7.8)" in building.problem_of(CORE, path, package)


def test_without_sources_the_version_decides(package, tmp_path):
    path = tmp_path / "library.so"
    building.build({CORE: path}, package)
    (package.parent / "csrc").rename(tmp_path / "elsewhere")
    assert building.problem_of(CORE, path, package) is None
    (package / "__init__.py").write_text('__version__ = "7.9"\n')
    assert "of version 7.8" in building.problem_of(CORE, path, package)


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, -1])
def test_a_library_that_was_cut_short_is_never_loaded(package, tmp_path, kept):
    path = tmp_path / "library.so"
    building.build({CORE: path}, package)
    path.write_bytes(path.read_bytes()[:kept])
    problem = building.problem_of(CORE, path, package)
    assert str(path) in problem and ("damaged" in problem or "cannot be read" in problem)


def test_a_file_that_is_no_library_is_never_loaded(package, tmp_path):
    path = tmp_path / "library.so"
    path.write_text("<html>not found</html>")
    assert "damaged" in building.problem_of(CORE, path, package)
    subprocess.run([*building.find_compiler(), "-shared", "-x", "c++", "-", "-o", path], input=b"")
    assert "does not say what it was built from" in building.problem_of(CORE, path, package)


def test_the_first_use_builds_what_is_missing_once_and_says_so(package, capsys):
    path, status = load(CORE)
    assert status.built and status.path == str(path) and answer(path) == 1
    said = capsys.readouterr().err
    assert said.count("compiling") == 1 and "g2r_fast._core and g2r_fast._cpu_ops" in said
    assert str(path.parent) in said and "G2R_BUILD=never" in said
    assert load(CPU_OPS)[1].built, "the other part came along"
    assert load(CORE)[0] == path
    assert capsys.readouterr().err == "", "said or built something again"


def test_changed_sources_make_another_library(package):
    before, _ = load(CORE)
    answers(package, 2)
    after, _ = load(CORE)
    assert after != before and answer(after) == 2
    answers(package, 1)
    assert load(CORE, build=False)[0] == before, "the first one still serves the first sources"


def test_a_stale_library_in_the_package_is_told_and_replaced(package):
    stale = package / CORE.file_name
    building.build({CORE: stale}, package)
    answers(package, 2)
    _, status = load(CORE, build=False)
    assert f"{stale} was built from other sources" in status.reason
    path, status = load(CORE)
    assert status.built and path != stale and answer(path) == 2


def test_a_library_that_does_not_load_gives_way(package):
    bad = package / CORE.file_name
    building.build({CORE: bad}, package)

    def use(path):
        if path == bad:
            raise OSError("version `GLIBC_2.99' not found")
        return path

    _, status = load(CORE, build=False, use=use)
    assert str(bad) in status.reason and "GLIBC_2.99" in status.reason
    assert load(CORE, use=use)[1].built


def test_a_failure_is_remembered_until_something_changes(package, capsys, monkeypatch):
    write(package, "core.cpp", "int answer() { return nothing; }")
    _, status = load(CORE)
    assert "core.cpp" in status.reason and "nothing" in status.reason
    said = capsys.readouterr().err
    assert "left out" in said and CORE.cost in said
    assert load(CPU_OPS)[1].built, "one part's failure is not the other's"
    capsys.readouterr()

    with monkeypatch.context() as patch:
        patch.setattr(build_cache, "build", lambda *_: pytest.fail("tried again"))
        assert "nothing" in load(CORE)[1].reason
    assert capsys.readouterr().err == ""
    assert "was not declared" in build_cache.last_output(CORE, package)

    tried = []
    monkeypatch.setattr(build_cache, "build", lambda parts, _: tried.extend(parts) or {})
    build_cache.build_in_cache([CORE], package, force=True)
    monkeypatch.setenv("CXX", f"{building.find_compiler()[0]} -Wall")
    build_cache.build_in_cache([CORE], package)
    assert tried == [CORE, CORE], "by hand, and with another compiler"


def test_without_a_compiler_the_reason_is_told_once(package, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "CXX=/no/such/compiler is not there" in load(CORE)[1].reason
    assert "left out" in capsys.readouterr().err
    assert "CXX=/no/such/compiler is not there" in load(CORE)[1].reason
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("CXX")
    assert load(CORE)[1].built, "a compiler has come"


def test_never_means_never(package, monkeypatch):
    monkeypatch.setenv("G2R_BUILD", "never")
    monkeypatch.setattr(build_cache, "build", lambda *_: pytest.fail("built"))
    assert load(CORE)[1].reason == "it was never built; G2R_BUILD=never"
    monkeypatch.setenv("G2R_BUILD", "maybe")
    with pytest.raises(InputError, match=r"auto \| never; got maybe"):
        load(CORE)


def test_a_wrong_setting_is_told_though_everything_is_built(package, monkeypatch):
    assert load(CORE)[1].built
    monkeypatch.setenv("G2R_BUILD", "maybe")
    with pytest.raises(InputError, match=r"auto \| never; got maybe"):
        load(CORE)
    assert load(CORE, build=False)[1].built, "whoever builds nothing does not read it"


def test_whoever_only_looks_builds_nothing(package, monkeypatch):
    monkeypatch.setattr(build_cache, "build", lambda *_: pytest.fail("built"))
    with native.looking_only():
        assert load(CORE)[1].reason == "it was never built"


def test_the_note_of_a_failed_install_is_the_reason(package):
    (package / "_core_missing.txt").write_text("no g++ here\n")
    assert load(CORE, build=False)[1].reason == "no g++ here"


@pytest.mark.parametrize("place", ["file/cache", "file", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_told_once(place, package, tmp_path, capsys, monkeypatch):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text("")
    assert build_cache.problem_of_cache(package) is None
    monkeypatch.setenv("G2R_CACHE", str(tmp_path / place))
    reason = load(CORE)[1].reason
    assert "the cache folder cannot be used" in reason and "set G2R_CACHE to a folder" in reason
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("_core", "_cpu_ops", "the reference path runs, slower", "set G2R_CACHE"):
        assert word in line
    assert not load(CPU_OPS)[1].built
    assert capsys.readouterr().err == "", "told twice"
    problem = build_cache.problem_of_cache(package)
    assert str(tmp_path / place) in problem and "set G2R_CACHE to a folder" in problem


def test_a_lock_that_nobody_gives_back_is_told(package, tmp_path, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(build_cache, "LOCK_SECONDS", 0.0)
    path = build_cache.cache_folder(package) / "lock"
    path.parent.mkdir(parents=True)
    with open(path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        reason = load(CORE)[1].reason
    assert f"another process has held {path}" in reason and "G2R_CACHE" not in reason
    said = capsys.readouterr().err
    assert f"another process has held {path}" in said
    assert "slower, same answers" in said and "other processes may run what is compiled" in said
    assert load(CORE)[1].built


def test_a_folder_without_locks_is_told_by_whoever_compiles(package, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert load(CORE)[1].built
    said = capsys.readouterr().err
    assert said.count("no file locks") == 1 and "slower, with the same answers" in said
    assert load(CORE)[1].built and capsys.readouterr().err == ""


def test_a_home_that_is_nowhere_is_a_reason(package, monkeypatch):
    monkeypatch.delenv("G2R_CACHE")

    def nowhere(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    reason = load(CORE)[1].reason
    assert "home directory" in reason and "G2R_CACHE" in reason


def test_the_cache_is_where_it_is_asked_for(package, tmp_path, monkeypatch):
    assert build_cache.cached_path(CORE, package).is_relative_to(tmp_path / "cache")
    monkeypatch.delenv("G2R_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build_cache.cached_path(CORE, package).is_relative_to(tmp_path / "xdg" / "g2r_fast")
    assert "7.8" in build_cache.cached_path(CORE, package).parent.name


TOGETHER = """
import sys
from pathlib import Path
from g2r_fast import building, native
native.PACKAGE = Path(sys.argv[1])
sys.stdin.readline()
print(native.load_part(building.CORE, str, True)[0])
"""


def test_of_many_that_come_together_one_builds(package, tmp_path):
    """Each compilation leaves a line in a file: a compiler of ours that calls the real one."""
    log = tmp_path / "log"
    compiler = tmp_path / "compiler"
    real = building.find_compiler()[0]
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\nsleep 0.2\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(package)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=120) for process in processes]
    paths = {out.strip() for out, _ in outcomes}
    assert len(paths) == 1 and answer(paths.pop()) == 1, outcomes
    # Three sources, two stamps, two libraries.
    assert len(log.read_text().splitlines()) == 7
    assert sum("compiling" in said for _, said in outcomes) == 1
    assert sum("waiting for another process" in said for _, said in outcomes) <= 2
