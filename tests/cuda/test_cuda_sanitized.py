"""The CUDA C++ kernels on the host, under the compiler's sanitizers: every access is inside its tensor and aligned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import cuda_host

ROOT = Path(__file__).parents[2]
RUN = """
import sys; sys.path.insert(0, "tests")
import pytest
from support import cuda_host
cuda_host.OPTIONS = (*cuda_host.OPTIONS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/cuda/test_cuda_grid.py", "-k", sys.argv[1]]))
"""
CHOSEN = "unaligned or far_from or several_steps or (pooling_matches and special and shape4) or (arbitrary and shape1)"


def compilers_library(name):
    """The path of one of the compiler's libraries; the name alone if it has none of this name."""
    command = [cuda_host.COMPILER, f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())


@pytest.mark.skipif(cuda_host.COMPILER is None, reason="no C++ compiler (g++, clang++ or $CXX)")
def test_every_access_is_inside_its_tensor_and_aligned():
    """In a process that loads the sanitizer at its start, so that it also checks torch's tensors.

    And with it C++'s library, which Python does not need: the sanitizer looks for C++'s exceptions only at the start,
    and ends the process at the first one, which triton 3.8 throws while it is imported.
    """
    sanitizer, library = map(compilers_library, ("libasan.so", "libstdc++.so.6"))
    if not sanitizer.is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    env = os.environ | {
        "LD_PRELOAD": f"{sanitizer} {library}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "FASTSEG_TEST_SEED": str(torch.initial_seed() % 2**31),
    }
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run([sys.executable, "-c", RUN, CHOSEN], capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
