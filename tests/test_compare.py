"""The loops that g2r_fast is compared with give its answers, and a wrong answer gets no times."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_models import tiny_model
from tiny_tokenizers import byte_bpe

from g2r_fast import Judge, compare
from g2r_fast.records import Record
from g2r_fast.reference import ReferenceDecoder, input_gradients, relative_error, token_scores


@pytest.fixture(scope="module")
def judge() -> Judge:
    tokenizer = byte_bpe()
    model = tiny_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=2048)
    return Judge(model, tokenizer)


RECORDS = [
    Record(1, None, "What helps?", ["Go to bed early.", "", "I do not know."],
           [("advises to sleep", 3.0), ("is rude", -1.0)], ""),
    Record(2, None, "Who?", ["Nobody."], [("is short", 1.0)], ""),
]  # fmt: skip


def test_both_loops_equal_the_reference(judge: Judge) -> None:
    group = compare._group(judge, RECORDS[0])
    assert len(group.responses) == 2  # an empty one has nothing to attribute
    decoder = ReferenceDecoder.from_model(judge.model)
    true, false = judge.true_id, judge.false_id
    for way in (compare.loop, compare.cached_loop):
        scores, values = way(
            judge.model, group, lambda z: z[true] - z[false], lambda z, i, k: (i, k) != (0, 1)
        )
        assert len(values) == 4 and [s is None for s in scores] == [False, True, False, False]
        for (i, k), score, value in zip(group.judgements, scores, values, strict=True):
            ids = group.sequence(i, k)
            logits = decoder.logits(decoder.embed(ids))
            assert value == pytest.approx(float(logits[true] - logits[false]), rel=1e-4)
            if score is not None:
                span = group.span(i)
                grads, embeds = input_gradients(decoder, ids, span, true, false, "logodds")
                assert relative_error(score, token_scores(grads, embeds)) <= 2e-5


def test_the_summary_counts_rows_and_gives_times(judge: Judge) -> None:
    text = compare.compare(judge, RECORDS)
    first, *lines = text.splitlines()
    found = re.match(r"5 judgements, (\d) True; largest difference (\S+); \d+ threads", first)
    assert found and float(found[2]) <= 1e-4
    rows = {}
    for line in lines:
        name, seconds, count, ratio = re.split(r"\s{2,}", line.strip())
        assert re.fullmatch(r"[\d.]+ s", seconds)
        assert re.fullmatch(r"[\d.]+x the time of g2r_fast", ratio)
        rows[name] = int(count.replace(",", "").removesuffix(" rows"))
    assert list(rows) == ["loop", "cached loop", "g2r_fast"]
    assert rows["loop"] > rows["cached loop"] >= rows["g2r_fast"] > 0


def test_a_wrong_answer_gets_no_times(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compare._packed

    def wrong(*arguments: Any) -> Any:
        scores, rows = right(*arguments)
        assert any(s is not None for s in scores), "no True item: nothing could be wrong"
        return [None if s is None else s * 1.001 for s in scores], rows

    monkeypatch.setattr(compare, "_packed", wrong)
    text = compare.compare(judge, RECORDS)
    assert "the answers differ by 1.0e-03" in text and " s " not in text


def test_records_without_tokens_have_nothing_to_compare(judge: Judge) -> None:
    empty = Record(1, None, "What?", [""], [("is rude", 1.0)], "")
    assert compare.compare(judge, [empty]) == "compare: no record holds a response with tokens"
