"""fastseg.swap: fastseg's layers are put into an existing model, and taken out again."""

import copy
import io
import pickle

import pytest
import torch
from support.swap_common import FUSED, Net, assert_same, kinds, operators, reasons, results, twins
from torch import nn

import fastseg
from fastseg.verification.criterion import relative_error


@pytest.fixture
def net(device):
    return Net().to(device)


@pytest.fixture
def batch(device):
    return torch.randn(2, 3, 7, 9, device=device), torch.randint(0, 5, (2, 14, 18), device=device)


def gradients(net, batch):
    net.zero_grad()
    loss = net(*batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


# --- swap and undo ---------------------------------------------------------------------------------------------------


def test_the_four_layers_are_swapped_in_place(net):
    modules, parameters = list(net.modules()), list(net.parameters())
    before, state = kinds(net), net.state_dict()
    report = fastseg.swap(net)
    assert kinds(net) == [FUSED.get(kind, kind) for kind in before]
    assert len(report.swapped) == 4 and not report.left
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(state)
    Net().load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_results_are_the_same_before_the_swap_after_it_and_after_undo(net, batch, triton_backend, training):
    net.train(training)
    before = gradients(net, batch)
    report = fastseg.swap(net)
    assert {c.operator for c in fastseg.explain(net, *batch)} == {
        "max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy",
    }  # fmt: skip
    during = gradients(net, batch)
    report.undo()
    assert fastseg.explain(net, *batch) == []
    after = gradients(net, batch)
    for a, b, c in zip(before, during, after, strict=True):
        assert relative_error(b, a) < 1e-5
        assert torch.equal(a, c)


def test_undo_restores_the_classes_and_keeps_trained_weights(net, batch):
    before = kinds(net)
    report = fastseg.swap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    start = [p.detach().clone() for p in net.parameters()]
    net(*batch).backward()
    optimizer.step()
    trained = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), start, strict=True))
    for _ in range(2):
        report.undo()
        assert kinds(net) == before
        assert list(net.state_dict()) == list(trained)
        assert all(torch.equal(tensor, trained[name]) for name, tensor in net.state_dict().items())


def test_undo_keeps_a_class_that_was_set_after_the_swap(net):
    report = fastseg.swap(net)
    net.pool.__class__ = later = type("Later", (fastseg.nn.MaxPool2d,), {})
    report.undo()
    assert type(net.unpool) is nn.MaxUnpool2d
    assert type(net.pool) is later


def test_undo_leaves_no_attributes(device, triton_backend):
    """Not even the result of a transposed convolution's check of its weight."""
    up = nn.ConvTranspose2d(3, 3, 2, 2).to(device).requires_grad_(False)
    before = dict(vars(up))
    report = fastseg.swap(up)
    up(torch.randn(1, 3, 2, 2, device=device))
    report.undo()
    assert vars(up).keys() == before.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU tensors")
