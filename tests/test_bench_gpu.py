"""The GPU benchmarks' code paths, tiny and on a CPU, and what `make gpu` makes of failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from native_calls import COMPILER

from bench import (
    flash,
    gpu,
    gpu_attention,
    gpu_bench,
    gpu_rows,
    gpu_scenarios,
    gpu_small,
    signals,
    tables,
)
from bench.gate import GateError
from bench.rivals import RIVALS
from bench.scenarios import GPU_CORE, GPU_SCENARIOS

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()


def compared(name, **options):
    scenario = gpu_scenarios.rehearsal(GPU_SCENARIOS[name])
    options = {"deadline": time.perf_counter(), "gflops": 100.0, "repetitions": 2} | options
    return gpu_scenarios.compare_on_gpu(scenario, **options)


def test_a_scenario_is_gated_and_timed_and_printed():
    name = "gpu-1.5b-half-true"
    result = compared(name)
    assert result["refused"] == {} and result["unavailable"] == {}
    assert set(result["rivals"]) == set(GPU_CORE)
    assert all(len(entry["seconds"]) == 2 for entry in result["rivals"].values())
    assert result["rivals"]["ours"]["times_ours"] == 1.0
    assert "packed loop" in tables.table(result, name)


def test_a_rival_with_wrong_answers_is_refused_and_not_timed(monkeypatch):
    right = RIVALS["packed_loop"].run

    def wrong(model, workload):
        values, logps = right(model, workload)
        return [None if x is None else 1.5 * x for x in values], logps

    monkeypatch.setitem(RIVALS, "packed_loop", replace(RIVALS["packed_loop"], run=wrong))
    result = compared("gpu-1.5b-half-true")
    assert set(result["refused"]) == {"packed_loop"} and "packed_loop" not in result["rivals"]


def test_without_right_answers_of_ours_there_is_no_speed(monkeypatch):
    def fails(model, workload):
        raise RuntimeError("a kernel's\nfault")

    monkeypatch.setitem(RIVALS, "ours", replace(RIVALS["ours"], run=fails))
    result = compared("gpu-1.5b-half-true")
    assert result["refused"] == {"ours": "RuntimeError: a kernel's fault"}
    assert not any(entry["seconds"] for entry in result["rivals"].values())
    assert all(entry["times_ours"] is None for entry in result["rivals"].values())


@pytest.mark.parametrize("bug", ["one judgement outside the sample", "log-probability", "missing"])
def test_the_gate_catches(bug):
    scenario = gpu_scenarios.rehearsal(GPU_SCENARIOS["gpu-7b-all-true"])
    model, workload = scenario.build()
    sample = [0, 3]
    references = gpu_scenarios._references(model, workload, sample)
    whole = gpu_scenarios.sampled_loop(model, workload, range(4))
    values, logps = [x.clone() for x in whole[0]], whole[1].clone()
    gpu_scenarios.gate_on_gpu(references, (values, logps), whole, sample, workload)
    if bug == "missing":
        del values[-1]
    elif bug == "log-probability":
        logps[3] *= 1.02
    else:
        values[1] = values[1].flip(0)
    with pytest.raises(GateError):
        gpu_scenarios.gate_on_gpu(references, (values, logps), whole, sample, workload)


def test_samples_hold_true_and_false_ones_from_end_to_end():
    workload = gpu_scenarios.rehearsal(GPU_SCENARIOS["gpu-7b-half-true"]).build()[1]
    sample = gpu_scenarios._sample(workload, 3)
    assert {workload.true_mask[j] for j in sample} == {True, False}
    assert gpu_scenarios._spread(list(range(64)), 6) == [0, 13, 25, 38, 50, 63]


def test_every_scenario_builds_what_its_label_says():
    labels = [scenario.label for scenario in GPU_SCENARIOS.values()]
    assert len(set(labels)) == len(labels) and "" not in labels
    assert all(scenario.device == "cuda" for scenario in GPU_SCENARIOS.values())


def test_attention_is_held_against_flash_attention():
    device = "cuda" if ON_GPU else "cpu"
    case = gpu_small.CASES["attention, 64"] if ON_GPU else gpu_attention.SMALL
    found = gpu_attention.attention(case, device, repeats=1)
    entries = [entry for entry in found.values() if isinstance(entry, dict)]
    assert entries
    for entry in entries:
        assert "forward_ms" in entry, found


def test_row_kernels_are_checked_and_timed():
    found = gpu_rows.row_kernels("cuda" if ON_GPU else "cpu", 100.0, small=True)
    assert {name: entry.get("not_measured") for name, entry in found.items()} == dict.fromkeys(
        found
    )


def test_plain_flash_attention_is_aligned_at_the_last_query():
    """And what runs on a GPU is tried against it before it is used."""
    q, k, v = torch.randn(3, 2, 16), torch.randn(5, 1, 16), torch.randn(5, 1, 16)
    got = flash.plain(q, k, v, flash.Lengths([3], [5]), 0.25)
    for row in range(3):
        seen = row + 3
        p = torch.softmax(q[row] @ k[:seen, 0].T * 0.25, -1)
        torch.testing.assert_close(got[row], p @ v[:seen, 0])
    assert flash.route(torch.device("cpu"), torch.float32, 2, 16).startswith("plain")


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    options = gpu_bench.argparse.Namespace(
        save=str(tmp_path / "gpu.json"), rehearse=True, device="cpu", minutes=1.0, only=None
    )
    run = gpu_bench._Run(options)
    run.piece("kernels", "good", lambda: {"ms": 1.0})
    with pytest.raises(SystemExit):  # the process ends in the middle of it
        run.piece("kernels", "fatal", lambda: sys.exit(3))
    again = gpu_bench._Run(options)
    again.piece("kernels", "good", pytest.fail)
    again.piece("kernels", "fatal", pytest.fail)
    again.piece("kernels", "bad", lambda: {"triton": {"refused": "errors"}})
    assert again.content["problems"] == [
        "kernels fatal: the process ended",
        "bad: triton: errors",
    ]
    assert "PROBLEM: bad: triton: errors" in gpu_bench.report(again.content)


def test_signals_and_a_training_step_are_gated_and_timed_and_printed(tmp_path):
    options = gpu_bench.argparse.Namespace(
        save=str(tmp_path / "gpu.json"), rehearse=True, device="cpu", minutes=1.0, only=None
    )
    run = gpu_bench._Run(options)
    run._signals(gflops=100.0)
    assert run.content["problems"] == []
    assert list(run.content["signals"]) == ["gpu-grail", "gpu-g2rl", "gpu-vigor"]
    for result in run.content["signals"].values():
        for entry in result["rivals"].values():
            assert len(entry["seconds"]) == 2 and entry["times_ours"] > 0
            assert 0 < entry["share_of_peak"] < 1
    steps = run.content["steps"]["gpu-grpo-step"]
    assert all(one["added_seconds"]["ours"] > 0 for one in steps.values())
    text = gpu_bench.report(json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")))
    assert "gpu-vigor: G=2" in text and "vigor: step " in text


def test_signals_with_wrong_answers_are_a_problem_and_not_timed(tmp_path, monkeypatch):
    options = gpu_bench.argparse.Namespace(
        save=str(tmp_path / "gpu.json"),
        rehearse=True,
        device="cpu",
        minutes=1.0,
        only="signals gpu-v",
    )

    def wrong(model, rollouts):
        return [x * 1.5 for x in right(model, rollouts)]

    ours = signals.RIVALS_OF["vigor"]["ours"]
    right = ours.run
    monkeypatch.setitem(signals.RIVALS_OF["vigor"], "ours", replace(ours, run=wrong))
    run = gpu_bench._Run(options)
    run._signals(gflops=None)
    (problem,) = run.content["problems"]
    assert "GateError: ours: answer 0" in problem
    assert "GateError" in gpu_bench.report(run.content)


def runner(tmp_path):
    return gpu.Runner(tmp_path / "out")


def test_a_command_has_a_limit_and_leaves_its_log(tmp_path):
    run = runner(tmp_path)
    assert run.command("tests", [sys.executable, "-c", "print(7); raise SystemExit(5)"], 30) == 5
    begun = time.perf_counter()
    slow = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    assert run.command("tests", [sys.executable, "-c", slow], 1.5) == 124
    assert time.perf_counter() - begun < 20
    written = json.loads((tmp_path / "out" / "gpu-run.json").read_text(encoding="utf-8"))
    assert [part["status"] for part in written["parts"]["tests"]] == [5, 124]
    assert "7\n" in (tmp_path / "out" / "gpu-tests.log").read_text(encoding="utf-8")


def test_a_failed_part_keeps_no_other_from_running(tmp_path, monkeypatch, capsys):
    ran = []

    def part(name, fails):
        def body(run, options):
            ran.append(name)
            if fails:
                run.fail(f"{name}: no")

        return body

    for name in gpu.PARTS:
        monkeypatch.setattr(gpu, name, part(name, fails=name == "tests"))
    arguments = ["--results", str(tmp_path / "out")]
    assert gpu.main([*arguments, "--parts", "bench,tests,build"]) == 1
    assert ran == ["build", "tests", "bench"]
    assert "FAILED: tests: no" in capsys.readouterr().out
    assert gpu.main([*arguments, "--parts", "build"]) == 0
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "--parts", "build,everything"])


def test_benchmarks_start_again_after_a_fatal_fault(tmp_path, monkeypatch):
    run = runner(tmp_path)
    statuses = iter([3, -11, 1])
    monkeypatch.setattr(run, "command", lambda *a, **k: next(statuses))
    options = gpu.argparse.Namespace(minutes=6.0, only=None, rehearse=False)
    gpu.bench(run, options)
    assert next(statuses, None) is None and len(run.failed) == 1


@pytest.mark.parametrize("nvcc", ["/cuda/nvcc", None])
def test_every_tool_runs_over_the_cuda_kernels(tmp_path, monkeypatch, nvcc):
    run, commands = runner(tmp_path), []

    def command(part, words, seconds, environment=None, shown=30):
        assert part == "sanitize" and seconds > 0
        commands.append(words)
        return 77 if "racecheck" in words else 0

    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu.building, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(gpu, "_output", lambda words: "9.0\n")
    gpu.sanitize(run, gpu.argparse.Namespace(tools=",".join(gpu.TOOLS)))
    torch_part = [sys.executable, "-m", "bench.gpu_small"]
    assert commands[-2] == torch_part and commands[-1][-3:] == torch_part
    assert "memcheck" in commands[-1]
    if nvcc is None:
        assert len(commands) == 2 and len(run.failed) == 1
        return
    compiled, bare, *tools = commands[:-2]
    assert compiled[0] == nvcc and "-arch=sm_90a" in compiled and bare == compiled[-1:]
    assert [words[2] for words in tools] == list(gpu.TOOLS)
    assert all(bare[0] in words for words in tools)
    assert ["--uninitialised" in words for words in tools] == [False, True, False, False]
    assert run.failed == ["sanitize: racecheck: cuda_small: it found errors"]


@pytest.fixture(scope="module")
def cuda_small(tmp_path_factory):
    """The program for compute-sanitizer with its kernels on the CPU."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("the emulation is for Linux, and wants a C++ compiler")
    program = tmp_path_factory.mktemp("cuda") / "cuda_small"
    command = [str(COMPILER), "-O1", "-std=c++17", "-DG2R_EMULATE", "-Wall", "-Wextra", "-Wshadow",
               "-Werror", "-Icsrc/cuda", "-Itests/cpp", "-pthread", "-x", "c++", *gpu.CUDA_SMALL,
               "-o", str(program)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[:4000]
    return str(program)


def test_the_program_for_compute_sanitizer_finds_the_kernels_right(cuda_small):
    cases = [f"bf16-dim64-group1-{products}-window77-softcap" for products in ("mma", "wgmma")]
    words = [cuda_small, "--uninitialised", *cases]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("2 cases on a cpu, 0 wrong\n")
    assert subprocess.run([cuda_small, "no such case"], check=False).returncode == 1


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = forked.run(["-m", "bench.gpu_bench", "--save", str(tmp_path / "x.json")], ROOT)
    assert done.returncode == 1 and "torch sees no GPU here" in done.stderr


def test_the_table_of_a_gpu_comes_from_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    entry = {"seconds": [0.5], "median_seconds": 0.5, "times_ours": 1.0, "share_of_peak": 0.66}
    result = {"rivals": {"ours": entry, "loop": entry | {"times_ours": 10.25}}}
    content = {"scenarios": {"gpu-7b-all-true": result, "gpu-7b-half-true": {"not_measured": "x"}}}
    (tmp_path / "gpu.json").write_text(json.dumps(content), encoding="utf-8")
    assert tables.render("gpu speed").splitlines() == [
        '<!-- from bench/results/gpu.json; table "gpu speed" of bench/tables.py -->',
        "| | g2r_fast | of the matrix rate | loop |",
        "|---|---|---|---|",
        "| 7B, all True | 500 ms | 66 % | 10.25 |",
    ]
