"""GRAIL (arXiv 2606.04889) as a signal: token weights from the gradient of the answer's likelihood.

The scalar is the negative log-likelihood of the answer's tokens; the backward stops at the input
embeddings or at a hidden state; the read-out is the norm of gradient times value, one per token.
Nothing behind the answer is computed, nor is a row whose weights need no gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adapters import base_model
from .ambient import plain_torch
from .answer_spans import AnswerSpan, find_answer_spans, read_answer_spans
from .checks import check_lengths, check_max_tokens
from .cotangents import check_finite, objective_cotangents
from .engine import Engine, choose_engine
from .errors import InputError, InputTypeError
from .plan import PackedSequence, Read
from .rollouts import Rollout, check_temperature, read_rollouts
from .signal import Cotangents, LeafRows, ReadsNoLinears

__all__ = [
    "AFTER_SPAN",
    "LEAVES",
    "POLARITIES",
    "AnswerSpan",
    "SaliencySignal",
    "find_answer_spans",
    "saliency_weights",
    "token_saliencies",
    "token_weights",
]

logger = logging.getLogger("g2r_fast")

POLARITIES = ("both", "correct", "wrong")
LEAVES = ("embeddings", "first", "middle", "last")
AFTER_SPAN = ("included", "excluded")

_FLOOR = 1e-8  # in log(s + floor), and once more in sqrt(var + floor)
_SLOPE, _LEAST, _MOST = 0.5, 0.5, 5.0
_CONTENT = 5.0  # the weight of the answer itself
_HIGHEST_EXPONENT = 100  # two to the power of it is still a float32, and so is its inverse


def token_weights(
    policy: Any,
    prompt_ids: Sequence[Any],
    completion_ids: Sequence[Any],
    answer_spans: Sequence[Any],
    advantages: Sequence[float] | Tensor | None,
    *,
    polarity: str = "wrong",
    leaf: str | int = "embeddings",
    shift: int = 1,
    overrides: bool = True,
    after_span: str = "included",
    temperature: float = 1.0,
    engine: str = "auto",
    max_tokens: int | None = None,
) -> list[Tensor]:
    """`w = (1 + 0.5 * zscore(log(s + 1e-8))).clamp(0.5, 5.0)`, s as in `token_saliencies`.

    Weights of a response's tokens, by which a trainer multiplies the sequence's advantage, in both
    branches of the clipped objective: `w.detach() * A` (arXiv 2606.04889, official code).

    Args:
        policy: a Hugging Face causal LM; its weights get no gradients.
        prompt_ids: N lists of token ids, at least one each.
        completion_ids: N lists of token ids, what the policy sampled; may be empty.
        answer_spans: N of AnswerSpan in completion tokens, None where there is no answer, or a
            plain (start, stop), all of it content. `find_answer_spans` finds them.
        advantages: N numbers; only their signs count. None with polarity "both".
        polarity: which rows are weighted by their gradient, the others have w = 1. `"wrong"`,
            those with A <= 0 (the configuration that was published); `"correct"`, those with
            A > 0; `"both"`.
        leaf: where s is read. `"embeddings"`; `"first"`, hidden state 1; `"middle"`, hidden state
            L // 2; `"last"`, hidden state L - 1; or a number 0 <= leaf < L, of L + 1 hidden states.
        shift: 1, token t has the s of position t - 1, the input that predicts it (official code);
            0, its own.
        overrides: last of all, and in every row with a span, whatever its polarity: w = 5 for the
            answer's content, w = 1 for the marker, what closes it, and everything behind.
        after_span: `"included"`, tokens behind the span have s = 0 and enter mean and std (official
            code); `"excluded"`, they do not, and have w = 1.
        temperature: the one that the completions were sampled at.
        engine, max_tokens: as in `attribute_batch`.

    Returns N tensors `[T_i]` float32 on the policy's device, computed in float64 from s. All ones
    where there is no span; weights are not renormalised.

    Known from the official code: the formula, the zeros behind the span, the shift, the order of
    the overrides. Our choice: `after_span="excluded"` and `shift=0`, which take the quirks out.

    Raises InputError for arguments that differ in length, unknown options, spans outside their
    completion or out of order, advantages that are missing or not finite, and whatever
    `token_saliencies` raises; InputTypeError for what cannot be read.
    """
    _check_rule(polarity, overrides, after_span)
    check_lengths(prompt_ids=prompt_ids, completion_ids=completion_ids, answer_spans=answer_spans)
    signs = _read_advantages(advantages, len(prompt_ids), polarity)
    policy = base_model(policy)
    rollouts = read_rollouts(policy, prompt_ids, completion_ids)
    spans = read_answer_spans(answer_spans, [len(r.response_ids) for r in rollouts])
    wanted = [
        span if _applies(polarity, advantage) else None
        for span, advantage in zip(spans, signs, strict=True)
    ]
    chosen = choose_engine(policy, engine)
    found = _saliencies(policy, chosen, rollouts, wanted, leaf, shift, temperature, max_tokens)
    device = policy.get_input_embeddings().weight.device
    weights = []
    for rollout, span, advantage, saliency in zip(rollouts, spans, signs, found, strict=True):
        if saliency is None:
            saliency = torch.zeros(len(rollout.response_ids), device=device)
        rule = saliency_weights(
            saliency,
            span,
            advantage,
            polarity=polarity,
            overrides=overrides,
            after_span=after_span,
        )
        weights.append(rule.float())
    return weights


def token_saliencies(
    policy: Any,
    prompt_ids: Sequence[Any],
    completion_ids: Sequence[Any],
    answer_spans: Sequence[Any],
    *,
    leaf: str | int = "embeddings",
    shift: int = 1,
    temperature: float = 1.0,
    engine: str = "auto",
    max_tokens: int | None = None,
) -> list[Tensor | None]:
    """`s[t] = (grad(L, E)[t - shift] * E[t - shift]).norm()`, `L = -logps[start:stop].sum()`.

    `logps = log_softmax(logits / temperature)` of the completion's tokens, in nats, and E the input
    embeddings or a hidden state (arXiv 2606.04889, official code). With shift 1 the first token has
    the s of the prompt's last position. Tokens behind the span have s = 0; with shift 0 the span's
    last token too, which nothing in L comes after.

    Args: see `token_weights`.

    Returns N entries: None where there is no span, else `[T_i]` on the policy's device, float32
    (float64 for a float64 model). Differences of p and one-hot are never formed as 1 - p, so that a
    sure answer keeps its digits.

    Computed: of every row with a span, prompt and completion up to the token before the span's
    last, what rows begin alike once; back from the prompt's last position on.

    Raises InputError for arguments that differ in length, empty prompts, ids outside the
    vocabulary, sequences past the model's positions, spans outside their completion or out of
    order, unknown leaves, a shift other than 0 and 1, a temperature that is not positive, and
    logits or gradients that are not finite; InputTypeError for what cannot be read. Each names its
    row.
    """
    check_lengths(prompt_ids=prompt_ids, completion_ids=completion_ids, answer_spans=answer_spans)
    policy = base_model(policy)
    rollouts = read_rollouts(policy, prompt_ids, completion_ids)
    spans = read_answer_spans(answer_spans, [len(r.response_ids) for r in rollouts])
    chosen = choose_engine(policy, engine)
    return _saliencies(policy, chosen, rollouts, spans, leaf, shift, temperature, max_tokens)


def saliency_weights(
    saliency: Tensor,
    span: AnswerSpan | None,
    advantage: float | None = None,
    *,
    polarity: str = "wrong",
    overrides: bool = True,
    after_span: str = "included",
) -> Tensor:
    """The rule of `token_weights` for one response: s `[T]` to w `[T]`, float64.

    Raises InputError for unknown options, and without an advantage where the polarity needs one.
    """
    _check_rule(polarity, overrides, after_span)
    wide = saliency.double()
    weights = torch.ones_like(wide)
    if span is None:
        return weights
    if advantage is None and polarity != "both":
        raise InputError("the advantage is missing", expected=f"a number for polarity {polarity!r}")
    if _applies(polarity, advantage):
        stop = len(wide) if after_span == "included" else span.stop
        logs = (wide[:stop] + _FLOOR).log()
        centred = logs - logs.mean()
        scores = centred / (centred.square().mean() + _FLOOR).sqrt()
        weights[:stop] = (1.0 + _SLOPE * scores).clamp(_LEAST, _MOST)
    if overrides:
        weights[span.start :] = 1.0
        weights[span.content_start : span.content_stop] = _CONTENT
    return weights


class SaliencySignal(ReadsNoLinears):
    """Minus the log-likelihood of each sequence's answer, and norms at the leaf."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        spans: Sequence[AnswerSpan],
        leaf: int,
        shift: int,
        temperature: float,
    ) -> None:
        self.leaf = leaf
        self.sequences: list[PackedSequence] = []
        self._rollouts = rollouts
        self._labels = [rollout.label for rollout in rollouts]
        self._temperature = temperature
        self._saliencies: dict[int, Tensor] = {}
        self._exponents: dict[int, int] = {}
        for rollout, span in zip(rollouts, spans, strict=True):
            first = len(rollout.prompt_ids)
            # The last token of the span is predicted, and predicts nothing that counts.
            ids = [*rollout.prompt_ids, *rollout.response_ids[: span.stop - 1]]
            reads = tuple(range(first + span.start - 1, first + span.stop - 1))
            self.sequences.append(PackedSequence(ids, first - shift, reads, rollout.label))

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        """`(softmax(logits / temperature) - onehot) / temperature`, arXiv 2606.04889."""
        check_finite(logits, reads, self._labels)
        target = torch.tensor([self._target(read) for read in reads]).to(logits.device)
        scaled = logits if self._temperature == 1.0 else logits / self._temperature
        values, scale = objective_cotangents(scaled, target, None, "logp")
        factors = scale.ldexp(torch.tensor(self._shifts(reads, scale)).to(scale.device))
        return Cotangents(range(len(reads)), values.mul_(-factors[:, None] / self._temperature))

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        """`s = (grads * values).norm(dim=-1)`; float32 or wider."""
        norms = (grads * values[:, None]).norm(dim=-1)  # [n, lanes]
        for lane, sequence in enumerate(rows.lanes):
            first = self.sequences[sequence].backward_start
            if sequence not in self._saliencies:
                count = len(self._rollouts[sequence].response_ids)
                self._saliencies[sequence] = norms.new_zeros(count)
            start, stop = max(rows.start, first), rows.stop
            if start < stop:
                column = norms[start - rows.start :, lane]
                self._saliencies[sequence][start - first : stop - first] = column

    def saliency(self, sequence: int) -> Tensor:
        """s `[T]` of one sequence."""
        found = self._saliencies[sequence]
        if not bool(found.isfinite().all()):
            raise InputError(
                "the policy's gradients are not finite",
                index=self._labels[sequence],
                fix="float16 policies may need bfloat16 or float32.",
            )
        return found.ldexp(torch.tensor(-self._exponents[sequence]))

    def _target(self, read: Read) -> int:
        rollout = self._rollouts[read.sequence]
        return int(rollout.response_ids[read.position + 1 - len(rollout.prompt_ids)])

    def _shifts(self, reads: Sequence[Read], scale: Tensor) -> list[int]:
        """Powers of two that bring each sequence's cotangents near one, so that a sure answer does
        not vanish in float16.

        Only for sequences that this chunk holds all reads of: the others' largest cotangent is not
        known yet. Scaling by powers of two changes no digit elsewhere.
        """
        largest: dict[int, float] = {}
        counts: dict[int, int] = {}
        for read, size in zip(reads, scale.tolist(), strict=True):
            largest[read.sequence] = max(size, largest.get(read.sequence, 0.0))
            counts[read.sequence] = counts.get(read.sequence, 0) + 1
        for sequence, count in counts.items():
            whole = count == len(self.sequences[sequence].reads)
            exponent = -math.frexp(largest[sequence])[1] if whole else 0
            self._exponents[sequence] = min(exponent, _HIGHEST_EXPONENT)
        return [self._exponents[read.sequence] for read in reads]


