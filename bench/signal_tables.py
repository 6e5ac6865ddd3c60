"""Results of GRAIL, G2RL and VIGOR as text: a terminal's table, and columns of the documents'."""

from __future__ import annotations

import statistics
from typing import Any

from bench.cells import Cell, required, share, value
from bench.grpo_step import GRPO_STEPS
from bench.signal_scenarios import RIVALS_OF, SIGNAL_SCENARIOS

__all__ = ["SIGNAL_TABLES", "signal_table"]


def signal_table(result: dict[str, Any], title: str) -> str:
    """The result as plain text; beside every ratio what its FLOPs alone would give."""
    workload, scenario = result["workload"], result["scenario"]
    found = result["peak"].get(scenario["dtype"], {})
    rate = f"{found['best_gflops']:.0f}" if "best_gflops" in found else "not measured"
    row = "{:<46}{:>9}{:>18}{:>5}{:>11}{:>12}{:>10}{:>10}"
    lines = [
        f"{title}: G={workload['G']} prompt={workload['prompt']} "
        f"completions={workload['completions']}, {result['required_gflop']['total']:.1f} GFLOP "
        f"required, ours: {result['backend']}, peak GFLOP/s: {rate}",
        row.format(
            "", "median s", "min-max s", "reps", "it / ours", "FLOP bound", "of peak", "error"
        ),
    ]
    for entry in result["rivals"].values():
        times, ratio, part = entry["seconds"], entry["times_ours"], entry.get("share_of_peak")
        lines.append(
            row.format(
                entry["title"],
                f"{statistics.median(times):.2f}" if times else "-",
                f"{min(times):.2f}-{max(times):.2f}" if times else "-",
                len(times),
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{entry['flop_bound']:.2f}x",
                "-" if part is None else f"{part:.0%}",
                f"{entry['max_relative_error']:.1e}",
            )
        )
    for name, reason in result["unavailable"].items():
        lines.append(f"{RIVALS_OF[scenario['method']][name].title:<46}not run: {reason}")
    for name, memory in result["memory"].items():
        lines.append(
            f"memory of {name}: {memory['not_measured']}"
            if "not_measured" in memory
            else f"memory of {name}: {memory['extra_bytes'] / 1e6:.0f} MB beyond the model's "
            f"{memory['model_bytes'] / 1e6:.0f} MB"
        )
    return "\n".join(lines)


def _with_bound(rival: str) -> Cell:
    """`ratio (FLOP bound)`."""
    entry = value(f"rivals.{rival}", lambda found: found)

    def cell(result: dict[str, Any]) -> str:
        ratio = value(f"rivals.{rival}.times_ours", lambda found: f"{found:.2f}")(result)
        bound = result["rivals"].get(rival, {}).get("flop_bound")
        return f"{ratio} ({bound:.2f})" if entry(result) and bound and ratio[0].isdigit() else ratio

    return cell


def _megabytes(path: str) -> Cell:
    return value(path, lambda size: f"{size / 1e6:.0f} MB")


def _number(path: str, unit: str = "") -> Cell:
    return value(path, lambda found: f"{found:.2f}{unit}")


def _percent(path: str) -> Cell:
    return value(path, lambda part: f"{part * 100:.1f} %")


def _of(method: str) -> tuple[str, ...]:
    return tuple(name for name, one in SIGNAL_SCENARIOS.items() if one.method == method)


# Of each table: its rows' scenarios, and its columns. Ratios are seconds of the rival over ours,
# with the ratio of their FLOPs behind.
SIGNAL_TABLES: dict[str, tuple[tuple[str, ...], dict[str, Cell]]] = {
    "vigor": (
        _of("vigor"),
        {
            "required GFLOP": required,
            "g2r_fast, of peak": share("ours"),
            "loop": _with_bound("loop"),
            "tuned loop": _with_bound("tuned_loop"),
            "opacus": _with_bound("opacus"),
            "our PyTorch path": _with_bound("ours_reference"),
        },
    ),
    "vigor memory": (
        _of("vigor"),
        {
            "parameters": _megabytes("memory.loop.model_bytes"),
            "g2r_fast, beyond them": _megabytes("memory.ours.extra_bytes"),
            "loop, beyond them": _megabytes("memory.loop.extra_bytes"),
        },
    ),
    "g2rl": (
        _of("g2rl"),
        {
            "required GFLOP": required,
            "g2r_fast, of peak": share("ours"),
            "gradient through all logits": _with_bound("full_logits_gradient"),
            "gradient in chunks": _with_bound("chunked_gradient"),
            "our shortcut in stock PyTorch": _with_bound("shortcut"),
            "our PyTorch path": _with_bound("ours_reference"),
        },
    ),
    "grail": (
        _of("grail"),
        {
            "required GFLOP": required,
            "g2r_fast, of peak": share("ours"),
            "loop": _with_bound("loop"),
            "cached loop": _with_bound("cached_loop"),
            "tuned cached loop": _with_bound("tuned_cached_loop"),
            "slow loop": _with_bound("slow_loop"),
            "our PyTorch path": _with_bound("ours_reference"),
        },
    ),
    "grpo step": (
        tuple(GRPO_STEPS),
        {
            "step": _number("step_seconds", " s"),
            "public way adds": _number("added_seconds.public", " s"),
            "g2r_fast adds": _number("added_seconds.ours", " s"),
            "public way, of the step": _percent("added_share.public"),
            "g2r_fast, of the step": _percent("added_share.ours"),
            "public / g2r_fast": _number("times_ours"),
            "FLOP bound": _number("flop_bound"),
        },
    ),
}
