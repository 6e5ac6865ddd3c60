"""The compiled part: equal to Python on every input, strict about what it is handed."""

from __future__ import annotations

import array
import itertools
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2r_fast import native
from g2r_fast.errors import InputTypeError

ROOT = Path(__file__).resolve().parents[1]

needs_core = pytest.mark.skipif(
    not native.status().built, reason=f"nothing to compare with: {native.status()}"
)

# Few token ids and long runs of one id: shared prefixes of every length, and duplicates.
runs = st.lists(
    st.tuples(st.integers(-2, 2), st.integers(1, 5)).map(lambda run: [run[0]] * run[1]), max_size=5
).map(lambda parts: [token for part in parts for token in part])
batches = st.lists(runs | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=12)


def brute_force(sequences):
    """What the two lists mean, written without either implementation's ideas."""
    decorated = sorted((tuple(sequence), index) for index, sequence in enumerate(sequences))
    order = [index for _, index in decorated]
    common = []
    for (left, _), (right, _) in itertools.pairwise(decorated):
        shared = (length for length in range(len(left) + 1) if left[:length] == right[:length])
        common.append(max(shared))
    return order, common


def in_python(monkeypatch, sequences):
    with monkeypatch.context() as patch:
        patch.setattr(native, "_core", None)
        return native.sort_with_common_prefixes(sequences)


def buffers(sequences, dtype=np.int64):
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    return tokens, np.cumsum([0, *map(len, sequences)], dtype=np.int64)


@pytest.mark.parametrize("implementation", ["installed", "python"])
@given(sequences=batches)
def test_order_and_common_prefixes(implementation, sequences):
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "python":
            patch.setattr(native, "_core", None)
        assert native.sort_with_common_prefixes(sequences) == brute_force(sequences)


@needs_core
@given(sequences=st.lists(runs, max_size=12), dtype=st.sampled_from([np.int64, np.int32]))
def test_native_equals_python_for_both_widths(sequences, dtype):
    tokens, offsets = buffers(sequences, dtype)
    expected = native._python_common_prefix_lengths(tokens.tolist(), offsets.tolist())
    assert native._core.common_prefix_lengths(tokens, offsets) == expected


@pytest.mark.parametrize(
    ("sequences", "order", "common"),
    [
        ([], [], []),
        ([[]], [0], []),
        ([[], []], [0, 1], [0]),
        ([[7], [], [7]], [1, 0, 2], [0, 1]),
        ([[1, 2, 3], [1, 2], [1, 2, 3, 4]], [1, 0, 2], [2, 3]),
        ([[2], [10], [-1]], [2, 0, 1], [0, 0]),  # by value, not as text or as unsigned
        ([[2**40], [0]], [1, 0], [0]),  # past 32 bits
    ],
)
def test_by_hand(monkeypatch, sequences, order, common):
    assert native.sort_with_common_prefixes(sequences) == (order, common)
    assert in_python(monkeypatch, sequences) == (order, common)


def test_prefixes_shared_by_groups_are_found():
    prompts = [list(range(50)), list(range(25)) + [99] * 25]
    sequences = [prompts[i % 2] + [1000 + i, i] for i in range(8)]
    order, common = native.sort_with_common_prefixes(sequences)
    assert order == [0, 2, 4, 6, 1, 3, 5, 7]
    assert common == [50, 50, 50, 25, 50, 50, 50]


@pytest.mark.parametrize("bad", [[1, 2.5], ["1"], [None], [2**63], 3])
def test_a_sequence_without_integers_is_refused(bad):
    with pytest.raises(InputTypeError, match="first at index 1"):
        native.sort_with_common_prefixes([[1, 2], bad])


def _offsets(*values):
    return np.array(values, dtype=np.int64)


TOKENS = np.arange(4, dtype=np.int64)


