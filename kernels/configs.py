"""Launch configurations of the attention kernels, and why each is what it is.

`attention_config` takes the first record that covers the GPU and the dtype, head_dim and softcap
of a call. All that are for every GPU fit the 99 KB of shared memory that a block can have anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from g2r_fast.kernels.launching import TRITON_DTYPES

from g2r_fast.errors import InputError

__all__ = ["ATTENTION", "AttentionConfig", "attention_cases", "attention_config", "replaced_on"]

_HALF = (torch.bfloat16, torch.float16)
_FULL = (torch.float32,)
_REGISTERS = 65536  # of a multiprocessor


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
        # Fused on purpose: one rounding fewer per element. Triton's default changes with 3.10.
        found: dict[str, int | bool] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.arch is None:
            # All that so many threads can have. Left to itself the assembler may take fewer, for
            # the sake of more blocks, and spill a few bytes.
            found["maxnreg"] = min(255, _REGISTERS // (32 * self.num_warps))
        return found

    def products(self, dtype: torch.dtype, interpreted: bool) -> str:
        """How operands are multiplied: see attention_paths.product."""
        return "wide" if interpreted else "ieee" if dtype == torch.float32 else "narrow"


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
