"""What a training run shows while it runs, and the curves afterwards."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from g2r_fast.errors import InputError
from g2r_fast.training.alarms import Alarm
from g2r_fast.training.log import RunLog
from g2r_fast.training.plot import plot, plot_runs
from g2r_fast.training.progress import Progress, line_of

ROOT = Path(__file__).resolve().parents[1]


def figures(step: int) -> dict[str, float]:
    found = {
        "step": step,
        "reward/mean": 0.25 + step / 1000,
        "attribution/entropy": 0.9875,
        "response/length": 81.25,
        "response/truncated": 0.125,
        "policy/kl": 0.00123,
        "seconds/sample": 1.25,
        "seconds/judge": 0.4,
        "seconds/step": 2.0,
    }
    return found | ({"evaluation/score": 0.5 + step / 100} if step % 5 == 0 else {})


def shown(terminal: bool, steps: range, total: int, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=90, color_system=None)
    with Progress(total, steps[0], console=console, **options) as progress:
        for step in steps:
            progress.step(figures(step))
            if step == 7:
                progress.alarm(Alarm("length drift", "length drift: [red]it[/red] " + "x " * 100))
                progress.say("a checkpoint [bold]was[/bold] written\x1b[2J")
    return file.getvalue()


# --- progress -------------------------------------------------------------------------------------


def test_one_plain_line_every_few_steps() -> None:
    lines = shown(False, range(3, 24), 23, every=10).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["step", "ALARM", "a", *["step"] * 3]
    assert [re.findall(r"step (\d+)/23", line) for line in lines[3:]] == [["10"], ["20"], ["23"]]
    assert lines[0] == (
        "step 3/23  reward 0.253  entropy of alpha 0.9875  length 81.25  truncated 12%  "
        "KL 0.00123  seconds 2 (sample 1.2, judge 0.4)"
    )
    # In full, on one line, as it stands; what would act on the terminal is spelled out.
    assert lines[1] == "ALARM length drift: [red]it[/red] " + "x " * 100
    assert lines[2] == "a checkpoint [bold]was[/bold] written\\x1b[2J"
    assert "held-out score 0.7 " in lines[5]  # of step 20, the latest there is


def test_live_figures_on_a_terminal() -> None:
    text = shown(True, range(1, 24), 40)
    last = text[text.rindex("step 23/40") :]
    for label, now, first in (
        ("reward", "0.273", "0.251"),
        ("held-out score", "0.7", "0.55"),
        ("entropy of alpha", "0.9875", "0.9875"),
    ):
        assert re.search(rf"{label} +{now} +{first}\s", last), label
    assert "seconds 2 (sample 1.2, judge 0.4)" in last and re.search(r"\d:\d\d:\d\d left", last)
    assert "policy entropy" not in last  # there was none
    assert text.count("ALARM") == 1
    assert text.count("x ") >= 100 and "[red]it[/red]" in text and "\x1b[2J" not in text


def test_what_is_not_a_number_is_shown() -> None:
    line = line_of({"step": 4.0, "reward/mean": math.nan, "response/truncated": math.inf}, 9)
    assert line == "step 4/9  reward nan  truncated inf%"
    for terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=90, color_system=None)
        with Progress(9, console=console) as progress:
            progress.step({"step": 1, "reward/mean": math.nan})
            progress.step({"step": 9, "reward/mean": 0.5})
        assert "nan" in file.getvalue()
        if terminal:
            assert re.search(r"reward +0\.5 +0\.5\s", file.getvalue())


def test_an_error_leaves_the_terminal_as_it_was() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=90)
    with pytest.raises(KeyboardInterrupt), Progress(9, console=console) as progress:
        progress.step(figures(1))
        raise KeyboardInterrupt
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress:
        progress.step(figures(1))
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("step 1/1 ")


def test_every_is_checked() -> None:
    with pytest.raises(InputError, match="every >= 1; got 0"):
        Progress(10, every=0)


# --- plot -----------------------------------------------------------------------------------------


def log_of(folder: Path, steps: int = 40, alarm: bool = True) -> Path:
    with RunLog(folder, None) as log:
        for step in range(1, steps + 1):
            log.write(figures(step) | ({"policy/kl": math.nan} if step == 5 else {}))
            if alarm and step == 9:
                log.note("alarm", "length drift")
    return folder


def is_png(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    saved: list[Any] = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda f, *a, **k: saved.append(f) or save(f, *a, **k))
    return saved


def panels_of(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.axes if axes.axison}


def test_a_plot_of_one_run(tmp_path: Path, drawn: list[Any]) -> None:
    out = plot(log_of(tmp_path / "run"))
    assert out == tmp_path / "run" / "plot.png" and is_png(out)
    panels = panels_of(drawn[0])
    assert list(panels) == [
        "reward, by the judge",
        "held-out score",
        "entropy of alpha (1 is uniform)",
        "length, tokens",
        "KL to the reference, nats a token",
        "median seconds of a step, by part",
    ]
    single, mean, alarm = panels["reward, by the judge"].lines
    assert list(single.get_xdata()) == list(range(1, 41))
    assert list(single.get_ydata()) == [figures(step)["reward/mean"] for step in range(1, 41)]
    # The mean over nine steps of a straight line is the line; at the ends over fewer.
    assert list(mean.get_ydata()[4:36]) == pytest.approx(single.get_ydata()[4:36])
    assert mean.get_ydata()[0] == pytest.approx(sum(single.get_ydata()[:5]) / 5)
    assert list(alarm.get_xdata()) == [9, 9]
    assert list(panels["held-out score"].lines[0].get_xdata()) == list(range(5, 41, 5))
    kl = panels["KL to the reference, nats a token"].lines[0]
    assert 5 not in list(kl.get_xdata()) and len(kl.get_xdata()) == 39  # step 5 had none
    bars = panels["median seconds of a step, by part"].patches
    assert [bar.get_width() for bar in bars] == [1.25, 0.4]


def test_a_plot_of_several_runs(tmp_path: Path, drawn: list[Any]) -> None:
    runs = {name: log_of(tmp_path / name, alarm=False) for name in ("dot", "uniform")}
    out = plot_runs(runs, tmp_path / "both.svg")
    assert out.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["dot", "uniform"]
    panel = panels_of(drawn[0])["reward, by the judge"]
    assert len({line.get_color() for line in panel.lines}) == 2 and len(panel.lines) == 4
    assert len(panels_of(drawn[0])["median seconds of a step, by part"].patches) == 4


def test_a_run_of_one_step_and_few_figures(tmp_path: Path, drawn: list[Any]) -> None:
    with RunLog(tmp_path, None) as log:
        log.write({"step": 1, "reward/mean": 0.5})
    assert is_png(plot(tmp_path, tmp_path / "here.png"))
    assert list(panels_of(drawn[0])) == ["reward, by the judge"]


def test_a_plot_needs_no_display_and_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    log_of(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from g2r_fast.training.plot import plot\n"
        "import g2r_fast.training.alarms, g2r_fast.training.progress\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot(Path(sys.argv[1]))\n"
        "print({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n" and is_png(tmp_path / "plot.png")


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_of(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot(tmp_path)


def test_logs_that_cannot_be_plotted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no log"):
        plot(tmp_path)
    RunLog(tmp_path, None).close()
    with pytest.raises(InputError, match="no step yet"):
        plot(tmp_path)
    with pytest.raises(InputError, match="no run to plot"):
        plot_runs({}, tmp_path / "x.png")
