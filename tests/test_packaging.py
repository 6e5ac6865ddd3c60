"""The package installs and finds its kernels however a person may come to it.

kernels/ lies at the top of the repository, where another distribution owns that name, and is part
of the package g2r_fast: in a wheel, in an editable install and in a plain clone, beside that other
package too. All of it happens in fresh virtual environments that borrow this one's libraries.

The tables of CPU kernels and the CUDA source, most of a minute of compiling, are left empty in the
copies: what is tested is that the libraries get built, installed and loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from g2r_fast.building import find_compiler, find_nvcc

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis",
    "*.so", "*_missing.txt",
)  # fmt: skip
NO_KERNELS = """
#include "kernels.h"
namespace g2r {
const Kernels& NAME_kernels() {
    static const Kernels none{"NAME"};
    return none;
}
}  // namespace g2r
"""
NO_CUDA = 'extern "C" __attribute__((visibility("default"))) int g2r_nothing() { return 0; }\n'
COMPILER = find_compiler()
# Nothing is optimised, whatever the flags in front of it say: that is a quarter of the time here.
UNOPTIMISED = f"sh -c 'exec {' '.join(COMPILER)} \"$@\" -O0' sh" if COMPILER else ""

FIND = """
import json, sys
import g2r_fast, g2r_fast.kernels.row_dot as row_dot, g2r_fast.native as native
sorted = native.sort_with_common_prefixes([[2, 1], [1, 3], [1, 2]])
status, ops = native.status(), None
if "ops" in sys.argv:
    import g2r_fast.native_ops, torch
    ops = g2r_fast.native_ops.load() or "cpu kernels: " + torch.ops.g2r_fast.cpu_kernels()
print(json.dumps({
    "package": g2r_fast.__file__,
    "kernel": row_dot.__file__,
    "kernels": list(sys.modules["g2r_fast.kernels"].__path__),
    "built": status.built,
    "reason": status.reason,
    "path": status.path,
    "ops_path": native.status("_cpu_ops").path,
    "ops_reason": native.status("_cpu_ops").reason,
    "cuda_path": native.status("_cuda_ops").path,
    "ops": ops,
    "sorted": sorted,
}))
"""


def run(command, cwd, check=True, **environment):
    """A process that sees nothing of this one's settings, and builds nothing unless it is told."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    clean = {k: v for k, v in clean.items() if not k.startswith("G2R_")}
    clean |= {"G2R_BUILD": "never", "G2R_CACHE": os.devnull, "CXX": UNOPTIMISED}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def find(python, cwd, *arguments, **environment):
    """Where that interpreter finds the package and its kernels, and what it can do; with "ops"
    those are loaded too, which takes torch."""
    done = run([python, "-c", FIND, *arguments], cwd, **environment)
    found = json.loads(done.stdout)
    assert found["sorted"] == [[2, 1, 0], [1, 0]]
    return found | {"said": done.stderr}


def copy_sources(folder):
    """The sources as they are in a fresh clone, nothing built, and hardly any kernels."""
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    for path in (folder / "csrc" / "cpu").glob("isa_*.cpp"):
        name = path.stem.removeprefix("isa_")
        path.write_text(NO_KERNELS.replace("NAME", name), encoding="utf-8")
    for path in (folder / "csrc" / "cuda").glob("*.cu"):
        path.write_text(NO_CUDA, encoding="utf-8")
    return folder


class Environment:
    """A virtual environment that sees this interpreter's libraries, but not this package.

    The line in a .pth file adds the folder and runs none of the .pth files in it, which is how an
    editable install in there would come along.
    """

    def __init__(self, folder):
        venv.create(folder, with_pip=False)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        self.site = Path(paths["purelib"])
        self.bin = Path(paths["scripts"])
        self.python = self.bin / "python"
        borrowed = sorted({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})
        (self.site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")

    def install(self, *arguments, cwd, **environment):
        """pip install without an index, without isolation and without the dependencies."""
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "-v"]
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install"]
        return run([*pip, *options, *arguments], cwd, **environment)


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory):
    return lambda name: Environment(tmp_path_factory.mktemp(name) / "venv")


@pytest.fixture
def checkout(tmp_path):
    return copy_sources(tmp_path / "clone")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """The copy that the distributions are built from."""
    return copy_sources(tmp_path_factory.mktemp("snapshot") / "clone")


@pytest.fixture(scope="module")
def sdist(snapshot):
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, snapshot.parent], snapshot)
    (path,) = snapshot.parent.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist):
    """Built from the source distribution, so that one that lacks a file is found out."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, "-w", sdist.parent, sdist], sdist.parent)
    (path,) = sdist.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_environment(new_environment, wheel):
    environment = new_environment("wheel")
    environment.install(wheel, cwd=wheel.parent)
    return environment


def make_foreign_kernels(folder):
    """A regular top-level package of the name ``kernels``, as a well-known distribution has it."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("FOREIGN = True\n", encoding="utf-8")


