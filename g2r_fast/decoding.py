"""The text that sampled ids say, and which of its characters each id stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from .alignment import CharacterSpan

__all__ = ["decode_with_spans"]

_PARTIAL = "\N{REPLACEMENT CHARACTER}"
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
# A character has at most four bytes and a token at least one, so what the last token did to the
# end of the text shows in a window of four tokens before it.
_WINDOW = 4


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
