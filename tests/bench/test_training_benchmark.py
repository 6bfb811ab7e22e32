"""benchmarks/training.py: plain torch and fastseg learn the same from the same batches, and write it to files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from support.folders import write_folder

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def training():
    path = Path(__file__).parents[2] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("training", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_trainings_side_by_side(training, tmp_path, capsys):
    masks = np.random.default_rng(0).integers(0, 12, (3, 32, 32))
    folder = write_folder(tmp_path / "set", masks, splits=("train", "val", "test"))
    small = ["--size", "32x32", "--width", "0.125", "--batch-size", "2", "--workers", "1", "--device", "cpu"]
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), "--steps", "3", "--eval-every", "2", *small]
    assert training.main(arguments) == 0
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert found.keys() == {"torch", "fastseg-swap", "fastseg"}
    assert len(list((tmp_path / "out").iterdir())) == 4  # with the chart and without checkpoints
    losses = {name: [record["loss"] for record in result["history"]] for name, result in found.items()}
    assert losses["fastseg-swap"] == pytest.approx(losses["torch"], rel=1e-5)
    assert losses["fastseg"] == pytest.approx(losses["torch"], rel=1e-3)
    assert all(0 <= result["test"]["miou"] <= 1 and result["seconds"] > 0 for result in found.values())
    assert [record["step"] for record in found["torch"]["history"] if "miou" in record] == [2, 3]
    assert str(tmp_path) not in json.dumps(found)  # results are published and must not name folders of this machine
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(name in said for name in ("torch ", "fastseg swap", "published"))
