"""A frozen language model that answers True or False, and the prompts it is asked with.

Prompts are built as token ids: fixed scaffold + untrusted text + fixed scaffold. The order is
conversation, response, rubric item, verdict, so that a prompt is a shared prefix of its responses
and (prompt, response) a shared prefix of the response's rubric items. The verdict is read from the
logits after the last id, never parsed from text.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .checks import (
    Span,
    check_no_dropout,
    check_vocabulary,
    position_limit,
    read_spans,
    render_messages,
    token_ids,
)
from .errors import InputError, InputTypeError
from .rubric import Rubric, as_rubric
from .untrusted import UntrustedEncoder

if TYPE_CHECKING:
    import numpy

__all__ = ["EncodedResponse", "Judge", "JudgeRequest", "Rubric", "as_rubric"]

TokenIds: TypeAlias = "Sequence[int] | torch.Tensor | numpy.ndarray[Any, Any]"
Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | TokenIds"
Response: TypeAlias = "str | TokenIds"

SCAFFOLDS = ("grader",)

# Private characters and both cases: a template that changes the case of its text is found out.
_SENTINEL = "\ue000G2r\ue001"
_BEFORE_CONVERSATION = "Judge whether the response meets the criterion.\n\n# Conversation\n"
_BEFORE_RESPONSE = "\n\n# Response\n"
_BEFORE_CRITERION = "\n\n# Criterion\n"
_QUESTION = "\n\nDoes the response meet the criterion? Answer True or False."
_VERDICT_WITHOUT_TEMPLATE = "\n\nVerdict:"


@dataclass(frozen=True)
class EncodedResponse:
    """A response as the judge reads it: ids, and the policy token each of them belongs to."""

    ids: list[int]
    token_index: list[int]  # [len(ids)], ascending: judge token -> policy token
    token_count: int  # T, policy tokens, a final EOS included
    respelled: int = 0  # control ids that were spelled out in ordinary tokens


@dataclass(frozen=True)
class JudgeRequest:
    """One judgement: the ids, where the response lies in them, and the two verdict tokens."""

    input_ids: list[int]
    response_span: Span  # the whole response, in positions of input_ids
    response_spans: list[Span]  # the attributed parts of it
    true_id: int
    false_id: int
    token_index: list[int] = field(default_factory=list)  # judge token in response -> policy token
    token_count: int = 0


class Judge:
    """A causal LM, its tokenizer and the scaffold it is asked with.

    Args:
        model: a Hugging Face causal LM, used as it is (no copy), in eval mode.
        tokenizer: its tokenizer, with or without a chat template.
        scaffold: `"grader"`, the question as one user turn that holds conversation, response
            and rubric item.
        true, false: the verdict words; their first tokens must differ.
        policy_tokenizer: the tokenizer of response ids, where it is not the judge's; for now it
            must have the same vocabulary.
        on_control_ids: what to do with control ids inside sampled response ids, `"respell"` them
            in ordinary tokens (their rewards add up on the one policy token) or `"raise"`.

    Raises InputError for an unknown scaffold, verdict words that share a first token, a model in
    train mode with dropout, or a chat template that does not carry the user's text through.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scaffold: str = "grader",
        true: str = "True",
        false: str = "False",
        policy_tokenizer: Any = None,
        *,
        on_control_ids: str = "respell",
    ) -> None:
        if scaffold not in SCAFFOLDS:
            raise InputError(
                "unknown scaffold", expected=" | ".join(map(repr, SCAFFOLDS)), got=repr(scaffold)
            )
        if on_control_ids not in ("respell", "raise"):
            raise InputError(
                "unknown on_control_ids", expected="'respell' | 'raise'", got=repr(on_control_ids)
            )
        if policy_tokenizer is not None and policy_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                "the policy's tokenizer has another vocabulary than the judge's",
                fix="Pass responses as text, or a judge with the policy's tokenizer.",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.scaffold = scaffold
        self.on_control_ids = on_control_ids
        self.encode_untrusted = UntrustedEncoder(tokenizer)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._token_strings: dict[int, str] = {}
        self._warned = False
        self.check_frozen()
        self._set_scaffold_ids(true, false)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        scaffold: str = "grader",
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        true: str = "True",
        false: str = "False",
        on_control_ids: str = "respell",
        **model_kwargs: Any,
    ) -> Judge:
        """A judge from the hub or a folder, frozen and in eval mode.

        `dtype=None` keeps the checkpoint's own dtype; other keywords go to
        `AutoModelForCausalLM.from_pretrained`.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(name_or_path), dtype="auto" if dtype is None else dtype, **model_kwargs
        )
        if device is not None:
            model = model.to(device)
        model = model.eval().requires_grad_(False)
        return cls(model, tokenizer, scaffold, true, false, on_control_ids=on_control_ids)

    @classmethod
    def tiny(cls) -> Judge:
        """The small judge that ships with this package, for demos and tests; float32, CPU."""
        return cls.from_pretrained(Path(__file__).parent / "tiny_judge", dtype=torch.float32)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's EOS and those of the generation config."""
        configured = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    @property
    def max_positions(self) -> int | None:
        return position_limit(self.model)

    def check_frozen(self) -> None:
        """Raise for a model in train mode with dropout; warn once about trainable weights."""
        check_no_dropout(self.model, "judge")
        if not self._warned and any(p.requires_grad for p in self.model.parameters()):
            self._warned = True
            warnings.warn(
                "the judge has trainable weights; attribution never forms their gradients, but a "
                "judge that is trained along changes what its verdicts mean. Freeze it with "
                "model.requires_grad_(False).",
                UserWarning,
                stacklevel=3,
            )

    def encode(
        self,
        prompt: Prompt,
        response: Response,
        rubric: Rubric | str | Mapping[str, Any],
        spans: Sequence[Span] | None = None,
    ) -> JudgeRequest:
        """One judgement as ids; `spans` are the attributed parts in response tokens (all of it)."""
        return self.join(
            self.encode_prompt(prompt),
            self.encode_response(response),
            self.encode_rubric(rubric),
            spans,
        )

    def join(
        self,
        prompt_ids: Sequence[int],
        response: EncodedResponse,
        rubric_ids: Sequence[int],
        spans: Sequence[Span] | None = None,
    ) -> JudgeRequest:
        """The three encoded parts as one request."""
        start = len(prompt_ids)
        return JudgeRequest(
            input_ids=[*prompt_ids, *response.ids, *rubric_ids],
            response_span=(start, start + len(response.ids)),
            response_spans=_judge_spans(response, spans, start),
            true_id=self.true_id,
            false_id=self.false_id,
            token_index=response.token_index,
            token_count=response.token_count,
        )

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Everything before the response."""
        if isinstance(prompt, str):
            conversation = self.encode_untrusted(f"User: {prompt}")
        elif (ids := token_ids(prompt)) is not None:
            conversation, _, _ = self._ordinary(ids, "prompt")
        else:
            conversation = self.encode_untrusted(render_messages(prompt))
        return [*self._before_conversation, *conversation, *self._before_response]

    def encode_response(self, response: Response) -> EncodedResponse:
        """The response's own ids; a final EOS counts as a policy token and is left out here."""
        if isinstance(response, str):
            ids = self.encode_untrusted(response)
            return EncodedResponse(ids, list(range(len(ids))), len(ids))
        policy_ids = token_ids(response)
        if policy_ids is None:
            raise InputTypeError(
                "a response cannot be read",
                expected="str or a list of token ids",
                got=repr(response)[:80],
            )
        body = policy_ids[:-1] if policy_ids and policy_ids[-1] in self.eos_ids else policy_ids
        ids, token_index, respelled = self._ordinary(body, "response")
        return EncodedResponse(ids, token_index, len(policy_ids), respelled)

    def encode_rubric(self, rubric: Rubric | str | Mapping[str, Any]) -> list[int]:
        """Everything after the response, up to where the verdict is read."""
        text = self.encode_untrusted(as_rubric(rubric).text)
        return [*self._before_criterion, *text, *self._question]

    def token_strings(self, response: Response) -> list[str]:
        """What each policy token says, for reports; partial characters show as U+FFFD."""
        ids = self.encode_untrusted(response) if isinstance(response, str) else token_ids(response)
        spelled = self._token_strings
        for i in ids or []:
            if i not in spelled:
                spelled[i] = self.tokenizer.decode([i], skip_special_tokens=False)
        return [spelled[i] for i in ids or []]

    def _ordinary(self, ids: list[int], what: str) -> tuple[list[int], list[int], int]:
        """Ids with control ids spelled out, the index each came from, and how many there were."""
        out: list[int] = []
        index: list[int] = []
        respelled = 0
        check_vocabulary(ids, self.vocab_size, f"a {what} id")
        for position, token_id in enumerate(ids):
            spelling = [token_id]
            if token_id in self.encode_untrusted.control_ids:
                if self.on_control_ids == "raise" and what == "response":
                    raise InputError(
                        "a response holds a control id",
                        got=f"{token_id} ({self.tokenizer.convert_ids_to_tokens(token_id)!r})",
                        index=position,
                        fix='Use on_control_ids="respell" to spell it in ordinary tokens.',
                    )
                spelling = self.encode_untrusted.respell(token_id)
                respelled += 1
            out.extend(spelling)
            index.extend([position] * len(spelling))
        return out, index, respelled

    def _set_scaffold_ids(self, true: str, false: str) -> None:
        header, footer, lead = self._turn()
        self._before_conversation = self._trusted(header + _BEFORE_CONVERSATION)
        if not self._has_template:
            # Templates write their own BOS; without one the tokenizer's own belongs in front.
            self._before_conversation = [*_bos(self.tokenizer), *self._before_conversation]
        self._before_response = self._trusted(_BEFORE_RESPONSE)
        self._before_criterion = self._trusted(_BEFORE_CRITERION)
        self._question, self.true_id, self.false_id = self._part(
            _QUESTION + footer + lead, true, false
        )
        scaffold = [*self._before_conversation, *self._before_response, *self._before_criterion]
        check_vocabulary(
            [*scaffold, *self._question, self.true_id, self.false_id],
            self.vocab_size,
            "a scaffold id of this tokenizer",
        )

    def _turn(self) -> tuple[str, str, str]:
        """Text before and after a user turn's content, and what leads the verdict word."""
        self._has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if not self._has_template:
            return "", _VERDICT_WITHOUT_TEMPLATE, " "
        user = {"role": "user", "content": _SENTINEL}
        parts = self._render([user], add_generation_prompt=True).split(_SENTINEL)
        if len(parts) != 2:
            raise InputError(
                "the chat template does not carry a user turn through unchanged",
                expected="the user's content once",
                got=f"{len(parts) - 1} times",
                fix="Give the tokenizer another chat_template, or None.",
            )
        header, footer = parts
        # Some templates put more before an answer than they prompt for, were it one space.
        answered = self._render([user, {"role": "assistant", "content": _SENTINEL}])
        between = answered.split(_SENTINEL)[1]
        lead = between.removeprefix(footer) if between.startswith(footer) else ""
        return header, footer, lead if answered.count(_SENTINEL) == 2 else ""

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # verdict first; templates that do not know it ignore it
        )
        return text

    def _trusted(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _part(self, context: str, true: str, false: str) -> tuple[list[int], int, int]:
        """Ids up to where `context + true` and `context + false` part, and the two next ids.

        A tokenizer may join the end of the context to the word, or begin both words with the same
        blank: as in any text of its own, the verdict is then read before or behind that.
        """
        with_true, with_false = self._trusted(context + true), self._trusted(context + false)
        pairs = zip(with_true, with_false, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(with_true))
        shared = with_true[:at]
        if (
            not (true.strip() and false.strip())
            or at >= min(len(with_true), len(with_false))
            or self._letters(shared) > self._letters(self._trusted(context))
            or self.tokenizer.unk_token_id in (with_true[at], with_false[at])
        ):
            raise InputError(
                "the verdict words share a first token, or have none",
                expected="two words that this tokenizer begins differently",
                got=f"{true!r} and {false!r}, spelled {self._spelling(true)} and "
                f"{self._spelling(false)}",
                fix='Pass other words, e.g. true="Yes", false="No".',
            )
        return shared, with_true[at], with_false[at]

    def _letters(self, ids: list[int]) -> int:
        return len("".join(self.tokenizer.decode(ids, skip_special_tokens=False).split()))

    def _spelling(self, word: str) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(self._trusted(word)))


def _bos(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return [bos] if with_special and with_special[0] == bos else []


def _judge_spans(
    response: EncodedResponse, spans: Sequence[Span] | None, offset: int
) -> list[Span]:
    """Attributed parts: policy-token spans as positions of the judge's ids."""
    if spans is None:
        return [(offset, offset + len(response.ids))] if response.ids else []
    result: list[Span] = []
    for start, stop in read_spans(spans, response.token_count):
        first, last = (bisect_left(response.token_index, token) for token in (start, stop))
        if first < last:
            result.append((offset + first, offset + last))
    return result
