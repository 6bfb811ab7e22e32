"""Instance-wise prediction: scores of object proposals, and which proposals are used."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fastseg.training.instance_wise import (
    Box,
    InstanceOptions,
    ensemble,
    instance_scores,
    read_boxes,
    select_boxes,
    sliding_windows,
)

INSIDE, BEYOND, SMALL = Box(3, 2, 20, 12), Box(-4, 6, 16, 30), Box(5, 5, 40, 7)


def network(images):
    """Scores of two classes, each pixel from its three channels; some are below 0."""
    return torch.stack([images[:, 0] - images[:, 1], 2 * images[:, 2] - 1], 1)


def expected(image, boxes, size, combine):
    """The scores computed box by box in a map that extends beyond the image, where pixels are black."""
    margin, (height, width) = 64, image.shape[-2:]
    large = torch.zeros(3, height + 2 * margin, width + 2 * margin)
    large[:, margin : margin + height, margin : margin + width] = image
    maps = []
    for x, y, w, h in boxes:
        cut = large[:, y + margin : y + h + margin, x + margin : x + w + margin]
        found = network(F.interpolate(cut[None], size, mode="bilinear", antialias=True))
        own = torch.zeros(2, *large.shape[1:])
        own[:, y + margin : y + h + margin, x + margin : x + w + margin] = F.interpolate(
            found, (h, w), mode="bilinear", antialias=True
        )[0]
        maps.append(own)
    together = torch.stack(maps).amax(0).clamp(min=0) if combine == "max" else torch.stack(maps).mean(0)
    return together[:, margin : margin + height, margin : margin + width]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("combine", ["max", "mean"])
def test_scores_equal_those_computed_box_by_box(combine, batch_size, device):
    image = torch.rand(3, 24, 32, device=device)
    boxes = [INSIDE, SMALL, BEYOND, Box(0, 0, 32, 24)]
    found = instance_scores(network, image, boxes, InstanceOptions((16, 24), combine, 8, batch_size=batch_size))
    want = expected(image.cpu(), [INSIDE, BEYOND, boxes[3]], (16, 24), combine)
    assert found.shape == (2, 24, 32) and torch.allclose(found.cpu(), want, atol=1e-6)


def test_a_pixel_in_no_box_has_the_score_0():
    """A proposal of the network's input size is not resized."""
    image = torch.rand(3, 24, 32)
    found = instance_scores(network, image, [INSIDE], InstanceOptions((12, 20), min_side=1))
    want = torch.zeros(2, 24, 32)
    want[:, 2:14, 3:23] = network(image[None])[0, :, 2:14, 3:23].clamp(min=0)
    assert torch.allclose(found, want, atol=1e-6)
    first = instance_scores(network, image, [BEYOND, INSIDE], InstanceOptions((12, 20), min_side=1, max_boxes=1))
    assert torch.equal(first[:, :6], want[:, :6] * 0)


def test_large_boxes_over_the_image_are_selected():
    outside = [Box(80, 0, 9, 9), Box(0, 60, 9, 9), Box(-9, 0, 9, 9), Box(0, -9, 9, 9)]
    edges = [Box(79, 0, 9, 9), Box(0, 59, 9, 9), Box(-8, 0, 9, 9), Box(0, -8, 9, 9)]
    assert select_boxes([*outside, *edges, Box(0, 0, 8, 60)], 60, 80, 9) == edges
    assert select_boxes([*outside, *edges], 60, 80, 9, max_boxes=2) == edges[:2]
    assert select_boxes([(-80, -60, 240, 180)], 60, 80) == [Box(-80, -60, 240, 180)]
    for box in ((-81, 0, 200, 200), (0, -61, 200, 200), (0, 0, 161, 120), (0, 0, 10**9, 10**9)):
        with pytest.raises(ValueError, match=r"beyond the image by more than its own 80x60, but one is \("):
            select_boxes([box], 60, 80)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"combine": "sum"}, "combine must be one of max, mean, but is 'sum'"),
        ({"min_side": 0}, "min_side must be at least 1, but is 0"),
        ({"max_boxes": -1}, "max_boxes must be at least 1, but is -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"size": (0, 5)}, "size must be at least 1, but is 0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        InstanceOptions(**options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "shorter side of at least 112, but none of 2 does"),
        ({"boxes": []}, "but none of 0 does"),
        ({"boxes": [(0, 0, 0, 4)]}, "at least 1 pixel wide and high"),
        ({"image": torch.zeros(1, 3, 4, 4)}, r"image must be \(C, H, W\), but has shape \(1, 3, 4, 4\)"),
        (
            {"network": lambda x: x[:1, 0], "options": InstanceOptions(min_side=1)},
            r"network must return \(2, K, H, W\), but returned \(1, 224, 224\)",
        ),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    usual = {"network": network, "image": torch.rand(3, 24, 32), "boxes": [INSIDE, SMALL]}
    with pytest.raises(ValueError, match=message):
        instance_scores(**usual | arguments)


def test_the_scores_of_two_networks_are_combined():
    fcn, deconvnet = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -4.0])
    assert torch.equal(ensemble(fcn, deconvnet), torch.tensor([0.0, -8.0]))
    assert torch.equal(ensemble(fcn, deconvnet, "paper"), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="mode must be one of code, paper, but is 'both'"):
        ensemble(fcn, deconvnet, "both")
    with pytest.raises(ValueError, match=r"must have the same shape, but have \(2,\) and \(1,\)"):
        ensemble(fcn, deconvnet[:1])


