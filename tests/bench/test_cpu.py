"""Results and memory of fastseg's functions on a CPU without a C++ compiler, compared with torch's."""

import pytest
import torch
import torch.nn.functional as F

from fastseg import functional as FS
from fastseg.ops.losses import chunked_reference as chunks
from fastseg.ops.losses import upsample_cross_entropy
from fastseg.torch_internals import TorchDispatchMode

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors"),
    pytest.mark.usefixtures("no_cpu_kernels"),
]


class Outputs(TorchDispatchMode):
    """Counts the bytes of the tensors that operators allocate; views allocate none."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        seen = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for y in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(y, torch.Tensor) and y.untyped_storage().data_ptr() not in seen:
                self.made += y.nbytes
        return result


def made(function, *leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    with Outputs() as outputs:
        function(*leaves).backward()
    return outputs.made


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("classes", [1, 6, 8])
def test_upsample_cross_entropy_of_few_classes_allocates_as_much_as_torch(classes, mode):
    x, target = (
        torch.randn(2, classes, 5, 6),
        torch.randint(classes, (2, 40, 48)).masked_fill(torch.rand(2, 40, 48) < 0.2, 255),
    )
    theirs = made(lambda x: F.cross_entropy(F.interpolate(x, (40, 48), mode=mode), target, ignore_index=255), x)
    ours = made(lambda x: FS.upsample_cross_entropy(x, target, mode=mode, ignore_index=255), x)
    assert theirs <= ours <= theirs + 3 * x.nbytes + 64


def test_linear_cross_entropy_of_few_classes_allocates_as_much_as_torch():
    x, weight, target = torch.randn(2, 16, 20, 20), torch.randn(8, 16), torch.randint(8, (2, 20, 20))
    theirs = made(lambda x, w: F.cross_entropy(F.conv2d(x, w[:, :, None, None]), target), x, weight)
    ours = made(lambda x, w: FS.linear_cross_entropy(x, w, target), x, weight)
    assert theirs <= ours <= theirs + 64
    chunked = FS.linear_cross_entropy(x, weight, target, chunk=7)
    torch.testing.assert_close(FS.linear_cross_entropy(x, weight, target), chunked)


def test_z_loss_sums_without_a_loss_for_each_pixel():
    x, target = torch.randn(2, 3, 30, 40), torch.randint(3, (2, 30, 40))
    each = made(lambda x: FS.cross_entropy(x, target, z_loss=0.1, reduction="none").mean(), x)
    assert made(lambda x: FS.cross_entropy(x, target, z_loss=0.1), x) < each


@pytest.mark.parametrize("ignore_index", [None, 255, 4, -1])
@pytest.mark.parametrize("stray", [4, -1, 255])
def test_confusion_matrix_raises_for_labels_out_of_range(stray, ignore_index):
    """Ignored pixels are counted as class 4 internally."""
    target = torch.tensor([0, 3, stray, 1])
    if stray == ignore_index:
        assert FS.confusion_matrix(target.clamp(0, 3), target, 4, ignore_index).sum() == 3
        return
    if ignore_index is not None:
        target[0] = ignore_index
    with pytest.raises(ValueError, match="target must hold labels from 0 to 3"):
        FS.confusion_matrix(target.clamp(0, 3), target, 4, ignore_index)


GEOMETRIES = [  # image, kernel, stride, padding, dilation
    ((7, 9), (2, 2), (2, 2), (0, 0), (1, 1)),
    ((8, 5), (3, 2), (1, 3), (1, 1), (1, 1)),
    ((9, 11), (3, 3), (2, 2), (1, 1), (2, 3)),
    ((40, 2), (16, 3), (16, 2), (8, 1), (1, 1)),  # a window wider than the image
]


@pytest.mark.parametrize("size, kernel, stride, padding, dilation", GEOMETRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_offsets_and_indices_are_equivalent(layout, size, kernel, stride, padding, dilation):
    x = torch.randn(2, 3, *size).contiguous(memory_format=layout)
    geometry = (kernel, stride, padding)
    y, indices = F.max_pool2d(x, *geometry, dilation, ceil_mode=True, return_indices=True)
    pooled, offsets = FS.max_pool2d_with_offsets(x, *geometry, dilation, ceil_mode=True)
    rows, columns = (torch.arange(n) * s - p for n, s, p in zip(y.shape[-2:], stride, padding, strict=True))
    i, j = (indices // size[1] - rows[:, None]) // dilation[0], (indices % size[1] - columns) // dilation[1]
    assert torch.equal(offsets, (i * kernel[1] + j).byte()) and torch.equal(pooled, y)
    assert torch.equal(FS.offsets_to_indices(offsets, *geometry, size[1], dilation), indices)
    assert offsets.stride() == indices.stride() == pooled.stride()


def test_a_plane_of_more_than_two_to_the_31():
    """One window, far to the right in the second row; the plane itself is not allocated."""
    width = 2**31 + 5
    offsets = torch.tensor([[[[3]]]], dtype=torch.uint8)
    assert FS.offsets_to_indices(offsets, 2, 2, 0, width).item() == width + 1


@pytest.mark.parametrize("place", [(0, 0, 1, 0), (0, 1, 0, 2), (0, 1, 1, 1)])
@pytest.mark.parametrize("padding", [0, 1])
def test_offsets_outside_the_image_raise(place, padding):
    """Windows at the last row and column of the 3 x 5 image lie partly outside; with padding the first ones too."""
    x = torch.randn(1, 2, 3, 5)
    y, offsets = FS.max_pool2d_with_offsets(x, 2, 2, padding, ceil_mode=True)
    FS.max_unpool2d_with_offsets(y, offsets, 2, 2, padding, (3, 5))
    outside = 0 if padding and (place[2] == 0 or place[3] == 0) else 3
    offsets[place] = 4 if place == (0, 1, 1, 1) else outside
    with pytest.raises(
        RuntimeError, match=rf"invalid max offset: {offsets[place]} at \({', '.join(map(str, place))}\)"
    ):
        FS.max_unpool2d_with_offsets(y, offsets, 2, 2, padding, (3, 5))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.2}, {"z_loss": 0.1, "normalization": "valid"}, {"reduction": "sum"}], ids=str
)
def test_the_loss_of_resized_logits_computes_its_gradient_in_the_forward(options, mode, layout, monkeypatch):
    """With many classes the logits are resized once, chunk by chunk, and the forward computes the gradient."""
    monkeypatch.setattr(chunks, "ELEMENTS", 5000)  # several chunks
    calls = []
    monkeypatch.setattr(upsample_cross_entropy, "UPSAMPLE_CROSS_ENTROPY_BACKWARD", lambda *call: calls.append(call))
    classes = 33
    x = torch.randn(2, classes, 4, 5).contiguous(memory_format=layout).requires_grad_()
    target = torch.randint(classes, (2, 13, 11)).masked_fill(torch.rand(2, 13, 11) < 0.2, 255)
    weight = torch.rand(classes) + 0.5
    exact = x.detach().double().requires_grad_()
    loss = FS.upsample_cross_entropy(x, target, weight, mode=mode, ignore_index=255, **options)
    found = FS.upsample_cross_entropy_with_predictions(x, target, weight, mode=mode, ignore_index=255, **options)
    large = F.interpolate(exact, (13, 11), mode=mode)
    want = FS.cross_entropy(large, target, weight.double(), ignore_index=255, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert (found.prediction == large.argmax(1)).float().mean() > 0.98 and torch.equal(found.loss, loss)
    for factor in (1.0, -3.0):  # the same graph twice
        (got,) = torch.autograd.grad(factor * loss, x, retain_graph=True)
        (theirs,) = torch.autograd.grad(factor * want, exact, retain_graph=True)
        torch.testing.assert_close(got.double(), theirs, rtol=1e-4, atol=1e-5)
        assert got.stride() == x.stride()
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, x)[0], torch.autograd.grad(loss, x, retain_graph=True)[0]
    )
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (twice,) = torch.autograd.grad(torch.autograd.grad(want, exact, create_graph=True)[0].square().sum(), exact)
    torch.testing.assert_close(torch.autograd.grad(first.square().sum(), x)[0].double(), twice, rtol=1e-3, atol=1e-6)
    assert not calls
