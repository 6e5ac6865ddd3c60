"""The CUDA kernels on a CPU, thread by thread, against definitions in float64.

Integers have one right answer to the bit; random arguments stay within twice the error of plain
PyTorch in the same dtype. The emulation (tests/cpp/emulated.h) lets a missing wait or barrier show:
here every one of them is taken out once.
"""

from __future__ import annotations

import faulthandler
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated_cuda as cuda
import pytest
import torch
from emulated_cuda import DTYPES, Case, Emulation
from native_calls import COMPILER, bits
from native_oracles import Outputs

from g2r_fast import cuda_ops

ROOT = Path(__file__).resolve().parents[1]
DEVICE_TEST = ROOT / "tests" / "cpp" / "test_cuda_device.cpp"
INCLUDES = [f"-I{ROOT / 'tests' / 'cpp'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
OPS = ("attention_forward", "attention_backward")
PRODUCTS = pytest.mark.parametrize("products", ["mma", "wgmma"])

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is for Linux"),
]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    with cuda.used(cuda.build(path, "-O2", *cuda.WARNINGS)) as found:
        yield found


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS")}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean | environment
    )


# --- the emulation itself -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sanitized", "optimised", "ucontext"])
def device_test(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = {
        "sanitized": [*cuda.SANITIZERS, "-O0"],
        "optimised": ["-O2"],
        "ucontext": ["-O1", "-DG2R_EMULATED_UCONTEXT"],
    }[request.param]
    program = tmp_path_factory.mktemp("device") / request.param
    command = [str(COMPILER), "-std=c++17", "-DG2R_EMULATE", *cuda.WARNINGS, *INCLUDES]
    done = run([*command, *flags, str(DEVICE_TEST), "-o", str(program)])
    if done.returncode != 0 and "san" in done.stderr and "cannot find" in done.stderr:
        pytest.skip(f"{COMPILER} cannot link the sanitizers: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[:4000]
    return program


def test_the_device_does_what_plain_loops_do_and_finds_planted_bugs(device_test: Path) -> None:
    done = run([str(device_test)])
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr[-4000:]


def test_overruns_of_one_byte_are_seen(device_test: Path) -> None:
    if device_test.name != "sanitized":
        pytest.skip("only sanitizers see these")
    assert run([str(device_test), "none"]).returncode == 0
    assert "use-after-poison" in run([str(device_test), "shared"]).stderr
    assert "heap-buffer-overflow" in run([str(device_test), "global"]).stderr


# --- the kernels ----------------------------------------------------------------------------------


@PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_integers_are_exact(
    op: str, dtype: torch.dtype, products: str, emulation: Emulation
) -> None:
    cases = cuda.select(op, integers=True)
    found = {str(case): cuda.faults(case, dtype, products) for case in cases}
    assert not {case: wrong for case, wrong in found.items() if wrong}


@PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_random_arguments_at_the_scale_of_real_ones(
    op: str, dtype: torch.dtype, products: str, emulation: Emulation
) -> None:
    # The dtypes are two instances of one template, which the integers go through whole.
    cases = cuda.select(op, integers=False)[:: 1 if dtype == torch.bfloat16 else 3]
    found = {str(case): cuda.faults(case, dtype, products) for case in cases}
    assert not {case: wrong for case, wrong in found.items() if wrong}


@PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors_average_out(
    op: str, dtype: torch.dtype, products: str, emulation: Emulation
) -> None:
    assert not cuda.biased(op, dtype, products)


# Several tiles of queries and keys, a window, a cap, both sizes of a head.
def demanding(op: str) -> list[Case]:
    return [case for case in cuda.select(op, integers=False) if case.name.startswith("several-")]


ORDERS = (1, 2, 0)


def ordered(case: Case, products: str, order: int, emulation: Emulation) -> Outputs | str:
    """What it gives in one order of threads, or the error."""
    with emulation.order(order):
        try:
            return cuda.run(case.op, cuda.arguments(case, torch.bfloat16), products)
        except RuntimeError as error:
            return str(error)


def same(first: Outputs | str, second: Outputs | str) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return False
    return all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


def in_a_process(question: Callable[[], bool]) -> bool | None:
    """The answer; None where the process did not live to give it."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(10 + question())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {10: False, 11: True}.get(code)


@PRODUCTS
@pytest.mark.parametrize("op", OPS)
def test_the_order_of_threads_changes_no_bit(op: str, products: str, emulation: Emulation) -> None:
    assert demanding(op)
    for case in demanding(op):
        first, *others = (ordered(case, products, order, emulation) for order in ORDERS)
        assert not isinstance(first, str), first
        assert not any(x.isnan().any() for x in first.values())
        assert all(same(first, other) for other in others)


KINDS = {
    "mma": {"sync_block", "cp_async_commit", "cp_async_wait"},
    "wgmma": {
        "sync_block", "cp_async_commit", "cp_async_wait", "fence_async_proxy",
        "wgmma_fence", "wgmma_commit", "wgmma_wait",
    },
}  # fmt: skip


@PRODUCTS
@pytest.mark.parametrize("op", OPS)
def test_every_wait_is_needed(op: str, products: str, emulation: Emulation) -> None:
    """Without any one of them, some result is wrong in some order of threads.

    Not so of sync_warp: lanes meet at the shuffles and products around it too.
    """
    cases = sorted(demanding(op), key=lambda case: cuda.arguments(case, torch.bfloat16)["head_dim"])
    right = [ordered(case, products, 0, emulation) for case in cases]

    def shows() -> bool:
        return any(
            not same(ordered(case, products, order, emulation), expected)
            for case, expected in zip(cases, right, strict=True)
            for order in ORDERS
        )

    assert not shows()
    files = op if products == "mma" else f"{op.replace('attention', 'warpgroup')}|warpgroup_tile"
    here = re.compile(files)
    waits = {
        i: x for i, x in enumerate(emulation.waits()) if here.search(x) and "sync_warp " not in x
    }
    assert {x.split()[0] for x in waits.values()} == KINDS[products]
    unnoticed = []
    for index, wait in waits.items():
        with emulation.passing_over(index):
            if in_a_process(shows) is False:
                unnoticed.append(wait)
    assert not unnoticed


@PRODUCTS
@pytest.mark.parametrize("op", OPS)
def test_rows_of_matrices_never_wait_for_each_other(
    op: str, products: str, emulation: Emulation
) -> None:
    """Shared memory is laid out so that no matrix of 8 x 8 meets a bank twice."""
    emulation.counts()
    for case in demanding(op):
        cuda.run(op, cuda.arguments(case, torch.bfloat16), products)
    counts = emulation.counts()
    loads = {"mma": "loads", "wgmma": "warpgroup_products"}[products]
    assert counts[loads] > 0, counts
    assert counts["conflicts"] == counts["warpgroup_conflicts"] == 0, counts


@PRODUCTS
@pytest.mark.parametrize("op", OPS)
def test_of_no_rows_nothing_is_written(op: str, products: str, emulation: Emulation) -> None:
    a = cuda.arguments(demanding(op)[0], torch.bfloat16)
    a |= {"blocks": a["blocks"][:0], "positions": a["positions"][:0], "q": a["q"][:0]}
    if op == "attention_backward":
        a |= {"out": a["out"][:0], "lse": a["lse"][:0], "grad_out": a["grad_out"][:0]}
        a |= {"block_lanes": a["block_lanes"][:0]}
    got = cuda.run(op, a, products)
    if op == "attention_backward":  # keys that nobody saw
        assert not got["dk"].any() and not got["dv"].any()


def test_what_no_kernel_takes_is_refused(emulation: Emulation) -> None:
    case = cuda.select("attention_forward", integers=False)[0]
    a = cuda.arguments(case, torch.bfloat16)
    narrow = {name: a[name][..., :32].contiguous() for name in "qkv"}
    with pytest.raises(RuntimeError, match="head_dim is neither 64 nor 128"):
        cuda.run(case.op, a | narrow)
    with pytest.raises(RuntimeError, match="float32"):
        cuda.run(case.op, a | {name: a[name].float() for name in "qkv"})
    with pytest.raises(RuntimeError, match="contiguous"):
        cuda.run(case.op, a | {"k": a["k"][:, :, :32]})
    assert {kernel.threads % 32 for kernel in cuda_ops.library().kernels()} == {0}


# --- under sanitizers -----------------------------------------------------------------------------


def test_the_kernels_stay_inside_their_memory(tmp_path: Path) -> None:
    """In a process of its own, which loads the sanitizers before anything else."""
    preloaded = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        found = run([str(COMPILER), f"-print-file-name={name}"]).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{COMPILER} has no {name}")
        preloaded.append(found)
    library = cuda.build(tmp_path / "kernels.so", "-Og", *cuda.SANITIZERS)
    cases = [
        str(case) for op in OPS for case in (cuda.select(op, integers=True)[5], demanding(op)[0])
    ]
    done = run(
        [sys.executable, str(ROOT / "tests" / "emulated_cuda.py"), str(library), *cases],
        LD_PRELOAD=" ".join(preloaded),
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr[-4000:]
