"""fastseg.swap_functions: functional calls of eager code run on the kernels."""

import contextlib
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg.verification.criterion import relative_error

ALL = {"max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy"}


class FunctionalSegNet(nn.Module):
    """Only functional calls: pools with indices, and unpools back to the sizes of the pools' inputs."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.up = nn.Parameter(torch.randn(4, 5, 2, 2) / 4)

    def forward(self, x, target):
        kept = []
        for conv in self.down:
            x = F.relu(conv(x))
            kept.append(x.size())
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            kept.append(indices)
        while kept:
            indices, size = kept.pop(), kept.pop()
            x = F.max_unpool2d(x, indices, 2, output_size=size)
        return F.cross_entropy(torch.conv_transpose2d(x, self.up, stride=2), target, ignore_index=3)


@pytest.fixture
def net(device):
    return FunctionalSegNet().to(device)


@pytest.fixture
def batch(device):
    return torch.randn(2, 3, 7, 9, device=device), torch.randint(0, 5, (2, 14, 18), device=device)


def step(function, net, batch):
    """The loss and the gradients of one step."""
    net.zero_grad()
    loss = function(*batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def operators(function, *args):
    return {choice.operator for choice in fastseg.explain(function, *args)}


# --- what is replaced ------------------------------------------------------------------------------------------------


def test_a_network_of_functional_calls_runs_on_the_kernels(net, batch, triton_backend):
    want = step(net, net, batch)
    with fastseg.swap_functions() as swapped, mock.patch("torch.max_pool2d", side_effect=AssertionError):
        got = step(net, net, batch)
    assert swapped.calls == {"max_pool2d": 2, "max_unpool2d": 2, "conv_transpose2d": 1, "cross_entropy": 1}
    assert not swapped.left
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert operators(net, *batch) == set()
    assert operators(fastseg.swap_functions()(net), *batch) == ALL


def test_calls_made_by_modules_are_replaced_too(batch, device, triton_backend):
    x = batch[0]
    pool, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    conv, loss = nn.ConvTranspose2d(3, 5, 2, 2).to(device), nn.CrossEntropyLoss()

    def run():
        y, indices = pool(x)
        return loss(conv(unpool(input=y, indices=indices, output_size=x.size())), batch[1])

    want = run()
    with fastseg.swap_functions() as swapped:
        got = run()
    assert swapped.calls == dict.fromkeys(ALL, 1)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("pool, with_indices", [
    (lambda x: F.max_pool2d(x, 3, 2, padding=1, return_indices=True), True),
    (lambda x: F.max_pool2d(input=x, kernel_size=(2, 3), stride=[2], ceil_mode=True), False),
    (lambda x: F.max_pool2d_with_indices(x, 2), True),
    (lambda x: F.max_pool2d(x, 2, None, 0, 2, False, True), True),
    (lambda x: torch.max_pool2d(x, 2, stride=()), False),
])  # fmt: skip
def test_every_way_to_call_a_pool(pool, with_indices, batch, triton_backend):
    want = pool(batch[0])
    with fastseg.swap_functions() as swapped:
        got = pool(batch[0])
    assert swapped.calls == {"max_pool2d": 1}
    for a, b in zip(got if with_indices else [got], want if with_indices else [want], strict=True):
        assert torch.equal(a, b)


def test_on_a_cpu_the_results_are_bitwise_those_of_torch(net, batch):
    net, batch = net.cpu(), [t.cpu() for t in batch]
    with fastseg.backend("auto"):
        want = step(net, net, batch)
        got = step(fastseg.swap_functions()(net), net, batch)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_exception_of_a_hook_is_not_swallowed():
    """Activation checkpointing ends a recomputation by an exception, which a shortcut of the pool once caught."""
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    for pool in (fastseg.functional.max_pool2d, fastseg.swap_functions()(F.max_pool2d)):
        checkpoint(lambda x, pool=pool: pool(x.sin(), 2), x, use_reentrant=False).sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("setting", ["auto", "triton", "torch"])
def test_a_loss_has_torchs_dtype(dtype, autocast, setting, device):
    logits = torch.randn(2, 5, 4, 3, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, 5, (2, 4, 3), device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast), fastseg.backend(setting):
        want = F.cross_entropy(logits, target)
        with fastseg.swap_functions() as swapped:
            got = F.cross_entropy(logits, target)
    assert got.dtype == want.dtype
    if device == "cpu" and setting == "torch":
        assert torch.equal(got, want)
    else:
        assert swapped.calls == {"cross_entropy": 1}
        assert relative_error(got, want) < max(4 * torch.finfo(want.dtype).eps, 1e-6)


def test_ops_selects_the_functions(net, batch, triton_backend):
    swapped = fastseg.swap_functions(ops=["max_pool2d", "cross_entropy"])
    assert operators(swapped(net), *batch) == {"max_pool2d", "cross_entropy"}
    with pytest.raises(ValueError, match=r"ops must be names out of 'max_pool2d', .* but has 'relu'"):
        fastseg.swap_functions(ops=["relu", "max_pool2d"])
    with pytest.raises(TypeError, match="the string 'max_pool2d'"):
        fastseg.swap_functions(ops="max_pool2d")


def test_errors_are_torchs(batch):
    with fastseg.swap_functions():
        with pytest.raises(RuntimeError, match="padding must be at most half"):
            F.max_pool2d(batch[0], 2, padding=2)
        with pytest.raises(ValueError, match="reduction must be one of"):
            F.cross_entropy(batch[0], batch[1][:, :7, :9], reduction="average")
    assert F.max_pool2d(batch[0], 2).shape == (2, 3, 3, 4)  # the mode was left with the exception


# --- what is not replaced --------------------------------------------------------------------------------------------


class Logged(torch.Tensor):
    """A subclass that records the functions called on it."""

    called: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_calls_with_tensor_subclasses_are_not_replaced(triton_backend):
    x = torch.randn(1, 2, 4, 4).as_subclass(Logged)
    Logged.called.clear()
    with fastseg.swap_functions() as swapped:
        y = F.max_pool2d(x, 2)
    assert type(y) is Logged and F.max_pool2d in Logged.called
    assert not swapped.calls and swapped.left == {("max_pool2d", "a tensor of type Logged"): 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_calls_inside_transforms_and_traces_are_not_replaced(triton_backend):
    x = torch.randn(3, 2, 4, 4)
    with fastseg.swap_functions() as swapped:
        mapped = torch.func.vmap(lambda x: F.cross_entropy(x, torch.zeros(4, 4, dtype=torch.long)))(x.movedim(1, 2))
        _, tangent = torch.func.jvp(lambda x: F.max_pool2d(x, 2), (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            assert torch.autograd.forward_ad.unpack_dual(F.max_pool2d(dual, 2)).tangent is not None
        traced = torch.jit.trace(lambda x: F.max_pool2d(x, 2), x, check_trace=False)
    assert mapped.shape == (3,) and torch.equal(tangent, F.max_pool2d(x, 2))
    assert "aten::max_pool2d" in str(traced.graph)
    assert not swapped.calls and {reason.split()[0] for _, reason in swapped.left} == {"inside"}


def test_other_functions_and_inputs_that_are_not_tensors_are_not_replaced(triton_backend):
    with fastseg.swap_functions() as swapped:
        F.avg_pool2d(torch.zeros(1, 1, 2, 2), 2)
        F.max_pool3d(torch.zeros(1, 1, 2, 2, 2), 2)
        with pytest.raises(TypeError):
            F.max_pool2d([1.0], 2)
    assert not swapped.calls


# --- entering and leaving --------------------------------------------------------------------------------------------


def test_a_call_inside_nested_modes_is_replaced_once(net, batch):
    inner, outer = fastseg.swap_functions(), fastseg.swap_functions()
    with outer, inner, inner:
        assert operators(net, *batch) == ALL
    assert sum(inner.calls.values()) == 6 and not outer.calls
    with outer, fastseg.swap_functions(ops=["max_pool2d"]):
        net(*batch)
    assert outer.calls == {"max_unpool2d": 2, "conv_transpose2d": 1, "cross_entropy": 1}
    assert operators(net, *batch) == set()


def test_the_mode_is_active_in_the_thread_that_entered_it(net, batch):
    found = []
    with fastseg.swap_functions() as swapped:
        thread = threading.Thread(target=lambda: found.append(operators(net, *batch)))
        thread.start()
        thread.join()
    assert found == [set()] and not swapped.calls


def test_a_decorated_function_keeps_its_name(net, batch):
    @fastseg.swap_functions()
    def run(*args):
        """A docstring."""
        return net(*args)

    assert (run.__name__, run.__doc__) == ("run", "A docstring.")
    assert operators(run, *batch) == operators(run, *batch) == ALL
    assert not vars(fastseg.swap_functions()(net)).keys() & vars(net).keys()


def test_what_would_run_after_the_mode_is_left_cannot_be_decorated(batch):
    def generator():
        yield F.max_pool2d(batch[0], 2)

    async def coroutine():
        return F.max_pool2d(batch[0], 2)

    for function in (generator, coroutine, nn.MaxPool2d):
        with pytest.raises(TypeError, match=f"but {function.__name__} is a class, a generator or a coroutine"):
            fastseg.swap_functions()(function)


# --- compatibility ---------------------------------------------------------------------------------------------------


CHECKPOINTS = {
    "decorated, reentrant": lambda net, batch, swapped: checkpoint(swapped(net), *batch, use_reentrant=True),
    "decorated": lambda net, batch, swapped: checkpoint(swapped(net), *batch, use_reentrant=False),
    "context_fn": lambda net, batch, swapped: checkpoint(
        net, *batch, use_reentrant=False, context_fn=lambda: (swapped, swapped)
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_activation_checkpointing(kind, net, batch, triton_backend):
    batch = [batch[0].requires_grad_(), batch[1]]  # a reentrant checkpoint needs a gradient
    want = [*step(net, net, batch), batch[0].grad.clone()]
    batch[0].grad = None
    swapped = fastseg.swap_functions()
    found = []
    loss = CHECKPOINTS[kind](net, batch, swapped)
    forward = swapped.calls.copy()
    net.zero_grad()

    def in_another_thread():  # without the mode, and with a backend of its own
        with fastseg.backend("triton"):
            found.append(loss.backward())

    backward = threading.Thread(target=in_another_thread)
    backward.start()
    backward.join()
    assert found == [None]
    assert forward == {"max_pool2d": 2, "max_unpool2d": 2, "conv_transpose2d": 1, "cross_entropy": 1}
    assert swapped.calls["max_pool2d"] == 4 and swapped.calls["max_unpool2d"] == 4  # each was called again
    got = [loss.detach(), *(p.grad for p in net.parameters()), batch[0].grad]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_a_recomputation_without_the_mode_is_correct_or_raises(net, batch, triton_backend):
    """The two uses that docs/compile.md advises against."""
    batch = [batch[0].requires_grad_(), batch[1]]
    want = step(net, net, batch)
    net.zero_grad()
    with fastseg.swap_functions():
        loss = checkpoint(net, *batch, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    net.zero_grad()
    with fastseg.swap_functions() as swapped:
        loss = checkpoint(net, *batch, use_reentrant=True)
    calls = swapped.calls.copy()
    loss.backward()
    assert swapped.calls == calls  # the recomputation called torch's functions
    got = [loss.detach(), *(p.grad for p in net.parameters())]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_autocast(net, batch, device, triton_backend):
    with torch.autocast(device, torch.bfloat16):
        want = step(net, net, batch)
        got = step(fastseg.swap_functions()(net), net, batch)
    assert all(a.dtype == b.dtype and relative_error(a, b) < 0.05 for a, b in zip(got, want, strict=True))


@pytest.mark.interpreted
def test_a_second_derivative(triton_backend):
    x = torch.randn(1, 1, 2, 4, dtype=torch.double, requires_grad=True)
    with fastseg.swap_functions():
        assert torch.autograd.gradgradcheck(lambda x: F.max_pool2d(x.square(), 2), x)


def test_an_unpool_whose_input_autocast_casts_on_a_cpu_is_not_replaced(triton_backend):
    y, indices = F.max_pool2d(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16), 2, return_indices=True)
    with torch.autocast("cpu", torch.bfloat16), fastseg.swap_functions() as swapped:
        assert F.max_unpool2d(y, indices, 2).dtype == torch.float32
    assert not swapped.calls


@pytest.mark.parametrize("decorated", [True, False])
def test_torch_compile_traces_through_the_mode(net, batch, decorated, triton_backend):
    graphs = []

    def record(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch.compiler.reset()
    swapped = fastseg.swap_functions()
    compiled = torch.compile(swapped(net) if decorated else net, fullgraph=True, backend=record)
    with contextlib.nullcontext() if decorated else swapped:
        losses = [compiled(*batch) for _ in range(3)]
    assert len(graphs) == 1  # traced calls are not counted, or each would recompile
    assert all(name not in graphs[0] for name in ("max_unpool2d_1", "nn.functional.cross_entropy"))
    assert "autograd_function_apply" in graphs[0]
    assert all(relative_error(loss, net(*batch)) < 1e-5 for loss in losses)
