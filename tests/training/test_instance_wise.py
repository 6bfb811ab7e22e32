"""Scores of object proposals, put together."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.commands import cli, train
from fastseg.commands import segment as predict
from fastseg.training import checkpoint, data
from fastseg.training.instance_wise import COMBINE, Box, ensemble, instance_scores, read_boxes, taken, windows

INSIDE, BEYOND, SMALL = Box(3, 2, 20, 12), Box(-4, 6, 16, 30), Box(5, 5, 40, 7)


def network(images):
    """Two classes from three channels, from each pixel alone; some scores below 0."""
    return torch.stack([images[:, 0] - images[:, 1], 2 * images[:, 2] - 1], 1)


def expected(image, boxes, size, combine):
    """One box after another into a large map, pixels beyond the picture black."""
    room, (height, width) = 64, image.shape[-2:]
    large = torch.zeros(3, height + 2 * room, width + 2 * room)
    large[:, room : room + height, room : room + width] = image
    maps = []
    for x, y, w, h in boxes:
        cut = large[:, y + room : y + h + room, x + room : x + w + room]
        found = network(F.interpolate(cut[None], size, mode="bilinear", antialias=True))
        own = torch.zeros(2, *large.shape[1:])
        own[:, y + room : y + h + room, x + room : x + w + room] = F.interpolate(found, (h, w), mode="bilinear")[0]
        maps.append(own)
    together = torch.stack(maps).amax(0).clamp(min=0) if combine == "max" else torch.stack(maps).mean(0)
    return together[:, room : room + height, room : room + width]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("combine", ["max", "mean"])
def test_scores(combine, batch_size, device):
    image = torch.rand(3, 24, 32, device=device)
    boxes = [INSIDE, SMALL, BEYOND, Box(0, 0, 32, 24)]
    found = instance_scores(network, image, boxes, (16, 24), combine, least=8, batch_size=batch_size)
    want = expected(image.cpu(), [INSIDE, BEYOND, boxes[3]], (16, 24), combine)
    assert found.shape == (2, 24, 32) and torch.allclose(found.cpu(), want, atol=1e-6)


def test_no_box_no_score():
    """Of a proposal at the network's own size nothing is stretched, and outside of it nothing is known."""
    image = torch.rand(3, 24, 32)
    found = instance_scores(network, image, [INSIDE], (12, 20), least=1)
    want = torch.zeros(2, 24, 32)
    want[:, 2:14, 3:23] = network(image[None])[0, :, 2:14, 3:23].clamp(min=0)
    assert torch.allclose(found, want, atol=1e-6)
    assert torch.equal(
        instance_scores(network, image, [BEYOND, INSIDE], (12, 20), least=1, most=1)[:, :6], want[:, :6] * 0
    )


def test_which_boxes_are_taken():
    beside = [Box(80, 0, 9, 9), Box(0, 60, 9, 9), Box(-9, 0, 9, 9), Box(0, -9, 9, 9)]
    edges = [Box(79, 0, 9, 9), Box(0, 59, 9, 9), Box(-8, 0, 9, 9), Box(0, -8, 9, 9)]
    assert taken([*beside, *edges, Box(0, 0, 8, 60)], 60, 80, 9) == edges
    assert taken([*beside, *edges], 60, 80, 9, most=2) == edges[:2]
    assert taken([(-80, -60, 240, 180)], 60, 80) == [Box(-80, -60, 240, 180)]
    for box in ((-81, 0, 200, 200), (0, -61, 200, 200), (0, 0, 161, 120), (0, 0, 10**9, 10**9)):
        with pytest.raises(ValueError, match=r"beyond the picture by more than its own 80x60, but there is \("):
            taken([box], 60, 80)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"combine": "sum"}, "combine must be one of max, mean, not 'sum'"),
        ({}, "shorter side of at least 112, but of 2 none is"),
        ({"boxes": []}, "but of 0 none is"),
        ({"boxes": [(0, 0, 0, 4)]}, "at least 1 pixel wide and high"),
        ({"least": 0}, "least must be at least 1, not 0"),
        ({"most": -1}, "most must be at least 1, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"size": (0, 5)}, "size must be at least 1, not 0"),
        ({"image": torch.zeros(1, 3, 4, 4)}, r"image must be \(C, H, W\), but has shape \(1, 3, 4, 4\)"),
        (
            {"scores": lambda x: x[:1, 0], "least": 1},
            r"scores must give \(2, K, H, W\), but gave shape \(1, 224, 224\)",
        ),
    ],
)
def test_what_is_refused(options, said):
    usual = {"scores": network, "image": torch.rand(3, 24, 32), "boxes": [INSIDE, SMALL]}
    with pytest.raises(ValueError, match=said):
        instance_scores(**usual | options)


def test_ensemble():
    fcn, deconvnet = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -4.0])
    assert torch.equal(ensemble(fcn, deconvnet), torch.tensor([0.0, -8.0]))
    assert torch.equal(ensemble(fcn, deconvnet, "paper"), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="mode must be one of code, paper, not 'both'"):
        ensemble(fcn, deconvnet, "both")
    with pytest.raises(ValueError, match=r"must have one shape, not \(2,\) and \(1,\)"):
        ensemble(fcn, deconvnet[:1])


SIDES = {
    (360, 480): [360, 180],
    (500, 333): [333, 166],
    (224, 224): [112],
    (480, 640): [480, 240],
    (1080, 1920): [1080, 540],
}


