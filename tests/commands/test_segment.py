import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from support.train_common import trained_checkpoint

from fastseg.commands import cli, segment
from fastseg.crf import PRESETS
from fastseg.training import checkpoint, class_names, data, drawing, networks, pictures, segment_files
from fastseg.training.config import TrainConfig
from fastseg.training.instance_wise import InstanceOptions, ensemble, instance_scores, read_boxes, sliding_windows
from fastseg.training.segmenter import Segmenter
from fastseg.training.tiles import TileOptions
from fastseg.training.trainer import Trainer
from fastseg.uncertainty import Sampling

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from support.folders import write_scene  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint that tells some digits from the background."""
    return trained_checkpoint(tmp_path_factory.mktemp("run"), steps=20)


@pytest.fixture
def scene(tmp_path):
    """A digit scene of 40x48 in two files: image, mask."""
    return write_scene(tmp_path, (40, 48))


def colours_in(path):
    """The colours that occur in an image."""
    return {tuple(colour) for colour in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}


def test_an_image_is_segmented_drawn_and_scored(weights, scene, tmp_path, capsys):
    image, mask = map(str, scene)
    out = tmp_path / "out"
    arguments = ["segment", image, "--checkpoint", str(weights), "--out", str(out), "--truth", mask, "--labels"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{image} -> {out / 'scene-segmented.png'}  accuracy 0." in printed and "mIoU" in printed
    assert sorted(file.name for file in out.iterdir()) == ["scene-labels.png", "scene-segmented.png"]
    labels = np.asarray(Image.open(out / "scene-labels.png"))
    segmenter = Segmenter(weights)
    assert np.array_equal(labels, segmenter(pictures.read_image(image)))
    assert Image.open(out / "scene-labels.png").mode == "P"
    shown = np.asarray(Image.open(out / "scene-labels.png").convert("RGB"))
    assert np.array_equal(shown, segmenter.colours[labels]) and len(np.unique(labels)) > 1
    truth = np.asarray(Image.open(mask))
    assert f"accuracy {(labels == truth).mean():.3f}" in printed
    palette = drawing.palette(class_names.DIGIT_CLASSES)
    shown = colours_in(out / "scene-segmented.png")
    assert {tuple(palette[k]) for k in np.unique(truth)} <= shown
    file = tmp_path / "one.png"
    assert cli.main(["segment", image, "--checkpoint", str(weights), "--out", str(file), "--overlay"]) == 0
    assert Image.open(file).size[0] > 300
    over = np.asarray(Image.open(tmp_path / "one-overlay.png"))
    assert np.array_equal(over, np.asarray(Image.open(image)) // 2 + segmenter.colours[labels] // 2)


def test_several_images_get_a_file_each(weights, scene, tmp_path, capsys):
    second = tmp_path / "second.jpg"
    Image.open(scene[0]).save(second)
    arguments = ["segment", str(scene[0]), str(second), "--checkpoint", str(weights)]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"scene-segmented.png", "second-segmented.png"}
    other = tmp_path / "other"
    other.mkdir()
    Image.open(scene[0]).save(other / "scene.png")
    invalid = {
        "out must be a folder for 2 images, but is one.png": [*arguments, "--out", "one.png"],
        "2 images need as many files for --truth, but got 1": [*arguments, "--truth", str(scene[1])],
        "two images have the same name": [*arguments[:2], str(other / "scene.png"), *arguments[3:]],
        "out must not be the image itself": ["segment", str(scene[0]), "--out", str(scene[0]), *arguments[3:]],
    }
    for message, command in invalid.items():
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def fill(folder, scene, *names):
    """Copies of a scene's picture."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(scene[0]).save(folder / name)


