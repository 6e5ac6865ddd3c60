"""From scores per judgement to rewards per policy token (arXiv 2602.01791, Eqs. 4, 5, 14, 15)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .checks import given_verdicts
from .grad2reward import AttributionConfig, EmbeddingScores, OutcomeSignal, VerdictSignal
from .judge import Judge
from .judgements import Judgements
from .ops import attribution_rewards
from .reward_model import RewardModel
from .rubric import Rubric

__all__ = [
    "AttributionSummary",
    "OutcomeRewards",
    "PolicyAttributions",
    "TokenRewards",
    "VerdictRewards",
]


@dataclass(frozen=True)
class TokenRewards:
    """What one response earns, and where."""

    score: float
    token_rewards: Tensor  # [T] float32
    mean_attribution: Tensor  # [T] float32
    attributions: list[Tensor | None]  # K of [T] float32, None for False items; [] if not kept


class PolicyAttributions:
    """`alpha_j = softmax(b_j / tau)` of judgements, and `r = sum_j w_j alpha_j` of each response.

    In one call for a whole batch, over the tokens of the model that were attributed; the sums are
    then brought onto policy tokens, which a sum commutes with. arXiv 2602.01791, Eqs. 4 and 5.

    weights: w of every judgement that is attributed, ascending by judgement.
    """

    def __init__(
        self,
        signal: EmbeddingScores,
        batch: Judgements,
        weights: Mapping[int, float],
        config: AttributionConfig,
        summary: AttributionSummary,
    ) -> None:
        self._batch = batch
        self._uniform = config.readout == "uniform"
        # The judgements of a response differ in what comes after it: all attribute these tokens.
        self._parts = [batch.attributed_parts(of) for of in batch.items_of]
        counts = [sum(stop - start for start, stop in parts) for parts in self._parts]
        starts = [0, *accumulate(counts)]
        self._row_of = {j: row for row, of in enumerate(batch.items_of) for j in of}
        rows = [self._row_of[j] for j in weights]
        nothing = torch.zeros(0, dtype=torch.float64, device=signal.device)
        found = zip(weights, signal.all_scores(list(weights)), strict=True)
        alpha, rewards = attribution_rewards(
            torch.cat([nothing, *(self._attributed(j, scores) for j, scores in found)]),
            [counts[row] for row in rows],
            list(weights.values()),
            [starts[row] for row in rows],
            starts[-1],
            temperature=config.temperature,
            standardise=config.standardise,
        )
        self._rewards = rewards.split(counts)
        self._alphas = dict(zip(weights, alpha.split([counts[row] for row in rows]), strict=True))
        summary.add_all(list(self._alphas.values()))

    def alpha(self, judgement: int) -> Tensor:
        """alpha of one judgement per policy token `[T]` float64, 0 where nothing is attributed."""
        return self._to_policy(self._row_of[judgement], self._alphas[judgement])

    def rewards(self, row: int) -> Tensor:
        """`sum_j w_j alpha_j` of one response per policy token `[T]` float64."""
        return self._to_policy(row, self._rewards[row])

    def magnitudes(self, row: int, weights: Mapping[int, float]) -> Tensor:
        """`sum_j |w_j| alpha_j`, as `rewards`."""
        if all(weight >= 0.0 for weight in weights.values()):
            return self.rewards(row)
        total = torch.zeros_like(self._rewards[row])
        for judgement, weight in weights.items():
            total += abs(weight) * self._alphas[judgement]
        return self._to_policy(row, total)

    def _attributed(self, judgement: int, scores: Tensor) -> Tensor:
        """b of the attributed tokens, one part behind the other; all alike where none is read."""
        parts = self._parts[self._row_of[judgement]]
        if self._uniform:
            scores = torch.zeros_like(scores)
        if len(parts) < 2:
            return scores
        first = parts[0][0]
        return torch.cat([scores[start - first : stop - first] for start, stop in parts])

    def _to_policy(self, row: int, values: Tensor) -> Tensor:
        """Sums over alphas of one response, `[attributed tokens]`, per policy token `[T]`."""
        alignment, parts = self._batch.responses[row].alignment, self._parts[row]
        policy = values.new_zeros(alignment.policy_count)
        if alignment.is_identity:
            at = 0
            for start, stop in parts:
                policy[start:stop] = values[at : at + stop - start]
                at += stop - start
            return policy
        tokens = [token for start, stop in parts for token in range(start, stop)]
        own = self._batch.own_spans(row)
        if self._uniform:  # over policy tokens: spelling one out must not pay
            read = alignment.policy_tokens(tokens, own)
            policy[read] = values.sum() / max(1, len(read))
            return policy
        # Several judge tokens may spell one policy token: their shares add up on it.
        return alignment.to_policy(values, tokens, own)


class VerdictRewards:
    """The verdicts of a Judge: what its signal asks, and what every response earns by them."""

    def __init__(
        self,
        judge: Judge,
        batch: Judgements,
        items: list[list[Rubric]],
        config: AttributionConfig,
        verdict: str | Sequence[Sequence[bool]],
        generator: torch.Generator | None,
    ) -> None:
        self.batch, self.items, self.config = batch, items, config
        self.summary = AttributionSummary(config)
        self.signal = VerdictSignal(
            batch.attributed_spans(),
            judge.true_id,
            judge.false_id,
            config,
            given_verdicts(verdict, [len(row) for row in items]),
            _draws(verdict, len(batch.requests), generator),
            judge.device,
            batch.labels(),
        )

    def rows(self, own_tokens: Sequence[Tensor], keep: bool = False) -> list[TokenRewards]:
        """Every response; own_tokens: N of `[T]` bool; keep: its attributions too."""
        pairs = zip(self.batch.items_of, self.items, strict=True)
        weights = {j: item.weight for of, items in pairs for j, item in zip(of, items, strict=True)}
        earning = {j: weight for j, weight in weights.items() if self.signal.verdicts[j]}
        shares = PolicyAttributions(self.signal, self.batch, earning, self.config, self.summary)
        return [self._row(row, shares, earning, own, keep) for row, own in enumerate(own_tokens)]

    def _row(
        self,
        row: int,
        shares: PolicyAttributions,
        earning: Mapping[int, float],
        own_tokens: Tensor,
        keep: bool,
    ) -> TokenRewards:
        """`r = sum_k 1[z_k] w_k alpha_k / sum_k max(w_k, 0)` for one response.

        The score is the same sum without alpha (arXiv 2602.01791, Eqs. 1 and 5 over a rubric); both
        are 0 where no weight is positive. `mean_attribution` is
        `sum_k 1[z_k] |w_k| alpha_k / sum_k 1[z_k] |w_k|`, uniform over the response's own tokens
        where no item came out True.
        """
        judgements = self.batch.items_of[row]
        true = {j: earning[j] for j in judgements if j in earning}
        positive = math.fsum(max(item.weight, 0.0) for item in self.items[row])
        magnitude = sum(map(abs, true.values()))
        rewards = shares.rewards(row)
        if magnitude > 0.0:
            mean = shares.magnitudes(row, true) / magnitude
        else:
            mean = own_tokens / own_tokens.sum().clamp(min=1)
        kept = [shares.alpha(j).float() if j in true else None for j in judgements] if keep else []
        return TokenRewards(
            score=sum(true.values()) / positive if positive > 0.0 else 0.0,
            token_rewards=(rewards / positive if positive > 0.0 else rewards.zero_()).float(),
            mean_attribution=mean.float(),
            attributions=kept,
        )

    def verdicts(self) -> list[list[bool]]:
        return [[self.signal.verdicts[j] for j in of] for of in self.batch.items_of]

    def verdict_logps(self) -> list[list[float]]:
        return [[self.signal.logps[j] for j in of] for of in self.batch.items_of]

    def counts(self) -> dict[str, int]:
        without = sum(all(r.weight <= 0 for r in row) for row in self.items)
        return {"rubrics_without_positive_weight": without}


class OutcomeRewards:
    """The values of a RewardModel, and what every response earns by them."""

    def __init__(self, judge: RewardModel, batch: Judgements, config: AttributionConfig) -> None:
        self.batch, self.config = batch, config
        self.add_outcome = judge.add_outcome
        self.summary = AttributionSummary(config, has_verdicts=False)
        labels = [f"row {i}" for i in range(len(batch.requests))]
        self.signal = OutcomeSignal(batch.attributed_spans(), config.readout, judge.device, labels)

    def rows(self, own_tokens: Sequence[Tensor], keep: bool = False) -> list[TokenRewards]:
        """Every response; own_tokens: N of `[T]` bool; keep: its attribution too."""
        values = {row: self.signal.values[row] for row in range(len(own_tokens))}
        shares = PolicyAttributions(self.signal, self.batch, values, self.config, self.summary)
        return [self._row(row, shares, own, keep) for row, own in enumerate(own_tokens)]

    def _row(
        self, row: int, shares: PolicyAttributions, own_tokens: Tensor, keep: bool
    ) -> TokenRewards:
        """`r = V alpha`, and V added to the last token's reward (arXiv 2602.01791, Eqs. 14 and 15).

        The rewards sum to 2 V, or to V where `add_outcome` is False; where a response has tokens
        and none of them was read (a final EOS alone), alpha is zero and only the addition is left.
        The last of the response's own tokens takes the addition.
        """
        value, rewards = self.signal.values[row], shares.rewards(row)
        own = [stop for start, stop in self.batch.own_spans(row) if start < stop]
        if self.add_outcome and own:
            rewards[max(own) - 1] += value
        attribution = shares.alpha(row).float()
        return TokenRewards(
            score=value,
            token_rewards=rewards.float(),
            mean_attribution=attribution,
            attributions=[attribution] if keep else [],
        )

    def verdicts(self) -> list[list[bool]]:
        return [[] for _ in self.batch.responses]

    def verdict_logps(self) -> list[list[float]]:
        return [[] for _ in self.batch.responses]

    def counts(self) -> dict[str, int]:
        return {}


class AttributionSummary:
    """Entropy and concentration of every alpha of a batch, and the alarms they raise."""

    # A sure judge sends back so little that alpha is uniform to three digits.
    FLAT = 0.999
    SPIKED = 0.9
    PADDED = 2**24  # elements

    def __init__(self, config: AttributionConfig, has_verdicts: bool = True) -> None:
        self.config = config
        self.has_verdicts = has_verdicts
        self._rows: list[Tensor] = []

    def add(self, alpha: Tensor) -> None:
        """Take one alpha `[T]` into account; T < 2 says nothing."""
        count = len(alpha)
        if count < 2:
            return
        entropy = torch.special.entr(alpha).sum() / math.log(count)
        top = alpha.topk(math.ceil(count / 10)).values
        self._rows.append(torch.stack([entropy, top.sum(), top[0]]))

    def add_all(self, alphas: Sequence[Tensor]) -> None:
        """`add` of each; on a GPU in one go per `PADDED` elements instead of a few operations."""
        if not alphas or alphas[0].device.type == "cpu":
            for alpha in alphas:
                self.add(alpha)
            return
        told = sorted((alpha for alpha in alphas if len(alpha) > 1), key=len, reverse=True)
        while told:
            many = max(1, self.PADDED // len(told[0]))
            self._rows.extend(_figures(told[:many]).unbind(0))
            told = told[many:]

    def figures(self) -> dict[str, float]:
        """Means over all True items: `entropy` (1 is uniform), `top10_mass`, `top1_mass`."""
        if not self._rows:
            return {}
        entropy, top10, top1 = torch.stack(self._rows).mean(0).tolist()
        return {"entropy": entropy, "top10_mass": top10, "top1_mass": top1}

    def alarms(self) -> list[str]:
        """What is wrong with the attributions, and what to do about it."""
        figures = self.figures()
        if not figures or self.config.readout == "uniform":  # flat on purpose
            return []
        alarms = []
        if figures["entropy"] > self.FLAT:
            advice = (
                'A sure judge sends almost no gradient back; use tau="auto" or objective="logodds" '
                "with a small tau."
                if self.has_verdicts
                else 'Use tau="auto" or a smaller tau.'
            )
            alarms.append(f"attribution is flat: every token gets the same reward. {advice}")
        if figures["top1_mass"] > self.SPIKED:
            alarms.append(
                "attribution lies on one token per item: use a larger tau, or look at whether the "
                "judge is being gamed."
            )
        return alarms


def _figures(alphas: Sequence[Tensor]) -> Tensor:
    """Entropy, top-10 % mass and top-1 mass `[J, 3]` of alphas of two tokens or more."""
    device = alphas[0].device
    lengths = torch.tensor([len(alpha) for alpha in alphas])
    width = int(lengths.max())
    starts = torch.arange(len(alphas)) * width - (lengths.cumsum(0) - lengths)
    index = torch.arange(int(lengths.sum())) + starts.repeat_interleave(lengths)
    padded = alphas[0].new_zeros(len(alphas) * width)
    padded[index.to(device)] = torch.cat(list(alphas))
    padded = padded.view(len(alphas), width)
    counts = lengths.to(device, padded.dtype)
    entropy = torch.special.entr(padded).sum(1) / counts.log()
    top = padded.sort(1, descending=True).values
    tenth = ((lengths + 9) // 10).to(device)
    inside = torch.arange(width, device=device) < tenth[:, None]
    return torch.stack([entropy, (top * inside).sum(1), top[:, 0]], 1)


def _draws(
    verdict: str | Sequence[Sequence[bool]], count: int, generator: torch.Generator | None
) -> list[float] | None:
    """One uniform number per judgement, in row order, so that packing cannot change a draw."""
    if verdict != "sample":
        return None
    device = generator.device if generator is not None else "cpu"
    draws: list[float] = torch.rand(count, generator=generator, device=device).tolist()
    return draws
