"""The C++ under the address and undefined-behaviour sanitizers, without Python or torch.

The kernels are not optimised, so that every access is one the sanitizers see; the loops that they
are compared with are.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_calls import COMPILER, TABLES, expected_tables

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cpu"
PROGRAMS = ROOT / "tests" / "cpp"
FLAGS = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g1"]
# What a kernel takes from its thread's memory comes from the heap instead, by itself.
FLAGS += ["-DG2R_EXACT_SCRATCH=1", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow"]
NO_SUCH_TABLE = 77  # as in tests/cpp/kernels_test.cpp

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Whatever the caller has set for these programs is not what is tested here.
    clean = {
        k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS") and k != "G2R_CPU"
    }
    # Memory comes full of NaN: what is read before it was written spreads.
    clean["ASAN_OPTIONS"] = "malloc_fill_byte=255:max_malloc_fill_size=1073741824"
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)


def compiled(arguments: list[str], output: Path) -> Path:
    done = run([str(COMPILER), *FLAGS, *arguments, "-o", str(output)])
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the compiler comes without the sanitizers' libraries."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() { return 0; }\n", encoding="utf-8")
    done = run([str(COMPILER), *FLAGS, str(folder / "empty.cpp"), "-o", str(folder / "empty")])
    if done.returncode != 0:
        pytest.skip(f"{COMPILER} cannot link the sanitizers: {done.stderr.strip()[-200:]}")


@pytest.fixture(scope="module")
def kernels_test(sanitizers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    include = f"-I{KERNELS}"
    sources = {path: [include, "-c", str(path)] for path in KERNELS.glob("*.cpp")}
    program = PROGRAMS / "kernels_test.cpp"
    sources[program] = [include, *WARNINGS, "-O1", "-c", str(program)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(
            lambda path: str(compiled(sources[path], folder / f"{path.stem}.o")), sources
        )
        return compiled(list(objects), folder / "kernels_test")


def check(program: Path, table: str, *arguments: str) -> None:
    done = run([str(program), table, *arguments])
    if done.returncode == NO_SUCH_TABLE:
        assert table not in expected_tables()
        pytest.skip(f"this processor does not run {table} kernels")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{table}: passed\n"


@pytest.mark.parametrize("table", TABLES)
def test_kernels_stay_inside_their_memory(table: str, kernels_test: Path) -> None:
    check(kernels_test, table)


def best() -> str:
    return next(table for table in TABLES if table in expected_tables())


@pytest.mark.parametrize("table", dict.fromkeys((best(), "plain")))
def test_they_do_so_where_sums_and_segments_are_long(table: str, kernels_test: Path) -> None:
    """On the narrowest and the widest vectors only: it takes long."""
    check(kernels_test, table, "large")


def test_the_trie_stays_inside_its_memory(sanitizers: None, tmp_path: Path) -> None:
    source = PROGRAMS / "trie_test.cpp"
    program = compiled([f"-I{ROOT / 'csrc'}", *WARNINGS, str(source)], tmp_path / "trie_test")
    done = run([str(program)])
    assert done.returncode == 0, done.stderr[-4000:]


OVERRUN = """
#include <memory>
int main(int argc, char**) {
  std::unique_ptr<float[]> memory(new float[4]);
  memory[argc + PAST] = 2;
  return 0;
}
"""


@pytest.mark.parametrize("past", [0, 3])
def test_an_overrun_of_one_element_is_seen(sanitizers: None, tmp_path: Path, past: int) -> None:
    source = tmp_path / "overrun.cpp"
    source.write_text(OVERRUN.replace("PAST", str(past)), encoding="utf-8")
    done = run([str(compiled([str(source)], tmp_path / "overrun"))])
    assert (done.returncode != 0) == (past == 3)
    assert ("heap-buffer-overflow" in done.stderr) == (past == 3)
