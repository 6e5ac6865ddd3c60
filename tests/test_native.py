"""The compiled part: equal to Python on every input, strict about what it is handed."""

from __future__ import annotations

import array
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2r_fast import native
from g2r_fast.building import CORE, PARTS, find_compiler, foreign_flags
from g2r_fast.errors import InputTypeError

ROOT = Path(__file__).resolve().parents[1]

needs_core = pytest.mark.skipif(
    native.core() is None, reason=f"nothing to compare with: {native.status()}"
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
        patch.setattr(native, "core", lambda: None)
        return native.sort_with_common_prefixes(sequences)


def buffers(sequences, dtype=np.int64):
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    return tokens, np.cumsum([0, *map(len, sequences)], dtype=np.int64)


@pytest.mark.parametrize("implementation", ["installed", "python"])
@given(sequences=batches)
def test_order_and_common_prefixes(implementation, sequences):
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "python":
            patch.setattr(native, "core", lambda: None)
        assert native.sort_with_common_prefixes(sequences) == brute_force(sequences)


@needs_core
@given(sequences=st.lists(runs, max_size=12), dtype=st.sampled_from([np.int64, np.int32]))
def test_native_equals_python_for_both_widths(sequences, dtype):
    tokens, offsets = buffers(sequences, dtype)
    expected = native._python_common_prefix_lengths(tokens.tolist(), offsets.tolist())
    assert native.core().common_prefix_lengths(tokens, offsets) == expected


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
        native.core().common_prefix_lengths(tokens, offsets)


@needs_core
def test_any_buffer_of_the_right_kind_is_read():
    tokens, offsets = array.array("i", [3, 1, 2]), memoryview(_offsets(0, 1, 3))
    assert native.core().common_prefix_lengths(tokens, offsets) == ([1, 0], [0])
    empty = array.array("q")
    assert native.core().common_prefix_lengths(empty, _offsets(0)) == ([], [])
    assert native.core().common_prefix_lengths(empty, _offsets(0, 0, 0)) == ([0, 1], [0])


def test_status_says_what_runs():
    status = native.status()
    assert status.built == (native.core() is not None)
    assert (status.path is not None) == status.built
    assert (status.reason is None) == status.built
    assert ("compiled" if status.built else "not there") in str(status)


@needs_core
@pytest.mark.parametrize("found", [0, None])
def test_a_core_of_another_interface_is_left_alone(monkeypatch, found):
    path = Path(native.status().path)
    if found is None:
        monkeypatch.delattr(native.core(), "INTERFACE")
    else:
        monkeypatch.setattr(native.core(), "INTERFACE", found)
    # Python hands out the module that it has, changed as it is.
    module = native.core()
    monkeypatch.setattr(native.importlib.util, "module_from_spec", lambda spec: module)
    monkeypatch.setattr(
        native.importlib.util,
        "spec_from_file_location",
        lambda *_: SimpleNamespace(loader=NoLoader),
    )
    _, status = native.load_part(CORE, native._load_core, build=False)
    assert f"{path} does not load" in status.reason
    assert f"its interface is {found} where this version needs" in status.reason


class NoLoader:
    @staticmethod
    def exec_module(module):
        pass


COMPILER = find_compiler()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_sources_compile_without_a_warning(part):
    sources = [path for path in part.files(ROOT / "csrc") if path.suffix == ".cpp"]
    assert sources
    foreign, _ = foreign_flags(part)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wshadow", *part.flags[1:], *foreign]
    done = subprocess.run(
        [*COMPILER, "-fsyntax-only", *flags, *map(str, sources)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


IMPORT = """
import sys
import g2r_fast
loaded = [name for name in ("torch", "transformers", "g2r_fast.native") if name in sys.modules]
assert not loaded, loaded
import g2r_fast.native
assert "torch" not in sys.modules
"""


def test_importing_the_package_loads_neither_torch_nor_the_ops():
    subprocess.run([sys.executable, "-c", IMPORT], check=True, cwd=ROOT)
