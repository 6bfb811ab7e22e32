"""Calls on CPU tensors that skip torch's dispatcher: only where nothing would see the operator there."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import profiler
from torch.fx.experimental.proxy_tensor import make_fx

import fastseg
from fastseg import functional as FS
from fastseg.kernels.cpu import build, launch
from fastseg.ops.batch_norm.functions import FEW_ELEMENTS
from fastseg.ops.pooling.pool import MAX_POOL2D
from fastseg.torch_internals import TorchDispatchMode

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture(autouse=True)
def cpu_backend():
    with fastseg.backend("cpu"):
        yield


@pytest.fixture
def dispatched(monkeypatch):
    """The operators that reach torch's dispatcher."""
    calls, op = [], MAX_POOL2D.op
    monkeypatch.setattr(MAX_POOL2D, "op", lambda *args: calls.append("max_pool2d") or op(*args))
    return calls


def pool(x):
    return FS.max_pool2d(x, 2)


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


def test_a_plain_call_skips_the_dispatcher(dispatched):
    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    y = pool(x)
    y.sum().backward()
    assert dispatched == [] and torch.equal(y, torch.nn.functional.max_pool2d(x, 2)) and x.grad.sum() == y.numel()
    with torch.inference_mode():
        assert torch.equal(pool(x.detach()), y)
    assert dispatched == []


def test_a_subclass_and_a_mode_see_the_operator(dispatched):
    x = torch.randn(1, 2, 6, 8)
    pool(x.as_subclass(Named))
    assert dispatched == ["max_pool2d"]
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        pool(x)
    assert "fastseg.max_pool2d.default" in seen


def test_the_profiler_sees_the_operator():
    x = torch.randn(1, 2, 6, 8)
    with profiler.profile() as recorded:
        pool(x)
    assert "fastseg::max_pool2d" in {event.name for event in recorded.function_events}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_hold_the_operator():
    x, other = torch.randn(2, 1, 2, 6, 8).unbind()
    graph = make_fx(pool)(x)
    assert "fastseg.max_pool2d" in graph.code and torch.equal(graph(other), pool(other))
    traced = torch.jit.trace(pool, (x,), check_trace=False)
    assert torch.equal(traced(other), pool(other))


def test_transforms_and_forward_mode_reach_the_operator(dispatched):
    x = torch.randn(3, 1, 2, 6, 8)
    assert torch.equal(torch.func.vmap(pool)(x), torch.stack([pool(image) for image in x]))
    gradient = torch.func.grad(lambda x: pool(x).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    pool(leaf).square().sum().backward()
    assert torch.equal(gradient, leaf.grad) and dispatched
    with pytest.raises(RuntimeError, match="forward"), torch.autograd.forward_ad.dual_level():
        pool(torch.autograd.forward_ad.make_dual(x[0], x[1]))


@pytest.mark.parametrize("pool", [False, True])
def test_a_swapped_sequence_runs_small_maps_layer_by_layer(pool):
    """The convolution adds its bias then, as without fastseg, and results are torch's to the bit."""
    torch.set_num_threads(1)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *[nn.MaxPool2d(2)] * pool]
    plain = nn.Sequential(*layers)
    swapped = copy.deepcopy(plain)
    fastseg.swap(swapped)
    with fastseg.backend("auto"):
        small, large = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 256, 256)
        assert torch.equal(swapped(small), plain(small))
        with launch.recording() as calls:
            swapped(small)
            assert calls == []
            torch.testing.assert_close(swapped(large), plain(large), rtol=1e-4, atol=1e-5)
            assert calls


@pytest.mark.parametrize("training", FEW_ELEMENTS)
@pytest.mark.parametrize("layout", FEW_ELEMENTS[True], ids=str)
def test_auto_takes_the_kernels_of_batch_norm_from_a_size_on(layout, training):
    vectors = torch.zeros(2), torch.ones(2)
    torch.set_num_threads(1)
    with fastseg.backend("auto"):
        for size, backend in ((8, "torch"), (FEW_ELEMENTS[training][layout] // 2, "cpu")):
            x = torch.empty(1, 2, 1, size).contiguous(memory_format=layout)
            assert fastseg.explain(FS.batch_norm_relu, x, *vectors, training=training)[0].backend == backend