@needs_core
@pytest.mark.parametrize(
    ("tokens", "offsets", "error", "message"),
    [
        (TOKENS.astype(np.float64), _offsets(0, 4), TypeError, "tokens must be int64 or int32"),
        (TOKENS.astype(np.uint64), _offsets(0, 4), TypeError, "tokens must be int64 or int32"),
        (TOKENS.astype(">i8"), _offsets(0, 4), TypeError, "tokens must be int64 or int32"),
        (b"12345678", _offsets(0, 1), TypeError, "tokens must be int64 or int32"),
        (TOKENS.reshape(2, 2), _offsets(0, 4), ValueError, "tokens must have one dimension"),
        (np.arange(8)[::2], _offsets(0, 4), ValueError, "tokens must be contiguous"),
        (np.arange(4)[::-1], _offsets(0, 4), ValueError, "tokens must be contiguous"),
        (
            memoryview(bytes(33))[1:].cast("q"),
            _offsets(0, 4),
            ValueError,
            "tokens must be aligned",
        ),
        (TOKENS, _offsets(0, 4).astype(np.int32), TypeError, "offsets must be int64"),
        (TOKENS, _offsets(), ValueError, "at least the leading 0"),
        (TOKENS, _offsets(1, 4), ValueError, "begin with 0, got 1"),
        (TOKENS, _offsets(-1, 4), ValueError, "begin with 0, got -1"),
        (TOKENS, _offsets(0, 3, 2, 4), ValueError, "must not decrease; first at index 2"),
        (TOKENS, _offsets(0, 3), ValueError, "end at the number of tokens 4, got 3"),
        (TOKENS, _offsets(0, 5), ValueError, "end at the number of tokens 4, got 5"),
        (TOKENS, _offsets(0, 2**62), ValueError, "end at the number of tokens"),
        ([0, 1, 2, 3], _offsets(0, 4), TypeError, "incompatible function arguments"),
    ],
)
def test_hostile_buffers_are_refused(tokens, offsets, error, message):
    with pytest.raises(error, match=message):
        native._core.common_prefix_lengths(tokens, offsets)


@needs_core
def test_any_buffer_of_the_right_kind_is_read():
    tokens, offsets = array.array("i", [3, 1, 2]), memoryview(_offsets(0, 1, 3))
    assert native._core.common_prefix_lengths(tokens, offsets) == ([1, 0], [0])
    empty = array.array("q")
    assert native._core.common_prefix_lengths(empty, _offsets(0)) == ([], [])
    assert native._core.common_prefix_lengths(empty, _offsets(0, 0, 0)) == ([0, 1], [0])


def test_status_says_what_runs():
    status = native.status()
    assert status.built == (native._core is not None)
    assert (status.reason is None) == status.built
    assert ("compiled" if status.built else "in Python") in str(status)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (ModuleNotFoundError("No module named 'g2r_fast._core'"), "pip install"),
        (ImportError("undefined symbol: _ZN3c10"), "undefined symbol: _ZN3c10"),
        (SimpleNamespace(__file__="old.so", INTERFACE=0), "old.so has interface 0"),
        (SimpleNamespace(__file__="old.so"), "old.so has interface None"),
    ],
)
def test_a_core_that_cannot_serve_is_left_alone_with_its_reason(
    monkeypatch, tmp_path, found, reason
):
    def load(name):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(native.importlib, "import_module", load)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))  # no note of an install
    core, status = native._load()
    assert core is None and not status.built
    assert reason in status.reason


def test_the_note_of_a_failed_build_is_the_reason(monkeypatch, tmp_path):
    def load(name):
        raise ModuleNotFoundError(name)

    (tmp_path / "_core_missing.txt").write_text("no g++ here\n", encoding="utf-8")
    monkeypatch.setattr(native.importlib, "import_module", load)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._load()[1].reason == "no g++ here"


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
def test_the_sources_compile_without_a_warning():
    import pybind11

    foreign = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wshadow"]
    command += [part for path in foreign for part in ("-isystem", path)]
    sources = sorted(map(str, (ROOT / "csrc").glob("*.cpp")))
    assert sources
    done = subprocess.run([*command, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
