"""torch.compile(model, backend="fastseg"): what Dynamo's graphs become, and that nothing else changes."""

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
from torch import nn
from torch._dynamo.backends import registry
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg import dispatch
from fastseg.ops import conv_transpose_operators
from fastseg.swapping.rewrites import rewrite
from fastseg.verify import compare, relative_error


class Compiled:
    """A function compiled by the backend: its reports, and the graphs that the inner backend got."""

    def __init__(self, function, inner="eager", **options):
        torch._dynamo.reset()
        self.graphs, self.reports = [], []

        def record(graph, inputs):
            self.graphs.append(graph)
            return torch._dynamo.lookup_backend(inner)(graph, inputs)

        self.function = torch.compile(
            function, backend=fastseg.compile_backend, options={"inner": record, "report": self.reports.append},
            **options,
        )  # fmt: skip

    def __call__(self, *args):
        return self.function(*args)

    @property
    def rewritten(self):
        return dict(self.reports[-1].rewritten)

    @property
    def reasons(self):
        return [left.reason for left in self.reports[-1].left]

    def targets(self):
        """What the last graph calls, by name."""
        return [getattr(node.target, "__name__", node.target) for node in self.graphs[-1].graph.nodes]


@pytest.fixture
def state(device):
    """x, weight and bias of a convolution, weight and bias of a batch norm, its running statistics."""
    shapes = (2, 3, 6, 8), (4, 3, 3, 3), (4,), (4,), (4,), (4,)
    *tensors, mean = (torch.randn(shape, device=device) for shape in shapes)
    return [*tensors, mean, torch.rand(4, device=device) + 0.5]


def assert_equal_to_torch(ours, theirs, inputs, poison=False):
    """By the criterion of verify, with room for chains in which a batch norm takes out what came before it."""
    for c in compare(ours, theirs, inputs, poison=poison):
        assert c.error <= max(10 * c.allowed, 1e-4 if c.allowed else 0), c


def labels(shape, device):
    return torch.randint(0, 4, shape, device=device)


# --- chains that are proven ------------------------------------------------------------------------------------------


def conv(x, weight, bias, *norm):
    return torch.conv2d(x, weight, bias, padding=1)


def normed(training, between=conv):
    """A function of `state` up to the batch norm, and its running statistics."""

    def run(x, weight, bias, gamma, beta, mean, var):
        mean, var = mean.detach().clone(), var.detach().clone()
        y = F.batch_norm(between(x, weight, bias), mean, var, gamma, beta, training, 0.1, 1e-3)
        return y, mean, var

    return run


def then(head, tail):
    def run(*state):
        y, mean, var = head(*state)
        return *tail(y), mean, var

    return run


def pooled(y):
    y, indices = F.max_pool2d(F.relu(y, inplace=True), 2, return_indices=True)
    return y, indices


def there_and_back(y):
    size = y.shape
    y, indices = F.max_pool2d(y.relu(), 2, return_indices=True)
    return (F.max_unpool2d(torch.sin(y), indices, 2, output_size=size),)


def back(x, weight, bias, gamma, beta, mean, var):
    """An encoder that keeps indices, a decoder whose batch norm stands before the unpooling."""
    y, indices = F.max_pool2d(torch.conv2d(x, weight, None, padding=1), 2, return_indices=True)
    z, mean, var = normed(True, lambda y, w, b: y * 2)(y, weight, bias, gamma, beta, mean, var)
    return F.max_unpool2d(torch.relu_(z), indices, (2, 2), stride=2, output_size=(2, 4, 6, 8)), mean, var


def deconv(x, weight, bias, *norm):
    return F.conv_transpose2d(x, weight.transpose(0, 1), bias, stride=2, output_padding=1)


def called_conv(x, weight, bias, *norm):
    return torch.conv2d(input=x, weight=weight, bias=bias, stride=(1, 1), padding="same")


