"""torch.compile(backend="fastseg"): whole networks, its choices on a GPU, and its interface."""

import contextlib
import copy
import logging
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.compiled import (
    POOLED,
    THERE_AND_BACK,
    Compiled,
    assert_equal_to_torch,
    labels,
    new_state,
    normed,
    pooled,
    then,
    there_and_back,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg import dispatch, torch_internals
from fastseg.compiler.passes import rewrite
from fastseg.kernels.cpu import build, launch
from fastseg.ops.convolution import conv_transpose_operators
from fastseg.torch_internals import FakeTensor, tree_map_only
from fastseg.verification.criterion import relative_error


@pytest.fixture
def state(device):
    return new_state(device)


# --- networks --------------------------------------------------------------------------------------------------------


class SegNet(nn.Module):
    """A SegNet of modules with one shared pool and unpool, and a loss of resized logits."""

    def __init__(self):
        super().__init__()
        block = lambda c, k: nn.Sequential(nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU(True))  # noqa: E731
        self.down = nn.ModuleList([block(3, 4), block(4, 4)])
        self.up = nn.ModuleList([block(4, 4), block(4, 4)])
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.head = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.loss = nn.CrossEntropyLoss(ignore_index=3)

    def forward(self, x, target):
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x.size())
            x, indices = self.pool(x)
            kept.append(indices)
        for block in self.up:
            x = block(x)
            indices, size = kept.pop(), kept.pop()
            x = self.unpool(x, indices, output_size=size)
        return self.loss(F.interpolate(self.head(x), size=target.shape[-2:], mode="bilinear"), target)


TRAINING = {
    "batch_norm_relu_max_pool2d": 2, "batch_norm_relu_max_unpool2d": 2, "batch_norm_relu": 1, "input_bias": 5,
    "conv_transpose2d": 1, "upsample_cross_entropy": 1,
}  # fmt: skip
EVALUATION = {
    "batch_norm_relu_max_pool2d": 2, "batch_norm_relu_max_unpool2d": 2, "input_bias": 4,
    "conv_transpose2d_batch_norm_relu": 1, "upsample_cross_entropy": 1,
}  # fmt: skip


def net_and_batch(device, size=(9, 8), out=(8, 11)):
    return SegNet().to(device), (torch.randn(1, 3, *size, device=device), labels((1, *out), device))


def step(net, function, batch):
    """The loss, the gradients and the buffers after one step."""
    net.zero_grad()
    loss = function(*batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}, dict(net.named_buffers())


def assert_same(got, want, tolerance=1e-4):
    """Errors of gradients are relative to the largest: some gradients are zero up to rounding."""
    assert relative_error(got[0], want[0]) < tolerance
    scale = max(grad.abs().max().item() for grad in want[1].values())
    for name, grad in want[1].items():
        assert got[1][name].dtype == grad.dtype
        assert (got[1][name] - grad).abs().max().item() < tolerance * scale, name
    for name, buffer in want[2].items():
        assert relative_error(got[2][name], buffer) < tolerance, name


def test_a_network_trains_evaluates_and_trains_again(device, triton_backend):
    net, batch = net_and_batch(device)
    plain = copy.deepcopy(net)
    ours = Compiled(net, "aot_eager")
    for training in (True, False):
        net.train(training), plain.train(training)
        assert_same(step(net, ours, batch), step(plain, plain, batch))
    assert relative_error(ours.function.train()(*batch), plain.train()(*batch)) < 1e-4
    assert [dict(report.rewritten) for report in ours.reports] == [TRAINING, EVALUATION]
    assert "max_pool2d" not in ours.targets() and list(net.state_dict()) == list(plain.state_dict())


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_a_network_on_the_cpu_kernels(backend):
    """Transposed convolutions have no CPU kernels and stay torch's."""
    ran = []
    net, batch = net_and_batch("cpu")
    plain = copy.deepcopy(net)
    with fastseg.backend(backend), launch.recording() as calls:
        ours = Compiled(net, "aot_eager")
        for training in (True, False):
            net.train(training), plain.train(training)
            assert_same(step(net, ours, batch), step(plain, plain, batch))
            ran.append({call.args[1] for call in calls})
            calls.clear()
    expected = [{k: v for k, v in found.items() if "conv_transpose" not in k} for found in (TRAINING, EVALUATION)]
    assert [dict(report.rewritten) for report in ours.reports] == expected
    for name in ("batch_norm_relu_max_pool2d_fwd", "batch_norm_relu_max_unpool2d_fwd"):
        assert name in ran[0] and name in ran[1]
    assert ("upsample_cross_entropy_fwd" in ran[0]) == (backend == "cpu"), "few logits are left to torch"
    assert "batch_norm_relu_bwd" in ran[0]


