"""The machine code of the CUDA C++ kernels, compiled by NVRTC without a GPU: the same gates as for Triton's kernels."""

import re

import pytest
import torch

from fastseg.inspect import cuda_codegen
from fastseg.inspect.codegen import Compiled
from fastseg.inspect.codegen_report import GLOBAL_ATOMICS, cuda_launches
from fastseg.inspect.selection import Selection
from fastseg.kernels.cuda import launch
from fastseg.verification import cases

pytestmark = pytest.mark.skipif(cuda_codegen.library_path() is None, reason="no NVRTC (the package nvidia-cuda-nvrtc)")
KERNELS = {
    f"{file.relative_to(launch.FOLDER).as_posix()} {name}"
    for file in launch.FOLDER.rglob("*.cu")
    for name in re.findall(r"__global__ void (\w+)\(", file.read_text())
}


@pytest.fixture
def rows(facts):
    found = [row for row in facts if ".cu " in row["kernel"]]
    assert {(row["kernel"], row["sm"]) for row in found} == {(name, sm) for name in KERNELS for sm in (80, 90, 100)}
    return found


def test_gate_no_kernel_spills_or_uses_atomics(rows):
    assert [row for row in rows if row["spills"] or row["atomics"]] == []


def test_gate_the_vector_path_is_16_bytes_wide(rows):
    """Groups have eight bfloat16 elements if eight divides a row. Kernels that reduce write floats instead."""
    wide = [
        row
        for row in rows
        if re.search(r", 8\b", row["constants"]["instance"])
        and not re.search(r"unpool2d_bwd<.* false, 0, 0>", row["constants"]["instance"])  # reads single elements
    ]
    seen = {(row["kernel"].split()[1], row["layout"]) for row in wide}
    pools = [f"{norm}max_pool2d_{way}" for norm in ("", "batch_norm_relu_") for way in ("fwd", "bwd", "sums")]
    names = {*pools, "max_unpool2d_fwd", "max_unpool2d_bwd", "batch_norm_stats", "cross_entropy_bwd"}
    names -= {"max_pool2d_bwd", "max_pool2d_sums"}  # the first is an unpooling, the second does not exist
    assert {(name, layout) for name in names for layout in cases.LAYOUTS} <= seen
    assert {("window_gather", "channels_last"), ("cross_entropy_fwd", "nchw")} <= seen
    for row in wide:
        name = row["kernel"].split()[1]
        assert "16" in row["loads"], row
        if name not in ("batch_norm_stats", "batch_norm_relu_max_pool2d_sums"):
            assert "16" in row["stores"], row
        # The exceptions also read single elements at indices, each channel's first one, or the rest of a tensor.
        if name not in ("max_unpool2d_bwd", "batch_norm_stats", "cross_entropy_bwd"):
            assert not {"1", "2"} & {*row["loads"], *row["stores"]}, row


@pytest.mark.parametrize("dtype, sm", [("float32", 100), ("float16", 90), ("bfloat16", 75)])
def test_other_dtypes_and_an_older_gpu_compile(dtype, sm):
    found = cuda_launches(Selection(dtype, ("channels_last",)), first=True)
    assert {request.kernel for _, request in found} >= {"max_pool2d_fwd", "max_unpool2d_fwd", "window_gather"}
    for _, request in found:
        assert cuda_codegen.compile_for(request, sm).resources["STACK"] == 0, request.instance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_comparisons_do_not_flush_subnormal_floats_to_zero(dtype):
    """Under CuPy's -ftz=true a C++ comparison treats them as 0: the first of a window would win, not the largest."""
    found = cuda_launches(Selection(dtype, operators=("max_pool2d",)))
    pools = [request for _, request in found if request.kernel == "max_pool2d_fwd"]
    assert len(pools) >= 4 and "-ftz=true" in launch.OPTIONS
    for request in pools:
        ptx = cuda_codegen.compile_for(request, 90).ptx
        assert "setp.gt.f32" in ptx and not re.search(r"setp\.[gl]\w+\.ftz", ptx), request.instance


def test_float64_compiles_without_a_stack():
    found = cuda_codegen.record(
        lambda: [
            case.step(case.ours, backward=True)()
            for case in cases.max_unpool2d(cases.Placement(torch.float64, torch.channels_last, "meta"), (1, 8, 8, 8))
        ]
    )
    compiled = [cuda_codegen.compile_for(request, 90) for request in found]
    assert (
        "double" in found[0].instance
        and all(c.resources["STACK"] == 0 for c in compiled)
        and 16 in compiled[0].widths("LDG")
    )


BAD = """
template <int N> __global__ void spilling(int* x) {
    int kept[N];
    for (int i = 0; i < N; ++i) kept[i] = x[i];
    for (int i = 0; i < N; ++i) x[i] = kept[x[i] % N];
}
template <int N> __global__ void atomic(float* x) { atomicAdd(x, float(threadIdx.x)); }
template <int N> __global__ void narrow(const short* x, short* y) { y[threadIdx.x] = x[threadIdx.x * N]; }
"""


def test_the_gates_reject_bad_kernels():
    spilling, atomic, narrow = (
        Compiled(name, 90, *cuda_codegen.compile_source(BAD, f"{name}<40>", launch.OPTIONS, 90), 8)
        for name in ("spilling", "atomic", "narrow")
    )
    assert spilling.spills > 0 and atomic.count(*GLOBAL_ATOMICS) > 0 and list(narrow.widths("LDG")) == [2]


def test_an_unknown_architecture_is_not_supported():
    assert cuda_codegen.supports(90) and not cuda_codegen.supports(91)


def test_an_error_holds_the_compilers_log():
    with pytest.raises(RuntimeError, match="nonsense"):
        cuda_codegen.compile_source("template <int N> __global__ void k() { nonsense; }", "k<1>", launch.OPTIONS, 90)
