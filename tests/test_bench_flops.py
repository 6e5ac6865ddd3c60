"""The benchmarks' count of required FLOPs, against a count of every single multiply-add."""

from __future__ import annotations

import itertools

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.flops import Judgement, Sizes, judgements_of, required_flops
from bench.workload import build_model, make_workload
from g2r_fast.plan import PackedPlan, PackedSequence

SIZES = Sizes(
    layers=3, hidden=5, heads=4, kv_heads=2, head_dim=3, intermediate=7, vocab=11, window=None
)


def events(sizes: Sizes, judgements: list[Judgement]) -> dict[str, int]:
    """Sets of what has to be multiplied, written out: one element per (what, row, key) or
    (what, row); rows are known by the tokens that lead to them."""
    linear: set[tuple] = set()
    attention: set[tuple] = set()
    back_linear: set[tuple] = set()
    back_attention: set[tuple] = set()
    heads: set[tuple] = set()
    back_heads: set[tuple] = set()
    for number, judgement in enumerate(judgements):
        ids = tuple(judgement.input_ids)
        for layer in range(sizes.layers):
            last = layer == sizes.layers - 1
            for at in range(len(ids)):
                row = ids[: at + 1]
                read = at in judgement.read_positions
                names = ["k", "v"] if last and not read else ["k", "v", "q", "o", "g", "u", "d"]
                linear |= {(layer, name, row) for name in names}
                keys = [
                    key for key in range(at + 1) if sizes.window is None or at - key < sizes.window
                ]
                if not last or read:
                    for key, product in itertools.product(keys, ("scores", "mix")):
                        attention.add((layer, product, row, key))
                if not judgement.is_true or at < judgement.response_start:
                    continue
                back_linear |= {(layer, name, row, number) for name in names}
                if last and not read:
                    continue
                for key in keys:
                    back_attention.add((layer, "scores", row, key))
                    back_attention.add((layer, "dP", row, key, number))
                    back_attention.add((layer, "dQ", row, key, number))
                    if key >= judgement.response_start:
                        back_attention.add((layer, "dK", row, key, number))
                        back_attention.add((layer, "dV", row, key, number))
        for at in judgement.read_positions:
            heads.add(ids[: at + 1])
            if judgement.is_true:
                back_heads.add((ids[: at + 1], number))
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    size = {"k": kv, "v": kv, "q": q, "o": q} | dict.fromkeys("gud", sizes.intermediate)
    return {
        "linear_forward": 2 * sum(sizes.hidden * size[name] for _, name, _ in linear),
        "linear_backward": 2 * sum(sizes.hidden * size[name] for _, name, *_ in back_linear),
        "head_forward": 2 * sizes.hidden * sizes.vocab * len(heads),
        "head_backward": 2 * sizes.hidden * sizes.vocab * len(back_heads),
        "attention_forward": 2 * q * len(attention),
        "attention_backward": 2 * q * len(back_attention),
    }


def group(prompt: int, responses: list[int], items: int, tail: int, true: str) -> list[Judgement]:
    found = []
    for i, length in enumerate(responses):
        for k in range(items):
            response = [10 * i + t for t in range(length)]
            ids = [*range(100, 100 + prompt), *response, *(1000 * (k + 1) + t for t in range(tail))]
            found.append(Judgement(ids, prompt, true[(i * items + k) % len(true)] == "T"))
    return found


CASES = {
    "all True": group(4, [3, 5], 2, 2, "T"),
    "some True": group(4, [3, 5, 1], 3, 2, "TFF"),
    "none True": group(2, [3, 2], 2, 1, "F"),
    "one judgement": group(3, [4], 1, 2, "T"),
    "no prompt": group(0, [4, 2], 2, 2, "TF"),
    "responses that begin alike": [
        Judgement([1, 2, 3, 4, 5], 2, True),
        Judgement([1, 2, 3, 9, 5, 6], 2, True),
        Judgement([1, 2, 3, 9, 5, 6, 7], 3, True),
    ],
    "the same twice": [Judgement([1, 2, 3], 1, True), Judgement([1, 2, 3], 1, True)],
    "several reads": [
        Judgement([1, 2, 3, 4, 5], 2, True, (1, 2, 4)),  # the first in front of what comes back
        Judgement([1, 2, 3, 9, 5, 6], 0, True, (1, 2, 3)),
        Judgement([1, 2, 3, 9, 5, 7], 6, False, (3, 4, 5)),
    ],
    "an empty response": [
        Judgement([1, 2], 2, True),
        Judgement([1, 3], 1, True),
    ],
}


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_count_is_that_of_every_single_product(case, window):
    sizes = Sizes(**{**vars(SIZES), "window": window})
    found = required_flops(sizes, CASES[case])
    wanted = events(sizes, CASES[case])
    if case == "an empty response":
        # Its read lies in front of its first backward row: through the head and no further.
        assert wanted["head_backward"] == 2 * 2 * sizes.hidden * sizes.vocab
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.total == sum(wanted.values())


def test_rows_are_those_of_the_plan():
    workload = make_workload(
        group_size=2, items=3, prompt=7, response=(3, 6), tail=2, true_share=0.5
    )
    judgements = judgements_of(workload)
    plan = PackedPlan.build([PackedSequence(j.input_ids, j.response_start) for j in judgements])
    one_row = Sizes(layers=2, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=0, vocab=0)
    found = required_flops(one_row, judgements)
    # Layer 0: four matrices of one element; the last layer: two, and the others where it is read.
    assert found.linear_forward == 2 * (plan.rows * (4 + 2) + 6 * 2)
    back = sum(len(j.input_ids) - j.response_start for j in judgements if j.is_true)
    assert found.linear_backward == 2 * (back * (4 + 2) + 3 * 2)


def test_linear_layers_against_a_count_of_what_a_stock_model_does():
    """One judgement, all of it response: what a stock model does beyond it is in the last layer."""
    model = build_model("tiny")
    sizes, rows = Sizes.of(model.config), 9
    ids = list(range(4, 4 + rows))
    found = required_flops(sizes, [Judgement(ids, 0, True)])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=model.get_input_embeddings().weight.new_tensor(ids).long()[None])
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    q = sizes.heads * sizes.head_dim
    rest = 2 * sizes.hidden * q + 3 * sizes.hidden * sizes.intermediate
    beyond = 2 * (rows - 1) * (rest + sizes.hidden * sizes.vocab)
    assert products == found.linear_forward + found.head_forward + beyond


def test_sizes_are_read_from_the_config():
    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64,
    )  # fmt: skip
    assert Sizes.of(config) == Sizes(2, 32, 4, 2, 8, 48, 64)
    assert Sizes.of(Qwen2ForCausalLM(config).config) == Sizes.of(config)
