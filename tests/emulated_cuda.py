"""The CUDA kernels on a CPU: csrc/cuda compiled by a C++ compiler, and what they are tested on.

    PYTHONPATH=. python tests/emulated_cuda.py LIBRARY [CASE ...]

runs cases on a library and prints what is wrong with them: for a process with sanitizers.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import native_tries as attention
import torch
from native_arguments import Draw
from native_calls import COMPILER, bits
from native_oracles import EXACT, ORACLES, Arguments, Outputs, plain
from native_rules import equal_bits, judge, limit_of, near, unbiased
from native_tries import TRIES, Trie, given_lse_backward
from torch import Tensor

from g2r_fast import cuda_attention, cuda_ops

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-DG2R_EMULATE", "-x", "c++"]
FLAGS += [f"-I{ROOT / 'tests' / 'cpp'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
DTYPES = (torch.bfloat16, torch.float16)

# In front of and behind every tensor; a multiple of 16 bytes in every dtype.
_GUARD = 64

# Paths of several tiles of queries and keys, with borders of segments within and between them.
LONG = {
    "several-tiles": Trie(
        ((-1, 140), (0, 66), (1, 33), (0, 3), (3, 70)), ((2, 1), (2, 0), (4, 3), (4, 0))
    ),
    "many-short": Trie(
        ((-1, 1), *((i, 1 + i % 5) for i in range(40))), ((40, 0), (40, 7), (23, 23))
    ),
}
# heads, kv_heads, head_dim: groups of 1, 2, 3, 4 and 8.
SIZES = ((2, 1, 64), (4, 1, 128), (8, 1, 64), (2, 2, 128), (6, 2, 64), (3, 3, 64), (2, 1, 128))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 1},
    {"softcap": 2.0, "gain": 3.0},
    {"window": 3},
    {},
    {"window": 20, "softcap": 1.5, "gain": 3.0},
    {"window": 70},
    {"gain": 20.0},
)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[Draw], Arguments]
    integers: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}" + "-integers" * self.integers


def _cases() -> Iterator[Case]:
    at = 0
    for op, random, integers in (
        ("attention_forward", attention.forward, attention.forward_one_hot),
        ("attention_backward", attention.backward, attention.backward_of_ones),
    ):
        for name, trie in (TRIES | LONG).items():
            for step in range(2):
                sizes, options = SIZES[at % len(SIZES)], OPTIONS[at % len(OPTIONS)]
                label = "-".join([name, *map(str, sizes), *(f"{k}{v}" for k, v in options.items())])
                yield Case(op, label, partial(random, trie=trie, **_named(sizes), **options))
                if step == 0:
                    window = {k: v for k, v in options.items() if k == "window"}
                    made = partial(integers, trie=trie, **window)
                    yield Case(op, label, _positional(made, sizes), True)
                at += 1
        # The last query's window ends in front of the second key of a tile of keys, and nothing
        # else is to be hidden in that tile.
        border = partial(random, trie=Trie(((-1, 128), (0, 7)), ((1, 0),)), window=70)
        yield Case(op, "window-border", _positional(border, (2, 1, 64)))


def _named(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("heads", "kv_heads", "head_dim"), sizes, strict=True))


def _positional(make: Callable[..., Arguments], sizes: tuple[int, int, int]) -> Any:
    trie = make.keywords.pop("trie")  # type: ignore[attr-defined]
    return lambda draw: make(draw, trie, *sizes)


CASES = tuple(_cases())


def select(op: str | None = None, integers: bool | None = None) -> list[Case]:
    return [c for c in CASES if op in (None, c.op) and integers in (None, c.integers)]


@cache
def arguments(case: Case, dtype: torch.dtype) -> Arguments:
    a = case.make(Draw(dtype, 3))
    if case.op == "attention_backward":
        a["out"] = a["out"].to(dtype)  # as its forward writes it
    return a


@cache
def truth(case: Case, dtype: torch.dtype) -> Outputs:
    a = arguments(case, dtype)
    if case.integers and case.op == "attention_backward":
        return given_lse_backward(a)
    return ORACLES[case.op](a, EXACT)


@cache
def yardstick(case: Case, dtype: torch.dtype) -> Outputs:
    return ORACLES[case.op](arguments(case, dtype), plain(dtype))


class Guarded:
    """A copy of a tensor, aligned, with NaN in front of it and behind it."""

    def __init__(self, like: Tensor) -> None:
        memory = torch.full((like.numel() + 2 * _GUARD,), torch.nan, dtype=like.dtype)
        self.around = memory[:_GUARD], memory[memory.numel() - _GUARD :]
        self.tensor = memory[_GUARD : memory.numel() - _GUARD].view(like.shape)
        self.tensor.copy_(like)

    def unharmed(self) -> bool:
        return all(bool(guard.isnan().all()) for guard in self.around)


def tables(a: Arguments) -> Any:
    """What device_tables.py reads of QueryTables."""
    return SimpleNamespace(
        segments=a["segments"],
        positions=a["positions"],
        forward_blocks=a["blocks"][:, :3],
        backward_blocks=a["blocks"],
        block_lanes=a.get("block_lanes"),
        runs=a.get("runs"),
        run_lanes=a.get("run_lanes"),
        on_device={},
    )


def run(op: str, a: Arguments, products: str = "mma") -> Outputs:
    """Call the op with NaN in its outputs and around every tensor; nothing else may be written."""
    q, nan = a["q"], torch.nan
    written: dict[str, Tensor]
    if op == "attention_forward":
        read = ("q", "k", "v")
        written = {"out": torch.full_like(q, nan), "lse": torch.full(q.shape[:2], nan)}
        function: Callable[..., None] = cuda_attention.attention_forward
    else:
        read = ("q", "k", "v", "out", "lse", "grad_out")
        keys = (a["key_rows"], *a["k"].shape[1:])
        written = {"dq": torch.full_like(a["grad_out"], nan)}
        written |= {"dk": torch.full(keys, nan), "dv": torch.full(keys, nan)}
        function = cuda_attention.attention_backward
    inputs = {name: Guarded(a[name]) for name in read}
    outputs = {name: Guarded(x) for name, x in written.items()}
    both = [x.tensor for x in (*inputs.values(), *outputs.values())]
    options = {"window": a["window"] or None, "softcap": a["softcap"], "products": products}
    function(tables(a), *both, **options)
    for name, guard in (inputs | outputs).items():
        assert guard.unharmed(), f"{op} wrote beside {name}"
    for name, guard in inputs.items():
        assert torch.equal(bits(guard.tensor), bits(a[name].contiguous())), f"{op} wrote to {name}"
    return {name: guard.tensor for name, guard in outputs.items()}


def faults(case: Case, dtype: torch.dtype, products: str = "mma") -> dict[str, str]:
    """What is wrong with each output."""
    a = arguments(case, dtype)
    try:
        got = run(case.op, a, products)
    except RuntimeError as error:
        return {"launch": str(error)}
    expected = truth(case, dtype)
    if case.integers:
        compared = {name: equal_bits(got[name], expected[name]) for name in expected}
        return {name: reason for name, reason in compared.items() if reason}
    wrong = judge(case.op, a, got, expected, yardstick(case, dtype))
    if "lse" in got:  # nothing on its way is rounded to the dtype
        reason = near(got["lse"], expected["lse"], limit=limit_of(case.op, a))
        wrong |= {"lse": reason} if reason else {}
    return wrong


def biased(op: str, dtype: torch.dtype, products: str = "mma") -> dict[str, str]:
    """Outputs whose errors do not average out: of a factor that hides below one rounding."""
    make = attention.forward if op == "attention_forward" else attention.backward
    case = Case(op, "many-rows", lambda draw: make(draw, TRIES["tile-borders"], 4, 2, 64))
    got, expected = run(op, arguments(case, dtype), products), truth(case, dtype)
    found = {name: unbiased(got[name], expected[name]) for name in expected}
    return {name: reason for name, reason in found.items() if reason}


# --- the library ----------------------------------------------------------------------------------


def build(output: Path, *flags: str, sources: Sequence[Path] = SOURCES) -> Path:
    command = [str(COMPILER), *FLAGS, *flags, *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return output


class Emulation:
    """What tests/cpp/emulated.h lets a test set and ask."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.g2r_emulated_site.restype = ctypes.c_char_p

    @contextmanager
    def order(self, order: int) -> Iterator[None]:
        """0: threads by ascending index, 1: descending, 2: at random, 3: by turns."""
        self._library.g2r_emulated_order(order)
        try:
            yield
        finally:
            self._library.g2r_emulated_order(3)

    @contextmanager
    def passing_over(self, index: int) -> Iterator[None]:
        self._library.g2r_emulated_pass_over(index)
        try:
            yield
        finally:
            self._library.g2r_emulated_pass_over(-1)

    def waits(self) -> list[str]:
        """Every barrier and wait that was met so far."""
        found: list[str] = []
        while (site := self._library.g2r_emulated_site(len(found))) is not None:
            found.append(site.decode())
        return found

    def counts(self) -> dict[str, int]:
        """Since the last call."""
        numbers = (ctypes.c_longlong * 6)()
        self._library.g2r_emulated_counts(numbers)
        names = ("blocks", "products", "loads", "conflicts", "copies", "barriers")
        of_warpgroups = (ctypes.c_longlong * 2)()
        self._library.g2r_emulated_warpgroup_counts(of_warpgroups)
        names += ("warpgroup_products", "warpgroup_conflicts")
        return dict(zip(names, (*numbers, *of_warpgroups), strict=True))


@contextmanager
def used(path: Path) -> Iterator[Emulation]:
    """The library in the place of the one for a GPU."""
    before = cuda_ops.use(cuda_ops.Library(path))
    try:
        yield Emulation(path)
    finally:
        cuda_ops.use(before)


def main(path: Path, names: list[str]) -> int:
    torch.set_num_threads(1)
    wrong = {}
    with used(path):
        chosen = [case for case in CASES if not names or str(case) in names]
        for i, (case, products) in enumerate(itertools.product(chosen, cuda_ops.PRODUCTS)):
            dtype = DTYPES[i // 2 % 2]
            found = faults(case, dtype, products)
            wrong |= {f"{case} {dtype} {products}": found} if found else {}
    print(wrong or "passed")
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
