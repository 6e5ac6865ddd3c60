"""`g2r-fast canaries`: exit codes, the written report, wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_canaries import by_name, constant_judge, make_judge

from g2r_fast import Rubric, cli
from g2r_fast.canaries import CanaryRun
from g2r_fast.canary_report import CanaryReport
from g2r_fast.commands import canaries as command


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def record(prompt: str, **changes: Any) -> dict[str, Any]:
    rubrics = [{"criterion": "see a doctor", "points": 5}, {"criterion": "is rude", "points": -2}]
    return {"prompt": prompt, "rubrics": rubrics, "responses": [f"hello {prompt}"]} | changes


def run(*arguments: Any) -> int:
    try:
        return cli.main(["canaries", *map(str, arguments)])
    except SystemExit as exit:
        return int(exit.code or 0)


@pytest.mark.parametrize(
    ("answer", "options", "code"),
    [
        (True, [], 0),
        (True, ["--fail-above", "0.99"], 1),
        (True, ["--fail-above", "1"], 0),
        (False, ["--fail-above", "0"], 0),
    ],
)
def test_exit_codes(
    answer: bool,
    options: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load_judge", lambda args: constant_judge(answer))
    path = write(tmp_path / "in.jsonl", [record("one"), record("two")])
    assert run(path, "--judge", "x", *options) == code
    captured = capsys.readouterr()
    assert ("is above 0.99" in captured.err) == (code == 1)
    assert "criterion: rate" not in captured.err  # debatable
    assert "worst canaries" in captured.out and "symbols" in captured.out


def test_only_debatable_families_do_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_odds(run: Any, prompts: Any, items: Any, answers: Any) -> list[float]:
        return [
            1.0 if items[a.prompt][k].text in a.text else -1.0 for a in answers for k in a.items
        ]

    monkeypatch.setattr(CanaryRun, "_log_odds", log_odds)
    monkeypatch.setattr(command, "load_judge", lambda args: make_judge())
    path = write(tmp_path / "in.jsonl", [record("one"), record("two")])
    assert run(path, "--judge", "x", "--fail-above", "0") == 0


def test_the_written_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Too long, and no JSON: both are named and cost nothing else.
    judge = make_judge(max_position_embeddings=600)
    monkeypatch.setattr(command, "load_judge", lambda args: judge)
    lines = [record("one"), "{oops", record("a" * 700), record("two"), record("three")]
    lines.append("{beyond the limit")
    path, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.json"
    assert run(path, "--judge", tmp_path, "--out", out, "--limit", 3) == 1
    err = capsys.readouterr().err
    assert f"{path}:2: invalid JSON" in err and f"{path}:3: " in err
    assert f"{path}:6" not in err
    assert f"{path}:4" not in err
    text = out.read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert written["settings"]["judge"] == tmp_path.name
    assert written["settings"]["file"] == "in.jsonl" and written["settings"]["limit"] == 3
    assert written["versions"]["torch"] == torch.__version__
    assert {hit.pop("line") for hit in written["report"]["hits"]} == {1, 4}
    report = CanaryReport.from_dict(written["report"])
    texts = [("one", None), ("two", "hello one")]  # the long one's response is too long as well
    alone = CanaryRun(judge)
    for prompt, other in texts:
        alone.add([prompt], [[Rubric("see a doctor", 5.0), Rubric("is rude", -2.0)]], [other])
    assert report.prompts == 2
    assert [c.false_positives for c in report.canaries] == [
        c.false_positives for c in alone.report().canaries
    ]


def test_a_wrong_setting_is_no_records_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_judge", lambda args: make_judge())
    monkeypatch.setenv("G2R_BACKEND", "triton")
    path = write(tmp_path / "in.jsonl", [record("one"), record("two")])
    assert run(path, "--judge", "x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "G2R_BACKEND=triton cannot serve" in line


@pytest.mark.parametrize("responses", [{}, {"responses": []}, {"response": "a real one"}])
def test_records_need_no_responses(
    responses: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_judge", lambda args: constant_judge(True))
    entry = record("one")
    del entry["responses"]
    path = write(tmp_path / "in.jsonl", [entry | responses])
    assert run(path, "--judge", "x", "--out", tmp_path / "out.json") == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["report"]["hits"]) > 10


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in.jsonl", [record("one")])
    empty = write(tmp_path / "empty.jsonl", [])
    for arguments, message in [
        ([tmp_path / "absent"], "is not a file"),
        ([path, "--out", path], "--out is the input file"),
        ([path, "--out", tmp_path / "absent" / "x"], "folder of --out"),
        ([path, "--fail-above", "1.5"], "not between 0 and 1"),
        ([path, "--limit", "0"], "not a positive integer"),
        ([empty], "no usable record"),
    ]:
        assert run(*arguments, "--judge", "tiny") == 2
        assert message in capsys.readouterr().err


def test_the_shipped_judge_by_the_command(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "examples" / "demo.jsonl"
    out = tmp_path / "out.json"
    assert run(demo, "--judge", "tiny", "--device", "cpu", "--limit", 1, "--out", out) == 0
    report = CanaryReport.from_dict(json.loads(out.read_text())["report"])
    assert report.prompts == 1 and report.left_out == ["other response"]
    assert by_name(report)["empty"].rate == 0.0  # it was trained to find advice


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom g2r_fast import cli\n"
        "try:\n    cli.main(['canaries', '--help'])\n"
        "except SystemExit as exit:\n    assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--fail-above" in result.stdout and "debatable" in result.stdout
