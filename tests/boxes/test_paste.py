"""paste_boxes against torch's interpolate, box by box: enlarging, shrinking, edges, reductions, arguments."""

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional as FS

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
SIZE = (5, 35)
BOXES = [(0, 0, 35, 5), (-5, -3, 18, 9), (10, 3, 3, 1), (33, 2, 4, 9), (100, 100, 4, 4)]


def layers(maps):
    """Each map on its own canvas in float64, and which pixels it covers."""
    for one, (left, top, width, height) in zip(maps.double(), BOXES, strict=True):
        large = F.interpolate(one[None], (height, width), mode="bilinear", antialias=True)[0]
        canvas, inside = torch.zeros(len(one), *SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.bool)
        for y in range(max(top, 0), min(top + height, SIZE[0])):
            for x in range(max(left, 0), min(left + width, SIZE[1])):
                canvas[:, y, x], inside[y, x] = large[:, y - top, x - left], True
        yield canvas, inside


@BACKENDS
@pytest.mark.parametrize(
    "shape, dtype, layout",
    [
        ((5, 1, 1), torch.float32, torch.contiguous_format),
        ((2, 3, 7), torch.float16, torch.contiguous_format),
        ((2, 7, 4), torch.float32, torch.channels_last),
    ],
    ids=str,
)
def test_equals_resizing_each_map_and_reducing(shape, dtype, layout, backend, device):
    maps, weights = torch.randn(5, *shape, device=device).to(dtype), torch.rand(5, device=device)
    alone = list(layers(maps.cpu()))
    summed = sum(canvas for canvas, _ in alone)
    highest = torch.zeros_like(summed)
    for canvas, inside in alone:
        highest = torch.where(inside, torch.maximum(highest, canvas), highest)
    weighted = sum(canvas * weight for (canvas, _), weight in zip(alone, weights.cpu().double(), strict=True))
    maps = maps.contiguous(memory_format=layout)
    with fastseg.backend(backend):
        for reduce, factors, want in (
            ("max", None, highest), ("sum", None, summed), ("mean", None, summed / 5), ("sum", weights, weighted)
        ):  # fmt: skip
            found = FS.paste_boxes(maps, BOXES, SIZE, reduce, factors)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double().cpu(), want, rtol=1e-5, atol=2e-6)


@BACKENDS
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_batches_onto_an_earlier_canvas_give_the_same(reduce, backend, device):
    maps, boxes = torch.randn(5, 3, 3, 4, device=device), torch.tensor(BOXES, device=device)
    with fastseg.backend(backend):
        first = FS.paste_boxes(maps[:2], boxes[:2], SIZE, reduce)
        both = FS.paste_boxes(maps[2:], boxes[2:], SIZE, reduce, start=first)
        assert torch.equal(both, FS.paste_boxes(maps, boxes, SIZE, reduce))
        alone = FS.paste_boxes(maps[:0], boxes[:0], SIZE, reduce, start=first)
    assert torch.equal(alone, first) and not torch.equal(both, first)


@BACKENDS
def test_nan_and_infinity_stay_in_their_box(backend, device):
    maps = torch.tensor([torch.nan, torch.inf, 1.0], device=device).view(3, 1, 1, 1)
    with fastseg.backend(backend):
        found = FS.paste_boxes(maps, [(0, 0, 2, 1), (2, 0, 2, 1), (0, 0, 6, 1)], (1, 6))
    assert found[0, 0].isnan().tolist() == [True, True] + [False] * 4
    assert found[0, 0, 2:].tolist() == [torch.inf, torch.inf, 1.0, 1.0]


def test_float64_and_no_boxes_fall_back_to_torch():
    maps = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    want = sum(canvas for canvas, _ in layers(maps))
    torch.testing.assert_close(FS.paste_boxes(maps, BOXES, SIZE, "sum"), want)
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match=r"maps of dtype torch\.float64"):
        FS.paste_boxes(maps, BOXES, SIZE)
    assert not FS.paste_boxes(torch.zeros(0, 2, 4, 4), [], SIZE).any()


MAPS = torch.zeros(2, 3, 4, 5)
TWO = [(0, 0, 2, 2), (1, 1, 2, 2)]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: FS.paste_boxes(MAPS[0], TWO, 4), ValueError, r"\(B, K, h, w\).* shape \(3, 4, 5\)"),
        (lambda: FS.paste_boxes(MAPS, TWO[:1], 4), ValueError, r"shape \(2, 4\), one for each map, but has \(1, 4\)"),
        (
            lambda: FS.paste_boxes(MAPS, torch.rand(2, 4), 4),
            TypeError,
            "whole numbers of pixels, but is of torch.float32",
        ),
        (lambda: FS.paste_boxes(MAPS, [(0, 0, 2, 2), (0, 0, 0, 2)], 4), ValueError, r"box 1 is \(0, 0, 0, 2\)"),
        (lambda: FS.paste_boxes(MAPS, [(2**30, 0, 2, 2), TWO[0]], 4), ValueError, "within 1048576, but box 0"),
        (lambda: FS.paste_boxes(MAPS, [(float("nan"), 0, 2, 2), TWO[0]], 4), TypeError, "whole numbers"),
        (lambda: FS.paste_boxes(MAPS, TWO, 4, "median"), ValueError, "max, mean, sum, but is 'median'"),
        (lambda: FS.paste_boxes(MAPS, TWO, 4, "max", torch.ones(2)), ValueError, "weights must .* for reduce 'max'"),
        (lambda: FS.paste_boxes(MAPS, TWO, 4, "sum", torch.ones(3)), ValueError, r"weights must have shape \(2,\)"),
        (lambda: FS.paste_boxes(MAPS, TWO, 4, start=MAPS[0]), ValueError, r"start must have shape \(3, 4, 4\)"),
        (lambda: FS.paste_boxes(MAPS, TWO, 0), RuntimeError, "size must be at least 1"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
