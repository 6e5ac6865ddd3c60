"""Text nobody vouches for, as token ids that cannot act.

A chat template's markers (`<|im_end|>`, `</s>`, ...) are ordinary characters when a policy writes
them and control tokens once a tokenizer has seen them. Here they stay characters: untrusted text
goes through a twin of the tokenizer that knows no added tokens.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from .errors import InputTypeError

__all__ = ["UntrustedEncoder", "control_ids"]

_SECRET = secrets.token_hex(16)
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
        text = _characters(text)
        if not text:
            return []
        ids, offsets = self._encode(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        # What the vocabulary cannot spell comes out as its unknown id; that stretch is spelled
        # character by character, what is still unknown as a replacement.
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
        text, decoded = _characters(text), self.decode(ids)
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
                # Nothing at all is an answer where the tokenizer drops the character itself.
                if self.control_ids.isdisjoint(found) and (found or candidate == character):
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


def _characters(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, no characters, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
    _hide(description["model"], control_ids(tokenizer))
    return Tokenizer.from_str(json.dumps(description))


def _hide(model: dict[str, Any], hidden: frozenset[int]) -> None:
    """Rename control pieces inside a vocabulary (SentencePiece's `<s>`), so no text spells them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of the ids
        for token_id in hidden:
            if token_id < len(vocab):
                vocab[token_id][0] = _hidden_name(token_id)
        return
    renamed = {piece: _hidden_name(i) for piece, i in vocab.items() if i in hidden}
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocab.items()}
    unknown = model.get("unk_token")
    model["unk_token"] = renamed.get(unknown, unknown)
    if renamed and "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            (a, b) for a, b in pairs if not {a, b, a + b.removeprefix(prefix)} & renamed.keys()
        ]


def _hidden_name(token_id: int) -> str:
    return f"\U0010fffe{token_id} {_SECRET}"  # begins with a noncharacter; no text can guess it
