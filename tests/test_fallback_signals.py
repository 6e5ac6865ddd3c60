"""The autograd engine with signals that read hidden states and linear layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from fallback_models import CONFIGS, FLOAT32, GEMMA3, GPT2, PHI, V, group, model_of
from torch import Tensor, nn

from g2r_fast.errors import UnsupportedModelError
from g2r_fast.fallback import AutogradEngine
from g2r_fast.grad2reward import TargetSignal
from g2r_fast.plan import PackedSequence, Read
from g2r_fast.reference import relative_error
from g2r_fast.signal import Cotangents, LeafRows, LinearRows


class Anywhere(TargetSignal):
    """log p(target) after every read; keeps the leaf and what the linear layers saw."""

    def __init__(self, targets: dict[tuple[int, int], int], leaf: int = 0) -> None:
        super().__init__([], [], "dot", torch.device("cpu"))
        self.targets = targets
        self.leaf = leaf
        self.at_leaf: dict[int, tuple[LeafRows, Tensor, Tensor]] = {}
        self.linears: dict[str, list[tuple[Tensor, Tensor, LeafRows]]] = {}

    def cotangents(self, logits: Tensor, reads: Sequence[Read]) -> Cotangents | None:
        targets = torch.tensor([self.targets[r.sequence, r.position] for r in reads])
        values = nn.functional.one_hot(targets, V) - logits.softmax(-1)
        return Cotangents(range(len(reads)), values.to(logits.dtype))

    def on_leaf(self, rows: LeafRows, values: Tensor, grads: Tensor) -> None:
        (sequence,) = rows.lanes
        self.at_leaf[sequence] = (rows, values.clone(), grads[:, 0].clone())

    def on_linear(
        self, outputs: Mapping[str, int], inputs: Tensor, output_grads: Tensor, rows: LinearRows
    ) -> None:
        (name,) = outputs
        seen = (inputs.clone(), output_grads.clone(), rows)
        self.linears.setdefault(name, []).append(seen)


def losses(model: Any, ids: Sequence[int], targets: dict[int, int], **kwargs: Any) -> Any:
    output = model(input_ids=torch.tensor([ids]), use_cache=False, **kwargs)
    logps = output.logits[0].to(torch.float64).log_softmax(-1)
    return sum(logps[p, t] for p, t in targets.items()), output


@pytest.mark.parametrize("leaf", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_as_leaves_and_several_reads(name: str, leaf: int) -> None:
    """Shared prefixes; several reads, some of them inside the prefix and so without its cache."""
    # Else nothing asks for a graph here; the engine gets the frozen one.
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    ids, _, _ = group()
    starts = [9, 9, 9, 11, 7, 7]
    reads = [(-1,), (9, 12, -1), (-1,), (12, -1), (6, -1), (5, 8, -1)]
    sequences = [
        PackedSequence(i, start, read) for i, start, read in zip(ids, starts, reads, strict=True)
    ]
    targets = {
        (index, position): (3 * index + position) % V
        for index, sequence in enumerate(sequences)
        for position in sequence.reads
    }
    signal = Anywhere(targets, leaf)
    AutogradEngine(model_of(name)).run(sequences, signal)
    for index, sequence in enumerate(sequences):
        wanted = {p: t for (i, p), t in targets.items() if i == index}
        loss, output = losses(model, ids[index], wanted, output_hidden_states=True)
        hidden = output.hidden_states[leaf]
        (grads,) = torch.autograd.grad(loss, hidden)
        rows, values, actual = signal.at_leaf[index]
        start = sequence.backward_start
        assert (rows.start, rows.stop) == (start, len(ids[index]))
        assert relative_error(values, hidden[0, start:]) <= FLOAT32
        # What lies after the last read of a leaf so late gets no gradient at all.
        if grads[0, start:].any():
            assert relative_error(actual, grads[0, start:]) <= FLOAT32
        else:
            assert not actual.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_layer_is_read(name: str) -> None:
    """Sums over the tokens of inputs and output gradients are the weights' gradients."""
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:  # one gradient for two roles: take them apart
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    ids, _, _ = group()
    sequences = [PackedSequence(ids[0], 0, (4, 9, -1)), PackedSequence(ids[3], 0)]
    targets = {(0, 4): 3, (0, 9): 8, (0, len(ids[0]) - 1): 20, (1, len(ids[3]) - 1): 11}
    signal = Anywhere(targets)
    signal.reads_linears = True
    if any("experts." in n and isinstance(m, nn.Linear) for n, m in model.named_modules()):
        # transformers 4 has experts that are linear layers and see the rows sent to them.
        with pytest.raises(UnsupportedModelError, match="not one for each token"):
            AutogradEngine(model).run(sequences, signal)
        return
    AutogradEngine(model).run(sequences, signal)
    assert all(p.grad is None for p in model.parameters())
    names = {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }  # fmt: skip
    assert len(names) > 3 and set(signal.linears) == names
    total = sum(losses(model, ids[s], {p: t for (i, p), t in targets.items() if i == index})[0]
                for index, s in enumerate((0, 3)))  # fmt: skip
    total.backward()
    for layer in names:
        weight = model.get_submodule(layer).weight.grad
        if type(model.get_submodule(layer)).__name__ == "Conv1D":
            weight = weight.T
        products = [grads.T @ inputs for inputs, grads, _ in signal.linears[layer]]
        formed = torch.stack(products).sum(0)
        assert relative_error(formed, weight) <= FLOAT32
        for inputs, grads, rows in signal.linears[layer]:
            assert rows.offsets == (0, len(inputs)) == (0, len(grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [GPT2, GEMMA3])
def test_linears_behind_a_shared_prefix(name: str, dtype: torch.dtype) -> None:
    """Rows before the backward's start are not shown, with and without a cache; at unit scale."""
    model, (ids, spans, targets) = model_of(name), group()
    model = copy.deepcopy(model).to(dtype)

    def read(numbers: Sequence[int]) -> Anywhere:
        signal = Anywhere({(n, len(ids[i]) - 1): targets[i] for n, i in enumerate(numbers)})
        signal.reads_linears = True
        sequences = [PackedSequence(ids[i], spans[i][0]) for i in numbers]
        AutogradEngine(model).run(sequences, signal)
        return signal

    together = read(range(6))
    for i in range(6):
        single = read([i])
        for layer, ((inputs, grads, rows),) in single.linears.items():
            (found,) = [seen for seen in together.linears[layer] if seen[2].lanes == (i,)]
            assert found[2].offsets == rows.offsets
            assert 1 <= rows.offsets[-1] <= len(ids[i]) - spans[i][0]
            assert grads.dtype == torch.float32
            tolerance = FLOAT32 if dtype == torch.float32 else 0.1
            assert relative_error(found[0], inputs) <= tolerance
            assert relative_error(found[1], grads) <= tolerance
    # The head's output gradients are the cotangents themselves, whatever scale float16 travels at.
    head = "lm_head"
    ((_, grads, _),) = read([0]).linears[head]
    assert 0.5 < float(grads[-1].abs().max()) <= 1.0


def test_experts_that_see_other_rows_are_refused() -> None:
    class Experts(nn.Module):
        """Half of the tokens go to a linear layer of their own."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.expert = inner, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return torch.cat([out[:, :-3], out[:, -3:] + self.expert(x[0, -3:])], dim=1)

    model = copy.deepcopy(model_of(PHI))
    model.model.layers[1].mlp = Experts(model.model.layers[1].mlp).requires_grad_(False)
    ids, _, _ = group()
    signal = Anywhere({(0, len(ids[0]) - 1): 3})
    engine, sequences = AutogradEngine(model), [PackedSequence(ids[0], 4)]
    engine.run(sequences, signal)  # a signal that reads no linears does not mind
    signal.reads_linears = True

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.expert sees 3 rows"):
        engine.run(sequences, signal)
    assert hooks() == before


@pytest.mark.parametrize("name", [GPT2, GEMMA3])
@pytest.mark.parametrize("start", [0, 9])
def test_a_signal_of_the_head_alone(name: str, start: int) -> None:
    """Nothing goes back behind the head, which is shown all the same."""
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    ids, _, _ = group()
    sequences = [PackedSequence(i, min(start, len(i)), (4, 8, -1)) for i in ids[:3]]
    targets = {(i, p): (i + p) % V for i, s in enumerate(sequences) for p in s.reads}
    signal = Anywhere(targets)
    signal.leaf, signal.reads_linears = None, True  # type: ignore[assignment]
    done = AutogradEngine(model_of(name)).run(sequences, signal)
    assert done.rows_backward == 0 and not signal.at_leaf
    (head,) = signal.linears
    assert model.get_submodule(head) is model.get_output_embeddings()
    for index, (inputs, grads, rows) in enumerate(signal.linears[head]):
        assert rows.lanes == (index,) and rows.offsets == (0, 3)
        states: list[Tensor] = []
        handle = model.get_submodule(head).register_forward_pre_hook(
            lambda module, seen, states=states: states.append(seen[0])
        )
        logits = model(input_ids=torch.tensor([ids[index]]), use_cache=False).logits[0]
        handle.remove()
        at = list(sequences[index].reads)
        assert relative_error(inputs, states[0][0, at].detach()) <= FLOAT32
        expected = -logits[at].detach().softmax(-1)
        for row, position in enumerate(at):
            expected[row, targets[index, position]] += 1
        assert relative_error(grads, expected) <= FLOAT32
