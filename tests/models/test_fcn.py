"""FCN against the same networks written with torch's functions, and the weights of VGG16 in all networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg import models
from fastseg.models.fcn import bilinear_
from fastseg.verification.criterion import relative_error

NETS = {name: kind for name, kind in models.MODELS.items() if name.startswith("fcn")}


def plain(weights, x, stride, scales=(1.0, 1.0)):
    """The logits, from the tensors of a state_dict, with layers and crops as in the authors' files."""
    size, pools = x.shape[-2:], []
    for number in range(5):
        for layer in range(2 if number < 2 else 3):
            key = f"encoder.{number}.{2 * layer}"
            pad = 100 if number == layer == 0 else 1
            x = F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], padding=pad).relu()
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        pools.append(x)
    for key in ("fc6.0", "fc7.0"):
        x = F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"]).relu()
    x = F.conv2d(x, weights["scores.0.weight"], weights["scores.0.bias"])
    skips = {32: [], 16: [(3, 5)], 8: [(3, 5), (2, 9)]}[stride]
    for number, ((pool, crop), scale) in enumerate(zip(skips, scales, strict=False)):
        x = F.conv_transpose2d(x, weights[f"ups.{number}.weight"], stride=2)
        finer = F.conv2d(
            pools[pool] * scale, weights[f"scores.{number + 1}.weight"], weights[f"scores.{number + 1}.bias"]
        )
        x = x + finer[:, :, crop : crop + x.shape[2], crop : crop + x.shape[3]]
    x = F.conv_transpose2d(x, weights["last_up.weight"], stride=stride)
    crop = {32: 19, 16: 27, 8: 31}[stride]
    return x[:, :, crop : crop + size[0], crop : crop + size[1]]


