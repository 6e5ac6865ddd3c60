"""Judges and models that cannot be used."""

from __future__ import annotations

from typing import Any

import torch
from bad_calls import BadInput, batch, make_judge, model, tokens, with_row, without_engine
from tiny_models import tiny_model
from tiny_tokenizers import CHATML_DROPS, CHATML_REPEATS, byte_bpe, unigram

from g2r_fast import Judge
from g2r_fast.errors import InputError, UnsupportedModelError


def deaf(**config: Any) -> Any:
    """A model whose embedding of token 7 is not a number."""
    broken = model(**config)
    broken.model.embed_tokens.weight.data[7] = torch.nan
    return broken


def in_train_mode() -> Any:
    return model(attention_dropout=0.1).train()


def judge_in_train_mode() -> Judge:
    made = Judge(model(attention_dropout=0.1), byte_bpe())
    made.model.train()
    return made


JUDGES = [
    BadInput(
        "an unknown scaffold",
        without_engine(lambda: make_judge(scaffold="grade")),
        InputError,
        "unknown scaffold; expected 'grader' \\| 'continuation'; got 'grade'",
    ),
    BadInput(
        "an unknown way with control ids",
        without_engine(lambda: make_judge(on_control_ids="drop")),
        InputError,
        r"unknown on_control_ids; expected 'respell' \| 'raise'; got 'drop'",
    ),
    BadInput(
        "a policy with another vocabulary, whose rollout cannot be continued",
        without_engine(lambda: make_judge(policy_tokenizer=unigram(), scaffold="continuation")),
        InputError,
        "scaffold 'continuation' reads the policy's own ids, and the policy's tokenizer has "
        'another vocabulary than the judge\'s. Use scaffold="grader"',
    ),
    BadInput(
        "verdict words that share a first token",
        without_engine(lambda: make_judge(true="True.", false="True!")),
        InputError,
        "the verdict words share a first token, or have none; expected two words that this "
        r"tokenizer begins differently; got 'True\.' and 'True!', spelled \['Tr', .*\] and "
        r"\['Tr', .*\]\. Pass other words, e\.g\. true=\"Yes\", false=\"No\"",
    ),
    BadInput(
        "a template that repeats the user's text",
        without_engine(lambda: make_judge(tokenizer=byte_bpe(CHATML_REPEATS))),
        InputError,
        "the chat template does not carry a user turn through unchanged; expected the user's "
        "content once; got 2 times",
    ),
    BadInput(
        "a template that drops the user's text",
        without_engine(lambda: make_judge(tokenizer=byte_bpe(CHATML_DROPS))),
        InputError,
        "the chat template does not carry a user turn through unchanged; .* got 0 times",
    ),
    BadInput(
        "a model smaller than its tokenizer",
        without_engine(lambda: Judge(tiny_model("llama"), byte_bpe())),
        InputError,
        "a scaffold id of this tokenizer is outside the vocabulary; expected 0 <= id < 97; got",
    ),
    BadInput(
        "a judge in train mode",
        batch(judge=judge_in_train_mode),
        InputError,
        r"the judge is in train mode and has dropout; expected a judge in eval mode; got "
        r"model\.layers\.0\.self_attn \(Qwen2Attention\) in train mode\. Call model\.eval\(\)",
    ),
    BadInput(
        "tokens: a model in train mode",
        tokens(model=in_train_mode),
        InputError,
        "the model is in train mode and has dropout; expected a model in eval mode",
    ),
    BadInput(
        "logits that are not finite",
        batch(judge=lambda: Judge(deaf(), byte_bpe()), responses=with_row("responses", 2, [5, 7])),
        InputError,
        "the model's logits are not finite; expected finite logits; first at row 2, item 0. "
        "Check the model's weights; float16 models may need bfloat16 or float32",
    ),
    BadInput(
        "tokens: logits that are not finite",
        tokens(model=deaf, input_ids=[[1] * 8, [1, 2, 3, 7, 5, 6, 8, 9], [2] * 8]),
        InputError,
        "the model's logits are not finite; expected finite logits; first at sequence 1",
    ),
    BadInput(
        "a model that the packed engine does not know",
        batch(judge=lambda: Judge(renamed(), byte_bpe())),
        UnsupportedModelError,
        "engine='packed' cannot serve this model: model_type 'qwen9' is not one of llama, "
        'mistral, qwen2, qwen3. Use engine="auto" to fall back to autograd',
        engines=("packed",),
    ),
]


def renamed() -> Any:
    made = model()
    made.config.model_type = "qwen9"
    return made
