"""GRAIL, G2RL and VIGOR inside TRL are what their functions say of the same rollouts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from tiny_tokenizers import byte_bpe
from trl_batches import IDS, agree, prompt_ids, rows_of
from trl_processes import MARKER, WithTools, every_third
from trl_runs import GROUP, Dense, Written, length_reward, model, sign_reward, trained, trainer

from g2r_fast import g2rl, grail, vigor
from g2r_fast.errors import InputError, InputTypeError
from g2r_fast.integrations.trl import G2RL, Grail, Vigor

SIGNS = torch.tensor(sign_reward(IDS))
TEMPERATURE = 0.7


def plain_advantages(functions, **options):
    return trained(Written, functions, **options).batches[0]["advantages"]


def lora():
    peft = pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.2)


# GRAIL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("polarity", ["wrong", "correct", "both"])
def test_grail_weighs_trls_advantages(polarity):
    spans = grail.find_answer_spans(byte_bpe(), IDS, marker=MARKER)
    assert sum(span is not None for span in spans) > 1
    options = {"temperature": TEMPERATURE}
    built = trained(Dense, Grail(sign_reward, marker=MARKER, polarity=polarity), **options)
    plain = plain_advantages(sign_reward, **options)
    weights = grail.token_weights(
        model(), prompt_ids(), IDS, spans, plain, polarity=polarity, temperature=TEMPERATURE
    )
    assert any(row.std() > 0.1 for row in weights)
    assert agree(rows_of(built), [w * a for w, a in zip(weights, plain, strict=True)])


def test_grail_passes_its_options_on():
    options = {"leaf": 1, "shift": 0, "overrides": False, "after_span": "excluded"}
    spans = grail.find_answer_spans(byte_bpe(), IDS, marker=MARKER)
    signal = Grail(sign_reward, marker=MARKER, polarity="both", **options)
    built = trained(Dense, [signal, length_reward])
    plain = plain_advantages([sign_reward, length_reward])
    weights = grail.token_weights(
        model(), prompt_ids(), IDS, spans, plain, polarity="both", **options
    )
    assert agree(rows_of(built), [w * a for w, a in zip(weights, plain, strict=True)])


def test_grail_gives_tools_nothing():
    built = trained(WithTools, Grail(sign_reward, marker=MARKER, polarity="both"))
    for row, ids in zip(rows_of(built), IDS, strict=True):
        own = torch.tensor(every_third(ids)) != 0
        assert not row[~own].any() and row[own].any()


# G2RL ---------------------------------------------------------------------------------------------


def rewards_of(built):
    return built._g2r_signal.rewards[:, 0]


@pytest.mark.parametrize("options", [{}, {"lam": 2.0, "variant": "prose", "clip": 1.5}])
def test_g2rl_shapes_the_rewards_of_its_function(options):
    built = trained(Dense, [G2RL(sign_reward, **options), length_reward], temperature=TEMPERATURE)
    features = g2rl.gradient_features(model(), prompt_ids(), IDS, temperature=TEMPERATURE)
    expected = g2rl.shape_rewards(features, SIGNS, GROUP, **options)
    assert (expected - SIGNS).abs().max() > 0.1
    assert torch.allclose(rewards_of(built), expected, rtol=1e-4, atol=1e-5)
    assert built._g2r_signal.rewards[:, 1].tolist() == pytest.approx(length_reward(IDS))
    assert built.batches[0]["advantages"].shape == (len(IDS),)


def test_g2rl_reads_the_policys_own_tokens():
    built = trained(WithTools, G2RL(sign_reward))
    own = [every_third(ids) for ids in IDS]
    features = g2rl.gradient_features(model(), prompt_ids(), IDS, token_weights=own)
    expected = g2rl.shape_rewards(features, SIGNS, GROUP)
    assert torch.allclose(rewards_of(built), expected, rtol=1e-4, atol=1e-5)


def test_g2rl_takes_graded_rewards_where_it_is_told():
    with pytest.raises(InputError, match=r"neither -1 nor 1.*graded=True"):
        trained(Dense, G2RL(length_reward))
    trained(Dense, G2RL(length_reward, graded=True))


def test_g2rl_needs_every_reward():
    def some(completion_ids, **columns):
        return [1.0, None] * (len(completion_ids) // 2)

    with pytest.raises(InputError, match=r"reward of every completion.* first at row 1 of some"):
        trained(Dense, G2RL(some))


def test_g2rl_counts_the_rewards():
    with pytest.raises(InputError, match=r"arguments differ in length.*rewards with 1"):
        trained(Dense, G2RL(lambda **columns: [1.0]))


# VIGOR --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["trainable", "lm_head"])
def test_vigor_ranks_the_group(parameters):
    built = trained(Dense, Vigor(parameters))
    policy = model().requires_grad_(True)
    norms = vigor.gradient_norms(policy, prompt_ids(), IDS, parameters=parameters)
    expected = vigor.rank_rewards(norms, [len(ids) for ids in IDS], GROUP)
    assert torch.equal(rewards_of(built), expected)
    assert len(expected.unique()) == GROUP


def test_vigor_refuses_what_tools_wrote():
    with pytest.raises(
        InputError, match="likelihood of whole completions, and tools wrote in some"
    ):
        trained(WithTools, Vigor())


# All ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signal", [Grail(sign_reward, marker=MARKER, polarity="both"), G2RL(sign_reward), Vigor()],
    ids=["grail", "g2rl", "vigor"],
)  # fmt: skip
def test_with_lora_the_policy_is_read_with_its_adapters(signal):
    """In train mode with dropout, which the trainer finds again as it was."""
    options = {"max_steps": 2, "learning_rate": 0.3}
    built = trained(Dense, signal, model(), peft_config=lora(), **options)
    assert all(module.training for module in built.model.modules())
    base = trained(Dense, signal, model().requires_grad_(True), **options)
    values = [torch.stack([b["advantages"] for b in t.batches]) for t in (built, base)]
    assert values[0].abs().max() > 0.1
    if not isinstance(signal, Vigor):  # adapters begin as nothing; their gradient does not
        assert torch.allclose(values[0][0], values[1][0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(values[0][1], values[0][0], rtol=1e-2)
    assert {"grail/seconds", "g2rl/seconds", "vigor/seconds"} & built.state.log_history[0].keys()


@pytest.mark.parametrize("signal", [G2RL(sign_reward), Vigor()], ids=["g2rl", "vigor"])
def test_signals_of_whole_sequences_run_with_any_loss(signal):
    trained(Dense, signal, importance_sampling_level="sequence", loss_type="grpo")


def test_a_wrapped_function_keeps_its_name_in_the_log():
    for signal in (Grail(length_reward), G2RL(length_reward, graded=True)):
        assert "rewards/length_reward/mean" in trained(Dense, signal).state.log_history[0]


async def asynchronous(completion_ids, **columns):
    return sign_reward(completion_ids)


@pytest.mark.parametrize("kind", [Grail, G2RL])
@pytest.mark.parametrize("function", ["some/model", asynchronous, model(), None])
def test_only_plain_functions_are_wrapped(kind, function):
    with pytest.raises(InputTypeError, match=f"{kind.__name__} needs a reward function"):
        kind(function)


def test_grail_needs_a_loss_that_knows_tokens():
    with pytest.raises(InputError, match="only their mean would be left"):
        trainer(Dense, Grail(sign_reward), importance_sampling_level="sequence")
