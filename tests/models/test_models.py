"""SegNet, SegNet-Basic and DeconvNet against the same networks built from torch's layers."""

import copy
from collections import Counter

import pytest
import torch
from support.plain_networks import Plain, conv
from torch import nn

import fastseg
from fastseg import models
from fastseg.verification.criterion import relative_error

LAYOUTS = [torch.contiguous_format, torch.channels_last]
NORM = "batch_norm_relu"
MIRRORED = ["segnet", "segnet-basic", "deconvnet"]
ODD = (45, 61)  # after the pools: 23x31, 12x16, 6x8, 3x4, 2x2


# --- the same networks, from torch's layers --------------------------------------------------------------------------


def deconv(i, o, k=3, pad=1):
    return nn.Sequential(nn.ConvTranspose2d(i, o, k, padding=pad), nn.BatchNorm2d(o, eps=1e-9), nn.ReLU())


def linear(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 7, padding=3), nn.BatchNorm2d(o, eps=1e-9))


def plain_segnet():
    """SegNet with 8 channels in place of 64 to 256, and 16 in place of 512."""
    encoder = [
        [conv(3, 8), conv(8, 8)],
        [conv(8, 8), conv(8, 8)],
        [conv(8, 8), conv(8, 8), conv(8, 8)],
        [conv(8, 16), conv(16, 16), conv(16, 16)],
        [conv(16, 16), conv(16, 16), conv(16, 16)],
    ]
    decoder = [
        [conv(16, 16), conv(16, 16), conv(16, 16)],
        [conv(16, 16), conv(16, 16), conv(16, 8)],
        [conv(8, 8), conv(8, 8), conv(8, 8)],
        [conv(8, 8), conv(8, 8)],
        [conv(8, 8)],
    ]
    return Plain(encoder, decoder, nn.Conv2d(8, 11, 3, padding=1))


def plain_segnet_basic():
    """SegNet-Basic with 8 channels."""
    encoder = [[conv(3, 8, 7, 3)], [conv(8, 8, 7, 3)], [conv(8, 8, 7, 3)], [conv(8, 8, 7, 3)]]
    decoder = [[linear(8, 8)] for _ in range(4)]
    return Plain(encoder, decoder, nn.Conv2d(8, 11, 1), norm=nn.LocalResponseNorm(5, 1e-4, 0.75))


def plain_deconvnet():
    """DeconvNet with 8 channels in place of 64 to 512, and 40 in place of 4096."""
    encoder = [[conv(3, 8), conv(8, 8)], [conv(8, 8), conv(8, 8)], *([conv(8, 8) for _ in range(3)] for _ in range(3))]
    decoder = [[deconv(8, 8) for _ in range(count)] for count in (3, 3, 3, 2, 2)]
    bottom = {"fc6": conv(8, 40, 7, 0), "fc7": conv(40, 40, 1, 0), "fc6_deconv": deconv(40, 8, 7, 0)}
    return Plain(encoder, decoder, nn.Conv2d(8, 21, 1), **bottom)


def shuffle_state(model, biased):
    """Set random parameters and statistics, with which the outputs of all layers stay near 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel() / module.weight.shape[1] * module.in_channels
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
            nn.init.normal_(module.bias, std=0.2 if biased else 0.0)


def with_the_same_state(ours, theirs, device, layout, training, biased=True, dtype=torch.float64):
    """Both models with the same state. In float64, rounding does not change which value is a pool's maximum."""
    shuffle_state(theirs, biased)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return [model.to(device, dtype, memory_format=layout).train(training) for model in (ours, theirs)]


