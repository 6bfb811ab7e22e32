"""Sequences with batch norm in them: fused where nothing sees what is between, and as before everywhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from swap_common import assert_same, operators, results, twins
from torch import nn

import fastseg
from fastseg.inspect.traffic import metering


def block(*more, bias=True, channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3, bias=bias), nn.BatchNorm2d(channels), *more)


def deconv(*more, bias=True):
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2, bias=bias), nn.BatchNorm2d(4), *more)


class Conv(nn.Conv2d):
    """Of the user's, with torch's forward."""


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return -super().forward(-input)


NORM, POOLED = "batch_norm_relu", "batch_norm_relu_max_pool2d"
POOL, UP = "max_pool2d", "conv_transpose2d"
SEQUENCES = {  # the sequence, the children that run as one, operators in training, and in evaluation
    "conv bn relu": (block(nn.ReLU()), ["0 + 1 + 2"], [NORM], [NORM]),
    "conv bn": (block(), ["0 + 1"], [NORM], [NORM]),
    "conv bn relu pool": (block(nn.ReLU(True), nn.MaxPool2d(2)), ["0 + 1 + 2 + 3"], [POOLED], [POOLED]),
    "conv bn pool": (block(nn.MaxPool2d(2, ceil_mode=True)), ["0 + 1 + 2"], [POOLED], [POOLED]),
    "no bias": (block(nn.ReLU(), bias=False), ["1 + 2"], [NORM], [NORM]),
    "bn relu": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), ["0 + 1"], [NORM], [NORM]),
    "overlapping pool": (block(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), ["0 + 1 + 2"], [NORM, POOL], [NORM, POOL]),
    "dilated pool": (block(nn.ReLU(), nn.MaxPool2d(2, 2, dilation=2)), ["0 + 1 + 2"], [NORM, POOL], [NORM, POOL]),
    "deconv bn relu": (deconv(nn.ReLU()), ["0 + 1 + 2"], [UP, NORM], [UP]),
    "deconv bn relu, no bias": (deconv(nn.ReLU(), bias=False), ["0 + 1 + 2"], [UP, NORM], [UP]),
    "deconv bn": (deconv(), ["0 + 1"], [UP, NORM], [UP, NORM]),
    "deconv bn relu pool": (deconv(nn.ReLU(), nn.MaxPool2d(2)), ["0 + 1 + 2 + 3"], [UP, POOLED], [UP, POOLED]),
    "deconv bn pool, no bias": (deconv(nn.MaxPool2d(2), bias=False), ["1 + 2"], [UP, POOLED], [UP, POOLED]),
    "two": (
        nn.Sequential(*block(nn.ReLU(), nn.Dropout(0.0)), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)),
        ["0 + 1 + 2", "4 + 5"], [NORM, NORM], [NORM, NORM],
    ),
    "subclass": (nn.Sequential(Conv(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), ["0 + 1 + 2"], [NORM], [NORM]),
    "spectral norm": (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)).eval(), nn.BatchNorm2d(4)),
        ["0 + 1"], [NORM], [NORM],
    ),
    "momentum None": (nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.ReLU()), ["0 + 1"], [NORM], [NORM]),
    "no statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        ["0 + 1"], [NORM], [NORM],
    ),
    "deconv, no statistics": (
        nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        ["0 + 1 + 2"], [UP, NORM], [UP, NORM],
    ),
    "not affine": (nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU()), ["0 + 1"], [NORM], [NORM]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_each_group_runs_as_one_with_the_same_numbers(name, device, triton_backend):
    """In training, twice, and in evaluation: outputs, gradients, buffers and state_dict, and after undo."""
    sequence, together, training, evaluation = SEQUENCES[name]
    plain, model, report = twins(copy.deepcopy(sequence).to(device))
    keys = list(plain.state_dict())
    layer = report.candidates[0]
    assert layer.names == ("(the model)",) and layer.op == "batch_norm_relu" and layer.swapped
    assert [" + ".join(names) for names in layer.together] == together
    assert f"yes: {', '.join(together)}" in str(report)
    swapped_alone = (nn.MaxPool2d, nn.ConvTranspose2d)
    assert [type(m) for m in model if not isinstance(m, swapped_alone)] == [
        type(m) for m in plain if not isinstance(m, swapped_alone)
    ]
    x = torch.randn(2, 3, 7, 8, device=device)
    for mode, ran in ((True, training), (True, training), (False, evaluation)):
        for each in (plain, model):
            each.train(mode)
        if name != "momentum None" or not mode:  # whose factor is read from a tensor, and a fake has none
            assert operators(model, x) == ran
        assert_same(results(model, x), results(plain, x))
    assert list(model.state_dict()) == keys
    plain.load_state_dict(model.state_dict(), strict=True)
    report.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert_same(results(model, x), results(plain, x), exactly=True)


class Scaled(nn.Conv2d):
    """Its bias is scaled with the rest."""

    def _conv_forward(self, input, weight, bias):
        return 3 * super()._conv_forward(input, weight, bias)


class WithOwnBias(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight, self.bias)


@pytest.mark.parametrize("conv", [Scaled(3, 4, 3), WithOwnBias(3, 4, 3), nn.Conv2d(3, 4, 3)], ids=str)
def test_a_convolution_with_a_convolution_of_its_own_keeps_its_bias(conv, device, triton_backend):
    plain, model, report = twins(nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(4), nn.ReLU()).to(device))
    if type(conv) is nn.Conv2d:  # set on the instance
        assert report.swapped[0].together == (("0", "1", "2"),)
        for each in (plain, model):
            each[0]._conv_forward = lambda input, weight, bias, bound=each[0].bias: 2 * F.conv2d(input, weight, bound)
    else:
        assert report.swapped[0].together == (("1", "2"),)
    x = torch.randn(2, 3, 5, 5, device=device)
    assert operators(model, x) == [NORM]
    assert_same(results(model, x), results(plain, x))


class Counting(nn.Module):
    """A parametrization that gives another value each time it is asked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, value):
        self.asked += 1
        return value * self.asked


