"""The packed engine as it runs on a GPU, whole models, by the rules of engine_scores.py.

Where there is a GPU, on it; elsewhere Triton's kernels run under its interpreter and the tensors
stay on the CPU, so that all but speed and the hardware's own behaviour is tested.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_scores import (
    FLOAT32,
    bfloat16_wrong,
    float32_wrong,
    many_sequences,
    reference_scores,
    scores,
    sizes,
    stock_loop,
    worst,
)
from engine_signals import record
from patterns import PATTERNS, Batch, group
from tiny_models import FAMILIES, VARIANTS, random_ids, tiny_model, tiny_variant
from torch import Tensor

from g2r_fast import cuda_attention, native_ops, triton_norms
from g2r_fast.decoder import FrozenDecoder
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.vigor import gradient_norms

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# All of it is for a GPU: under the interpreter a program takes milliseconds.
LAYERS: dict[str, Any] = {} if ON_GPU else {"num_hidden_layers": 2}
FEW = [(family, "group") for family in FAMILIES] + [("qwen3", pattern) for pattern in PATTERNS]
CASES = [(f, p) for f in FAMILIES for p in PATTERNS] if ON_GPU else list(dict.fromkeys(FEW))
# Those that change what a kernel does, and not only what it is given.
SOME = ("llama-mha", "llama-mqa", "llama-biases", "qwen2-window-on-upper-layers", "qwen3-biases")


def some() -> Batch:
    """The group, or two of its responses with two items each."""
    whole = group()
    rows = whole.rows if ON_GPU else [whole.rows[i] for i in (0, 1, 3, 4)]
    return Batch(*map(list, zip(*rows, strict=True)))


needs_rounding = pytest.mark.skipif(
    not ON_GPU, reason="Triton's interpreter truncates to bfloat16 where a GPU rounds"
)


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is on Triton's kernels, or fails."""
    monkeypatch.setenv("G2R_BACKEND", "triton")


# Head sizes that the attention of csrc/cuda serves.
SERVED: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}


