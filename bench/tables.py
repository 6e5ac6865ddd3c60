"""Results as text: a table per scenario in a terminal, and the documents' tables.

A table in a document that is made from results files stands under a comment that names them:

    <!-- from bench/results/grad2reward-….json …; table "speed" of bench/tables.py -->

`python -m bench.publish` rewrites every such comment with its table; tests/test_bench_tables.py
holds the documents to it.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from bench.cells import NOT_RUN, Cell, required, seconds, share, times_ours
from bench.convergence_arms import ARMS
from bench.facts import RESULTS
from bench.grpo_step import GRPO_STEPS, step_file
from bench.repetitions import paired_ratio
from bench.rivals import RIVALS
from bench.scenarios import GPU_SCENARIOS, SCENARIOS
from bench.signal_scenarios import SIGNAL_SCENARIOS
from bench.signal_tables import SIGNAL_TABLES
from bench.training_tables import ARM_TABLES, CONVERGENCE, COST, COST_TABLES, METHODS

__all__ = [
    "documents",
    "marked_tables",
    "median_ratio",
    "render",
    "result_name",
    "results_of",
    "rewritten",
    "table",
]

DOCUMENTS = (
    "README.md",
    "bench/README.md",
    "docs/grail.md",
    "docs/g2rl.md",
    "docs/vigor.md",
    "docs/training.md",
)
GPU_RESULTS = "gpu"


def median_ratio(result: dict[str, Any], slower: str, faster: str) -> float | None:
    """Median seconds of one over median seconds of the other, for repetitions in blocks."""
    times = [result["rivals"].get(name, {}).get("seconds") for name in (slower, faster)]
    if not all(times):
        return None
    return statistics.median(times[0]) / statistics.median(times[1])


def table(result: dict[str, Any], title: str) -> str:
    """The result as plain text: medians, spread, and the ratios both ways."""
    workload = result["workload"]
    head = (
        f"{title}: G={workload['G']} K={workload['K']} prompt={workload['prompt']} "
        f"responses={workload['responses']} tail={workload['tail'][0]} "
        f"True={workload['true_items']}, {result['required_gflop']['total']:.0f} GFLOP required, "
        f"ours: {result['backend']}, peak GFLOP/s: {_peak(result)}"
    )
    row = "{:<46}{:>9}{:>18}{:>5}{:>11}{:>11}{:>10}{:>9}{:>10}"
    lines = [
        head,
        row.format(
            "",
            "median s",
            "min-max s",
            "reps",
            "loop / it",
            "it / ours",
            "of peak",
            "passes",
            "error",
        ),
    ]
    for name, entry in result["rivals"].items():
        seconds = entry["seconds"]
        ratio = median_ratio if "clocks" in result else paired_ratio
        against_loop = ratio(result, "loop", name)
        against_ours = ratio(result, name, "ours")
        lines.append(
            row.format(
                entry["title"],
                f"{statistics.median(seconds):.2f}" if seconds else "-",
                f"{min(seconds):.2f}-{max(seconds):.2f}" if seconds else "-",
                len(seconds),
                f"{against_loop:.2f}x" if against_loop else "-",
                f"{against_ours:.2f}x" if against_ours else "-",
                "-" if entry.get("share_of_peak") is None else f"{entry['share_of_peak']:.0%}",
                sum(entry["passes"].values()),
                f"{entry['max_relative_error']:.1e}",
            )
        )
    for name, reason in result["unavailable"].items():
        lines.append(f"{RIVALS[name].title:<46}not run: {reason}")
    return "\n".join(lines)


def _peak(result: dict[str, Any]) -> str:
    found = result["peak"].get(result["scenario"]["dtype"], {})
    return f"{found['best_gflops']:.0f}" if "best_gflops" in found else "not measured"


def result_name(scenario: str) -> str:
    """Of a scenario's file in bench/results, without its ending; one holds all of a GPU."""
    if scenario in GRPO_STEPS:
        return step_file(scenario)
    if scenario in ARMS:
        return CONVERGENCE
    if scenario.startswith(COST):
        return COST
    if scenario in SIGNAL_SCENARIOS:
        return scenario
    return GPU_RESULTS if scenario in GPU_SCENARIOS else f"grad2reward-{scenario}"