@pytest.mark.parametrize("make", [block, deconv], ids=["conv", "deconv"])
@pytest.mark.parametrize("at, name", [(0, "weight"), (0, "bias"), (1, "weight"), (1, "bias")])
def test_a_parametrization_is_asked_once(at, name, make, device, triton_backend):
    model = make(nn.ReLU()).to(device)
    nn.utils.parametrize.register_parametrization(model[at], name, Counting(), unsafe=True)
    plain, model, _ = twins(model)
    for _ in range(2):
        found, want = (results(each, torch.ones(2, 3, 5, 5, device=device).tril()) for each in (model, plain))
        names = [key for key in want if key == "output" or key.startswith("buffer")]
        assert_same(*({key: values[key] for key in names} for values in (found, want)))


class Loud(nn.ReLU):
    def __call__(self, input):
        return super().__call__(input) + 1


@pytest.mark.parametrize(
    "sequence",
    [
        nn.Sequential(nn.BatchNorm2d(3), Loud()),
        block(bias=False),
        nn.Sequential(nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.ReLU()),
        nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6()),
        nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU()),
        nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()),
        nn.Sequential(),
    ],
    ids=str,
)
def test_a_sequence_without_a_group_is_no_candidate(sequence):
    assert fastseg.swap(sequence).candidates == []
    assert type(sequence) is nn.Sequential


@pytest.mark.parametrize("training", [True, False])
def test_where_the_kernels_do_not_run_the_layers_do(training, device):
    """Under "torch", and on a CPU under "auto": every bit as before, each layer called by itself."""
    plain, model, _ = twins(nn.Sequential(*block(nn.ReLU(), nn.MaxPool2d(2)), *deconv(nn.ReLU())[1:]).to(device))
    x = torch.randn(2, 3, 6, 8, device=device)
    called = []
    for layer in model:
        forward = type(layer).forward
        layer.forward = lambda *args, layer=layer, forward=forward: (
            called.append(type(layer).__name__) or forward(layer, *args)
        )
    for backend in {"torch", "auto" if device == "cpu" else "torch"}:
        with fastseg.backend(backend):
            for each in (plain, model):
                each.train(training)
            assert_same(results(model, x), results(plain, x), exactly=True)
    for layer in model:
        del layer.forward
    with fastseg.backend("torch"):
        assert NORM not in operators(model, x)
        assert_same(results(model, x), results(plain, x), exactly=True)
    assert called[: len(model)] == [type(layer).__name__ for layer in plain]


