"""Arguments of the ops that take squared norms of gradients, lane by lane, and their error bounds.

A lane is a list of entries, each a row of inputs and a row of gradients. How the rows lie decides
which stretches a kernel takes at once; rows that no entry names hold NaN.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from native_arguments import Arguments, Draw
from torch import Tensor

# How the rows of a lane lie, one after the other or as the engine has them: lanes of one token are
# neighbours.
LAYOUTS = ("in-order", "backwards", "interleaved", "shuffled")
# None, one, around the rows of a tile and the columns of a panel, an odd pair; 71 entries cost less
# as Gram matrices of wide layers, and 200 do not.
RAGGED = (5, 0, 1, 6, 63, 64, 65, 0, 2, 200, 71, 7, 0)


def _places(draw: Draw, lengths: list[int], layout: str) -> tuple[Tensor, int]:
    """Rows of the entries, no two alike, and how many rows there are: three more than named."""
    total = sum(lengths)
    order = torch.arange(total)
    if layout == "backwards":
        order = order.flip(0)
    elif layout == "shuffled":
        order = draw.order(total)
    elif layout == "interleaved":
        tokens = [(t, lane) for lane, length in enumerate(lengths) for t in range(length)]
        ranks = sorted(range(total), key=tokens.__getitem__)
        order = torch.tensor(ranks, dtype=torch.int64).argsort()
    spare = draw.order(total + 3)[:3].sort().values
    free = torch.ones(total + 3, dtype=torch.bool)
    free[spare] = False
    # In a row but for the last three; else among rows that nobody reads.
    return (order if layout != "shuffled" else free.nonzero()[order, 0]).int(), total + 3


def _inputs(draw: Draw, lengths: list[int], layout: str) -> tuple[Tensor, int]:
    """Rows of inputs, which lanes share: the second half of them are those of the first lane."""
    if layout == "shuffled":
        count = max(1, sum(lengths) // 2)
        named = torch.randint(0, count, (sum(lengths),), generator=draw.generator)
        return named.int(), count + 2
    longest = max(lengths, default=0)
    first = [0 if lane % 2 == 0 else longest for lane in range(len(lengths))]
    named = [torch.arange(length) + at for length, at in zip(lengths, first, strict=True)]
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *named]).int()
    return (rows if layout != "backwards" else 2 * longest - 1 - rows), 2 * longest + 1


def _unread_is_nan(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.full_like(x, torch.nan)
    out[rows.long()] = x[rows.long()]
    return out.to(dtype)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def gradient_norms(
    draw: Draw,
    width: int,
    out: int,
    lengths: list[int],
    *,
    layout: str = "shuffled",
    integers: bool = False,
    size: float = 0.02,
) -> Arguments:
    rows, count = _places(draw, lengths, layout)
    kept, kept_count = _inputs(draw, lengths, layout)
    if integers:
        inputs, grads = draw.integers(kept_count, width), draw.integers(count, out)
    else:
        inputs, grads = draw.normal(kept_count, width), draw.normal(count, out, scale=size)
    return {
        "inputs": _unread_is_nan(inputs, kept, draw.dtype),
        "grads": _unread_is_nan(grads, rows, draw.dtype),
        "kept": kept,
        "rows": rows,
        "offsets": _offsets(lengths),
    }


def row_sums(
    draw: Draw,
    width: int,
    lengths: list[int],
    *,
    layout: str = "shuffled",
    integers: bool = False,
    size: float = 0.02,
) -> Arguments:
    rows, count = _places(draw, lengths, layout)
    x = draw.integers(count, width) if integers else draw.normal(count, width, scale=size)
    return {
        "x": _unread_is_nan(x, rows, draw.dtype),
        "rows": rows,
        "offsets": _offsets(lengths),
    }


def _chain(terms: int) -> int:
    """Roundings of a sum: slices of at most 512 terms, and then their sums."""
    return min(terms, 512) + -(-terms // 512)


def squared_terms(op: str, a: Arguments) -> tuple[Tensor, Tensor]:
    """For every lane what is added up, in absolute values, and the longest chain of roundings.

    Either way of computing `|A^T B|^2` adds up the terms of `| |A|^T |B| |^2`: sums of A's and of
    B's products, multiplied, or the square of a sum over the entries. The sums are float, what
    follows is double.
    """
    found, chains = [], []
    for start, stop in pairwise(a["offsets"].tolist()):
        rows = a["rows"][start:stop]
        if op == "squared_row_sums":
            sums = a["x"][rows].double().abs().sum(0)
            found.append(sums.square().sum())
            chains.append(2 * (-(-(stop - start) // 4) + 2))  # in four sums
            continue
        inputs = a["inputs"][a["kept"][start:stop]].double().abs()
        grads = a["grads"][rows].double().abs()
        found.append((inputs.T @ grads).square().sum())
        gram = _chain(inputs.shape[1]) + _chain(grads.shape[1])
        chains.append(max(gram, 2 * _chain(stop - start)) + 2)
    empty = torch.zeros(0, dtype=torch.float64)
    return torch.stack(found) if found else empty, torch.tensor(chains, dtype=torch.float64)