def test_a_cpu_graph_without_a_compiler_is_left_to_torch(no_cpu_kernels):
    net, batch = net_and_batch("cpu")
    ours = Compiled(net, "aot_eager")
    assert_same(step(net, ours, batch), step(net, net, batch), 1.0)
    assert ours.rewritten == {}


def test_a_network_through_inductor(device, triton_backend):
    function, state = then(train, there_and_back), None
    shapes = (1, 1, 4, 4), (1, 1, 3, 3), (1,), (1,), (1,), (1,), (1,)
    state = [torch.rand(shape, device=device) + 0.5 for shape in shapes]
    reports = []
    torch.compiler.reset()
    ours = torch.compile(function, backend=fastseg.compile_backend, options={"report": reports.append})
    assert_equal_to_torch(ours, function, state)
    assert reports[0].rewritten == THERE_AND_BACK


def test_dynamic_shapes(state, triton_backend):
    function = then(train, there_and_back)
    ours = Compiled(function, "aot_eager")
    for size in ((6, 8), (7, 9), (10, 5)):
        assert_equal_to_torch(ours, function, [torch.randn(2, 3, *size, device=state[0].device), *state[1:]])
        assert ours.rewritten == THERE_AND_BACK
    assert any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in ours.graphs[-1].graph.nodes)


def test_size_queries_after_a_batch_norm_do_not_prevent_a_rewrite(state, triton_backend):
    def function(x, weight, bias, gamma, beta, mean, var):
        y, indices = F.max_pool2d(torch.conv2d(x, weight, None, padding=1), 2, return_indices=True)
        z, mean, var = normed(True, lambda y, w, b: y * 2)(y, weight, bias, gamma, beta, mean, var)
        return F.max_unpool2d(F.relu(z), indices, 2, output_size=x.shape[-2:]), mean, var

    ours = Compiled(function, "aot_eager")
    for size in ((6, 8), (7, 9)):
        assert_equal_to_torch(ours, function, [torch.randn(2, 3, *size, device=state[0].device), *state[1:]])
        assert ours.rewritten == {"batch_norm_relu_max_unpool2d": 1, "max_pool2d_with_offsets": 1}
    assert len(ours.graphs) == 2


def test_indices_stay_int64_where_the_sizes_are_not_proven_equal(device, triton_backend):
    """Without an output_size an odd image comes back smaller, so nothing is proven for an unknown size."""

    def function(x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2)

    ours = Compiled(function, dynamic=True)
    for size in ((6, 8), (8, 10)):
        x = torch.randn(1, 2, *size, device=device)
        assert torch.equal(ours(x), function(x))
    assert ours.rewritten == {"max_pool2d": 1, "max_unpool2d": 1}


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside, state, device, triton_backend):
    autocast, chain = torch.autocast(device, torch.bfloat16), then(train, lambda y: pooled(y)[:1])

    def function(*state):
        with autocast if inside else contextlib.nullcontext():
            return chain(*state)

    ours = Compiled(function, "aot_eager")
    x, *rest = state[0].requires_grad_(), *state[1:]
    found = []
    for run in (ours, function):
        with contextlib.nullcontext() if inside else autocast:
            y, mean, var = run(x, *rest)
        found.append([y.detach(), mean, var, *torch.autograd.grad(y.float().square().sum(), x)])
    assert ours.rewritten == POOLED
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).float().norm() < 0.05 * want.float().norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device, triton_backend):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).to(device)
    plain, x = copy.deepcopy(block), torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
    ours = Compiled(lambda x: checkpoint(block, x, use_reentrant=use_reentrant), "aot_eager")
    got = torch.autograd.grad(ours(x).square().sum(), [x, block[0].weight, block[1].weight])
    want = torch.autograd.grad(plain(x).square().sum(), [x, plain[0].weight, plain[1].weight])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, want, strict=True))
    assert ours.rewritten == {"batch_norm_relu_max_pool2d": 1, "input_bias": 1}