def test_the_bias_before_the_norm_has_a_gradient(device, triton_backend):
    """Zero in training, where the mean takes it out again: not None, for DDP would wait for it."""
    for make in (block, deconv):
        _, model, _ = twins(make(nn.ReLU()).to(device))
        found = results(model, torch.randn(2, 3, 5, 5, device=device))
        assert torch.equal(found["0.bias"], torch.zeros_like(model[0].bias))
        assert all(value is not None for value in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is launched where it is interpreted")
def test_a_transposed_convolution_in_evaluation_is_one_kernel(triton_backend):
    _, model, _ = twins(nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU()))
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).eval()
    with torch.no_grad(), metering() as launches:
        y = model(x)
    assert len(launches) == 1 and y.is_contiguous(memory_format=torch.channels_last)


# --- what can see the intermediate -----------------------------------------------------------------------------------


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize(
    "at, ran", [(0, POOLED), (1, "max_pool2d"), (2, "max_pool2d"), (3, NORM)], ids=["conv", "norm", "relu", "pool"]
)
def test_a_hook_sees_what_it_saw(at, ran, register, device, triton_backend):
    """Registered after the swap; what it does not watch still runs as one."""
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    seen = []
    for each in (plain, model):
        getattr(each[at], f"register_{register}")(lambda layer, *values: seen.append(values))
    found, want = results(model, x), results(plain, x)
    assert ran in operators(model, x) and (POOLED in operators(model, x)) == (at == 0)
    assert_same(found, want)
    ours, theirs = [
        [t for value in values for t in (value if isinstance(value, tuple) else (value,))] for values in seen[:2]
    ]
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_hooks_that_are_there_already_are_reported():
    model = block(nn.ReLU(), bias=False)
    handle = model[1].register_forward_hook(lambda *_: None)
    report = fastseg.swap(model)
    assert type(model) is nn.Sequential
    assert report.left[0].reason == "has hooks on 1 + 2, which see what would not be made"
    handle.remove()
    assert fastseg.swap(model).swapped[0].together == (("1", "2"),)


def test_a_hook_of_all_modules_sees_every_layer(device, triton_backend):
    _, model, _ = twins(block(nn.ReLU()).to(device))
    x, seen = torch.randn(2, 3, 5, 5, device=device), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(type(layer).__name__))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hook_stays_right(device, triton_backend):
    """nn.utils.weight_norm's hook makes the weight anew at each call: the convolution must be called."""
    plain, model = (block(nn.ReLU()).to(device) for _ in range(2))
    for each in (plain, model):
        nn.utils.weight_norm(each[0])
    plain.load_state_dict(model.state_dict())
    assert fastseg.swap(model).swapped[0].together == (("1", "2"),)
    x = torch.randn(2, 3, 5, 5, device=device)
    for each in (plain, model):
        with torch.no_grad():
            each[0].weight_g.copy_(torch.tensor([1.0, -1, 2, -2])[:, None, None, None])
    assert operators(model, x) == [NORM]
    assert_same(results(model, x), results(plain, x))


# --- what happens to a sequence later --------------------------------------------------------------------------------


def test_another_layer_in_a_place_counts(device, triton_backend):
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    for at, layer in ((2, nn.GELU()), (1, nn.Identity()), (0, nn.Conv2d(3, 2, 1)), (3, nn.BatchNorm2d(2))):
        for each in (plain, model):
            each[at] = copy.deepcopy(layer).to(device)
        assert_same(results(model, x), results(plain, x))
    for each in (plain, model):
        torch.manual_seed(0)
        each.append(nn.ReLU()).insert(0, nn.Conv2d(3, 3, 1).to(device))
        del each[2]
    assert operators(model, x) == [NORM]
    assert_same(results(model, x), results(plain, x))


def test_a_forward_set_on_a_layer_is_called(device, triton_backend):
    _, model, _ = twins(block(nn.ReLU()).to(device))
    model[1].forward = lambda x: x * 0 + 2
    assert torch.equal(model(torch.randn(2, 3, 3, 3, device=device)), torch.full((2, 4, 1, 1), 2.0, device=device))


def test_a_slice_is_a_sequence_of_the_same_layers(device, triton_backend):
    plain, model, _ = twins(nn.Sequential(*block(nn.ReLU()), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    assert list(model[:2]) == list(model)[:2]
    for part, ran in (
        (slice(2), [NORM]),
        (slice(1, 3), [NORM]),
        (slice(2, None), ["max_pool2d"]),
        (slice(4), [POOLED]),
    ):
        given = x if part.start is None else torch.randn(2, 4, 4, 4, device=device)
        assert operators(model[part], given) == ran
        assert_same(results(model[part], given), results(plain[part], given))


def test_shared_layers_in_a_row(device, triton_backend):
    """[conv, bn, relu] * 3: one norm, whose statistics move three times."""
    plain, model, report = twins(
        nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()] * 3).to(device)
    )
    assert report.swapped[0].together == (("0", "1", "2"), ("3", "4", "5"), ("6", "7", "8"))
    x = torch.randn(2, 3, 5, 5, device=device)
    assert operators(model, x) == [NORM] * 3
    assert_same(results(model, x), results(plain, x))
    assert model[1].num_batches_tracked == 3


