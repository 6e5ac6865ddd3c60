"""What GRAIL, G2RL and VIGOR require and their rivals multiply, against counts of every product."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import grpo_step
from bench.flops import Sizes
from bench.signal_flops import REQUIRED, dense_norms, gradient_or_grams, linear_norms, stock
from bench.signal_scenarios import RIVALS_OF, SIGNAL_SCENARIOS, SignalScenario
from bench.signal_workload import Rollouts
from bench.signals import required
from bench.workload import build_model

TINY = SignalScenario("", "vigor", (), model="tiny", group_size=3, prompt=6, completion=(15, 25))

SIZES = Sizes(layers=3, hidden=5, heads=4, kv_heads=2, head_dim=3, intermediate=7, vocab=11)


def rollouts(prompt, completions, spans=None, parameters="all", hidden=False):
    """Completions that share no token with each other."""
    made = [torch.arange(100 * (i + 1), 100 * (i + 1) + n) for i, n in enumerate(completions)]
    spans = spans or [(0, 0, n, n) for n in completions]
    return Rollouts(torch.arange(prompt), made, spans, 1.0, parameters, made if hidden else [])


def passes(sizes, prompt, completion, *, last, first_back, backward):
    """Multiply-adds of one sequence by loops over layers, rows and keys: `last` = rows read."""
    rows, q, kv = prompt + completion, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    count = dict.fromkeys(("lf", "lb", "af", "ab"), 0)
    for layer, row in itertools.product(range(sizes.layers), range(rows)):
        through = layer < sizes.layers - 1 or row in last
        products = 2 * sizes.hidden * kv
        if through:
            products += 2 * sizes.hidden * q + 3 * sizes.hidden * sizes.intermediate
            count["af"] += 2 * q * (row + 1)
        count["lf"] += products
        if not backward or row < first_back:
            continue
        count["lb"] += products
        if through:
            count["ab"] += 3 * q * (row + 1) + 2 * q * (row + 1 - first_back)
    return count


def assert_passes(found, counts, reads, back_reads, sizes):
    assert found["linear_forward"] == 2 * sum(c["lf"] for c in counts)
    assert found["linear_backward"] == 2 * sum(c["lb"] for c in counts)
    assert found["attention_forward"] == 2 * sum(c["af"] for c in counts)
    assert found["attention_backward"] == 2 * sum(c["ab"] for c in counts)
    assert found["head_forward"] == 2 * sizes.hidden * sizes.vocab * reads
    assert found["head_backward"] == 2 * sizes.hidden * sizes.vocab * back_reads


def test_what_grail_requires():
    """One completion of 9 whose span is tokens 4 to 6: its inputs end with token 5."""
    found = REQUIRED["grail"](SIZES, rollouts(4, [9], [(4, 5, 6, 7)]))
    last = {4 + t - 1 for t in (4, 5, 6)}
    count = passes(SIZES, 4, 6, last=last, first_back=3, backward=True)
    assert_passes(found, [count], 3, 3, SIZES)
    longer = REQUIRED["grail"](SIZES, rollouts(4, [90], [(4, 5, 6, 7)]))
    assert longer == found  # nothing behind the span


def test_what_g2rl_requires():
    found = REQUIRED["g2rl"](SIZES, rollouts(4, [6]))
    count = passes(SIZES, 4, 5, last=set(range(3, 9)), first_back=0, backward=False)
    assert_passes(found, [count], 6, 0, SIZES)
    head = SIZES.hidden * SIZES.vocab
    assert found["features"] == 2 * head
    given = REQUIRED["g2rl"](SIZES, rollouts(4, [6, 3], hidden=True))
    assert given == {"head_forward": 2 * 9 * head, "features": 2 * 2 * head}


def test_what_vigor_requires():
    found = REQUIRED["vigor"](SIZES, rollouts(4, [6]))
    count = passes(SIZES, 4, 5, last=set(range(3, 9)), first_back=0, backward=True)
    assert_passes(found, [count], 6, 6, SIZES)
    q, kv, i, h = 12, 6, SIZES.intermediate, SIZES.hidden
    shapes = [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]
    norms = 2 * sum(gradient_or_grams(9, *shape) for shape in shapes)  # 9 rows in two layers
    norms += sum(gradient_or_grams(9 if shape == (h, kv) else 6, *shape) for shape in shapes)
    assert found["norms"] == norms + gradient_or_grams(6, h, SIZES.vocab)
    tied = REQUIRED["vigor"](SIZES, rollouts(4, [6]), tied=True)
    assert tied.pop("cross") == 2 * h * 6 * 9 and tied == found
    head = REQUIRED["vigor"](SIZES, rollouts(4, [6], parameters="lm_head"))
    assert head["linear_backward"] == head["head_backward"] == 0
    assert head["norms"] == gradient_or_grams(6, h, SIZES.vocab)


def test_a_shared_prompt_goes_forward_once_and_comes_back_for_each():
    one, two = (REQUIRED["vigor"](SIZES, rollouts(4, [6] * n)) for n in (1, 2))
    assert two["linear_backward"] == 2 * one["linear_backward"]
    assert two["norms"] == 2 * one["norms"]
    kv = 2 * SIZES.hidden * 6
    rest = 2 * SIZES.hidden * 12 + 3 * SIZES.hidden * SIZES.intermediate
    # All of the prompt's rows in two layers; in the last one its K and V, and its last row's rest.
    shared = 2 * (4 * 2 * (kv + rest) + 4 * kv + rest)
    assert two["linear_forward"] == 2 * one["linear_forward"] - shared


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 4), (7, 3, 4), (3, 9, 8)])
def test_norms_count_the_cheaper_way(rows, inputs, outputs):
    gradient = 2 * rows * inputs * outputs
    triangle = [(s, t) for s in range(rows) for t in range(s + 1)]
    grams = sum(2 * (inputs + outputs) for _ in triangle)
    assert gradient_or_grams(rows, inputs, outputs) == min(gradient, grams)
    assert dense_norms(rows, inputs, outputs) >= gradient_or_grams(rows, inputs, outputs)


class Products(TorchDispatchMode):
    """FLOPs of every matrix product that runs inside, the fused attention apart.

    `widths`: only of those between these numbers of columns.
    """

    def __init__(self, widths=None):
        super().__init__()
        self.flops, self.widths = 0, widths

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = None
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            shapes = (*a.shape, b.shape[1])
        elif func is torch.ops.mkldnn._linear_pointwise.default:
            shapes = (*args[0].flatten(0, -2).shape, args[1].shape[0])
        if shapes and (self.widths is None or set(shapes[1:]) <= self.widths):
            self.flops += 2 * shapes[0] * shapes[1] * shapes[2]
        return func(*args, **(kwargs or {}))


def counted(run, widths=None):
    with Products(widths) as products:
        run()
    return products.flops


def without_attention(sizes, rollouts, flops):
    """A rival's count where attention's products cost nothing."""
    return flops(sizes, rollouts) - flops(
        replace(sizes, hidden=0, vocab=0, intermediate=0), rollouts
    )


@pytest.mark.parametrize(
    ("method", "name"),
    [("grail", "loop"), ("grail", "slow_loop"), ("grail", "cached_loop"),
     ("g2rl", "full_logits_gradient"), ("vigor", "loop")],
)  # fmt: skip
def test_linear_layers_of_the_rivals_are_counted_as_they_run(method, name):
    """Stock models, whose products a dispatch mode sees."""
    model, made = replace(TINY, method=method).build()
    rival, sizes = RIVALS_OF[method][name], Sizes.of(model.config)
    want = counted(lambda: rival.run(model, made))
    got = without_attention(sizes, made, rival.flops)
    assert got == want


@pytest.mark.parametrize("parameters", ["all", "lm_head"])
def test_the_loop_of_vigor_is_counted_for_the_head_alone_too(parameters):
    model, made = replace(TINY, parameters=parameters).build()
    rival, sizes = RIVALS_OF["vigor"]["loop"], Sizes.of(model.config)
    want = counted(lambda: rival.run(model, made))
    assert without_attention(sizes, made, rival.flops) == want


@pytest.mark.parametrize(
    ("method", "name", "parameters"),
    [("grail", "tuned_cached_loop", "all"), ("g2rl", "chunked_gradient", "all"),
     ("vigor", "tuned_loop", "lm_head"), ("vigor", "tuned_loop", "all")],
)  # fmt: skip
def test_linear_layers_of_the_tuned_rivals_are_counted_as_they_run(method, name, parameters):
    """Told from attention's products, and the norms', by their widths: no sequence is as long.

    Completions too long to be padded into one batch, as padding is not counted.
    """
    scenario = replace(TINY, method=method, parameters=parameters, completion=(140, 150))
    model, made = scenario.build()
    rival, sizes = RIVALS_OF[method][name], Sizes.of(model.config)
    kv = sizes.kv_heads * sizes.head_dim
    widths = {sizes.hidden, kv, sizes.intermediate, 2 * sizes.intermediate, sizes.vocab}
    want = counted(lambda: rival.run(model, made), widths)
    got = without_attention(sizes, made, rival.flops)
    if method == "vigor":
        whole = parameters == "all"
        got -= sum(
            linear_norms(sizes, len(made.prompt), len(c), dense_norms, head_only=not whole)
            for c in made.completions
        )
    assert got == want


def test_a_training_step_is_counted_as_it_runs():
    model, made = replace(TINY, method="g2rl").build()
    step = grpo_step.TrainingStep(model, made)
    want = counted(step)
    flops = without_attention(
        Sizes.of(model.config), made, lambda s, r: grpo_step.flops_of("g2rl", s, r)["step"]
    )
    assert flops == want


def test_attention_of_a_stock_pass():
    width, rows, before = 12, 5, 7
    keys = sum(before + row + 1 for row in range(rows))
    bare = replace(SIZES, hidden=0, intermediate=0, vocab=0)
    assert stock(bare, rows, before=before) == 2 * 3 * 2 * width * keys
    assert stock(bare, rows, before=before, backward=True) == 2 * 3 * 7 * width * keys


def test_no_rival_does_with_less_than_what_is_required():
    """But for the scores of attention, which `swapped` keeps; a method forms them anew."""
    for name, scenario in SIGNAL_SCENARIOS.items():
        sizes = Sizes(8, 512, 8, 2, 64, 1536, 32768)
        made = scenario.rollouts(32768)
        if scenario.hidden_given:
            made = replace(made, hidden=made.completions)
        terms = REQUIRED[scenario.method](sizes, made)
        least = sum(terms.values()) - terms.get("attention_backward", 0) // 3
        for rival in scenario.rivals:
            flops = RIVALS_OF[scenario.method][rival].flops
            assert flops is None or flops(sizes, made) >= least, (name, rival)


def test_norms_of_a_model_are_those_of_its_layers():
    head = linear_norms(SIZES, 4, 6, dense_norms, head_only=True)
    assert head == dense_norms(6, SIZES.hidden, SIZES.vocab)
    everything = linear_norms(SIZES, 4, 6, lambda rows, inputs, outputs: 1)
    assert everything == 7 * SIZES.layers + 1


@pytest.mark.parametrize(("name", "tied"), [("tiny", False), ("tiny-tied", True)])
def test_models_are_tied_where_their_name_says_so(name, tied):
    model, made = build_model(name), rollouts(4, [6])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("cross" in required(model, "vigor", made)) == tied
