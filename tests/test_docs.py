"""Our documents tell the truth: paths, commands, names, code and numbers. And the rules that say so
see the lies planted at the end of this file."""

from __future__ import annotations

import re

import forked
import pytest
from documents import (
    ROOT,
    RULES,
    Document,
    extra_faults,
    g2r_fast_commands,
    is_safe_to_run,
    link_faults,
    make_faults,
    name_faults,
    numbers_in,
    path_faults,
    table_faults,
    variable_faults,
)

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += ["docs/records.md", "docs/canaries.md", "docs/audit.md"]
DOCUMENTS += ["docs/training.md"]
DOCUMENTS += ["docs/grail.md", "docs/g2rl.md", "docs/vigor.md", "docs/your-own-signal.md"]


def read(name):
    return Document(name, (ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which a document's commands find the examples and may leave their outputs."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python_blocks(document):
    """In their order and in one namespace, as a reader would type them."""
    namespace = {"__name__": "__main__"}
    for block in document.of("python"):
        if "not run:" in block.comment:
            continue
        # Blank lines ahead, so that a traceback gives the document's own line.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, document.name, "exec"), namespace)
    return namespace


def command_line(arguments, cwd):
    code = "import sys; from g2r_fast.cli import main; sys.exit(main())"
    return forked.run(["-c", code, *arguments], cwd)


def option_faults(document, cwd):
    """Every option of a ``g2r-fast`` command is in the help of its subcommand."""
    faults = []
    for line, arguments in g2r_fast_commands(document):
        subcommand = [word for word in arguments[:1] if not word.startswith("-")]
        helped = command_line([*subcommand, "--help"], cwd)
        if helped.returncode != 0:
            faults.append(document.fault(line, f"no such command: {subcommand[0]}"))
            continue
        known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", helped.stdout))
        options = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
        faults += [document.fault(line, f"no such option: {o}") for o in options if o not in known]
    return faults


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_documents_hold_what_they_promise(name, rule):
    assert rule(read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name, workplace):
    run_python_blocks(read(name))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist_and_the_safe_ones_run(name, workplace):
    document = read(name)
    assert option_faults(document, workplace) == []
    for line, arguments in g2r_fast_commands(document):
        if is_safe_to_run(arguments):
            done = command_line(arguments, workplace)
            where = document.fault(line, " ".join(arguments))
            assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


def test_the_readme_can_be_tested_at_all():
    """A README without code, commands or tables would pass everything above."""
    readme = read("README.md")
    assert any("not run:" not in block.comment for block in readme.of("python"))
    assert any(is_safe_to_run(arguments) for _, arguments in g2r_fast_commands(readme))
    assert {"make demo", "make test"} <= {code for _, code in readme.code()}
    assert any("bench/results/" in table.comment for table in readme.of("table"))


# The rules themselves -----------------------------------------------------------------------------

FROM = "<!-- from bench/results/speed.json, by make bench -->"
HONEST = f"""\
# Title, with a comma

See [below](#title-with-a-comma), [the licence](LICENSE) and `csrc/core.cpp`; `setup.py` and
`tests/test_*.py` too. A model is `Qwen/Qwen2.5-1.5B-Instruct`, a name `g2r_fast.native.status`.
With `TRITON_INTERPRET=1` kernels run on a CPU. `make test TORCH=torch`.

```bash
make test   # not make rubbish
pip install -e '.[test,bench]'
.venv/bin/g2r-fast attribute examples/demo.jsonl --judge tiny \\
    --out somewhere.jsonl
```

```text
kernels/
  row_dot.py     the first kernel
```

```python
from g2r_fast import native
from g2r_fast.errors import InputError

order, common = native.sort_with_common_prefixes([[1, 2], [1]])
```

Between the blocks.

```python
assert order == [1, 0]
```

<!-- not run: needs a model -->
```python
error = InputError("no", expected="yes")
missing_elsewhere(order)
```

{FROM}

| layers 24 | loop | ours |
|---|---|---|
| float32 | 26.7 s | 4.8× |
| 0.5B `v2` | 12,312 rows | −1.5 ms and 44 % |
| error | 4e-6 | |

| flag | meaning |
|---|---|
| `bf16` | `8` of them |
"""
RESULTS = """{
    "machine": "2 cores, 24 layers", "threads": 2,
    "cells": [{"loop": 26.6666, "ratio": 4.7512, "rows": 12312, "delta": -0.0015, "error": 3.9e-06},
              {"mass": 0.4401}]
}"""


def planted(tmp_path, change=None):
    """The honest document with one thing changed, in a repository with its results."""
    for name in ("csrc", "g2r_fast", "kernels", "tests", "Makefile", "setup.py", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in [("bench/results/speed.json", RESULTS), ("examples/demo.jsonl", "")]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "LICENSE").touch()
    return Document("SAMPLE.md", changed(change), tmp_path)


def changed(change):
    if change is None:
        return HONEST
    old, new = change
    assert HONEST.count(old) == 1, f"{old!r} is not there once"
    return HONEST.replace(old, new)


@pytest.mark.parametrize("rule", RULES)
def test_an_honest_document_has_no_faults(rule, tmp_path):
    assert rule(planted(tmp_path)) == []


@pytest.mark.parametrize(
    ("rule", "old", "new", "fault"),
    [
        (path_faults, "csrc/core.cpp", "csrc/cores.cpp", "no such path: csrc/cores.cpp"),
        (path_faults, "csrc/core.cpp", "scrc/core.cpp", "no such path: scrc/core.cpp"),
        (path_faults, "csrc/core.cpp", "csrc/gone/", "no such path: csrc/gone/"),
        (path_faults, "`setup.py`", "`set_up.py`", "no such path: set_up.py"),
        (path_faults, "test_*.py", "text_*.py", "no such path: tests/text_*.py"),
        (path_faults, "  row_dot.py", "  row_dots.py", "no such path: row_dots.py"),
        (path_faults, " examples/demo", " example/demo", "no such path: example/demo.jsonl"),
        (link_faults, "(LICENSE)", "(LICENCE)", "dead link: LICENCE"),
        (link_faults, "(#title-", "(#titel-", "no heading for #titel-with-a-comma"),
        (make_faults, "make test TORCH", "make tests TORCH", "no such make target: tests"),
        (make_faults, "make test   #", "make text   #", "no such make target: text"),
        (variable_faults, "TRITON_INTERPRET=", "TRITON_NTERPRET=", "nothing reads TRITON_NTERPRET"),
        (variable_faults, "TORCH=torch", "TORCHES=torch", "nothing reads TORCHES"),
        (extra_faults, "test,bench", "tests,bench", "no such extra: tests"),
        (name_faults, "native.status`", "native.state`", "no such name: g2r_fast.native.state"),
        (name_faults, "import native", "import naive", "no such name: g2r_fast.naive"),
        (name_faults, "InputError\n", "InputFault\n", "no such name: g2r_fast.errors.InputFault"),
        (name_faults, "= native.sort_", "= native.sorted_", "no such name: native.sorted_with_"),
        (name_faults, 'InputError("no', 'InputError(expects="no', "InputError takes no expects="),
        (name_faults, "assert order == [1, 0]", "assert order = [1]", "does not parse"),
        (table_faults, "26.7", "26.6", "26.6 is not in bench/results/speed.json"),
        (table_faults, "4.8×", "4.9×", "4.9 is not in"),
        (table_faults, "12,312", "12,313", "12,313 is not in"),
        (table_faults, "−1.5 ms", "−1.6 ms", "−1.6 is not in"),
        (table_faults, "−1.5 ms", "1.5 ms", "1.5 is not in"),
        (table_faults, "44 %", "45 %", "45 is not in"),
        (table_faults, "4e-6", "3e-6", "3e-6 is not in"),
        (table_faults, "layers 24", "layers 25", "25 is not in"),
        (table_faults, "| `8` of them", "| 8 of them", "a table with numbers and no <!-- from"),
    ],
)
def test_a_planted_lie_is_seen_in_its_line(rule, old, new, fault, tmp_path):
    line = HONEST[: HONEST.index(old)].count("\n") + 1
    if rule is table_faults and "no <!--" in fault:
        line -= 2  # where the table begins
    (found,) = rule(planted(tmp_path, (old, new)))
    assert found.startswith(f"SAMPLE.md:{line}: {fault}")


@pytest.mark.parametrize(
    ("comment", "faults"),
    [
        ("", ["a table with numbers and no <!-- from bench/results/….json --> above it"]),
        (
            "<!-- from memory -->",
            ["a table with numbers and no <!-- from bench/results/….json -->"],
        ),
        ("<!-- from bench/results/sped.json -->", ["no such results: bench/results/sped.json"]),
        ("<!-- not measured: the papers' own -->", []),
    ],
)
def test_the_comment_above_a_table(comment, faults, tmp_path):
    found = table_faults(planted(tmp_path, (FROM, comment)))
    assert len(found) == len(faults)
    assert all(text in one for text, one in zip(faults, found, strict=True))


def test_python_blocks_share_a_namespace(tmp_path):
    assert run_python_blocks(planted(tmp_path))["common"] == [1]


def test_a_python_block_fails_with_the_documents_line(tmp_path):
    with pytest.raises(AssertionError) as caught:
        run_python_blocks(planted(tmp_path, ("order == [1, 0]", "order == [0, 1]")))
    place = caught.traceback[-1]
    assert str(place.path) == "SAMPLE.md"
    assert HONEST.splitlines()[place.lineno] == "assert order == [1, 0]"


def test_commands_are_found_and_judged(tmp_path):
    ((line, arguments),) = g2r_fast_commands(planted(tmp_path))
    assert "g2r-fast attribute" in HONEST.splitlines()[line - 1]
    assert arguments[:2] == ["attribute", "examples/demo.jsonl"]
    assert arguments[-2:] == ["--out", "somewhere.jsonl"]
    assert is_safe_to_run(arguments)
    assert not is_safe_to_run(["attribute", "x.jsonl", "--judge", "some/model"])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (None, None),
        (("--judge tiny", "--juge tiny"), "no such option: --juge"),
        (("g2r-fast attribute", "g2r-fast atribute"), "no such command: atribute"),
    ],
)
def test_a_command_line_of_another_program_is_seen(change, fault, tmp_path):
    found = option_faults(Document("SAMPLE.md", changed(change), ROOT), tmp_path)
    assert [one.split(": ", 1)[1] for one in found] == ([fault] if fault else [])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.5B, bf16, v2.1, float32, K8", []),
        ("5.6 s = 4.8× and 2.3x", ["5.6", "4.8", "2.3"]),
        ("300–600, 300-600", ["300", "600", "300", "600"]),
        ("**4.8**, (7), +43.7 %.", ["4.8", "7", "+43.7"]),
        ("`12` [x 3](y4) 1e-12", ["3", "1e-12"]),
        ("12,312 and 1, 2", ["12,312", "1", "2"]),
        ("99.", ["99"]),
    ],
)
def test_numbers_are_told_from_names(text, numbers):
    assert [written for written, _, _ in numbers_in(text)] == numbers