def files(folder, *patterns):
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def test_from_a_wheel(wheel_environment, tmp_path):
    found = find(wheel_environment.python, tmp_path, "ops")
    package = wheel_environment.site / "g2r_fast"
    assert found["package"] == str(package / "__init__.py")
    assert found["kernel"] == str(package / "kernels" / "row_dot.py")
    if COMPILER:
        assert found["built"], found["reason"]
        assert Path(found["path"]).parent == package
        assert found["ops"].startswith("cpu kernels: "), found["ops"]
        assert found["ops_path"] == str(package / "_cpu_ops.so")
    if find_nvcc():
        assert found["cuda_path"] == str(package / "_cuda_ops.so")


def test_from_a_wheel_beside_the_foreign_package(new_environment, wheel, tmp_path):
    environment = new_environment("foreign")
    environment.install(wheel, cwd=tmp_path)
    make_foreign_kernels(environment.site)
    run([environment.python, "-c", "import kernels; assert kernels.FOREIGN"], tmp_path)
    found = find(environment.python, tmp_path)
    assert found["kernel"] == str(environment.site / "g2r_fast" / "kernels" / "row_dot.py")


def test_from_an_editable_install(new_environment, checkout, tmp_path):
    environment = new_environment("editable")
    environment.install("-e", checkout, cwd=tmp_path)
    found = find(environment.python, tmp_path, "ops")
    assert found["package"] == str(checkout / "g2r_fast" / "__init__.py")
    assert found["kernel"] == str(checkout / "kernels" / "row_dot.py")
    if COMPILER:
        assert Path(found["path"]).parent == checkout / "g2r_fast"
        assert found["ops_path"] == str(checkout / "g2r_fast" / "_cpu_ops.so")
        assert found["ops"].startswith("cpu kernels: "), found["ops"]

        # Of the same sources it is made once: again, and no compiler is needed.
        environment.install("-e", checkout, cwd=tmp_path, CXX="/bin/false", CUDACXX="/bin/false")
        again = find(environment.python, tmp_path)
        assert again["built"] and again["ops_path"] == found["ops_path"]

        # Sources that change under an editable install: what they were built into is left alone.
        with open(checkout / "csrc" / "core.cpp", "a", encoding="utf-8") as file:
            file.write("// changed\n")
        with open(checkout / "g2r_fast" / "_cpu_ops.so", "r+b") as file:
            file.truncate(5000)
        found = find(environment.python, tmp_path, "ops")
        assert "was built from other sources" in found["reason"]
        assert "_cpu_ops.so is damaged" in found["ops"]


def test_from_a_plain_clone(new_environment, checkout, tmp_path):
    environment = new_environment("clone")
    found = find(environment.python, tmp_path, PYTHONPATH=checkout)
    assert found["package"] == str(checkout / "g2r_fast" / "__init__.py")
    assert found["kernel"] == str(checkout / "kernels" / "row_dot.py")
    assert not found["built"] and "never built" in found["reason"]


def test_from_the_root_beside_the_foreign_package(new_environment, checkout, tmp_path):
    environment = new_environment("root")
    make_foreign_kernels(tmp_path / "elsewhere")
    beside = {"PYTHONPATH": tmp_path / "elsewhere"}
    code = "import g2r_fast, kernels; assert kernels.FOREIGN"
    run([environment.python, "-c", code], checkout, **beside)
    found = find(environment.python, checkout, **beside)
    assert found["kernel"] == str(checkout / "kernels" / "row_dot.py")
    assert found["kernels"] == [str(checkout / "kernels")]


