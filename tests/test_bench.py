"""What the benchmarks print and publish: tables from results files, repetitions, the peak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import peak, publish, repetitions, tables
from bench.harness import Effort
from bench.scenarios import SCENARIOS, Scenario

ROOT = Path(__file__).resolve().parents[1]


def result(**ratios):
    """A results file's content for one scenario, with these seconds per rival."""
    rivals = {
        name: {
            "title": name,
            "seconds": seconds,
            "times_ours": round(seconds[0] / ratios["ours"][0], 2),
            "share_of_peak": round(0.8765 / seconds[0], 4),
            "passes": {"forward": 1, "backward": 2, "weights": 0},
            "max_relative_error": 1e-6,
        }
        for name, seconds in ratios.items()
    }
    return {
        "scenario": {"dtype": "float32"},
        "workload": {"G": 1, "K": 1, "prompt": 2, "responses": [3], "tail": [4], "true_items": 1},
        "backend": "native: plain",
        "peak": {"float32": {"best_gflops": 123.4}},
        "required_gflop": {"total": 12.3456},
        "rivals": rivals,
        "unavailable": {"inseq": "it is not installed"},
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two scenarios measured, one of them with a slow rival; all others not."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    first = result(ours=[1.0, 1.0], loop=[5.678, 5.0], padded=[7.0])
    second = result(ours=[2.0], loop=[4.0], tuned_cached_loop=[1.5])
    for name, content in (("float32-all-true", first), ("float32-one-item", second)):
        path = tmp_path / f"{tables.result_name(name)}.json"
        path.write_text(json.dumps({"scenarios": {name: content}}), encoding="utf-8")


def test_a_documents_table_is_made_from_the_files(results):
    assert tables.render("speed").splitlines() == [
        "<!-- from bench/results/grad2reward-float32-all-true.json"
        ' bench/results/grad2reward-float32-one-item.json; table "speed" of bench/tables.py -->',
        "| | loop | tuned cached loop |",
        "|---|---|---|",
        "| float32, all True | 5.68 | not run |",
        "| float32, one item | 2.00 | 0.75 |",
    ]
    assert "| float32, all True | 7.00 |" in tables.render("slow rivals")
    assert "| float32, all True | 12 | 88 % | not run | 15 % |" in tables.render("share of peak")


def test_only_marked_tables_are_rewritten(results):
    kept = "before\n\n<!-- from bench/results/other.json -->\n| a |\n|---|\n| 7 |\n\n"
    marked = '<!-- from old.json; table "slow rivals" of bench/tables.py -->\n| a |\n| 9.99 |\n'
    found = tables.rewritten(kept + marked + "\nbehind")
    assert found.startswith(kept) and found.endswith("\n\nbehind")
    assert "9.99" not in found and tables.render("slow rivals") in found
    assert tables.rewritten(found) == found
    assert tables.marked_tables(found) == ["slow rivals"]


def test_the_documents_tables_are_those_of_the_committed_files():
    for path, wanted in tables.documents(ROOT).items():
        assert path.read_text(encoding="utf-8") == wanted, (
            f"{path.name}: a table is not what its results files give: "
            "python -m bench.publish --tables"
        )
    found = tables.marked_tables((ROOT / "bench" / "README.md").read_text(encoding="utf-8"))
    assert found == ["share of peak"]


def test_a_terminals_table_names_what_it_is_about(results):
    text = tables.table(tables.results_of("float32-all-true"), "title")
    assert "12 GFLOP required, ours: native: plain, peak GFLOP/s: 123" in text
    row = next(line for line in text.splitlines() if line.startswith("padded"))
    assert "7.00x" in row and "13%" in row
    assert "not run: it is not installed" in text


def test_ratios_are_medians_of_ratios_within_a_repetition():
    found = result(ours=[1.0, 2.0, 10.0], loop=[3.0, 4.0, 100.0])
    assert repetitions.paired_ratio(found, "loop", "ours") == 3.0  # of 3, 2 and 10
    found = result(ours=[1.0, 2.0, 10.0], loop=[3.0])  # a slow rival: the first repetition alone
    assert repetitions.paired_ratio(found, "loop", "ours") == 3.0
    assert repetitions.paired_ratio(found, "captum", "ours") is None


@pytest.mark.parametrize(
    ("effort", "seconds", "repetitions"),
    [
        (Effort(5, least_seconds=10), 60.0, 5),
        (Effort(5, least_seconds=10), 1.0, 10),
        (Effort(5, least_seconds=10), 0.01, 25),
        (Effort(5, least_seconds=10, most_seconds=200), 60.0, 3),
        (Effort(5, least_seconds=10, most_seconds=1), 60.0, 2),
        (Effort(1, least_seconds=0), 0.01, 1),
    ],
)
def test_repetitions(effort, seconds, repetitions):
    done = 0
    while effort.another(done, done * seconds):
        done += 1
    assert done == repetitions


def test_ours_is_held_against_the_peak_beside_each_of_its_repetitions():
    found = result(ours=[1.0], loop=[1.0])
    for entry in found["rivals"].values():
        entry.update(seconds=[], cpu_seconds=[], load_before=[])
    rates = iter([100.0, 80.0, 20.0, 50.0])  # before and after each run of ours
    runs = {name: lambda: None for name in found["rivals"]}
    effort = Effort(2, least_seconds=0)
    repetitions.repeat(runs, found["rivals"], effort, rate=lambda: next(rates))
    ours, loop = (found["rivals"][name] for name in ("ours", "loop"))
    assert ours["peak_gflops"] == [100.0, 50.0] and "peak_gflops" not in loop

    ours["seconds"], loop["seconds"] = [1.0, 4.0], [10.0, 10.0]
    repetitions.add_figures(found, int(60e9))
    assert ours["share_of_peak"] == 0.45  # between 60 of 100 and 15 of 50 GFLOP/s
    assert loop["share_of_peak"] == 0.08  # 6 of 75 GFLOP/s
    del ours["peak_gflops"]
    repetitions.add_figures(found, int(60e9))
    assert loop["share_of_peak"] == round(6 / 123.4, 4)


def test_a_budget_cuts_long_scenarios_short():
    plain = Effort()
    names = list(SCENARIOS)
    long, short = (publish.efforts(names, plain, minutes) for minutes in (1000.0, 20.0))
    seconds = {
        label: sum(publish.estimate(name).total(efforts[name]) for name in names)
        for label, efforts in (("long", long), ("short", short))
    }
    assert seconds["short"] < seconds["long"] <= 1000 * 60
    assert all(effort.another(1, 1e6) for effort in short.values())  # two repetitions in any case


def test_every_scenario_is_measured_against_the_loop_and_our_own_pytorch_path():
    for name, scenario in SCENARIOS.items():
        assert {"ours", "ours_reference", "loop", "tuned_cached_loop"} <= set(scenario.rivals), name
    labels = [scenario.label for scenario in SCENARIOS.values()]
    assert len(set(labels)) == len(labels) and "" not in labels
    assert Scenario().label == ""


def test_the_peak_is_measured_or_says_why_not(monkeypatch):
    found = peak.peak(1)
    assert found.keys() == {"float32", "bfloat16"}
    for rates in found.values():
        measured = rates.get("median_gflops", 0) > 0 and rates["instructions"]
        assert measured or rates["not_measured"]
    peak._program.cache_clear()
    monkeypatch.setattr(peak, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    assert peak.rate(1, "float32") is None
    missing = peak.peak(1)
    assert missing["float32"] == {"not_measured": "no C++ compiler: none of no-such-compiler"}
    peak._program.cache_clear()
    assert peak.higher(found, missing)["float32"] == found["float32"]
