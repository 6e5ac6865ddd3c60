"""Compile every shipped kernel for every GPU generation we name, on a machine without a GPU.

    python tests/compile_only.py [folder of kernels]

Prints shared memory, registers, stack and spills as the assembler reports them. Fails on a kernel
that does not compile, spills, keeps a stack frame or takes more shared memory than a block may have
(Triton itself compiles such a kernel without a word), and on a kernel file that lists no cases.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
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


def main(folder: Path) -> int:
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is ignored here: interpreted kernels cannot be compiled")
    try:
        import triton
    except ImportError:
        print("compile-only needs triton: pip install -e '.[test]'", file=sys.stderr)
        return 1
    sys.path.insert(0, str(ROOT))
    triton.knobs.nvidia.dump_ptxas_log = True
    cases = load_cases(folder)
    archs = [arch for arch in SHARED_LIMIT if arch in REQUIRED or knows(arch)]
    faults = 0
    print(f"triton {triton.__version__}; shared bytes / registers / stack bytes / spill bytes")
    print(f"{'kernel':32}" + "".join(f"{f'sm_{arch}':>28}" for arch in archs))
    # A cache of its own, as the assembler reports nothing about a kernel found in the cache.
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        for case in cases:
            cells, complaints = [], []
            for arch in archs:
                try:
                    report = compile_case(case, arch)
                except Exception as error:  # told below, and the remaining ones still compiled
                    cells.append("FAILED")
                    complaints.append(f"sm_{arch}: {type(error).__name__}: {error}")
                    continue
                cells.append(" / ".join(map(str, report)))
                complaints += [f"sm_{arch}: {fault}" for fault in report.faults(arch)]
            print(f"{case.name:32}" + "".join(f"{cell:>28}" for cell in cells))
            for complaint in complaints:
                print(f"  FAULT {case.name}: {complaint}")
            faults += len(complaints)
    print(f"{len(cases)} Triton kernels for {len(archs)} architectures, {faults} faults")
    cuda_sources = sorted(path.name for path in ROOT.glob("csrc/**/*.cu"))
    if cuda_sources:
        print(f"  FAULT nothing here compiles these CUDA sources yet: {', '.join(cuda_sources)}")
        return 1
    print("no CUDA sources yet")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "kernels"))