def relu(y):
    return (F.relu(y),)


train, evaluate = normed(True), normed(False)
PROVEN = {
    "relu": (then(train, relu), {"batch_norm_relu": 1, "input_bias": 1}),
    "relu in place": (then(train, lambda y: (y.relu_(),)), {"batch_norm_relu": 1, "input_bias": 1}),
    "called by name": (then(normed(True, called_conv), relu), {"batch_norm_relu": 1, "input_bias": 1}),
    "no convolution": (then(normed(True, lambda x, w, b: x.sum(1, True) * b.view(-1, 1, 1)), relu),
                       {"batch_norm_relu": 1}),
    "transposed": (then(normed(True, deconv), relu), {"batch_norm_relu": 1, "input_bias": 1, "conv_transpose2d": 1}),
    "transposed, evaluation": (then(normed(False, deconv), relu), {"conv_transpose2d_batch_norm_relu": 1}),
    "pool": (then(train, lambda y: (F.max_pool2d(F.relu(y), (2, 3), ceil_mode=True),)),
             {"batch_norm_relu_max_pool2d": 1, "input_bias": 1}),
    "pool, indices": (then(train, pooled), {"batch_norm_relu_max_pool2d": 1, "input_bias": 1}),
    "pool, indices, evaluation": (then(evaluate, pooled), {"batch_norm_relu_max_pool2d": 1, "input_bias": 1}),
    "pool, overlapping": (then(train, lambda y: (F.max_pool2d(F.relu(y), 3, 2, 1),)),
                          {"batch_norm_relu": 1, "max_pool2d": 1, "input_bias": 1}),
    "pool and unpool": (then(train, there_and_back),
                        {"batch_norm_relu_max_pool2d": 1, "max_unpool2d_with_offsets": 1, "input_bias": 1}),
    "unpool": (back, {"batch_norm_relu_max_unpool2d": 1, "max_pool2d_with_offsets": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVEN)
def test_a_chain_is_fused(name, state, triton_backend):
    function, expected = PROVEN[name]
    ours = Compiled(function)
    assert_equal_to_torch(ours, function, state, poison="unpool" not in name)  # Dynamo refuses those when poisoned
    assert ours.rewritten == expected
    assert not {"batch_norm", "relu", "relu_"} & set(ours.targets())


@pytest.mark.parametrize("resize, options", [
    (dict(scale_factor=2), {}),
    (dict(size=(7, 11), mode="bilinear", align_corners=True), dict(ignore_index=2, reduction="sum")),
    (dict(size=(12, 8), mode="bilinear"), dict(label_smoothing=0.1, reduction="none")),
    (dict(size=9, mode="nearest"), dict(weight=True)),
])  # fmt: skip
def test_a_loss_of_resized_logits_is_one(resize, options, device, assert_right, triton_backend):
    options = dict(options)
    x = torch.randn(2, 5, 6, 4, device=device)
    target = torch.randint(0, 5, F.interpolate(x, **resize)[:, 0].shape, device=device)
    weight = torch.rand(5, device=device) if options.pop("weight", False) else None

    def function(x):
        logits = F.interpolate(x, **resize)
        labels = target + 0  # behind the resizing, as targets often are
        return F.cross_entropy(logits, labels, None if weight is None else weight.to(x.dtype), **options)

    ours = Compiled(function)
    assert_right(ours, function, [x])
    assert ours.rewritten == {"upsample_cross_entropy": 1}


def test_single_calls(state, triton_backend):
    target = labels((2, 14, 18), state[0].device)

    def function(x, weight, bias, *norm):
        y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        z = F.max_unpool2d(y * y, indices, 3, 2, 1, output_size=x.shape[-2:])
        y = torch.max_pool2d(z, 1) + F.max_pool2d_with_indices(x, 1)[0]
        return F.cross_entropy(deconv(y, weight, bias), target), indices

    ours = Compiled(function)
    assert_equal_to_torch(ours, function, state)
    pools = {"max_pool2d": 2, "max_pool2d_with_offsets": 1, "max_unpool2d": 1}
    assert ours.rewritten == {**pools, "conv_transpose2d": 1, "cross_entropy": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resized", [False, True])
def test_a_loss_keeps_its_dtype(dtype, resized, device, triton_backend):
    logits, target = torch.randn(1, 3, 4, 4, device=device).to(dtype), labels((1, 4, 4), device) % 3

    def function(x):
        return F.cross_entropy(F.interpolate(x, size=(4, 4)) if resized else x, target) * x[0, 0, 0, 0]

    ours = Compiled(function)
    got, want = ours(logits), function(logits)
    assert got.dtype == want.dtype == dtype and relative_error(got, want) < 4 * torch.finfo(dtype).eps
    assert sum(ours.rewritten.values()) == 1


# --- what proves nothing ---------------------------------------------------------------------------------------------


def reader_between(y):
    return F.relu(y), y.mean()


def reader_of_relu(y):
    y = F.relu(y)
    return F.max_pool2d(y, 2), y.mean()


def written_between(y):
    z = y[:, :2]
    z.mul_(2)
    return (F.relu(y),)


def hooked(y):
    y.register_hook(lambda grad: grad * 2)
    return (F.relu(y),)


def autocast_between(y):
    with torch.autocast(y.device.type, torch.bfloat16):
        y = F.relu(y)
    return (y,)


def no_grad_between(y):
    with torch.no_grad():
        z = F.relu(y)
    return (z,)


def another_activation(y):
    return (F.leaky_relu(y),)


def biased_twice(x, weight, bias, gamma, beta, mean, var):
    y = torch.conv2d(x, weight, bias, padding=1)
    z, mean, var = normed(True, lambda *_: y)(x, weight, bias, gamma, beta, mean, var)
    return F.relu(z), y.square().mean(), mean, var


def written_bias(x, weight, bias, gamma, beta, mean, var):
    original, bias = bias, bias * 1
    y = torch.conv2d(x, weight, bias, padding=1)
    bias.mul_(0)
    z, mean, var = normed(True, lambda *_: y)(x, weight, bias, gamma, beta, mean, var)
    return F.relu(z), original.square(), mean, var


def deconv_read_twice(x, weight, bias, gamma, beta, mean, var):
    y = deconv(x, weight, bias)
    z, mean, var = normed(False, lambda *_: y)(x, weight, bias, gamma, beta, mean, var)
    return F.relu(z), y.mean(), mean, var


UNPROVEN = {  # function, what is rewritten all the same, the reason or ""
    "a reader between": (then(train, reader_between), {}, "not read by the ReLU alone"),
    "a reader of the ReLU": (then(train, reader_of_relu), {"batch_norm_relu": 1, "input_bias": 1, "max_pool2d": 1}, ""),
    "written between": (then(train, written_between), {}, "not read by the ReLU alone"),
    "a hook": (then(train, hooked), {}, ""),
    "autocast between": (then(train, autocast_between), {}, "switched before its ReLU"),
    "no_grad between": (then(train, no_grad_between), {}, "switched before its ReLU"),
    "another activation": (then(train, another_activation), {}, ""),
    "evaluation": (then(evaluate, relu), {}, "one pass of it as well"),
    "a bias with another reader": (biased_twice, {"batch_norm_relu": 1}, ""),
    "a bias that is written": (written_bias, {"batch_norm_relu": 1}, ""),
    "a transposed convolution with another reader": (deconv_read_twice, {"conv_transpose2d": 1}, "as well"),
    "not an image": (then(normed(True, lambda x, w, b: x.mean((2, 3)) @ w[:, :, 0, 0].T), relu), {}, "2-D input"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_not_proven_is_left(name, state, triton_backend):
    function, expected, reason = UNPROVEN[name]
    ours = Compiled(function)
    assert_equal_to_torch(ours, function, state)
    assert ours.rewritten == expected
    assert not reason or any(reason in said for said in ours.reasons), ours.reasons


def to_another_size(x, y, indices):
    return F.max_unpool2d(y, indices, 2, output_size=(7, 9))


def by_other_windows(x, y, indices):
    return F.max_unpool2d(y, indices, 3, stride=(2, 2), output_size=(6, 8))


def read_as_numbers(x, y, indices):
    return F.max_unpool2d(y, indices, 2, output_size=x.shape) + indices.sum()


def unpooled_themselves(x, y, indices):
    return F.max_unpool2d(y, indices, 2) + F.max_unpool2d(indices.double(), indices, 2)


def moved(x, y, indices):
    return F.max_unpool2d(y.flip(0), indices.flip(0), 2)


@pytest.mark.parametrize("reader, options, reason", [
    (to_another_size, {}, "may give another size"),
    (by_other_windows, {}, "has other windows"),
    (read_as_numbers, {}, "its indices are read by sum"),
    (unpooled_themselves, {}, "its indices are read by "),
    (moved, {}, "its indices are read by flip"),
    (lambda x, y, indices: (F.max_unpool2d(y, indices, 2), indices), {}, "its indices are read by output"),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 2, 1), dict(stride=1, dilation=1, ceil_mode=True), None),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 3, 2, 1, x.size()), dict(kernel_size=3, stride=2, padding=1),
     None),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 2, 1, 0, (6, 8)), dict(stride=2, dilation=2), "it is dilated"),
    (lambda x, y, indices: F.max_unpool2d(y, indices, 17, 1), dict(kernel_size=17), "more than 256 elements"),
])  # fmt: skip
def test_indices_are_compact_where_that_is_proven(reader, options, reason, device, triton_backend):
    shape = (1, 1, 17, 17) if options.get("kernel_size") == 17 else (2, 2, 6, 8)
    x = torch.randn(shape, device=device)
    if options.get("dilation") == 2:
        reader = lambda x, y, indices: F.max_unpool2d(y, indices, 4, 2, 0, x.shape)  # noqa: E731

    def function(x):
        y, indices = F.max_pool2d(x, **{"kernel_size": 2, **options}, return_indices=True)
        return reader(x, y, indices)

    ours = Compiled(function)
    got, want = ours(x), function(x)
    for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (got, want)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    names = {"max_pool2d", "max_unpool2d"} if reason else {"max_pool2d_with_offsets", "max_unpool2d_with_offsets"}
    assert ours.rewritten.keys() == names
    assert ours.reasons == [] if reason is None else reason in ours.reasons[0]


