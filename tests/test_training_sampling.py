"""Rollouts: the ids that were sampled, whatever was padded beside them; and vLLM's calls."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from g2r_fast import Judge
from g2r_fast.errors import InputError
from g2r_fast.training.config import TrainConfig
from g2r_fast.training.sampling import TransformersSampler, new_sampler
from g2r_fast.training.tasks import Task, prompt_ids

TASKS = [Task(text, [], {}) for text in ("Hi", "I think I caught the flu. What should I do now?")]


@pytest.fixture(scope="module")
def tiny() -> Judge:
    return Judge.tiny()


def config(**options: Any) -> TrainConfig:
    return TrainConfig(
        **{"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **options}
    )


def eos(tiny: Judge) -> list[int]:
    return [tiny.tokenizer.eos_token_id]


def test_the_likeliest_token_is_that_of_every_prompt_by_itself(tiny: Judge) -> None:
    """With top_k = 1 sampling is greedy: padding and batching must not show."""
    sampler = TransformersSampler(config(top_k=1, sample_batch=3), tiny.tokenizer, eos(tiny))
    rollouts = sampler(tiny.model, TASKS, 2, seed=0)
    assert rollouts.group_size == 2 and len(rollouts) == 4
    assert [task.prompt for task in rollouts.tasks] == [TASKS[0].prompt] * 2 + [TASKS[1].prompt] * 2
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = list(prompt)
        for token in completion:
            with torch.no_grad():
                logits = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)
    assert rollouts.prompt_ids[0] == prompt_ids(tiny.tokenizer, "Hi")


def test_a_response_ends_with_its_first_eos(tiny: Judge) -> None:
    """Every id an EOS: responses are one token. None: all are cut."""
    every = list(range(tiny.vocab_size))
    rollouts = TransformersSampler(config(), tiny.tokenizer, every)(tiny.model, TASKS, 3, seed=0)
    assert [len(ids) for ids in rollouts.completion_ids] == [1] * 6 and all(rollouts.finished)
    rare = [tiny.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    rollouts = TransformersSampler(config(), tiny.tokenizer, rare)(tiny.model, TASKS, 3, seed=0)
    for ids, finished in zip(rollouts.completion_ids, rollouts.finished, strict=True):
        assert finished == (ids[-1] in rare) and (finished or len(ids) == 12)
    assert not all(rollouts.finished)


def test_a_seed_decides_and_the_policy_is_left_as_it_was(tiny: Judge) -> None:
    sampler = TransformersSampler(config(temperature=3.0), tiny.tokenizer, eos(tiny))
    torch.manual_seed(123)
    one = sampler(tiny.model, TASKS, 2, seed=5)
    torch.manual_seed(9)
    two = sampler(tiny.model, TASKS, 2, seed=5)
    other = sampler(tiny.model, TASKS, 2, seed=6)
    assert one.completion_ids == two.completion_ids != other.completion_ids
    assert one.completion_ids[0] != one.completion_ids[1], "a group's responses differ"
    assert not tiny.model.training


def test_the_models_own_generation_settings_have_no_say(tiny: Judge) -> None:
    """The distribution that is sampled is the one whose log-probabilities are trained."""
    plain = TransformersSampler(config(), tiny.tokenizer, eos(tiny))(tiny.model, TASKS, 3, seed=1)
    own = tiny.model.generation_config
    hostile = copy.deepcopy(own)
    hostile.update(repetition_penalty=5.0, min_p=0.5, top_k=1, no_repeat_ngram_size=1)
    tiny.model.generation_config = hostile
    try:
        same = TransformersSampler(config(), tiny.tokenizer, eos(tiny))(
            tiny.model, TASKS, 3, seed=1
        )
        assert tiny.model.generation_config is hostile, "left as it was"
    finally:
        tiny.model.generation_config = own
    assert same.completion_ids == plain.completion_ids


class FakeEngine:
    """The calls of vllm.LLM that are used, and what they were given."""

    def __init__(self, **options: Any) -> None:
        self.options, self.loaded, self.resets = options, [], 0

    def apply_model(self, function: Any) -> None:
        function(SimpleNamespace(load_weights=self.loaded.append))

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: Any, settings: Any, use_tqdm: bool) -> Any:
        self.asked = (prompts, settings)
        answers = [SimpleNamespace(token_ids=(5, 6, settings.stop_token_ids[0], 7))] * settings.n
        return [SimpleNamespace(outputs=answers) for _ in prompts]


def test_vllm_gets_the_policys_weights_before_every_rollout(
    tiny: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(LLM=FakeEngine, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    chosen = config(sampler="vllm", model="some/model")
    sampler: Any = new_sampler(chosen, tiny.tokenizer, eos(tiny))
    for _ in range(2):
        rollouts = sampler(tiny.model, TASKS, 2, seed=4)
    engine = sampler._engine
    assert engine.resets == 2 and len(engine.loaded) == 2
    names = [name for name, _ in engine.loaded[0]]
    assert names == [name for name, _ in tiny.model.named_parameters()]
    assert engine.options["model"] == "some/model"
    prompts, settings = engine.asked
    assert [p["prompt_token_ids"] for p in prompts] == [
        prompt_ids(tiny.tokenizer, task.prompt) for task in TASKS
    ]
    assert settings.n == 2 and settings.seed == 4 and settings.top_k == -1
    assert rollouts.completion_ids == [[5, 6, eos(tiny)[0]]] * 4 and all(rollouts.finished)
    assert rollouts.prompt_ids[0] == rollouts.prompt_ids[1] != rollouts.prompt_ids[2]


def test_vllm_that_is_not_there(tiny: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="pip install vllm"):
        new_sampler(config(sampler="vllm"), tiny.tokenizer, eos(tiny))