def test_a_norm_that_is_used_elsewhere_too(device, triton_backend):
    """Its own output there, fused here: an alias sees no intermediate of another call."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), self.norm, nn.ReLU())

        def forward(self, x):
            return self.norm(x) + self.body(x)

    plain, model, _ = twins(Twice().to(device))
    x = torch.randn(2, 3, 4, 4, device=device)
    assert_same(results(model, x), results(plain, x))


def test_conversion_to_synchronised_norms_after_the_swap(device, triton_backend):
    plain, model, report = twins(block(nn.ReLU()).to(device))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model and type(model[1]) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 5, 5, device=device)
    model.eval(), plain.eval()
    assert operators(model, x) == []
    assert_same(results(model, x), results(plain, x))
    report.undo()
    assert type(model) is nn.Sequential and type(model[1]) is nn.SyncBatchNorm


# --- sequences of the user's, and inputs of every kind ---------------------------------------------------------------


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
    assert stem.swapped and skip.reason == "is a subclass with a forward of its own"
    assert isinstance(model["stem"], Stem) and model["stem"].name == "s" and type(model["skip"]) is Skip
    x = torch.randn(2, 3, 4, 4, device=device)
    assert operators(model["stem"], x) == [NORM] and operators(model["skip"], x) == []
    for name in model:
        assert_same(results(model[name], x), results(plain[name], x))
    assert type(copy.deepcopy(model["stem"])) is type(model["stem"])
    report.undo()
    assert type(model["stem"]) is Stem


def test_what_the_kernels_do_not_cover_runs_as_before(device, triton_backend):
    """Inputs without a batch, float64 parameters of another dtype, no tensors: torch's answers and errors."""
    plain, model, _ = twins(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to(device))
    for wrong in (torch.randn(3, 4, 4), torch.randn(2, 4, 4, 4), torch.randn(2, 3, 4, 4).double(), [1], None):
        wrong = wrong.to(device) if isinstance(wrong, torch.Tensor) else wrong
        with pytest.raises(Exception) as expected:
            plain(wrong)
        with pytest.raises(type(expected.value)):
            model(wrong)
    empty = torch.randn(0, 3, 4, 4, device=device)
    assert model.eval()(empty).shape == empty.shape


def test_tensors_of_another_class_go_through_the_layers(device, triton_backend):
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
        each.eval()  # whose numbers do not depend on the batch's
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast(device, dtype):
        found, theirs = model(x), plain(x)
        assert operators(model, x) == [POOLED]
    assert found.dtype == theirs.dtype == dtype
    errors = [(y.double() - exact).abs().max().item() for y in (found, theirs)]
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps * exact.abs().max().item()


def test_transforms_run_the_layers(device, triton_backend):
    """vmap, forward-mode derivatives: torch's own layers have rules for them."""
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


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph_and_follows_later_hooks(training, device, triton_backend):
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
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=record)
    assert_same({"y": compiled(x)}, {"y": plain(x)})
    assert any("fastseg" in str(target) for target in graphs[-1])
    assert not {F.batch_norm, F.relu, F.max_pool2d} & set(graphs[-1])
    seen = []
    model[2].register_forward_hook(lambda layer, _, y: seen.append(tuple(y.shape)))
    torch._dynamo.reset()
    assert_same({"y": torch.compile(model, backend=record)(x)}, {"y": plain(x)})
    assert seen == [(2, 4, 4, 4)]
    report.undo()
    torch._dynamo.reset()
    assert_same({"y": torch.compile(model, backend=record)(x)}, {"y": plain(x)})
    assert {F.batch_norm, F.relu} <= set(graphs[-1])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_a_compiled_sequence(backend, device):
    plain, model, _ = twins(block(nn.ReLU(), nn.MaxPool2d(2)).to(device))
    x = torch.randn(2, 3, 6, 6, device=device)
    torch._dynamo.reset()
    with fastseg.backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = results(compiled, x)
    assert_same(
        {name.removeprefix("_orig_mod.").replace("buffer _orig_mod.", "buffer "): v for name, v in found.items()},
        results(plain, x),
    )
