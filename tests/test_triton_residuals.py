"""The Triton kernel of residual sums: dtypes, strides and what it refuses.

Its numbers are held to the definition in tests/test_g2rl_ops.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from g2r_fast.kernels import residual_sums as module
from g2r_fast.kernels.launching import TRITON_DTYPES
from g2r_fast.kernels.residual_sums import CONFIG, residual_sums

from g2r_fast.errors import InputError, InputTypeError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_R, BLOCK_V = CONFIG.blocks["BLOCK_R"], CONFIG.blocks["BLOCK_V"]
LENGTHS, OWNERS, V = (3, BLOCK_R + 2, 0, 1), (2, 0, 3, 1), BLOCK_V + 19


def arguments(dtype: torch.dtype, columns: int = V) -> dict[str, Any]:
    """Logits in memory that is NaN elsewhere, and sums that lie between NaN."""
    generator = torch.Generator().manual_seed(columns)
    rows = sum(LENGTHS)
    memory = torch.full((rows, columns + 5), torch.nan, dtype=dtype)
    memory[:, :columns] = torch.randn(rows, columns, generator=generator).mul(2).to(dtype)
    z = memory[:, :columns].double() / 0.7
    ids = torch.randint(0, columns, (rows,), generator=generator)
    ids[0] = columns - 1
    sums = torch.full((6, columns + 3), torch.nan)
    sums[:5, :columns] = torch.randn(5, columns, generator=generator)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    found = {
        "logits": memory.to(DEVICE)[:, :columns],
        "ids": ids,
        "weights": torch.rand(rows, generator=generator),
        "logsumexp": z.logsumexp(-1).float(),
        "others": (1 - z.softmax(-1).gather(1, ids[:, None])[:, 0]).float(),
        "stretches": torch.stack((starts[:-1], starts[1:], torch.tensor(OWNERS)), 1).contiguous(),
        "sums": sums.to(DEVICE)[:5, :columns],
    }
    return {name: x.to(DEVICE) for name, x in found.items()}


def expected(a: dict[str, Any]) -> torch.Tensor:
    left = -(a["logits"].cpu().double() / 0.7).softmax(-1)
    left.scatter_(1, a["ids"].cpu()[:, None], a["others"].cpu().double()[:, None])
    left *= a["weights"].cpu().double()[:, None]
    sums = a["sums"].cpu().double().clone()
    for owner, part in zip(OWNERS, left.split(LENGTHS), strict=True):
        sums[owner] += part.sum(0)
    return sums


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, BLOCK_V - 1, BLOCK_V, V])
def test_strides_and_dtypes(dtype: torch.dtype, columns: int) -> None:
    a = arguments(dtype, columns)
    wanted, untouched = expected(a), a["sums"][4].clone()
    residual_sums(**a, temperature=0.7)
    got = a["sums"].cpu().double()
    assert (got - wanted).norm() <= 2e-6 * wanted.norm()
    assert torch.equal(a["sums"][4], untouched)
    memory = a["sums"]._base if a["sums"]._base is not None else a["sums"]
    assert memory[5].isnan().all() and memory[:, columns:].isnan().all()


def test_once_more_is_the_same_to_the_bit() -> None:
    once, again = arguments(torch.float32), arguments(torch.float32)
    for a in (once, again):
        residual_sums(**a, temperature=0.7)
    assert torch.equal(once["sums"], again["sums"])


ROWS = sum(LENGTHS)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(ROWS, V).double()}, InputTypeError, "logits has an unusable dtype"),
    ({"logits": torch.zeros(V, ROWS).T}, InputError, "logits must have contiguous columns"),
    ({"logits": torch.zeros(V)}, InputError, "logits must be a matrix"),
    ({"ids": torch.zeros(ROWS)}, InputTypeError, "ids has an unusable dtype"),
    ({"ids": torch.zeros(ROWS - 1).long()}, InputError, "ids must be contiguous"),
    ({"weights": torch.zeros(ROWS).double()}, InputTypeError, "weights has an unusable dtype"),
    ({"logsumexp": torch.zeros(2 * ROWS)[::2]}, InputError, "logsumexp must be contiguous"),
    ({"others": torch.zeros(ROWS + 1)}, InputError, "others must be contiguous"),
    ({"sums": torch.zeros(5, V).half()}, InputTypeError, "sums has an unusable dtype"),
    ({"sums": torch.zeros(5, V - 1)}, InputError, "sums and logits differ in width"),
    ({"stretches": torch.zeros(4, 2).long()}, InputError, "stretches must be contiguous triples"),
    ({"stretches": torch.zeros(3, 4).long().T}, InputError, "stretches must be contiguous triples"),
    ({"stretches": torch.zeros(4, 3)}, InputTypeError, "stretches has an unusable dtype"),
    ({"temperature": 0.0}, InputError, "temperature is not positive"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_cannot_be_used_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    a = arguments(torch.float32) | {"temperature": 0.7}
    before = a["sums"].clone()
    moved = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in changed.items()}
    with pytest.raises(error, match=message):
        residual_sums(**(a | moved))
    assert torch.equal(a["sums"], before)


def test_every_case_is_listed_once() -> None:
    names = [case.name for case in module.compile_cases()]
    assert len(names) == len(set(names)) == 3 * 2
