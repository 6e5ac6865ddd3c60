"""Activation bytes kept between forward and backward, per forward row: the stock model and ours.

Stock: the frozen model through autograd, gradient for `inputs_embeds` only, last logit only.
Every storage that autograd saves is counted once; parameters and buffers are not. Per layer: the
difference between models of two and of one layer, so that embedding and head drop out. A storage
that is shared by neighbouring layers is thereby counted once, too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.conftest import Results
from bench.ours import ours_saved_bytes
from bench.workload import MODELS, build_model

CASES: dict[str, tuple[str, str, int]] = {  # model, dtype, rows
    "h512l8-float32": ("h512l8", "float32", 1024),
    "h512l8-bfloat16": ("h512l8", "bfloat16", 1024),
    "1.5b-layers-float32": ("1.5b-layers", "float32", 1024),
    "1.5b-layers-bfloat16": ("1.5b-layers", "bfloat16", 1024),
}

WHOLE = {"h512l8": 8, "1.5b-layers": 28}  # layers of the model whose shapes these are


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context manager that adds up the storages autograd saves inside it."""

    def __init__(self, model: nn.Module) -> None:
        self._skip = {
            tensor.untyped_storage().data_ptr()
            for tensor in [*model.parameters(), *model.buffers()]
        }
        self._sizes: dict[int, int] = {}
        # Holding on to the tensors keeps an address from being used twice.
        self._alive: list[Tensor] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]  # torch declares None
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._skip:
            self._sizes[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


def saved_bytes(model: PreTrainedModel, rows: int) -> int:
    """Bytes the stock model keeps for one sequence of `rows` tokens, all with gradient."""
    ids = torch.randint(model.config.vocab_size, (1, rows), device=model.device)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with SavedBytes(model) as saved:
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        logp = torch.log_softmax(logits[0, -1].float(), -1)[0]
    assert logp.requires_grad
    return saved.total


Device = str | torch.device


def stock_bytes_per_row_and_layer(
    name: str, dtype: torch.dtype, rows: int, device: Device = "cpu"
) -> float:
    one, two = (build_model(name, dtype=dtype, layers=n, device=device) for n in (1, 2))
    return (saved_bytes(two, rows) - saved_bytes(one, rows)) / rows


def our_bytes_per_row_and_layer(
    name: str, dtype: torch.dtype, rows: int, device: Device = "cpu"
) -> float:
    """Three layers less two: the last layer keeps little but K and V, so that a total divided by
    the number of layers would flatter us, the more so the fewer layers there are."""
    two, three = (build_model(name, dtype=dtype, layers=n, device=device) for n in (2, 3))
    return (ours_saved_bytes(three, rows) - ours_saved_bytes(two, rows)) / rows


def test_what_is_counted() -> None:
    """One storage once, whatever views of it are saved; no parameters; frozen linears: nothing."""
    frozen = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    with SavedBytes(frozen) as saved:
        frozen(x)
    assert saved.total == 0
    with SavedBytes(frozen) as saved:
        y = torch.sigmoid(frozen(x))  # saves its output
    assert saved.total == 3 * 8 * 4
    with SavedBytes(frozen) as saved:
        y = torch.sigmoid(frozen(x))
        y * y.view(8, 3).t().reshape(3, 8).clone()  # saves the output again, and one more
    assert saved.total == 2 * 3 * 8 * 4


def test_layers_extrapolate() -> None:
    """Every layer keeps the same, so that two layers tell of any number."""
    rows = 48
    per_layer = stock_bytes_per_row_and_layer("tiny", torch.float32, rows)
    three, one = (build_model("tiny", layers=layers) for layers in (3, 1))
    assert saved_bytes(three, rows) - saved_bytes(one, rows) == round(2 * per_layer * rows)


def _whole_model(one: float, per_layer: float, layers: int) -> float:
    """Bytes of all layers from those of a model of one layer and of every further one."""
    return one + (layers - 1) * per_layer


def measure(name: str, dtype: str, rows: int, device: Device = "cpu") -> dict[str, float | int]:
    torch_dtype = getattr(torch, dtype)
    unit = MODELS[name]["hidden_size"] * torch_dtype.itemsize
    layers = WHOLE.get(name, MODELS[name]["num_hidden_layers"])
    stock = stock_bytes_per_row_and_layer(name, torch_dtype, rows, device)
    own = our_bytes_per_row_and_layer(name, torch_dtype, rows, device)
    model = build_model(name, dtype=torch_dtype, layers=1, device=device)
    stock_whole = _whole_model(saved_bytes(model, rows) / rows, stock, layers)
    own_whole = _whole_model(ours_saved_bytes(model, rows) / rows, own, layers)
    return {
        "rows": rows,
        "layers": layers,
        "stock_bytes_per_row": stock_whole,
        "our_bytes_per_row": own_whole,
        "ratio": round(own_whole / stock_whole, 3),
        "stock_hidden_units_per_layer": round(stock / unit, 2),
        "our_hidden_units_per_layer": round(own / unit, 2),
        "ratio_per_layer": round(own / stock, 3),
    }


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.full_size] if shape == "1.5b-layers" else [])
        for name, (shape, *_) in CASES.items()
    ],
)
def test_activation_bytes(case: str, results: Results, request: pytest.FixtureRequest) -> None:
    name, dtype, rows = CASES[case]
    if request.config.getoption("--quick"):
        rows = 64
    result = measure(name, dtype, rows)
    results.add("activation_bytes", case, result)
    # The residual stream, gate and up alone are 2 + 2 I/H units: less means something was missed.
    shape = MODELS[name]
    least = 2 + 2 * shape["intermediate_size"] / shape["hidden_size"]
    assert result["stock_hidden_units_per_layer"] > least
    assert result["ratio"] <= 0.7