@pytest.fixture(params=["mma", "wgmma"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is that of csrc/cuda, which tests/test_cuda_emulated.py has without a GPU."""
    if not ON_GPU:
        pytest.skip("no GPU: csrc/cuda is tested under emulation")
    monkeypatch.setenv("G2R_PRODUCTS", request.param)
    reason = cuda_attention.serves(torch.bfloat16, SERVED["head_dim"], torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("G2R_BACKEND", "native")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_with_the_attention_of_csrc(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16, **SERVED)
    assert FrozenDecoder(model.to(DEVICE)).backend().name == "native"
    assert wrong(model.cpu(), many_sequences()) is None


def device_scores(model: Any, batch: Batch, readout: str = "dot") -> list[Tensor]:
    there = copy.deepcopy(model).to(DEVICE)
    assert FrozenDecoder(there).backend().on_gpu
    return [b.cpu() for b in scores(there, batch, readout=readout)]


def wrong(model: Any, batch: Batch, readout: str = "dot") -> str | None:
    found = device_scores(model, batch, readout)
    truth, loop = reference_scores(model, batch, readout), stock_loop(model, batch, readout)
    if model.dtype == torch.float32:
        return float32_wrong(found, loop, truth, sizes(model, batch, readout))
    return bfloat16_wrong(found, loop, truth)


@pytest.mark.parametrize(("family", "pattern"), CASES)
def test_float32(family: str, pattern: str) -> None:
    assert wrong(tiny_model(family, **LAYERS), PATTERNS[pattern]()) is None


@pytest.mark.parametrize("variant", VARIANTS if ON_GPU else SOME)
def test_every_variant(variant: str) -> None:
    for readout in ("dot", "l1", "l2") if ON_GPU else ("dot",):
        assert wrong(tiny_variant(variant), some(), readout) is None


@needs_rounding
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_plain_loop(family: str) -> None:
    assert wrong(tiny_model(family, dtype=torch.bfloat16), many_sequences()) is None


@pytest.mark.parametrize("family", FAMILIES if ON_GPU else FAMILIES[-1:])
def test_float16_does_not_lose_small_gradients(family: str) -> None:
    """The loop in float16 is no yardstick, as its gradients vanish: the one in bfloat16, which
    rounds eight times as coarsely, is."""
    batch = some()
    half, coarse = (tiny_model(family, dtype=d, **LAYERS) for d in (torch.float16, torch.bfloat16))
    limit = worst(stock_loop(coarse, batch), reference_scores(coarse, batch))
    found = device_scores(half, batch)
    assert all(torch.isfinite(b).all() and b.norm() > 0 for b in found)
    assert worst(found, reference_scores(half, batch)) <= limit / 2


@pytest.mark.parametrize("reads", [(-1,), (0, 5, -2, -1)])
def test_any_reads_and_any_leaf(reads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads in front of the attributed tokens, several of a sequence, rows read by several."""
    batch = some()
    found = record(tiny_model("qwen3", **LAYERS).to(DEVICE), batch, reads, leaf=1)
    monkeypatch.setenv("G2R_BACKEND", "reference")
    eager = record(tiny_model("qwen3", **LAYERS), batch, reads, leaf=1)
    truth = record(tiny_model("qwen3", dtype=torch.float64, **LAYERS), batch, reads, leaf=1)
    assert found.leaves.keys() == eager.leaves.keys() == truth.leaves.keys()
    lanes = sorted({sequence for sequence, _ in truth.leaves})
    for which in (0, 1):
        ours, loop, exact = (
            [torch.cat([x.leaves[at][which] for at in truth.leaves if at[0] == i]) for i in lanes]
            for x in (found, eager, truth)
        )
        ours = [x.cpu() for x in ours]
        size = [float(x.norm()) for x in exact]
        assert float32_wrong(ours, loop, exact, size) is None, ("values", "grads")[which]


def whole(batch: Batch) -> Batch:
    """The same, but everything comes back, from the first token on."""
    return Batch(batch.input_ids, [(0, len(ids)) for ids in batch.input_ids], batch.target_ids)


# With biases; with norms of heads; with a window; a head that is the embedding.
READ = ("qwen2", "qwen3", "llama-biases", "qwen2-window-on-upper-layers", "llama-tied")


@pytest.mark.parametrize("variant", READ)
def test_linear_layers_are_shown_what_their_gradients_need(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = whole(some())
    found = record(tiny_variant(variant, **LAYERS).to(DEVICE), batch, reads_linears=True)
    monkeypatch.setenv("G2R_BACKEND", "reference")
    wide = tiny_variant(variant, dtype=torch.float64, **LAYERS)
    truth = record(wide, batch, reads_linears=True)
    assert found.weight_grads.keys() == truth.weight_grads.keys()
    for key, exact in truth.weight_grads.items():
        grad = found.weight_grads[key].cpu().double()
        assert float((grad - exact).norm()) <= FLOAT32 * float(exact.norm()), key


def norms(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch, backend: str) -> Tensor:
    """Of the gradient of the mean negative log-likelihood, over all parameters."""
    monkeypatch.setenv("G2R_BACKEND", backend)
    there = copy.deepcopy(model).to(DEVICE if backend == "triton" else "cpu")
    split = [(ids[:start], ids[start:]) for ids, (start, _), _ in batch.rows]
    prompts, completions = map(list, zip(*split, strict=True))
    found = gradient_norms(there, prompts, completions, parameters="all", engine="packed")
    return found.cpu().double()


def worst_of_norms(found: Tensor, truth: Tensor) -> float:
    return float(((found - truth).abs() / truth).max())


@pytest.mark.parametrize("variant", READ)
def test_gradient_norms_in_float32(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_variant(variant, **LAYERS), some()
    truth = norms(copy.deepcopy(model).double(), batch, monkeypatch, "reference")
    assert worst_of_norms(norms(model, batch, monkeypatch, "triton"), truth) <= FLOAT32


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_gradient_norms_in_half_precision(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 rounds eight times as finely as bfloat16, and its small gradients may not vanish."""
    batch = some()
    half, coarse = (
        tiny_variant(variant, dtype=d, **LAYERS) for d in (torch.float16, torch.bfloat16)
    )
    exact = [
        norms(copy.deepcopy(model).double(), batch, monkeypatch, "reference")
        for model in (half, coarse)
    ]
    limit = worst_of_norms(norms(coarse, batch, monkeypatch, "reference"), exact[1])
    assert worst_of_norms(norms(half, batch, monkeypatch, "triton"), exact[0]) <= limit / 2
    if ON_GPU:  # the interpreter truncates to bfloat16
        assert worst_of_norms(norms(coarse, batch, monkeypatch, "triton"), exact[1]) <= 2 * limit


@pytest.mark.parametrize("op", ["squared_gradient_norms", "squared_row_sums"])
def test_norms_come_from_the_kernels_and_0_1_percent_would_show(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_variant("qwen2", **LAYERS), some()
    right = norms(model, batch, monkeypatch, "triton")
    original, asked = getattr(triton_norms, op), []

    def planted(*arguments: Any) -> Tensor:
        asked.append(arguments)
        return original(*arguments) * 1.002

    monkeypatch.setattr(triton_norms, op, planted)
    wrong = norms(model, batch, monkeypatch, "triton")
    assert asked and worst_of_norms(wrong, right) > FLOAT32
    asked.clear()
    norms(model, batch, monkeypatch, "reference")
    assert not asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_the_bytes_that_were_announced(dtype: torch.dtype) -> None:
    decoder = FrozenDecoder(tiny_model("qwen3", dtype=dtype, **LAYERS).to(DEVICE))
    batch = some()
    plan = PackedPlan.build(
        PackedSequence(ids, start)
        for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
    )
    assert decoder.forward(plan).saved_bytes == plan.saved_bytes(decoder.shape)


def test_two_runs_are_equal_to_the_bit_and_nothing_uninitialised_is_read() -> None:
    """torch.empty comes filled with NaN in the second run; one value that leaked would show."""
    model, batch = tiny_model("qwen3", **LAYERS), some()
    expected = device_scores(model, batch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        poisoned = device_scores(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(poisoned, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", ["triton", "reference", "native"])
@pytest.mark.parametrize(
    ("family", "reads"), [("mistral", (2,)), ("mistral", (2, 60)), ("llama", (3,))]
)
def test_what_is_read_long_before_the_end(
    family: str, reads: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys behind the last query get zeros, with a window (mistral's) and without; the yardstick
    is the stock model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
    model = tiny_model(family, **sizes)
    ids = random_ids(150, 3).tolist()
    batch = Batch([ids], [(0, len(ids))], [5])
    wide = copy.deepcopy(model).double()
    embeds = wide.get_input_embeddings()(torch.tensor([ids])).requires_grad_(True)
    logits = wide(inputs_embeds=embeds, use_cache=False).logits[0]
    told = sum(logits[at].log_softmax(-1)[5] for at in reads)
    (expected,) = torch.autograd.grad(told, embeds)
    device = DEVICE if backend == "triton" else "cpu"
    monkeypatch.setenv("G2R_BACKEND", backend)
    if backend == "native" and native_ops.load() is not None:
        pytest.skip("no native kernels")
    found = record(model.to(device), batch, reads)
    grads = torch.stack([found.leaves[0, t][1].cpu() for t in range(len(ids))])
    assert float((grads - expected[0]).norm() / expected.norm()) <= 1e-5
    assert not grads[reads[-1] + 1 :].any()
