"""What a policy wrote, as ids of the model that reads it, none of which can act.

Responses come as text or as the policy's sampled ids. Ids of the model's own vocabulary pass
straight through, but for control ids, which are spelled out in ordinary tokens; ids of another
vocabulary are decoded and encoded anew. Either way an `Alignment` says which policy token each of
the model's tokens stands for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .alignment import Alignment, CharacterSpan
from .checks import Span, check_vocabulary, read_spans, token_ids
from .decoding import decode_with_spans
from .errors import InputError, InputTypeError
from .untrusted import UntrustedEncoder

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = ["EncodedResponse", "Response", "ResponseEncoder", "TokenIds"]

TokenIds: TypeAlias = "Sequence[int] | torch.Tensor | numpy.ndarray[Any, Any]"
Response: TypeAlias = "str | TokenIds"

# Embeddings are padded beyond their tokenizer, and a policy can sample an id of the padding.
_PADDED_TO = 1024


@dataclass(frozen=True)
class EncodedResponse:
    """A response as the model reads it, and the policy tokens it stands for."""

    ids: list[int]
    alignment: Alignment  # token of ids -> policy tokens, a final EOS included
    policy_ids: list[int] | None = None  # in the model's own vocabulary; None: it has another
    keeps_end: bool = False  # whether ids end with the policy's own end of turn
    respelled: int = 0  # control ids that were spelled out in ordinary tokens

    @property
    def token_count(self) -> int:
        """T, the policy's tokens."""
        return self.alignment.policy_count


