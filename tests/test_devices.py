"""Devices that no kernel supports: every operator falls back to PyTorch there, and `explain` says so."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastseg import dispatch, torch_internals
from fastseg.ops.operator import Operator

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch, fastseg, fastseg.functional as FS
from support.toy_device import ToyTensor

x = torch.randn(2, 5, 6, 8)
pooled, offsets = FS.max_pool2d_with_offsets(x, 2)
_, indices = FS.max_pool2d(x, 2, return_indices=True)
vectors = [torch.zeros(5), torch.ones(5), torch.rand(5), torch.rand(5)]
calls = {
    "max_pool2d": (FS.max_pool2d, x, 2),
    "max_pool2d_with_offsets": (FS.max_pool2d_with_offsets, x, 2),
    "max_unpool2d": (FS.max_unpool2d, pooled, indices, 2),
    "max_unpool2d_with_offsets": (FS.max_unpool2d_with_offsets, pooled, offsets, 2),
    "batch_norm_relu": (FS.batch_norm_relu, x, *vectors),
    "batch_norm_relu_max_pool2d": (FS.batch_norm_relu_max_pool2d, x, *vectors),
}
for name, (function, *args) in calls.items():
    theirs = function(*args)
    ours = function(*(ToyTensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for got, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, theirs)), strict=True):
        assert isinstance(got, ToyTensor), name
        torch.testing.assert_close(got.on_cpu, want, msg=lambda text, name=name: f"{name}: {text}")
    print(name)
torch.use_deterministic_algorithms(True)  # torch's own unpooling raises; the operator runs its reference
FS.max_unpool2d(ToyTensor(pooled), ToyTensor(indices), 2)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process has one accelerator")
def test_every_function_falls_back_on_a_device_that_fastseg_does_not_know():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 6


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1", "Meta"])
def test_every_operator_has_an_implementation_for_every_device(key):
    operators = [o for o in gc.get_objects() if type(o) is Operator]  # isinstance asks dead weak references too
    assert len(operators) > 25
    for operator in operators:
        assert torch_internals.has_kernel(f"fastseg::{operator.name}", key), operator.name


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu", "toy"])
def test_the_reason_names_the_device_type(kind):
    tensor = SimpleNamespace(device=SimpleNamespace(type=kind, index=0))
    choice = dispatch.choose("max_pool2d", tensor, lambda backend: None)
    assert str(choice) == f"max_pool2d: torch (a tensor on device type '{kind}')"
