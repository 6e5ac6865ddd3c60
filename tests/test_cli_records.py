"""What `g2r-fast attribute` does with records: verdicts, formats, and records that are bad."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import cli_runs
import pytest
from cli_runs import Library, Run, entries, fake_attribute_batch
from record_files import record, write

from g2r_fast.commands.common import complain, tell_dropped

fake = cli_runs.fake
library = cli_runs.library
run = cli_runs.run


# --- verdicts from elsewhere ---------------------------------------------------------------------

GIVEN = [
    [[True, False], [False, False], [True, True]],
    [[False, True], [True, False], [False, False]],
]


def test_given_verdicts_are_only_attributed(library: Library, run: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(i, 3, verdicts=GIVEN[i]) for i in range(2)])
    assert run("--verdict", "given") == 0
    (call,) = library.calls
    assert call["verdict"] == GIVEN[0] + GIVEN[1]
    results = entries(tmp_path / "out.jsonl")
    assert [entry["verdicts"] for entry in results] == GIVEN
    assert results[0]["settings"]["verdict"] == "given"
    if library.real.attribute_batch is fake_attribute_batch:
        return
    for entry, points in zip(results, [-2.5, -3.5], strict=True):
        scores = [sum(w for w, met in zip((5, points), row, strict=True) if met) / 5
                  for row in entry["verdicts"]]  # fmt: skip
        assert entry["scores"] == pytest.approx(scores, rel=1e-6)
        for row, rewards in zip(entry["verdicts"], entry["token_rewards"], strict=True):
            assert any(rewards) == any(row)


def test_given_verdicts_are_asked_of_every_record(
    fake: Library, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in.jsonl", [record(0), record(1, 3, verdicts=GIVEN[1])])
    assert run("--verdict", "given") == 1
    assert f"{path}:1: missing field verdicts" in capsys.readouterr().err
    assert [entry["line"] for entry in entries(tmp_path / "out.jsonl")] == [2]


def test_a_run_with_other_verdicts_is_not_resumed(
    fake: Library, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in.jsonl", [record(0, 3, verdicts=GIVEN[0])])
    assert run("--verdict", "given") == run("--verdict", "given") == 0
    assert len(fake.calls) == 1
    write(path, [record(0, 3, verdicts=GIVEN[1])])
    assert run("--verdict", "given") == 2
    assert f"line 1 of {path} is not the record" in capsys.readouterr().err
    # Where the judge judges, the verdicts in a file are nothing to it.
    assert run(out="judged.jsonl") == 0
    assert fake.calls[-1]["verdict"] == "argmax"
    assert "verdicts in 1 record" in capsys.readouterr().err
    write(path, [record(0, 3)])
    assert run(out="judged.jsonl") == 0 and len(fake.calls) == 2


# --- formats and what is dropped -----------------------------------------------------------------

RAR = {"title": "T", "description": "says so", "weight": -2}


def test_other_formats(library: Library, run: Run, tmp_path: Path) -> None:
    entry = {"question": "q", "rubric": [RAR, RAR | {"weight": 4}], "response": "yes, it is so"}
    write(tmp_path / "in.jsonl", [record(0), entry | {"prompt": "p"}])
    assert run() == 0
    first, second = entries(tmp_path / "out.jsonl")
    assert second["labels"] == ["T", "T"] and "labels" not in first
    assert run("--format", "rar", out="rar.jsonl") == 1
    (only,) = entries(tmp_path / "rar.jsonl")
    assert only == second
    assert run("--format", "RaR") == 2


def test_what_is_dropped_is_told_once(
    fake: Library, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in.jsonl", [record(0), record(1, odd="\x1b[2J"), record(2, 1)])
    for _ in range(2):  # the second run has nothing left to do
        assert run("--batch", "1") == 0
        messages = capsys.readouterr().err.splitlines()
        assert messages[-1] == (
            "dropped: example_tags in 3 records, rubrics[].tags in 3 records, odd in 1 record"
        )
        assert sum("dropped" in message for message in messages) == 1
    tell_dropped(Counter({f"\x1b{number}": 2 for number in range(25)}))
    message = capsys.readouterr().err
    assert message.startswith("dropped: \\x1b0 in 2 records, ")
    assert message.endswith("\\x1b19 in 2 records, 5 other fields\n")
    tell_dropped(Counter())
    assert capsys.readouterr().err == ""


# --- bad records ---------------------------------------------------------------------------------


def test_bad_records_are_reported_and_the_others_done(
    library: Library, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "in.jsonl", [record(0), b"{oops", record(1, rubrics=[]), b"", record(2)]
    )
    assert run() == 1
    messages = capsys.readouterr().err
    assert f"{path}:2: invalid JSON" in messages
    assert f"{path}:3: rubrics: the list is empty" in messages
    assert [entry["line"] for entry in entries(tmp_path / "out.jsonl")] == [1, 5]
    # A repaired line is done by the next run, alone.
    write(path, [record(0), record(9), record(1, rubrics=[]), b"", record(2)])
    calls = len(library.calls)
    assert run() == 1
    assert [entry["line"] for entry in entries(tmp_path / "out.jsonl")] == [1, 5, 2]
    assert len(library.calls) == calls + 1


def test_a_record_the_library_refuses_costs_nothing_else(
    fake: Library, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = record(1, responses=["fine", "refuse \x1b[2J"])
    path = write(tmp_path / "in.jsonl", [record(0), refused, record(2)])
    assert run() == 1
    assert f"{path}:2: the response is too long" in capsys.readouterr().err
    assert [entry["line"] for entry in entries(tmp_path / "out.jsonl")] == [1, 3]


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("G2R_BACKEND", "bogus", ()),
        ("G2R_BACKEND", "triton", ("--engine", "autograd")),
        ("G2R_BACKEND", "native", ("--engine", "autograd")),
        ("G2R_BUILD", "nonsense", ()),
    ],
)
def test_a_wrong_setting_is_no_records_fault(
    name: str,
    value: str,
    options: tuple[str, ...],
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "in.jsonl", [record(i) for i in range(3)])
    monkeypatch.setenv(name, value)
    assert run(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and value in line
    assert entries(tmp_path / "out.jsonl") == []


def test_other_failures_keep_what_is_finished(
    fake: Library, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in.jsonl", [record(0), record(1)])
    real = fake.real.attribute_batch

    def out_of_memory(*arguments: Any, **options: Any) -> Any:
        if len(fake.calls) == 2:
            raise RuntimeError("out of memory")
        return real(*arguments, **options)

    monkeypatch.setattr(fake.real, "attribute_batch", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("--batch", "1")
    assert [entry["line"] for entry in entries(tmp_path / "out.jsonl")] == [1]


def test_messages_do_not_reach_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complain(tmp_path, 3, "odd \x1b[2J\u202e é\n")
    assert capsys.readouterr().err == f"{tmp_path}:3: odd \\x1b[2J\\u202e é\\n\n"
