"""compile_only.py sees what is wrong with a CUDA kernel; it runs where there is nvcc."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compile_only
import pytest

from g2r_fast import building

NVCC = building.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")

SOURCE = """
#include "device_warpgroup.cuh"

namespace g2r::gpu {

template <typename T, int size>
G2R_GLOBAL void fine(float* out) { out[thread_index()] = to_float(from_float<T>(out[size])); }

template <int size>
G2R_GLOBAL void G2R_LAUNCH_BOUNDS(1024, 1) spilling(float* out) {
    float x[size];
    G2R_UNROLL
    for (int i = 0; i < size; ++i) x[i] = out[i * 1024 + thread_index()];
    for (int step = 0; step < 9; ++step) {
        G2R_UNROLL
        for (int i = 0; i < size; ++i) x[i] = x[i] * x[(i + 7) % size] + 1.0f;
    }
    G2R_UNROLL
    for (int i = 0; i < size; ++i) out[i * 1024 + thread_index()] = x[i];
}

G2R_GLOBAL void of_hopper(float* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    out[thread_index()] = 1.0f;
#else
    (void)out;
#endif
}

G2R_GLOBAL void touches_a_result_in_flight(float* out) {
#if G2R_WARPGROUPS
    const std::uint64_t tile = matrix_descriptor(shared_memory(), 16, 1024);
    float d[8][4] = {};
    wgmma_fence();
    wgmma<bf16, false>(d, tile, tile, true);
    d[0][0] += out[0];
    wgmma<bf16, false>(d, tile, tile, true);
    wgmma_commit();
    wgmma_wait<0>();
    G2R_UNROLL
    for (int i = 0; i < 32; ++i) out[i] = d[i / 4][i % 4];
#else
    (void)out;
#endif
}

G2R_GLOBAL void on_stack(float* out) {
    float x[64];
    for (int i = 0; i < 64; ++i) x[i] = out[i];
    for (int i = 0; i < 64; ++i) x[static_cast<int>(out[i]) & 63] += 1.0f;
    for (int i = 0; i < 64; ++i) out[i] = x[static_cast<int>(out[i + 64]) & 63];
}

int use(float* out) {
    int error = launch(fine<bf16, 64>, Grid{}, 32, 0, nullptr, out);
    if (error == 0) error = launch(fine<f16, 128>, Grid{}, 32, 0, nullptr, out);
    if (error == 0) error = launch(spilling<128>, Grid{}, 32, 0, nullptr, out);
    if (error == 0) error = launch(of_hopper, Grid{}, 32, 0, nullptr, out);
    if (error == 0) error = launch(touches_a_result_in_flight, Grid{}, 128, 8192, nullptr, out);
    if (error == 0) error = launch(on_stack, Grid{}, 32, 0, nullptr, out);
    return error;
}

}  // namespace g2r::gpu

struct Kernel {
    const char* name;
    int threads, shared_bytes, architecture;
};

extern "C" int use(float* out) { return g2r::gpu::use(out); }

extern "C" int g2r_kernel(int index, Kernel* kernel) {
    const Kernel kernels[] = {TABLE};
    if (index >= static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))) return 1;
    *kernel = kernels[index];
    return 0;
}
"""
TABLE = (
    '{"fine<64>", 32, 1000, 0}, {"fine<128>", 32, 232449, 0}, {"spilling<128>", 32, 0, 0}, '
    '{"of_hopper", 32, 200000, 90}, {"touches_a_result_in_flight", 128, 8192, 90}, '
)
LAST = '{"on_stack", 32, 0, 0}'


@pytest.fixture(autouse=True)
def two_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {arch: compile_only.SHARED_LIMIT[arch] for arch in compile_only.REQUIRED}
    monkeypatch.setattr(compile_only, "SHARED_LIMIT", limits)


def printed(folder: Path, source: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (folder / "kernels.cu").write_text(source, encoding="utf-8")
    assert NVCC is not None
    with ThreadPoolExecutor(2) as pool:
        faults = compile_only.CudaSources(NVCC, [folder / "kernels.cu"], pool).print_table()
    return faults, capsys.readouterr().out


@needs_nvcc
def test_every_planted_fault_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults, out = printed(tmp_path, SOURCE.replace("TABLE", TABLE + LAST), capsys)
    rows = {line.split("  ")[0]: line for line in out.splitlines() if " / " in line}
    assert rows["fine<bf16, 64>"].split()[2:4] == ["1000", "/"]
    told = [line.strip() for line in out.splitlines() if "FAULT" in line]
    assert faults == len(told)
    assert not any("fine<bf16, 64>" in line for line in told)
    # Too much for sm_80, which has no code of it.
    assert rows["of_hopper"].split()[1:4] == ["-", "200000", "/"]
    assert not any("of_hopper" in line for line in told)
    assert any("serialized" in line and "touches_a_result_in_flight" in line for line in told)
    for arch in (80, 90):
        about = [line for line in told if f": sm_{arch}: " in line]
        assert any("spilling<128>" in line and "of spills" in line for line in about)
        assert any("on_stack" in line and "a stack frame of 256" in line for line in about)
        limit = compile_only.SHARED_LIMIT[arch]
        assert any(f"fine<f16, 128>: sm_{arch}: 232449 bytes of shared" in line for line in about)
        assert any(f"limit {limit}" in line for line in about)


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SOURCE.replace("TABLE", TABLE.rstrip(", ")), "0 entries of g2r_kernel are about on_stack"),
        (
            SOURCE.replace("TABLE", TABLE + LAST + ', {"gone<64>", 32, 0, 0}'),
            "g2r_kernel lists gone<64>, which is not compiled",
        ),
        (
            SOURCE.replace("TABLE", TABLE + LAST).replace("int error", "int n, error"),
            "never referenced",
        ),
        (SOURCE.replace("TABLE", TABLE + LAST).replace("to_float(from", "to_floats(from"), "nvcc"),
    ],
)
def test_what_does_not_fit_together_is_told(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults, out = printed(tmp_path, source, capsys)
    assert faults >= 2
    assert message in out


def test_names_are_short() -> None:
    long = "void g2r::gpu::name<__nv_bfloat16, (int)128, (bool)0>(G2rAttentionForward)"
    assert compile_only.plain_name(long) == "name<bf16, 128, 0>"
    assert compile_only.plain_name("void name<__half, 64, true>(int, float)") == "name<f16, 64, 1>"
    assert compile_only.plain_name("g2r::gpu::name(float*)") == "name"
    assert compile_only.covers("name<128>", "name<f16, 128, 0>")
    assert compile_only.covers("name", "name<f16, 128, 0>")
    assert not compile_only.covers("name<12>", "name<f16, 128, 0>")
    assert not compile_only.covers("other<128>", "name<f16, 128, 0>")
