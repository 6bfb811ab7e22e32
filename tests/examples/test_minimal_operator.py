"""The example that CONTRIBUTING.md explains: it runs, and it holds what it shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastseg

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import minimal_operator  # noqa: E402


def test_it_runs_by_itself():
    env = os.environ | {"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "examples/minimal_operator.py"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "example_average_pool2d: " in run.stdout and "right: largest error" in run.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_right(dtype, layout, device, triton_backend, poison, assert_right):
    x = torch.randn(3, 5, 6, 14, device=device).to(dtype).contiguous(memory_format=layout)
    assert_right(minimal_operator.average_pool2d, lambda x: F.avg_pool2d(x.contiguous(), 2), [x])


def test_its_registration_is_sound(device):
    x = torch.randn(2, 3, 4, 6, device=device)
    torch.library.opcheck(torch.ops.fastseg.example_average_pool2d.default, (x,))


def test_it_has_second_derivatives(device, triton_backend):
    x = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(minimal_operator.average_pool2d(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].shape == x.shape


def test_what_it_does_not_support_says_so(device):
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        minimal_operator.average_pool2d(torch.zeros(1, 1, 2, 2, dtype=torch.float64, device=device))
    with pytest.raises(RuntimeError, match=r"even H and W, but has shape \(1, 1, 3, 2\)"):
        minimal_operator.average_pool2d(torch.zeros(1, 1, 3, 2, device=device))