def shuffled(model):
    """The model with random values in all trained parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            fan_in = max(1, parameter[0].numel())
            nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5)
    return model


def plain_logits(model, x):
    """The result of `plain` with the weights of a model in float64, and these weights."""
    weights = {key: p.detach().double().requires_grad_(p.requires_grad) for key, p in model.named_parameters()}
    scales = (0.01, 0.0001) if isinstance(model, models.FCN8sAtOnce) else (1.0, 1.0)
    return plain(weights, x.double(), model.STRIDE, scales), weights


@pytest.mark.parametrize("name", NETS)
def test_logits_and_gradients_equal_those_of_torchs_functions(name, device):
    model = shuffled(NETS[name](3, 2, width=0.01)).to(device).double().eval()
    x = torch.randn(1, 2, 9, 40, device=device, dtype=torch.float64)
    ours, (theirs, weights) = model(x), plain_logits(model, x)
    assert ours.shape == (1, 3, 9, 40) and relative_error(ours, theirs) < 1e-12
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    for key, p in model.named_parameters():
        assert (p.grad is None) == (key == "last_up.weight"), key
        if p.grad is not None:
            assert relative_error(p.grad, weights[key].grad) < 1e-12, key


def test_logits_on_the_kernels_equal_those_of_torchs_functions(device, triton_backend):
    model = shuffled(models.FCN8s(3, 2, width=0.01)).to(device).eval()
    x = torch.randn(1, 2, 9, 40, device=device)
    with torch.no_grad():
        assert relative_error(model(x).double(), plain_logits(model, x)[0]) < 2e-5


@pytest.mark.parametrize(
    ("name", "millions", "frozen"), [("fcn-32s", "136.153", 64), ("fcn-16s", "134.816", 32), ("fcn-8s", "134.490", 16)]
)
def test_parameter_counts_are_those_of_the_authors(name, millions, frozen):
    with torch.device("meta"):
        model = models.MODELS[name]()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions
    (kept,) = [p for p in model.parameters() if not p.requires_grad]
    assert kept.shape == (21, 21, frozen, frozen)


def test_map_sizes():
    """For a 500x500 image, and for the smallest images, whose crops must fit too."""
    model, sizes = models.FCN8s(3, width=0.01).eval(), []
    for layer in (*model.encoder, model.fc6[0], *model.ups, model.last_up):
        layer.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    with torch.device("meta"):
        model.to("meta")(torch.empty(1, 3, 500, 500))
    assert sizes == [349, 175, 88, 44, 22, 16, 34, 70, 568 - 2 * 31]
    for kind in (models.FCN32s, models.FCN16s, models.FCN8s):
        model = kind(3, width=0.01).to("meta").eval()
        for side in range(1, 66):
            assert model(torch.empty(1, 3, side, 66 - side, device="meta")).shape == (1, 3, side, 66 - side)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_transposed_convolutions_start_as_interpolation(factor):
    weight = bilinear_(torch.empty(2, 2, 2 * factor, 2 * factor, dtype=torch.float64))
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    large = F.conv_transpose2d(x, weight, stride=factor, padding=factor // 2)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    inside = (
        ...,
        slice(factor, -factor),
        slice(factor, -factor),
    )  # near the border, zeros from outside the image count
    assert torch.allclose(large[inside], expected[inside], rtol=0, atol=1e-14)
    odd = bilinear_(torch.empty(1, 1, 3, 3))
    assert torch.equal(odd[0, 0], torch.tensor([[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]))


def test_a_small_fcn_learns_two_classes():
    torch.manual_seed(0)
    model = models.FCN8sAtOnce(2, width=0.02).eval()  # without dropout
    x, labels = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64)
    x[..., 32:], labels[..., 32:] = 1.0, 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, losses = copy.deepcopy(model.last_up.weight), []
    for _ in range(17):
        losses.append(fastseg.functional.cross_entropy(model(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert abs(losses[0].item() - 0.6931) < 1e-4  # the scores start from 0
    assert losses[-1] < 0.15 and torch.equal(model.last_up.weight, before)


# --- VGG16's weights -------------------------------------------------------------------------------------------------


def classifier(channels=(8, 8, 8, 8, 8), hidden=40, norm=False):
    """A VGG16 with the names of torchvision's and fewer channels."""
    layers, inputs = [], 3
    for number, outputs in enumerate(channels):
        for _ in range(2 if number < 2 else 3):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *[nn.BatchNorm2d(outputs)] * norm, nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    dense = nn.Sequential(
        nn.Linear(49 * inputs, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()
    )
    return nn.ModuleDict({"features": nn.Sequential(*layers), "classifier": dense})


@pytest.mark.parametrize("norm", [False, True])
def test_fully_connected_layers_become_convolutions(norm):
    torch.manual_seed(0)
    vgg, model = classifier(norm=norm), models.FCN32s(2, width=0.01)
    models.load_vgg16(model, vgg.state_dict())
    map7 = torch.randn(2, 8, 7, 7)
    expected = vgg["classifier"].eval()(map7.flatten(1))
    assert torch.allclose(model.eval().fc7(model.fc6(map7)).flatten(1), expected, rtol=1e-5, atol=1e-6)
    theirs = [layer for layer in vgg["features"] if isinstance(layer, nn.Conv2d)]
    ours = [layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert len(ours) == 13
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize("name", ["segnet", "deconvnet", "fcn-8s"])
def test_every_network_with_the_encoder_of_vgg16_takes_its_weights(name):
    model = models.MODELS[name](width=0.01)
    hidden = model.fc6[0].out_channels if hasattr(model, "fc6") else 40
    vgg = classifier(hidden=hidden)
    models.load_vgg16(model, vgg.state_dict())
    first = next(m for m in model.encoder.modules() if isinstance(m, nn.Conv2d))
    assert torch.equal(first.weight, vgg["features"][0].weight)
    if hasattr(model, "fc6"):
        assert torch.equal(model.fc7[0].weight.flatten(1), vgg["classifier"][3].weight)


def test_weights_that_do_not_fit_raise_and_nothing_is_written():
    model = models.FCN32s(2, width=0.01)
    before = copy.deepcopy(model.state_dict())
    state = classifier().state_dict()
    with pytest.raises(ValueError, match=r"weights must be .* 13 convolutions under 'features\.', but there are 0"):
        models.load_vgg16(model, {})
    with pytest.raises(ValueError, match=r"must have 'classifier\.3\.bias' for FCN32s"):
        models.load_vgg16(model, {key: w for key, w in state.items() if key != "classifier.3.bias"})
    with pytest.raises(ValueError, match=r"classifier\.0\.weight must have shape \(40, 8, 7, 7\) for .* \(40, 8\)"):
        models.load_vgg16(model, state | {"classifier.0.weight": torch.ones(40, 8)})
    with pytest.raises(ValueError, match=r"model must have the 13 convolutions .*, but SegNetBasic has 4"):
        models.load_vgg16(models.SegNetBasic(width=0.1), state)
    assert all(torch.equal(before[key], w) for key, w in model.state_dict().items())
