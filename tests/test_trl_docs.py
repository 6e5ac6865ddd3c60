"""docs/trl.md tells the truth, and both example scripts run."""

from __future__ import annotations

import difflib
import re

import forked
import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from documents import ROOT, RULES
from test_docs import read, run_python_blocks

NAME = "docs/trl.md"
PLAIN, DENSE = (ROOT / "examples" / "trl" / name for name in ("grpo.py", "grad2reward.py"))


@pytest.mark.parametrize("rule", RULES)
def test_the_page_holds_what_it_promises(rule):
    assert rule(read(NAME)) == []


def test_its_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run_python_blocks(read(NAME))["trainer"]
    assert trainer.state.global_step == 1
    assert trainer._g2r_signal.judge.scaffold == "grader"


def test_the_diff_that_is_shown_is_the_real_one():
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (PLAIN, DENSE)]
    names = [str(path.relative_to(ROOT)) for path in (PLAIN, DENSE)]
    expected = "\n".join(difflib.unified_diff(*texts, *names, n=1, lineterm=""))
    (shown,) = read("README.md").of("diff")
    assert shown.text == expected


@pytest.mark.parametrize("script", [PLAIN, DENSE], ids=lambda path: path.stem)
def test_the_example_scripts_run(script, tmp_path):
    command = [str(script), "--steps", "2", "--out", str(tmp_path / "out")]
    done = forked.run(command, tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    name = "rubric_reward" if script == PLAIN else "grad2reward"
    means = re.findall(rf"'rewards/{name}/mean': '?([-\d.e]+)", done.stdout)
    assert len(means) == 2 and all(float(mean) > 0.0 for mean in means)
