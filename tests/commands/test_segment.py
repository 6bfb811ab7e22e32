import sys

import numpy as np
import pytest
import torch

from fastseg.commands import cli, train
from fastseg.commands import segment as predict
from fastseg.training import checkpoint, data

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint that knows the ground from the digits."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    options = {"model": "segnet-basic", "width": 0.125, "size": (32, 32), "batch_size": 4, "device": "cpu", "lr": 1e-2}
    made = train.start(options | {"steps": 40, "out": str(out), "eval_every": 1000})
    made.val_set.length = 8
    made.run()
    return made.path


@pytest.fixture
def scene(tmp_path):
    """A digit scene of 40x48 as files: picture, mask."""
    image, mask = data.DigitScenes("val", size=(40, 48)).sample(0)
    Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    Image.fromarray(mask.byte().numpy()).save(tmp_path / "mask.png")
    return tmp_path / "scene.png", tmp_path / "mask.png"


def colours_in(path):
    return {tuple(colour) for colour in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}


def test_the_segmenter_is_the_network_on_the_normalised_picture(weights, scene):
    picture = data.read_image(scene[0])
    segmenter = predict.Segmenter(weights)
    labels = segmenter(picture)
    assert labels.shape == (40, 48) and labels.dtype == np.uint8
    model = checkpoint.build_model("segnet-basic", 11, 0.125)
    model.load_state_dict(checkpoint.load_checkpoint(weights)["model"])
    small = data.to_tensor(picture.resize((32, 32), Image.Resampling.BILINEAR))
    with torch.no_grad():
        logits = model.eval()((small[None] - 0.5) / 0.25)
    want = torch.nn.functional.interpolate(logits, (40, 48), mode="bilinear")[0].argmax(0)
    assert np.array_equal(labels, want.numpy())
    assert not np.array_equal(segmenter(picture, size=(40, 48)), labels)


def test_the_command(weights, scene, tmp_path, capsys):
    picture, mask = map(str, scene)
    out = tmp_path / "out"
    arguments = ["segment", picture, "--checkpoint", str(weights), "--out", str(out), "--truth", mask, "--labels"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{picture} -> {out / 'scene-segmented.png'}  accuracy 0." in printed and "mIoU" in printed
    assert sorted(file.name for file in out.iterdir()) == ["scene-labels.png", "scene-segmented.png"]
    labels = np.asarray(Image.open(out / "scene-labels.png"))
    assert np.array_equal(labels, predict.Segmenter(weights)(data.read_image(picture)))
    truth = np.asarray(Image.open(mask))
    assert f"accuracy {(labels == truth).mean():.3f}" in printed
    palette = predict.palette(data.DIGIT_CLASSES)
    shown = colours_in(out / "scene-segmented.png")
    assert {tuple(palette[k]) for k in np.unique(truth)} <= shown
    file = tmp_path / "one.png"
    assert cli.main(["segment", picture, "--checkpoint", str(weights), "--out", str(file), "--overlay"]) == 0
    assert Image.open(file).size[0] > 300


def test_several_pictures(weights, scene, tmp_path, capsys):
    second = tmp_path / "second.jpg"
    Image.open(scene[0]).save(second)
    arguments = ["segment", str(scene[0]), str(second), "--checkpoint", str(weights)]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"scene-segmented.png", "second-segmented.png"}
    other = tmp_path / "other"
    other.mkdir()
    Image.open(scene[0]).save(other / "scene.png")
    refused = {
        "--out must be a folder for 2 pictures": [*arguments, "--out", "one.png"],
        "2 pictures need as many files for --truth, not 1": [*arguments, "--truth", str(scene[1])],
        "two pictures have the same name": [*arguments[:2], str(other / "scene.png"), *arguments[3:]],
        "is the picture itself": ["segment", str(scene[0]), "--out", str(scene[0]), "--checkpoint", str(weights)],
    }
    for sentence, command in refused.items():
        assert cli.main(command) == 2
        assert sentence in capsys.readouterr().err


def test_bad_files(weights, scene, tmp_path, capsys):
    picture, mask = map(str, scene)
    text, small = tmp_path / "text.png", tmp_path / "small.png"
    text.write_text("no picture")
    spoilt = tmp_path / "spoilt.pt"
    torch.save(torch.load(weights) | {"mean": 0.5}, spoilt)
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(small)
    refused = {
        "text.png must be a PNG or JPEG picture": [str(text), "--checkpoint", str(weights)],
        "gone.png is not a file": [str(tmp_path / "gone.png"), "--checkpoint", str(weights)],
        "there is no checkpoint gone.pt": [picture, "--checkpoint", "gone.pt"],
        "mask.png is not a fastseg checkpoint": [picture, "--checkpoint", mask],
        "small.png must be as large as its picture, 48x40, but is 3x3": [
            *(picture, "--checkpoint", str(weights), "--truth", str(small))
        ],
        "text.png must be a PNG or": [picture, str(text), "--checkpoint", str(weights)],
        "--device must be cpu, cuda or cuda:N, not 'meta'": [
            *(picture, "--checkpoint", str(weights), "--device", "meta")
        ],
        "spoilt.pt is not a fastseg checkpoint, since its mean must": [picture, "--checkpoint", str(spoilt)],
        "there is no device cuda:99": [picture, "--checkpoint", str(weights), "--device", "cuda:99"],
    }
    for sentence, arguments in refused.items():
        assert cli.main(["segment", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_small_a_picture_is_refused_before_anything_is_written(scene, tmp_path, capsys):
    config = checkpoint.TrainConfig(model="deconvnet", width=0.01)
    made = train.Trainer(config, checkpoint.build_model("deconvnet", 11, 0.01), *2 * [data.DigitScenes("val", 193)])
    checkpoint.save_checkpoint(tmp_path / "deconvnet.pt", made.state())
    large = tmp_path / "large.png"
    Image.open(scene[0]).resize((193, 193)).save(large)
    arguments = ["segment", str(large), str(scene[0]), "--checkpoint", str(tmp_path / "deconvnet.pt")]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "needs pictures of at least 193x193, not 40x48; give --size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_drawing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    scene = predict.Scene(np.zeros((4, 4, 3), np.uint8), None, np.zeros((4, 4), np.uint8))
    with pytest.raises(OSError, match="No space left"):
        predict.draw_scenes(tmp_path / "drawing.png", [scene], ("a", "b"), 255)
    assert not list(tmp_path.iterdir())


def test_the_legend_names_what_is_shown(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    legends = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, **_: legends.append([h.get_label() for h in handles]))
    picture, one, void = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8), np.full((4, 4), 255)
    scenes = [predict.Scene(picture, void, one), predict.Scene(picture, None, 2 * one)]
    predict.draw_scenes(tmp_path / "drawing.png", scenes, ("a", "b", "c", "d"), 255)
    assert legends == [["b", "c", "void"]]


def test_colours(monkeypatch, tmp_path):
    assert predict.palette(data.CAMVID_CLASSES)[data.CAMVID_CLASSES.index("Road")].tolist() == [128, 64, 128]
    for classes in (2, 11, 40):
        colours = predict.palette(range(classes))
        assert colours.dtype == np.uint8 and len({tuple(colour) for colour in colours}) == classes
    labels = np.array([[0, 1], [255, 1]])
    coloured = predict.colourise(labels, np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 255)
    assert coloured.tolist() == [[[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [4, 5, 6]]]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastseg-kernels\[demo\]"'):
        predict.draw_scenes(tmp_path / "x.png", [], (), 255)