SIDES = {
    (360, 480): [360, 180],
    (500, 333): [333, 166],
    (224, 224): [112],
    (480, 640): [480, 240],
    (1080, 1920): [1080, 540],
}


@pytest.mark.parametrize("size", SIDES)
def test_sliding_windows_cover_the_image(size):
    found = sliding_windows(*size)
    assert found[0] == (0, 0, size[1], size[0]) and len(set(found)) == len(found) <= 50
    assert select_boxes(found, *size) == found
    squares = [box for box in found[1:] if box != found[0]]
    assert sorted({box.height for box in squares}, reverse=True) == SIDES[size]
    for side in SIDES[size]:
        boxes = [box for box in squares if box.height == box.width == side]
        for axis, length in ((0, size[1]), (1, size[0])):
            starts = sorted({box[axis] for box in boxes})
            assert starts[0] == 0 and starts[-1] == length - side
            assert all(b - a <= side / 2 + 1 for a, b in pairwise(starts))
    assert len(sliding_windows(1080, 1920, max_boxes=1000)) == 1 + 3 + 3 * 7 + 7 * 14 + 15 * 28
    assert sliding_windows(1080, 1920, 2, 1) == [(0, 0, 1920, 1080)]
    with pytest.raises(ValueError, match="min_side must be at least 1, but is 0"):
        sliding_windows(*size, 0)


def test_boxes_are_read_from_a_file(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("1,2,30,40\n\n-3 4.6 50 60 0.93\n", encoding="utf-8-sig")  # as Excel writes it
    assert read_boxes(path) == [(1, 2, 30, 40), (-3, 5, 50, 60)]
    for line, message in (
        ("left,top", "must be left, top, width"),
        ("1 2 3", "must be left"),
        ("1 2 3 0", "at least 1"),
        ("1 2 nan 3", "must be left"),
    ):
        path.write_text(f"1,2,30,40\n{line}\n")
        with pytest.raises(ValueError, match=f"line 2, .*{message}"):
            read_boxes(path)
    for content, message in ((b"\n", "must contain boxes, but is empty"), (b"\xff\xfe1", "must be a UTF-8 text file")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"boxes.csv {message}"):
            read_boxes(path)


def test_the_largest_boxes_come_first_and_each_canvas_is_at_least_the_one_before(device):
    image, seen = torch.rand(3, 24, 32, device=device), []
    boxes = [INSIDE, Box(0, 0, 32, 24), BEYOND, Box(2, 2, 12, 12)]
    by_size = sorted(boxes, key=lambda box: -box.width * box.height)
    options = InstanceOptions((16, 24), "max", 8, batch_size=1, order="size")
    found = instance_scores(network, image, boxes, options, watch=lambda *seen_now: seen.append(seen_now))
    assert torch.equal(found, instance_scores(network, image, by_size, InstanceOptions((16, 24), "max", 8)))
    assert [count for count, _ in seen] == [1, 2, 3, 4] and torch.equal(seen[-1][1], found)
    assert all((later >= earlier).all() for (_, earlier), (_, later) in pairwise(seen))
    two = InstanceOptions((16, 24), "max", 8, max_boxes=2, order="size")
    assert torch.equal(instance_scores(network, image, boxes, two), seen[1][1])
    with pytest.raises(ValueError, match="order must be one of given, size, but is 'random'"):
        InstanceOptions(order="random")
