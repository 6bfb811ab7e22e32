import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.training import tiles
from fastseg.training.pictures import to_tensor
from fastseg.training.tiles import TileOptions

SHAPES = [((50, 70), (16, 24)), ((16, 30), (16, 16)), ((9, 7), (16, 16)), ((33, 40), (33, 11))]
"""(height, width) of pictures and of tiles."""


def blended(network, pixels, options):
    """The labels by the formula, with the scores of the whole picture in memory."""
    height, width = pixels.shape[:2]
    side, across = min(options.size[0], height), min(options.size[1], width)
    total = 0
    for top in tiles.tile_starts(height, side, options.overlap):
        for left in tiles.tile_starts(width, across, options.overlap):
            scores = network(to_tensor(pixels[top : top + side, left : left + across])[None])
            scores = F.interpolate(scores.double(), (side, across), mode="bilinear")[0]
            ramps = []
            for n in (side, across):
                edge = torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) + 1.0
                ramps.append((edge / (n * options.overlap + 1)).clamp(max=1))
            padding = (left, width - left - across, top, height - top - side)
            total = total + F.pad(scores * ramps[0][:, None] * ramps[1], padding)
    return total.argmax(0).numpy()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("shape, size", SHAPES)
def test_tiles_are_blended_as_the_formula_says(shape, size, overlap):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 5, padding=2), torch.nn.MaxPool2d(2, ceil_mode=True))
    options = TileOptions(size, overlap, batch_size=3)
    with torch.no_grad():
        want = blended(network, pixels, options)
    found = tiles.tiled_labels(network, pixels, options)
    assert found.dtype == np.uint8 and (found == want).mean() > 0.999 and len(np.unique(found)) > 1


def test_a_network_that_sees_single_pixels_gives_the_same_in_tiles():
    pixels = np.random.default_rng(1).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    network = torch.nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        whole = network(to_tensor(pixels)[None])[0].argmax(0).numpy()
    assert (tiles.tiled_labels(network, pixels, TileOptions((16, 16))) == whole).mean() > 0.999


def test_memory_holds_the_scores_of_one_row_of_tiles():
    largest = []

    def network(images):
        return images

    zeros = torch.Tensor.new_zeros

    def watched(tensor, *shape, **options):
        largest.append(shape)
        return zeros(tensor, *shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", watched)
        tiles.tiled_labels(network, np.zeros((400, 20, 3), np.uint8), TileOptions((16, 16)))
    assert largest == [(3, 16, 20)]


def test_tiles_cover_the_picture_and_overlap():
    for length, side, overlap in ((100, 40, 0.25), (41, 40, 0.0), (1000, 7, 0.5), (5, 5, 0.5), (3, 1, 0.5)):
        starts = tiles.tile_starts(length, side, overlap)
        assert starts[0] == 0 and starts[-1] == length - side
        steps = np.diff(starts)
        assert (steps <= max(1, side * (1 - overlap) + 1)).all() and (steps > 0).all()


@pytest.mark.parametrize("wrong", [{"size": (0, 5)}, {"batch_size": 0}, {"overlap": 0.6}, {"overlap": -0.1}])
def test_invalid_tiles_raise(wrong):
    with pytest.raises(ValueError, match="must be"):
        TileOptions(**wrong)
