"""Values of a judge's tokens come back on the policy's, wherever the two cut the text."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CORPUS, byte_bpe, byte_slow, unigram, wordpiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from g2r_fast.alignment import Alignment
from g2r_fast.decoding import decode_with_spans
from g2r_fast.errors import InputError
from g2r_fast.untrusted import UntrustedEncoder

Spans = list[tuple[float, float]]

BROKEN = "\N{REPLACEMENT CHARACTER}"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # joined by zero-width joiners
# How byte-level tokenizers write bytes: printable ones as themselves, the others from 256 on.
BYTE_NAMES = {b: chr(b) for b in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
BYTE_NAMES |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in BYTE_NAMES)}
BYTES = {name: byte for byte, name in BYTE_NAMES.items()}


@cache
def straddling() -> Any:
    """Byte-level BPE whose pieces begin and end inside of characters, as large ones do."""
    pieces = sorted(BYTES)
    merges = []
    for raw in (" \u4e2d".encode()[:2], "\u4e2d".encode()[1:], "a\U0001f468".encode()[:3]):
        names = [BYTE_NAMES[byte] for byte in raw]
        merges += [("".join(names[:i]), names[i]) for i in range(1, len(names))]
        pieces += ["".join(names[: i + 1]) for i in range(1, len(names))]
    # Without merges: only sampled.
    for raw in (b"\xad\xe6", b"\xa8\xe2\x80", b"\x87 ", b"\x8d\xf0\x9f\x91", b"e\xcc", b"\x87!"):
        pieces.append("".join(BYTE_NAMES[byte] for byte in raw))
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


KINDS = {
    "byte-bpe": byte_bpe,
    "straddling": straddling,
    "unigram": unigram,
    "unigram, byte fallback": lambda: unigram(byte_fallback=True),
    "wordpiece": wordpiece,
    "bytes, slow": byte_slow,
}
ENCODERS = {name: UntrustedEncoder(make()) for name, make in KINDS.items()}
PAIRS = [(policy, judge) for policy in KINDS for judge in KINDS]

ODD = ["中", "文", " ", "  ", "\n", FAMILY, "e\u0301", "é", "☃", BROKEN, "▁", "!"]
ODD += [" 中文", "中中中", "a\U0001f468", "hello world", "Answer:", "<0x41>", "##b"]
WORDS = [word for text in CORPUS for word in text.split(" ")]
TEXTS = st.lists(
    st.one_of(st.sampled_from(ODD), st.sampled_from(WORDS), st.text(max_size=4)), max_size=8
).map("".join)
HARD = f"Hello 中文 {FAMILY} e\u0301\n  the answer, 中{BROKEN}!"


def never(token_id: int) -> None:
    return None


def stock(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if ids else ""


def sampled(name: str, seeds: list[int]) -> list[int]:
    """Any ordinary ids: not those that encoding a text would give."""
    ordinary = sorted(set(range(len(ENCODERS[name].tokenizer))) - ENCODERS[name].control_ids)
    return [ordinary[seed % len(ordinary)] for seed in seeds]


SEEDS = st.lists(st.integers(0, 10**6), max_size=24)


def cells(parts: list[bytes], run: bool = False) -> tuple[str, Spans]:
    """Oracle: the text of tokens' bytes, each character cut evenly over tokens with its bytes.

    run: one bad byte breaks all, as byte fallback has it.
    """
    raw, owner = b"".join(parts), [t for t, part in enumerate(parts) for _ in part]
    characters: list[tuple[str, int]] = []  # and how many bytes
    at = 0
    while at < len(raw):
        try:
            characters += [(c, len(c.encode())) for c in raw[at:].decode()]
            break
        except UnicodeDecodeError as error:
            if run:
                characters = [(BROKEN, 1)] * len(raw)
                break
            characters += [(c, len(c.encode())) for c in raw[at : at + error.start].decode()]
            characters.append((BROKEN, error.end - error.start))
            at += error.end
    ends = [0.0] * len(parts)
    byte = 0
    for index, (_, size) in enumerate(characters):
        holders = list(dict.fromkeys(owner[byte : byte + size]))
        for nth, token in enumerate(holders, 1):
            ends[token] = index + nth / len(holders)
        byte += size
    return "".join(c for c, _ in characters), list(zip([0.0, *ends], ends, strict=False))


def close(spans: Spans, expected: Spans) -> bool:
    return spans == [pytest.approx(span, abs=1e-9) for span in expected]


@pytest.mark.parametrize("name", KINDS)
@given(seeds=SEEDS)
def test_text_of_any_ids_is_what_the_tokenizer_decodes(name: str, seeds: list[int]) -> None:
    ids = sampled(name, seeds)
    text, spans = decode_with_spans(ENCODERS[name].tokenizer, ids, never)
    assert text == stock(ENCODERS[name].tokenizer, ids)
    stops = [0, *(stop for _, stop in spans)]
    assert [start for start, _ in spans] == stops[:-1] and len(spans) == len(ids)
    assert stops == sorted(stops) and stops[-1] == len(text)


@pytest.mark.parametrize("name", KINDS)
def test_long_and_ragged_text_is_decoded_in_windows(name: str, monkeypatch: Any) -> None:
    tokenizer, ids, counts = ENCODERS[name].tokenizer, sampled(name, [*range(0, 10**6, 1999)]), [0]
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda i, **o: counts.append(len(i)) or decode(i, **o))
    _, spans = decode_with_spans(tokenizer, ids, never)
    # Once as a whole, three to look one up, nine in a window.
    assert len(ids) <= sum(counts) <= 13 * len(ids)
    if name in ("byte-bpe", "wordpiece", "unigram"):  # the start of a text is its prefix
        for t in range(0, len(ids), 37):
            assert abs(spans[t][1] - len(stock(tokenizer, ids[: t + 1]))) <= 1


@given(raw=st.lists(st.integers(0, 255), max_size=24).map(bytes))
@example(raw=b"\x80\x80\xe4\xb8\xad\xe4\xb8A\xe4\xe4\xf0\x9f\x91\xa8\xf0\x9f")
@example(raw=b"\xef\xbf\xbd\xef\xbf\xbd")  # U+FFFD itself
def test_any_bytes_one_by_one(raw: bytes) -> None:
    tokenizer = straddling()
    ids = [tokenizer.convert_tokens_to_ids(BYTE_NAMES[byte]) for byte in raw]
    text, spans = decode_with_spans(tokenizer, ids, never)
    expected, expected_spans = cells([bytes([byte]) for byte in raw])
    assert text == expected and close(spans, expected_spans)


@given(raw=st.lists(st.integers(0, 255), max_size=12).map(bytes), text=TEXTS)
@example(raw=b"\x80\x43\x44\x45", text="中")
@example(raw=b" \xe4\xb8\xad", text="hello")
@example(raw=b" \x80", text="hello")
def test_byte_fallback_pieces_in_front_of_text(raw: bytes, text: str) -> None:
    tokenizer = unigram(byte_fallback=True)
    rest = tokenizer.encode(text, add_special_tokens=False)
    rest = rest[next((i for i, t in enumerate(rest) if t >= 259), len(rest)) :]  # no byte follows
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in raw] + rest
    decoded, spans = decode_with_spans(tokenizer, ids, never)
    assert decoded == stock(tokenizer, ids)
    head, expected = cells([bytes([byte]) for byte in raw], run=True)
    if head.startswith(" "):  # SentencePiece drops one blank in front of a text
        expected = [(max(0.0, start - 1), max(0.0, stop - 1)) for start, stop in expected]
    assert close(spans[: len(raw)], expected)


@given(text=TEXTS, cuts=st.lists(st.booleans(), min_size=1, max_size=8))
@example(text=" 中中!", cuts=[True] * 8)
@example(text=f"a{FAMILY}e\u0301", cuts=[True] * 8)
def test_pieces_across_characters(text: str, cuts: list[bool]) -> None:
    tokenizer = straddling()
    vocab = tokenizer.get_vocab()
    name = "".join(BYTE_NAMES[byte] for byte in text.encode("utf-8", "replace"))
    ids: list[int] = []
    while name:  # longest piece or single byte, in turns: seldom what encoding would give
        longest = next(n for n in range(5, 0, -1) if name[:n] in vocab)
        size = longest if cuts[len(ids) % len(cuts)] else 1
        ids.append(vocab[name[:size]])
        name = name[size:]
    decoded, spans = decode_with_spans(tokenizer, ids, never)
    parts = [bytes(BYTES[c] for c in name) for name in tokenizer.convert_ids_to_tokens(ids)]
    expected, expected_spans = cells(parts)
    assert decoded == expected and close(spans, expected_spans)


@pytest.mark.parametrize(
    ("name", "pieces", "expected"),
    [
        ("unigram", ["▁hello", "▁", "中", "▁world"], ["hello", " ", "中", " world"]),
        ("unigram", ["▁", "▁", "a"], ["", " ", "a"]),
        ("unigram, byte fallback", ["▁", "<0x41>", "▁a"], ["", "A", " a"]),
        ("wordpiece", ["##b", "the", "##b", ",", "a"], ["##b", " the", "b", " ,", " a"]),
        ("byte-bpe", ["Ġ", "the", "Ċ"], [" ", "the", "\n"]),
    ],
)
def test_blanks_belong_to_who_writes_them(name: str, pieces: Any, expected: list[str]) -> None:
    tokenizer = ENCODERS[name].tokenizer
    assert set(pieces) <= set(tokenizer.get_vocab())
    text, spans = decode_with_spans(tokenizer, tokenizer.convert_tokens_to_ids(pieces), never)
    assert [text[int(start) : int(stop)] for start, stop in spans] == expected


@pytest.mark.parametrize("name", KINDS)
def test_control_ids_are_spelled_where_they_stand(name: str) -> None:
    tokenizer = ENCODERS[name].tokenizer
    before, after = map(ENCODERS[name], ("hello 中", "the answer"))
    end = next(i for i in ENCODERS[name]("X?") if i not in {*before, *after})
    mixed = [end, *before, end, end, *after, end]
    text, spans = decode_with_spans(tokenizer, mixed, {end: "<|end|>"}.get)
    shown = stock(tokenizer, [end])
    said = [stock(tokenizer, [end, *ids]).removeprefix(shown) for ids in (before, after)]
    assert text == f"<|end|>{said[0]}<|end|><|end|>{said[1]}<|end|>"
    places = [t for t, token in enumerate(mixed) if token == end]
    assert [text[int(spans[t][0]) : int(spans[t][1])] for t in places] == ["<|end|>"] * 4
    assert spans[-2][1] == len(text) - 7 and spans[1][0] == 7


def test_the_blank_behind_a_control_id_stays() -> None:
    tokenizer = unigram()
    ids = tokenizer.convert_tokens_to_ids(["▁hello", "</s>", "▁world"])
    text, spans = decode_with_spans(tokenizer, ids, {ids[1]: "</s>"}.get)
    assert (text, spans) == ("hello</s> world", [(0, 5), (5, 9), (9, 15)])
    assert decode_with_spans(tokenizer, [], never) == ("", [])


def test_a_whole_replacement_character_ends_where_it_stands() -> None:
    # A whole one of the vocabulary is no part of what the bytes behind it spell.
    model = json.loads(unigram(byte_fallback=True).backend_tokenizer.to_str())
    model["model"]["vocab"][-1][0] = BROKEN
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)))
    ids = tokenizer.convert_tokens_to_ids([BROKEN, "<0xF0>", "<0x9F>", "<0x91>", "<0xA8>", "a"])
    spans = decode_with_spans(tokenizer, ids, never)[1]
    assert [stop for _, stop in spans] == [1, 1.25, 1.5, 1.75, 2, 3]


def test_where_partial_characters_are_left_out_the_last_part_has_it_all() -> None:
    text, spans = decode_with_spans(byte_slow(), ENCODERS["bytes, slow"]("é中a"), never)
    assert (text, [stop for _, stop in spans]) == ("é中a", [0, 1, 1, 1, 2, 3])


def by_character(judge_spans: Spans, policy_spans: Spans, values: list[float]) -> list[float]:
    """Oracle: every value spread evenly over its characters, each handed to who owns it."""

    def owned(spans: Spans) -> dict[int, list[tuple[int, float, float]]]:
        owners: dict[int, list[tuple[int, float, float]]] = {}
        for token, (start, stop) in enumerate(spans):
            if stop - start > 1 and (n := spans.count((start, stop))) > 1:  # a group, cut evenly
                nth, size = token - spans.index((start, stop)), (stop - start) / n
                start, stop = start + size * nth, start + size * (nth + 1)
            for c in range(int(start), int(-(-stop // 1))):
                if max(start, c) < min(stop, c + 1):
                    owners.setdefault(c, []).append((token, max(start, c), min(stop, c + 1)))
        for c, tokens in owners.items():
            if len(tokens) > 1 and all((a, b) == (c, c + 1) for _, a, b in tokens):
                n = len(tokens)  # each holds some of its bytes
                owners[c] = [(t[0], c + i / n, c + (i + 1) / n) for i, t in enumerate(tokens)]
        return owners

    policy, out = owned(policy_spans), [0.0] * len(policy_spans)
    weights: list[list[tuple[int, float]]] = [[] for _ in judge_spans]
    for c, tokens in owned(judge_spans).items():
        for j, start, stop in tokens:
            for t, its_start, its_stop in policy.get(c, []):
                if min(stop, its_stop) - max(start, its_start) > 1e-12:
                    weights[j].append((t, min(stop, its_stop) - max(start, its_start)))
    for j, value in enumerate(values):
        if not weights[j]:
            texts = [t for t, (start, stop) in enumerate(policy_spans) if start < stop]
            before = [t for t in texts if policy_spans[t][0] <= judge_spans[j][0]]
            weights[j] = [(before[-1] if before else texts[0], 1.0)]
        for t, weight in weights[j]:
            out[t] += value * weight / sum(w for _, w in weights[j])
    return out


def some_values(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).double()


def relative(value: Any, expected: Any, scale: torch.Tensor) -> float:
    """The error against the values that went in: their sum may cancel."""
    difference = value - torch.as_tensor(expected, dtype=torch.float64)
    return float(difference.abs().max() / scale.abs().sum()) if len(scale) else 0.0


def read(policy: str, judge: str, ids: list[int]) -> tuple[list[int], Spans, Spans]:
    text, policy_spans = decode_with_spans(ENCODERS[policy].tokenizer, ids, never)
    return *ENCODERS[judge].with_offsets(text), policy_spans


@pytest.mark.parametrize(("policy", "judge"), PAIRS)
@settings(max_examples=40)
@given(text=TEXTS, seeds=SEEDS, canonical=st.booleans())
@example(text=HARD, seeds=[], canonical=True)
@example(text="", seeds=[], canonical=True)
def test_shares_agree_with_characters(
    policy: str, judge: str, text: str, seeds: list[int], canonical: bool
) -> None:
    ids = ENCODERS[policy](text) if canonical else sampled(policy, seeds)
    _, judge_spans, policy_spans = read(policy, judge, ids)
    alignment = Alignment.from_spans(judge_spans, policy_spans)
    values = some_values(len(judge_spans))
    rewards = alignment.to_policy(values)
    assert rewards.shape == (len(ids),) and rewards.dtype == torch.float64
    expected = by_character(judge_spans, policy_spans, values.tolist())
    assert relative(rewards.sum(), values.sum(), values) <= 1e-12
    assert not ids or relative(rewards, expected, values) <= 1e-12


@pytest.mark.parametrize("name", [name for name in KINDS if name != "bytes, slow"])
@given(text=TEXTS)
@example(text=HARD)
def test_the_same_tokenizer_gives_the_identity(name: str, text: str) -> None:
    ids = ENCODERS[name](text)
    judge_ids, judge_spans, policy_spans = read(name, name, ids)
    assert judge_ids == ids or text != HARD or name == "wordpiece"
    # Text that does not encode to these ids again, and ids that say nothing, have no identity.
    if judge_ids == ids and all(start < stop for start, stop in policy_spans):
        values = some_values(len(ids))
        rewards = Alignment.from_spans(judge_spans, policy_spans).to_policy(values)
        assert relative(rewards, values, values) <= 1e-12


def spans_in(unit: int, largest: int) -> Any:
    """Ascending spans, with gaps and empty ones, in parts of 1/unit of a character."""
    edges = st.lists(st.integers(0, 8 * unit), min_size=4, max_size=largest).map(sorted)
    return edges.map(
        lambda e: [(a / unit, b / unit) for a, b in zip(e[::2], e[1::2], strict=False)]
    )


@settings(max_examples=400)
@given(
    judge_spans=spans_in(1, 12),
    policy_spans=st.sampled_from([1, 2, 3]).flatmap(lambda unit: spans_in(unit, 16)),
    edges=st.lists(st.integers(0, 10), max_size=4).map(sorted),
)
@example(judge_spans=[(0, 4)], policy_spans=[(0, 1), (1, 1), (1, 3), (3, 4)], edges=[1, 3])
@example(judge_spans=[(0, 4), (4, 4)], policy_spans=[(0, 2), (2, 2), (2, 4)], edges=[1, 2])
@example(judge_spans=[(0, 2), (3, 5)], policy_spans=[(0, 1), (1, 2), (4, 5)], edges=[0, 1, 1, 2])
@example(judge_spans=[(0, 0), (2, 3), (4, 4), (7, 9)], policy_spans=[(1, 2), (4, 5)], edges=[1, 2])
def test_within_spans(judge_spans: Spans, policy_spans: Spans, edges: list[int]) -> None:
    judge_spans = judge_spans if any(start < stop for start, stop in policy_spans) else []
    alignment = Alignment.from_spans(judge_spans, policy_spans)
    dense = torch.zeros(len(judge_spans), len(policy_spans), dtype=torch.float64)
    for j, t, share in zip(alignment.judge, alignment.policy, alignment.share, strict=True):
        dense[j, t] += share
    expected = by_character(judge_spans, policy_spans, [1.0] * len(judge_spans))
    assert relative(dense.sum(0), expected, torch.ones(len(judge_spans))) <= 1e-12
    entries = list(zip(alignment.judge, alignment.policy, strict=True))
    count = len(policy_spans)
    assert entries == sorted(set(entries)) and alignment.policy_count == count
    within = [(min(a, count), min(b, count)) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    tokens: list[int] = []
    for start, stop in within:
        first, last = alignment.judge_tokens(start, stop)
        held = (dense[:, start:stop] > 0).any(dim=1).nonzero().flatten().tolist()
        assert list(range(first, last)) == held
        tokens += [j for j in held if j not in tokens]
    rewards = alignment.to_policy(values := some_values(len(tokens)), tokens, within)
    assert relative(rewards.sum(), values.sum(), values) <= 1e-12
    kept = torch.tensor([any(a <= t < b for a, b in within) for t in range(count)]).bool()
    assert not rewards[~kept].any()
    shares = torch.nn.functional.normalize(dense[tokens] * kept, p=1, dim=1)
    assert not count or relative(rewards, values @ shares, values) <= 1e-12
    assert alignment.policy_tokens(tokens, within) == sorted(set(shares.nonzero()[:, 1].tolist()))


def test_an_index_adds_up() -> None:
    alignment = Alignment.from_index([0, 2, 2, 2, 3], 5)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert alignment.to_policy(values).tolist() == [1, 0, 9, 5, 0]
    assert alignment.to_policy(values[:2], [1, 4], [(1, 4)]).tolist() == [0, 0, 1, 2, 0]
    assert alignment.judge_tokens(1, 3) == (1, 4) and alignment.judge_tokens(1, 2) == (1, 1)
    assert alignment.judge_tokens(4, 5) == (5, 5) and alignment.policy_tokens() == [0, 2, 3]
    assert Alignment.from_index([], 0).to_policy(torch.zeros(0)).shape == (0,)
    assert Alignment.from_spans([], [(0, 0)]).to_policy(torch.zeros(0)).tolist() == [0]


IDENTITY = Alignment.from_index([0, 1], 2)
REFUSED: dict[str, Any] = {
    "no policy token stands for": lambda: Alignment.from_spans([(0, 1)], [(0, 0)]),
    "before the last.*1 <= token < 2.*index 1": lambda: Alignment.from_index([1, 0], 2),
    r"one per judge token.*\[2\].*\[3\]": lambda: IDENTITY.to_policy(torch.ones(3)),
    "unknown.*index 0": lambda: IDENTITY.to_policy(torch.ones(1), [2]),
    "no share.*index 1": lambda: IDENTITY.to_policy(torch.ones(2), [0, 1], [(0, 1)]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_aligned_is_refused(message: str) -> None:
    with pytest.raises(InputError, match=message):
        REFUSED[message]()
