"""Triton kernels against plain PyTorch: under the interpreter, or on the device if there is one.

Two rules judge a kernel, and neither has an absolute tolerance: integer inputs, where float32 is
exact, give equal bits; random inputs at the scale of real embeddings and gradients (0.02) stay
within the forward-error bound of float32 summation. Both must catch every bug planted below.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import row_dot as module
from g2r_fast.kernels.configs import ATTENTION, LAUNCHES, NORMS, heads_config, row_config
from g2r_fast.kernels.row_dot import CONFIG, READOUTS, row_dot

from g2r_fast.errors import InputError, InputTypeError

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = 2.0**-24  # float32, round to nearest

BLOCK_H = CONFIG.blocks["BLOCK_H"]
# One column; one short of a step; exactly one; a step and a column; three steps and a bit.
WIDTHS = [1, BLOCK_H - 1, BLOCK_H, BLOCK_H + 1, 3 * BLOCK_H + 17]


def poisoned(values, extra):
    """The same values as a view into memory whose other columns are NaN."""
    rows, width = values.shape
    memory = torch.full((rows + 1, width + extra), float("nan"), dtype=values.dtype, device=DEVICE)
    memory[:rows, :width] = values
    return memory[:rows, :width]


def make_inputs(kind, width, dtype, embed_dtype=None, rows=5, sources=4):
    generator = torch.Generator().manual_seed(width)

    def draw(count):
        if kind == "integers":
            # Up to 4 · 4 · 3089 < 2^24: every partial sum is exact in float32, in any order.
            return torch.randint(-4, 5, (count, width), generator=generator).float()
        return torch.randn(count, width, generator=generator) * 0.02

    grad = poisoned(draw(rows).to(dtype), extra=5)
    embed = poisoned(draw(sources).to(embed_dtype or dtype), extra=3)
    row_map = torch.tensor([3, 0, 2, 0, 1], device=DEVICE)[:rows]
    return grad, embed, row_map


def terms(grad, embed, row_map, readout):
    """[R, H] float64: what is summed, exact for every input dtype."""
    grad = grad.double()
    if readout == "dot":
        return grad * embed.double()[row_map]
    return grad.abs() if readout == "l1" else grad.square()


def truth(grad, embed, row_map, readout):
    total = terms(grad, embed, row_map, readout).sum(-1)
    return total.sqrt() if readout == "l2" else total


def longest_chain(width):
    """Roundings on the way of one term into the sum, the square root's included.

    The product, one addition per step, then the sum across the slots: a tree on the device; under
    the interpreter NumPy's pairwise sum, eight running sums over at most 128 terms at its leaves.
    """
    steps = math.ceil(width / BLOCK_H)
    return 2 + steps + 16 + math.ceil(math.log2(BLOCK_H))


def equal_bits(implementation, dtype, readout, width):
    inputs = make_inputs("integers", width, dtype)
    got = implementation(*inputs, readout=readout)
    # sqrt is rounded once: from the exact sum, through float64, to float32.
    return torch.equal(got, truth(*inputs, readout).float())


def within_bound(implementation, dtype, readout, width):
    inputs = make_inputs("random", width, dtype)
    got = implementation(*inputs, readout=readout).double()
    expected = truth(*inputs, readout)
    size = terms(*inputs, readout).abs().sum(-1)
    if readout == "l2":
        size = size.sqrt()
    bound = longest_chain(width) * UNIT * size
    alive = bool(got.isfinite().all()) and float(got.norm()) > 0
    return alive and bool(((got - expected).abs() <= bound).all())


RULES = [equal_bits, within_bound]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_row_dot_is_right(rule, readout, dtype, width):
    assert rule(row_dot, dtype, readout, width)


# Each takes what row_dot takes and has the fault in its name.
def last_column_dropped(grad, embed, row_map, readout):
    return row_dot(grad[:, :-1], embed[:, :-1], row_map, readout=readout)


def scale_off_by_1_percent(grad, embed, row_map, readout):
    return row_dot(grad, embed, row_map, readout=readout) * 1.01


def scale_off_by_0_1_percent(grad, embed, row_map, readout):
    return row_dot(grad, embed, row_map, readout=readout) * 1.001


def two_rows_swapped(grad, embed, row_map, readout):
    return row_dot(grad, embed, row_map, readout=readout)[[1, 0, 2, 3, 4]]


def all_zero(grad, embed, row_map, readout):
    return torch.zeros_like(row_dot(grad, embed, row_map, readout=readout))


def row_map_ignored(grad, embed, row_map, readout):
    straight = torch.arange(len(row_map), device=DEVICE) % len(embed)
    return row_dot(grad, embed, straight, readout=readout)


def last_row_not_written(grad, embed, row_map, readout):
    out = torch.full((len(grad),), float("nan"), device=DEVICE)
    out[:-1] = row_dot(grad[:-1], embed, row_map[:-1], readout=readout)
    return out


def rounded_to_bfloat16(grad, embed, row_map, readout):
    return row_dot(grad, embed, row_map, readout=readout).bfloat16().float()


PLANTED = [
    last_column_dropped,
    scale_off_by_1_percent,
    scale_off_by_0_1_percent,
    two_rows_swapped,
    all_zero,
    row_map_ignored,
    last_row_not_written,
    rounded_to_bfloat16,
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("readout", "bug"),
    # l1 and l2 have no row map to ignore.
    [(r, bug) for r in READOUTS for bug in PLANTED if r == "dot" or bug is not row_map_ignored],
)
def test_every_rule_catches_every_planted_bug(rule, readout, bug):
    width = BLOCK_H + 1
    assert rule(row_dot, torch.bfloat16, readout, width)
    assert not rule(bug, torch.bfloat16, readout, width)


def test_every_output_is_written_and_nothing_beside_it(monkeypatch):
    grad, embed, row_map = make_inputs("integers", 40, torch.float32)
    memory = torch.full((len(grad) + 4,), float("nan"), device=DEVICE)
    out = memory[2:-2]
    assert row_dot(grad, embed, row_map, out=out) is out
    assert torch.equal(out, truth(grad, embed, row_map, "dot").float())
    assert memory[:2].isnan().all() and memory[-2:].isnan().all()

    # The memory it takes itself, poisoned as well.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert torch.equal(row_dot(grad, embed, row_map), out)


def test_inputs_are_left_as_they_were():
    inputs = make_inputs("random", 33, torch.float16)
    before = [tensor.clone() for tensor in inputs]
    row_dot(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_mixed_dtypes_and_a_32_bit_row_map():
    grad, embed, row_map = make_inputs("integers", 50, torch.float32, torch.bfloat16)
    got = row_dot(grad, embed, row_map.int())
    assert torch.equal(got, truth(grad, embed, row_map, "dot").float())


def test_no_rows_and_no_columns():
    nothing = torch.zeros(0, 8, device=DEVICE)
    embed = torch.ones(2, 8, device=DEVICE)
    assert row_dot(nothing, embed, torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (0,)
    assert row_dot(torch.zeros(3, 0, device=DEVICE), readout="l1").tolist() == [0.0, 0.0, 0.0]


GRAD = torch.ones(2, 8, device=DEVICE)
MAP = torch.zeros(2, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((GRAD, GRAD, MAP), {"readout": "linf"}, InputError, "unknown readout"),
        ((GRAD,), {}, InputTypeError, "needs embed and row_map"),
        ((GRAD.double(), GRAD, MAP), {}, InputTypeError, "grad has an unusable dtype"),
        ((GRAD, GRAD.long(), MAP), {}, InputTypeError, "embed has an unusable dtype"),
        ((GRAD[0], GRAD, MAP), {}, InputError, "grad must be a matrix"),
        ((GRAD[:, ::2], GRAD, MAP), {}, InputError, "contiguous columns"),
        ((GRAD, GRAD[:, :4], MAP), {}, InputError, "differ in width"),
        ((GRAD, GRAD, MAP[:1]), {}, InputError, "row_map must be contiguous"),
        ((GRAD, GRAD, MAP.float()), {}, InputTypeError, "row_map has an unusable dtype"),
        ((GRAD, GRAD, MAP), {"out": GRAD[0]}, InputError, "out must be contiguous"),
        ((GRAD, GRAD, MAP), {"out": MAP}, InputTypeError, "out has an unusable dtype"),
        ((GRAD, GRAD.to("meta"), MAP), {}, InputError, "embed is on another device"),
    ],
)
def test_bad_arguments_are_told_apart(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        row_dot(*arguments, **keywords)


def run_python(code, **environment):
    """A fresh interpreter in the repository, without this suite's TRITON_INTERPRET."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_tensor_on_the_cpu_is_refused_outside_the_interpreter():
    code = (
        "import torch; from g2r_fast.kernels.row_dot import row_dot\n"
        "row_dot(torch.ones(2, 8), readout='l1')"
    )
    done = run_python(["-c", code])
    assert done.returncode == 1
    assert "InputError: grad is not on a GPU; expected a CUDA tensor" in done.stderr


