"""Fixtures of all tests. Without a GPU, kernels run in Triton's interpreter. Every test prints its seed."""

import os
import zlib

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from support import overflow

    from fastseg.kernels import launch  # noqa: F401

    overflow.install()

import pytest
from support import machine_code

import fastseg
from fastseg.training import data_check
from fastseg.verification import criterion, precision

SKIPPED = {  # by whether there is a GPU: the marker and the reason
    True: ("interpreted", "runs kernels on CPU tensors"),
    False: ("gpu", "needs a CUDA GPU"),
}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="run each test with its first set of arguments alone")


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            every = item.get_closest_marker("every") is not None
            first.setdefault(item.nodeid if every else item.nodeid.partition("[")[0], item)
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = first.values()
    mark, reason = SKIPPED[torch.cuda.is_available()]
    for item in items:
        if item.get_closest_marker(mark) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed(request):
    """Seed each test by its name. FASTSEG_TEST_SEED sets another seed; "random" draws one."""
    requested = os.environ.get("FASTSEG_TEST_SEED", str(zlib.crc32(request.node.nodeid.encode()) % 2**31))
    value = torch.seed() % 2**31 if requested == "random" else int(requested)
    torch.manual_seed(value)
    print(f"seed: FASTSEG_TEST_SEED={value}")
    return value


@pytest.fixture(autouse=True)
def one_thread():
    """One thread per process, since the suite runs one process per core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache_of_data_checks(monkeypatch, tmp_path_factory):
    """Checks of data sets are remembered in a folder of the test run."""
    monkeypatch.setattr(data_check, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "data_checks")


@pytest.fixture
def no_cpu_kernels(monkeypatch):
    """As on a machine without a C++ compiler."""
    monkeypatch.setattr(fastseg.dispatch, "without_cpu_kernels", lambda: "no C++ compiler was found")


@pytest.fixture
def triton_backend():
    with fastseg.backend("triton"):
        yield


@pytest.fixture
def poison():
    """New tensors are filled with NaN, and non-deterministic operators raise."""
    with criterion.poisoned():
        yield


@pytest.fixture
def assert_right():
    """assert_right(ours, theirs, inputs): the error against float64 is at most torch's own plus a tolerance."""

    def check(ours, theirs, inputs, names=None):
        for c in criterion.compare_to_torch(ours, theirs, inputs, names):
            assert c.passed, f"{c.tensor}: error {c.error:.3e}, torch's {c.torch_error:.3e}, allowed {c.allowed:.3e}"

    return check


@pytest.fixture(autouse=True)
def exact():
    """Convolutions multiply float32 in full precision; on a GPU torch's default is TF32."""
    with precision.convolving("ieee"):
        yield


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """Facts about the machine code of every kernel."""
    base = tmp_path_factory.getbasetemp()
    return machine_code.table(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
