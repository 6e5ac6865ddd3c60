"""Compile every shipped kernel for every GPU generation we name, on a machine without a GPU.

    python tests/compile_only.py [--all] [folder of kernels]

Triton kernels come from the folder; CUDA kernels from csrc/cuda, or from the folder if one is
given, where nvcc is found. Prints shared memory, registers, stack and spills as the assembler
reports them. Fails on a kernel that does not compile (or with a warning), spills, keeps a stack
frame, waits for products that were to run beside it, or takes more shared memory than a block may
have (the compilers themselves compile such a kernel without a word), and on a kernel file that
lists no cases.

Triton kernels are compiled for sm_80 and sm_90 in every case that is launched there. For what is
newer one case of each kernel and configuration is: bfloat16 where it takes that, no window and no
cap where it can do without. All of them would take twice as long; --all compiles them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REQUIRED = (80, 90)  # the others are compiled where the installed Triton knows them


class Report(NamedTuple):
    """What one compiled kernel takes: bytes, but for the registers of a thread."""

    shared: int
    registers: int
    stack: int
    spills: int

    def faults(self, arch: int) -> list[str]:
        found = []
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        return found


def parse_assembler_log(log: str, shared: int) -> Report:
    """The numbers of one ``ptxas -v`` report; a report without them is an error, not a zero."""

    def number(pattern: str) -> int:
        match = re.search(pattern, log)
        if match is None:
            raise ValueError(f"the assembler reported nothing like {pattern!r}:\n{log}")
        return int(match[1])

    return Report(
        shared=shared,
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    )


def compile_case(case: Any, arch: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(case.signature) | dict.fromkeys(case.constants, "constexpr")
    names = list(signature)
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    attributes = {}
    if case.aligned:
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.signature}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(case.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options=dict(case.options),
        )
    return parse_assembler_log(log.getvalue(), compiled.metadata.shared)


def load_cases(folder: Path) -> list[Any]:
    """The compile cases of every file of ``folder`` that holds a kernel."""
    cases: list[Any] = []
    for path in sorted(folder.glob("*.py")):
        if "@triton.jit" not in path.read_text(encoding="utf-8"):
            continue
        name = f"compile_only_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        if not hasattr(module, "compile_cases"):
            raise SystemExit(f"{path}: holds a kernel but no compile_cases()")
        cases += module.compile_cases()
    if not cases:
        raise SystemExit(f"{folder}: no kernels found")
    return cases


def knows(arch: int) -> bool:
    """Whether the installed Triton's assembler has this target."""
    import triton

    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 90 else triton.knobs.nvidia.ptxas
    listed = subprocess.run([tool.path, "--help"], capture_output=True, text=True, check=True)
    return f"sm_{arch}" in listed.stdout


def plainest(cases: list[Any]) -> set[int]:
    """One case of each kernel and configuration: bfloat16 if it can be, with the fewest options."""

    def choices(case: Any) -> int:
        return sum(value is True for value in case.constants.values())

    found: dict[Any, int] = {}
    for index, case in enumerate(cases):
        numbers = {k: v for k, v in case.constants.items() if type(v) is int}
        key = (case.kernel.fn.__qualname__, repr(numbers), repr(dict(case.options)), case.arch)
        rank = ("*bf16" not in case.signature.values(), choices(case))
        best = cases[found.setdefault(key, index)]
        if rank < ("*bf16" not in best.signature.values(), choices(best)):
            found[key] = index
    return set(found.values())


_cases: list[Any] = []  # of the folder; a process that compiles has a copy


def _compiled(index: int, arch: int) -> Report | str:
    """The report of a case, or what went wrong."""
    try:
        return compile_case(_cases[index], arch)
    except Exception as error:  # told, and the remaining ones still compiled
        return f"{type(error).__name__}: {error}"


