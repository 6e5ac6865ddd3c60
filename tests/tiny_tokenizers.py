"""Small tokenizers of every kind a judge may come with, built here; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an empty thought before the verdict where thinking is turned off.
CHATML_THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
CHATML_TRIMS = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
CHATML_REPEATS = CHATML.replace("{{ m.content }}", "{{ m.content }}\n{{ m.content }}")
CHATML_DROPS = CHATML.replace("{{ m.content }}", "(hidden)")
CHATML_LOWERS = CHATML.replace("{{ m.content }}", "{{ m.content | lower }}")
# As Llama 2's: the tokenizer's own BOS, and the answer after a space.
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
# A prompt that ends in a blank, which every tokenizer would rather write with the answer.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BERT = (
    "[CLS] {% for m in messages %}{{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}answer : {% endif %}"
)

# What the scaffold says, so that prompts are short, and what the tests' texts say.
CORPUS = [
    "Judge whether the response meets the criterion.\n\n# Conversation\nUser: ",
    "\n\n# Response\n",
    "\n\n# Criterion\n",
    "\n\nDoes the response meet the criterion? Answer True or False.",
    "user\nassistant\n\n\nVerdict: True False answer Assistant: System: <think> </think>",
    "The answer is good and kind. hello world is a mild cough serious? see a doctor",
]
WORDS = sorted({word for text in CORPUS for word in text.replace("\n", " ").split()})
CHARACTERS = [chr(code) for code in range(0x20, 0x7F)] + list("\n\té€ß中☃")


@cache
def byte_bpe(template: str | None = CHATML, vocab_size: int = 460) -> Any:
    """Byte-level BPE: any text round trips. `<think>` is an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS * 2,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    backend.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def unigram(template: str | None = INST, byte_fallback: bool = False) -> Any:
    """SentencePiece's kind: control pieces lie in the vocabulary as the best way to spell them."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    spelled = ["▁", *(c for c in CHARACTERS if c != " ")]
    pieces += [(character, -12.0) for character in spelled]
    pieces += [(f"▁{word}", -8.0) for word in WORDS]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    if byte_fallback:
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def wordpiece(template: str | None = None) -> Any:
    """BERT's kind: lower case, white space lost, and an unknown piece that is a control id."""
    characters = [c for c in CHARACTERS if not c.isspace() and c.lower() == c]
    words = sorted({word.lower().strip(":.?#</>") for word in WORDS} - {""} - set(characters))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{c}" for c in characters)]
    pieces += words
    backend = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def byte_slow() -> Any:
    """A tokenizer in Python, without a backend to make a twin of: one id per byte."""
    return ByT5Tokenizer(extra_ids=2)


# One record per kind of tokenizer that must work.
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-bpe": lambda: byte_bpe(CHATML),
    "byte-bpe, thinking": lambda: byte_bpe(CHATML_THINKING),
    "byte-bpe, template trims": lambda: byte_bpe(CHATML_TRIMS),
    "byte-bpe, prompt ends in a blank": lambda: byte_bpe(PLAIN),
    "byte-bpe, no template": lambda: byte_bpe(None),
    "unigram": lambda: unigram(INST),
    "unigram, byte fallback": lambda: unigram(INST, byte_fallback=True),
    "unigram, no template": lambda: unigram(None),
    "wordpiece": lambda: wordpiece(BERT),
    "wordpiece, no template": lambda: wordpiece(None),
    "bytes, slow": byte_slow,
}
