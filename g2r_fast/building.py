"""Compiles the native parts from csrc/.

setup.py reads this file by its path, before the package is installed: it imports the standard
library only, and neither torch nor the rest of the package.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CORE",
    "CPU_OPS",
    "CUDA_OPS",
    "PARTS",
    "BuildError",
    "Part",
    "build",
    "find_compiler",
    "find_nvcc",
    "foreign_flags",
    "package_version",
    "parts_here",
    "problem_of",
    "source_folder",
    "tools",
]

_STAMP = re.compile(rb"g2r_fast stamp: (\S+) (\S+) ([0-9a-f]{64});")
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0")


class BuildError(Exception):
    """Something could not be compiled; `output` is what the compiler said, all of it.

    `passing` where the next attempt may well succeed with nothing changed.
    """

    def __init__(self, reason: str, output: str = "", passing: bool = False) -> None:
        super().__init__(reason)
        self.output, self.passing = output, passing


@dataclass(frozen=True)
class Part:
    """One shared library: its sources, and what its absence costs."""

    name: str
    patterns: tuple[str, ...]  # of its files, relative to csrc/
    flags: tuple[str, ...]
    suffix: str
    needs_python: bool
    cost: str
    needs_nvcc: bool = False

    @property
    def file_name(self) -> str:
        return self.name + self.suffix

    def files(self, folder: Path) -> list[Path]:
        """Sources and headers, in an order of their own."""
        found = {path for pattern in self.patterns for path in folder.glob(pattern)}
        if self.needs_python:  # the rest of the top folder
            found = {path for path in found if not path.name.startswith("torch_")}
        return sorted(path for path in found if path.suffix in (".cpp", ".h", ".cu", ".cuh"))

    def sources(self, folder: Path) -> list[Path]:
        """What is compiled; the rest of the files is included there."""
        return [path for path in self.files(folder) if path.suffix in (".cpp", ".cu")]

    def digest(self, folder: Path) -> str:
        """Of everything the library is made of."""
        state = hashlib.sha256(repr((self.name, _FLAGS, self.flags)).encode())
        for path in self.files(folder):
            content = path.read_bytes()
            state.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            state.update(content)
        return state.hexdigest()


CORE = Part(
    name="_core",
    patterns=("*",),
    flags=("-O2",),
    suffix=sysconfig.get_config_var("EXT_SUFFIX") or ".so",  # one for every Python
    needs_python=True,
    cost="finding the shared prefixes of a batch runs in Python and is slower",
)
CPU_OPS = Part(
    name="_cpu_ops",
    patterns=("torch_*", "cpu/*"),
    # Each instruction set is switched on inside the one file that it is for. Sums are never
    # reordered: results must not depend on the compiler's mood.
    flags=(
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ),
    suffix=".so",  # of any Python, and of torch from 2.10 on
    needs_python=False,
    cost="the packed engine runs in plain PyTorch operations and is slower",
)
CUDA_OPS = Part(
    name="_cuda_ops",
    patterns=("cuda/*",),
    # Code for Ampere and for Hopper (sm_90a: its warpgroups' products), and PTX from which the
    # driver makes code for what comes later.
    flags=(
        "-O3",
        "-std=c++17",
        "--threads=2",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "--cudart=static",  # no libcudart is looked for at run time
        "-Xcompiler=-fPIC,-fvisibility=hidden,-g0",
    ),
    suffix=".so",  # of any Python and any torch: it needs neither
    needs_python=False,
    cost="attention on a GPU runs on Triton",
    needs_nvcc=True,
)
PARTS = (CORE, CPU_OPS)  # of every machine


def parts_here() -> tuple[Part, ...]:
    """What an install builds: for a GPU only where there is a CUDA compiler."""
    return (*PARTS, CUDA_OPS) if find_nvcc() else PARTS


def source_folder(package: Path) -> Path:
    """csrc/ as a wheel holds it, inside the package, or as a checkout does, beside it."""
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def package_version(package: Path) -> str:
    text = (package / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def problem_of(part: Part, path: Path, package: Path) -> str | None:
    """Why this library cannot be loaded, None if it can; told from its bytes, without loading it.

    A library of an older version would register its ops under our names, and one that was cut
    short can end the process.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            complete = _is_complete(data)
            stamp = _STAMP.search(data) if complete else None
            found = stamp.groups() if stamp else None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        return f"{path} cannot be read ({error})"
    if not complete:
        return f"{path} is damaged"
    if found is None:
        return f"{path} does not say what it was built from: it is left over from another version"
    name, version, digest = (word.decode(errors="replace") for word in found)
    folder = source_folder(package)
    if folder.is_dir():
        same = digest == part.digest(folder)
    else:  # somebody ships the package without its sources
        same = version == package_version(package)
    if name != part.name or not same:
        return f"{path} was built from other sources (of version {version})"
    return None