def test_folders_and_patterns_are_inputs_and_outputs_are_not(weights, scene, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    fill(folder, scene, "a.png", "sub/a.png", "sub/b.jpg", "._x.png", "old-labels.png", "a-segmented.png")
    (folder / "notes.txt").write_text("")
    found = segment_files.find_images([str(folder)])
    assert [name.as_posix() for _, name in found] == ["a.png", "sub/a.png", "sub/b.jpg"]
    assert [str(path) for path, _ in segment_files.find_images([f"{folder}/**/b*"])] == [str(folder / "sub" / "b.jpg")]
    out = tmp_path / "out"
    words = ["segment", str(folder), "--checkpoint", str(weights), "--out", str(out), "--labels", "--no-figure"]
    assert cli.main(words) == 0
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert written == ["a-labels.png", "sub/a-labels.png", "sub/b-labels.png"]
    capsys.readouterr()
    (out / "sub" / "b-labels.png").unlink()
    assert cli.main([*words, "--skip-existing"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder / 'sub' / 'b.jpg'} -> {out / 'sub' / 'b-labels.png'}"]
    (tmp_path / "empty").mkdir()
    for nothing in (str(tmp_path / "empty"), f"{folder}/*.bmp"):
        assert cli.main([words[0], nothing, *words[2:]]) == 2
        assert f"{nothing} has no pictures" in capsys.readouterr().err
    assert cli.main([*words[:-2], "--no-figure"]) == 2
    assert "--no-figure needs --labels, --overlay or --truth" in capsys.readouterr().err
    truth = [str(scene[1])]
    assert cli.main([words[0], str(scene[0]), *words[2:-2], "--no-figure", "--skip-existing", "--truth", *truth]) == 2
    assert "--skip-existing needs an output to look for" in capsys.readouterr().err


def test_a_folder_is_scored_as_a_whole_and_printed_as_json(weights, tmp_path, capsys):
    folder, masks = tmp_path / "in", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    for index in range(3):
        image, mask = data.DigitScenes("val", size=(40, 48)).sample(index)
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
        labels = mask.byte().numpy() if index else np.full((40, 48), -100, np.int32)
        Image.fromarray(labels).save(masks / f"{index}_L.tif")
    words = ["segment", str(folder), "--checkpoint", str(weights), "--out", str(tmp_path / "out"), "--no-figure"]
    assert cli.main([*words, "--truth", str(masks), "--labels", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out, parse_constant=pytest.fail)  # no NaN, also for a mask of ignored pixels
    assert [Path(one["image"]).name for one in result["images"]] == ["0.png", "1.png", "2.png"]
    assert result["images"][0]["scores"]["miou"] is None and not result["interrupted"]
    right = total = 0
    for index in (1, 2):
        predicted = np.asarray(Image.open(tmp_path / "out" / f"{index}-labels.png"))
        truth = np.asarray(Image.open(masks / f"{index}_L.tif"))
        right, total = right + (predicted == truth).sum(), total + truth.size
    assert result["scores"]["global_accuracy"] == pytest.approx(right / total)
    assert "all 3 images  accuracy" in printed.err and result["images"][0]["figure"] is None


def test_ctrl_c_ends_after_an_image(weights, scene, tmp_path, monkeypatch, capsys):
    fill(tmp_path / "in", scene, "a.png", "b.png", "c.png")
    segment_one = segment.segment_file

    def interrupted(*arguments):
        if not (out / "a-labels.png").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return segment_one(*arguments)

    monkeypatch.setattr(segment, "segment_file", interrupted)
    out = tmp_path / "out"
    words = [
        "segment",
        str(tmp_path / "in"),
        "--checkpoint",
        str(weights),
        "--out",
        str(out),
        "--labels",
        "--no-figure",
    ]
    assert cli.main([*words, "--json"]) == 130
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [path.name for path in out.iterdir()] == ["a-labels.png"] and len(result["images"]) == 1
    assert result["interrupted"] and "stopped after 1 of 3 images" in printed.err


def test_a_picture_is_predicted_in_tiles(weights, tmp_path, capsys):
    image, _ = write_scene(tmp_path, (70, 100))
    words = ["segment", str(image), "--checkpoint", str(weights), "--out", str(tmp_path), "--labels", "--no-figure"]
    assert cli.main([*words, "--tile", "32x40", "--tile-overlap", "0.5"]) == 0
    labels = np.asarray(Image.open(tmp_path / "scene-labels.png"))
    segmenter, picture = Segmenter(weights), pictures.read_image(image)
    assert np.array_equal(labels, segmenter.tiled(picture, TileOptions((32, 40), 0.5)))
    assert np.array_equal(segmenter.tiled(picture), segmenter(picture, (70, 100)))  # one tile of 512x512
    for more, message in (
        (["--tile-overlap", "0.2"], "--tile-overlap needs --tile"),
        (["--tile", "--tile-overlap", "0.7"], "overlap must be from 0 to 0.5, but is 0.7"),
        (["--tile", "--size", "40x40"], "tile must be left out with size or instances"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_picture_that_pillow_refuses_is_read_in_tiles(weights, tmp_path, monkeypatch, capsys):
    image, _ = write_scene(tmp_path, (40, 48))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    words = ["segment", str(image), "--checkpoint", str(weights), "--out", str(tmp_path), "--labels", "--no-figure"]
    assert cli.main(words) == 2
    assert "has more pixels than Pillow reads by itself; fastseg segment --tile" in capsys.readouterr().err
    assert cli.main([*words, "--tile", "16x16"]) == 0 and Image.MAX_IMAGE_PIXELS == 500


def test_invalid_files_are_reported_before_anything_is_written(weights, scene, tmp_path, capsys):
    image, mask = map(str, scene)
    text, small = tmp_path / "text.png", tmp_path / "small.png"
    text.write_text("no image")
    spoilt = tmp_path / "spoilt.pt"
    torch.save(torch.load(weights) | {"mean": 0.5}, spoilt)
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(small)
    good = (image, "--checkpoint", str(weights))
    invalid = {
        "text.png must be a PNG or JPEG image": [str(text), *good[1:]],
        "gone.png is not a file": [str(tmp_path / "gone.png"), *good[1:]],
        "there is no checkpoint gone.pt": [image, "--checkpoint", "gone.pt"],
        "mask.png is not a fastseg checkpoint": [image, "--checkpoint", mask],
        "small.png must be as large as its image, 48x40, but is 3x3": [*good, "--truth", str(small)],
        "text.png must be a PNG or": [image, str(text), *good[1:]],
        "device must be cpu, cuda or cuda:N, but is 'meta'": [*good, "--device", "meta"],
        "spoilt.pt is not a valid fastseg checkpoint: its mean must": [image, "--checkpoint", str(spoilt)],
        "device cuda:99 does not exist": [*good, "--device", "cuda:99"],
    }
    for message, arguments in invalid.items():
        assert cli.main(["segment", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_too_small_is_reported_before_anything_is_written(scene, tmp_path, capsys):
    config = TrainConfig(model="deconvnet", width=0.01)
    made = Trainer(config, networks.build_model("deconvnet", 11, 0.01), *2 * [data.DigitScenes("val", 193)])
    checkpoint.save_checkpoint(tmp_path / "deconvnet.pt", made.state())
    large = tmp_path / "large.png"
    Image.open(scene[0]).resize((193, 193)).save(large)
    arguments = ["segment", str(large), str(scene[0]), "--checkpoint", str(tmp_path / "deconvnet.pt")]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    message = "DeconvNet needs images of at least 193x193, but gets 40x48; set a larger size"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- instance-wise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_proposals_come_from_a_file_or_from_sliding_windows(weights, given, tmp_path, capsys):
    image, _ = write_scene(tmp_path, (60, 80))
    file, out = tmp_path / "boxes.txt", tmp_path / "out"
    file.write_text("0 0 80 60\n20 10 40 40\n60 40 8 8\n")
    words = ["segment", str(image), "--checkpoint", str(weights), "--out", str(out), "--labels", "--least-side", "20"]
    assert cli.main([*words, "--combine", "mean", "--boxes", *[str(file)] * given]) == 0
    assert capsys.readouterr().err == ""  # no progress bar outside a terminal
    boxes = read_boxes(file) if given else sliding_windows(60, 80, 20)
    options = InstanceOptions(min_side=20, combine="mean")
    want = Segmenter(weights).instance_wise(pictures.read_image(image), boxes, options)
    assert np.array_equal(np.asarray(Image.open(out / "scene-labels.png")), want)


def test_invalid_proposals_are_reported_before_anything_is_written(weights, tmp_path, capsys):
    image, _ = write_scene(tmp_path, (60, 80))
    file, out = tmp_path / "boxes.txt", tmp_path / "out"
    file.write_text("0 0 8 8\n")
    words = ["segment", str(image), "--checkpoint", str(weights), "--out", str(out), "--boxes"]
    for more, message in (
        ([str(file)], f"{file}: boxes must contain one that overlaps the image and has a shorter side of at least 112"),
        ([str(file), str(file)], "1 images need as many files for --boxes, but got 2"),
        ([str(tmp_path / "none.txt")], "none.txt"),
        ([str(file), "--most-boxes", "0"], "--most-boxes must be at least 1"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err and not out.exists()
    assert cli.main([*words[:-1], "--combine", "max"]) == 2
    assert "--combine need --boxes" in capsys.readouterr().err and not out.exists()


def test_a_crf_refines_the_labels(weights, scene, tmp_path, capsys):
    image, files = str(scene[0]), [tmp_path / name for name in ("plain.png", "paper.png", "deeplab.png")]
    for file, options in zip(files, ([], ["--crf"], ["--crf", "--crf-mode", "deeplab"]), strict=True):
        assert cli.main(["segment", image, "--checkpoint", str(weights), "--out", str(file), "--labels", *options]) == 0
    labels = [np.asarray(Image.open(file.with_name(f"{file.stem}-labels.png"))) for file in files]
    segmenter, picture = Segmenter(weights), pictures.read_image(image)
    for found, options in zip(labels, (None, PRESETS["paper"], PRESETS["deeplab"]), strict=True):
        assert np.array_equal(found, segmenter(picture, crf=options))
    assert not np.array_equal(labels[0], labels[1])
    assert cli.main(["segment", image, "--checkpoint", str(weights), "--crf-mode", "paper"]) == 2
    assert "--crf-mode needs --crf" in capsys.readouterr().err


# --- uncertainty -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bayesian(tmp_path_factory):
    """A checkpoint of an untrained Bayesian SegNet-Basic."""
    torch.manual_seed(0)
    model, name = networks.build_model("bayesian-segnet-basic", 11, 0.125), "bayesian-segnet-basic"
    made = Trainer(TrainConfig(model=name, width=0.125), model, *2 * [data.DigitScenes("val", 32)])
    file = tmp_path_factory.mktemp("bayesian") / "bayesian.pt"
    checkpoint.save_checkpoint(file, made.state())
    return file


def test_passes_with_dropout_predict_and_draw_the_uncertainty(bayesian, scene, tmp_path, capsys):
    image, out, drawn = str(scene[0]), tmp_path / "out", tmp_path / "uncertainty.png"
    words = ["segment", image, "--checkpoint", str(bayesian), "--out", str(out), "--labels", "--passes", "5"]
    assert cli.main([*words, "--uncertainty", str(drawn), "--measure", "entropy"]) == 0
    assert f"{image} -> {drawn}" in capsys.readouterr().out
    segmenter, picture = Segmenter(bayesian), pictures.read_image(image)
    labels, uncertainty = segmenter.sampled(picture, Sampling(5, "entropy"))
    assert np.array_equal(np.asarray(Image.open(out / "scene-labels.png")), labels)
    shown = np.asarray(Image.open(drawn)).astype(int).sum(-1)
    assert shown.shape == uncertainty.shape == (40, 48) and uncertainty.min() > 0
    assert shown.ravel()[uncertainty.argmax()] == shown.min() == 0  # the largest value is black
    assert np.corrcoef(shown.ravel(), uncertainty.ravel())[0, 1] < -0.98
    assert not np.array_equal(segmenter.sampled(picture, Sampling(5, "variance"))[1], uncertainty)
    refined = segmenter.sampled(picture, Sampling(5), crf=PRESETS["paper"])[0]
    assert cli.main([*words, "--crf"]) == 0
    assert np.array_equal(np.asarray(Image.open(out / "scene-labels.png")), refined)


def test_invalid_sampling_is_reported_before_anything_is_written(weights, bayesian, scene, tmp_path, capsys):
    image, out = str(scene[0]), tmp_path / "out"
    words = ["segment", image, "--out", str(out), "--checkpoint"]
    for more, message in (
        ([str(weights), "--passes", "4"], "model must have a dropout layer, such as torch.nn.Dropout, but SegNetBasic"),
        ([str(bayesian), "--passes", "0"], "passes must be at least 1, but is 0"),
        ([str(bayesian), "--uncertainty", "u.png"], "--uncertainty and --measure need --passes"),
        ([str(bayesian), "--passes", "4", "--boxes"], "--passes does not work with --boxes and --tile"),
        ([str(bayesian), "--passes", "4", "--uncertainty", image], "must not name another output or an image"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err and not out.exists()


# --- EDeconvNet ------------------------------------------------------------------------------------------------------


def test_an_ensemble_combines_proposals_with_another_network(weights, bayesian, scene, tmp_path, capsys):
    image, out, file = str(scene[0]), tmp_path / "out", tmp_path / "boxes.txt"
    file.write_text("0 0 48 40\n4 2 24 30\n")
    words = ["segment", image, "--checkpoint", str(weights), "--out", str(out), "--labels", "--boxes", str(file)]
    words += ["--least-side", "16", "--ensemble", str(bayesian)]
    first, other, picture = Segmenter(weights), Segmenter(bayesian), pictures.read_image(image)
    options = InstanceOptions(first.size, min_side=16)
    scores = instance_scores(first.logits, pictures.to_tensor(picture), read_boxes(file), options)
    for mode in ("code", "paper"):
        want = ensemble(other.scores(picture)[0], scores, mode)
        for crf in (False, True):
            assert cli.main([*words, "--ensemble-mode", mode, *["--crf"] * crf]) == 0
            labels = first.refined(want[None], picture, PRESETS[mode]) if crf else want.argmax(0).numpy()
            assert np.array_equal(np.asarray(Image.open(out / "scene-labels.png")), labels)
    renamed = torch.load(weights) | {"classes": tuple(f"other {k}" for k in range(11))}
    torch.save(renamed, tmp_path / "three.pt")
    capsys.readouterr()
    for more, message in (
        (["--crf", "--crf-mode", "paper"], "--crf-mode does not work with --ensemble"),
        (["--ensemble", str(tmp_path / "three.pt")], "both networks of an ensemble must have the same classes"),
    ):
        assert cli.main([*words, *more]) == 2 and message in capsys.readouterr().err
    assert cli.main([*words[:6], "--ensemble", str(bayesian)]) == 2
    assert "--ensemble needs --boxes" in capsys.readouterr().err
