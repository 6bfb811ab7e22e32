"""upsample_argmax, and the arguments of resizing."""

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import BACKENDS, LAYOUTS, QUIET

import fastseg
from fastseg import functional as FS
from fastseg.ops.losses import resizing
from fastseg.ops.losses.row_chunks import RowChunks

pytestmark = QUIET


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize(
    "shape, way",
    [
        ((2, 7, 3, 4), {"size": (12, 35)}),
        ((1, 21, 5, 4), {"size": (9, 6), "align_corners": True}),
        ((1, 5, 7, 5), {"scale_factor": 0.6}),
        ((1, 3, 4, 5), {"scale_factor": (1.7, 2.2), "mode": "nearest"}),
        ((2, 1, 2, 2), {"size": 3}),
    ],
    ids=str,
)
def test_upsample_argmax_labels_a_largest_value(shape, way, layout, backend, device):
    x = torch.randn(shape, device=device).mul(2).bfloat16().contiguous(memory_format=layout)
    with fastseg.backend(backend):
        labels, share = FS.upsample_argmax(x, return_probability=True, **way)
        assert torch.equal(FS.upsample_argmax(x, dtype=torch.int64, **way), labels.long())
    large = F.interpolate(x.double(), **{"mode": "bilinear"} | way)
    assert labels.dtype == torch.uint8 and labels.shape == (shape[0], *large.shape[2:]) and share.dtype == torch.float32
    chosen = large.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, large.amax(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(share.double(), large.softmax(1).amax(1), rtol=1e-4, atol=1e-6)


@BACKENDS
def test_upsample_argmax_takes_the_first_of_equal_values_and_nan_before_all(backend, device):
    x = torch.zeros(1, 6, 1, 5, device=device)
    x[0, :, 0, 0] = torch.tensor([1.0, 2, 2, 0, 2, 1])
    x[0, 3, 0, 1], x[0, 4, 0, 1], x[0, 1, 0, 1] = torch.nan, torch.nan, torch.inf
    x[0, :, 0, 2] = -torch.inf
    x[0, 5, 0, 3] = torch.inf
    with fastseg.backend(backend):
        labels = FS.upsample_argmax(x, size=(1, 5), mode="nearest")
    assert torch.equal(labels.long(), x.argmax(1)) and labels.tolist() == [[[1, 3, 0, 5, 0]]]


def test_upsample_argmax_bad_arguments():
    x = torch.zeros(1, 300, 2, 2)
    with pytest.raises(ValueError, match="hold 300 classes"):
        FS.upsample_argmax(x, 4)
    assert FS.upsample_argmax(x, 4, dtype=torch.int16).dtype == torch.int16
    with pytest.raises(ValueError, match=r"torch\.float32"):
        FS.upsample_argmax(x, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="either size or scale_factor"):
        FS.upsample_argmax(x)
    with pytest.raises(TypeError, match="input must be a Tensor"):
        FS.upsample_argmax([1.0], 4)


@BACKENDS
def test_upsample_argmax_is_an_operator(backend, device):
    call = (torch.randn(1, 3, 2, 3, device=device), [4, 5], None, "bilinear", True, torch.uint8, True)
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.upsample_argmax.default, call)
        compiled = torch.compile(lambda x: FS.upsample_argmax(x * 1, (4, 5)), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(call[0]), FS.upsample_argmax(call[0], (4, 5)))


def test_sizes_and_taps_are_those_of_interpolate(device):
    """For several sides and factors: the output size, and the source position of each row."""
    for scale in (0.3, 0.5, 1.0, 1.3, 2.0, 2.7, 8):
        for short in (4, 7, 10):
            x = torch.arange(float(short)).view(1, 1, 1, short)
            for mode in resizing.MODES:
                want = F.interpolate(x.expand(1, 1, short, short), scale_factor=scale, mode=mode)
                arguments = resizing.ResizingArguments(None, scale, mode, None, None)
                size, how = resizing.check_resizing("f", want.new_empty(1, 1, short, short), arguments)
                assert tuple(size) == want.shape[2:]
                chunks = RowChunks.of(x.expand(1, 1, short, short), size, how)
                positions = (chunks.taps * chunks.weights).sum(0)
                torch.testing.assert_close(positions.float(), want[0, 0, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "factor, function",
    [
        (4, lambda x, y: FS.upsample_argmax(x, scale_factor=4)),
        (3, lambda x, y: FS.upsample_cross_entropy(x, y)),
        (4, lambda x, y: FS.upsample_cross_entropy(x, y, scale_factor=4.0)),
        (4, lambda x, y: FS.confusion_matrix(x, y)),
    ],
    ids=["argmax", "target", "scale", "confusion"],
)
def test_an_export_with_dynamic_sizes_runs_on_other_sizes(factor, function):
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return function(x, y)

    def inputs(n, h, w):
        return torch.randn(n, 5, h, w), torch.randint(5, (n, h * factor, w * factor))

    auto = torch.export.Dim.AUTO
    sizes = {"x": {0: auto, 2: auto, 3: auto}, "y": {0: auto, 1: auto, 2: auto}}
    exported = torch.export.export(Module(), inputs(2, 4, 6), dynamic_shapes=sizes).module()
    other = inputs(3, 7, 5)  # also higher than wide
    torch.testing.assert_close(exported(*other), function(*other))


@pytest.mark.parametrize(
    "shape, factors", [((1, 33, 2, 2), 1.3), ((1, 7, 3, 5), (1.3, 2.0)), ((2, 6, 4, 3), (2.0, 1.3))]
)
def test_scale_factors_that_do_not_change_a_side(shape, factors):
    """torch's CPU code copies a side whose size does not change."""
    x = torch.randn(shape)
    large = F.interpolate(x, scale_factor=factors, mode="bilinear")
    target = torch.randint(shape[1], (shape[0], *large.shape[2:]))
    ours = FS.upsample_cross_entropy(x, target, scale_factor=factors)
    torch.testing.assert_close(ours, F.cross_entropy(large, target))
    assert torch.equal(FS.upsample_argmax(x, scale_factor=factors).long(), large.argmax(1))
