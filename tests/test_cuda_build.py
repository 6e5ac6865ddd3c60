"""The library of csrc/cuda: how it is found, built and refused. No GPU is needed.

Where there is no nvcc, a script in its place tells what it was asked for.
"""

from __future__ import annotations

import ctypes
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from g2r_fast import build_cache, building, cuda_attention, cuda_ops, native
from g2r_fast.building import CUDA_OPS

ROOT = Path(__file__).resolve().parents[1]
CUDA_VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one small CUDA source, in a checkout of its own, and an empty cache."""
    folder = tmp_path / "checkout" / "g2r_fast"
    (folder.parent / "csrc" / "cuda").mkdir(parents=True)
    folder.mkdir()
    (folder / "__init__.py").write_text('__version__ = "7.8"\n')
    (folder.parent / "csrc/cuda/attention.cu").write_text(
        'extern "C" __attribute__((visibility("default"))) int answer() { return 41; }\n'
    )
    for name in (*CUDA_VARIABLES, "G2R_BUILD", "XDG_CACHE_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("G2R_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "PACKAGE", folder)
    monkeypatch.setattr(build_cache, "_told", set())
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """As in a process that has not asked yet."""
    monkeypatch.setattr(cuda_ops, "_library", None)
    monkeypatch.setattr(cuda_ops, "_status", None)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def nvcc_stub(tmp_path, monkeypatch):
    """An nvcc that writes down its arguments and lets g++ do what it can."""
    compiler = building.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    log = tmp_path / "nvcc.log"
    path = script(
        tmp_path / "cuda/bin/nvcc",
        f'echo "$@" >> {log}\n'
        'for word in "$@"; do shift; case "$word" in\n'
        "-gencode*|--threads*|--cudart*) ;;\n"
        "-Xcompiler=*) set -- \"$@\" $(echo ${word#-Xcompiler=} | tr , ' ') ;;\n"
        '-Xlinker=*) set -- "$@" -Wl,${word#-Xlinker=} ;;\n'
        '*.cu) set -- "$@" -x c++ "$word" ;;\n'
        '*) set -- "$@" "$word" ;;\n'
        f'esac; done\nexec {compiler[0]} "$@"\n',
    )
    monkeypatch.setenv("CUDACXX", str(path))
    return log


def test_the_part_is_made_of_its_own_files():
    folder = building.source_folder(ROOT / "g2r_fast")
    names = {path.relative_to(folder).as_posix() for path in CUDA_OPS.files(folder)}
    assert {"cuda/attention.cu", "cuda/attention.h", "cuda/device.cuh"} <= names
    assert all(name.startswith("cuda/") for name in names)
    sources = {path.name for path in CUDA_OPS.sources(folder)}
    assert sources == {path.name for path in (folder / "cuda").glob("*.cu")}


def test_where_the_compiler_is_looked_for(tmp_path, monkeypatch):
    for name in CUDA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    on_path, in_home, named = (
        script(tmp_path / place / "nvcc", "exit 1\n") for place in ("path", "home/bin", "named")
    )
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert building.find_nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert building.find_nvcc() == str(in_home)
    monkeypatch.setenv("CUDACXX", str(named))
    assert building.find_nvcc() == str(named)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere"))
    assert building.find_nvcc() is None, "what was named is not replaced by something else"
    assert CUDA_OPS not in building.parts_here()


def test_a_build_asks_for_both_architectures_and_ptx(package, nvcc_stub, tmp_path):
    path = tmp_path / "out" / CUDA_OPS.file_name
    assert building.build({CUDA_OPS: path}, package) == {}
    assert CUDA_OPS in building.parts_here()
    assert building.problem_of(CUDA_OPS, path, package) is None
    assert ctypes.CDLL(str(path)).answer() == 41
    asked = nvcc_stub.read_text()
    code = ("code=sm_80", "code=sm_90a", "code=compute_90")
    for word in (*code, "--cudart=static", "-fvisibility=hidden"):
        assert word in asked
    (package.parent / "csrc/cuda/more.cuh").write_text("// another header\n")
    assert "built from other sources" in building.problem_of(CUDA_OPS, path, package)


def test_without_a_compiler_the_reason_is_told(package, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere"))
    failed = building.build({CUDA_OPS: tmp_path / "library.so"}, package)
    assert str(failed[CUDA_OPS]) == f"CUDACXX={tmp_path / 'nowhere'} is not there"
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    failed = building.build({CUDA_OPS: tmp_path / "library.so"}, package)
    assert "no CUDA compiler" in str(failed[CUDA_OPS])


def test_a_failed_build_is_remembered_until_the_compiler_changes(package, tmp_path, monkeypatch):
    compiler = script(tmp_path / "nvcc", 'echo "error: no luck" >&2; exit 1\n')
    monkeypatch.setenv("CUDACXX", str(compiler))
    reasons = build_cache.build_in_cache([CUDA_OPS], package)
    assert "error: no luck" in reasons[CUDA_OPS]
    assert build_cache.remembered_failure(CUDA_OPS, package) == reasons[CUDA_OPS]
    monkeypatch.setenv("CUDACXX", str(script(tmp_path / "other", "exit 1\n")))
    assert build_cache.remembered_failure(CUDA_OPS, package) is None


@pytest.mark.usefixtures("unloaded", "package")
def test_nothing_is_compiled_without_a_gpu(nvcc_stub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = cuda_ops.load()
    assert reason is not None and "where there is an NVIDIA GPU" in reason
    assert not nvcc_stub.exists()
    with pytest.raises(RuntimeError, match="no CUDA kernels here: it was never built"):
        cuda_ops.library()
    assert not cuda_ops.status().built


@pytest.mark.usefixtures("unloaded", "package")
def test_the_first_use_on_a_gpu_compiles_once(nvcc_stub, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with native.looking_only():
        assert cuda_ops.load() == "it was never built"
    reason = cuda_ops.load()  # the small source has no entry points
    assert reason is not None and "does not load (a function is missing" in reason
    assert "compiling g2r_fast._cuda_ops into" in capsys.readouterr().err
    compiled = nvcc_stub.read_text()
    assert cuda_ops.load() == reason
    assert nvcc_stub.read_text() == compiled


@pytest.mark.usefixtures("unloaded", "package")
def test_g2r_build_never_keeps_it_from_compiling(nvcc_stub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("G2R_BUILD", "never")
    assert "G2R_BUILD=never" in str(cuda_ops.load())
    assert not nvcc_stub.exists()


def test_who_is_served():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "not an NVIDIA GPU" in str(cuda_attention.serves(torch.bfloat16, 64, cpu))
    assert "the dtype is float32" in str(cuda_attention.serves(torch.float32, 64, gpu))
    assert "head_dim is 80, not 64 or 128" in str(cuda_attention.serves(torch.float16, 80, gpu))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_products_of_warpgroups_are_for_one_capability(capability, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(cuda_ops, "load", lambda: "asked for the library")
    gpu = torch.device("cuda")
    asked = cuda_attention.serves(torch.bfloat16, 64, gpu)
    assert asked == "asked for the library"
    monkeypatch.setenv("G2R_PRODUCTS", "wgmma")
    refused = f"G2R_PRODUCTS=wgmma is for sm_90, and a card is sm_{capability[0]}0"
    expected = asked if capability == (9, 0) else refused
    assert cuda_attention.serves(torch.bfloat16, 64, gpu) == expected


@pytest.mark.skipif(building.find_nvcc() is None, reason="no nvcc on this machine")
def test_the_real_sources_build_and_need_no_cuda_library(tmp_path):
    path = ROOT / "g2r_fast" / CUDA_OPS.file_name  # of these sources, if the install built it
    if building.problem_of(CUDA_OPS, path, ROOT / "g2r_fast") is not None:
        path = tmp_path / CUDA_OPS.file_name
        assert building.build({CUDA_OPS: path}, ROOT / "g2r_fast") == {}
    assert building.problem_of(CUDA_OPS, path, ROOT / "g2r_fast") is None
    library = cuda_ops.Library(path)
    assert library.device_type == "cuda"
    assert len(library.kernels()) == 20
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libtorch" not in needed
