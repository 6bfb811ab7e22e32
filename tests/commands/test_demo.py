import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastseg import swap
from fastseg.commands import cli, demo
from fastseg.commands import segment as predict
from fastseg.training import data

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 32)


def run(out, capsys, *more):
    """Exit code and result of a short demo."""
    code = cli.main(["demo", "--steps", "7", "--device", "cpu", "--json", "--out", str(out), *more])
    return code, capsys.readouterr()


def test_a_short_demo(tmp_path, capsys):
    """Everything is checked and written; seven steps cannot reach the mIoU, which is what fails."""
    code, printed = run(tmp_path, capsys)
    result = json.loads(printed.out)
    assert code == 1 and result["failures"] == ["the mIoU is below 0.50"] and "failed: the mIoU" in printed.err
    assert result["steps"] == 7 and 0 < result["miou"] < 0.5 and result["gpu"] is None
    assert result["loss_difference"] <= demo.LOSS_TOLERANCE
    assert max(result["interpreted"].values()) <= demo.STEP_TOLERANCE
    assert "16 of 16 layers swapped" in printed.err
    names = ["loss.png", "metrics.jsonl", "prediction.png", "scene.png", "segnet.pt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / "prediction.png").size[0] > 1000 and Image.open(tmp_path / "loss.png").size[0] > 500
    picture = data.read_image(tmp_path / "scene.png")
    image, _ = data.DigitScenes("val").sample(0)
    assert np.abs(np.asarray(picture) / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    segmenter = predict.Segmenter(tmp_path / "segnet.pt", "cpu")
    assert isinstance(segmenter.model, demo.PlainSegNet) and segmenter(picture).shape == (64, 64)


def test_exit_codes_follow_the_checks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LEAST_MIOU", 0.0)
    monkeypatch.setattr(demo, "run_interpreted_step", lambda: {"loss": 0.0, "gradients": 0.0})
    assert run(tmp_path, capsys)[0] == 0
    monkeypatch.setattr(demo, "run_interpreted_step", lambda: {"loss": 0.0, "gradients": float("nan")})
    code, printed = run(tmp_path, capsys)
    assert code == 1 and json.loads(printed.out)["failures"] == ["the interpreted kernels differ from torch"]
    monkeypatch.setattr(demo, "run_interpreted_step", lambda: {"loss": 0.0, "gradients": 0.0})
    monkeypatch.setattr(demo, "swap", lambda model: nn.init.constant_(model.classifier.bias, 1.5)[:0])
    code, printed = run(tmp_path, capsys)
    assert code == 1 and json.loads(printed.out)["failures"] == ["the losses of plain and swapped differ"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo"]) == 2 and 'pip install "fastseg-kernels[demo]"' in capsys.readouterr().err
    assert cli.main(["demo", "--steps", "5"]) == 2 and "--steps must be above 5" in capsys.readouterr().err


def test_an_output_folder_and_a_seed_are_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "Trainer", None)
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "file must be a folder to write to" in capsys.readouterr().err
    assert cli.main(["demo", "--seed", "-1"]) == 2 and "seed must be from 0" in capsys.readouterr().err


def test_the_plain_net_is_plain_and_takes_any_size():
    model = demo.PlainSegNet(5)
    own = [module for module in model.modules() if not type(module).__module__.startswith("torch.nn.")]
    assert own == [model]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = torch.randn(2, 3, 37, 50)
    plain = model(image)
    model.load_state_dict(state)  # the running statistics
    report = swap(model)
    swapped = model(image)
    assert plain.shape == (2, 5, 37, 50) and len(report.swapped) == 16 and torch.equal(plain, swapped)


@pytest.mark.gpu
def test_speed_is_measured():
    figures = demo.compare_speed(demo.TrainConfig(amp=False, channels_last=True))
    assert figures.keys() == {"plain", "swapped"} and all(f["ms"] > 0 and f["mib"] > 10 for f in figures.values())
