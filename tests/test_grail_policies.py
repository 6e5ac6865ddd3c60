"""Policies as trainers have them: with adapters, and of families that the packed engine does not
know."""

from __future__ import annotations

from typing import Any

import grail_runs
import pytest
import torch
from fallback_models import GPT2, model_of
from grail_runs import STOCK, Ran, saliencies, spans_of_every_kind, stock_saliencies, worst
from tiny_models import tiny_model

from g2r_fast import engine, grail

peft = pytest.importorskip("peft", reason="adapters are made by PEFT, which is not installed")

ran = grail_runs.ran


def with_adapters() -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model("qwen2"), config).eval()


@pytest.mark.parametrize("leaf", [0, 1])
def test_adapters_that_are_on(leaf: int, ran: list[Ran]) -> None:
    policy, rows = with_adapters(), spans_of_every_kind()
    found = saliencies(policy, rows, "auto", leaf=leaf)
    assert worst(found, stock_saliencies(policy, rows, leaf=leaf)) <= STOCK
    assert worst(found, stock_saliencies(tiny_model("qwen2"), rows, leaf=leaf)) > 0.01
    assert ran[0].done.backend != "transformers"


def test_merged_adapters_run_on_the_packed_engine(ran: list[Ran]) -> None:
    policy, rows = with_adapters(), spans_of_every_kind()
    policy.merge_adapter()
    expected = stock_saliencies(policy, rows)
    assert worst(saliencies(policy, rows, "packed"), expected) <= STOCK
    assert ran[0].done.backend != "transformers"


def test_falling_back_is_told_where_the_trainer_called(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (model_of(GPT2), [[1, 2]], [[3, 4]], [(0, 2)])
    for call in (
        lambda: grail.token_saliencies(*arguments),
        lambda: grail.token_weights(*arguments, [-1.0]),
    ):
        monkeypatch.setattr(engine, "_told", set())
        with pytest.warns(UserWarning, match="slower autograd engine") as told:
            call()
        assert told[0].filename == __file__
