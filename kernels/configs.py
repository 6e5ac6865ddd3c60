"""Launch configurations of every kernel in one table, and why each is what it is.

`LAUNCHES` holds the kernels with one configuration; `NORMS` and `ATTENTION` those whose tiles
depend on the dtype and more, where the first record that covers a call is taken; `row_config` and
`heads_config` compute theirs from a width. All that are for every GPU fit the 99 KB of shared
memory that a block can have anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from g2r_fast.kernels.launching import TRITON_DTYPES

from g2r_fast.errors import InputError

__all__ = [
    "ATTENTION",
    "LAUNCHES",
    "NORMS",
    "WIDEST",
    "AttentionConfig",
    "LaunchConfig",
    "NormConfig",
    "attention_cases",
    "attention_config",
    "heads_config",
    "norm_config",
    "operand_precision",
    "replaced_on",
    "row_config",
]

_HALF = (torch.bfloat16, torch.float16)
_FULL = (torch.float32,)
_REGISTERS = 65536  # of a multiprocessor

WIDEST = 16384  # columns of a row operation: a row lies in the registers of one block of threads


def operand_precision(dtype: torch.dtype, interpreted: bool) -> str:
    """How operands are multiplied: see attention_paths.product."""
    return "wide" if interpreted else "ieee" if dtype == torch.float32 else "narrow"


def _options(
    num_warps: int, num_stages: int | None = None, registers: int | None = None
) -> dict[str, int | bool]:
    # Fused on purpose: one rounding fewer per element. Triton's default changes with 3.10.
    found: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if num_stages is not None:
        found["num_stages"] = num_stages
    if registers is not None:
        found["maxnreg"] = registers
    return found


def _all_registers(num_warps: int) -> int:
    """All that so many threads can have. Left to itself the assembler may take fewer, for the sake
    of more blocks, and spill a few bytes."""
    return min(255, _REGISTERS // (32 * num_warps))


# --- one configuration a kernel -------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchConfig:
    """One launch: the sizes that a kernel is compiled for, named as there, and its warps."""

    blocks: Mapping[str, int]
    num_warps: int
    reason: str
    max_registers: int | None = None  # of a thread; None: what the assembler chooses

    def options(self) -> dict[str, int | bool]:
        return _options(self.num_warps, registers=self.max_registers)


LAUNCHES = {
    "advantages": LaunchConfig(
        {"BLOCK_T": 512},  # tokens of a sequence a step; one program a group
        4,
        "By arithmetic, not yet by measurement: 4 float64 a thread keep rewards, sums and the scan "
        "in registers; a group of 8 responses of 1000 tokens is 16 steps for each of three sweeps. "
        "Groups are few, so that registers are no constraint; left to choose, the assembler takes "
        "64 and spills.",
        max_registers=128,
    ),
    "attribution": LaunchConfig(
        # Tokens a program, columns a step of the read-out, tokens a step of softmax and sums.
        {"BLOCK_T": 8, "BLOCK_H": 512, "BLOCK_S": 512},
        4,
        "By arithmetic, not yet by measurement: a step reads 16 KB of gradients with 16 bytes a "
        "thread and load, its sums take 32 registers; a response of 500 tokens and 8 items still "
        "gives 500 programs, several for every multiprocessor. 512 float64 are 8 registers a "
        "thread.",
    ),
    "gated": LaunchConfig(  # and gated_backward
        {"BLOCK": 1024},  # columns of a row a program
        4,
        "By arithmetic, not by measurement: 128 threads times 16 bytes of half precision a tensor.",
    ),
    "lanes": LaunchConfig(
        {"BLOCK": 512},  # partial sums a step; one program a lane
        4,
        "By arithmetic, not yet by measurement: 128 threads times 16 bytes; a lane has tens to "
        "thousands of parts, and reading them is nothing beside making them.",
    ),
    "log_probabilities": LaunchConfig(
        {"BLOCK_V": 2048},  # words a step; one program a row
        8,
        "By arithmetic, not yet by measurement: 8 words a thread and step are 16 to 32 bytes in "
        "flight, their running maximum, sums and guard take 32 registers, and one exponential a "
        "word stays below the rate at which memory delivers words.",
    ),
    "objective_cotangents": LaunchConfig(
        {"BLOCK_V": 2048},  # words of a row a program
        8,
        "By arithmetic, not yet by measurement: 8 words a thread are 16 to 32 bytes in flight, and "
        "one row of 152064 words already gives 75 programs.",
    ),
    "residual_sums": LaunchConfig(
        # Words a program and stretch; rows that are summed before they are added to what was there.
        {"BLOCK_V": 512, "BLOCK_R": 64},
        4,
        "By arithmetic, not yet by measurement: four words a thread are the widest load, and one "
        "stretch over a vocabulary of 150,000 then makes some 300 programs, two a multiprocessor. "
        "64 rows and as many sums of them keep every chain of additions of a long sequence short.",
    ),
    "row_dot": LaunchConfig(
        {"BLOCK_H": 1024},  # columns a step; one program a row
        4,
        "By arithmetic, not yet by measurement: 128 threads times 16 bytes, the widest load, are "
        "1024 half-precision columns a step, and there are far more rows than multiprocessors.",
    ),
    "softmax_rewards": LaunchConfig(
        {"BLOCK_S": 512},  # tokens a step; one program a judgement
        4,
        "By arithmetic, not yet by measurement: most responses take one step or two, and 512 "
        "float64 are 8 registers a thread.",
    ),
    "squared_row_sums": LaunchConfig(
        {"ROWS": 32, "COLUMNS": 64},  # columns a program, rows of them a step
        4,
        "By arithmetic, not yet by measurement: few columns, so that the lanes of a batch and the "
        "columns of a hidden state are programs enough; 64 half-precision ones are a line of "
        "memory, and 32 rows of them two loads of 16 bytes a thread.",
    ),
}


@cache
def row_config(width: int) -> LaunchConfig:
    """Of rms_norm and rms_norm_backward: whole rows a program, columns with their padding."""
    if not 0 < width <= WIDEST:
        raise InputError("rows have an unusable width", expected=f"1 to {WIDEST}", got=width)
    block_h = max(16, 1 << (width - 1).bit_length())
    rows = max(1, 2048 // block_h)
    return LaunchConfig(
        {"ROWS": rows, "BLOCK_H": block_h},
        min(16, max(4, rows * block_h // 512)),
        "By arithmetic, not by measurement: 16 columns a thread, two loads of 16 bytes from half "
        "precision; more than 16 warps would leave fewer than 128 registers a thread.",
    )


@cache
def heads_config(heads: int, half: int, norms: bool) -> LaunchConfig:
    """Of heads, heads_backward and head_norm_products: heads and columns of a half a program."""
    block_half = max(8, 1 << (half - 1).bit_length())
    most = max(1, (512 if norms else 1024) // block_half)
    return LaunchConfig(
        {"BLOCK_HEADS": min(1 << (heads - 1).bit_length(), most), "BLOCK_HALF": block_half},
        4,
        "By arithmetic, not by measurement: 2048 elements a program, 16 a thread; with norms half "
        "of that, as more of them live in registers at a time.",
    )


# --- gradient norms -------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormConfig:
    """One launch: a program makes `tile` x `tile` sums of products, `step` terms at a time."""

    way: str
    dtypes: tuple[torch.dtype, ...]
    tile: int
    step: int
    num_warps: int
    num_stages: int
    reason: str

    def options(self) -> dict[str, int | bool]:
        return _options(self.num_warps, self.num_stages, _all_registers(self.num_warps))


NORMS = (
    NormConfig(
        "gram", _HALF, 128, 32, 8, 4,
        "By arithmetic, not yet by measurement: 64 FLOPs a byte read; two sums of 128 x 128 are "
        "128 registers of a thread. Steps of 64, whose pointers are twice as many, spill where "
        "rows are no whole vectors.",
    ),
    NormConfig(
        "gram", _FULL, 64, 16, 8, 2,
        "By arithmetic, not yet by measurement: exact products keep their operands in registers. "
        "4 warps, or steps of 32, spill.",
    ),
    NormConfig(
        "direct", _HALF, 128, 64, 8, 3,
        "By arithmetic, not yet by measurement: 64 FLOPs a byte read; one sum of 128 x 128 is 64 "
        "registers of a thread, which leaves room for steps of 64.",
    ),
    NormConfig(
        "direct", _FULL, 64, 16, 8, 2,
        "By arithmetic, not yet by measurement: exact products keep their operands in registers. "
        "4 warps, or steps of 32, spill.",
    ),
)  # fmt: skip


def norm_config(way: str, dtype: torch.dtype) -> NormConfig:
    """The shipped configuration of a way for inputs and gradients of a dtype."""
    return next(c for c in NORMS if c.way == way and dtype in c.dtypes)


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionConfig:
    """One launch: `rows` packed queries and `keys` keys a tile."""

    op: str  # forward | queries | keys
    dtypes: tuple[torch.dtype, ...]
    head_dim: int  # the largest that it takes, a power of two
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    reason: str
    softcap: bool = True  # whether it takes one
    arch: int | None = None  # the one compute capability that it is for, 90 for 9.0; None: any

    def options(self) -> dict[str, int | bool]:
        registers = _all_registers(self.num_warps) if self.arch is None else None
        return _options(self.num_warps, self.num_stages, registers)


_MEASURED = "Measured on an H200, bench/results/gpu-attention-sweep.json. "

# fmt: off
ATTENTION = (
    AttentionConfig(
        "forward", _HALF, 64, 64, 64, 4, 3,
        _MEASURED + "The next, 128 rows and 32 keys, takes 13 % longer.",
        softcap=False, arch=90,
    ),
    AttentionConfig(
        "forward", _HALF, 128, 128, 64, 8, 3,
        _MEASURED + "Of 64 rows and 4 warps 7 % slower with 12 heads, 5 % faster with 28.",
        softcap=False, arch=90,
    ),
    AttentionConfig(
        "queries", _HALF, 64, 64, 64, 4, 3,
        _MEASURED + "8 warps on as many rows take more than twice as long.",
        softcap=False, arch=90,
    ),
    AttentionConfig(
        "queries", _HALF, 128, 128, 64, 8, 2,
        _MEASURED + "64 rows and 4 warps, 1 to 5 % faster, spill; 8 warps on 64 rows take twice "
        "as long.",
        softcap=False, arch=90,
    ),
    AttentionConfig(
        "keys", _HALF, 64, 32, 64, 4, 2,
        _MEASURED + "The next, 64 rows and keys, takes 15 % longer.",
        softcap=False, arch=90,
    ),
    AttentionConfig(
        "keys", _HALF, 128, 32, 64, 4, 2,
        _MEASURED + "64 rows, 9 % faster with 12 heads and 1 % slower with 28, spill.",
        softcap=False, arch=90,
    ),
    AttentionConfig(
        "forward", _HALF, 64, 128, 64, 8, 2,
        "By arithmetic, not yet measured: two warpgroups of 64 rows, 64 columns a "
        "product; 64 KB, so that several blocks share a multiprocessor.",
        softcap=False,
    ),
    AttentionConfig(
        "forward", _HALF, 64, 64, 32, 4, 2,
        "By arithmetic, not yet measured: with a softcap 128 rows spill on sm_80, 64 keys "
        "on sm_120.",
    ),
    AttentionConfig(
        "forward", _HALF, 128, 64, 64, 8, 2,
        "By arithmetic, not yet measured: 128 rows spill on sm_80 and sm_120, with 32 keys too.",
    ),
    AttentionConfig(
        "forward", _HALF, 256, 64, 32, 8, 2,
        "By arithmetic, not yet measured: sums of 64 x 256 are 64 registers of a "
        "thread; two stages of keys and values fit 99 KB.",
    ),
    AttentionConfig(
        "forward", _FULL, 64, 32, 16, 8, 1,
        "By arithmetic, not yet measured: the largest without spills: exact products "
        "keep their operands in registers.",
    ),
    AttentionConfig(
        "forward", _FULL, 128, 16, 16, 8, 1,
        "By arithmetic, not yet measured: the largest without spills: exact products "
        "keep their operands in registers.",
    ),
    AttentionConfig(
        "queries", _HALF, 64, 128, 64, 8, 2,
        "By arithmetic, not yet measured: as the forward, with a second score tile in registers.",
    ),
    AttentionConfig(
        "queries", _HALF, 128, 64, 64, 8, 2,
        "By arithmetic, not yet measured: 128 rows spill on sm_80, where queries, "
        "gradients and scores lie in registers.",
    ),
    AttentionConfig(
        "queries", _HALF, 256, 32, 64, 8, 1,
        "By arithmetic, not yet measured: 32 rows, as q and grad_out take 1 KB of "
        "shared memory a row, and one stage of keys and values 64 KB.",
    ),
    AttentionConfig(
        "queries", _FULL, 64, 32, 32, 8, 1,
        "By arithmetic, not yet measured: the largest without spills: exact products "
        "keep their operands in registers.",
    ),
    AttentionConfig(
        "queries", _FULL, 128, 16, 16, 8, 1,
        "By arithmetic, not yet measured: the largest without spills: exact products "
        "keep their operands in registers.",
    ),
    AttentionConfig(
        "keys", _HALF, 64, 32, 128, 8, 2,
        "By arithmetic, not yet measured: two sums of 128 x 64 are 64 registers of a "
        "thread; 64 rows spill on sm_80.",
    ),
    AttentionConfig(
        "keys", _HALF, 128, 64, 64, 8, 2,
        "By arithmetic, not yet measured: two sums of 64 x 128 are 64 registers of a "
        "thread; 128 keys spill on sm_80.",
        softcap=False,
    ),
    AttentionConfig(
        "keys", _HALF, 128, 32, 64, 8, 2,
        "By arithmetic, not yet measured: with a softcap, whose slope is a third score "
        "tile, 64 rows spill on sm_90.",
    ),
    AttentionConfig(
        "keys", _HALF, 256, 32, 32, 8, 1,
        "By arithmetic, not yet measured: two sums of 32 x 256 are 64 registers of a "
        "thread; 80 KB.",
    ),
    AttentionConfig(
        "keys", _FULL, 64, 32, 16, 4, 1,
        "By arithmetic, not yet measured: the largest without spills: exact products "
        "keep their operands in registers.",
    ),
    AttentionConfig(
        "keys", _FULL, 128, 16, 16, 8, 1,
        "By arithmetic, not yet measured: the largest without spills: exact products "
        "keep their operands in registers.",
    ),
)
# fmt: on


@cache
def _arch(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _first(
    op: str, dtype: torch.dtype, head_dim: int, capped: bool, arch: int | None
) -> AttentionConfig | None:
    for config in ATTENTION:
        covered = head_dim <= config.head_dim and (config.softcap or not capped)
        if config.op == op and dtype in config.dtypes and covered and config.arch in (None, arch):
            return config
    return None


def attention_config(op: str, q: torch.Tensor, softcap: float) -> AttentionConfig:
    """The configuration of an op for queries like `q` `[queries, heads, D]` on their GPU."""
    config = _first(op, q.dtype, q.shape[2], bool(softcap), _arch(q.device))
    if config is not None:
        return config
    raise InputError(
        "attention has no kernel for such queries",
        expected="a head_dim of at most 256, in float32 128",
        got=f"{q.dtype} and {q.shape[2]}",
    )


def replaced_on(config: AttentionConfig, dtype: torch.dtype, capped: bool) -> frozenset[int]:
    """The compute capabilities where records of their own take every call that this one would."""
    special = {record.arch for record in ATTENTION if record.arch is not None} - {config.arch}
    sizes = range(1, config.head_dim + 1)
    return frozenset(
        arch
        for arch in special
        if all(config is not _first(config.op, dtype, d, capped, arch) for d in sizes)
    )


def attention_cases(op: str) -> Iterator[tuple[AttentionConfig, torch.dtype, bool, bool, str]]:
    """What of an op can be launched: configuration, dtype, windowed, capped and a name for it."""
    for config in ATTENTION:
        if config.op != op:
            continue
        for dtype in config.dtypes:
            for windowed, capped in product((False, True), (False, True)):
                if config is _first(op, dtype, config.head_dim, capped, config.arch):
                    words = f" {config.rows}x{config.keys}" + " window" * windowed
                    words += "" if config.arch is None else f" on sm_{config.arch}"
                    words += " softcap" * capped
                    name = f"{op} {TRITON_DTYPES[dtype]} d{config.head_dim}{words}"
                    yield config, dtype, windowed, capped, name
