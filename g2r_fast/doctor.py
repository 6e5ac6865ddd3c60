"""What is built, what runs, and why not something faster; behind `g2r-fast doctor`.

`examine()` only looks: it compiles nothing and changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

from . import __version__, native
from .build_cache import problem_of_cache, remembered_failure
from .building import CPU_OPS, CUDA_OPS, PARTS, Part, find_compiler, find_nvcc
from .errors import InputError

__all__ = ["as_text", "examine", "remedy"]

SETTINGS = {  # and what they are where nobody sets them
    "G2R_BACKEND": "auto",
    "G2R_CPU": "the best that runs here",
    "G2R_PRODUCTS": "mma",
    "G2R_BUILD": "auto",
    "G2R_CACHE": "in the home folder",
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# What each table of kernels needs of the processor, as Linux spells it.
_AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
NEEDS = {
    "avx512bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma"),
    "plain": (),
}


def examine() -> dict[str, Any]:
    """Everything `g2r-fast doctor` tells, ready for JSON.

    ``problems`` holds what was asked for in the environment and cannot be had.
    """
    problems: dict[str, None] = {}  # distinct, in order
    with native.looking_only():
        try:
            native.may_build()
        except InputError as error:
            problems[str(error)] = None
        reason, usable = _load_ops(problems)
        reasons = {CPU_OPS: reason, CUDA_OPS: _load_cuda()}
        flags = _processor_flags()
        kernels = _kernels(flags) if usable else []
        backends = _backends(problems)
    return {
        "versions": _versions(),
        "processor": {
            "name": _processor_name(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "instruction_sets": [flag for flag in NEEDS["avx512bf16"] if flag in flags],
        },
        "gpus": _gpus(),
        "settings": {name: os.environ.get(name) for name in SETTINGS},
        "parts": [_part(part, reasons.get(part)) for part in (*PARTS, CUDA_OPS)],
        "kernels": kernels,
        "backends": backends,
        "problems": list(problems),
    }


def _versions() -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {"g2r_fast": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # which names the build, unlike some packages' metadata
    found["compiler"] = _tool(find_compiler(), "")
    nvcc = find_nvcc()
    found["nvcc"] = _tool(nvcc and [nvcc], "release")
    return found


def _tool(command: list[str] | str | None, word: str) -> str | None:
    """A compiler, and the first line with `word` of what it says about its version."""
    if not command:
        return None
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{shlex.join(command)} (does not run: {error})"
    lines = [line for line in done.stdout.splitlines() if word in line]
    return f"{shlex.join(command)} ({lines[0] if lines else f'exit status {done.returncode}'})"


def _gpus() -> list[dict[str, str]]:
    """Those that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "compute_capability": f"{major}.{minor}",
            }
        )
    return found


def _processor_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _load_ops(problems: dict[str, None]) -> tuple[str | None, bool]:
    """Why torch.ops.g2r_fast is not there, None where it is; whether its kernels can be asked.

    They cannot where `G2R_CPU` names none of them: the first that runs would stay in use.
    """
    from .native_ops import load

    wanted = os.environ.get("G2R_CPU")
    if wanted and wanted not in NEEDS:
        problems[f"G2R_CPU={wanted} is none of {', '.join(NEEDS)}"] = None
    try:
        reason = load()
    except InputError as error:
        if wanted in NEEDS:
            problems[str(error)] = None
        return None, False
    return reason, reason is None


def _load_cuda() -> str | None:
    """Why the library of csrc/cuda does not load, None where it does."""
    from . import cuda_ops

    return cuda_ops.load()


def _part(part: Part, reason: str | None) -> dict[str, Any]:
    """`reason`: why it did not load although it looked sound."""
    status = native.status(part.name)
    reason = status.reason or reason
    return {
        "name": f"g2r_fast.{part.name}",
        "path": None if reason else status.path,
        "reason": reason,
        "without_it": part.cost if reason else None,
        "remedy": remedy(part) if reason else None,
    }


def remedy(part: Part) -> str:
    """What to do about a part that is not there."""
    if part.needs_nvcc:
        return _remedy_for_cuda(part)
    unusable = problem_of_cache(native.PACKAGE)
    if find_compiler() is None:
        install = "install a C++ compiler (g++)"
        if unusable is not None:
            return f"{install}; {unusable}"
        return f"{install}; then `g2r-fast build`, or the next use, compiles it"
    return unusable or _remedy_with_compiler(part, "first use")


def _remedy_for_cuda(part: Part) -> str:
    """Nothing is amiss where there is no GPU."""
    import torch

    unusable = problem_of_cache(native.PACKAGE)
    if find_nvcc() is None:
        named = os.environ.get("CUDACXX")
        install = (
            f"CUDACXX={named} is not there: name an nvcc, or unset it"
            if named
            else "install the CUDA toolkit (nvcc), or set CUDA_HOME to the folder it is in"
        )
        if unusable is not None:
            to_do = f"{install}; {unusable}"
        else:
            to_do = f"{install}; then `g2r-fast build`, or the next use on a GPU, compiles it"
    else:
        to_do = unusable or _remedy_with_compiler(part, "first use on a GPU")
    if torch.cuda.is_available():
        return to_do
    return f"torch sees no GPU, so nothing here needs it; for a machine that has one: {to_do}"