def test_without_triton_the_module_imports_and_says_so_on_use():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from g2r_fast.kernels.row_dot import row_dot\n"
        "row_dot(torch.ones(2, 8), readout='l1')"
    )
    done = run_python(["-c", code])
    assert done.returncode == 1
    assert "ImportError: g2r_fast.kernels.row_dot needs triton" in done.stderr


def test_every_kernel_file_lists_what_it_ships():
    names = [case.name for case in module.compile_cases()]
    assert len(names) == len(set(names)) == len(READOUTS) * len(DTYPES) * 2


def test_every_launch_stands_in_the_table_with_its_reason():
    used = set()
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.name == "configs.py" or not re.search(
            r"(num_warps|num_stages|maxnreg)\W+\d", text
        )
        used |= set(re.findall(r'LAUNCHES\["(\w+)"\]', text))
    assert used == set(LAUNCHES)
    computed = (row_config(64), heads_config(2, 32, False))
    for config in (*LAUNCHES.values(), *NORMS, *ATTENTION, *computed):
        assert re.match(r"(By arithmetic, not|Measured on)", config.reason), config


FAULTY_KERNELS = """
import triton
import triton.language as tl
from g2r_fast.kernels.launching import CompileCase


@triton.jit
def greedy(a_ptr, b_ptr, out_ptr, K, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N, N], dtype=tl.float32)
    for k in range(0, K, 64):
        j = k + tl.arange(0, 64)
        a = tl.load(a_ptr + i[:, None] * K + j[None, :])
        total += tl.dot(a, tl.load(b_ptr + j[:, None] * N + i[None, :]))
    tl.store(out_ptr + i[:, None] * N + i[None, :], total)


@triton.jit
def spilling(a_ptr, b_ptr, out_ptr, K, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N], dtype=tl.float32)
    for k in range(0, K):
        total += tl.load(a_ptr + k * N + i) * tl.load(b_ptr + k)
    tl.store(out_ptr + i, total)


@triton.jit
def broken(a_ptr, b_ptr, out_ptr, K, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.load(nowhere))


def compile_cases():
    signature = {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32", "K": "i32"}
    few = {"num_warps": 1, "maxnreg": 64}
    return [
        CompileCase("greedy", greedy, signature, {"N": 128}, {"num_stages": 10}, True),
        CompileCase("spilling", spilling, signature, {"N": 2048}, few, True),
        CompileCase("broken", broken, signature, {"N": 16}, few, True),
    ]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assemblers are there on Linux only")
def test_compile_only_sees_every_planted_fault(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_KERNELS, encoding="utf-8")
    done = run_python(["tests/compile_only.py", str(tmp_path)])
    assert done.returncode == 1, done.stderr
    for arch in (80, 90):
        assert f"FAULT greedy: sm_{arch}: " in done.stdout
        assert f"FAULT broken: sm_{arch}: CompilationError" in done.stdout
    assert "bytes of shared memory, limit 166912" in done.stdout
    assert "bytes of spills" in done.stdout.split("FAULT spilling: sm_80: ")[1].splitlines()[0]

    (tmp_path / "faulty.py").write_text(FAULTY_KERNELS.replace("def compile_cases", "def cases"))
    done = run_python(["tests/compile_only.py", str(tmp_path)])
    assert done.returncode == 1 and "no compile_cases()" in done.stderr

    (tmp_path / "faulty.py").unlink()
    done = run_python(["tests/compile_only.py", str(tmp_path)])
    assert done.returncode == 1 and "no kernels found" in done.stderr
