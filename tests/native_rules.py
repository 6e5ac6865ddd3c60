"""When an output counts as right. No rule has an absolute tolerance.

A rule is given what an op wrote, the truth in float64 and, for low precision, what plain PyTorch
makes of the same arguments; it returns None, or what is wrong.
"""

from __future__ import annotations

import torch
from native_oracles import Arguments, Outputs, tempered
from torch import Tensor

UNIT = 2.0**-24  # float32, round to nearest

# Relative error, in norm, of one float32 op: some thirty roundings of 2^-24 on the way of every
# term, which is more than sums of a few hundred terms lose in norm.
FLOAT32 = 2e-6
FLOAT64 = FLOAT32 * 2.0**-29  # the same roundings of 2^-53
# Against plain PyTorch in the same low precision.
TIMES_PLAIN = 2.0
STANDARD_ERRORS = 5.0
# What lies below float32's normal numbers may be zero.
TINY = 2.0**-126


def _compared(got: Tensor, truth: Tensor) -> tuple[Tensor, Tensor] | str:
    """Both in float64 where something is expected, if NaN is exactly where nothing is."""
    if got.shape != truth.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    untouched = truth.isnan()
    if not torch.equal(got.isnan(), untouched):
        return "NaN where a number belongs, or a number where nothing is to be written"
    if untouched.any():
        got, truth = got[~untouched], truth[~untouched]
    got, truth = got.flatten().double(), truth.flatten().double()
    if not got.isfinite().all():
        return "not finite"
    if truth.any() and not got.any():
        return "nothing but zeros"
    return got, truth


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||; where the truth is zero, zero or infinite."""
    error, norm = float((got - truth).norm()), float(truth.norm())
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def equal_bits(got: Tensor, truth: Tensor) -> str | None:
    """Every element is the truth rounded once."""
    pair = _compared(got, truth)
    if isinstance(pair, str):
        return pair
    expected = pair[1].to(got.dtype).double()
    a, b = (torch.where(x.abs() < TINY, 0.0, x) for x in (pair[0], expected))
    wrong = (a != b).nonzero()
    if len(wrong):
        at = int(wrong[0])
        return f"{len(wrong)} of {len(a)} differ, first {float(a[at])} instead of {float(b[at])}"
    return None


def within_bound(got: Tensor, truth: Tensor, terms: Tensor, chain: int | Tensor) -> str | None:
    """`|err| <= chain * u * sum(|terms|)`, element by element."""
    pair = _compared(got, truth)
    if isinstance(pair, str):
        return pair
    excess = (got.double() - truth).abs() - chain * UNIT * terms
    return None if (excess <= 0).all() else f"{float(excess.max())} outside the bound"


def near(
    got: Tensor, truth: Tensor, plain: Tensor | None = None, limit: float = FLOAT32
) -> str | None:
    """`limit` relative to the norm, or twice the error of `plain` in the same dtype."""
    pair = _compared(got, truth)
    if isinstance(pair, str):
        return pair
    error = relative_error(*pair)
    if plain is not None:
        written = ~truth.isnan()
        yardstick = plain[written].to(got.dtype).double()
        limit = max(limit, TIMES_PLAIN * relative_error(yardstick, pair[1]))
    return None if error <= limit else f"relative error {error:.2e} > {limit:.2e}"


def unbiased(got: Tensor, truth: Tensor) -> str | None:
    """Errors add up to nothing, as such and along the truth, within their standard errors.

    The second finds a factor that is off by less than one rounding. Elements of one row share
    roundings, rows do not: the standard error is that of the rows' sums.
    """
    if got.shape != truth.shape or truth.isnan().any() or len(truth) < 64:
        raise ValueError("this rule wants many complete rows")
    errors, truth = (x.reshape(len(x), -1) for x in (got.double() - truth, truth))
    for what, sums in (("mean", errors.sum(1)), ("slope", (errors * truth).sum(1))):
        spread = float(sums.square().sum().sqrt())
        if abs(float(sums.sum())) > STANDARD_ERRORS * spread:
            return f"the {what} of the error is not zero"
    return None


def limit_of(op: str, a: Arguments) -> float:
    """FLOAT32 or FLOAT64, but for exp(), which multiplies the rounding of a score by the score.

    The backward of attention takes the difference of two numbers that carry that error.
    """
    if op == "attribution_rewards":
        exponents = [abs(x) for segment in tempered(a) for x in segment]
        return FLOAT64 * max([8.0, *exponents]) / 8
    if op == "residual_sums":
        # Where a row is sure of a word, what counts is the share of the next.
        z = a["logits"].double() / a["temperature"]
        next_to = -z.topk(2).values.diff() if z.shape[1] > 1 and len(z) else z[:0]
        return FLOAT32 * max([8.0, *next_to.flatten().tolist()]) / 8
    if not op.startswith("attention"):
        return FLOAT32
    differences = 2 if op.endswith("backward") else 1
    group = a["q"].shape[1] // a["k"].shape[1]
    keys = a["k"].double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", a["q"].double(), keys).abs()
    largest = float(scores.max()) if scores.numel() else 0.0
    return FLOAT32 * differences * max(1.0, largest / 8)


def largest_terms(op: str, a: Arguments, name: str) -> float | None:
    """A bound on the norm of what cancels where a query sees one key, or equal values.

    There `dq` and `dk` are sums of terms up to |grad_out| |v| |k| (or |q|) whose truth is zero.
    """
    if op != "attention_backward" or name == "dv":
        return None
    other = a["k" if name == "dq" else "q"]
    parts = (a["v"].double().flatten(1).norm(dim=1), other.double().flatten(1).norm(dim=1))
    size = float(a["grad_out"].double().norm())
    for part in parts:
        size *= float(part.max()) if len(part) else 0.0
    return size


def judge(
    op: str, a: Arguments, got: Outputs, truth: Outputs, plain: Outputs | None = None
) -> dict[str, str]:
    """What is wrong with each output, by `near`; empty when all is well."""
    assert got.keys() == truth.keys(), f"{op} wrote {list(got)}, not {list(truth)}"
    limit = limit_of(op, a)
    found = {}
    for name, expected in truth.items():
        yardstick = None if plain is None else plain[name]
        size = largest_terms(op, a, name)
        if size is not None and float(expected[~expected.isnan()].norm()) <= 1e-12 * size:
            ratio = float(got[name].double().norm()) / max(size, TINY)
            allowed = FLOAT32 if plain is None else 2.0**-8
            wrong = None if ratio <= allowed else f"{ratio:.2e} of what should have cancelled"
        else:
            wrong = near(got[name], expected, yardstick, limit)
        if wrong:
            found[name] = wrong
    return found
