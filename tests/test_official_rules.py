"""The transcriptions of the official rules, on cases small enough for paper and pencil."""

from __future__ import annotations

import math

import pytest
import torch
from official_rules import (
    g2rl_feature,
    g2rl_novelty,
    g2rl_reference_weights,
    g2rl_shaped_rewards,
    g2rl_similarities,
    g2rl_token_features,
    grail_saliency,
    grail_weights,
    vigor_norm,
    vigor_rank_rewards,
)
from tiny_models import random_ids, tiny_model
from torch import nn

PROMPT, COMPLETION = random_ids(5, 1).tolist(), random_ids(9, 2).tolist()


class Bigram(nn.Module):
    """Logits of the next token are `h W^T`, h the current token's embedding; all by hand."""

    def __init__(self, embed, head):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embed, freeze=False)
        self.lm_head = nn.Linear(*reversed(head.shape), bias=False)
        self.lm_head.weight = nn.Parameter(head)
        self.device = embed.device

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        twice = 2 * x  # hidden state 1
        logits = self.lm_head(twice) / 2
        return type("Out", (), {"logits": logits, "hidden_states": (x, twice)})()


def bigram():
    embed = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    return Bigram(embed, head)


def softmax(*values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


# GRAIL


def test_saliency_by_hand():
    """Token 1 of the completion, the span, is predicted by token 0, whose embedding is (1, 0)."""
    found = grail_saliency(bigram(), [1], [0, 2, 1], (1, 1, 2, 2))
    p = softmax(1, 0, 0)
    # dL/de = sum_v p_v W_v - W_2; times e = (1, 0), the norm is |p_0|.
    assert found.tolist() == pytest.approx([0.0, p[0], 0.0], rel=1e-12)
    unshifted = grail_saliency(bigram(), [1], [0, 2, 1], (1, 1, 2, 2), shift=0)
    assert unshifted.tolist() == pytest.approx([p[0], 0.0, 0.0], rel=1e-12)
    hidden = grail_saliency(bigram(), [1], [0, 2, 1], (1, 1, 2, 2), leaf_index=1)
    assert hidden.tolist() == pytest.approx([0.0, p[0], 0.0], rel=1e-12)  # half the gradient of 2 e
    half = softmax(0.5, 0, 0)[0] / 2  # temperature 2: half the logits, half the gradient
    found = grail_saliency(bigram(), [1], [0, 2, 1], (1, 1, 2, 2), temperature=2.0)
    assert found.tolist() == pytest.approx([0.0, half, 0.0], rel=1e-12)


def test_saliency_is_of_the_sum_and_counts_the_prompts_last_token():
    found = grail_saliency(bigram(), [1], [0, 2], (0, 0, 1, 2))
    # The prompt's token has the embedding (0, 2), so logits (0, 2, 0) and |2 p_1|.
    wanted = [2 * softmax(0, 2, 0)[1], softmax(1, 0, 0)[0]]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    assert grail_saliency(bigram(), [1], [0, 2], None) is None


def test_saliency_of_a_decoder_is_zero_behind_the_span_and_nowhere_else():
    model = tiny_model("qwen2")
    for leaf in (0, 1, 2):
        found = grail_saliency(model, PROMPT, COMPLETION, (3, 4, 5, 6), leaf_index=leaf)
        assert (found[:6] > 0).all() and (found[6:] == 0).all()


def test_weights_by_hand():
    """u = 0, -ln 4, -ln 16 and log 1e-8, the last two tokens standing behind the span."""
    saliency = torch.tensor([1.0, 0.25, 1 / 16, 0.0, 0.0])
    span = (1, 2, 3, 3)
    u = [0.0, -math.log(4), -math.log(16), -8 * math.log(10), -8 * math.log(10)]
    mean = sum(u) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in u) / 5)
    plain = [max(0.5, 1 + 0.5 * (x - mean) / std) for x in u]
    found = grail_weights(saliency, span, -1.0, overrides=False)
    assert found.tolist() == pytest.approx(plain, rel=1e-6)
    assert plain[3] == 0.5 and plain[0] > plain[1] > plain[2] > 1  # the zeros lift all others
    found = grail_weights(saliency, span, -1.0)
    assert found.tolist() == pytest.approx([plain[0], 1.0, 5.0, 1.0, 1.0], rel=1e-6)
    left_out = grail_weights(saliency, span, -1.0, overrides=False, after_span="excluded")
    wide = math.sqrt(1.5) / 2
    assert wide > 0.5  # so the third is clamped
    assert left_out.tolist() == pytest.approx([1 + wide, 1.0, 0.5, 1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize(
    ("polarity", "advantage", "weighted"),
    [
        ("both", 1.0, True), ("both", -1.0, True), ("both", 0.0, True),
        ("correct", 1.0, True), ("correct", -1.0, False), ("correct", 0.0, False),
        ("wrong", 1.0, False), ("wrong", -1.0, True), ("wrong", 0.0, True),
    ],
)  # fmt: skip
def test_polarity_comes_before_the_overrides(polarity, advantage, weighted):
    saliency, span = torch.tensor([4.0, 1.0, 0.1, 0.0]), (2, 2, 3, 3)
    found = grail_weights(saliency, span, advantage, polarity).tolist()
    assert found[2:] == [5.0, 1.0]
    assert (found[:2] != [1.0, 1.0]) == weighted


def test_weights_without_a_span_or_without_spread():
    assert grail_weights(None, None, -1.0, length=3).tolist() == [1.0] * 3
    same = grail_weights(torch.full((3,), 0.7), (2, 2, 3, 3), -1.0, overrides=False)
    assert same.tolist() == pytest.approx([1.0] * 3, rel=1e-9)
    one_of_many = torch.ones(1000)
    one_of_many[0] = 1e6
    found = grail_weights(one_of_many, (999, 999, 1000, 1000), -1.0, overrides=False)
    assert found[0] == 5.0 and float(found[1:].max()) < 1


# G2RL


def test_features_by_hand():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0]])
    phi = g2rl_token_features(logits, [2, 1], weight)
    # p = 1/3 each: W_2 - (2/3, 2/3); p = 1/2, 1/4, 1/4: W_1 - (3/4, 1/2).
    wanted = torch.tensor([[1 / 3, 1 / 3], [-0.75, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(phi, wanted, rtol=1e-7, atol=0)
    torch.testing.assert_close(g2rl_feature(phi), wanted.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        g2rl_feature(phi, [3, 1]), 0.75 * wanted[0] + 0.25 * wanted[1], rtol=1e-7, atol=0
    )
    hot = g2rl_token_features(2 * logits, [2, 1], weight, temperature=2.0)
    torch.testing.assert_close(hot, wanted, rtol=1e-7, atol=0)  # no further factor 1/2


def test_features_are_gradients_of_log_p():
    """Eq. 7 is what autograd finds for the head's input, at temperature one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    hidden = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    logits, ids = hidden @ weight.T, [6, 0, 3]
    logp = torch.log_softmax(logits, -1)[range(3), ids].sum()
    (grad,) = torch.autograd.grad(logp, hidden)
    torch.testing.assert_close(g2rl_token_features(logits, ids, weight), grad, rtol=1e-12, atol=0)


def test_novelty_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    r = math.sqrt(0.5)
    torch.testing.assert_close(
        g2rl_similarities(features),
        torch.tensor([[1, 0, r], [0, 1, r], [r, r, 1]], dtype=torch.float64),
    )
    rewards, e = [1.0, -1.0, 1.0], math.exp(2)
    weights = g2rl_reference_weights(rewards)
    wanted = [[0, 1 / (1 + e), e / (1 + e)], [0.5, 0, 0.5], [e / (1 + e), 1 / (1 + e), 0]]
    assert weights.tolist() == [pytest.approx(row, rel=1e-12) for row in wanted]
    # Squares of the similarities are 0 or 1/2.
    nu = g2rl_novelty(features, rewards)
    assert nu.tolist() == pytest.approx([1 - 0.5 * e / (1 + e), 0.75, 0.5], rel=1e-6)


def test_shaped_rewards_by_hand():
    nu, rewards = torch.tensor([0.2, 0.6, 1.0]), [1.0, -1.0, -1.0]
    equation = g2rl_shaped_rewards(nu, rewards)
    assert equation.tolist() == pytest.approx([1.0, -0.5, 0.0], abs=1e-6)  # -1 + nu_bar
    prose = g2rl_shaped_rewards(nu, rewards, variant="prose")
    assert prose.tolist() == pytest.approx([1.0, -1.5, -2.0], rel=1e-6)
    assert g2rl_shaped_rewards(nu, rewards, lam=5.0, variant="prose").tolist() == pytest.approx(
        [1.0, -3.0, -3.0]
    )
    assert g2rl_shaped_rewards(torch.full((3,), 0.3), rewards).tolist() == rewards
    assert g2rl_shaped_rewards(g2rl_novelty(torch.ones(1, 2), [1.0]), [1.0]).tolist() == [1.0]


# VIGOR


def test_norm_by_hand():
    """Prompt (1), completion (0, 2): the rows that predict have the embeddings (0, 2), (1, 0)."""
    model = bigram()
    first, second = softmax(0, 2, 0), softmax(1, 0, 0)
    rho = [[first[0] - 1, first[1], first[2]], [second[0], second[1], second[2] - 1]]
    # d loss / d W[v] = 1/2 sum_t rho_t[v] h_t
    head = sum((rho[1][v] / 2) ** 2 + (2 * rho[0][v] / 2) ** 2 for v in range(3))
    # d loss / d e_t = 1/2 sum_v rho_t[v] W[v]; tokens 1 and 0 have a row each, token 2 none
    embed = sum((row[v] / 2) ** 2 for row in rho for v in (0, 1))
    assert vigor_norm(model, [1], [0, 2], "lm_head") == pytest.approx(math.sqrt(head), rel=1e-12)
    whole = vigor_norm(model, [1], [0, 2], "all")
    assert whole == pytest.approx(math.sqrt(head + embed), rel=1e-12)
    model.lm_head.requires_grad_(False)
    found = vigor_norm(model, [1], [0, 2])
    assert found == pytest.approx(math.sqrt(embed), rel=1e-12)
    assert not model.lm_head.weight.requires_grad


def test_a_tied_weight_is_one_parameter():
    """Its gradient is the sum of both uses, so squares do not add up: there is a cross term."""
    model = tiny_model("qwen2", tie_word_embeddings=True, dtype=torch.float64)
    apart = tiny_model("qwen2", dtype=torch.float64)
    apart.load_state_dict(
        {**model.state_dict(), "lm_head.weight": model.model.embed_tokens.weight.clone()}
    )
    tied, untied = (vigor_norm(m, PROMPT, COMPLETION, "all") for m in (model, apart))
    embed, head = apart.model.embed_tokens.weight, apart.lm_head.weight
    for p in (embed, head):
        p.requires_grad_(True)
    ids = torch.tensor([PROMPT + COMPLETION])
    logps = torch.log_softmax(apart(input_ids=ids).logits[0, len(PROMPT) - 1 : -1], -1)
    loss = -logps[range(len(COMPLETION)), COMPLETION].mean()
    a, b = torch.autograd.grad(loss, (embed, head))
    cross = 2 * float((a.double() * b.double()).sum())
    assert abs(cross) > 1e-4 * untied**2
    # Stock norms stay float32 in a float64 model.
    assert tied**2 == pytest.approx(untied**2 + cross, rel=1e-6)


def test_the_norm_is_the_derivative_in_its_own_direction():
    """A step of length eps along the gradient changes the loss by eps times the norm."""
    model = tiny_model("llama", dtype=torch.float64)
    weight = model.lm_head.weight
    ids = torch.tensor([PROMPT + COMPLETION])

    def loss():
        logps = torch.log_softmax(model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1], -1)
        return -logps[range(len(COMPLETION)), COMPLETION].mean()

    weight.requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(), weight)
    weight.requires_grad_(False)
    eps, norm = 1e-4, vigor_norm(model, PROMPT, COMPLETION, "lm_head")
    with torch.no_grad():
        weight += eps * grad / grad.norm()
        up = float(loss())
        weight -= 2 * eps * grad / grad.norm()
        down = float(loss())
    assert (up - down) / (2 * eps) == pytest.approx(norm, rel=1e-6)


def test_rank_rewards_by_hand():
    # Scores: -2, -3, -1, -2.
    found = vigor_rank_rewards([1.0, 3.0, 0.5, 1.0], [4, 1, 4, 4])
    assert found.tolist() == pytest.approx([2 / 3 - 1, -1.0, 1.0, 4 / 3 - 1])  # a tie by index
    assert vigor_rank_rewards([5.0], [3]).tolist() == [0.0]
    assert vigor_rank_rewards([1.0, 2.0], [1, 1]).tolist() == [1.0, -1.0]
