"""GPUs with less shared memory than an H100: 99 KiB per program on compute capability 8.6, 8.9 and 12.x."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastseg.kernels import launch

COMPILED = """
import json, sys
import torch
from fastseg import dispatch
from fastseg.inspect.codegen import MULTIPROCESSORS, compile_for, record
from fastseg.kernels.launch import targeting
from fastseg.ops.operator import observing
from fastseg.verification import cases

sm = int(sys.argv[1])
found = []
for layout in cases.LAYOUTS.values():
    at = cases.Placement(torch.bfloat16, layout, "meta")
    for case in cases.conv_transpose2d(at, (8, 128, 180, 240), cases.ConvTransposeSpec(64, kernel=2, stride=2)):
        with dispatch.backend("triton"), targeting(sm), observing(lambda operator, call: None):
            found += record(lambda: case.step(case.ours, backward=True)())
wanted = [one for one in found if "shuffle" in one.name or "tma" in one.name]
kernels = [compile_for(one, sm) for one in wanted]
limit = (MULTIPROCESSORS[sm][0] - 1) * 1024
print(json.dumps([[kernel.name, kernel.shared, kernel.resources["STACK"], limit] for kernel in kernels]))
"""


@pytest.mark.parametrize("sm", [86, 120])
def test_the_largest_blocks_fit(sm):
    """Kernels that use more shared memory on an H100 fit these GPUs; 8.9 has as much as 8.6.

    In one of them ptxas spills 32 bytes to use 53 fewer registers.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED, str(sm)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    names = {name for name, *_ in kernels}
    assert "conv_transpose2d_bwd_shuffle_kernel" in names and ("conv_transpose2d_fwd_tma_kernel" in names) is (
        sm == 120
    )
    for name, shared, stack, limit in kernels:
        assert shared <= limit and stack <= 32, (name, shared, stack)


@pytest.mark.parametrize("sm, roomy", [(80, False), (89, False), (90, True), (100, True), (110, True), (120, False)])
def test_which_gpus_are_roomy(sm, roomy):
    with launch.targeting(sm):
        assert launch.roomy(torch.empty(1)) is roomy
