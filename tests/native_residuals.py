"""Arguments and cases of `residual_sums`: like real logits, or with shares of 0 and 1 / n.

In the second, every row has words at 0, a power of two of them, and words a thousand below: sums
are then of few binary digits, and their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from native_arguments import Arguments, Draw

Make = Callable[[Draw], Arguments]

# Stretches of one row, none at all, around and past what is summed at once, and a sequence that
# goes on (owner 1) behind another.
STRETCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "one": ((0, 1),),
    "none": (),
    "ragged": ((2, 3), (0, 1), (1, 7), (3, 5)),
    "long": ((1, 300), (0, 129)),
    "again": ((1, 4), (0, 2), (1, 3)),
}
# One word, a vector or less, one more or less, and past what one task takes.
WIDTHS = (1, 3, 16, 17, 63, 97, 1024, 2065, 5003)
OWNERS = 5  # the last of which gets nothing


def _owners(stretches: Sequence[tuple[int, int]]) -> torch.Tensor:
    owners = [owner for owner, count in stretches for _ in range(count)]
    return torch.tensor(owners, dtype=torch.int64)


def residual_sums(
    draw: Draw,
    stretches: Sequence[tuple[int, int]],
    columns: int,
    *,
    temperature: float = 0.7,
    owners: int = OWNERS,
    sure: float | None = None,
) -> Arguments:
    """`sure`: of all rows, how far their own word is above the others; by default of some."""
    of_row = _owners(stretches)
    rows = len(of_row)
    logits = draw.normal(rows, columns) * draw.one_of([0.1, 1.0, 3.0, 8.0], rows, 1)
    targets = torch.randint(0, columns, (rows,), generator=draw.generator)
    # Every third row is sure of its word, to every degree; some are of another one.
    for row in range(0, rows, 3):
        at = targets[row] if row % 2 == 0 else row % columns
        logits[row, at] += (5.0, 10.0, 20.0, 40.0)[row % 4]
    if sure is not None:
        logits = 0.1 * draw.normal(rows, columns)
        logits[torch.arange(rows), targets] += sure
    logits += draw.normal(rows, 1, scale=20.0)
    return {
        "logits": logits,
        "targets": targets,
        "weights": draw.normal(rows).abs(),
        "owners": of_row,
        "temperature": temperature,
        "sums": draw.normal(owners, columns, scale=0.02),
    }


def residual_sums_integers(
    draw: Draw, stretches: Sequence[tuple[int, int]], columns: int, *, most: int = 2**30
) -> Arguments:
    """`most`: how many words of a row are at 0, at most."""
    a = residual_sums(draw, stretches, columns, temperature=1.0)
    rows = len(a["logits"])
    logits = torch.full((rows, columns), -1000.0)
    for row in range(rows):
        powers = min(columns, most).bit_length()
        count = 2 ** int(draw.order(powers)[0])
        logits[row, draw.order(columns)[:count]] = 0.0
    weights = draw.one_of([1.0, 2.0, 4.0], rows)
    return a | {"logits": logits, "weights": weights, "sums": draw.integers(OWNERS, columns)}


def cases() -> list[tuple[str, Make, bool]]:
    """(name, arguments, whether they are integers)."""
    found: list[tuple[str, Make, bool]] = []
    for integers in (False, True):
        make = residual_sums_integers if integers else residual_sums
        for name, stretches in STRETCHES.items():
            found.append((name, partial(_call, make, stretches, 97), integers))
        for columns in WIDTHS:
            found.append(
                (f"ragged-{columns}", partial(_call, make, STRETCHES["ragged"], columns), integers)
            )
    for sure in (9.0, 14.0, 50.0):
        make_sure = partial(residual_sums, sure=sure)
        found.append((f"sure-{sure:g}", partial(_call, make_sure, STRETCHES["ragged"], 97), False))
    for word, temperature in (("hot", 30.0), ("plain", 1.0), ("cold", 0.1)):
        make_at = partial(residual_sums, temperature=temperature)
        found.append((word, partial(_call, make_at, STRETCHES["ragged"], 211), False))
    return found


def _call(
    make: Callable[..., Arguments], stretches: Sequence[tuple[int, int]], columns: int, draw: Draw
) -> Arguments:
    return make(draw, stretches, columns)