def results(model, x, upstream):
    """The output, the gradients of the input and of all parameters, and the buffers after the step, by name."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(upstream)
    found = {"output": y.detach(), "grad input": x.grad}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def assert_same(ours, theirs, x, shape, backend, allowed):
    """Check that all results of `ours` under the backend differ by at most `allowed`, relative to the largest entry."""
    upstream = torch.randn(shape, device=x.device, dtype=x.dtype)
    with fastseg.backend(backend), torch.backends.cudnn.flags(True, deterministic=True, allow_tf32=False):
        want, got = results(theirs, x, upstream), results(ours, x, upstream)
    assert got.keys() == want.keys()
    assert got["output"].shape == shape
    for name in want:
        if ours.training and name.endswith(".0.bias"):  # the batch norm after the convolution cancels the bias
            assert got[name].count_nonzero() == 0
            continue  # torch's gradient is the rounding error
        assert relative_error(got[name], want[name]) <= allowed, name
    return got["output"]


# --- outputs and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize(
    ("training", "layout"),
    [(True, torch.contiguous_format), (True, torch.channels_last), (False, torch.channels_last)],
)
@pytest.mark.parametrize(("model", "plain"), [(models.SegNet, plain_segnet), (models.SegNetBasic, plain_segnet_basic)])
def test_segnets_equal_those_of_torchs_layers(device, backend, training, layout, model, plain):
    # Without biases the results are bitwise those of torch, if its layers sum in the same order.
    exact = device == "cpu" and layout == torch.contiguous_format and backend == "auto"
    ours, theirs = with_the_same_state(model(width=0.03), plain(), device, layout, training, biased=not exact)
    x = torch.randn(2, 3, *ODD, device=device, dtype=torch.float64).contiguous(memory_format=layout)
    output = assert_same(ours, theirs, x, (2, 11, *ODD), backend, allowed=0.0 if exact else 1e-9)
    assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("backend", "training", "layout"),
    [
        ("auto", True, torch.contiguous_format),
        ("auto", True, torch.channels_last),
        ("torch", False, torch.contiguous_format),
    ],
)
def test_deconvnet_equals_that_of_torchs_layers(device, backend, training, layout, no_cpu_kernels):
    """Under "auto", without CPU kernels, to the bit."""
    batch, size = (2, (200, 257)) if training else (1, (193, 195))
    exact = device == "cpu" and layout == torch.contiguous_format and backend == "auto"
    ours, theirs = with_the_same_state(
        models.DeconvNet(width=0.01), plain_deconvnet(), device, layout, training, biased=not exact
    )
    x = torch.randn(batch, 3, *size, device=device, dtype=torch.float64).contiguous(memory_format=layout)
    output = assert_same(ours, theirs, x, (batch, 21, *size), backend, allowed=0.0 if exact else 1e-9)
    assert output.is_contiguous(memory_format=layout)


class Bottom(nn.Module):
    """DeconvNet's fc6_deconv and the first stage of its decoder, called by the function `way`."""

    def __init__(self, net, way):
        super().__init__()
        self.fc6_deconv, self.stage, self.way = net.fc6_deconv, net.decoder[0], way

    def forward(self, x):
        return self.way(self, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decoder_of_deconvnet_on_the_kernels(device, layout):
    net, plain = with_the_same_state(
        models.DeconvNet(width=0.01), plain_deconvnet(), device, layout, training=True, dtype=torch.float32
    )
    taken, below = torch.randn(2, 8, 13, 15, device=device), torch.randn(2, 8, 25, 30, device=device)
    kept, kept_below = (
        (fastseg.functional.max_pool2d_with_offsets(map_, 2, ceil_mode=True)[1], map_.shape[-2:])
        for map_ in (taken, below)
    )
    (_, indices), (_, indices_below) = plain.pool(taken), plain.pool(below)
    ours = Bottom(net, lambda self, x: self.stage(self.fc6_deconv(x, *kept), *kept_below))
    theirs = Bottom(
        plain,
        lambda self, x: plain.unpool(
            self.stage(plain.unpool(self.fc6_deconv(x), indices, output_size=taken.shape)),
            indices_below,
            output_size=below.shape,
        ),
    )
    x = torch.randn(2, 40, 1, 2, device=device).contiguous(memory_format=layout)
    assert assert_same(ours, theirs, x, (2, 8, 25, 30), "triton", allowed=1e-3).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        (models.SegNet, {NORM: 16, f"{NORM}_max_pool2d": 5, "max_unpool2d": 1, f"{NORM}_max_unpool2d": 4}),
        (models.SegNetBasic, {NORM: 1, f"{NORM}_max_pool2d": 4, "max_unpool2d": 1, f"{NORM}_max_unpool2d": 3}),
        (models.DeconvNet, {NORM: 19, f"{NORM}_max_pool2d": 5, f"{NORM}_max_unpool2d": 5, "conv_transpose2d": 14}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_all_operators_run_on_the_kernels(device, triton_backend, training, model, counts):
    net = model(width=0.01).to(device).train(training)
    if model is models.DeconvNet and not training:  # nine are folded into the convolutions in front of them
        counts = counts | {NORM: 10}
    choices = fastseg.explain(net, torch.randn(2, 3, 193, 225, device=device))
    assert Counter(choice.operator for choice in choices) == counts
    assert {choice.backend for choice in choices} == {"triton"}


# --- the authors' numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [("segnet", 11, "29.449"), ("segnet-basic", 11, "1.417"), ("deconvnet", 21, "251.806")],
)
def test_parameter_counts_are_those_of_the_authors(name, classes, millions):
    with torch.device("meta"):
        model = models.MODELS[name]()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions
    assert model.classifier.out_channels == classes


def map_sizes(model, size):
    """The size of the input of each encoder and decoder stage."""
    found = []
    for block, *_ in [*model.encoder, *model.decoder]:
        block.register_forward_pre_hook(lambda _, inputs: found.append(tuple(inputs[0].shape[-2:])))
    model.to("meta").eval()(torch.empty(1, 3, *size, device="meta"))
    return found


def test_the_map_sizes_of_segnet():
    sizes = [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]
    assert map_sizes(models.SegNet(width=0.03), (360, 480)) == sizes + sizes[::-1]


def test_the_map_sizes_of_deconvnet():
    sizes = [(224, 224), (112, 112), (56, 56), (28, 28), (14, 14)]
    assert map_sizes(models.DeconvNet(width=0.01), (224, 224)) == sizes + sizes[::-1]


@pytest.mark.parametrize("name", MIRRORED)
def test_the_initial_state_is_that_of_the_authors(name):
    model = models.MODELS[name](width=0.25)
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-9
            assert (module.weight == 1).all() and (module.bias == 0.001).all()
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            gaussian = isinstance(module, nn.ConvTranspose2d) or (name, path) == ("deconvnet", "classifier")
            std = 0.01 if gaussian else (2 / (module.in_channels * module.weight[0, 0].numel())) ** 0.5
            assert abs(module.weight.std() / std - 1) < 6 / module.weight.numel() ** 0.5
            assert (module.bias == 0).all()


def test_segnet_basic_decoder_has_no_relu():
    model = models.SegNetBasic(width=0.03)
    x = torch.randn(1, 3, 32, 32)
    for stages, least in ((model.encoder, 0), (model.decoder, -torch.inf)):
        relus = [norm.relu for ((_, norm),) in stages]
        assert relus == [least == 0] * 4
    assert (model.decoder[3](torch.randn(1, 8, 32, 32)) < 0).any() and (model.encoder[0](x)[0] >= 0).all()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIRRORED)