def _saliencies(
    policy: Any,
    engine: Engine,
    rollouts: Sequence[Rollout],
    spans: Sequence[AnswerSpan | None],
    leaf: str | int,
    shift: int,
    temperature: float,
    max_tokens: int | None,
) -> list[Tensor | None]:
    """`token_saliencies` of arguments that were read."""
    hidden_state = _leaf_number(policy, leaf)
    if isinstance(shift, bool) or not isinstance(shift, int) or shift not in (0, 1):
        raise InputError("unknown shift", expected="0 | 1", got=repr(shift))
    check_temperature(temperature)
    check_max_tokens(max_tokens)
    weight = policy.get_input_embeddings().weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    found: list[Tensor | None] = [
        None
        if span is None
        else torch.zeros(len(rollout.response_ids), dtype=wide, device=weight.device)
        for rollout, span in zip(rollouts, spans, strict=True)
    ]
    # With shift 0 nothing that is read comes before an answer that is the first token alone.
    rows = [i for i, span in enumerate(spans) if span is not None and span.stop > 1 - shift]
    signal = SaliencySignal(
        [rollouts[i] for i in rows],
        [span for i in rows if (span := spans[i]) is not None],
        hidden_state,
        shift,
        float(temperature),
    )
    with plain_torch():
        run = engine.run(signal.sequences, signal, max_tokens)
        for place, row in enumerate(rows):
            found[row] = signal.saliency(place)
    logger.info(
        "GRAIL, %s engine (%s): %d of %d rows, %d of %d forward rows, %d backward rows",
        engine.name, run.backend, len(rows), len(rollouts), run.rows_forward,
        run.rows_unshared, run.rows_backward,
    )  # fmt: skip
    return found


