"""Kernels run interpreted on a machine without a GPU; every test prints its seed."""

import os
import zlib

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from support import overflow

    from fastseg.kernels import launch  # noqa: F401

    overflow.refuse()

import pytest
from support import machine_code

import fastseg
from fastseg.verification import criterion

NOT_HERE = {True: ("interpreted", "runs kernels on CPU tensors"), False: ("gpu", "needs a CUDA GPU")}


def pytest_collection_modifyitems(items):
    mark, reason = NOT_HERE[torch.cuda.is_available()]
    for item in items:
        if item.get_closest_marker(mark) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed(request):
    """Each test has a seed of its own, the same in each run; FASTSEG_TEST_SEED sets one, or draws with "random"."""
    asked = os.environ.get("FASTSEG_TEST_SEED", str(zlib.crc32(request.node.nodeid.encode()) % 2**31))
    value = torch.seed() % 2**31 if asked == "random" else int(asked)
    torch.manual_seed(value)
    print(f"seed: FASTSEG_TEST_SEED={value}")
    return value


@pytest.fixture(autouse=True)
def one_thread():
    """The suite runs one process a core."""
    torch.set_num_threads(1)


@pytest.fixture
def triton_backend():
    with fastseg.backend("triton"):
        yield


@pytest.fixture
def poison():
    """New tensors are full of NaN, and non-deterministic operators raise."""
    with criterion.poisoned():
        yield


@pytest.fixture
def assert_right():
    """assert_right(ours, theirs, inputs): error against float64 no more than torch's own plus a tolerance."""

    def check(ours, theirs, inputs, names=None):
        for c in criterion.compare_to_torch(ours, theirs, inputs, names):
            assert c.passed, f"{c.tensor}: error {c.error:.3e}, torch's {c.torch_error:.3e}, allowed {c.allowed:.3e}"

    return check


@pytest.fixture
def exact():
    """Products of float32 as they are, for cuDNN too."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """What every kernel compiles to."""
    base = tmp_path_factory.getbasetemp()
    return machine_code.table(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
