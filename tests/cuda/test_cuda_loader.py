"""How CUDA C++ kernels are launched through CuPy, with a fake CuPy that runs them on the host."""

import contextlib
import importlib
import re
import sys
import types

import numpy as np
import pytest
import torch
from support import cuda_host

from fastseg.kernels.cuda import launch
from fastseg.kernels.cuda.pooling import pool
from fastseg.kernels.cuda.pooling.tiling import Tiling
from fastseg.kernels.pooling.geometry import PoolGeometry


class OnGpu(torch.Tensor):
    """A CPU tensor whose device is the second GPU."""

    device = property(lambda self: torch.device("cuda:1"))


class Cupy(types.SimpleNamespace):
    """The names of CuPy 13 or 14 that launch.py uses. `events` lists their uses, in order."""

    def __init__(self, version):
        self.events, self.compiled = [], 0
        self.cuda = types.SimpleNamespace(Device=self.entering("device"), Stream=types.SimpleNamespace())
        stream = self.entering("stream")
        if version == 13:
            self.cuda.ExternalStream = lambda address, device: stream(address)
        else:
            self.cuda.Stream.from_external = lambda other: stream(other.__cuda_stream__()[1])

    def entering(self, what):
        @contextlib.contextmanager
        def enter(*arguments):
            self.events.append((what, *arguments))
            yield
            self.events.append((f"end of {what}",))

        return enter

    def RawModule(self, *, code, options, name_expressions):
        assert "#include" not in code and options == launch.OPTIONS
        (instance,) = name_expressions
        file = next(name for name in files() if launch.source(name) == code)
        self.compiled += 1

        def function(grid, block, args):
            assert block == (launch.THREADS,) and all(isinstance(a, np.generic) for a in args)
            self.events.append(("kernel", instance))
            request = launch.Launch(file, instance, grid[0] * block[0], args)
            cuda_host.library().run(request)

        return types.SimpleNamespace(get_function=lambda name: {instance: function}[name])


def files():
    """The .cu files, as launches name them."""
    return [path.relative_to(launch.FOLDER).with_suffix("").as_posix() for path in launch.FOLDER.rglob("*.cu")]


class Stream(types.SimpleNamespace):
    """The part of torch's stream that CuPy uses."""

    def __cuda_stream__(self):
        return 0, self.cuda_stream


@pytest.fixture(params=[13, 14])
def cupy(request, monkeypatch):
    made = Cupy(request.param)
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(cuda_stream=7000 + device.index))
    launch._compiled.cache_clear()
    yield made
    launch._compiled.cache_clear()


@pytest.mark.skipif(cuda_host.COMPILER is None, reason="no C++ compiler (g++, clang++ or $CXX)")
def test_a_launch_runs_on_torchs_stream_and_device_and_is_compiled_once(cupy):
    x = torch.randn(2, 3, 6, 10)
    y, positions = torch.empty(2, 3, 3, 5), torch.empty(2, 3, 3, 5, dtype=torch.int64)
    tiling = Tiling(PoolGeometry([2, 2], [2, 2], [0, 0]), False)
    for _ in range(2):
        pool.max_pool2d_fwd(x.as_subclass(OnGpu), y, positions, *tiling)
    want = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want[0]) and torch.equal(positions, want[1])
    instance = next(event[1] for event in cupy.events if event[0] == "kernel")
    assert instance.startswith("max_pool2d_fwd<float, int64, int, false,") and cupy.compiled == 1
    once = [("device", 1), ("stream", 7001), ("kernel", instance), ("end of stream",), ("end of device",)]
    assert cupy.events == once * 2


def test_the_real_cupy_accepts_torchs_stream():
    cupy = pytest.importorskip("cupy")
    if not hasattr(cupy.cuda.Stream, "from_external"):
        pytest.skip("CuPy 13 takes a stream by its address")
    assert callable(torch.cuda.Stream.__cuda_stream__)
    assert launch._on(cupy, Stream(cuda_stream=77), 0).ptr == 77


def test_arguments_keep_their_types():
    found = []
    with launch.recording(found.append):
        launch.launch("pool", "k", (torch.float16, None, True, 3, "int"), 300, 1, 2.0, np.float64(3), np.int64(4), None)
        launch.launch("pool", "k", (), 0, 1)
    (request,) = found
    assert request.instance == "k<half, nothing, true, 3, int>" and request.blocks == 2
    assert [type(a) for a in request.args] == [np.int32, np.float32, np.float64, np.int64, type(None)]


def test_without_cupy_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    launch._compiled.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    x = torch.zeros(1, 1, 2, 2).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match=r"fastseg-kernels\[cuda12\]"):
        pool.max_pool2d_fwd(x, torch.zeros(1, 1, 1, 1), None, *Tiling(PoolGeometry([2, 2], [2, 2], [0, 0]), False))


def test_a_cpu_tensor_raises():
    with pytest.raises(RuntimeError, match="not on device type 'cpu'"):
        pool.max_pool2d_fwd(
            torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1), None, *Tiling(PoolGeometry([2, 2], [2, 2], [0, 0]), False)
        )


@pytest.mark.parametrize(
    "offset, length, width", [(0, 64, 4), (1, 64, 1), (2, 64, 2), (4, 64, 4), (0, 6, 2), (0, 7, 1), (0, 0, 4)]
)
def test_groups_divide_the_length_and_are_aligned(offset, length, width):
    aligned = torch.zeros(128)
    assert aligned.data_ptr() % 16 == 0
    assert launch.vector_width(length, aligned, aligned[offset:]) == width


def test_large_tensors_need_64_bit_offsets():
    small, large = (torch.empty(size, device="meta") for size in (2**30, 2**31))
    assert launch.index_type(small) == "int" and launch.index_type(small, large) == "int64"


def test_launchers_have_the_names_and_parameters_of_tritons():
    import inspect

    for file in sorted(launch.FOLDER.rglob("*/*.py")):
        if file.stem in ("__init__", "tiling"):
            continue
        text, module = file.read_text(), f"{file.parent.name}.{file.stem}"
        ours = importlib.import_module(f"fastseg.kernels.cuda.{module}")
        theirs = importlib.import_module(f"fastseg.kernels.{module}")
        for name in re.findall(r"^def ([a-z]\w+_(?:fwd|bwd|sums|stats))\(", text, re.M):
            assert list(inspect.signature(getattr(ours, name)).parameters) == list(
                inspect.signature(getattr(theirs, name)).parameters
            )
