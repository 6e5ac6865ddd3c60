"""Which backend runs the packed engine's operations, how one is forced, and who is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from api_runs import judge_of, run
from engine_scores import scores
from fallback_models import model_of
from patterns import group
from tiny_models import tiny_model

from g2r_fast import cuda_attention, native_ops, triton_device, triton_scoring
from g2r_fast import engine as engine_module
from g2r_fast.backends import BACKENDS, Request, choose, describe, native_serves
from g2r_fast.decoder import FrozenDecoder
from g2r_fast.engine import PackedEngine, choose_engine
from g2r_fast.errors import BackendError, InputError
from g2r_fast.families import FAMILIES, read_weights
from g2r_fast.grad2reward import TargetSignal
from g2r_fast.plan import PackedSequence

SERVED = Request(torch.device("cpu"), torch.float32, hidden=64, intermediate=96, head_dim=16)

GPT2 = "gpt2: learned positions, Conv1D"  # no family of the packed engine

# What native cannot serve, and what it says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "device": (
        {"device": torch.device("mps")},
        "the device is mps, neither a CPU nor an NVIDIA GPU",
    ),
    "dtype": ({"dtype": torch.float64}, "the dtype is float64, not float32 or bfloat16"),
    "half": ({"dtype": torch.float16}, "the dtype is float16, not float32 or bfloat16"),
    "head_dim": ({"head_dim": 24}, "head_dim 24 is not a multiple of 16 up to 256"),
    "long heads": ({"head_dim": 272}, "head_dim 272 is not a multiple of 16 up to 256"),
    "hidden": ({"hidden": 40}, "hidden size 40 is not a multiple of 16"),
    "intermediate": ({"intermediate": 100}, "intermediate size 100 is not a multiple of 16"),
    "layout": (
        {"scattered": ("model.norm.weight", "lm_head.weight")},
        "the weight model.norm.weight is not contiguous in memory (and 1 more)",
    ),
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native kernels were there; nothing here runs them."""
    monkeypatch.delenv("G2R_BACKEND", raising=False)
    monkeypatch.setattr(native_ops, "load", lambda: None)
    monkeypatch.setattr("g2r_fast.backends._kernels", lambda *asked: "avx2")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_comes_first(dtype: torch.dtype) -> None:
    backend = choose(replace(SERVED, dtype=dtype))
    assert (backend.name, str(backend), backend.refused) == ("native", "native: avx2", {})
    assert backend.gradient_dtype(dtype) == dtype


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("case", REFUSED)
def test_the_reference_serves_the_rest_and_the_reasons_are_known(case: str) -> None:
    change, reason = REFUSED[case]
    request = replace(SERVED, **change)
    candidates = {c.backend: c for c in describe(request)}
    assert tuple(candidates) == BACKENDS
    assert candidates["native"].reason == reason and not candidates["native"].usable
    assert candidates["reference"].reason is None and candidates["reference"].usable
    backend = choose(request)
    assert str(backend) == "reference"
    assert backend.refused["native"] == reason and "not a GPU" in backend.refused["triton"]
    wide = torch.promote_types(request.dtype, torch.float32)
    assert backend.gradient_dtype(request.dtype) == wide


def test_not_built_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("G2R_BACKEND", raising=False)
    monkeypatch.setattr(native_ops, "load", lambda: "there is no compiler")
    assert choose(SERVED).refused["native"] == "there is no compiler"
    monkeypatch.setenv("G2R_BACKEND", "native")
    with pytest.raises(BackendError, match="there is no compiler"):
        choose(SERVED)


@pytest.mark.usefixtures("built")
def test_a_forced_backend_serves_or_says_everything_that_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("G2R_BACKEND", "reference")
    assert str(choose(SERVED)) == "reference"
    assert not native_serves(SERVED.device, SERVED.dtype, 64)
    monkeypatch.setenv("G2R_BACKEND", "native")
    assert str(choose(SERVED)) == "native: avx2"
    assert native_serves(SERVED.device, SERVED.dtype, 64)
    with pytest.raises(BackendError) as caught:
        choose(replace(SERVED, head_dim=24, hidden=40))
    assert len(caught.value.reasons) == 2
    for reason in ("head_dim 24", "hidden size 40", "G2R_BACKEND=native", "G2R_BACKEND=auto"):
        assert reason in str(caught.value)
    monkeypatch.setenv("G2R_BACKEND", "cuda")
    with pytest.raises(InputError, match=r"names no backend.*got cuda"):
        choose(SERVED)


GPU = replace(SERVED, device=torch.device("cuda", 1), dtype=torch.bfloat16)

