"""Policies as trainers have them: in training, checkpointed, adapted; none of them changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vigor_runs
from fallback_models import GPT2, model_of
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vigor_runs import (
    STOCK,
    SUBSETS,
    Ran,
    Rows,
    errors,
    ids_of,
    many_rows,
    mean_nll,
    norms,
    rms,
    rows_of_every_kind,
    squares_of_stock,
    stock_gradients,
    total,
    train_only,
    worst,
)

from g2r_fast import engine, vigor
from g2r_fast.eager import norms as eager_norms
from g2r_fast.errors import InputError

ran = vigor_runs.ran

ENGINES = ["packed", "autograd"]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a trainer would miss."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    return {
        "values": {n: p.detach().clone() for n, p in parameters.items()},
        "objects": {n: id(p) for n, p in parameters.items()},
        "grads": {n: p.grad for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "training": {n: m.training for n, m in modules.items()},
        "checkpoints": {n: getattr(m, "gradient_checkpointing", None) for n, m in modules.items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()
        },
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert all(torch.equal(values[name], old[name]) for name in old)


def in_training(**options: Any) -> Any:
    """Some layers trainable, in train mode."""
    model = tiny_model("qwen2", **options)
    train_only(model, SUBSETS["q and v"])
    return model.train()


@pytest.mark.parametrize("parameters", ["all", "trainable", "lm_head"])
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_policy_changes(engine: str, parameters: str) -> None:
    model, rows = in_training(), rows_of_every_kind()
    before = state(model)
    assert bool((norms(model, rows, parameters, engine) > 0).all())
    assert_unchanged(model, before)


@pytest.mark.parametrize("parameters", ["all", "trainable", "lm_head"])
@pytest.mark.parametrize("engine", ENGINES)
def test_nor_when_it_fails(engine: str, parameters: str) -> None:
    """A scalar raises; logits are not finite."""
    model, calls = in_training(), []
    before = state(model)

    def scalar(i: int, logits: Tensor) -> Tensor:
        calls.append(i)
        if len(calls) == 2:
            raise RuntimeError("a scalar of somebody else's")
        return logits.sum()

    with pytest.raises(RuntimeError, match="somebody else's"):
        vigor.scalar_gradient_norms(
            model, [[1, 2], [3, 4]], scalar, engine=engine, parameters=parameters
        )
    assert_unchanged(model, before)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    before = state(model)
    before["values"].pop("lm_head.weight")  # NaN is not equal to itself
    with pytest.raises(InputError, match=r"logits are not finite; .*first at row \d"):
        norms(model, rows_of_every_kind(), parameters, engine)
    after = state(model)
    assert after["requires_grad"] == before["requires_grad"] and after["hooks"] == before["hooks"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_mode_the_trainer_is_in(engine: str, around: Callable[[], Any]) -> None:
    model, rows = in_training(), rows_of_every_kind()
    expected = norms(model, rows, "trainable", engine)
    with around(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = norms(model, rows, "trainable", engine)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_left_alone(reentrant: bool) -> None:
    model, rows = in_training(), rows_of_every_kind()
    expected = norms(model, rows, "trainable", "autograd")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = state(model)
    assert True in before["checkpoints"].values()
    assert worst(norms(model, rows, "trainable", "autograd"), expected) <= STOCK
    assert_unchanged(model, before)


# Memory ------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return found


def largest(engine: str, length: int, parameters: str = "all") -> tuple[int, int]:
    """Of what a run makes, and of the model's weights."""
    model = tiny_model("llama", intermediate_size=2048, num_hidden_layers=2, hidden_size=64)
    rows = Rows([ids_of(3, 1)] * 2, [ids_of(length, 2), ids_of(length, 3)])
    with LargestTensor() as seen:
        norms(model, rows, parameters, engine)
    return seen.elements, max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("length", [4, 100])