@pytest.mark.parametrize("size", SIDES)
def test_windows(size):
    """The picture, and squares of each size that cover it, no more than are taken."""
    found = windows(*size)
    assert found[0] == (0, 0, size[1], size[0]) and len(set(found)) == len(found) <= 50
    assert taken(found, *size) == found
    squares = [box for box in found[1:] if box != found[0]]
    assert sorted({box.height for box in squares}, reverse=True) == SIDES[size]
    for side in SIDES[size]:
        boxes = [box for box in squares if box.height == box.width == side]
        for axis, length in ((0, size[1]), (1, size[0])):
            starts = sorted({box[axis] for box in boxes})
            assert starts[0] == 0 and starts[-1] == length - side
            assert all(b - a <= side / 2 + 1 for a, b in pairwise(starts))
    assert len(windows(1080, 1920, most=1000)) == 1 + 3 + 3 * 7 + 7 * 14 + 15 * 28
    assert windows(1080, 1920, 2, 1) == [(0, 0, 1920, 1080)]
    with pytest.raises(ValueError, match="least must be at least 1, not 0"):
        windows(*size, 0)


def test_boxes_of_a_file(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("1,2,30,40\n\n-3 4.6 50 60 0.93\n", encoding="utf-8-sig")  # as Excel writes it
    assert read_boxes(path) == [(1, 2, 30, 40), (-3, 5, 50, 60)]
    for line, said in (
        ("left,top", "must be left, top, width"),
        ("1 2 3", "must be left"),
        ("1 2 3 0", "at least 1"),
        ("1 2 nan 3", "must be left"),
    ):
        path.write_text(f"1,2,30,40\n{line}\n")
        with pytest.raises(ValueError, match=f"line 2, .*{said}"):
            read_boxes(path)
    for content, said in ((b"\n", "must hold boxes, and holds none"), (b"\xff\xfe1", "must be a text file of boxes")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"boxes.csv {said}"):
            read_boxes(path)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint that tells dark from bright: random, but of a network with more than one answer."""
    for package in ("PIL.Image", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    options = {"model": "segnet-basic", "width": 0.125, "size": (32, 32), "batch_size": 4, "device": "cpu", "lr": 1e-2}
    made = train.start(options | {"steps": 10, "out": str(tmp_path_factory.mktemp("run")), "eval_every": 1000})
    made.val_set.length = 8
    made.run()
    return made.path


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    image, _ = data.DigitScenes("val", size=(60, 80)).sample(0)
    path = tmp_path / "scene.png"
    Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return path


def test_the_segmenter_sees_proposals(weights, picture):
    segmenter, image = predict.Segmenter(weights), data.read_image(picture)
    whole = segmenter.instance_wise(image, [Box(0, 0, 80, 60)], least=1)
    assert whole.shape == (60, 80) and whole.dtype == np.uint8
    model = checkpoint.build_model("segnet-basic", 11, 0.125)
    model.load_state_dict(checkpoint.load_checkpoint(weights)["model"])
    seen = F.interpolate(data.to_tensor(image)[None], (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = model.eval()((seen - 0.5) / 0.25)
        probabilities = F.interpolate(logits.softmax(1), (60, 80), mode="bilinear")
    assert np.array_equal(whole, probabilities[0].argmax(0).numpy()) and len(np.unique(whole)) > 1
    for combine in COMBINE:  # what is in no box is as the picture seen at once
        part = segmenter.instance_wise(image, [Box(-10, 20, 30, 30)], least=1, combine=combine)
        assert np.array_equal(part[:, 20:], segmenter(image)[:, 20:])
        assert not np.array_equal(part[20:50, :20], segmenter(image)[20:50, :20])
    with torch.no_grad():
        segmenter.model.classifier.bias -= 100  # which changes no probability
    assert np.array_equal(segmenter.instance_wise(image, [Box(0, 0, 80, 60)], least=1), whole)


@pytest.mark.parametrize("given", [True, False])
def test_the_command(weights, picture, given, tmp_path, capsys):
    from PIL import Image

    file, out = tmp_path / "boxes.txt", tmp_path / "out"
    file.write_text("0 0 80 60\n20 10 40 40\n60 40 8 8\n")
    words = ["segment", str(picture), "--checkpoint", str(weights), "--out", str(out), "--labels", "--least-side", "20"]
    assert cli.main([*words, "--combine", "mean", "--boxes", *[str(file)] * given]) == 0
    assert capsys.readouterr().err == ""  # no bar where there is no terminal
    boxes = read_boxes(file) if given else windows(60, 80, 20)
    want = predict.Segmenter(weights).instance_wise(data.read_image(picture), boxes, least=20, combine="mean")
    assert np.array_equal(np.asarray(Image.open(out / "scene-labels.png")), want)


def test_the_command_refuses_before_it_writes(weights, picture, tmp_path, capsys):
    file, out = tmp_path / "boxes.txt", tmp_path / "out"
    file.write_text("0 0 8 8\n")
    words = ["segment", str(picture), "--checkpoint", str(weights), "--out", str(out), "--boxes"]
    for more, said in (
        (
            [str(file)],
            f"{file}: boxes must hold one over the picture with a shorter side of at least 112, but of 1 none is",
        ),
        ([str(file), str(file)], "1 pictures need as many files for --boxes, not 2"),
        ([str(tmp_path / "none.txt")], "none.txt"),
        ([str(file), "--most-boxes", "0"], "--most-boxes must be at least 1"),
    ):
        assert cli.main([*words, *more]) == 2
        assert said in capsys.readouterr().err and not out.exists()
    assert cli.main([*words[:-1], "--combine", "max"]) == 2
    assert "--combine need --boxes" in capsys.readouterr().err and not out.exists()