# What Triton's kernels cannot serve, and what they say.
REFUSED_BY_TRITON: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": torch.device("cpu")}, "the device is cpu, not a GPU"),
    "dtype": ({"dtype": torch.float64}, "the dtype is float64, not float32, bfloat16 or float16"),
    "head_dim": ({"head_dim": 17}, "head_dim 17 is not even and at most 256"),
    "long heads": ({"head_dim": 272}, "head_dim 272 is not even and at most 256"),
    "long heads in float32": (
        {"head_dim": 192, "dtype": torch.float32},
        "head_dim 192 is not even and at most 128",
    ),
    "wide": ({"hidden": 16400}, "hidden size 16400 is above 16384"),
}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were an NVIDIA GPU, of compute capability 8.0, and Triton; nothing runs there."""
    monkeypatch.delenv("G2R_BACKEND", raising=False)
    monkeypatch.delenv("G2R_PRODUCTS", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton_device, "triton_version", lambda: "3.9.0")
    monkeypatch.setattr("g2r_fast.backends.triton_version", lambda: "3.9.0")
    monkeypatch.setattr(triton_device, "is_interpreted", lambda: False)
    monkeypatch.setattr("g2r_fast.backends.is_interpreted", lambda: False)
    monkeypatch.setattr(triton_device, "_problem_of_launch", lambda device: None)
    monkeypatch.setattr(cuda_attention, "serves", lambda *asked: None)
    return monkeypatch


@pytest.mark.parametrize("case", REFUSED_BY_TRITON)
def test_what_triton_cannot_serve_is_told(case: str, a_gpu: pytest.MonkeyPatch) -> None:
    change, reason = REFUSED_BY_TRITON[case]
    candidates = {c.backend: c for c in describe(replace(GPU, **change))}
    assert candidates["triton"].reasons == (reason,)
    if case != "device":  # what Triton cannot do, the native backend of a GPU cannot either
        assert candidates["native"].reasons == (reason,)
        assert choose(replace(GPU, **change)).name == "reference"


# What keeps Triton from a GPU, and with it everything but plain PyTorch.
NO_TRITON: dict[str, tuple[str, Any, str]] = {
    "absent": ("triton_device.triton_version", lambda: None, "pip install 'g2r-fast[gpu]'"),
    "interpreted": ("triton_device.is_interpreted", lambda: True, "TRITON_INTERPRET is set"),
    "broken": (
        "triton_device._problem_of_launch",
        lambda device: "its kernels do not run here (no gcc)",
        "no gcc",
    ),
}


@pytest.mark.parametrize("case", NO_TRITON)
def test_a_gpu_without_a_triton_that_runs(case: str, a_gpu: pytest.MonkeyPatch) -> None:
    name, value, told = NO_TRITON[case]
    a_gpu.setattr(f"g2r_fast.{name}", value)
    backend = choose(GPU)
    assert (backend.name, backend.on_gpu, backend.keeps_attended) == ("reference", False, False)
    assert told in backend.refused["triton"] and told in backend.refused["native"]
    assert not triton_scoring.serves(GPU.device)


def test_gpus_that_are_too_old_or_not_nvidias(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5 is below 8.0" in choose(GPU).refused["triton"]
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    a_gpu.setattr(torch.version, "hip", "6.4")
    assert "AMD" in choose(GPU).refused["triton"] and choose(GPU).name == "reference"
    assert not triton_scoring.serves(GPU.device)


def test_a_gpu_with_and_without_our_attention(a_gpu: pytest.MonkeyPatch) -> None:
    backend = choose(GPU)
    assert str(backend) == "native: CUDA attention by mma, triton 3.9.0"
    assert backend.on_gpu
    assert triton_scoring.serves(GPU.device)
    # Where Triton has the faster one; but whoever asks for ours gets it.
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(GPU).name == "triton" and "faster" in choose(GPU).refused["native"]
    a_gpu.setenv("G2R_BACKEND", "native")
    assert choose(GPU).name == "native"
    a_gpu.setenv("G2R_PRODUCTS", "wgmma")
    assert "attention by wgmma" in str(choose(GPU))
    a_gpu.delenv("G2R_PRODUCTS")
    a_gpu.delenv("G2R_BACKEND")
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    a_gpu.setattr(cuda_attention, "serves", lambda *asked: "there is no nvcc")
    backend = choose(GPU)
    assert str(backend) == "triton: triton 3.9.0" and backend.on_gpu and backend.keeps_attended
    assert backend.refused == {"native": "there is no nvcc"}
    assert backend.gradient_dtype(torch.bfloat16) == torch.bfloat16


def test_the_interpreter_is_taken_only_where_it_is_asked_for(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr("g2r_fast.backends.is_interpreted", lambda: True)
    a_gpu.setattr(triton_device, "is_interpreted", lambda: True)
    request = replace(SERVED, head_dim=24)  # no native kernels for it
    assert choose(request).name == "reference"
    a_gpu.setenv("G2R_BACKEND", "triton")
    assert str(choose(request)) == "triton: triton 3.9.0 interpreted"


def test_the_reference_alone_asks_for_nothing_to_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("asked for the native kernels")

    monkeypatch.setattr(native_ops, "load", never)
    monkeypatch.setenv("G2R_BACKEND", "reference")
    model = tiny_model("llama", hidden_size=64, head_dim=16)
    assert str(FrozenDecoder(model).backend()) == "reference"
    scores(model, group())


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_autograd_engine_is_no_way_around_a_forced_backend(
    backend: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2R_BACKEND", backend)
    model = model_of(GPT2)
    with pytest.raises(BackendError) as caught:
        choose_engine(model, engine)
    told = str(caught.value)
    assert f"G2R_BACKEND={backend} cannot serve" in told
    assert ("model_type 'gpt2'" if engine == "auto" else "engine='autograd'") in told
    with pytest.raises(BackendError, match="engine='autograd'"):
        choose_engine(tiny_model("llama"), "autograd")


def test_the_autograd_engine_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2R_BACKEND", "reference")
    assert choose_engine(tiny_model("llama"), "autograd").name == "autograd"
    monkeypatch.setattr(engine_module, "_told", set())
    with pytest.warns(UserWarning, match="slower autograd engine"):
        assert choose_engine(model_of(GPT2)).name == "autograd"


def test_the_packed_engine_is_not_chosen_for_a_backend_that_cannot_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("G2R_BACKEND", "native")
    with pytest.raises(BackendError, match="head_dim 12"):
        choose_engine(tiny_model("qwen3"))


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("engine", ["auto", "packed", "autograd"])
@pytest.mark.parametrize("name", ["G2R_BACKEND", "G2R_BUILD", "G2R_PRODUCTS"])
def test_a_setting_without_meaning_is_told_though_nothing_needs_it(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "nonsense")
    with pytest.raises(InputError, match=rf"{name}.*got nonsense"):
        choose_engine(tiny_model("llama"), engine)
    with pytest.raises(InputError, match=rf"{name}.*got nonsense"):
        choose(SERVED)


def test_kernels_that_do_not_run_here_are_a_reason_and_stop_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load() -> None:
        raise InputError("G2R_CPU names no kernels", got="sse9")

    monkeypatch.delenv("G2R_BACKEND", raising=False)
    monkeypatch.setattr(native_ops, "load", load)
    assert describe(SERVED)[0].reason == "G2R_CPU names no kernels; got sse9."
    with pytest.raises(InputError, match="got sse9"):
        choose(SERVED)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_scattered_have_names(name: str) -> None:
    model = tiny_model("qwen3")
    assert read_weights(model).scattered == ()
    weight = model.get_parameter(name)
    weight.data = weight.data.mT.contiguous().mT
    assert read_weights(model).scattered == (name,)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_the_name_that_the_model_has_for_it(family: str) -> None:
    model = tiny_model(family)
    named = dict(read_weights(model)._named())
    for name, parameter in model.named_parameters():
        assert named.pop(name).data_ptr() == parameter.data_ptr()
    # Tied embeddings are one parameter, and two weights.
    assert set(named) <= {"lm_head.weight"}


@pytest.mark.usefixtures("built")
def test_a_model_is_asked_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", hidden_size=64, head_dim=16)
    decoder = FrozenDecoder(model)
    assert decoder.backend().name == "native"
    up = model.model.layers[1].mlp.up_proj.weight
    up.data = up.data.mT.contiguous().mT
    told = FrozenDecoder(model).backend().refused["native"]
    assert told == "the weight model.layers.1.mlp.up_proj.weight is not contiguous in memory"
    tiny = FrozenDecoder(tiny_model("llama", dtype=torch.float64)).backend()
    assert tiny.refused["native"].count(";") == 1  # dtype and head_dim


def test_a_run_tells_its_backend_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = group()
    signal = TargetSignal(batch.spans, batch.target_ids, "dot", torch.device("cpu"))
    sequences = [
        PackedSequence(ids, start)
        for ids, (start, _) in zip(batch.input_ids, batch.spans, strict=True)
    ]
    engine = PackedEngine(tiny_model("qwen3"))
    done = engine.run(sequences, signal)
    assert done.backend == "reference"
    assert "head_dim 12" in done.backends_refused["native"]
    monkeypatch.setenv("G2R_BACKEND", "native")
    with pytest.raises(BackendError, match="head_dim 12"):
        engine.run([], signal)


def test_stats_tell_the_backend() -> None:
    stats = run(judge_of()).stats
    assert stats["backend"] == "reference"
    assert "head_dim 12" in stats["backends_refused"]["native"]
    stats = run(judge_of(), engine="autograd").stats
    assert (stats["backend"], stats["backends_refused"]) == ("transformers", {})