def _applies(polarity: str, advantage: float | None) -> bool:
    """Whether a row is weighted by its gradient."""
    if polarity == "both" or advantage is None:
        return True
    return advantage > 0 if polarity == "correct" else advantage <= 0


def _leaf_number(policy: Any, leaf: Any) -> int:
    """The hidden state that a leaf names, 0 for the embeddings."""
    named = isinstance(leaf, str) and leaf in LEAVES
    if not named and (isinstance(leaf, (bool, str)) or not isinstance(leaf, int)):
        raise InputError(
            "unknown leaf",
            expected=" | ".join(map(repr, LEAVES)) + " | 0 <= number < layers",
            got=repr(leaf),
        )
    if leaf in ("embeddings", 0):
        return 0
    config = policy.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = int(config.num_hidden_layers)
    number = {"first": 1, "middle": layers // 2, "last": layers - 1}.get(leaf, leaf)
    if not 0 <= number < layers:
        raise InputError(
            "a leaf is none of the model's hidden states before its last layer",
            expected=f"0 <= leaf < {layers}",
            got=repr(leaf) if leaf == number else f"{leaf!r}, hidden state {number}",
        )
    return int(number)


def _check_rule(polarity: Any, overrides: Any, after_span: Any) -> None:
    for name, value, known in (
        ("polarity", polarity, POLARITIES),
        ("after_span", after_span, AFTER_SPAN),
        ("overrides", overrides, (True, False)),
    ):
        if value not in known:
            raise InputError(
                f"unknown {name}", expected=" | ".join(map(repr, known)), got=repr(value)
            )


def _read_advantages(advantages: Any, count: int, polarity: str) -> list[float | None]:
    """N finite numbers; N times None where none are needed and given."""
    if advantages is None:
        if polarity != "both":
            raise InputError(
                "advantages are missing",
                expected=f"N numbers, as polarity is {polarity!r}",
                fix='Only polarity="both" does without.',
            )
        return [None] * count
    values = advantages.tolist() if hasattr(advantages, "tolist") else advantages
    check_lengths(prompt_ids=range(count), advantages=values)
    numbers: list[float | None] = []
    for row, value in enumerate(values):
        value = value.item() if hasattr(value, "item") else value  # of numpy or torch
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputTypeError(
                "an advantage is no number", expected="N numbers", got=repr(value)[:80], index=row
            )
        if not math.isfinite(value):
            raise InputError(
                "an advantage is not finite", expected="finite numbers", got=value, index=row
            )
        numbers.append(float(value))
    return numbers
