"""How a training run goes, on a terminal: the figures that matter, live; one line a few steps else.

All of it goes to stderr, as stdout may be a pipe. No torch in here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import InputError
from ..report import visible
from .alarms import Alarm

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

__all__ = ["SECONDS", "Progress", "line_of"]

# What is shown, in this order: figure, its name, how it is written.
_SHOWN = (
    ("reward/mean", "reward", ".4g"),
    ("evaluation/score", "held-out score", ".4g"),
    ("attribution/entropy", "entropy of alpha", ".4f"),
    ("response/length", "length", ".4g"),
    ("response/truncated", "truncated", ".0%"),
    ("policy/entropy", "policy entropy", ".3g"),
    ("policy/kl", "KL", ".3g"),
    ("policy/clipped", "clipped", ".1%"),
)
# Parts of seconds/step. What a method adds is its gradient.
SECONDS = ("sample", "judge", "gradient", "reference", "update", "evaluation")


class Progress:
    """Live figures of a run: `with Progress(total_steps, first_step) as p: p.step(figures)`.

    Where stderr is no terminal, one plain line at the first step, at every `every`-th and at the
    last. Figures that come only now and then are shown as they last were.

    Args:
        total_steps: the last step.
        first_step: the first one to come, 1 or where a resumed run goes on.
        every: steps between two lines where there is no terminal.
        console: where to write; None: stderr.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 1,
        *,
        every: int = 10,
        console: Console | None = None,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        if every < 1:
            raise InputError("every is out of range", expected="every >= 1", got=every)
        self.total, self.first, self.every = total_steps, first_step, every
        self.console = Console(stderr=True) if console is None else console
        self._figures: dict[str, float] = {}
        self._start: dict[str, float] = {}  # each shown figure as it first was
        self._at = first_step - 1
        self._began = time.monotonic()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self._view(), console=self.console, auto_refresh=False)

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, figures: Mapping[str, float]) -> None:
        """Show the figures of a step, `"step"` among them."""
        self._at = int(figures["step"])
        self._figures.update(figures)
        for name, value in figures.items():
            if math.isfinite(value):
                self._start.setdefault(name, value)
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
        elif self._at in (self.first, self.total) or self._at % self.every == 0:
            self.say(line_of({**self._figures, **figures}, self.total))

    def alarm(self, alarm: Alarm) -> None:
        """Show an alarm in full; it stays above the live figures."""
        from rich.text import Text

        text = Text("ALARM ", "bold red")
        text.append(visible(alarm.text, self.console.encoding))
        self._print(text)

    def say(self, text: str) -> None:
        """Show a line of text, as it stands."""
        from rich.text import Text

        self._print(Text(visible(text, self.console.encoding)))

    def _print(self, text: Text) -> None:
        # Into a file a line is a line, however long.
        self.console.print(text, soft_wrap=self._live is None, highlight=False)

    def _view(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done, most = self._at, max(self.total, 1)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(f"step {done}/{self.total}", no_wrap=True)
        table.add_column("now", justify="right", no_wrap=True)
        table.add_column("at first", justify="right", style="dim", no_wrap=True)
        for name, label, form in _SHOWN:
            if name in self._figures:
                start = self._start.get(name)
                table.add_row(
                    label,
                    format(self._figures[name], form),
                    "" if start is None else format(start, form),
                )
        seconds = _seconds(self._figures)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=most, completed=done, width=24), self._remaining())
        return Group(table, *([Text(f"seconds {seconds}")] if seconds else []), bar)

    def _remaining(self) -> str:
        done = self._at - self.first + 1
        if done < 1:
            return ""
        left = (time.monotonic() - self._began) / done * (self.total - self._at)
        hours, seconds = divmod(round(left), 3600)
        return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} left"


def line_of(figures: Mapping[str, float], total_steps: int) -> str:
    """One line with the figures that matter, those that there are."""
    parts = [f"step {int(figures['step'])}/{total_steps}"]
    parts += [f"{label} {figures[n]:{form}}" for n, label, form in _SHOWN if n in figures]
    seconds = _seconds(figures)
    return "  ".join([*parts, *([f"seconds {seconds}"] if seconds else [])])


def _seconds(figures: Mapping[str, float]) -> str:
    """Seconds of a step, and of its parts: `"2.1 (sample 1.2, judge 0.4)"`."""
    parts = [(p, figures[f"seconds/{p}"]) for p in SECONDS if f"seconds/{p}" in figures]
    whole = figures.get("seconds/step", math.fsum(value for _, value in parts))
    told = ", ".join(f"{part} {value:.2g}" for part, value in parts)
    if not parts:
        return f"{whole:.2g}" if "seconds/step" in figures else ""
    return f"{whole:.2g} ({told})"