def test_the_arguments_of_the_constructors(name):
    model = models.MODELS[name](num_classes=5, in_channels=4, width=0.02, bn_eps=1e-5).eval()
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    widths = {m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert widths == {"segnet": {8}, "segnet-basic": {8}, "deconvnet": {8, 80}}[name]
    assert model(torch.zeros(1, 4, 193, 193)).shape == (1, 5, 193, 193)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be finite and above 0, but is 0"),
        ({"width": -1}, "width must be finite and above 0, but is -1"),
        ({"width": float("inf")}, "width must be finite and above 0, but is inf"),
        ({"width": float("nan")}, "width must be finite and above 0, but is nan"),
        ({"num_classes": 0}, "num_classes must be at least 1, but is 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, but is 0"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.MODELS[name](**{"width": 0.02} | arguments)


def test_deconvnet_rejects_small_images_and_names_the_size():
    model = models.DeconvNet(width=0.01)
    with pytest.raises(ValueError, match=r"193x193.*192x300"):
        model(torch.zeros(1, 3, 192, 300))


def test_a_replaced_convolution_keeps_its_bias():
    """For example a plain nn.Conv2d as another stem, which adds its bias itself."""
    model = models.SegNetBasic(width=0.03).eval()
    ((conv, _),) = model.encoder[0]
    conv.bias.data.normal_()
    x = torch.randn(1, 3, 32, 32)
    want = model(x)
    own = nn.Conv2d(3, 8, 7, padding=3)
    own.load_state_dict(conv.state_dict())
    model.encoder[0][0][0] = own
    torch.testing.assert_close(model(x), want)


def test_an_image_of_one_pixel(device):
    model = models.SegNet(width=0.03).to(device).eval()
    assert model(torch.randn(2, 3, 1, 1, device=device)).shape == (2, 11, 1, 1)


# --- compilers -------------------------------------------------------------------------------------------------------


def test_segnet_compiles_in_one_graph(device):
    model = models.SegNet(width=0.03).to(device, torch.float64)
    x, upstream = (torch.randn(2, c, *ODD, device=device, dtype=torch.float64) for c in (3, 11))
    x = x.contiguous(memory_format=torch.channels_last)
    start = copy.deepcopy(model.state_dict())
    want = copy.deepcopy(results(model, x, upstream))
    torch.compiler.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    for backend in ("auto", "triton"):
        model.load_state_dict(start)
        model.zero_grad()
        with fastseg.backend(backend):
            torch.testing.assert_close(results(model, x, upstream), want)


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_segnet_holds_fastsegs_operators(device, training):
    model = models.SegNet(width=0.03).to(device, torch.float64).train(training)
    x = torch.randn(2, 3, *ODD, device=device, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    program = torch.export.export(model, (x,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.fastseg.max_pool2d.default) == 5
    assert targets.count(torch.ops.fastseg.max_unpool2d.default) == 5
    for backend in ("auto", "triton"):  # the backend is chosen when the program runs, not at export
        with fastseg.backend(backend):
            torch.testing.assert_close(program.module()(x), model(x))


def test_segnet_can_be_exported_for_any_batch_and_size(device):
    model = models.SegNet(width=0.03).to(device).eval()
    auto = torch.export.Dim.AUTO
    x = torch.randn(2, 3, *ODD, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for shape in ((5, 3, 64, 96), (1, 3, 47, 53)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(program.module()(x), model(x))
