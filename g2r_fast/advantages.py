"""Token rewards of a group of responses to token advantages (arXiv 2602.01791, Eq. 9, and others).

Everything runs on one flat concatenation of all tokens: segment sums for the statistics, no loop
over groups, sequences or tokens; on a GPU one kernel launch, `kernels/advantages.py`. Statistics
are float64; results are float32 on the rewards' device. Std is the population std and there is no
epsilon: a spread <= 1e-6 * max|x| is zero spread and gives advantage 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from . import triton_scoring
from .checks import check_group_size
from .errors import InputError, InputTypeError

__all__ = [
    "ESTIMATORS",
    "AdvantageConfig",
    "token_advantages",
    "token_advantages_with_counts",
]

ESTIMATORS = ("returns_pooled", "rewards_pooled", "normalise_then_cumsum", "scaled_sequence")

ZERO_SPREAD = 1e-6

# Elements of the padded float64 scratch of the cumulative sum (128 MB): a batch of many short
# responses and one very long one is cut into pieces instead of being padded as a whole.
SCRATCH_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class AdvantageConfig:
    """How token rewards become token advantages.

    estimator: `"returns_pooled"` (arXiv 2602.01791, Eq. 9), `"rewards_pooled"`,
        `"normalise_then_cumsum"` or `"scaled_sequence"`; see `token_advantages` for the formulas.
    divide_by_std: False subtracts the mean only. Dividing dense rewards by their std is known to
        collapse some trainings.

    Raises InputError for an unknown estimator, InputTypeError where divide_by_std is no bool.
    """

    estimator: str = "returns_pooled"
    divide_by_std: bool = True

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise InputError(
                "unknown advantage estimator",
                expected="one of " + ", ".join(ESTIMATORS),
                got=repr(self.estimator),
            )
        if not isinstance(self.divide_by_std, bool):
            raise InputTypeError(
                "divide_by_std is not a bool",
                expected="True or False",
                got=repr(self.divide_by_std),
            )


def token_advantages(
    token_rewards: Sequence[Tensor],
    group_size: int,
    config: AdvantageConfig = AdvantageConfig(),
    scores: Tensor | Sequence[float] | None = None,
    *,
    mean_attributions: Sequence[Tensor] | None = None,
    mask: Sequence[Tensor] | None = None,
) -> list[Tensor] | None:
    """`R = r.flip(-1).cumsum(-1).flip(-1); A = (R - R[group].mean()) / R[group].std(correction=0)`

    token_rewards: N float tensors [T_i] on one device; T_i may be 0. Consecutive `group_size` rows
        answer one prompt and form a group. Returns N float32 tensors [T_i] (views of one tensor on
        the rewards' device), or None when group_size == 1, where no advantage exists.

    With pool = all tokens of all responses of the group, and mean and std taken over it:

    - `returns_pooled` (default, arXiv 2602.01791, Eq. 9): `R_t = sum_{s>=t} r_s`, z-score of R
      over the pool.
    - `rewards_pooled`: z-score of r over the pool, no cumulative sum.
    - `normalise_then_cumsum` (process-supervised GRPO, arXiv 2402.03300): z-score of r over the
      pool, then `A_t = sum_{s>=t} z_s`.
    - `scaled_sequence`: `A_i * T_i * abar_{i,t}`, A_i the z-score of `scores` over the G responses.
      Needs `scores` [N] and `mean_attributions`, N tensors [T_i]:
      `abar_{i,t} = sum_k 1[z_k] |w_k| alpha_{k,t} / sum_k 1[z_k] |w_k|`, or 1 / T_i where no item
      was judged True. Without `mean_attributions`, `abar = r_i / sum_t r_{i,t}` (1 / T_i where all
      rewards are 0). That is the same number where the items judged True have weights of one sign;
      where a positive item outweighs a negative one at every token it is the share of the *net*
      reward instead; where a response has rewards of both signs it is no distribution at all, and
      this raises.

    `divide_by_std=False` leaves out the division, never the mean.

    **Eq. 9 has a position bias.** R falls from the sequence reward at the first token to the last
    token's reward, whatever the attributions say. With equal positive rewards, equal lengths T and
    uniform attributions, A runs linearly from `+sqrt(3 (T-1)/(T+1))` at the first token to minus
    that at the last, although nothing distinguishes the tokens (signs flip for negative rewards).
    `rewards_pooled` and `scaled_sequence` have no such ramp.

    mask: N bool tensors [T_i]; tokens that are False take no part in sums, statistics or T_i, and
        get advantage 0 (tool output in a multi-turn rollout).

    A group without spread (or without tokens) gets advantage 0. Statistics are float64.

    Raises InputError: N not a multiple of group_size, non-finite values, lengths that differ
    between arguments, a missing or undefined argument of `scaled_sequence`. InputTypeError: rows
    that are no one-dimensional tensors of the right kind.
    """
    return token_advantages_with_counts(
        token_rewards,
        group_size,
        config,
        scores,
        mean_attributions=mean_attributions,
        mask=mask,
    )[0]


def token_advantages_with_counts(
    token_rewards: Sequence[Tensor],
    group_size: int,
    config: AdvantageConfig = AdvantageConfig(),
    scores: Tensor | Sequence[float] | None = None,
    *,
    mean_attributions: Sequence[Tensor] | None = None,
    mask: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor] | None, dict[str, int]]:
    """`token_advantages` and how many groups carried no signal.

    The counts: `zero_spread_groups` (advantage 0) and `groups_of_one` (N where group_size == 1,
    else 0: no advantage exists there).
    """
    n_groups = _check_groups(token_rewards, group_size)
    flat, lengths = _flatten("token_rewards", token_rewards)  # [M] float64, N ints
    device, n_sequences = flat.device, len(lengths)
    checked_scores = None if scores is None else _check_scores(scores, n_sequences, device)
    keep = None if mask is None else _flatten_mask(mask, lengths, device)
    if group_size == 1:
        return None, {"zero_spread_groups": 0, "groups_of_one": n_sequences}
    if triton_scoring.serves(device):
        return _on_device(
            flat, lengths, group_size, config, checked_scores, mean_attributions, keep
        )

    all_lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
    sequence = torch.arange(n_sequences, device=device).repeat_interleave(
        all_lengths, output_size=flat.numel()
    )  # [M], the sequence of each token
    rewards = flat
    if keep is not None:  # Work on the kept tokens as if there were no others.
        rewards, sequence = flat[keep], sequence[keep]
    group = torch.div(sequence, group_size, rounding_mode="floor")

    divide = config.divide_by_std
    if config.estimator == "scaled_sequence":
        if checked_scores is None:
            raise _scores_are_missing(n_sequences)
        score_group = torch.arange(n_sequences, device=device) // group_size
        sequence_advantages, zero_spread = _normalise(checked_scores, score_group, n_groups, divide)
        sizes = _segment_sum(torch.ones_like(rewards), sequence, n_sequences)
        if mean_attributions is None:
            shares = _reward_shares(rewards, sequence, sizes)
        else:
            shares, _ = _flatten("mean_attributions", mean_attributions, like=lengths)
            shares = shares.to(device)
            shares = shares if keep is None else shares[keep]
        values = sequence_advantages[sequence] * sizes[sequence] * shares
    else:
        returns = config.estimator == "returns_pooled"
        values = _reverse_cumsum(rewards, sequence, n_sequences) if returns else rewards
        values, zero_spread = _normalise(values, group, n_groups, divide)
        if config.estimator == "normalise_then_cumsum":
            values = _reverse_cumsum(values, sequence, n_sequences)

    advantages = values.float()
    if keep is not None:
        advantages = flat.new_zeros(flat.shape, dtype=torch.float32)
        advantages[keep] = values.float()
    counts = {"zero_spread_groups": int(zero_spread.sum()), "groups_of_one": 0}
    return list(advantages.split(lengths)), counts


def _on_device(
    flat: Tensor,
    lengths: list[int],
    group_size: int,
    config: AdvantageConfig,
    scores: Tensor | None,
    mean_attributions: Sequence[Tensor] | None,
    keep: Tensor | None,
) -> tuple[list[Tensor], dict[str, int]]:
    """The same in one launch; the device is waited for once more, for the counts."""
    shares = None
    if config.estimator == "scaled_sequence":
        if scores is None:
            raise _scores_are_missing(len(lengths))
        if mean_attributions is not None:
            shares = _flatten("mean_attributions", mean_attributions, like=lengths)[0]
            shares = shares.to(flat.device)
    advantages, zero_spread, mixed = triton_scoring.token_advantages(
        flat, lengths, group_size, config.estimator, config.divide_by_std, scores, shares, keep
    )
    flags = torch.cat([zero_spread, mixed]).tolist()
    groups = len(zero_spread)
    if shares is None and any(flags[groups:]):
        raise _signs_are_mixed(flags[groups:].index(1))
    counts = {"zero_spread_groups": sum(flags[:groups]), "groups_of_one": 0}
    return list(advantages.split(lengths)), counts


def _scores_are_missing(n_sequences: int) -> InputError:
    return InputError(
        'estimator "scaled_sequence" needs the sequence scores',
        expected=f"scores of shape [{n_sequences}]",
        got="None",
    )


def _signs_are_mixed(index: int) -> InputError:
    return InputError(
        "mean attributions cannot be derived from token rewards of both signs",
        expected="rewards of one sign within a response",
        index=index,
        fix="Pass mean_attributions, N tensors [T_i].",
    )


def _segment_sum(values: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    return values.new_zeros(n_segments).index_add_(0, segment, values)


def _normalise(
    values: Tensor, group: Tensor, n_groups: int, divide_by_std: bool
) -> tuple[Tensor, Tensor]:
    """Z-score within groups (or the mean subtracted only), 0 where a group has no spread."""
    sizes = _segment_sum(torch.ones_like(values), group, n_groups).clamp_(min=1)  # [groups]
    mean = _segment_sum(values, group, n_groups) / sizes
    centred = values - mean[group]
    std = (_segment_sum(centred.square(), group, n_groups) / sizes).sqrt()
    peak = values.new_zeros(n_groups).scatter_reduce_(0, group, values.abs(), "amax")
    zero_spread = std <= ZERO_SPREAD * peak
    scale = std.reciprocal() if divide_by_std else torch.ones_like(std)
    scale = scale.masked_fill(zero_spread, 0.0)
    return centred * scale[group], zero_spread


def _reverse_cumsum(values: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """`sum_{s >= t} values_s` within each sequence.

    Padded rather than one flat cumulative sum minus its value at the sequence's start: a large
    neighbour must not cost a small sequence its digits.
    """
    result = torch.empty_like(values)
    sizes = torch.bincount(sequence, minlength=n_sequences)
    starts = sizes.cumsum(0) - sizes  # [N], offset of each sequence in the flat tensor
    longest = int(sizes.max()) if n_sequences else 0
    if longest == 0:
        return result
    rows = max(1, SCRATCH_ELEMENTS // longest)
    # Sequences are contiguous and in order, so `rows` of them are one slice of the flat tensor.
    edges = [*starts[::rows].tolist(), values.numel()]
    for chunk, (start, stop) in enumerate(pairwise(edges)):
        first = chunk * rows
        n_rows = min(rows, n_sequences - first)
        row = sequence[start:stop]
        # The last token of each sequence goes to column 0: its cumulative sum runs backwards.
        column = starts[row] + sizes[row] - 1 - torch.arange(start, stop, device=values.device)
        index = (row - first) * longest + column
        padded = values.new_zeros(n_rows * longest)
        padded[index] = values[start:stop]
        result[start:stop] = padded.view(n_rows, longest).cumsum(1).view(-1)[index]
    return result


def _reward_shares(rewards: Tensor, sequence: Tensor, sizes: Tensor) -> Tensor:
    """`r / sum(r)` per sequence; uniform where all rewards are 0; raises where signs are mixed."""
    n_sequences = sizes.numel()
    positive = _segment_sum(rewards.clamp(min=0), sequence, n_sequences)
    negative = _segment_sum(rewards.clamp(max=0).neg_(), sequence, n_sequences)
    mixed = (positive > 0) & (negative > 0)
    if bool(mixed.any()):
        raise _signs_are_mixed(int(mixed.nonzero()[0]))
    total = positive + negative
    uniform = sizes.clamp(min=1).reciprocal()
    shares = rewards.abs() / total.masked_fill(total == 0, 1.0)[sequence]
    return torch.where((total == 0)[sequence], uniform[sequence], shares)


def _check_groups(token_rewards: Sequence[Tensor], group_size: int) -> int:
    if not isinstance(token_rewards, (list, tuple)):
        raise InputTypeError(
            "token_rewards is not a list",
            expected="a list of N tensors [T_i]",
            got=type(token_rewards).__name__,
            fix="Padded rewards: [row[keep] for row, keep in zip(rewards, mask)].",
        )
    check_group_size(len(token_rewards), group_size)
    return len(token_rewards) // group_size


def _flatten(
    name: str, rows: Sequence[Tensor], like: Sequence[int] | None = None
) -> tuple[Tensor, list[int]]:
    """One float64 tensor of all rows [M], and their lengths; checked."""
    rows = list(rows)
    if like is not None:
        _check_count(name, len(rows), len(like))
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor) or not row.is_floating_point():
            kind = row.dtype if isinstance(row, Tensor) else type(row).__name__
            raise InputTypeError(
                f"{name} holds something other than floating-point tensors",
                expected="tensors [T_i]",
                got=kind,
                index=index,
            )
        _check_shape(name, row, None if like is None else like[index], index)
        if row.device != rows[0].device:
            raise InputError(
                f"{name} lies on several devices",
                expected=str(rows[0].device),
                got=row.device,
                index=index,
            )
    lengths = [row.numel() for row in rows]
    if not rows:
        return torch.zeros(0, dtype=torch.float64), lengths
    flat = torch.cat([row.detach() for row in rows]).double()
    finite = torch.isfinite(flat)
    if not bool(finite.all()):
        position = int((~finite).nonzero()[0])
        ends = list(accumulate(lengths))
        row_index = bisect_right(ends, position)
        token = position - (ends[row_index] - lengths[row_index])
        raise InputError(
            f"{name} holds a value that is not finite",
            expected="finite numbers",
            got=float(flat[position]),
            index=f"row {row_index}, token {token}",
        )
    return flat, lengths


def _flatten_mask(
    mask: Sequence[Tensor], lengths: Sequence[int], device: torch.device
) -> Tensor | None:
    rows = list(mask)
    _check_count("mask", len(rows), len(lengths))
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dtype != torch.bool:
            kind = row.dtype if isinstance(row, Tensor) else type(row).__name__
            raise InputTypeError(
                "mask holds something other than bool tensors",
                expected="tensors [T_i] of torch.bool",
                got=kind,
                index=index,
            )
        _check_shape("mask", row, lengths[index], index)
    return torch.cat(rows).to(device) if rows else None


def _check_count(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise InputError(
            f"{name} has another number of rows than token_rewards",
            expected=f"{expected} rows",
            got=f"{got} rows",
        )


def _check_shape(name: str, row: Tensor, length: int | None, index: int) -> None:
    if row.dim() != 1 or (length is not None and row.numel() != length):
        raise InputError(
            f"{name} has a row of the wrong shape",
            expected="[T_i]" if length is None else f"[{length}], as in token_rewards",
            got=list(row.shape),
            index=index,
        )


def _check_scores(
    scores: Tensor | Sequence[float], n_sequences: int, device: torch.device
) -> Tensor:
    values = torch.as_tensor(scores).detach().to(device, torch.float64)
    if values.shape != (n_sequences,):
        raise InputError(
            "scores has the wrong shape; it is never broadcast",
            expected=f"[{n_sequences}]",
            got=list(values.shape),
        )
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise InputError(
            "scores holds a value that is not finite",
            expected="finite numbers",
            got=float(values[index]),
            index=index,
        )
    return values