class ResponseEncoder:
    """Responses of a policy as ids of a model, with the policy's tokenizer, its own or another.

    Args:
        encode_untrusted: the model's encoder.
        vocab_size: rows of the model's embedding.
        policy_tokenizer: the policy's tokenizer; None: the model's.
        on_control_ids: `"respell"` or `"raise"`, for control ids that the policy sampled.
        allow_tokens: control tokens of the policy that are ordinary here.
    """

    def __init__(
        self,
        encode_untrusted: UntrustedEncoder,
        vocab_size: int,
        policy_tokenizer: Any,
        on_control_ids: str,
        allow_tokens: Sequence[str],
    ) -> None:
        if on_control_ids not in ("respell", "raise"):
            raise InputError(
                "unknown on_control_ids", expected="'respell' | 'raise'", got=repr(on_control_ids)
            )
        tokenizer = encode_untrusted.tokenizer
        if policy_tokenizer is None:
            policy_tokenizer = tokenizer
        self.eos_id: int | None = policy_tokenizer.eos_token_id
        self.other_vocabulary = policy_tokenizer.get_vocab() != tokenizer.get_vocab()
        self._tokenizer = policy_tokenizer if self.other_vocabulary else tokenizer
        self._encode = encode_untrusted
        self._encode_policy = (
            UntrustedEncoder(policy_tokenizer) if self.other_vocabulary else encode_untrusted
        )
        self._vocab_size = vocab_size
        self._raises = on_control_ids == "raise"
        self._refused = self._encode_policy.control_ids - self._allowed(allow_tokens)

    def encode(
        self,
        response: Response,
        spans: Sequence[Span] | None,
        eos_ids: Collection[int],
        turn_end: Sequence[int],
        continues: bool,
    ) -> EncodedResponse:
        """One response.

        A final EOS counts as a policy token; it stays among the ids where `turn_end`, what the
        scaffold writes next, begins with it, else it is left out.
        spans: the policy's own parts, in policy tokens. What lies between them, and an EOS that
        ends one, nobody tried to smuggle in: it stays as it is where the scaffold `continues` the
        rollout, and is spelled out, uncounted, elsewhere.
        """
        if isinstance(response, str):
            return self._from_text(response)
        policy_ids = token_ids(response)
        if policy_ids is None:
            raise InputTypeError(
                "a response cannot be read",
                expected="str or a list of token ids",
                got=repr(response)[:80],
            )
        self._check_ids(policy_ids, "response")
        ended = bool(policy_ids) and policy_ids[-1] in eos_ids
        keeps_end = ended and not self.other_vocabulary and policy_ids[-1] in turn_end[:1]
        body = policy_ids[:-1] if ended and not keeps_end else policy_ids
        foreign = {len(policy_ids) - 1} if keeps_end else set()
        if spans is not None:
            foreign = set(range(len(policy_ids)))
            for start, stop in read_spans(spans, len(policy_ids)):
                own_end = start < stop and policy_ids[stop - 1] in eos_ids
                foreign -= set(range(start, stop - own_end))
        sampled = [i for i in range(len(body)) if i not in foreign]
        respelled = self._count_control_ids(body, sampled)
        if self.other_vocabulary:
            text, characters = self._spelled_out(body)
            ids, offsets = self._encode.with_offsets(text)
            characters += [(float(len(text)),) * 2] * (len(policy_ids) - len(body))
            alignment = Alignment.from_spans(offsets, characters)
            return EncodedResponse(ids, alignment, respelled=respelled)
        ids, index = self._ordinary(body, keep=foreign if continues else ())
        alignment = Alignment.from_index(index, len(policy_ids))
        return EncodedResponse(ids, alignment, policy_ids, keeps_end, respelled)

    def prompt_ids(self, ids: list[int]) -> list[int]:
        """Ids of a policy's prompt as ordinary ids of the model; a prompt is the trainer's own."""
        self._check_ids(ids, "prompt")
        if self.other_vocabulary:
            return self._encode(self._spelled_out(ids)[0])
        return self._ordinary(ids)[0]

    def token_strings(self, response: Response) -> list[str]:
        """What each policy token says, for reports. Joined they are the response; a character whose
        bytes lie in several tokens stands at the first of them."""
        if isinstance(response, str):
            response = self._encode_policy(response)
        text, characters = self._spelled_out(token_ids(response) or [])
        return [text[math.ceil(start) : math.ceil(stop)] for start, stop in characters]

    def _from_text(self, text: str) -> EncodedResponse:
        ids, offsets = self._encode.with_offsets(text)
        if not self.other_vocabulary:
            return EncodedResponse(ids, Alignment.from_index(range(len(ids)), len(ids)), ids)
        _, policy_offsets = self._encode_policy.with_offsets(text)
        if not any(start < stop for start, stop in policy_offsets):  # blanks it does not read
            ids, offsets = [], []
        return EncodedResponse(ids, Alignment.from_spans(offsets, policy_offsets))

    def _ordinary(
        self, ids: Sequence[int], keep: Collection[int] = ()
    ) -> tuple[list[int], list[int]]:
        """Ids with control ids spelled out, but at positions in `keep`; where each came from."""
        out: list[int] = []
        index: list[int] = []
        for position, token_id in enumerate(ids):
            spelling = [token_id]
            if token_id in self._refused and position not in keep:
                spelling = self._encode.respell(token_id)
            out.extend(spelling)
            index.extend([position] * len(spelling))
        return out, index

    def _spelled_out(self, ids: Sequence[int]) -> tuple[str, list[CharacterSpan]]:
        """Text of policy ids, control ids by their names, and the characters of each."""

        def spell(token_id: int) -> str | None:
            if token_id not in self._encode_policy.control_ids:
                return None
            return str(self._tokenizer.convert_ids_to_tokens(token_id))

        known = [i for i in ids if i < len(self._tokenizer)]
        text, found = decode_with_spans(self._tokenizer, known, spell)
        places = iter(found)
        spans: list[CharacterSpan] = []
        for token_id in ids:  # an id of the padding says nothing
            end = spans[-1][1] if spans else 0.0
            spans.append(next(places) if token_id < len(self._tokenizer) else (end, end))
        return text, spans

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        size = self._vocab_size
        if self.other_vocabulary:
            size = -(-len(self._tokenizer) // _PADDED_TO) * _PADDED_TO
        check_vocabulary(ids, size, f"a {what} id")

    def _count_control_ids(self, ids: Sequence[int], sampled: Sequence[int]) -> int:
        """Control ids at the positions that the policy sampled."""
        found = [position for position in sampled if ids[position] in self._refused]
        if found and self._raises:
            token_id = ids[found[0]]
            raise InputError(
                "a response holds a control id",
                got=f"{token_id} ({self._tokenizer.convert_ids_to_tokens(token_id)!r})",
                index=found[0],
                fix='Use on_control_ids="respell" to spell it in ordinary tokens.',
            )
        return len(found)

    def _allowed(self, tokens: Sequence[str]) -> frozenset[int]:
        if isinstance(tokens, str):
            raise InputTypeError(
                "allow_tokens is not a list", expected="a list of tokens", got=repr(tokens)
            )
        vocabulary = self._tokenizer.get_vocab()
        for token in tokens:
            if token not in vocabulary:
                raise InputError(
                    "a token of allow_tokens is not in the vocabulary", got=repr(token)
                )
        return frozenset(vocabulary[token] for token in tokens)
