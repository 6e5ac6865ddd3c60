"""Curves of training runs from their logs. matplotlib is optional and imported when one is wanted.

No torch in here: runs can be compared where none can be made.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .log import read_log
from .progress import SECONDS

__all__ = ["plot", "plot_runs"]

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
_PANELS = (
    ("reward/mean", "reward, by the judge"),
    ("evaluation/score", "held-out score"),
    ("attribution/entropy", "entropy of alpha (1 is uniform)"),
    ("response/length", "length, tokens"),
    ("policy/kl", "KL to the reference, nats a token"),
    ("policy/entropy", "entropy of the policy, nats a token"),
)
_SMOOTHED = 9  # steps of the running mean that is drawn over the single steps
_SMOOTH_FROM = 30  # values; fewer are drawn as they are


def plot(folder: Path, out: Path | None = None) -> Path:
    """Draw one run's curves, its alarms as vertical lines; `folder/plot.png` where out is None.

    Alarms are the log's notes of kind "alarm". Returns the file. Raises InputError where there is
    no log, none with a step, or no matplotlib.
    """
    return plot_runs({"": folder}, folder / "plot.png" if out is None else out)


def plot_runs(folders: Mapping[str, Path], out: Path) -> Path:
    """Draw the curves of several runs in one figure, by name; the format follows out's suffix."""
    runs = {name: _Run(folder) for name, folder in folders.items()}
    if not runs:
        raise InputError("there is no run to plot", expected="at least one folder")
    matplotlib, figure_module, agg = map(
        _import, ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg")
    )
    panels = [panel for panel in _PANELS if any(panel[0] in run.names for run in runs.values())]
    rows = math.ceil((len(panels) + 1) / 2)  # and the seconds
    with matplotlib.rc_context(_STYLE):
        # Without pyplot: no display is needed, and no figure stays behind.
        figure: Any = figure_module.Figure(figsize=(9.0, 2.6 * rows), layout="constrained", dpi=120)
        agg.FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 2, squeeze=False).flat
        for axes, (name, title) in zip(grid, panels, strict=False):
            for color, (label, run) in enumerate(runs.items()):
                run.draw(axes, name, f"C{color}", label)
            axes.set(title=title, xlabel="step")
        _draw_seconds(grid[len(panels)], runs)
        for axes in list(grid)[len(panels) + 1 :]:
            axes.set_axis_off()
        if len(runs) > 1:
            figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.savefig(out)
    return out


class _Run:
    def __init__(self, folder: Path) -> None:
        lines = read_log(folder)
        self.steps = [line for line in lines if "note" not in line]
        self.alarms = [line for line in lines if line.get("note") == "alarm"]
        if not self.steps:
            raise InputError(
                "the log holds no step yet", expected="a run that made one", got=str(folder)
            )
        self.names = {name for line in self.steps for name in line}

    def values(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure, those that are finite."""
        found = [(x["step"], x[name]) for x in self.steps if math.isfinite(x.get(name, math.nan))]
        return [step for step, _ in found], [value for _, value in found]

    def draw(self, axes: Any, name: str, color: str, label: str) -> None:
        steps, values = self.values(name)
        many = len(values) >= _SMOOTH_FROM
        axes.plot(
            steps, values, color=color, linewidth=1, alpha=0.3 if many else 1,
            marker="" if many else ".", label="" if many else label,
        )  # fmt: skip
        if many:
            axes.plot(steps, _running_mean(values), color=color, linewidth=1.5, label=label)
        for alarm in self.alarms:
            axes.axvline(alarm["step"], color=color, linewidth=0.6, linestyle=":")


def _draw_seconds(axes: Any, runs: Mapping[str, _Run]) -> None:
    """Median seconds of each part of a step, a bar a run."""
    parts = [p for p in SECONDS if any(f"seconds/{p}" in run.names for run in runs.values())]
    if not parts:
        axes.set_axis_off()
        return
    height = 0.8 / len(runs)
    for index, run in enumerate(runs.values()):
        medians = [_median(run.values(f"seconds/{part}")[1]) for part in parts]
        places = [place + (index + 0.5) * height - 0.4 for place in range(len(parts))]
        axes.barh(places, medians, height * 0.9, color=f"C{index}")
    axes.set_yticks(range(len(parts)), parts)
    axes.invert_yaxis()
    axes.set(title="median seconds of a step, by part", xlabel="seconds")


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and those around it, fewer at the ends."""
    half = _SMOOTHED // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"plots cannot be drawn: {error}", fix="pip install matplotlib") from error
