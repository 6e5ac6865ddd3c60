"""The attention kernels on a GPU against flash attention, and every configuration of Triton's.

A kernel is timed once its answer is right: that of flash attention over the same rows, or, on a
CPU, of plain PyTorch. Times are GPU times from events, with the L2 cache written over in between.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.flash import Lengths, attend, route
from bench.gpu_ceilings import seconds_of, short
from bench.workload import make_workload
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.tables import backward_queries, forward_queries

__all__ = ["ATTENTION_CASES", "SMALL", "AttentionCase", "attention", "sweep"]

# Both sides round probabilities and their gradients to bfloat16, at other places.
BFLOAT16_LIMIT = 0.02
FLOAT32_LIMIT = 1e-4


@dataclass(frozen=True)
class AttentionCase:
    heads: int
    kv_heads: int
    head_dim: int
    prompt: int
    response: tuple[int, int]
    tail: int = 64
    group_size: int = 8
    items: int = 8


ATTENTION_CASES = {
    "7b, prompt 512": AttentionCase(28, 4, 128, 512, (300, 600)),
    "1.5b, prompt 512": AttentionCase(12, 2, 128, 512, (300, 600)),
    "7b, prompt 8192, one response": AttentionCase(28, 4, 128, 8192, (512, 512), group_size=1),
    "1.5b, prompt 2048": AttentionCase(12, 2, 128, 2048, (300, 600)),
}
SMALL = AttentionCase(4, 2, 16, 20, (5, 9), tail=3, group_size=2, items=2)


class _Attention:
    """Inputs of one case, what ours computes of them, and what flash attention does."""

    def __init__(self, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> None:
        workload = make_workload(
            group_size=case.group_size, items=case.items, prompt=case.prompt,
            response=case.response, tail=case.tail, true_share=1.0, vocab_size=50000,
        )  # fmt: skip
        self.plan = plan = PackedPlan.build(
            [
                PackedSequence(workload.sequence_ids(i, k), case.prompt)
                for i, k in workload.judgements
            ]
        )
        self.back = plan.backward(range(len(workload.judgements)))
        live = [s for s in plan.segments if s.saved_row is not None]
        saved = torch.cat([torch.arange(s.row, s.row + len(s)) for s in live])
        self.forward_queries = forward_queries(plan)
        self.backward_queries = backward_queries(plan, self.back, saved)
        self.dtype, self.device, self.case = dtype, device, case
        generator = torch.Generator(device).manual_seed(0)

        def draw(rows: int, heads: int) -> Tensor:
            shape = (rows, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def empty(rows: int, heads: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows, heads, case.head_dim, dtype=dtype, device=device)

        self.q = draw(plan.rows, case.heads) * case.head_dim**-0.5
        self.k, self.v = draw(plan.rows, case.kv_heads), draw(plan.rows, case.kv_heads)
        self.out = empty(plan.rows, case.heads)
        self.lse = torch.empty(plan.rows, case.heads, device=device)
        self.saved = saved.to(device)
        self.grad_out = draw(self.back.rows, case.heads)
        self.dq = empty(self.back.rows, case.heads)
        self.dk, self.dv = (empty(self.back.rows, case.kv_heads, torch.float32) for _ in range(2))
        self._flash_forward_inputs()
        self._flash_backward_inputs()

    def _path(self, segment: Any) -> list[Any]:
        return [*(self.plan.segments[i] for i in segment.path), segment]

    def _rows(self, segments: Sequence[Any]) -> Tensor:
        return torch.cat([torch.arange(s.row, s.row + len(s)) for s in segments])

    def _flash_forward_inputs(self) -> None:
        paths = [self._path(segment) for segment in self.plan.segments]
        keys = [self._rows(path) for path in paths]
        self.forward_keys = torch.cat(keys).to(self.device)
        counts = [len(segment) for segment in self.plan.segments]
        self.forward_lengths = Lengths(counts, [len(rows) for rows in keys], self.device)
        self.forward_pairs = sum(
            n * len(rows) - n * (n - 1) // 2 for n, rows in zip(counts, keys, strict=True)
        )

    def _flash_backward_inputs(self) -> None:
        runs: dict[int, list[Any]] = {}
        for run in self.back.runs:
            runs.setdefault(run.segment, []).append(run)
        queries, back, keys, alive = [], [], [], []
        counts, lengths, first = [], [], 0
        self.queries_pairs = self.keys_pairs = 0
        for lane in range(len(self.plan.leaves)):
            path = [*self.plan.segments[self.plan.leaves[lane]].path, self.plan.leaves[lane]]
            segments = [self.plan.segments[i] for i in path]
            rows = self._rows(segments)
            mine = 0
            for index, segment in zip(path, segments, strict=True):
                for run in runs.get(index, []):
                    if lane not in run.lanes:
                        continue
                    tokens = torch.arange(run.tokens)
                    queries.append(segment.row + run.start - segment.start + tokens)
                    back.append(run.row + tokens * len(run.lanes) + run.lanes.index(lane))
                    mine += run.tokens
            keys.append(rows)
            alive.append(torch.arange(first + len(rows) - mine, first + len(rows)))
            first += len(rows)
            counts.append(mine)
            lengths.append(len(rows))
            self.queries_pairs += mine * len(rows) - mine * (mine - 1) // 2
            self.keys_pairs += mine * (mine + 1) // 2
        self.query_rows, self.back_rows, self.key_rows, self.alive = (
            torch.cat(rows).to(self.device) for rows in (queries, back, keys, alive)
        )
        self.backward_lengths = Lengths(counts, lengths, self.device)

    # --- ours -------------------------------------------------------------------------------------

    def forward(self, module: Any, **options: Any) -> None:
        module.attention_forward(
            self.forward_queries, self.q, self.k, self.v, self.out, self.lse,
            window=None, softcap=0.0, **options,
        )  # fmt: skip

    def keep(self) -> None:
        """What the backward reads, as the engine keeps it."""
        self.q_saved, self.out_saved = self.q[self.saved], self.out[self.saved]
        self.lse_saved = self.lse[self.saved]

    def backward(self, module: Any, **options: Any) -> None:
        takes_out = "out" in inspect.signature(module.attention_backward).parameters
        outs = [self.out_saved] if takes_out else []
        module.attention_backward(
            self.backward_queries, self.q_saved, self.k, self.v, *outs, self.lse_saved,
            self.grad_out, self.dq, self.dk, self.dv, window=None, softcap=0.0, **options,
        )  # fmt: skip

    # --- theirs -----------------------------------------------------------------------------------

    def flash_forward(self) -> Callable[[], Tensor]:
        k, v = self.k[self.forward_keys], self.v[self.forward_keys]
        return lambda: attend(self.q, k, v, self.forward_lengths, 1.0)

    def flash_backward(self) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
        inputs = [
            x[rows].requires_grad_()
            for x, rows in (
                (self.q, self.query_rows), (self.k, self.key_rows), (self.v, self.key_rows)
            )
        ]  # fmt: skip
        with torch.enable_grad():
            out = attend(inputs[0], inputs[1], inputs[2], self.backward_lengths, 1.0)
        grad = self.grad_out[self.back_rows]
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), inputs

    def errors(self, forward: Tensor, grads: Sequence[Tensor]) -> dict[str, float]:
        dq, dk, dv = grads
        pairs = {
            "out": (self.out, forward),
            "dq": (self.dq[self.back_rows], dq),
            "dk": (self.dk[self.back_rows], dk[self.alive]),
            "dv": (self.dv[self.back_rows], dv[self.alive]),
        }
        return {
            name: float((have.float() - want.float()).norm() / want.float().norm())
            for name, (have, want) in pairs.items()
        }


def _implementations(device: torch.device) -> dict[str, tuple[str, dict[str, Any]]]:
    """Module, and options of its functions."""
    if device.type != "cuda":
        return {"eager": ("g2r_fast.eager.attention", {})}
    native = "g2r_fast.cuda_attention"
    found = {
        "triton": ("g2r_fast.triton_attention", {}),
        "native": (native, {"products": "mma"}),
    }
    if torch.cuda.get_device_capability(device) == (9, 0):
        found["native, wgmma"] = (native, {"products": "wgmma"})
    return found


def attention(
    case: AttentionCase, device: torch.device | str, *, repeats: int = 10
) -> dict[str, Any]:
    """Milliseconds of forward and backward, ours and flash attention's over the same rows."""
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limit = BFLOAT16_LIMIT if device.type == "cuda" else FLOAT32_LIMIT
    at = _Attention(case, device, dtype)
    flop = 2 * case.heads * case.head_dim / 1e12
    found: dict[str, Any] = {
        "flash": route(device, dtype, case.heads // case.kv_heads, case.head_dim),
        "forward_rows": at.plan.rows,
        "backward_rows": at.back.rows,
    }
    theirs = at.flash_forward()
    flash_out = theirs()
    their_forward = statistics.median(seconds_of(theirs, device, repeats=repeats, flush=True))
    found["flash_forward_ms"] = their_forward * 1e3
    backwards, _ = at.flash_backward()
    grads = backwards()
    their_backward = statistics.median(seconds_of(backwards, device, repeats=repeats, flush=True))
    found["flash_backward_ms"] = their_backward * 1e3
    for name, (path, options) in _implementations(device).items():
        try:
            found[name] = entry = {}
            module = importlib.import_module(path)
            run_forward = functools.partial(at.forward, module, **options)
            run_backward = functools.partial(at.backward, module, **options)
            run_forward()
            at.keep()
            run_backward()
            errors = at.errors(flash_out, grads)
            entry["errors"] = errors
            if not max(errors.values()) <= limit:
                entry["refused"] = f"errors against flash attention above {limit}"
                continue
            forward = statistics.median(
                seconds_of(run_forward, device, repeats=repeats, flush=True)
            )
            backward = statistics.median(
                seconds_of(run_backward, device, repeats=repeats, flush=True)
            )
            entry |= {
                "forward_ms": forward * 1e3,
                "forward_tflop_per_s": 2 * flop * at.forward_pairs / forward,
                "forward_times_faster": their_forward / forward,
                "backward_ms": backward * 1e3,
                "backward_required_tflop_per_s": flop
                * (3 * at.queries_pairs + 2 * at.keys_pairs)
                / backward,
                "backward_times_faster": their_backward / backward,
            }
            if name == "triton":
                entry |= _halves(at, device, repeats, their_backward)
        except Exception as error:
            found[name]["not_measured"] = short(error)
    return found


def _halves(
    at: _Attention, device: torch.device, repeats: int, their_backward: float
) -> dict[str, float]:
    """The two launches of the Triton backward apart: dQ alone, and the own block's dK and dV."""
    queries, keys = _launches(at)
    first = statistics.median(seconds_of(queries, device, repeats=repeats, flush=True))
    second = statistics.median(seconds_of(keys, device, repeats=repeats, flush=True))
    return {
        "dq_only_ms": first * 1e3,
        "dq_only_times_faster": their_backward / first,
        "own_block_ms": second * 1e3,
    }


def _default_config(op: str, q: Tensor) -> Any:
    from g2r_fast.kernels.configs import attention_config

    extra = [0.0] if len(inspect.signature(attention_config).parameters) > 2 else []
    return attention_config(op, q, *extra)


def _launches(
    at: _Attention, for_queries: Any = None, for_keys: Any = None
) -> tuple[Callable[[], None], Callable[[], None]]:
    from g2r_fast.kernels.attention_backward_keys import attention_backward_keys
    from g2r_fast.kernels.attention_backward_queries import attention_backward_queries

    from g2r_fast.device_tables import backward_tiles

    for_queries = for_queries or _default_config("queries", at.q)
    for_keys = for_keys or _default_config("keys", at.q)
    group = at.case.heads // at.case.kv_heads
    tiles = backward_tiles(at.backward_queries, group, for_queries.rows, for_keys.keys, at.device)
    delta = torch.empty(at.grad_out.shape[:2], device=at.device)
    options: dict[str, Any] = {"window": None, "softcap": 0.0}

    def queries() -> None:
        attention_backward_queries(
            tiles, at.q_saved, at.k, at.v, at.out_saved, at.lse_saved, at.grad_out, at.dq, delta,
            config=for_queries, **options,
        )  # fmt: skip

    def keys() -> None:
        attention_backward_keys(
            tiles, at.q_saved, at.k, at.v, at.lse_saved, at.grad_out, delta, at.dk, at.dv,
            config=for_keys, **options,
        )  # fmt: skip

    queries()  # which writes delta
    return queries, keys


# --- the table of configurations ------------------------------------------------------------------

TILES = {  # rows, keys
    "forward": [(64, 64), (128, 32), (128, 64), (128, 128), (64, 128)],
    "queries": [(64, 32), (64, 64), (128, 32), (128, 64), (64, 128)],
    "keys": [(32, 64), (64, 64), (32, 128), (64, 128), (128, 64)],
}


def sweep(
    case: AttentionCase,
    device: torch.device | str,
    *,
    ops: Sequence[str] = ("forward", "queries", "keys"),
    warps: Sequence[int] = (4, 8),
    stages: Sequence[int] = (1, 2, 3),
    log: Callable[[str], None] = print,
    another: Callable[[], bool] = lambda: True,
) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of every launch configuration of the Triton attention kernels, best first.

    A configuration with another answer than the shipped one's, or that does not compile, says so.
    """
    device = torch.device(device)
    at = _Attention(case, device, torch.bfloat16)
    module = importlib.import_module("g2r_fast.triton_attention")
    at.forward(module)
    at.keep()
    at.backward(module)
    right = {name: getattr(at, name).clone() for name in ("out", "dq", "dk", "dv")}
    found: dict[str, list[dict[str, Any]]] = {}
    for op in ops:
        rows: list[dict[str, Any]] = []
        shipped = _default_config(op, at.q)
        candidates = [shipped, *_candidates(shipped, TILES[op], warps, stages)]
        for config in candidates:
            if not another():
                break
            entry = {
                name: getattr(config, name) for name in ("rows", "keys", "num_warps", "num_stages")
            }
            entry["shipped"] = config is shipped
            try:
                run = _launch(at, module, op, config)
                run()
                written = {"forward": ("out",), "queries": ("dq",), "keys": ("dk", "dv")}[op]
                for name in written:
                    want = right[name].float()
                    error = float((getattr(at, name).float() - want).norm() / want.norm())
                    if not error < BFLOAT16_LIMIT:
                        raise ArithmeticError(f"{name} differs by {error:.1e}")
                seconds = seconds_of(run, device, repeats=8, warm=2, flush=True)
                entry["ms"] = statistics.median(seconds) * 1e3
            except Exception as error:
                entry["not_measured"] = short(error)
            rows.append(entry)
            log(f"{op}: {entry}")
        found[op] = sorted(rows, key=lambda entry: entry.get("ms", float("inf")))
    return found


def _candidates(
    shipped: Any,
    tiles: Sequence[tuple[int, int]],
    warps: Sequence[int],
    stages: Sequence[int],
) -> Iterator[Any]:
    for (rows, keys), count, depth in itertools.product(tiles, warps, stages):
        config = replace(shipped, rows=rows, keys=keys, num_warps=count, num_stages=depth)
        if config != shipped:
            yield config


def _launch(at: _Attention, module: Any, op: str, config: Any) -> Callable[[], None]:
    if op == "forward":
        return lambda: at.forward(module, config=config)
    if op == "queries":
        return _launches(at, for_queries=config)[0]
    return _launches(at, for_keys=config)[1]
