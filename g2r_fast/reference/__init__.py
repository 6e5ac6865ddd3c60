"""The slow truth: every formula in plain float64 PyTorch, for tests and for users who doubt."""

from __future__ import annotations

from g2r_fast.reference.advantages import mean_attribution, token_advantages
from g2r_fast.reference.compare import relative_error
from g2r_fast.reference.decoder import ReferenceDecoder
from g2r_fast.reference.g2rl import (
    bounded_novelty,
    cosine_similarities,
    gradient_feature,
    response_novelty,
    shaped_rewards,
    token_distributions,
    token_feature,
)
from g2r_fast.reference.grad2reward import (
    ResponseReward,
    aggregate_rewards,
    argmax_verdict,
    attribution,
    input_gradients,
    objective_cotangent,
    objective_value,
    outcome_rewards,
    pullback,
    response_reward,
    response_score,
    token_scores,
)
from g2r_fast.reference.grail import answer_nll, answer_saliency, answer_weights
from g2r_fast.reference.oracles import central_differences, forward_mode_scores
from g2r_fast.reference.vigor import (
    completion_gradients,
    completion_nll,
    gradient_norm,
    rank_rewards,
)

__all__ = [
    "ReferenceDecoder",
    "ResponseReward",
    "aggregate_rewards",
    "answer_nll",
    "answer_saliency",
    "answer_weights",
    "argmax_verdict",
    "attribution",
    "bounded_novelty",
    "central_differences",
    "completion_gradients",
    "completion_nll",
    "cosine_similarities",
    "forward_mode_scores",
    "gradient_feature",
    "gradient_norm",
    "input_gradients",
    "mean_attribution",
    "objective_cotangent",
    "objective_value",
    "outcome_rewards",
    "pullback",
    "rank_rewards",
    "relative_error",
    "response_novelty",
    "response_reward",
    "response_score",
    "shaped_rewards",
    "token_advantages",
    "token_distributions",
    "token_feature",
    "token_scores",
]