def test_no_gradient_of_a_weight_is_formed(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Gram matrices where a sequence is short, else in tiles, which are made small here."""
    monkeypatch.setenv("G2R_BACKEND", "reference")
    tile = 4096
    monkeypatch.setattr(eager_norms, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(eager_norms, "gram_is_cheaper", lambda entries, *sizes: entries < 50)
    if length == 4:
        made, weight = largest("packed", length)
        assert made < weight / 2
        return
    shapes = []
    plain = eager_norms.product_tn

    def watched(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((a.shape[1], b.shape[1]))
        return plain(a, b)

    monkeypatch.setattr(eager_norms, "product_tn", watched)
    largest("packed", length)
    assert shapes and max(a * b for a, b in shapes) <= tile


def test_a_gradient_would_be_seen() -> None:
    made, weight = largest("autograd", 4)
    assert made >= weight


# Adapters and other families ---------------------------------------------------------------------


def with_adapters(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": targets, "init_lora_weights": False, **options}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = peft.get_peft_model(tiny_model("qwen2", dtype=dtype), config).eval()
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:  # small beside what it adapts, as in training
                parameter.data.mul_(0.2)
    return policy


def adapter_norms(policy: Any, rows: Rows) -> list[float]:
    """Of what is trainable, as a trainer's loop has it."""
    found = []
    for row in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        grads = stock_gradients(policy, lambda row=row: mean_nll(policy, *row))
        found.append(sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_that_are_on(engine: str, ran: list[Ran]) -> None:
    """ "trainable" is the adapters alone; "all" is they and the base."""
    policy, rows = with_adapters(), rows_of_every_kind()
    assert sum(p.requires_grad for p in policy.parameters()) == 3 * 4 * 2
    before = state(policy)
    found = norms(policy, rows, "trainable", engine)
    assert worst(found, adapter_norms(policy, rows)) <= STOCK
    assert_unchanged(policy, before)
    whole = norms(policy, rows, "all", engine)
    assert worst(whole, total(squares_of_stock(policy, rows), SUBSETS["all"])) <= STOCK
    assert bool((whole > 1.01 * found).all())
    assert len(ran) == (2 if engine == "packed" else 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("half", [".lora_A.", ".lora_B.", ".layers.1.", ".q_proj."])
def test_some_of_the_adapters(half: str, engine: str) -> None:
    policy, rows = with_adapters(lora_alpha=32, r=8), rows_of_every_kind()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name and half in name)
    found = norms(policy, rows, "trainable", engine)
    assert worst(found, adapter_norms(policy, rows)) <= STOCK


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("of_adapters", [torch.bfloat16, torch.float32])
def test_adapters_of_a_bfloat16_policy(of_adapters: torch.dtype, scale: float) -> None:
    """Packed, they are added to the weights in bfloat16, where a small one nearly drowns: no
    further from the truth, the same numbers in float32, than twice the loop, which adds later."""
    policy, rows = with_adapters(torch.bfloat16), many_rows()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            factor = scale if ".lora_B." in name else 1.0
            parameter.data = parameter.data.mul_(factor).to(of_adapters)
    truth = adapter_norms(copy.deepcopy(policy).float(), rows)
    loop = rms(errors(adapter_norms(policy, rows), truth))
    assert 1e-4 < loop < 0.05, "the loop is no yardstick here"
    assert rms(errors(norms(policy, rows, "trainable"), truth)) <= 2 * loop


@pytest.mark.filterwarnings("ignore:g2r_fast uses the slower:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_other_adapters(options: dict[str, Any]) -> None:
    """On whichever engine serves them."""
    policy, rows = with_adapters(**options), rows_of_every_kind()
    found = norms(policy, rows, "trainable", "auto")
    assert worst(found, adapter_norms(policy, rows)) <= STOCK


@pytest.mark.filterwarnings("ignore:g2r_fast uses the slower:UserWarning")
def test_two_adapters_at_once() -> None:
    import peft

    policy, rows = with_adapters(), rows_of_every_kind()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    policy.add_adapter("second", config)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name)
    policy.base_model.set_adapter(["default", "second"])
    assert worst(norms(policy, rows, "trainable"), adapter_norms(policy, rows)) <= STOCK
    policy.base_model.set_adapter("second")  # the first one computes nothing
    found = norms(policy, rows, "trainable", "auto")
    assert worst(found, adapter_norms(policy, rows)) <= STOCK


def test_merged_adapters_run_packed(ran: list[Ran]) -> None:
    policy, rows = with_adapters(), rows_of_every_kind()
    policy.merge_adapter()
    expected = squares_of_stock(policy, rows)
    assert worst(norms(policy, rows, "all"), total(expected, SUBSETS["all"])) <= STOCK
    head = SUBSETS["head"]
    assert worst(norms(policy, rows, "lm_head"), total(expected, head)) <= STOCK
    assert "transformers" not in [one.done.backend for one in ran]


def test_adapters_that_are_off_leave_the_base_model() -> None:
    policy, rows = with_adapters(), rows_of_every_kind()
    with policy.disable_adapter():
        found = norms(policy, rows, "all")
    expected = total(squares_of_stock(tiny_model("qwen2"), rows), SUBSETS["all"])
    assert worst(found, expected) <= STOCK


@pytest.mark.parametrize("engine", ["auto", "autograd", "packed"])
def test_idle_adapters_have_no_gradients(engine: str) -> None:
    """All norms would be zero, and their ranks the order of the rows."""
    merged, off = with_adapters(), with_adapters()
    merged.merge_adapter()
    off.base_model.disable_adapter_layers()
    off.requires_grad_(False)
    for name, parameter in off.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for policy in (merged, off):
        with pytest.raises(InputError, match=r"no trainable parameters; .*off or merged"):
            norms(policy, Rows([[1]], [[2]]), "trainable", engine)


def test_falling_back_is_told_where_the_trainer_called(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model_of(GPT2)
    for call in (
        lambda: vigor.gradient_norms(policy, [[1, 2]], [[3, 4]], parameters="all"),
        lambda: vigor.scalar_gradient_norms(
            policy, [[1, 2]], lambda i, logits: logits.sum(), parameters="all"
        ),
    ):
        monkeypatch.setattr(engine, "_told", set())
        with pytest.warns(UserWarning, match="slower autograd engine") as told:
            call()
        assert told[0].filename == __file__
