"""A batch of responses and their rubrics as judgements: one request per (response, item)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Span, at_row, check_lengths, check_positions
from .judge import EncodedResponse, Judge, JudgeRequest, Prompt, Response
from .plan import PackedSequence
from .rubric import Rubric

__all__ = ["Judgements"]


@dataclass
class Judgements:
    """All (response, item) pairs of a batch, flat, with what they were made of."""

    responses: list[EncodedResponse]
    requests: list[JudgeRequest]
    items_of: list[range]  # the judgements of each response
    spans: Sequence[Sequence[Span] | None] | None
    unfaithful: int = 0

    @classmethod
    def encode(
        cls,
        judge: Judge,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        items: list[list[Rubric]],
        spans: Sequence[Sequence[Span] | None] | None,
    ) -> Judgements:
        if spans is not None:
            check_lengths(responses=responses, spans=spans)
        prompt_ids: dict[str, list[int]] = {}
        rubric_ids: dict[str, list[int]] = {}
        batch = cls([], [], [], spans)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            with at_row(i):
                # A tensor's repr leaves out the middle of long ones.
                key = repr(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
                if key not in prompt_ids:
                    prompt_ids[key] = judge.encode_prompt(prompt)
                encoded = judge.encode_response(response)
                if isinstance(response, str):
                    batch.unfaithful += not judge.encode_untrusted.is_faithful(
                        response, encoded.ids
                    )
                first = len(batch.requests)
                for rubric in items[i]:
                    if rubric.text not in rubric_ids:
                        rubric_ids[rubric.text] = judge.encode_rubric(rubric)
                    request = judge.join(
                        prompt_ids[key],
                        encoded,
                        rubric_ids[rubric.text],
                        None if spans is None else spans[i],
                    )
                    check_positions(len(request.input_ids), judge.max_positions)
                    batch.requests.append(request)
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

    def attributed_spans(self) -> list[Span]:
        """From the first attributed token to behind the last, one per judgement."""
        return [
            (r.response_spans[0][0], r.response_spans[-1][1])
            if r.response_spans
            else (len(r.input_ids), len(r.input_ids))
            for r in self.requests
        ]

    def own_tokens(self, device: torch.device) -> list[Tensor]:
        """Which policy tokens are the policy's own, N tensors `[T_i]`."""
        masks = []
        for i, response in enumerate(self.responses):
            spans = None if self.spans is None else self.spans[i]
            mask = torch.zeros(response.token_count, dtype=torch.bool, device=device)
            for start, stop in [(0, response.token_count)] if spans is None else spans:
                mask[start:stop] = True
            masks.append(mask)
        return masks

    def counts(self, items: list[list[Rubric]]) -> dict[str, int]:
        """Odd inputs, for stats."""
        return {
            "empty_responses": sum(not r.ids for r in self.responses),
            "respelled_control_ids": sum(r.respelled for r in self.responses),
            "unfaithful_texts": self.unfaithful,
            "rubrics_without_positive_weight": sum(
                all(r.weight <= 0 for r in row) for row in items
            ),
        }
