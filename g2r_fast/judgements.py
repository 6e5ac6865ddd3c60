"""A batch of responses as passes of a frozen model: one request per (response, rubric item)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Span, at_row, check_lengths, check_positions, read_spans
from .errors import InputError
from .judge import Judge
from .plan import PackedSequence
from .reader import EncodedResponse, Prompt, Request, Response
from .reward_model import RewardModel
from .rollouts import Rollout
from .rubric import Rubric

__all__ = ["Judgements"]


@dataclass
class Judgements:
    """All (response, item) pairs of a batch, flat, with what they were made of."""

    prompts: list[list[int]]  # N, everything before each response
    responses: list[EncodedResponse]
    requests: list[Request]
    items_of: list[range]  # the judgements of each response
    spans: Sequence[Sequence[Span] | None] | None
    unfaithful: int = 0

    @classmethod
    def encode(
        cls,
        judge: Judge | RewardModel,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        items: list[list[Rubric]] | None,
        spans: Sequence[Sequence[Span] | None] | None,
    ) -> Judgements:
        """Every response with every item of its rubric; `items=None`: once, for a RewardModel."""
        if spans is not None:
            check_lengths(responses=responses, spans=spans)
        encode_prompt = _once(judge.encode_prompt, _prompt_key)
        batch = cls([], [], [], [], spans)
        tails: Callable[[Rubric], list[int]] | None = None
        if isinstance(judge, Judge):
            tails = _once(judge.encode_rubric, lambda rubric: rubric.text)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            with at_row(i):
                prompt_ids = encode_prompt(prompt)
                own = None if spans is None else spans[i]
                encoded = judge.encode_response(response, own)
                if isinstance(response, str):
                    batch.unfaithful += not judge.encode_untrusted.is_faithful(
                        response, encoded.ids
                    )
                first = len(batch.requests)
                of_row = [[]] if items is None or tails is None else map(tails, items[i])
                for tail in of_row:
                    request = judge.join(prompt_ids, encoded, tail, own)
                    check_positions(len(request.input_ids), judge.max_positions)
                    batch.requests.append(request)
            batch.prompts.append(prompt_ids)
            batch.responses.append(encoded)
            batch.items_of.append(range(first, len(batch.requests)))
        return batch

    def sequences(self) -> list[PackedSequence]:
        """What the engine runs, one per judgement."""
        spans = self.attributed_spans()
        labels = self.labels()
        return [
            PackedSequence(request.input_ids, start, label=label)
            for request, (start, _), label in zip(self.requests, spans, labels, strict=True)
        ]

    def labels(self) -> list[str]:
        """What errors call a judgement."""
        return [f"row {i}, item {k}" for i, of in enumerate(self.items_of) for k in range(len(of))]

    def rollouts(self) -> list[Rollout]:
        """Prompts and responses as the policy sampled them, for their log-probabilities."""
        rollouts = []
        for i, (prompt_ids, response) in enumerate(zip(self.prompts, self.responses, strict=True)):
            assert response.policy_ids is not None  # the continuation scaffold sees to it
            if not prompt_ids:
                raise InputError(
                    "reference_logps needs a token before the response",
                    expected="a prompt of at least one token",
                    index=f"row {i}",
                )
            rollouts.append(Rollout(prompt_ids, response.policy_ids, f"row {i}, reference"))
        return rollouts

    def attributed_spans(self) -> list[Span]:
        """From the first attributed token to behind the last, one per judgement."""
        return [
            (r.response_spans[0][0], r.response_spans[-1][1])
            if r.response_spans
            else (len(r.input_ids), len(r.input_ids))
            for r in self.requests
        ]

    def attributed_parts(self, judgements: range) -> list[Span]:
        """Attributed parts of a response in its own ids, the same for all its judgements."""
        if not judgements:
            return []
        request = self.requests[judgements[0]]
        first = request.response_span[0]
        return [(start - first, stop - first) for start, stop in request.response_spans]

    def own_spans(self, row: int) -> list[Span]:
        """The attributed parts of a response, in policy tokens."""
        count = self.responses[row].token_count
        spans = None if self.spans is None else self.spans[row]
        return [(0, count)] if spans is None else read_spans(spans, count)

    def own_tokens(self, device: torch.device) -> list[Tensor]:
        """Which policy tokens are the policy's own, N tensors `[T_i]`."""
        masks = []
        for i, response in enumerate(self.responses):
            mask = torch.zeros(response.token_count, dtype=torch.bool, device=device)
            for start, stop in self.own_spans(i):
                mask[start:stop] = True
            masks.append(mask)
        return masks

    def counts(self) -> dict[str, int]:
        """Odd inputs, for stats."""
        return {
            "empty_responses": sum(not r.ids for r in self.responses),
            "respelled_control_ids": sum(r.respelled for r in self.responses),
            "unfaithful_texts": self.unfaithful,
        }


def _once(encode: Callable[..., list[int]], key: Callable[..., str]) -> Callable[..., list[int]]:
    """`encode`, called once for each key."""
    known: dict[str, list[int]] = {}

    def encoded(value: object) -> list[int]:
        name = key(value)
        if name not in known:
            known[name] = encode(value)
        return known[name]

    return encoded


def _prompt_key(prompt: Prompt) -> str:
    # A tensor's repr leaves out the middle of long ones.
    return repr(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