class TritonKernels:
    """Compiles the kernels of a folder in two processes."""

    def __init__(self, folder: Path, cache: str, everything: bool) -> None:
        import triton
        from triton.runtime.cache import FileCacheManager

        class Unshared(FileCacheManager):
            """Nobody else reads or writes there: no detour over a folder for each file."""

            def put(self, data: Any, filename: str, binary: bool = True) -> str:
                path = Path(self._make_path(filename))
                path.write_bytes(data if isinstance(data, bytes) else str(data).encode())
                return str(path)

        self.version = triton.__version__
        triton.knobs.nvidia.dump_ptxas_log = True
        # A cache of its own, as the assembler reports nothing about a kernel found in the cache.
        triton.knobs.cache.dir = cache
        triton.knobs.cache.manager_class = Unshared
        _cases[:] = load_cases(folder)
        gc.freeze()  # what has been imported stays, and need not be looked through again
        self.archs = [arch for arch in SHARED_LIMIT if arch in REQUIRED or knows(arch)]
        chosen = set(range(len(_cases))) if everything else plainest(_cases)
        self.pool = ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
        self.reports = [
            {
                arch: self.pool.submit(_compiled, index, arch)
                for arch in self.archs
                if case.is_launched_on(arch) and (arch in REQUIRED or index in chosen)
            }
            for index, case in enumerate(_cases)
        ]

    def print_table(self) -> int:
        """The number of faults."""
        faults = 0
        print(f"triton {self.version}; shared bytes / registers / stack bytes / spill bytes")
        print(f"{'kernel':32}" + "".join(f"{f'sm_{arch}':>28}" for arch in self.archs))
        for case, reports in zip(_cases, self.reports, strict=True):
            cells, complaints = [], []
            for arch in self.archs:
                if arch not in reports:  # not launched there, or see plainest
                    cells.append("-")
                    continue
                report = reports[arch].result()
                if isinstance(report, str):
                    cells.append("FAILED")
                    complaints.append(f"sm_{arch}: {report}")
                    continue
                cells.append(" / ".join(map(str, report)))
                complaints += [f"sm_{arch}: {fault}" for fault in report.faults(arch)]
            print(f"{case.name:32}" + "".join(f"{cell:>28}" for cell in cells))
            for complaint in complaints:
                print(f"  FAULT {case.name}: {complaint}")
            faults += len(complaints)
        self.pool.shutdown()
        print(f"{len(_cases)} Triton kernels for {len(self.archs)} architectures, {faults} faults")
        return faults


# --- CUDA -----------------------------------------------------------------------------------------

CUDA = ROOT / "csrc" / "cuda"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"]
CUDA_FLAGS += ["-Xcompiler", "-Wall,-Wextra", f"-I{CUDA}"]
# The sources as a library for the CPU: what a kernel asks for at its launch is told there.
EMULATION = ["-std=c++17", "-O0", "-fPIC", "-shared", "-DG2R_EMULATE", f"-I{ROOT / 'tests/cpp'}"]


PLAIN_NAMES = {"__nv_bfloat16": "bf16", "__half": "f16", "false": "0", "true": "1"}