def results_of(name: str) -> dict[str, Any] | None:
    """A scenario's committed result."""
    path = RESULTS / f"{result_name(name)}.json"
    if not path.is_file():
        return None
    scenarios = json.loads(path.read_text(encoding="utf-8"))["scenarios"]
    found = scenarios.get(name, {})
    return dict(found) if found.keys() & {"rivals", "step", "arm"} else None


_SLOW = tuple(name for name, scenario in SCENARIOS.items() if "padded" in scenario.rivals)
# Of each table: its rows' scenarios, and its columns.
_TABLES: dict[str, tuple[tuple[str, ...], dict[str, Cell]]] = {
    "speed": (
        tuple(SCENARIOS),
        {
            "loop": times_ours("loop"),
            "prompt cached": times_ours("prompt_cached_loop"),
            "cached loop": times_ours("cached_loop"),
            "tuned cached loop": times_ours("tuned_cached_loop"),
            "our PyTorch path": times_ours("ours_reference"),
        },
    ),
    "slow rivals": (
        _SLOW,
        {
            "slow loop": times_ours("slow_loop"),
            "padded batches of 8": times_ours("padded"),
            "captum": times_ours("captum"),
            "inseq": times_ours("inseq"),
        },
    ),
    "share of peak": (
        tuple(SCENARIOS),
        {
            "required GFLOP": required,
            "g2r_fast": share("ours"),
            "our PyTorch path": share("ours_reference"),
            "tuned cached loop": share("tuned_cached_loop"),
            "cached loop": share("cached_loop"),
            "loop": share("loop"),
        },
    ),
    "gpu speed": (
        tuple(GPU_SCENARIOS),
        {
            "g2r_fast": seconds("ours"),
            "of the matrix rate": share("ours"),
            "loop": times_ours("loop"),
            "cached loop": times_ours("cached_loop"),
            "packed loop": times_ours("packed_loop"),
            "packed cached loop": times_ours("packed_cached_loop"),
            "slow loop": times_ours("slow_loop"),
            "padded batches of 8": times_ours("padded"),
            "our PyTorch path": times_ours("ours_reference"),
        },
    ),
    **SIGNAL_TABLES,
    **ARM_TABLES,
    **COST_TABLES,
}
_LABELS = {
    name: one.label
    for name, one in (SCENARIOS | GPU_SCENARIOS | SIGNAL_SCENARIOS | GRPO_STEPS | ARMS).items()
}
_LABELS |= {f"{COST}-{method}": label for method, label in METHODS.items()}


def render(name: str) -> str:
    """The comment and the table of that name, from the committed files; rows and columns without
    a single number are left out."""
    scenarios, columns = _TABLES[name]
    results = {s: found for s in scenarios if (found := results_of(s)) is not None}
    rows = {s: [cell(found) for cell in columns.values()] for s, found in results.items()}
    rows = {s: row for s, row in rows.items() if set(row) != {NOT_RUN}}
    used = [i for i in range(len(columns)) if any(row[i] != NOT_RUN for row in rows.values())]
    heads = list(columns)
    files = " ".join(dict.fromkeys(f"bench/results/{result_name(s)}.json" for s in rows))
    lines = [
        f'<!-- from {files or "no results yet"}; table "{name}" of bench/tables.py -->',
        "| " + " | ".join(["", *(heads[i] for i in used)]).lstrip() + " |",
        "|---" * (1 + len(used)) + "|",
    ]
    for scenario, row in rows.items():
        cells = [_LABELS[scenario], *(row[i] for i in used)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_MARKED = re.compile(
    r'<!-- from [^>]*table "([^"]+)" of bench/tables\.py -->\n(?:\|[^\n]*(?:\n|$))*'
)


def rewritten(text: str) -> str:
    """A document with every table of ours as `render` gives it."""
    return _MARKED.sub(lambda found: render(found[1]) + "\n", text)


def marked_tables(text: str) -> list[str]:
    """Names of the tables in a document that are made here."""
    return [found[1] for found in _MARKED.finditer(text)]


def documents(root: Path) -> dict[Path, str]:
    """Every document that may hold such tables, as it should read."""
    paths = [root / name for name in DOCUMENTS if (root / name).is_file()]
    return {path: rewritten(path.read_text(encoding="utf-8")) for path in paths}
