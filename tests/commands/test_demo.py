import copy
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastseg import backend, swap
from fastseg.commands import cli
from fastseg.models import PlainSegNet
from fastseg.training import comparison, data, pictures
from fastseg.training.config import TrainConfig
from fastseg.training.segmenter import Segmenter

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 32)


def run(out, capsys, *more):
    """Run a short demo; return its exit code and what it printed."""
    code = cli.main(["demo", "--steps", "7", "--device", "cpu", "--json", "--out", str(out), *more])
    return code, capsys.readouterr()


def test_a_short_demo_checks_and_writes_everything(tmp_path, capsys, monkeypatch):
    """The mIoU is the only check that fails, because seven steps are too few to reach it."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the process with interpreted kernels finds the package itself
    monkeypatch.chdir(tmp_path)
    code, printed = run(tmp_path, capsys)
    result = json.loads(printed.out)
    assert code == 1 and result["failures"] == ["the mIoU is below 0.50"] and "failed: the mIoU" in printed.err
    assert result["steps"] == 7 and 0 < result["miou"] < 0.5 and result["gpu"] is None
    assert result["loss_difference"] <= comparison.LOSS_TOLERANCE
    assert max(result["interpreted"].values()) <= comparison.STEP_TOLERANCE
    assert "16 of 16 layers swapped" in printed.err
    names = ["loss.png", "metrics.jsonl", "prediction.png", "scene.png", "segnet.pt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / "prediction.png").size[0] > 1000 and Image.open(tmp_path / "loss.png").size[0] > 500
    picture = pictures.read_image(tmp_path / "scene.png")
    image, _ = data.DigitScenes("val").sample(0)
    assert np.abs(np.asarray(picture) / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    segmenter = Segmenter(tmp_path / "segnet.pt", "cpu")
    assert isinstance(segmenter.model, PlainSegNet) and segmenter(picture).shape == (64, 64)


def test_the_exit_code_is_1_if_a_check_fails(tmp_path, capsys, monkeypatch):
    def interpreted(loss, gradients):
        difference = comparison.StepDifference(loss, gradients)
        monkeypatch.setattr(comparison, "interpreted_step_difference", lambda: difference)

    monkeypatch.setattr(comparison, "MIN_MIOU", 0.0)
    interpreted(0.0, 0.0)
    assert run(tmp_path, capsys)[0] == 0
    interpreted(0.0, float("nan"))
    code, printed = run(tmp_path, capsys)
    assert code == 1 and json.loads(printed.out)["failures"] == ["the interpreted kernels differ from torch"]
    interpreted(0.0, 0.0)
    monkeypatch.setattr(comparison, "swap", lambda model: nn.init.constant_(model.classifier.bias, 1.5)[:0])
    code, printed = run(tmp_path, capsys)
    assert code == 1 and json.loads(printed.out)["failures"] == ["the losses of plain and swapped differ"]


def test_bad_input_is_reported_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "loss_difference", None)
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "out must be a writable folder" in capsys.readouterr().err
    assert cli.main(["demo", "--seed", "-1"]) == 2 and "seed must be from 0" in capsys.readouterr().err
    assert cli.main(["demo", "--steps", "5"]) == 2 and "--steps must be above 5" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo"]) == 2 and 'pip install "fastseg-kernels[demo]"' in capsys.readouterr().err


def test_the_plain_network_has_only_torchs_layers_and_takes_any_size():
    model = PlainSegNet(5)
    own = [module for module in model.modules() if not type(module).__module__.startswith("torch.nn.")]
    assert own == [model]
    swapped = copy.deepcopy(model)
    report = swap(swapped)
    image = torch.randn(2, 3, 37, 50)
    plain = model(image)
    assert plain.shape == (2, 5, 37, 50) and len(report.swapped) == 16
    with backend("torch"):
        assert torch.equal(copy.deepcopy(swapped)(image), plain)
    torch.testing.assert_close(swapped(image), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_time_and_memory_of_a_step_are_measured():
    costs = comparison.measure_steps(TrainConfig(amp=False, channels_last=True))
    assert costs.keys() == {"plain", "swapped"} and all(cost.ms > 0 and cost.mib > 10 for cost in costs.values())