class Kernel(ctypes.Structure):
    """`G2rKernel` of csrc/cuda/attention.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("architecture", ctypes.c_int32),
    )


class Launch(NamedTuple):
    """What a kernel is launched with."""

    shared_bytes: int
    architecture: int  # the only one that has code of it; 0: all


def cuda_archs(nvcc: str) -> list[int]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(listed.stdout.split())
    return [arch for arch in SHARED_LIMIT if arch in REQUIRED or f"compute_{arch}" in known]


def nvcc_log(nvcc: str, source: Path, arch: int) -> str:
    """Compiles for one architecture and returns what the assembler said."""
    # The code of the CPU is the same for all of them.
    kind = "-c" if arch == REQUIRED[0] else "-cubin"
    with tempfile.TemporaryDirectory() as folder:
        output = ["-o", str(Path(folder) / "kernels.out")]
        target = "90a" if arch == 90 else str(arch)  # as building.py has it
        command = [nvcc, *CUDA_FLAGS, f"-arch=sm_{target}", kind, str(source), *output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"nvcc returned {done.returncode}:\n{log}")
    return log


def plain_name(symbol: str) -> str:
    """`void g2r::gpu::name<__half, 128, false>(Call)` as `name<f16, 128, 0>`."""
    name = re.sub(r"\((?:int|bool)\)", "", symbol.strip())
    name = name.removeprefix("void ").rpartition("(")[0] or name
    head, bracket, arguments = name.partition("<")
    for long, short in PLAIN_NAMES.items():
        arguments = arguments.replace(long, short)
    return head.rpartition("::")[2] + bracket + arguments


def cuda_reports(log: str) -> Iterator[tuple[str, Report]]:
    """Every kernel of one log of nvcc, with the shared memory that it declares."""
    symbols = re.findall(r"Compiling entry function '(\S+)'", log)
    names = subprocess.run(
        ["c++filt", *symbols], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parts = re.split(r"Compiling entry function '\S+'", log)[1:]
    for name, part in zip(names, parts, strict=True):
        declared = re.search(r"(\d+) bytes smem", part)
        yield plain_name(name), parse_assembler_log(part, int(declared[1]) if declared else 0)


def products_that_wait(log: str) -> list[str]:
    """What the assembler says of products of warpgroups (wgmma) that it could not leave in flight:
    it adds waits, and the kernel is right and slow."""
    return sorted(set(re.findall(r"\(C75\d\d\) (.*)", log)))


def launch_table(source: Path) -> dict[str, Launch]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler to read the table of kernels with")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        command = [compiler, *EMULATION, f"-I{CUDA}", "-x", "c++", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} returned {done.returncode}:\n{done.stderr[:4000]}")
        table = ctypes.CDLL(str(library)).g2r_kernel
        table.argtypes = (ctypes.c_int32, ctypes.POINTER(Kernel))
        found: dict[str, Launch] = {}
        kernel = Kernel()
        while table(len(found), ctypes.byref(kernel)) == 0:
            launch = Launch(int(kernel.shared_bytes), int(kernel.architecture))
            found[kernel.name.decode()] = launch
        return found


def covers(entry: str, kernel: str) -> bool:
    """Whether an entry of the table, `name<128>`, is about `name<f16, 128, 0>`."""
    name, *arguments = re.split(r"[<>, ]+", entry.rstrip(">"))
    other, *others = re.split(r"[<>, ]+", kernel.rstrip(">"))
    return name == other and set(arguments) <= set(others)


def with_dynamic(
    reports: dict[str, Report], table: dict[str, Launch], arch: int
) -> dict[str, Report]:
    """The reports of kernels that have code there, with the shared memory of the launch added."""
    found = {}
    for kernel, report in reports.items():
        launches = [launch for entry, launch in table.items() if covers(entry, kernel)]
        if len(launches) != 1:
            raise ValueError(f"{len(launches)} entries of g2r_kernel are about {kernel}")
        if launches[0].architecture in (0, arch):
            found[kernel] = report._replace(shared=report.shared + launches[0].shared_bytes)
    for entry in table:
        if not any(covers(entry, kernel) for kernel in reports):
            raise ValueError(f"g2r_kernel lists {entry}, which is not compiled")
    return found


class CudaSources:
    """Compiles CUDA sources, two at a time, while others do something else."""

    def __init__(self, nvcc: str, sources: list[Path], pool: ThreadPoolExecutor) -> None:
        self.archs = cuda_archs(nvcc)
        self.version = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout.split("release ")[1].split(",")[0]  # fmt: skip
        self.tables = {source: pool.submit(launch_table, source) for source in sources}
        self.logs: dict[Path, dict[int, Future[str]]] = {
            source: {arch: pool.submit(nvcc_log, nvcc, source, arch) for arch in self.archs}
            for source in sources
        }

    def print_table(self) -> int:
        """The number of faults."""
        print(f"nvcc {self.version}; shared bytes / registers / stack bytes / spill bytes")
        print(f"{'kernel':48}" + "".join(f"{f'sm_{arch}':>28}" for arch in self.archs))
        count = faults = 0
        for source, logs in self.logs.items():
            rows: dict[str, dict[int, Report]] = {}
            complaints, failed = [], set()
            for arch, log in logs.items():
                try:
                    told, table = dict(cuda_reports(log.result())), self.tables[source].result()
                    complaints += [f"sm_{arch}: {x}" for x in products_that_wait(log.result())]
                    reports = with_dynamic(told, table, arch)
                except Exception as error:  # told below, and the remaining ones still looked at
                    complaints.append(f"{source.name}: sm_{arch}: {type(error).__name__}: {error}")
                    failed.add(arch)
                    continue
                for kernel, report in reports.items():
                    rows.setdefault(kernel, {})[arch] = report
                    complaints += [f"{kernel}: sm_{arch}: {x}" for x in report.faults(arch)]
            for kernel, by_arch in sorted(rows.items()):
                cells = (
                    " / ".join(map(str, by_arch[arch]))
                    if arch in by_arch
                    else "FAILED"
                    if arch in failed
                    else "-"  # another GPU's own
                    for arch in self.archs
                )
                print(f"{kernel:48}" + "".join(f"{cell:>28}" for cell in cells))
            for complaint in complaints:
                print(f"  FAULT {complaint}")
            count, faults = count + len(rows), faults + len(complaints)
        print(f"{count} CUDA kernels for {len(self.archs)} architectures, {faults} faults")
        return faults


def main(folder: Path, cuda_folder: Path, everything: bool) -> int:
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is ignored here: interpreted kernels cannot be compiled")
    if importlib.util.find_spec("triton") is None:
        print("compile-only needs triton: pip install -e '.[test]'", file=sys.stderr)
        return 1
    sys.path.insert(0, str(ROOT))
    from g2r_fast.building import find_nvcc

    sources, nvcc = sorted(cuda_folder.glob("*.cu")), find_nvcc()
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(2) as threads:
        # Processes first: they are copies of this one, which should have no threads by then.
        triton_kernels = TritonKernels(folder, cache, everything)
        cuda = CudaSources(nvcc, sources, threads) if nvcc and sources else None
        faults = triton_kernels.print_table()
        if cuda is not None:
            faults += cuda.print_table()
        elif sources:
            print(f"not compiled, as there is no nvcc: {', '.join(x.name for x in sources)}")
    return 1 if faults else 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--all"]
    folder, cuda_folder = (Path(words[0]),) * 2 if words else (ROOT / "kernels", CUDA)
    sys.exit(main(folder, cuda_folder, everything="--all" in sys.argv))
