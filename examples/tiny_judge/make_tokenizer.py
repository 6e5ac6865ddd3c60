"""A byte-level BPE trained on the prompts the tiny judge will read; any UTF-8 text has ids.

`make_tokenizer(folder)` writes tokenizer.json and tokenizer_config.json, which
`AutoTokenizer.from_pretrained(folder)` loads as a PreTrainedTokenizerFast.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from generate import MAX_SENTENCES, Generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from g2r_fast.judge import Judge

VOCAB_SIZE = 2048
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# ChatML without a default system turn: every token of the scaffold is one the judge has to read.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, seed: int = 0, records: int = 4000) -> PreTrainedTokenizerFast:
    """Train on `records` generated prompts (seen wordings only) and save to `folder`."""
    backend = _bare()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes
        show_progress=False,
    )
    backend.train_from_iterator(_prompts(seed, records), trainer)
    backend.add_special_tokens(list(CONTROL))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _bare() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _prompts(seed: int, records: int) -> list[str]:
    """Whole prompts as the library builds them, verdict included, control tokens cut out."""
    judge = _byte_judge()
    generator, lengths = Generator(seed), random.Random(seed)
    texts = []
    for _ in range(records):
        record = generator.record(lengths.randint(1, MAX_SENTENCES), items=2)
        for item in record.items:
            request = judge.encode(record.prompt, record.response, item.text)
            text = judge.tokenizer.decode(request.input_ids) + str(item.verdict)
            for control in CONTROL:
                text = text.replace(control, "")
            texts.append(text)
    return texts


def _byte_judge() -> Judge:
    """A judge that reads bytes and knows nothing: the way to the exact text of its prompts."""
    backend = _bare()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.model = models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **heads))
    return Judge(model.eval().requires_grad_(False), tokenizer, scaffold="grader")
