"""mean_field_message against a loop over the pixels in float64: values, gradients, arguments, compilation."""

import pytest
import torch
from support.crf_common import BACKENDS, brute_force, picture

import fastseg
from fastseg import functional as FS
from fastseg.ops.crf.message import MEAN_FIELD_MESSAGE, Neighbourhood

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize(
    "shape, sigma, sigma_color, radius",
    [
        ((2, 5, 9, 21), 2.0, 25.0, 3.0),
        ((1, 35, 5, 19), 1.3, None, 2.5),
        ((1, 2, 11, 18), 20.0, 3.0, None),
        ((1, 1, 1, 1), 3.0, 10.0, 3.0),
    ],
    ids=str,
)
def test_messages_differ_from_brute_force_by_at_most_1e_5(shape, sigma, sigma_color, radius, layout, backend, device):
    values = torch.randn(shape, device=device).contiguous(memory_format=layout)
    image = None if sigma_color is None else picture(shape[0], 3, *shape[2:], device=device)
    with fastseg.backend(backend):
        found = FS.mean_field_message(values, image, sigma, sigma_color or 1.0, radius)
    truth = brute_force(values, image, sigma, sigma_color or 1.0, radius)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=layout)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


@BACKENDS
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_without_a_pixels_own_value(channels, backend, device):
    """The own weight, which is 1, is left out, not subtracted: isolated pixels hear exactly nothing."""
    values, image = torch.rand(1, 3, 6, 17, device=device), picture(1, channels, 6, 17, device=device)
    with fastseg.backend(backend):
        found = FS.mean_field_message(values, image, 2.0, 25.0, self_term=False)
        alone = FS.mean_field_message(values, image, 0.1, 25.0, self_term=False)
    truth = brute_force(values, image, 2.0, 25.0, 3.0) - values
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert not alone.any()


@BACKENDS
def test_the_limit_of_the_distance_is_exact(backend, device):
    """A pixel at 5 = |(3, 4)| hears one at the origin for radius * sigma = 5, and not for a little less."""
    values = torch.zeros(1, 1, 6, 6, device=device)
    values[0, 0, 0, 0] = 1
    with fastseg.backend(backend):
        inside, outside = (FS.mean_field_message(values, sigma=2.0, radius=radius) for radius in (2.5, 2.4999))
    assert inside[0, 0, 3, 4] == inside[0, 0, 0, 5] > 0 == outside[0, 0, 3, 4] == outside[0, 0, 0, 5]
    assert inside[0, 0, 4, 4] == 0 < outside[0, 0, 2, 4]


@BACKENDS
def test_gradients_are_messages(backend, device):
    values, image = torch.randn(1, 3, 5, 17, device=device, requires_grad=True), picture(1, 3, 5, 17, device=device)
    grad = torch.randn_like(values)
    with fastseg.backend(backend):
        found = FS.mean_field_message(values, image, 1.5, 25.0)
        (first,) = torch.autograd.grad(found, values, grad, create_graph=True)
        assert torch.equal(first, FS.mean_field_message(grad, image, 1.5, 25.0))
    assert not first.requires_grad  # linear: the gradient does not depend on the values


def test_derivatives_of_every_kind():
    image = picture(1, 3, 4, 5)

    def message(x):
        return FS.mean_field_message(x, image, 1.5, 40.0, None)

    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(message, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: message(x * x), x)
    stacked = torch.randn(3, 1, 2, 4, 5)
    one_by_one = torch.stack([message(x) for x in stacked])
    assert torch.equal(torch.func.vmap(message)(stacked), one_by_one)


def test_registration():
    neighbourhood = Neighbourhood(1.5, 20, True)
    for colours in (None, torch.rand(1, 3, 4, 5)):
        args = MEAN_FIELD_MESSAGE.flatten((torch.randn(1, 2, 4, 5), colours, neighbourhood))
        torch.library.opcheck(MEAN_FIELD_MESSAGE.op, args)


def test_compiles_without_a_graph_break():
    values, image = torch.randn(1, 2, 6, 7), picture(1, 3, 6, 7)
    compiled = torch.compile(lambda x: FS.mean_field_message(x, image, 2.0, 20.0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(values), FS.mean_field_message(values, image, 2.0, 20.0))


@BACKENDS
def test_empty(backend, device):
    with fastseg.backend(backend):
        for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (1, 2, 0, 5)):
            assert FS.mean_field_message(torch.zeros(shape, device=device)).shape == shape


def test_what_the_kernels_do_not_support_falls_back_to_torch():
    values, image = torch.rand(1, 2, 3, 4), picture(1, 5, 3, 4)
    (choice,) = fastseg.explain(FS.mean_field_message, values, image)
    assert choice.backend == "torch" and "images of 5 channels" in choice.reason
    truth = brute_force(values, image, 3.0, 30.0, 3.0)
    assert (FS.mean_field_message(values, image, 3.0, 30.0) - truth).abs().max() < 1e-5
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match=r"values of dtype torch\.float64"):
        FS.mean_field_message(values.double())
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="16384 pixels"):
        FS.mean_field_message(torch.zeros(1, 1, 1, 2**14 + 1))


VALUES, IMAGE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 3, 4)


@pytest.mark.parametrize(
    "args, error, words",
    [
        (([1.0],), TypeError, "values must be a Tensor"),
        ((torch.zeros(2, 3, 4),), ValueError, r"\(N, K, H, W\), but has shape \(2, 3, 4\)"),
        ((VALUES.long(),), TypeError, "floating-point, but is of torch.int64"),
        ((VALUES, torch.zeros(1, 3, 4, 3)), ValueError, r"\(1, channels, 3, 4\).* but has shape \(1, 3, 4, 3\)"),
        ((VALUES, IMAGE.long()), TypeError, "uint8 or floating-point, but is of torch.int64"),
        ((VALUES, torch.zeros(1, 3, 3, 4, requires_grad=True)), NotImplementedError, "detach it"),
        ((VALUES, IMAGE, 0.0), ValueError, "sigma must be a positive number, but is 0.0"),
        ((VALUES, IMAGE, 1.0, float("nan")), ValueError, "sigma_color must be a positive number"),
        ((VALUES, IMAGE, 1.0, 1.0, -1), ValueError, "radius must be a positive number"),
        ((VALUES, IMAGE.to("meta")), ValueError, "on the device of values, cpu, but is on meta"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_bad_arguments(args, error, words):
    with pytest.raises(error, match=words):
        FS.mean_field_message(*args)