def test_without_cpu_kernels_the_forward_of_torch_runs(monkeypatch, no_cpu_kernels):
    """fastseg only decides which backend runs."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.ConvTranspose2d(3, 4, 2))
    plain, model, _ = twins(model)
    x = torch.randn(1, 3, 6, 6)
    assert operators(model, x) == ["max_pool2d", "conv_transpose2d"]
    for name in ("max_pool2d", "conv_transpose2d"):
        monkeypatch.setattr(fastseg.functional, name, None)
    assert_same(results(model, x), results(plain, x), exactly=True)
    assert model[1](x, output_size=(7, 7)).shape == (1, 4, 7, 7)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_saved_forward_works_after_undo(backend, device):
    """accelerate and other libraries set a forward on the instance that calls the saved one."""
    up = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3), nn.ReLU())
    layers = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), *up, up)
    plain, layers, report = twins(layers.to(device).eval(), compact_indices=True)
    kept = [layer.forward for layer in layers]
    report.undo()
    x = torch.randn(1, 3, 6, 6, device=device)
    values, indices = plain[1](x)
    with fastseg.backend(backend):
        for layer, forward in zip(plain, kept, strict=True):
            arguments = (values, indices) if isinstance(layer, nn.MaxUnpool2d) else (x,)
            found, want = forward(*arguments), layer(*arguments)
            found, want = (y[0] if isinstance(y, tuple) else y for y in (found, want))
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_swapping_twice_is_harmless(net, batch):
    first = fastseg.swap(net)
    during = kinds(net)
    second = fastseg.swap(net)
    assert kinds(net) == during
    assert len(second.swapped) == 0
    assert set(reasons(second).values()) == {"is already a layer of fastseg"} and len(second.left) == 4
    second.undo()
    assert kinds(net) == during
    first.undo()
    assert type(net.pool) is nn.MaxPool2d


def test_a_bare_layer_is_a_model():
    pool = nn.MaxPool2d(2)
    report = fastseg.swap(pool)
    assert type(pool) is fastseg.nn.MaxPool2d
    assert report.swapped[0].names == ("(the model)",)
    report.undo()
    assert type(pool) is nn.MaxPool2d


@pytest.mark.parametrize("thing", [nn.MaxPool2d, "model", None, {"weight": torch.zeros(1)}])
def test_what_is_not_a_module_is_rejected(thing):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        fastseg.swap(thing)


# --- what a swap does not affect -------------------------------------------------------------------------------------


def test_hooks_are_kept(net, batch):
    calls = []
    net.pool.register_forward_pre_hook(lambda *_: calls.append("pre"))
    net.pool.register_forward_hook(lambda *_: calls.append("forward"))
    net.up.register_full_backward_hook(lambda *_: calls.append("backward"))
    net.up.register_state_dict_post_hook(lambda *_: calls.append("state"))
    report = fastseg.swap(net)
    expected = ["pre", "forward", "backward", "state"]
    for _ in range(2):
        calls.clear()
        net(*batch).backward()
        net.state_dict()
        assert calls == expected
        report.undo()


def test_a_shared_module_is_one_layer_with_two_names():
    pool = nn.MaxPool2d(2)
    model = nn.ModuleDict({"a": nn.Sequential(pool, nn.ReLU(), pool), "b": pool})
    report = fastseg.swap(model)
    assert [layer.names for layer in report.candidates] == [("a.0", "a.2", "b")]
    assert model["a"][0] is model["a"][2] is model["b"]
    assert type(pool) is fastseg.nn.MaxPool2d
    report.undo()
    assert type(pool) is nn.MaxPool2d


def test_a_swapped_model_can_be_copied_and_saved(net, batch):
    fastseg.swap(net)
    want = gradients(net, batch)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert kinds(copied) == kinds(net)
        assert all(torch.equal(a, b) for a, b in zip(gradients(copied, batch), want, strict=True))


def test_undo_does_not_affect_copies(net):
    report = fastseg.swap(net)
    copied = copy.deepcopy(net)
    report.undo()
    assert type(copied.pool) is fastseg.nn.MaxPool2d and type(net.pool) is nn.MaxPool2d


def test_attributes_set_after_the_swap_count(device, triton_backend):
    model = nn.Sequential(nn.MaxPool2d(2))
    report = fastseg.swap(model)
    x = torch.randn(1, 2, 5, 7, device=device)
    model[0].ceil_mode, model[0].return_indices = True, True
    for _ in range(2):
        y, indices = model(x)
        want, expected = nn.functional.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        assert torch.equal(y, want) and torch.equal(indices, expected)
        report.undo()


def test_a_compiled_model_is_recompiled_after_swap_and_undo(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)).to(device)
    x = torch.randn(1, 3, 8, 8, device=device)
    ran = []

    def record(graph, _):
        ran.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=record)
    with fastseg.backend("triton"), torch.no_grad():
        want = compiled(x)
        report = fastseg.swap(model)
        assert torch.equal(compiled(x), want)
        report.undo()
        assert torch.equal(compiled(x), want)
    fused = [any("fastseg" in target for target in targets) for targets in ran]
    assert fused == [False, True]


class Five(nn.Module):
    """One pool, under two names, and one unpool for all levels, called with positional and keyword arguments."""

    def __init__(self):
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)
        self.again = self.pool

    def forward(self, x):
        sizes, kept = [], []
        for number in range(5):
            sizes.append(x.size())
            x, indices = (self.pool if number % 2 else self.again)(input=x) if number < 3 else self.pool(x)
            kept.append(indices)
        for number, (size, indices) in enumerate(zip(reversed(sizes), reversed(kept), strict=True)):
            if number % 2:
                x = self.unpool(x, indices, size)
            elif number:
                x = self.unpool(input=x, indices=indices, output_size=size[-2:])
            else:
                x = self.unpool(output_size=list(size), indices=indices, input=x)
        return x


def test_one_pool_called_five_times(device, triton_backend):
    plain, model, report = twins(Five())
    assert [layer.names for layer in report.swapped] == [("pool", "again"), ("unpool",)]
    x = torch.randn(1, 2, 33, 38, device=device)
    assert operators(model, x) == ["max_pool2d"] * 5 + ["max_unpool2d"] * 5
    want = results(plain, x)
    assert_same(results(model, x), want, exactly=True)
    report.undo()
    assert_same(results(model, x), want, exactly=True)


def test_a_transposed_convolution_called_with_keyword_arguments(device, triton_backend):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x):
            size = (2 * x.shape[2], 2 * x.shape[3] - 1)
            whole = self.up(input=x, output_size=(x.shape[0], 3, *size))
            return whole + self.up(x, size) + self.up(x, output_size=list(size))

    plain, model, _ = twins(Up().to(device))
    x = torch.randn(1, 2, 3, 4, device=device)
    assert operators(model, x) == ["conv_transpose2d"] * 3
    assert_same(results(model, x), results(plain, x))


EDITS = [
    (nn.MaxPool2d(2), {"ceil_mode": True, "return_indices": True}),
    (nn.MaxPool2d(2, return_indices=True), {"kernel_size": 3, "stride": (1, 2), "padding": 1, "return_indices": False}),
    (nn.MaxPool2d(2), {"dilation": 2, "stride": 1}),
    (nn.ConvTranspose2d(2, 2, 3, 2), {"output_padding": (1, 0), "padding": (1, 1), "bias": None}),
    (nn.ConvTranspose2d(2, 2, 1), {"weight": nn.Parameter(torch.ones(2, 2, 2, 2)), "stride": (2, 2)}),
]


@pytest.mark.parametrize("layer, edits", EDITS, ids=lambda x: "-".join(x) if isinstance(x, dict) else type(x).__name__)
def test_each_attribute_can_be_set_after_the_swap(layer, edits, device, triton_backend):
    plain, layer = copy.deepcopy(layer).to(device), copy.deepcopy(layer).to(device)
    fastseg.swap(layer)
    x = torch.randn(1, 2, 7, 9, device=device)
    for name, value in edits.items():
        for edited in (plain, layer):
            setattr(edited, name, value.to(device) if isinstance(value, torch.Tensor) else value)
    assert len(operators(layer, x)) == 1
    for got, want in zip(layer(x), plain(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
