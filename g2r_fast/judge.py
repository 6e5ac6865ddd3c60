"""A frozen language model that answers True or False, and the prompts it is asked with.

Prompts are built as token ids: fixed scaffold + untrusted text + fixed scaffold. The order is
conversation, response, rubric item, verdict, so that a prompt is a shared prefix of its responses
and (prompt, response) a shared prefix of the response's rubric items. The verdict is read from the
logits after the last id, never parsed from text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .errors import InputError, InputTypeError
from .untrusted import UntrustedEncoder

__all__ = ["EncodedResponse", "Judge", "JudgeRequest", "Rubric", "as_rubric"]

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]] | Sequence[int]"
Response: TypeAlias = "str | Sequence[int]"
Span: TypeAlias = tuple[int, int]

SCAFFOLDS = ("grader",)

_SENTINEL = "\ue000g2r\ue001"
_BEFORE_CONVERSATION = "Judge whether the response meets the criterion.\n\n# Conversation\n"
_BEFORE_RESPONSE = "\n\n# Response\n"
_BEFORE_CRITERION = "\n\n# Criterion\n"
_QUESTION = "\n\nDoes the response meet the criterion? Answer True or False."
_VERDICT_WITHOUT_TEMPLATE = "\n\nVerdict:"


@dataclass(frozen=True)
class Rubric:
    """One rubric item: what the response must do, and its points (negative: a pitfall)."""

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputTypeError(
                "a rubric item's text is not a string", expected="str", got=type(self.text).__name__
            )
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise InputTypeError(
                "a rubric item's weight is not a number",
                expected="int or float",
                got=type(self.weight).__name__,
            )
        if not torch.isfinite(torch.tensor(float(self.weight))):
            raise InputError(
                "a rubric item's weight is not finite", expected="a number", got=self.weight
            )


def as_rubric(item: Rubric | str | Mapping[str, Any]) -> Rubric:
    """`Rubric | str | {"criterion", "points"} | {"description", "weight"}` as a Rubric."""
    if isinstance(item, Rubric):
        return item
    if isinstance(item, str):
        return Rubric(item)
    if isinstance(item, Mapping):
        for text_key, weight_key in (("criterion", "points"), ("description", "weight")):
            if text_key in item:
                return Rubric(item[text_key], item.get(weight_key, 1.0))
    raise InputTypeError(
        "a rubric item cannot be read",
        expected='Rubric, str, {"criterion", "points"} or {"description", "weight"}',
        got=sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__,
    )


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
        self.check_frozen()
        self._set_scaffold_ids(true, false)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])

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
        return getattr(self.model.config, "max_position_embeddings", None)

    def check_frozen(self) -> None:
        """Raise for a model in train mode with dropout; warn once about trainable weights."""
        if self.model.training and _has_dropout(self.model):
            raise InputError(
                "the judge is in train mode and has dropout",
                expected="a judge in eval mode",
                fix="Call judge.model.eval().",
            )
        if any(p.requires_grad for p in self.model.parameters()):
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
        elif _is_ids(prompt):
            conversation, _, _ = self._ordinary(_ids(prompt), "prompt")
        else:
            conversation = self.encode_untrusted(_render_messages(prompt))
        return [*self._before_conversation, *conversation, *self._before_response]

    def encode_response(self, response: Response) -> EncodedResponse:
        """The response's own ids; a final EOS counts as a policy token and is left out here."""
        if isinstance(response, str):
            ids = self.encode_untrusted(response)
            return EncodedResponse(ids, list(range(len(ids))), len(ids))
        if not _is_ids(response):
            raise InputTypeError(
                "a response cannot be read", expected="str or token ids", got=type(response)
            )
        policy_ids = _ids(response)
        body = policy_ids[:-1] if policy_ids and policy_ids[-1] in self.eos_ids else policy_ids
        ids, token_index, respelled = self._ordinary(body, "response")
        return EncodedResponse(ids, token_index, len(policy_ids), respelled)

    def encode_rubric(self, rubric: Rubric | str | Mapping[str, Any]) -> list[int]:
        """Everything after the response, up to where the verdict is read."""
        text = self.encode_untrusted(as_rubric(rubric).text)
        return [*self._before_criterion, *text, *self._question]

    def token_strings(self, response: Response) -> list[str]:
        """What each policy token says, for reports; partial characters show as U+FFFD."""
        ids = self.encode_untrusted(response) if isinstance(response, str) else _ids(response)
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]

    def _ordinary(self, ids: list[int], what: str) -> tuple[list[int], list[int], int]:
        """Ids with control ids spelled out, the index each came from, and how many there were."""
        out: list[int] = []
        index: list[int] = []
        respelled = 0
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise InputError(
                    f"a {what} id is outside the vocabulary",
                    expected=f"0 <= id < {self.vocab_size}",
                    got=token_id,
                    index=position,
                    fix="Are the ids from another tokenizer, or padded with -100?",
                )
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
        self._question = self._trusted(_QUESTION + footer)
        self.true_id = self._next_id(_QUESTION + footer, lead + true)
        self.false_id = self._next_id(_QUESTION + footer, lead + false)
        if self.true_id == self.false_id:
            raise InputError(
                "the verdict words share a first token",
                expected="two words that this tokenizer begins differently",
                got=f"{true!r} and {false!r} both begin with id {self.true_id}",
                fix='Pass other words, e.g. true="Yes", false="No".',
            )

    def _turn(self) -> tuple[str, str, str]:
        """Text before and after a user turn's content, and what leads the verdict word."""
        self._has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if not self._has_template:
            return "", _VERDICT_WITHOUT_TEMPLATE, " "
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _SENTINEL}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # verdict first; templates that do not know it ignore it
        )
        parts = rendered.split(_SENTINEL)
        if len(parts) != 2:
            raise InputError(
                "the chat template does not carry a user turn through unchanged",
                expected="the user's content once",
                got=f"{len(parts) - 1} times",
                fix="Give the tokenizer another chat_template, or None.",
            )
        return parts[0], parts[1], ""

    def _trusted(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _next_id(self, context: str, word: str) -> int:
        """The id with which `word` begins when it follows `context`."""
        before = self._trusted(context)
        after = self._trusted(context + word)
        if after[: len(before)] == before and len(after) > len(before):
            return after[len(before)]
        alone = self._trusted(word)
        if not alone:
            raise InputError("a verdict word has no tokens", got=repr(word))
        return alone[0]


def _has_dropout(model: torch.nn.Module) -> bool:
    if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    config = getattr(model, "config", None)
    return bool(getattr(config, "attention_dropout", 0.0))


def _bos(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return [bos] if with_special and with_special[0] == bos else []


def _is_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 1 and not value.is_floating_point()
    if hasattr(value, "tolist"):  # a numpy array
        value = value.tolist()
    return isinstance(value, Sequence) and all(
        isinstance(i, int) and not isinstance(i, bool) for i in value
    )


def _ids(value: Any) -> list[int]:
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _render_messages(messages: Any) -> str:
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise InputTypeError(
            "a prompt cannot be read",
            expected="str, a list of messages, or token ids",
            got=type(messages).__name__,
        )
    lines = []
    for position, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            texts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
            content = "\n".join(map(str, texts)) if None not in texts else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise InputTypeError(
                "a message of a prompt cannot be read",
                expected='{"role": str, "content": str or text parts}',
                got=dict(message),
                index=position,
            )
        lines.append(f"{message['role'].capitalize()}: {content}")
    return "\n\n".join(lines)


def _judge_spans(
    response: EncodedResponse, spans: Sequence[Span] | None, offset: int
) -> list[Span]:
    """Attributed parts: policy-token spans as positions of the judge's ids."""
    if spans is None:
        return [(offset, offset + len(response.ids))] if response.ids else []
    result: list[Span] = []
    floor = 0
    for index, (start, stop) in enumerate(spans):
        if not floor <= start <= stop <= response.token_count:
            raise InputError(
                "a span lies outside its response or overlaps the one before",
                expected=f"{floor} <= start <= stop <= {response.token_count}",
                got=(start, stop),
                index=index,
            )
        floor = stop
        inside = [j for j, t in enumerate(response.token_index) if start <= t < stop]
        if inside:
            result.append((offset + inside[0], offset + inside[-1] + 1))
    return result
