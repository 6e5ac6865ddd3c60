"""What kernels share that sum over the entries of each lane: its table, and the sum of its parts.

    out[lane] = partials[first : first + parts].double().sum().clamp(min=0)

Every program of such a kernel writes one number; these are added here in one order, so that two
runs are equal to the bit. The clamp is for sums of squares that were found as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.launching import CompileCase, check_device, check_vector

from g2r_fast.errors import InputError, InputTypeError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; the launchers then say so
    triton = None

__all__ = [
    "CONFIG",
    "Lanes",
    "add_partials",
    "check_entries",
    "check_offsets",
    "compile_cases",
    "lane_table",
]


CONFIG = LAUNCHES["lanes"]


@dataclass(frozen=True)
class Lanes:
    """The lanes that one launch serves: rows of the table that follow each other."""

    rows: int
    most: int  # parts of the largest

    @property
    def programs(self) -> int:
        """Of a launch in which every lane has as many as the largest."""
        return self.rows * self.most


if triton is not None:

    @triton.jit
    def _lane_sums_kernel(  # type: ignore[no-untyped-def]
        partials_ptr,
        table_ptr,
        out_ptr,
        BLOCK: tl.constexpr,
    ):
        row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 5
        lane = tl.load(row_ptr)
        first = tl.load(row_ptr + 3)
        parts = tl.load(row_ptr + 4).to(tl.int32)
        total = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, parts, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = tl.load(partials_ptr + first + at, mask=at < parts, other=0.0)
            total += part.to(tl.float64)
        value = tl.sum(total, axis=0)
        # Not a maximum, which would make 0 of NaN.
        tl.store(out_ptr + lane, tl.where(value < 0.0, 0.0, value))


def check_offsets(offsets: Sequence[int] | torch.Tensor, entries: int) -> torch.Tensor:
    """Where each lane's entries begin, and the end of the last, int64 on the host."""
    if isinstance(offsets, torch.Tensor) and offsets.device.type != "cpu":
        raise InputError(
            "offsets lie on a device, which would have to be waited for",
            expected="a list, or a tensor on the CPU",
            got=offsets.device,
        )
    found = torch.as_tensor(offsets)
    if len(offsets) and (found.is_floating_point() or found.dtype == torch.bool):
        raise InputTypeError("offsets have an unusable dtype", expected="integers", got=found.dtype)
    found = found.to(torch.int64)
    if found.dim() != 1 or not len(found):
        raise InputError(
            "offsets must be one more than there are lanes",
            expected="one dimension, at least one number",
            got=f"shape {tuple(found.shape)}",
        )
    falls = torch.nonzero(found.diff() < 0).flatten().tolist()
    if falls:
        at = falls[0]
        raise InputError(
            "offsets do not ascend",
            expected=f"at least {int(found[at])}",
            got=int(found[at + 1]),
            index=at + 1,
        )
    if int(found[0]) < 0 or int(found[-1]) > entries:
        low = int(found[0]) < 0
        raise InputError(
            "offsets name entries that are not there",
            expected=f"within [0, {entries}]",
            got=int(found[0] if low else found[-1]),
            index=0 if low else len(found) - 1,
        )
    return found


def check_entries(name: str, rows: torch.Tensor, like: torch.Tensor) -> None:
    """A contiguous vector of int32 row numbers on the device of ``like``, values unseen."""
    check_device(name, rows, like)
    check_vector(name, rows, (torch.int32,), rows)


def lane_table(
    offsets: torch.Tensor, groups: Sequence[torch.Tensor], parts: torch.Tensor
) -> tuple[torch.Tensor, list[Lanes], int]:
    """`[lanes, 5]` int64 on the host: lane, first entry, entries, first part, parts.

    Lanes come group by group, each of which one launch serves. Also returns what each launch serves
    and how many parts there are.
    """
    order = torch.cat(list(groups))
    number = parts[order]
    starts, counts = offsets[:-1][order], offsets.diff()[order]
    table = torch.stack([order, starts, counts, number.cumsum(0) - number, number], 1)
    lanes = [Lanes(len(g), int(parts[g].max()) if len(g) else 0) for g in groups]
    return table, lanes, int(number.sum())


def add_partials(partials: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`[lanes]` float64: for each row of the table the sum of its parts, at its lane."""
    out = torch.empty(len(table), dtype=torch.float64, device=table.device)
    if len(table):
        _lane_sums_kernel[(len(table),)](partials, table, out, **CONFIG.blocks, **CONFIG.options())
    return out


def compile_cases() -> list[CompileCase]:
    """The one kernel there is."""
    return [
        CompileCase(
            name="lane_sums",
            kernel=_lane_sums_kernel,
            signature={"partials_ptr": "*fp32", "table_ptr": "*i64", "out_ptr": "*fp64"},
            constants=CONFIG.blocks,
            options=CONFIG.options(),
            aligned=True,
        )
    ]
