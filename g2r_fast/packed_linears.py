"""What a packed backward shows a signal that reads linear layers: inputs and output gradients.

The rows are those of the stage that is under way: first the rows that are read, which alone go
through the last layer beyond its keys and values, then every backward row.
"""

from __future__ import annotations

import torch

from .families import LayerWeights, Linear
from .signal import LinearRows, Signal
from .tape import LayerTape, MlpGrads, MlpTape, NormTape, PassContext, QkvGrads

__all__ = ["LinearReader"]

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


class LinearReader:
    """The memory that stages fill for a signal, and the calls of the signal around them.

    Args:
        every: all backward rows.
        reads: the rows that are read.
    """

    def __init__(
        self, context: PassContext, signal: Signal, *, every: LinearRows, reads: LinearRows
    ) -> None:
        self.context = context
        self.signal = signal
        self._every = every.to(context.device)
        self._rows = reads.to(context.device)
        self._mlp: MlpGrads | None = None
        self._qkv: QkvGrads | None = None

    def enter_every_row(self) -> None:
        """From here on the stages run over all backward rows."""
        self._rows, self._mlp = self._every, None

    def norm(self, name: str, grads: torch.Tensor, normed: torch.Tensor) -> None:
        """A norm of `[rows, X]`, from the gradients of its output."""
        self.signal.on_scale(name, grads * normed, self._rows)

    def before_mlp(self, layer: LayerWeights, tape: MlpTape, dx: torch.Tensor) -> MlpGrads:
        assert tape.activation is not None
        self._linear(layer, {"mlp.down_proj": layer.down}, tape.activation, dx)
        if self._mlp is None:
            width = 2 * len(layer.gate.weight)
            self._mlp = MlpGrads(
                self.context.empty(len(dx), width), self.context.empty_wide(*dx.shape)
            )
        return self._mlp

    def after_mlp(self, layer: LayerWeights, tape: LayerTape, dx: torch.Tensor) -> None:
        assert self._mlp is not None and tape.out is not None
        self._linear(
            layer,
            {"mlp.gate_proj": layer.gate, "mlp.up_proj": layer.up},
            tape.norm_mid.normed * layer.post_norm,
            self._mlp.gate_up,
        )
        name = f"{layer.name}.post_attention_layernorm"
        self.signal.on_scale(name, self._mlp.norm, self._rows)
        attended = tape.out.flatten(1).to(tape.q.dtype)
        self._linear(layer, {"self_attn.o_proj": layer.o}, attended, dx)

    def before_qkv(self, layer: LayerWeights, rows: int, which: str) -> QkvGrads:
        """`which` of q, k and v send something."""
        wide = self.context.empty_wide
        dim = self.context.weights.head_dim
        self._qkv = QkvGrads(
            self.context.empty(rows, sum(len(getattr(layer, of).weight) for of in which)),
            wide(rows, layer.q.weight.shape[1]),
            wide(rows, dim) if layer.q_norm is not None and "q" in which else None,
            wide(rows, dim) if layer.k_norm is not None and "k" in which else None,
        )
        return self._qkv

    def after_qkv(self, layer: LayerWeights, norm: NormTape, which: str) -> None:
        shown = self._qkv
        assert shown is not None
        sent = {f"self_attn.{_PROJECTIONS[of]}": getattr(layer, of) for of in which}
        self._linear(layer, sent, norm.normed * layer.input_norm, shown.projected)
        self.signal.on_scale(f"{layer.name}.input_layernorm", shown.norm, self._rows)
        for of, products in (("q_norm", shown.q_norm), ("k_norm", shown.k_norm)):
            if products is not None:
                self.signal.on_scale(f"{layer.name}.self_attn.{of}", products, self._rows)
        self._qkv = None

    def _linear(
        self,
        layer: LayerWeights,
        linears: dict[str, Linear],
        inputs: torch.Tensor,
        grads: torch.Tensor,
    ) -> None:
        outputs = {f"{layer.name}.{name}": len(of.weight) for name, of in linears.items()}
        self.signal.on_linear(outputs, inputs, grads.to(inputs.dtype), self._rows)