def _is_complete(data: mmap.mmap) -> bool:
    """Whether an ELF file reaches to its last table; files of other formats are not looked into."""
    if data[:4] != b"\x7fELF":
        return sys.platform != "linux"
    if len(data) < 64 or data[4] != 2:  # 64 bits
        return False
    order = "<" if data[5] == 1 else ">"
    (offset,) = struct.unpack_from(f"{order}Q", data, 0x28)
    size, count = struct.unpack_from(f"{order}HH", data, 0x3A)
    return bool(offset + size * count <= len(data))


def find_compiler() -> list[str] | None:
    """The C++ compiler as words of a command: $CXX, or the first usual name that is there."""
    if os.environ.get("CXX"):
        words = shlex.split(os.environ["CXX"])
        return words if shutil.which(words[0]) else None
    names = ("g++", "c++", "clang++")  # the kernels of x86 are written for GCC
    return next(([found] for name in names if (found := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, or that of $CUDA_HOME, of PATH, or of the usual folder."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [str(Path(home, "bin", "nvcc"))] if home else []
    places += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


def tools() -> list[str]:
    """What the outcome of a compilation depends on, beyond the sources."""
    words = find_compiler() or ["none"]
    found, nvcc = shutil.which(words[0]), find_nvcc()
    changed = [str(os.stat(path).st_mtime_ns) if path else "" for path in (found, nvcc)]
    return [*words, str(nvcc), *changed, str(_torch_folder()), _torch_version()]


def build(outputs: Mapping[Part, Path], package: Path) -> dict[Part, BuildError]:
    """Compile each part to the path beside it; returns why for those that could not be.

    Every source is a process of its own, as many at a time as there are cores (or $MAX_JOBS).
    A library appears whole or not at all, whatever happens meanwhile.
    """
    failed: dict[Part, BuildError] = {}
    with (
        tempfile.TemporaryDirectory(prefix="g2r_fast-") as scratch,
        ThreadPoolExecutor(_jobs()) as pool,
    ):
        started = {}
        for part in outputs:
            try:
                started[part] = _Compilation(part, package, Path(scratch, part.name), pool)
            except (BuildError, OSError) as error:
                failed[part] = _as_build_error(error)
        for part, compilation in started.items():
            try:
                compilation.link(outputs[part])
            except (BuildError, OSError) as error:
                failed[part] = _as_build_error(error)
    return failed


class _Compilation:
    """The sources of one part on their way to objects."""

    def __init__(self, part: Part, package: Path, scratch: Path, pool: ThreadPoolExecutor) -> None:
        self.part, self.folder = part, source_folder(package)
        self.compiler = _nvcc() if part.needs_nvcc else _compiler()
        compile_flags, self.link_flags = foreign_flags(part)
        sources = part.sources(self.folder)
        if not sources:
            raise BuildError(f"its sources are not in {self.folder}")
        scratch.mkdir()
        self.digest = part.digest(self.folder)
        stamp = scratch / "stamp.cpp"
        text = f"g2r_fast stamp: {part.name} {package_version(package)} {self.digest};"
        visible = '__attribute__((used, visibility("default")))'
        stamp.write_text(f'extern "C" {visible} const char g2r_fast_stamp[] = "{text}";\n')
        command = [*self.compiler, *part.flags, *compile_flags]
        if not part.needs_nvcc:
            # No paths of this machine.
            command += [*_FLAGS, f"-ffile-prefix-map={self.folder}=csrc"]
        # The largest first, so that none is left over at the end.
        sources = sorted([*sources, stamp], key=lambda path: -path.stat().st_size)
        self.objects = [scratch / f"{number}.o" for number in range(len(sources))]
        self.running = [
            pool.submit(_run, [*command, "-c", str(source), "-o", str(target)], source.name)
            for source, target in zip(sources, self.objects, strict=True)
        ]

    def link(self, output: Path) -> None:
        """Waits for the objects and makes the library of them."""
        try:
            for job in self.running:
                job.result()
        except BuildError:
            for job in self.running:
                job.cancel()
            raise
        if self.part.digest(self.folder) != self.digest:
            raise BuildError("its sources changed while they were compiled", passing=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
        os.close(handle)
        try:
            command = [*self.compiler, *map(str, self.objects), "-o", unfinished]
            _run([*command, *self.link_flags], self.part.name)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(unfinished, 0o755 & ~mask)
            os.replace(unfinished, output)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise


def _jobs() -> int:
    if os.environ.get("MAX_JOBS", "").isdecimal():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(cores) or os.cpu_count() or 1


def _compiler() -> list[str]:
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        raise BuildError(
            f"CXX={named} is not there" if named else "no C++ compiler: no g++, c++ or clang++"
        )
    return compiler


def _nvcc() -> list[str]:
    found = find_nvcc()
    if found is None:
        named = os.environ.get("CUDACXX")
        raise BuildError(
            f"CUDACXX={named} is not there"
            if named
            else "no CUDA compiler: no nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda"
        )
    return [found]


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise BuildError(f"{command[0]} was killed while it made {what}", passing=True)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    said = f": {errors[0].strip()}" if errors else f" (exit status {done.returncode})"
    raise BuildError(f"{command[0]} cannot make {what}{said}", "\n".join([*command, *lines]))


def foreign_flags(part: Part) -> tuple[list[str], list[str]]:
    """What compiling and linking need of Python, pybind11, torch and CUDA."""
    if part.needs_nvcc:
        return [], ["-shared", "--cudart=static", "-Xlinker=-s", "-Xlinker=-z,defs"]
    shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    if part.needs_python:
        python = Path(sysconfig.get_paths()["include"])
        if not (python / "Python.h").is_file():
            raise BuildError(f"{python} lacks Python.h: install Python's development files")
        if sys.platform == "darwin":
            shared += ["-undefined", "dynamic_lookup"]
        return ["-isystem", str(python), "-isystem", str(_pybind11_headers())], shared
    torch = _torch_folder()
    if torch is None:
        raise BuildError("torch is not visible here, as in an isolated build")
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"{torch} lacks the headers of torch >= 2.10")
    if sys.platform != "darwin":
        shared.append("-Wl,-z,defs")  # what is missing shows here and not at the first call
    return ["-isystem", str(torch / "include")], [*shared, f"-L{torch / 'lib'}", "-ltorch_cpu"]


def _pybind11_headers() -> Path:
    """Of pybind11 itself, which is not needed to run, or the copy that torch brings."""
    for name in ("pybind11", "torch"):
        folder = _package_folder(name)
        if folder is not None and (folder / "include/pybind11/pybind11.h").is_file():
            return folder / "include"
    raise BuildError("pybind11's headers are not there: pip install pybind11")


def _torch_folder() -> Path | None:
    return _package_folder("torch")


def _package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _as_build_error(error: Exception) -> BuildError:
    if isinstance(error, BuildError):
        return error
    return BuildError(f"{type(error).__name__}: {error}", passing=True)  # a full disk, say
