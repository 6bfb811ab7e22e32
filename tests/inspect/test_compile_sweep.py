"""compile_sweep.py compiles a random call, and reports kernels that do not compile."""

import os
import subprocess
import sys

BAD = """
import sys
sys.path.insert(0, "tests")
import torch
from support import bad_kernels, compile_sweep
from fastseg.inspect.codegen import record
from fastseg.kernels.launch import launch
x = torch.empty(1 << 16, device="meta")
found = record(lambda: [launch(bad_kernels.strided_copy_kernel, 4, x, x, 4096, BLOCK=block) for block in (1024, 1000)])
for one in found:
    print(*sorted(compile_sweep.compiled(one, 90)))
compile_sweep.compile_for = lambda *arguments: compile_sweep.os.abort()
print(*compile_sweep.compiled(found[0], 90).values())
"""


def run(*words):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)


def test_a_call_compiles():
    found = run("tests/support/compile_sweep.py", "--calls", "1", "--seed", "5")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith("seed 5\n") and " 0 failed" in found.stdout


def test_kernels_that_do_not_compile_are_reported():
    found = run("-c", BAD)
    assert found.stdout.splitlines() == ["registers shared spills", "failed", "the compiler ended its process"], found