def test_another_folder_of_that_name_beside_the_package_is_not_taken(
    new_environment, checkout, tmp_path
):
    environment = new_environment("other")
    (checkout / "kernels").rename(tmp_path / "ours")
    make_foreign_kernels(checkout)
    code = "import g2r_fast.kernels"
    done = run([environment.python, "-c", code], tmp_path, check=False, PYTHONPATH=checkout)
    assert "ModuleNotFoundError: No module named 'g2r_fast.kernels'" in done.stderr


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_without_a_compiler_it_installs_says_so_and_works(
    new_environment, checkout, tmp_path, editable
):
    environment = new_environment("bare")
    arguments = ["-e", checkout] if editable else [checkout]
    done = environment.install(*arguments, cwd=tmp_path, CC="/bin/false", CXX="/bin/false")
    lines = re.findall(r".*compiled part g2r_fast\.\w+ is left out.*", done.stdout + done.stderr)
    assert len(lines) == 2
    for line in lines:
        assert "/bin/false" in line and "everything works" in line and "slower" in line
    cache = tmp_path / "cache"
    use = {"CXX": "/bin/false", "G2R_BUILD": "auto", "G2R_CACHE": cache}
    found = find(environment.python, tmp_path, "ops", **use)
    assert not found["built"] and "/bin/false" in found["reason"] and "/bin/false" in found["ops"]
    assert found["said"].count("is left out") == 2
    again = find(environment.python, tmp_path, "ops", **use)
    assert again["said"] == "" and again["reason"] == found["reason"]


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler on this machine")
def test_an_install_that_cannot_see_torch_builds_the_rest_at_its_first_use(
    new_environment, checkout, tmp_path
):
    """As in the isolated build of a plain `pip install`, where only what builds is there."""
    environment = new_environment("isolated")
    hiding = tmp_path / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDE_TORCH, encoding="utf-8")
    done = environment.install(checkout, cwd=tmp_path, PYTHONPATH=hiding)
    (line,) = re.findall(r".*compiled part g2r_fast\.\w+ is left out.*", done.stdout + done.stderr)
    assert "g2r_fast._cpu_ops" in line and "torch is not visible here" in line
    assert "`g2r-fast build`, or its first use" in line
    cache = tmp_path / "cache"
    use = {"G2R_BUILD": "auto", "G2R_CACHE": cache}
    told = find(environment.python, tmp_path, "ops", G2R_CACHE=cache)
    assert "torch is not visible here" in told["ops"] and "G2R_BUILD=never" in told["ops"]
    assert not cache.exists()
    found = find(environment.python, tmp_path, "ops", **use)
    assert found["built"] and found["ops"].startswith("cpu kernels: "), found
    assert Path(found["ops_path"]).is_relative_to(cache)
    assert found["said"].count("g2r_fast: compiling g2r_fast._cpu_ops into") == 1
    again = find(environment.python, tmp_path, "ops", **use)
    assert again["said"] == "" and again["ops_path"] == found["ops_path"]

    # A compiler is no longer needed, and the command finds everything done.
    done = run([environment.bin / "g2r-fast", "build"], tmp_path, CXX="/bin/false", **use)
    assert found["path"] in done.stdout and found["ops_path"] in done.stdout


HIDE_TORCH = """
import sys

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden)
"""


def test_the_wheel_holds_the_package_and_nothing_else(snapshot, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = files(snapshot, "g2r_fast/**/*.py", "g2r_fast/tiny_judge/*", "g2r_fast/py.typed")
    expected |= files(snapshot, "g2r_fast/report_page/*")
    expected |= {f"g2r_fast/{path}" for path in files(snapshot, "kernels/*.py")}
    sources = files(snapshot, *(f"csrc/**/*.{suffix}" for suffix in ("cpp", "h", "cu", "cuh")))
    expected |= {f"g2r_fast/{path}" for path in sources}
    built = re.compile(r"g2r_fast/_(core|cpu_ops|cuda_ops)(\..*\.so|\.so|_missing\.txt)")
    held = {name for name in names if ".dist-info/" not in name and not built.fullmatch(name)}
    assert held == expected
    assert any(name.endswith(".safetensors") for name in held), "the tiny judge is missing"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_the_repository(snapshot, sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    folders = ("csrc", "kernels", "g2r_fast", "tests", "bench", "examples", "docs")
    expected = files(snapshot, *(f"{folder}/**/*" for folder in folders), ".ci/*")
    expected |= files(
        snapshot, "*.md", "*.toml", "setup.py", "Makefile", "LICENSE", ".clang-format"
    )
    assert expected - names == set()


def test_the_metadata_caps_no_version(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    always = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert always == {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "rich",
        "jinja2",
    }
    assert not [line for line in required if "<" in line and "extra ==" not in line]
    assert set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)) == {
        "test",
        "audit",
        "bench",
        "gpu",
        "train",
        "trl",
    }


def test_the_command_is_installed(wheel_environment, tmp_path):
    done = run([wheel_environment.bin / "g2r-fast", "--help"], tmp_path)
    assert "attribute" in done.stdout


def test_importing_the_package_touches_no_gpu_and_patches_nothing():
    code = """
import torch, transformers
watched = [torch, torch.nn, torch.nn.Module, torch.nn.functional, torch.Tensor, torch.autograd,
           transformers, transformers.modeling_utils, transformers.PreTrainedModel]
before = [dict(vars(place)) for place in watched]
import g2r_fast
for place, names in zip(watched, before):
    for name, value in names.items():
        assert vars(place).get(name) is value, (place, name)
assert not torch.cuda.is_initialized()
"""
    run([sys.executable, "-c", code], ROOT)
