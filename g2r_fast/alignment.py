"""Which tokens of a policy the tokens of a judge with another vocabulary stand for.

The policy's sampled ids become text, each with the characters it stands for (`decoding.py`); the
judge's encoder makes ids of its own of that text, with characters again; an `Alignment` carries
values of the judge's tokens back to the policy's, by shared characters, and loses nothing of their
sum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from .checks import Span
from .errors import InputError

__all__ = ["Alignment", "CharacterSpan"]

CharacterSpan = tuple[float, float]


@dataclass(frozen=True)
class Alignment:
    """Which policy tokens each judge token stands for, and in what shares.

    A sparse [J, T] matrix as entries, ascending by judge token and then by policy token; the shares
    of a judge token add up to 1. What a judge token stands for ascends with it, ends and all.
    """

    judge: list[int]
    policy: list[int]
    share: list[float]  # of judge[i] to policy[i]
    judge_count: int  # J
    policy_count: int  # T

    @classmethod
    def from_index(cls, token_index: Sequence[int], policy_count: int) -> Alignment:
        """Judge token j stands for policy token `token_index[j]`; several may stand for one.

        Raises InputError where `token_index` [J] descends or leaves [0, policy_count).
        """
        index = list(token_index)
        floor = 0
        for j, token in enumerate(index):
            if not floor <= token < policy_count:
                raise InputError(
                    "a judge token stands for no policy token, or for one before the last",
                    expected=f"{floor} <= token < {policy_count}",
                    got=token,
                    index=j,
                )
            floor = token
        return cls(list(range(len(index))), index, [1.0] * len(index), len(index), policy_count)

    @classmethod
    def from_spans(
        cls, judge_spans: Sequence[CharacterSpan], policy_spans: Sequence[CharacterSpan]
    ) -> Alignment:
        """By overlap: `share[j, t] = |judge_spans[j] & policy_spans[t]| / |... & any of them|`.

        Spans are `[start, stop)` in characters of one text, fractions of a character allowed, and
        ascend; one that steps back is read from where the one in front of it begins. A character
        that lies in n spans of one side is cut into n equal parts, the first to the first of them:
        so reads a character whose bytes lie in n tokens. A judge token that is empty or overlaps
        nothing (white space that one of the tokenizers drops) goes to the policy token that holds
        its start, else to the last one before it, else to the first. Policy tokens with an empty
        span get nothing.

        Time O(J + T) but for one sort. Raises InputError where there are judge tokens, and no
        policy token has any text.
        """
        places = _disjoint(policy_spans)
        owners = [t for t, (start, stop) in enumerate(places) if start < stop]
        starts = [places[t][0] for t in owners]
        stops = [places[t][1] for t in owners]
        if judge_spans and not owners:
            raise InputError(
                "the judge read text that no policy token stands for",
                expected="a policy token with text",
                got=f"{len(judge_spans)} judge tokens and {len(policy_spans)} policy tokens",
            )
        judge, policy, share = list[int](), list[int](), list[float]()
        k = 0  # the first owner that ends behind the judge token's start
        for j, (start, stop) in enumerate(_disjoint(judge_spans)):
            while k < len(owners) and stops[k] <= start:
                k += 1
            last = k
            while last < len(owners) and starts[last] < stop:
                last += 1
            overlaps = [min(stop, stops[i]) - max(start, starts[i]) for i in range(k, last)]
            first = k
            if start == stop or not overlaps:
                if k == len(owners) or starts[k] > start:
                    first = max(k - 1, 0)
                last, overlaps = first + 1, [1.0]
            judge += [j] * len(overlaps)
            policy += owners[first:last]
            total = sum(overlaps)
            share += [overlap / total for overlap in overlaps]
        return cls(judge, policy, share, len(judge_spans), len(policy_spans))

    @cached_property
    def is_identity(self) -> bool:
        """Whether judge token j stands for policy token j and nothing else, for every j."""
        return self.judge == self.policy == list(range(self.judge_count))

    def judge_tokens(self, start: int, stop: int) -> Span:
        """The judge tokens `[first, last)` with any share in policy tokens [start, stop).

        They are contiguous; `(x, x)` where there are none. Those of adjacent policy spans may
        overlap, in a judge token that stands for both.
        """
        entries, lowest, highest = self._bounds
        first, last = bisect_left(highest, start), bisect_left(lowest, stop)
        if first < last and start < stop:
            # A judge token may reach over policy tokens without text and have no share in them.
            inner = bisect_left(self.policy, start, entries[first], entries[first + 1])
            if inner < entries[first + 1] and self.policy[inner] < stop:
                return first, last
        return first, first

    def to_policy(
        self,
        values: Tensor,
        tokens: Sequence[int] | None = None,
        within: Sequence[Span] | None = None,
    ) -> Tensor:
        """`out[t] = sum_j share[tokens[j], t] * values[j]`, judge tokens' values per policy token.

        Args:
            values: `[J']`, floating point; one per entry of `tokens`.
            tokens: the judge tokens that the values belong to, each once; None: all J.
            within: the policy spans that may get anything, None: all of them. A judge token across
                the border of one gives all it has to its tokens inside, in proportion.

        Returns `[T]` in the dtype and on the device of `values`: exactly 0 outside `within`, and
        `out.sum() == values.sum()` up to rounding, 1e-12 in float64. Raises InputError where
        values and tokens differ in number, a token is unknown, or has no share in `within`.
        """
        chosen, judge, policy, share = self._chosen(tokens, within)
        if values.shape != (len(chosen),):
            raise InputError(
                "values are not one per judge token",
                expected=f"[{len(chosen)}]",
                got=list(values.shape),
            )
        out = values.new_zeros(self.policy_count)
        device = values.device
        shares = values[judge.to(device)] * share.to(device, values.dtype)
        return out.index_add_(0, policy.to(device), shares)

    def policy_tokens(
        self, tokens: Sequence[int] | None = None, within: Sequence[Span] | None = None
    ) -> list[int]:
        """Policy tokens that these judge tokens have a share in, ascending, as `to_policy`."""
        _, _, policy, _ = self._chosen(tokens, within)
        found: list[int] = policy.unique().tolist()
        return found

    def _chosen(
        self, tokens: Sequence[int] | None, within: Sequence[Span] | None
    ) -> tuple[range | Sequence[int], Tensor, Tensor, Tensor]:
        """The tokens, and for each entry among them: place in tokens, policy token, share."""
        judge, policy, share = self._entries
        chosen = range(self.judge_count) if tokens is None else tokens
        for index, token in enumerate(chosen):
            if not 0 <= token < self.judge_count:
                expected = f"0 <= token < {self.judge_count}"
                raise InputError(
                    "a judge token is unknown", expected=expected, got=token, index=index
                )
        place = torch.full((self.judge_count,), -1)
        place[torch.tensor(list(chosen), dtype=torch.int64)] = torch.arange(len(chosen))
        wanted = place[judge] >= 0
        if within is not None:
            inside = torch.zeros(self.policy_count, dtype=torch.bool)
            for start, stop in within:
                inside[start:stop] = True
            wanted &= inside[policy]
        judge, policy, share = place[judge[wanted]], policy[wanted], share[wanted]
        total = share.new_zeros(len(chosen)).index_add_(0, judge, share)
        if not total.all():
            index = int((total == 0).nonzero()[0])
            raise InputError(
                "a judge token has no share in the attributed policy tokens, or is given twice",
                got=f"judge token {chosen[index]}, policy spans {within}",
                index=index,
            )
        return chosen, judge, policy, share / total[judge] if within is not None else share

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.tensor(self.judge, dtype=torch.int64),
            torch.tensor(self.policy, dtype=torch.int64),
            torch.tensor(self.share, dtype=torch.float64),
        )

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int], list[int]]:
        """Of each judge token: where its entries begin, and its first and last policy token."""
        begins = [i for i, j in enumerate(self.judge) if i == 0 or j != self.judge[i - 1]]
        begins.append(len(self.judge))
        # Both of these ascend.
        lowest = [self.policy[i] for i in begins[:-1]]
        highest = [self.policy[i - 1] for i in begins[1:]]
        return begins, lowest, highest


def _disjoint(spans: Sequence[CharacterSpan]) -> list[CharacterSpan]:
    """Spans that ascend and do not overlap; where they did, the common part is cut evenly."""
    begins = list(accumulate((start for start, _ in spans), max))
    empty = [begin >= stop for begin, (_, stop) in zip(begins, spans, strict=True)]
    starts = [begin for begin, none in zip(begins, empty, strict=True) if not none]
    stops = list(accumulate((s[1] for s, none in zip(spans, empty, strict=True) if not none), max))
    edges = sorted({*starts, *stops})
    out: list[CharacterSpan] = []
    done, text = 0.0, 0  # characters, and spans that are not empty
    for begin, none in zip(begins, empty, strict=True):
        done = begin = max(begin, done)
        if not none:
            # The last stretch of this span, and which of those that hold it this one is.
            high = stops[text]
            low = edges[bisect_left(edges, high) - 1]
            first = bisect_left(stops, high)
            nth, count = text - first + 1, bisect_right(starts, low) - first
            done = high if nth == count else low + (high - low) * nth / count
            text += 1
        out.append((begin, done))
    return out