def test_indices_that_nobody_reads_are_compact(device, triton_backend):
    ours, x = Compiled(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), torch.randn(1, 2, 4, 4, device=device)
    assert torch.equal(ours(x), F.max_pool2d(x, 2))
    assert ours.rewritten == {"max_pool2d_with_offsets": 1}


def test_unpooling_that_autocast_casts_on_a_cpu(triton_backend):
    def function(x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2), F.max_unpool2d(y.float(), indices, 2)

    ours, x = Compiled(function), torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(ours(x), function(x), strict=True):
            assert got.dtype == want.dtype == torch.float32 and torch.equal(got, want)
    assert ours.rewritten == {"max_pool2d": 1, "max_unpool2d": 1}
    assert "autocast casts its input" in ours.reasons


@pytest.mark.parametrize("loss, reason", [
    (lambda logits, target: F.cross_entropy(logits, target) + logits.mean(), "not read by the loss alone"),
    (lambda logits, target: F.cross_entropy(logits, F.one_hot(target, 4).movedim(-1, 1).to(logits.dtype)),
     "class probabilities"),
    (lambda logits, target: F.cross_entropy(logits, target, size_average=False), "size_average"),
    (lambda logits, target: F.cross_entropy(logits * 2, target), None),
    (lambda logits, target: F.cross_entropy(torch.ones_like(logits), logits), "not read by the loss alone"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_resizing_and_loss_apart(loss, reason, device, triton_backend):
    x, target = torch.randn(1, 4, 3, 5, device=device), labels((1, 6, 10), device)

    def function(x):
        return loss(F.interpolate(x, scale_factor=2, mode="bilinear"), target)

    ours = Compiled(function)
    assert_equal_to_torch(ours, function, [x])
    assert "upsample_cross_entropy" not in ours.rewritten
    assert reason is None or any(reason in said for said in ours.reasons)


def test_resizing_in_another_mode_or_written_to(device, triton_backend):
    x, target = torch.randn(1, 4, 3, 5, device=device), labels((1, 6, 10), device)

    def bicubic(x):
        return F.cross_entropy(F.interpolate(x, scale_factor=2, mode="bicubic"), target)

    def antialias(x):
        return F.cross_entropy(F.interpolate(x, (6, 10), mode="bilinear", antialias=True), target)

    def written(x):
        x = x * 1
        logits = F.interpolate(x, (6, 10))
        x[0] = 0  # of no concern to the logits
        return F.cross_entropy(logits, target) + x.sum()

    for function, reason in ((bicubic, "mode 'bicubic'"), (antialias, "antialias"), (written, "written in place")):
        ours = Compiled(function)
        assert relative_error(ours(x), function(x)) < 1e-6
        assert any(reason in said for said in ours.reasons) and ours.rewritten == {"cross_entropy": 1}


def test_a_pool_that_keeps_nothing_is_the_inner_compilers(device, triton_backend):
    ours = Compiled(lambda x: F.max_pool2d(x, 2))
    x = torch.randn(1, 2, 4, 4, device=device)
    ours(x)
    assert ours.rewritten == {} and "without indices or a gradient" in ours.reasons[0]
    ours(x.requires_grad_()).sum().backward()
    assert ours.rewritten == {"max_pool2d": 1}


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_where_no_kernels_run_the_graph_stays_torchs(setting, state):
    state = [t.cpu() for t in state]
    function = then(train, there_and_back)
    with fastseg.backend(setting):
        ours = Compiled(function)
        for a, b in zip(ours(*state), function(*state), strict=True):
            assert torch.equal(a, b)
    assert ours.rewritten == {}
    assert set(ours.reasons) == ({"a CPU tensor"} if setting == "auto" else set())


# --- networks --------------------------------------------------------------------------------------------------------


class SegNet(nn.Module):
    """Modules; one pool and one unpool for all levels; conv, batch norm, ReLU everywhere; a loss at a smaller size."""

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
    """Loss, gradients and buffers after one step."""
    net.zero_grad()
    loss = function(*batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}, dict(net.named_buffers())


def assert_same(got, want, tolerance=1e-4):
    """Gradients by the largest of all: that of what a batch norm takes out again is nothing but rounding."""
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


def test_a_network_through_inductor(device, triton_backend):
    function, state = then(train, there_and_back), None
    shapes = (1, 1, 4, 4), (1, 1, 3, 3), (1,), (1,), (1,), (1,), (1,)
    state = [torch.rand(shape, device=device) + 0.5 for shape in shapes]
    reports = []
    torch._dynamo.reset()
    ours = torch.compile(function, backend=fastseg.compile_backend, options={"report": reports.append})
    assert_equal_to_torch(ours, function, state)
    assert reports[0].rewritten == PROVEN["pool and unpool"][1]


def test_dynamic_shapes(state, triton_backend):
    function = then(train, there_and_back)
    ours = Compiled(function, "aot_eager")
    for size in ((6, 8), (7, 9), (10, 5)):
        assert_equal_to_torch(ours, function, [torch.randn(2, 3, *size, device=state[0].device), *state[1:]])
        assert ours.rewritten == PROVEN["pool and unpool"][1]
    assert any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in ours.graphs[-1].graph.nodes)


def test_a_dynamic_size_behind_the_batch_norm_does_not_hinder(state, triton_backend):
    def function(x, weight, bias, gamma, beta, mean, var):
        y, indices = F.max_pool2d(torch.conv2d(x, weight, None, padding=1), 2, return_indices=True)
        z, mean, var = normed(True, lambda y, w, b: y * 2)(y, weight, bias, gamma, beta, mean, var)
        return F.max_unpool2d(F.relu(z), indices, 2, output_size=x.shape[-2:]), mean, var

    ours = Compiled(function, "aot_eager")
    for size in ((6, 8), (7, 9)):
        assert_equal_to_torch(ours, function, [torch.randn(2, 3, *size, device=state[0].device), *state[1:]])
        assert ours.rewritten == {"batch_norm_relu_max_unpool2d": 1, "max_pool2d_with_offsets": 1}
    assert len(ours.graphs) == 2


def test_indices_of_a_size_that_is_not_known_to_agree(device, triton_backend):
    """Without an output_size an odd image comes back smaller: for an unknown one nothing is proven."""

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
    assert ours.rewritten == PROVEN["pool, indices"][1]
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
    """fastseg's modules are in the graph as they are; what is torch's around them is fused."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).to(device)
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6, device=device)
    fastseg.swap(model[-1])
    ours = Compiled(model, "aot_eager")
    got, want = ours(x), plain(x)
    assert relative_error(got, want) < 1e-5 and ours.rewritten == {"batch_norm_relu": 1, "input_bias": 1}
    grads = (torch.autograd.grad(y.square().sum(), net[0].weight)[0] for y, net in ((got, model), (want, plain)))
    assert relative_error(*grads) < 1e-4


def test_two_networks_with_one_batch_norm(device, triton_backend):
    """A batch norm that is called twice moves its statistics twice, in the order of the calls."""
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


# --- on a GPU, as far as it can be told without one ------------------------------------------------------------------


@pytest.mark.parametrize("faster", ["triton", "torch"])
def test_under_auto_a_gpu_gets_the_kernels_where_they_are_not_slower(faster):
    """Of a transposed convolution that is to be known."""
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


# --- how it is called ------------------------------------------------------------------------------------------------


def test_the_entry_point_is_the_backend():
    setup = (Path(__file__).parent.parent / "setup.py").read_text()
    ((name, value),) = re.findall(r'"torch_dynamo_backends": \["(.*) = (.*)"\]', setup)
    point = EntryPoint(name, value, "torch_dynamo_backends")
    assert point.load() is fastseg.compile_backend
    with mock.patch.dict(registry._BACKENDS, {name: point}), mock.patch.dict(registry._COMPILER_FNS):
        assert torch._dynamo.lookup_backend("fastseg") is fastseg.compile_backend


def test_the_log_says_what_was_done(device, caplog, triton_backend):
    with caplog.at_level(logging.INFO, "fastseg"):
        ours = Compiled(lambda x: F.max_pool2d(x, 2, return_indices=True))
        ours(torch.randn(1, 2, 4, 4, device=device))
    (line,) = [record.message for record in caplog.records if record.name == "fastseg"]
    assert line == f"compile: {ours.reports[0]}"
    assert line.endswith("max_pool2d 1; left: max_pool2d to max_pool2d_with_offsets: its indices are read by output")


def test_mode_and_options_go_to_the_inner_backend():
    torch._dynamo.reset()
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


def test_a_graph_without_candidates_goes_on_as_it_is():
    graph = torch.fx.symbolic_trace(lambda x: torch.sin(x) + 1)
    before = graph.code
    with mock.patch.object(graph, "recompile", side_effect=AssertionError):
        report = rewrite(graph)
    assert str(report) == "rewritten: nothing" and graph.code == before
