"""The gated activation of an MLP and its derivatives.

    out = act(gate) * up                                # silu, gelu or gelu_tanh, in float32
    d_gate[index] = act'(gate) * up; d_up[index] = act(gate)        # where index >= 0
    kept_out[index] = out                                           # if wanted

The derivatives are what a backward needs, so it evaluates no exponential. Cost per row of I, with
two-byte storage: 6I bytes, 4I more where it is kept, 6I with `kept_out`; memory bandwidth is the
bound.
"""

from __future__ import annotations

import torch
from g2r_fast.kernels.configs import LAUNCHES
from g2r_fast.kernels.launching import TRITON_DTYPES, CompileCase, check_vector, require_triton
from g2r_fast.kernels.rms_norm import check_dense, check_shapes

from g2r_fast.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it; gated() then says so
    triton = None

__all__ = ["ACTIVATIONS", "CONFIG", "compile_cases", "gated"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

CONFIG = LAUNCHES["gated"]

if triton is not None:

    @triton.jit
    def _gated_kernel(  # type: ignore[no-untyped-def]
        gate_ptr,
        up_ptr,
        index_ptr,
        out_ptr,
        d_gate_ptr,
        d_up_ptr,
        kept_out_ptr,
        ACTIVATION: tl.constexpr,
        KEEP_OUT: tl.constexpr,
        I: tl.constexpr,  # noqa: E741
        STEPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        row = (program // STEPS).to(tl.int64)
        columns = program % STEPS * BLOCK + tl.arange(0, BLOCK)
        mask = columns < I
        saved = tl.load(index_ptr + row).to(tl.int64)
        at = row * I + columns
        x = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            share = tl.sigmoid(x)
            slope = share + x * share * (1.0 - share)
        elif ACTIVATION == "gelu":
            # x * Phi(x) of the standard normal distribution; its density is phi.
            share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            slope = share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
        else:
            # (1 + tanh(u)) / 2 is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3).
            square = x * x
            share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
            inner = 1.5957691216057308 * x * (1.0 + 3 * 0.044715 * square)
            slope = share + inner * (share * (1.0 - share))
        act = x * share
        out = (act * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=mask)
        kept = columns < tl.where(saved >= 0, I, 0)
        kept_at = saved * I + columns
        tl.store(d_gate_ptr + kept_at, (slope * up).to(out_ptr.dtype.element_ty), mask=kept)
        tl.store(d_up_ptr + kept_at, act.to(out_ptr.dtype.element_ty), mask=kept)
        if KEEP_OUT:
            tl.store(kept_out_ptr + kept_at, out, mask=kept)


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    kept_out: torch.Tensor | None = None,
    *,
    activation: str = "silu",
) -> None:
    """``out = act(gate) * up``; its derivatives by ``gate`` and ``up`` are kept.

    Args:
        gate: [R, I] float32, float16 or bfloat16.
        up: [R, I] of that dtype, as is all of the following.
        index: [R] int32, the row of ``d_gate`` and ``d_up`` to write, -1 for none. The values are
            not checked here, as that would wait for the device.
        out: [R, I]; may be ``gate`` or ``up``.
        d_gate: [kept, I], written at ``index``.
        d_up: [kept, I], written at ``index``.
        kept_out: [kept, I], written at ``index`` too: ``out``; or None.
        activation: "silu", "gelu" or "gelu_tanh".

    Everything is contiguous and computed in float32.

    Raises:
        ImportError: triton is not installed.
        InputError, InputTypeError: layouts, dtypes, devices or activations other than these.
    """
    require_triton(triton, "gated")
    if activation not in ACTIVATIONS:
        raise InputError("unknown activation", expected=" | ".join(ACTIVATIONS), got=activation)
    keep_out = kept_out is not None
    kept_out = d_up if kept_out is None else kept_out
    check_dense(gate.dtype, gate, gate=gate, up=up, out=out, d_gate=d_gate, d_up=d_up)
    check_dense(gate.dtype, gate, kept_out=kept_out)
    check_vector("index", index, (torch.int32,), gate)
    check_shapes((-1, -1), gate=gate)
    rows, width = gate.shape
    check_shapes((rows, width), up=up, out=out)
    check_shapes((-1, width), d_gate=d_gate)
    check_shapes(tuple(d_gate.shape), d_up=d_up, kept_out=kept_out)
    steps = triton.cdiv(width, CONFIG.blocks["BLOCK"])
    if rows:
        _gated_kernel[(rows * steps,)](
            gate,
            up,
            index,
            out,
            d_gate,
            d_up,
            kept_out,
            ACTIVATION=activation,
            KEEP_OUT=keep_out,
            I=width,
            STEPS=steps,
            **CONFIG.blocks,
            **CONFIG.options(),
        )


def compile_cases() -> list[CompileCase]:
    """Every activation and storage dtype; rows of whole vectors and others."""
    return [
        CompileCase(
            name=f"gated {activation}{' keep' * keep} {dtype}{' aligned' * aligned}",
            kernel=_gated_kernel,
            signature={
                "gate_ptr": f"*{dtype}",
                "up_ptr": f"*{dtype}",
                "index_ptr": "*i32",
                "out_ptr": f"*{dtype}",
                "d_gate_ptr": f"*{dtype}",
                "d_up_ptr": f"*{dtype}",
                "kept_out_ptr": f"*{dtype}",
            },
            constants={
                "ACTIVATION": activation,
                "KEEP_OUT": keep,
                "I": width,
                "STEPS": triton.cdiv(width, CONFIG.blocks["BLOCK"]),
                **CONFIG.blocks,
            },
            options=CONFIG.options(),
            aligned=aligned,
        )
        for activation in ACTIVATIONS
        for keep in (False, True)
        for dtype in TRITON_DTYPES.values()
        for width, aligned in ((8960, True), (1037, False))
    ]
