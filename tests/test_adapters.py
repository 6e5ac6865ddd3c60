"""Adapters of a judge: off and on, and the policy in training left as it was."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import byte_bpe

from g2r_fast import AttributionBatch, AttributionConfig, Judge, Rubric, attribute_batch
from g2r_fast.errors import InputError, UnsupportedModelError
from g2r_fast.fallback import AutogradEngine
from g2r_fast.reference import relative_error

peft = pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")

FLOAT32 = 2e-5
ITEMS = [Rubric("is kind", 2.0), Rubric("see a doctor", 3.0)]
RESPONSES = ["hello world", "see a doctor"]
LINEARS = ["q_proj", "v_proj", "down_proj"]


def model(tied: bool = False, family: str = "qwen3") -> Any:
    return tiny_model(
        family,
        vocab_size=len(byte_bpe()),
        max_position_embeddings=512,
        num_hidden_layers=2,
        seed=5,
        tie_word_embeddings=tied,
    )


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": LINEARS, "r": 4, "lora_alpha": 8, **options})


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dropout": lambda: lora(task_type="CAUSAL_LM", lora_dropout=0.3),
    "embeddings and head": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "all linears, rslora": lambda: lora(target_modules="all-linear", use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "head saved": lambda: lora(modules_to_save=["lm_head"]),
    "head saved, dropout": lambda: lora(modules_to_save=["lm_head"], lora_dropout=0.3),
    "embeddings saved": lambda: lora(modules_to_save=["embed_tokens"]),
    "blocks saved": lambda: lora(target_modules=["q_proj"], modules_to_save=["mlp"]),
    "norms saved": lambda: lora(modules_to_save=["input_layernorm", "q_norm", "norm"]),
    "lora bias": lambda: lora(lora_bias=True),
    "a parameter": lambda: lora(target_parameters=["mlp.up_proj.weight"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "tokens": lambda: lora(trainable_token_indices=list(range(300))),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=list(range(300))),
    "norms tuned": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def trained(policy: Any) -> Any:
    """The adapters as training leaves them: an untrained one changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


