"""Every launch through the launcher of compiled kernels, up to the compiler, without a GPU or the interpreter."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import collections, itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget

launched = collections.Counter()


class Driver:
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", SM, 32) if SM else GPUTarget("hip", "gfx942", 64)


class Kernel:
    function = packed_metadata = None
    launch_metadata = lambda self, *arguments: None

    def __init__(self, name):
        self.name = name

    def run(self, *arguments):
        launched[self.name] += 1


SM = int(sys.argv[1])
triton.runtime.driver.set_active(Driver())
triton.runtime.jit.JITFunction._do_compile = lambda self, *arguments: Kernel(self.__name__)

import torch
from fastseg import dispatch
torch.version.hip = None if SM else "7.0"
from fastseg.kernels import launch
from fastseg.kernels.convolution import conv_transpose_tma
from fastseg.verification import cases
from fastseg.verification.operators import SIZES

conv_transpose_tma.MOST_COVER = 99  # use the TMA kernels for small images too
dispatch.interpreted = lambda: True  # allow CPU tensors although kernels are not interpreted
without = []
for (operator, sizes), dtype, layout in itertools.product(SIZES.items(), ("float16", "float32"), cases.LAYOUTS):
    before = launched.total()
    for make in sizes:
        for case in make(cases.Placement(cases.DTYPES[dtype], cases.LAYOUTS[layout], "cpu")):
            with dispatch.backend("triton"), launch.targeting(SM):
                case.step(case.ours, True)()
    if launched.total() == before:
        without.append(operator)
print(json.dumps({"launched": launched, "without": without}))
"""


@pytest.mark.parametrize("sm", [80, 90, 0], ids=["sm_80", "sm_90", "gfx942"])
def test_the_launcher_accepts_the_arguments_of_every_kernel(sm):
    """It raises for unknown options, for too many or too few arguments, and for descriptors of unaligned tensors."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(sm)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["without"] == [] and len(found["launched"]) >= 30
    assert any("_tma_" in name for name in found["launched"]) == (sm >= 90)