def test_a_swapped_model(device, triton_backend):
    """fastseg's modules stay in the graph, and torch's layers around them are fused."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).to(device)
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6, device=device)
    fastseg.swap(model[-1])
    ours = Compiled(model, "aot_eager")
    got, want = ours(x), plain(x)
    assert relative_error(got, want) < 1e-5 and ours.rewritten == {"batch_norm_relu": 1, "input_bias": 1}
    grads = (torch.autograd.grad(y.square().sum(), net[0].weight)[0] for y, net in ((got, model), (want, plain)))
    assert relative_error(*grads) < 1e-4


def test_two_networks_with_one_batch_norm(device, triton_backend):
    """A batch norm that is called twice updates its statistics twice, in the order of the calls."""
    norm = nn.BatchNorm2d(2).to(device)
    plain = copy.deepcopy(norm)
    x = torch.randn(2, 2, 4, 4, device=device)

    def function(norm):
        def run(x):
            a, b = norm(x), norm(x * 3 + 1)
            return F.relu(b) + F.relu(a)

        return run

    ours = Compiled(function(norm))
    assert relative_error(ours(x), function(plain)(x)) < 1e-5
    assert ours.rewritten == {"batch_norm_relu": 2}
    assert relative_error(norm.running_mean, plain.running_mean) < 1e-6
    assert relative_error(norm.running_var, plain.running_var) < 1e-6


# --- choices on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faster", ["triton", "torch"])
def test_auto_puts_in_a_transposed_convolution_only_where_it_was_measured_to_be_faster(faster):
    """The graph is traced on the CPU, and its fake tensors are then moved to a GPU."""
    net, batch = net_and_batch("cpu")
    with fastseg.backend("torch"):
        ours = Compiled(net)
        ours(*batch)
    assert ours.rewritten == {}
    (graph,) = ours.graphs
    for node in graph.graph.nodes:
        node.meta = tree_map_only(FakeTensor, on_a_gpu, node.meta)
    preferred = mock.patch.object(conv_transpose_operators, "preferred", return_value=(faster, "measured"))
    with fastseg.backend("auto"), preferred, mock.patch.object(dispatch, "TRITON_INSTALLED", True):
        report = rewrite(graph)
    if faster == "torch":
        assert [left[1:] for left in report.left] == [("conv_transpose2d", "measured")]
        report.rewritten["conv_transpose2d"] += 1
    assert report.rewritten == TRAINING


def on_a_gpu(tensor):
    with tensor.fake_mode:
        return torch.empty_like(tensor, device="cuda").requires_grad_(tensor.requires_grad)


# --- the interface ---------------------------------------------------------------------------------------------------


def test_the_entry_point_is_the_backend():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    ((name, value),) = re.findall(r'"torch_dynamo_backends": \["(.*) = (.*)"\]', setup)
    point = EntryPoint(name, value, "torch_dynamo_backends")
    assert point.load() is fastseg.compile_backend
    entry_points, loaded = torch_internals.backend_registry()
    with mock.patch.dict(entry_points, {name: point}), mock.patch.dict(loaded):
        assert torch_internals.lookup_backend("fastseg") is fastseg.compile_backend


def test_the_report_is_logged(device, caplog, triton_backend):
    with caplog.at_level(logging.INFO, "fastseg"):
        ours = Compiled(lambda x: F.max_pool2d(x, 2, return_indices=True))
        ours(torch.randn(1, 2, 4, 4, device=device))
    (line,) = [record.message for record in caplog.records if record.name == "fastseg"]
    assert line == f"compile: {ours.reports[0]}"
    reason = "max_pool2d to max_pool2d_with_offsets: its indices are read by output"
    assert line.endswith(f"max_pool2d 1; not rewritten: {reason}")


def test_mode_and_other_options_go_to_the_inner_backend():
    torch.compiler.reset()
    given = []

    def inner(graph, inputs, **rest):
        given.append(rest)
        return graph

    options = {"inner": inner, "max_autotune": True}
    torch.compile(lambda x: x + 1, backend=fastseg.compile_backend, options=options)(torch.zeros(2))
    fastseg.compile_backend(torch.fx.symbolic_trace(lambda x: x), [], mode="max-autotune", options={"inner": inner})
    assert given == [{"options": {"max_autotune": True}}, {"mode": "max-autotune"}]
    assert options == {"inner": inner, "max_autotune": True}
    with pytest.raises(Exception, match="Unexpected optimization option inter"):
        torch.compile(lambda x: x + 2, backend=fastseg.compile_backend, options={"inter": "eager"})(torch.zeros(2))


def test_a_graph_without_candidates_is_unchanged():
    graph = torch.fx.symbolic_trace(lambda x: torch.sin(x) + 1)
    before = graph.code
    with mock.patch.object(graph, "recompile", side_effect=AssertionError):
        report = rewrite(graph)
    assert str(report) == "rewritten: nothing" and graph.code == before