def _remedy_with_compiler(part: Part, use: str) -> str:
    failure = remembered_failure(part, native.PACKAGE)
    if failure is not None:
        return f"it could not be compiled ({failure}); `g2r-fast build` tries again"
    if os.environ.get("G2R_BUILD") == "never":
        return f"`g2r-fast build` compiles it; G2R_BUILD=never keeps its {use} from doing so"
    return f"`g2r-fast build` compiles it now, its {use} otherwise"


def _kernels(flags: frozenset[str]) -> list[dict[str, Any]]:
    """The tables of the CPU library, best first: which is in use, and why not a better one."""
    import torch

    ops = torch.ops.g2r_fast
    in_use = ops.cpu_kernels()
    tables = []
    for name in ops.built_cpu_kernels().split(","):
        reason = None
        try:
            ops.use_cpu_kernels(name)
        except RuntimeError:
            lacking = [flag for flag in NEEDS.get(name, ()) if flag not in flags]
            reason = f"the processor lacks {', '.join(lacking) or 'something it needs'}"
        else:
            wanted = os.environ.get("G2R_CPU")
            if in_use != name:
                reason = f"G2R_CPU={wanted}" if wanted else f"{in_use} runs here too"
        tables.append({"name": name, "used": name == in_use, "reason": reason})
    ops.use_cpu_kernels(in_use)
    return tables


def _backends(problems: dict[str, None]) -> list[dict[str, Any]]:
    """For every device and dtype, each backend: whether it runs, and if not, why."""
    import torch

    from .backends import BACKENDS, Request, choose, describe, wanted_backend
    from .errors import BackendError

    try:
        wanted = wanted_backend()
    except InputError as error:
        problems[str(error)] = None
        return []
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found = []
    served = False
    for device in devices:
        for dtype in DTYPES:
            # A shape that suits every backend: what is told is of the machine, not of a model.
            request = Request(torch.device(device), getattr(torch, dtype), 256, 512, 64)
            stopped = f"G2R_BACKEND={wanted}"
            try:
                chosen = choose(request).name
            except BackendError:
                chosen = None
            except InputError:  # which _load_ops has told
                chosen, stopped = None, "a wrong setting stops such a run"
            served |= chosen == wanted
            candidates = []
            for candidate in describe(request):
                reason = candidate.reason
                if reason is None and candidate.backend != chosen:
                    first = chosen is not None and wanted == "auto"
                    reason = f"{chosen} serves, and comes first" if first else stopped
                candidates.append(
                    {
                        "backend": candidate.backend,
                        "used": candidate.backend == chosen,
                        "reason": reason,
                    }
                )
            found.append({"device": device, "dtype": dtype, "candidates": candidates})
    if wanted in BACKENDS and not served:
        problems[f"G2R_BACKEND={wanted} serves no device and dtype of this machine"] = None
    return found


def as_text(report: dict[str, Any]) -> str:
    """The same for people."""
    versions = dict(report["versions"])
    lines = [f"g2r_fast {versions.pop('g2r_fast')}"]
    lines += [f"  {name:<14}{version or 'not there'}" for name, version in versions.items()]
    processor = report["processor"]
    lines += ["", f"{processor['name']}, {processor['machine']}, {processor['cores']} cores"]
    lines.append(f"  {' '.join(processor['instruction_sets']) or 'none of the vector sets we use'}")
    lines += [
        f"{gpu['device']}: {gpu['name']}, compute capability {gpu['compute_capability']}"
        for gpu in report["gpus"]
    ]
    if not report["gpus"]:
        lines.append("torch sees no GPU")
    lines += ["", "settings"]
    for name, value in report["settings"].items():
        lines.append(f"  {name:<14}{value or f'not set: {SETTINGS[name]}'}")
    lines += ["", "compiled parts"]
    for part in report["parts"]:
        lines.append(f"  {part['name']:<20}{part['path'] or 'not there: ' + part['reason']}")
        if part["path"] is None:
            lines.append(f"  {'':<20}without it {part['without_it']}")
            lines.append(f"  {'':<20}{part['remedy']}")
    if report["kernels"]:
        lines += ["", "CPU kernels"]
        lines += [
            f"  {table['name']:<14}{'in use' if table['used'] else 'not used: ' + table['reason']}"
            for table in report["kernels"]
        ]
    if report["backends"]:
        lines += ["", "what runs the packed engine (G2R_BACKEND names one)"]
    for row in report["backends"]:
        used = [c["backend"] for c in row["candidates"] if c["used"]] or ["nothing"]
        lines.append(f"  {row['device']} {row['dtype']:<10}{used[0]}")
        lines += [
            f"      not {c['backend']}: {c['reason']}" for c in row["candidates"] if not c["used"]
        ]
    lines += ["", *(f"PROBLEM: {problem}" for problem in report["problems"])]
    return "\n".join(lines).rstrip()
