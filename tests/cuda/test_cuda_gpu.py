"""The CUDA C++ kernels on a GPU, through CuPy."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional
from fastseg.torch_internals import sleep_on_gpu
from fastseg.verification import cases, operators

pytestmark = pytest.mark.gpu
OPERATORS = ("max_pool2d", "max_unpool2d", "cross_entropy", "batch_norm_relu")


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def cuda_backend(cupy):
    with fastseg.backend("cuda"):
        yield


def test_cupy_and_torch_see_the_same_memory(cupy):
    x = torch.arange(5, device="cuda", dtype=torch.float32)
    view = cupy.from_dlpack(x)
    assert view.data.ptr == x.data_ptr()
    view *= 2
    cupy.cuda.get_current_stream().synchronize()
    assert x.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_cases_of_verify_pass(cupy, operator, dtype):
    ran = 0
    for _, comparisons in operators.verify([operator], [dtype], False, "cuda", torch.initial_seed() % 2**31, "cuda"):
        assert all(c.passed for c in comparisons), comparisons
        ran += bool(comparisons)
    assert ran >= 16


def test_a_launch_runs_on_the_current_stream(cuda_backend):
    """A kernel on a side stream reads what an earlier, slow operation on that stream has written."""
    x, late = torch.zeros(4, 8, 256, 256, device="cuda"), torch.randn(4, 8, 256, 256, device="cuda")
    functional.max_pool2d(x, 2)  # compiles the kernel
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sleep_on_gpu(200_000_000)
        x.copy_(late)
        y = functional.max_pool2d(x, 2)
    stream.synchronize()
    assert torch.equal(y, F.max_pool2d(late, 2))


def test_a_cuda_graph_captures_the_kernels(cuda_backend):
    x = torch.randn(2, 8, 32, 32, device="cuda")
    functional.max_pool2d(x, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.max_pool2d(x, 2)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, F.max_pool2d(x, 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_the_second_gpu(cuda_backend):
    x = torch.randn(2, 8, 32, 32, device="cuda:1", requires_grad=True)
    y = functional.max_pool2d(x, 2)
    y.sum().backward()
    assert torch.cuda.current_device() == 0 and torch.equal(y, F.max_pool2d(x, 2)) and x.grad.sum() == y.numel()


def python(code):
    env = {k: v for k, v in os.environ.items() if k != "FASTSEG_BACKEND"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return run.returncode, run.stdout + run.stderr


def test_auto_chooses_them_if_triton_is_missing(cupy):
    code, output = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastseg\n"
        "x = torch.randn(2, 8, 32, 32, device='cuda', requires_grad=True)\n"
        "print(*fastseg.explain(fastseg.functional.max_pool2d, x, 2))\n"
        "y = fastseg.functional.max_pool2d(x, 2)\n"
        "y.sum().backward()\n"
        "print(torch.equal(y, torch.nn.functional.max_pool2d(x, 2)), x.grad.sum().item() == y.numel())"
    )
    assert code == 0 and output.splitlines()[-2].startswith("max_pool2d: cuda") and output.endswith("True True\n"), (
        output
    )


@pytest.mark.parametrize("bad", [-1, 64, 2**32 + 3])
def test_an_index_outside_the_plane_fails_a_device_assertion(cupy, bad):
    code, output = python(
        "import torch, fastseg; fastseg.set_backend('cuda'); x = torch.ones(1, 1, 4, 4, device='cuda');"
        f"i = torch.full((1, 1, 4, 4), {bad}, device='cuda');"
        "fastseg.functional.max_unpool2d(x, i, 2); torch.cuda.synchronize()"
    )
    assert code != 0 and "invalid max index" in output
