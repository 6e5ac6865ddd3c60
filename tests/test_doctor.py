"""`g2r-fast doctor` and `g2r-fast build`: what they tell is so, and one of them only looks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from g2r_fast import backends, build_cache, building, cli, cuda_ops, doctor, native, native_ops
from g2r_fast.building import CORE, CPU_OPS, CUDA_OPS

ROOT = Path(__file__).resolve().parents[1]
RUN = "import sys; from g2r_fast.cli import main; sys.exit(main(sys.argv[1:]))"


with native.looking_only():
    needs_kernels = pytest.mark.skipif(
        native_ops.load() is not None, reason="the CPU kernels are not built here"
    )


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Nothing is set, and there is no GPU, whichever machine this is."""
    for name in (*doctor.SETTINGS, "TRITON_INTERPRET", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        if name != "G2R_CACHE":  # a library that is only there still serves
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """No library anywhere; the sources are those of this checkout."""
    package = tmp_path / "g2r_fast"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "7.8"\n')
    (package / "csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setattr(native, "PACKAGE", package)
    monkeypatch.setattr(
        native, "_core_status", native.NativeStatus(CORE.name, None, "it was never built", "slower")
    )
    monkeypatch.setattr(native_ops, "load", lambda: "it was never built")
    monkeypatch.setattr(cuda_ops, "load", lambda: "it was never built")
    monkeypatch.setenv("G2R_CACHE", str(tmp_path / "cache"))
    return package


@pytest.fixture
def builds_nothing(monkeypatch):
    monkeypatch.setattr(build_cache, "build", lambda *_: pytest.fail("doctor compiled something"))


def command(*arguments, **environment):
    """In a process of its own, as what is forced is read when the library is loaded."""
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_everything_is_told_and_nothing_is_done(builds_nothing, capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    report = doctor.examine()
    assert report["versions"]["torch"] == torch.__version__
    for name, version in report["versions"].items():
        assert name in text and (version or "not there") in text
    for name in doctor.SETTINGS:
        assert name in text
    for part in report["parts"]:
        assert part["name"] in text and (part["path"] or part["remedy"]) in text
    for row in report["backends"]:
        assert f"{row['device']} {row['dtype']}" in text


def test_json_is_the_same_report(capsys, builds_nothing):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(doctor.examine()))


def test_every_backend_is_used_or_says_why_not(builds_nothing):
    report = doctor.examine()
    assert {row["dtype"] for row in report["backends"]} == set(doctor.DTYPES)
    for row in report["backends"]:
        assert [c["backend"] for c in row["candidates"]] == list(backends.BACKENDS)
        assert sum(c["used"] for c in row["candidates"]) == 1
        for candidate in row["candidates"]:
            assert candidate["used"] == (candidate["reason"] is None), candidate
        chosen = backends.choose(
            backends.Request(torch.device(row["device"]), getattr(torch, row["dtype"]), 64, 64, 64)
        )
        assert [c["backend"] for c in row["candidates"] if c["used"]] == [chosen.name]


def test_the_tables_of_kernels_are_used_or_say_why_not(builds_nothing):
    tables = doctor.examine()["kernels"]
    if native_ops.load() is not None:
        assert tables == []
        return
    assert ",".join(table["name"] for table in tables) == torch.ops.g2r_fast.built_cpu_kernels()
    assert [t["name"] for t in tables if t["used"]] == [torch.ops.g2r_fast.cpu_kernels()]
    assert all(table["used"] == (table["reason"] is None) for table in tables)
    assert set(doctor.NEEDS) >= {table["name"] for table in tables}


def test_what_is_missing_comes_with_what_to_do(nothing_built, builds_nothing, capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "not there: it was never built" in text and CPU_OPS.cost in text
    assert "`g2r-fast build` compiles it now" in text or building.find_compiler() is None
    assert "not native: it was never built" in text
    assert not (nothing_built.parent / "cache").exists(), "left something behind"

    monkeypatch.setenv("G2R_BUILD", "never")
    if building.find_compiler() is not None:
        assert "G2R_BUILD=never keeps" in doctor.as_text(doctor.examine())
    monkeypatch.setenv("CXX", "/no/such/compiler")
    report = doctor.examine()
    assert report["versions"]["compiler"] is None
    *parts, cuda = report["parts"]
    assert all("install a C++ compiler" in part["remedy"] for part in parts)
    assert "C++" not in cuda["remedy"]


def test_a_cache_that_cannot_be_written_is_what_to_mend(
    nothing_built, builds_nothing, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("G2R_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "find_compiler", lambda: ["true"])
    monkeypatch.setattr(doctor, "find_nvcc", lambda: "true")
    for part in doctor.examine()["parts"]:
        assert str(tmp_path / "file") in part["remedy"] and "set G2R_CACHE" in part["remedy"]
        assert "g2r-fast build" not in part["remedy"]
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    monkeypatch.setattr(doctor, "find_nvcc", lambda: None)
    for part in doctor.examine()["parts"]:
        needed = "the CUDA toolkit" if "_cuda_ops" in part["name"] else "a C++ compiler"
        assert f"install {needed}" in part["remedy"] and "set G2R_CACHE" in part["remedy"]


def test_a_remembered_failure_is_told(nothing_built, builds_nothing, monkeypatch):
    monkeypatch.setattr(doctor, "remembered_failure", lambda part, package: f"no {part.name} today")
    monkeypatch.setattr(doctor, "find_nvcc", lambda: "true")
    if building.find_compiler() is not None:
        remedies = [part["remedy"] for part in doctor.examine()["parts"]]
        assert all("today" in r and "`g2r-fast build` tries again" in r for r in remedies)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("G2R_BACKEND", "triton", "G2R_BACKEND=triton serves no device and dtype"),
        ("G2R_BACKEND", "quick", "expected auto | native | triton | reference; got quick"),
        ("G2R_BUILD", "maybe", "expected auto | never; got maybe"),
        ("G2R_PRODUCTS", "fma", "expected mma | wgmma; got fma"),
        ("G2R_CPU", "sse9", "G2R_CPU=sse9 is none of avx512bf16, avx512, avx2, plain"),
    ],
)
def test_what_is_forced_and_cannot_be_had_is_a_problem(
    name, value, problem, builds_nothing, capsys, monkeypatch
):
    monkeypatch.setenv(name, value)
    assert cli.main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("PROBLEM: ") and problem in last
    assert cli.main(["doctor", "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem in told


def test_native_forced_without_its_library_is_a_problem(nothing_built, builds_nothing, monkeypatch):
    monkeypatch.setenv("G2R_BACKEND", "native")
    report = doctor.examine()
    assert report["problems"] == ["G2R_BACKEND=native serves no device and dtype of this machine"]
    assert "cpu float32   nothing" in doctor.as_text(report)


def cuda_part(report):
    (part,) = (part for part in report["parts"] if part["name"] == "g2r_fast._cuda_ops")
    return part


@pytest.mark.usefixtures("nothing_built", "builds_nothing")
def test_no_cuda_library_is_no_problem_where_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_nvcc", lambda: None)
    assert cli.main(["doctor"]) == 0
    report = doctor.examine()
    part = cuda_part(report)
    assert report["gpus"] == [] and report["versions"]["nvcc"] is None
    assert part["path"] is None and part["reason"] == "it was never built"
    assert part["without_it"] == CUDA_OPS.cost and "Triton" in part["without_it"]
    assert part["remedy"].startswith("torch sees no GPU, so nothing here needs it")
    assert "(nvcc), or set CUDA_HOME" in part["remedy"]
    text = capsys.readouterr().out
    assert part["remedy"] in text and "\ntorch sees no GPU\n" in text

    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    assert "CUDACXX=/no/such/nvcc is not there" in cuda_part(doctor.examine())["remedy"]


@pytest.mark.usefixtures("nothing_built", "builds_nothing")
def test_on_a_gpu_each_one_is_told_and_what_its_library_needs(monkeypatch, tmp_path):
    names = ["NVIDIA H200", "NVIDIA A100"]
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda at: names[at],
        "get_device_capability": lambda at: [(9, 0), (8, 0)][at],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(doctor, "_backends", lambda problems: [])
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho nvcc: NVIDIA\necho tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    report = doctor.examine()
    assert [gpu["compute_capability"] for gpu in report["gpus"]] == ["9.0", "8.0"]
    assert report["versions"]["nvcc"] == f"{nvcc} (tools, release 13.0, V13.0.88)"
    assert "cuda:0: NVIDIA H200, compute capability 9.0\n" in doctor.as_text(report)
    assert cuda_part(report)["remedy"] == (
        "`g2r-fast build` compiles it now, its first use on a GPU otherwise"
    )
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere"))
    remedy = cuda_part(doctor.examine())["remedy"]
    assert remedy.startswith("CUDACXX=") and "no GPU" not in remedy


def test_a_cuda_library_that_is_there_is_told_by_its_path(builds_nothing):
    with native.looking_only():
        reason = cuda_ops.load()
    part = cuda_part(doctor.examine())
    assert (part["path"] is None) == (reason is not None) and part["reason"] == reason
    assert native.status(CUDA_OPS.name).path == part["path"]


def test_forcing_what_serves_is_no_problem():
    done = command("doctor", "--json", G2R_BACKEND="reference", G2R_CPU="plain")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["G2R_BACKEND"] == "reference"
    for row in report["backends"]:
        assert [c["backend"] for c in row["candidates"] if c["used"]] == ["reference"]
    used = [table["name"] for table in report["kernels"] if table["used"]]
    assert used == (["plain"] if report["kernels"] else [])


STOPPED = """
from g2r_fast import doctor, native_ops
from g2r_fast.errors import InputError
before = doctor.examine()
try:
    native_ops.load()
except InputError as error:
    print(error)
assert doctor.examine() == before
"""


@needs_kernels
def test_kernels_that_do_not_run_here_are_not_replaced_by_looking():
    done = command("doctor", "--json", G2R_CPU="sse9")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert len(report["problems"]) == 1 and report["kernels"] == []
    parts = {part["name"]: part["path"] for part in report["parts"]}
    assert parts["g2r_fast._core"] and parts["g2r_fast._cpu_ops"], "what is built is built"
    (row,) = (r for r in report["backends"] if (r["device"], r["dtype"]) == ("cpu", "float32"))
    assert not any(candidate["used"] for candidate in row["candidates"])
    reasons = {candidate["backend"]: candidate["reason"] for candidate in row["candidates"]}
    assert "G2R_CPU names no kernels" in reasons["native"] and "got sse9" in reasons["native"]
    assert reasons["reference"] == "a wrong setting stops such a run"

    done = subprocess.run(
        [sys.executable, "-c", STOPPED],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"G2R_CPU": "sse9"},
    )
    assert done.returncode == 0 and "got sse9" in done.stdout, done.stdout + done.stderr


def test_build_refuses_a_wrong_setting(capsys, monkeypatch, builds_nothing):
    monkeypatch.setenv("G2R_BUILD", "maybe")
    assert cli.main(["build"]) == 2
    assert "expected auto | never; got maybe" in capsys.readouterr().err


def test_build_says_where_and_how_long(nothing_built, capsys, monkeypatch):
    def build(outputs, package):
        for part, path in outputs.items():
            path.write_text(part.name)
        return {}

    monkeypatch.setattr(build_cache, "build", build)
    monkeypatch.setattr(building, "find_nvcc", lambda: "nvcc")
    assert cli.main(["build"]) == 0
    out = capsys.readouterr().out
    for part in (*building.PARTS, CUDA_OPS):
        path = build_cache.cached_path(part, nothing_built)
        assert str(path) in out and path.read_text() == part.name
    assert "0 s" in out


def test_build_without_nvcc_says_why_there_is_no_cuda_library(nothing_built, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(build_cache, "build", lambda outputs, _: asked.extend(outputs) or {})
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert cli.main(["build"]) == 0, "no compiler for it is no failure"
    assert asked == list(building.PARTS)
    out = capsys.readouterr().out
    assert f"g2r_fast._cuda_ops: not there, and {CUDA_OPS.cost}" in out
    assert "(nvcc), or set CUDA_HOME" in out


def test_build_that_fails_says_what_the_compiler_said(nothing_built, capsys, monkeypatch):
    error = building.BuildError("g++ cannot make core.cpp", "core.cpp:1: a long story")
    monkeypatch.setattr(build_cache, "build", lambda outputs, _: {CORE: error})
    assert cli.main(["build"]) == 1
    said = capsys.readouterr()
    assert "g2r_fast._core: not compiled: g++ cannot make core.cpp" in said.out
    assert "a long story" in said.err


def test_build_of_what_is_there_does_nothing_unless_forced(capsys, monkeypatch):
    if native_ops.load() is not None or native.core() is None:
        pytest.skip("the parts are not built here")
    asked = []

    def build_in_cache(parts, package, force):
        asked.extend(parts)
        return {}

    monkeypatch.setattr(build_cache, "build_in_cache", build_in_cache)
    assert cli.main(["build"]) == 0
    there = [part for part in building.parts_here() if native.status(part.name).built]
    assert not {*asked} & {*there} and native.status(CPU_OPS.name).path in capsys.readouterr().out
    asked.clear()
    assert cli.main(["build", "--force"]) == 0
    assert asked == list(building.parts_here())
