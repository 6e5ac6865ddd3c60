"""Text nobody vouches for, as token ids that cannot act.

A chat template's markers (`<|im_end|>`, `</s>`, ...) are ordinary characters when a policy writes
them and control tokens once a tokenizer has seen them. Here they stay characters: untrusted text
goes through a twin of the tokenizer that knows no added tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from .errors import InputTypeError

__all__ = ["UntrustedEncoder", "control_ids"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that mean something to a model beyond their spelling: special and added tokens.

    Added tokens that are white space only (runs of spaces in some code models) are text.
    """
    ids = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if str(token.content).strip():
            ids.add(int(token_id))
    return frozenset(ids)


class UntrustedEncoder:
    """`encoder(text)` = the ids of text, none of them a control id, decoding back to the text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control_ids = control_ids(tokenizer)
        self._twin = _twin(tokenizer)
        self._respelled: dict[int, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of `text` `[T]`. Lone surrogates become U+FFFD; an empty text gives no ids.

        Raises InputTypeError where `text` is not a string.
        """
        if not isinstance(text, str):
            raise InputTypeError(
                "untrusted text is not a string", expected="str", got=type(text).__name__
            )
        text = text.encode("utf-8", "replace").decode("utf-8")
        if not text:
            return []
        ids, offsets = self._encode(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        # A vocabulary that holds its control tokens as ordinary pieces (SentencePiece, WordPiece)
        # can still find one; spelling that stretch character by character cannot.
        safe: list[int] = []
        for token_id, (start, stop) in zip(ids, offsets, strict=True):
            if token_id in self.control_ids:
                safe.extend(self._by_character(text[start:stop]))
            else:
                safe.append(token_id)
        return safe

    def respell(self, token_id: int) -> list[int]:
        """The spelling of one control id, in ordinary tokens."""
        if token_id not in self._respelled:
            piece = self.tokenizer.convert_ids_to_tokens(token_id)
            self._respelled[token_id] = self(str(piece)) if piece is not None else []
        return self._respelled[token_id]

    def is_faithful(self, text: str, ids: list[int]) -> bool:
        """Whether ids decode back to text, up to the tokenizer's own normalisation of it."""
        decoded = self.decode(ids)
        return decoded == text or _squeezed(decoded) == _squeezed(self._normalised(text))

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        if self._twin is not None:
            return self._twin.decode(ids, skip_special_tokens=False)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self._twin is not None:
            encoding = self._twin.encode(text, add_special_tokens=False)
            return list(encoding.ids), list(encoding.offsets)
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self.control_ids.isdisjoint(ids):
            return list(ids), [(0, 0)] * len(ids)
        # No offsets here, so one bad id means that the whole text is spelled out.
        spelled = self._by_character(text)
        return spelled, [(0, 0)] * len(spelled)

    def _by_character(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in text:
            for candidate in (character, _REPLACEMENT, "?"):
                found = self._encode_alone(candidate)
                if found and self.control_ids.isdisjoint(found):
                    ids.extend(found)
                    break
        return ids

    def _encode_alone(self, character: str) -> list[int]:
        if self._twin is not None:
            return list(self._twin.encode(character, add_special_tokens=False).ids)
        return list(
            self.tokenizer.encode(character, add_special_tokens=False, split_special_tokens=True)
        )

    def _normalised(self, text: str) -> str:
        normalizer = self._twin.normalizer if self._twin is not None else None
        return normalizer.normalize_str(text) if normalizer is not None else text


def _squeezed(text: str) -> str:
    return "".join(text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").split())


def _twin(tokenizer: Any) -> Tokenizer | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    description["truncation"] = None
    description["padding"] = None
    return Tokenizer.from_str(json.dumps(description))
