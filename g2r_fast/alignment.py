"""Which tokens of a policy the tokens of a judge with another vocabulary stand for.

The policy's sampled ids become text, each with the characters it stands for
(`decode_with_spans`); the judge's encoder makes ids of its own of that text, with characters again;
an `Alignment` carries values of the judge's tokens back to the policy's, by shared characters, and
loses nothing of their sum.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .checks import Span
from .errors import InputError

__all__ = ["Alignment", "decode_with_spans"]

CharacterSpan = tuple[float, float]

_PARTIAL = "\N{REPLACEMENT CHARACTER}"
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
# A character has at most four bytes and a token at least one, so what the last token did to the
# end of the text shows in a window of four tokens before it.
_WINDOW = 4


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


def decode_with_spans(
    tokenizer: Any, ids: Sequence[int], spell: Callable[[int], str | None]
) -> tuple[str, list[CharacterSpan]]:
    """`text = tokenizer.decode(ids)`, and the characters `[start, stop)` of it that each id says.

    The text is exactly `tokenizer.decode(ids, skip_special_tokens=False,
    clean_up_tokenization_spaces=False)` where no id is spelled, and the spans are consecutive and
    cover it. A blank that the tokenizer writes between two tokens belongs to the second; the one
    that SentencePiece's kind drops in front of a whole text is in nobody's span.

    A character whose bytes lie in several tokens is divided evenly over these, so that spans have
    fractions; bytes that make no character are U+FFFD, as the tokenizer decodes them. (A tokenizer
    that leaves such bytes out, as ByT5's, gives a character to the token that completes it.)

    Args:
        tokenizer: the one that the ids were sampled with.
        ids: `[T]`, inside the vocabulary; any ids, not only those that encoding gives.
        spell: the literal text of a control id, None for ids that are decoded. What follows a
            spelled id is decoded as following it.

    Time O(T): ids that say the same whatever their neighbours are looked up, others are decoded in
    a window of five.
    """
    decoder = _Decoder(tokenizer)
    ids = list(ids)
    spelled = [spell(token_id) for token_id in ids]
    texts: list[str] = []
    ends: list[float] = []
    length = at = 0
    while at < len(ids):
        literal, stop = spelled[at], at + 1
        if literal is not None:
            text, its_ends = literal, [float(length + len(literal))]
        else:
            while stop < len(ids) and spelled[stop] is None:
                stop += 1
            text, its_ends = decoder.decode(ids[:at][-1:], ids[at:stop], length)
        texts.append(text)
        ends += its_ends
        length += len(text)
        at = stop
    return "".join(texts), list(zip([0.0, *ends], ends, strict=False))


class _Decoder:
    """Text of ids, and where in it each id ends."""

    # tokenizer -> id -> its text behind other text, None where that depends on its neighbours;
    # and the byte that it stands for, None where it is no byte piece.
    _known: ClassVar[WeakKeyDictionary[Any, dict[int, tuple[str | None, int | None]]]] = (
        WeakKeyDictionary()
    )

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known = self._known.setdefault(tokenizer, {})

    def decode(self, context: list[int], ids: list[int], offset: int) -> tuple[str, list[float]]:
        """What `ids` say behind `context`, and `offset +` the end of each in it."""
        before, both = self._decode(context), self._decode([*context, *ids])
        text = both[len(before) :] if both.startswith(before) else self._decode(ids)
        ids, t = [*context, *ids], len(context)
        ends: list[float] = []
        length = 0  # characters up to here; an incomplete one at the end counts as one
        sharing = 0  # the last tokens, which hold a part of that one
        while t < len(ids):
            piece, byte = self._token(ids[t])
            if byte is not None and not sharing:
                steps = _byte_ends(self._byte_run(ids, t), text, length, offset)
                if steps:
                    ends += steps
                    length = int(steps[-1]) - offset
                    t += len(steps)
                    continue
            if t == 0 and piece is not None:
                piece = self._decode(ids[:1])
            if piece is not None and not sharing and text.startswith(piece, length):
                length += len(piece)
                ends.append(offset + length)
                t += 1
                continue
            window = ids[max(t - _WINDOW, 0) : t + 1]
            now = self._decode(window)
            added = len(now) - len(self._decode(window[:-1]))
            partial = now.endswith(_PARTIAL)
            if sharing and partial and added <= 0:
                sharing += 1
            else:
                if sharing:
                    # A character that stayed U+FFFD ended with the tokens before.
                    whole = text[length - 1 : length] != _PARTIAL
                    ends += _parts(offset + length - 1, sharing + whole)[:sharing]
                length += added
                sharing = int(partial)
                if not partial:
                    ends.append(offset + length)
            t += 1
        if sharing:
            ends += _parts(offset + length - 1, sharing)
        # Mends nothing, unless a tokenizer's text depends on more than the window shows.
        total = offset + len(text)
        ends = list(accumulate((float(min(end, total)) for end in ends), max))
        return text, [*ends[:-1], float(total)]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text: str = self.tokenizer.decode(
            ids,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,  # tokenizers in Python write blanks there
        )
        return text

    def _token(self, token_id: int) -> tuple[str | None, int | None]:
        if token_id not in self.known:
            name = str(self.tokenizer.convert_ids_to_tokens(token_id))
            once, twice = self._decode([token_id]), self._decode([token_id, token_id])
            piece = twice[len(once) :] if twice.startswith(once) else None
            # A part of a character says U+FFFD or nothing; but a piece may hold a whole U+FFFD.
            if not twice or (piece is not None and _PARTIAL in piece and _PARTIAL not in name):
                piece = None
            byte = _BYTE_PIECE.fullmatch(name)
            value = int(byte[1], 16) if byte and once != name else None
            self.known[token_id] = piece, value
        return self.known[token_id]

    def _byte_run(self, ids: list[int], start: int) -> bytes:
        """The bytes of the byte pieces from here on."""
        run = bytearray()
        while start < len(ids) and (byte := self._token(ids[start])[1]) is not None:
            run.append(byte)
            start += 1
        return bytes(run)


def _byte_ends(run: bytes, text: str, start: int, offset: int) -> list[float]:
    """`offset +` the ends in `text` of bytes that it says from `start` on; [] if it does not.

    SentencePiece's kind decodes a run of byte pieces as a whole: one bad byte breaks them all.
    """
    try:
        characters = run.decode()
    except UnicodeDecodeError:
        broken = text.startswith(_PARTIAL * len(run), start)
        return [float(offset + start + i + 1) for i in range(len(run))] if broken else []
    if not text.startswith(characters, start):
        return []
    first = offset + start
    return [e for i, c in enumerate(characters) for e in _parts(first + i, len(c.encode()))]


def _parts(start: int, count: int) -> list[float]:
    """The ends of a character's equal parts."""
    return [start + i / count for i in range(1, count)] + [float(start + 1)]
