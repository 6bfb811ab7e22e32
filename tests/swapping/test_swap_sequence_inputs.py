"""Fused sequences: a user's classes, inputs of all kinds, derivatives and torch.compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.swap_common import NORM, POOLED, assert_same, block, operators, results, twins
from torch import nn

import fastseg

# --- a user's classes, and inputs of all kinds -----------------------------------------------------------------------


class Stem(nn.Sequential):
    def __init__(self, channels, name):
        super().__init__(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.name = name


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_subclasses_of_sequential(device, triton_backend):
    plain, model, report = twins(nn.ModuleDict({"stem": Stem(3, "s"), "skip": Skip(*Stem(3, "k"))}).to(device))
    stem, skip = report.candidates
    assert stem.swapped and skip.reason == "is a subclass with its own forward"
    assert isinstance(model["stem"], Stem) and model["stem"].name == "s" and type(model["skip"]) is Skip
    x = torch.randn(2, 3, 4, 4, device=device)
    assert operators(model["stem"], x) == [NORM] and operators(model["skip"], x) == []
    for name in model:
        assert_same(results(model[name], x), results(plain[name], x))
    assert type(copy.deepcopy(model["stem"])) is type(model["stem"])
    report.undo()
    assert type(model["stem"]) is Stem


def test_unsupported_inputs_run_the_layers(device, triton_backend):
    """Unbatched inputs, wrong channels or dtypes, and what is not a tensor: results and errors are torch's."""
    plain, model, _ = twins(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to(device))
    for wrong in (torch.randn(3, 4, 4), torch.randn(2, 4, 4, 4), torch.randn(2, 3, 4, 4).double(), [1], None):
        wrong = wrong.to(device) if isinstance(wrong, torch.Tensor) else wrong
        with pytest.raises(Exception) as expected:
            plain(wrong)
        with pytest.raises(type(expected.value)):
            model(wrong)
    empty = torch.randn(0, 3, 4, 4, device=device)
    assert model.eval()(empty).shape == empty.shape


def test_tensor_subclasses_run_the_layers(device, triton_backend):
    class Own(torch.Tensor):
        pass

    plain, model, _ = twins(block(nn.ReLU()).to(device))
    x = torch.randn(2, 3, 5, 5, device=device).as_subclass(Own)
    found, want = model(x), plain(x)
    assert type(found) is type(want) is Own and torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast(dtype, device, triton_backend):
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    if dtype == torch.float64:
        assert_same(results(model.double(), x.double()), results(plain.double(), x.double()))
        return
    exact = results(copy.deepcopy(plain).double(), x.double())
    for each in (plain, model):
        each.eval()  # results then do not depend on the statistics of the batch
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast(device, dtype):
        found, theirs = model(x), plain(x)
        assert operators(model, x) == [POOLED]
    assert found.dtype == theirs.dtype == dtype
    errors = [(y.double() - exact).abs().max().item() for y in (found, theirs)]
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps * exact.abs().max().item()


def test_transforms_run_the_layers(device, triton_backend):
    """vmap and forward-mode derivatives: torch's own layers have rules for them."""
    plain, model, _ = twins(block(nn.ReLU()).to(device).eval())
    x, direction = torch.randn(2, 2, 3, 5, 5, device=device)
    xs = torch.randn(2, 2, 3, 5, 5, device=device)
    torch.testing.assert_close(torch.func.vmap(model)(xs), torch.func.vmap(plain)(xs))
    for got, want in zip(
        torch.func.jvp(model, (x,), (direction,)), torch.func.jvp(plain, (x,), (direction,)), strict=True
    ):
        torch.testing.assert_close(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        got, want = (torch.autograd.forward_ad.unpack_dual(each(dual)).tangent for each in (model, plain))
        torch.testing.assert_close(got, want)


def test_second_derivatives(device, triton_backend):
    _, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device, torch.float64))
    x = torch.randn(2, 3, 4, 4, device=device, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    plain = nn.Sequential(*model)
    (want,) = torch.autograd.grad(F.max_pool2d(plain[2](plain[1](plain[0](x))), 2).square().sum(), x, create_graph=True)
    for got, expected in ((grad, want), [torch.autograd.grad(g.square().sum(), x)[0] for g in (grad, want)]):
        torch.testing.assert_close(got, expected)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_sequence_compiles_in_one_graph_and_later_hooks_count(training, device, triton_backend):
    plain, model, report = twins(
        nn.Sequential(
            *block(nn.ReLU(), nn.MaxPool2d(2)),
            *nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU()),
        ).to(device)
    )
    x = torch.randn(2, 3, 6, 6, device=device)
    graphs = []

    def record(graph, _):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        graphs.append([node.target for part in parts for node in part.graph.nodes])
        return graph

    for each in (plain, model):
        each.train(training)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=record)
    assert_same({"y": compiled(x)}, {"y": plain(x)})
    assert any("fastseg" in str(target) for target in graphs[-1])
    assert not {F.batch_norm, F.relu, F.max_pool2d} & set(graphs[-1])
    seen = []
    model[2].register_forward_hook(lambda layer, _, y: seen.append(tuple(y.shape)))
    torch.compiler.reset()
    assert_same({"y": torch.compile(model, backend=record)(x)}, {"y": plain(x)})
    assert seen == [(2, 4, 4, 4)]
    report.undo()
    torch.compiler.reset()
    assert_same({"y": torch.compile(model, backend=record)(x)}, {"y": plain(x)})
    assert {F.batch_norm, F.relu} <= set(graphs[-1])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_a_compiled_sequence(backend, device):
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    torch.compiler.reset()
    with fastseg.backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = results(compiled, x)
    assert_same(
        {name.removeprefix("_orig_mod.").replace("buffer _orig_mod.", "buffer "): v for name, v in found.items()},
        results(plain, x),
    )