def adapted(kind: str = "lora", tied: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(peft.get_peft_model(model(tied), KINDS[kind]()))


def judge_of(policy: Any, adapters: str | None, **options: Any) -> Judge:
    with warnings.catch_warnings():  # weights that train are what these tests are about
        warnings.filterwarnings("ignore", message="the judge has trainable weights")
        return Judge(policy, byte_bpe(), adapters=adapters, **options)


def run(judge: Judge, engine: str = "packed", **options: Any) -> AttributionBatch:
    options = {"verdict": [[True, True]] * 2, **options}
    return attribute_batch(
        judge, ["is a mild cough serious?"] * 2, RESPONSES, [ITEMS] * 2, 2,
        AttributionConfig(tau=0.05), engine=engine, **options
    )  # fmt: skip


@cache
def of_the_base(tied: bool = False) -> AttributionBatch:
    return run(Judge(model(tied), byte_bpe()))


def error(a: AttributionBatch, b: AttributionBatch) -> float:
    rewards = [relative_error(x, y) for x, y in zip(a.token_rewards, b.token_rewards, strict=True)]
    logps = torch.tensor(a.verdict_logps), torch.tensor(b.verdict_logps)
    return max(*rewards, float((logps[0] - logps[1]).abs().max()))


def equal(a: AttributionBatch, b: AttributionBatch) -> bool:
    return a.verdict_logps == b.verdict_logps and all(
        torch.equal(x, y) for x, y in zip(a.token_rewards, b.token_rewards, strict=True)
    )


def state(policy: Any) -> dict[str, Any]:
    """Everything about a model that an attribution could disturb."""

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()

    active = getattr(policy, "active_adapters", None)
    found: dict[str, Any] = {"active": copy.deepcopy(active() if callable(active) else active)}
    found["random"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        grad = None if parameter.grad is None else digest(parameter.grad)
        at = parameter.data_ptr(), parameter._version, parameter.requires_grad
        found[f"parameter {name}"] = digest(parameter), grad, *at
    for name, buffer in policy.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = digest(buffer), buffer.data_ptr(), buffer._version
    for name, module in policy.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        own = getattr(module, "_disable_adapters", None), getattr(module, "_active_adapter", None)
        found[f"module {name}"] = module.training, copy.deepcopy(own), hooks
    return found


# --- off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_base_model(kind: str, tied: bool) -> None:
    policy = adapted(kind, tied).train()
    before = state(policy)
    judge = judge_of(policy, "off")
    assert equal(run(judge), of_the_base(tied))
    assert error(run(judge, "autograd"), of_the_base(tied)) <= FLOAT32
    assert state(policy) == before
    # And the adapters do something: without this the test could not fail.
    assert error(run(judge_of(policy.eval(), "on"), "autograd"), of_the_base(tied)) > 1e-3


def test_two_adapters_and_any_active_one() -> None:
    policy = peft.get_peft_model(model(), lora(), adapter_name="first")
    policy.add_adapter("second", lora(target_modules=["o_proj", "q_proj"], r=2))
    for active in ("first", "second", ["first", "second"]):
        policy.base_model.set_adapter(active)
        trained(policy)
        before = state(policy)
        assert equal(run(judge_of(policy, "off")), of_the_base())
        assert state(policy) == before


def test_biases_that_train_with_the_adapter_are_no_longer_the_base_models() -> None:
    policy = peft.get_peft_model(model(family="qwen2"), lora(bias="all"))
    with pytest.warns(UserWarning, match="the judge has trainable weights"):
        judge = Judge(policy, byte_bpe(), adapters="off")
    assert equal(run(judge), run(Judge(model(family="qwen2"), byte_bpe())))


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_reference_log_probabilities_are_the_base_models(engine: str) -> None:
    policy, ids = adapted("head saved").train(), [20, 30, 40, 50, 60]
    judge = judge_of(policy, "off", scaffold="continuation")
    out = attribute_batch(
        judge, [ids[:2]], [ids[2:]], [ITEMS], 1, reference_logps=True, engine=engine
    )
    with torch.no_grad():
        logps = model()(input_ids=torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
    assert out.reference_logps is not None
    wanted = logps.gather(1, torch.tensor(ids[2:])[:, None])[:, 0]
    assert float((out.reference_logps[0] - wanted).abs().max()) <= 1e-5


def test_one_copy_of_the_weights() -> None:
    policy = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what trains is off: nothing to warn of
        judge = Judge(policy, byte_bpe(), adapters="off")
    assert judge.model is policy.get_base_model()
    theirs = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in judge.model.parameters()} == theirs


def test_adapters_as_transformers_injects_them() -> None:
    policy = model()
    try:
        policy.add_adapter(lora())
    except ValueError as error:  # transformers 5.24 wants a PEFT that is not out yet
        pytest.skip(f"transformers refuses this PEFT: {error}")
    trained(policy).train()
    before = state(policy)
    assert equal(run(judge_of(policy, "off")), of_the_base())
    assert state(policy) == before
    assert error(run(judge_of(policy.eval(), "on"), "autograd"), of_the_base()) > 1e-3
    policy.disable_adapters()
    before = state(policy)
    assert equal(run(judge_of(policy, "off")), of_the_base()) and state(policy) == before


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_inside_disable_adapter_it_stays_disabled(engine: str) -> None:
    policy = adapted()
    judge = judge_of(policy, "off")
    outside = state(policy)
    with policy.disable_adapter():
        before = state(policy)
        assert error(run(judge, engine), of_the_base()) <= FLOAT32
        assert state(policy) == before != outside
    assert not any(getattr(m, "_disable_adapters", False) for m in policy.modules())


# --- whatever happens ----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "autograd"])
def test_an_error_inside_leaves_the_policy_as_it_was(engine: str) -> None:
    policy = adapted().train()
    policy.get_base_model().lm_head.weight.data[0, 0] = torch.nan
    before = state(policy)
    with pytest.raises(InputError, match="logits are not finite"):
        run(judge_of(policy, "off"), engine)
    assert state(policy) == before


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_the_policy_as_it_was(
    interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted("head saved").train()
    judge = judge_of(policy, "off")
    before = state(policy)

    def stop(*_: Any, **__: Any) -> None:
        raise interrupt

    monkeypatch.setattr("g2r_fast.api._stats", stop)
    with pytest.raises(interrupt):
        run(judge)
    monkeypatch.setattr(AutogradEngine, "_one", stop)
    with pytest.raises(interrupt):
        run(judge, "autograd")
    assert state(policy) == before


@pytest.mark.parametrize("engine", ["packed", "autograd"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_around_an_attribution(engine: str, checkpointing: bool) -> None:
    ids = torch.arange(20, 40)[None]

    def step(between: Callable[[Any], object]) -> list[torch.Tensor]:
        torch.manual_seed(2)  # an attribution draws no random number either
        policy = adapted("head saved").train()
        if checkpointing:  # which runs the forward once more during the backward
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):  # the second adds to the gradients of the first
            loss = policy(input_ids=ids, labels=ids).loss
            between(policy)
            loss.backward()
        return [p.grad for p in policy.parameters() if p.grad is not None]

    plain = step(lambda policy: None)
    around = step(lambda policy: run(judge_of(policy, "off"), engine))
    assert len(plain) == len(around) > 4
    assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))


@pytest.mark.parametrize("first", ["checkpointing", "adapter"])
def test_hooks_for_gradient_checkpointing_do_not_disturb(first: str) -> None:
    base = model()
    if first == "checkpointing":
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    policy = trained(peft.get_peft_model(base, lora())).train()
    if first == "adapter":
        policy.gradient_checkpointing_enable()
        policy.enable_input_require_grads()
    before = state(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run(Judge(policy, byte_bpe(), adapters="off"), "auto")
    assert out.stats["engine"] == "packed" and equal(out, of_the_base())
    assert error(run(judge_of(policy, "off"), "autograd"), of_the_base()) <= FLOAT32
    assert state(policy) == before


# --- on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "head saved", "embeddings and head", "tokens"])
def test_on_is_the_merged_model(kind: str) -> None:
    policy = adapted(kind).eval()
    merged = copy.deepcopy(policy).merge_and_unload()
    before = state(policy)
    assert error(run(judge_of(policy, "on"), "autograd"), run(judge_of(merged, None))) <= 1e-4
    assert state(policy) == before


def test_on_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2r_fast.engine._told", set())
    judge = judge_of(adapted("dora").eval(), "on")
    reason = r"model\.layers\.0\.self_attn\.q_proj has an adapter that is on and not merged"
    with pytest.warns(UserWarning, match=reason):
        assert run(judge, "auto").stats["engine"] == "autograd"
    with pytest.raises(UnsupportedModelError, match=reason):
        run(judge, "packed")


@pytest.mark.parametrize("kind", ["lora", "dropout", "all linears, rslora"])
def test_plain_lora_that_is_on_is_packed(kind: str) -> None:
    policy = adapted(kind).eval()
    if kind == "lora":  # two at once, of other layers and another rank
        policy.add_adapter("second", lora(target_modules=["o_proj", "q_proj"], r=2))
        policy.base_model.set_adapter(["default", "second"])
        trained(policy)
        policy.add_adapter("third", lora(target_modules=["k_proj"], r=2))  # whose layers are idle
    before = state(policy)
    judge = judge_of(policy, "on")
    assert error(run(judge, "packed"), run(judge, "autograd")) <= 1e-4
    assert run(judge, "auto").stats["engine"] == "packed"
    assert error(run(judge, "packed"), of_the_base()) > 1e-3
    assert state(policy) == before
    # Merged into the weights it is packed too.
    apart = run(judge, "packed")
    policy.merge_adapter()
    assert error(run(judge, "packed"), apart) <= 1e-4


def test_lora_biases_and_hooks_of_a_layer_are_not_read_past() -> None:
    policy = adapted("lora bias").eval()
    with pytest.raises(UnsupportedModelError, match="not merged"):
        run(judge_of(policy, "on"), "packed")
    policy = adapted().eval()
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UnsupportedModelError, match="not merged"):
        run(judge_of(policy, "on"), "packed")


def test_on_with_dropout_in_train_mode_is_refused() -> None:
    with pytest.raises(InputError, match="the judge is in train mode and has dropout"):
        judge_of(adapted("dropout").train(), "on")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_must_be_said_which(kind: str) -> None:
    with pytest.raises(InputError, match=r"the judge's model has adapters.*adapters='off'"):
        judge_of(adapted(kind), None)


def test_adapters_of_a_model_without_any() -> None:
    for wanted in ("off", "on"):
        with pytest.raises(InputError, match="the judge's model has no adapters"):
            judge_of(model(), wanted)
    with pytest.raises(InputError, match="unknown adapters; expected None"):
        judge_of(adapted(), "base")


def test_merged_adapters_are_refused() -> None:
    policy = adapted()
    judge = judge_of(policy, "off")
    policy.merge_adapter()
    before = state(policy)
    for attempt in (lambda: judge_of(policy, "off"), lambda: run(judge)):
        with pytest.raises(InputError, match=r"an adapter is merged.*unmerge_adapter\(\) first"):
            attempt()
    assert state(policy) == before
    policy.unmerge_adapter()
    assert error(run(judge), of_the_base()) <= 1e-4  # what merging and back rounds


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_tuning_is_refused(config: str) -> None:
    settings = getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(InputError, match="prompt-learning adapter"):
        judge_of(peft.get_peft_model(model(), settings), "off")


def test_adapters_that_come_after_the_judge() -> None:
    base = model()
    judge = judge_of(base, None)
    peft.get_peft_model(base, lora())  # into the judge's own model, as PEFT does
    with pytest.raises(InputError, match="the judge's model has adapters"):
        run(judge, "auto")


def test_adapters_that_went_into_the_weights() -> None:
    policy = adapted()
    judge = judge_of(policy, "off")
    policy.merge_and_unload()
    with pytest.raises(InputError, match="no adapters"):
        run(judge)


def test_on_inside_disable_adapter_is_not_the_base_model() -> None:
    policy = adapted().eval()
    judge = judge_of(policy, "on")
    with policy.disable_adapter(), pytest.raises(InputError, match="adapters"):
        run(judge, "autograd")


def test_adapters_that_cannot_be_switched_are_seen() -> None:
    settings = peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM", target_modules="self_attn"
    )
    with pytest.raises(InputError):
        judge_of(peft.get_peft_model(model(family="llama"), settings), None)
