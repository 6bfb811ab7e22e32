import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastseg
from fastseg.commands import cli
from fastseg.training import checkpoint, data, runs, trainer

pytest.importorskip("sklearn")
pytest.importorskip("PIL.Image")

from support.folders import write_folder

SMALL_ARGUMENTS = ["--model", "segnet-basic", "--width", "0.125", "--size", "32x32", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 5)


def test_a_run_is_trained_and_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", *SMALL_ARGUMENTS, "--steps", "4", "--eval-every", "2", "--out", str(out)]
    assert cli.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["steps"] == 4 and 0 <= result["miou"] <= 1 and len(result["iou"]) == 11
    assert "step 2/4  loss" in printed.err and result["checkpoint"] == str(out / "checkpoint.pt")
    assert cli.main(arguments) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--steps", "6"]) == 0
    printed = capsys.readouterr()
    assert "mIoU" in printed.out and "steps 4 to 6" in printed.err
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--lr", "7"]) == 2
    assert "lr must be 0.001, because" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--steps", "5"]) == 2
    assert "steps must be at least 6" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_gives_its_exit_code(number, code, tmp_path):
    command = [sys.executable, "-m", "fastseg.commands.cli", "train", *SMALL_ARGUMENTS, "--steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(Path(fastseg.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert f"to continue: fastseg train --resume {tmp_path / 'checkpoint.pt'}" in errors and "Traceback" not in errors
    state = checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert state["step"] == last["step"] >= 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]


def test_an_invalid_seed_is_reported_before_data_is_read(monkeypatch, capsys):
    monkeypatch.setattr(runs, "load_datasets", None)
    assert cli.main(["train", "--seed", "-5"]) == 2
    assert "seed must be from 0" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["360", "0x4", "ax3", "3x4x5"])
def test_an_invalid_size_is_reported(size, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--size", size])
    assert "must be HEIGHTxWIDTH, for example 360x480" in capsys.readouterr().err


def test_what_was_matched_is_said_and_more_steps_too(tmp_path, capsys):
    root = write_folder(tmp_path / "set", np.arange(4 * 32 * 32).reshape(4, 32, 32) % 5, splits=("train", "val"))
    out = tmp_path / "run"
    arguments = ["train", *SMALL_ARGUMENTS, "--data", str(root), "--steps", "4", "--out", str(out), "--log", "csv"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().err
    assert "train: 4 pictures in train/, with masks in trainannot/ called STEM.png (layout camvid)" in printed
    assert "train: no mask has a pixel of 6 classes, which cannot be learned: Tree, SignSymbol, Fence and 3" in printed
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "metrics.csv", "metrics.jsonl"]
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--steps", "8"]) == 0
    assert "the learning rate was 2.22e-04 in step 4 and goes on with" in capsys.readouterr().err


def test_an_error_says_where_to_continue(tmp_path, capsys, monkeypatch):
    def fails(made, images, masks):
        if made.step == 2:
            raise RuntimeError("out of memory")
        made.step += 1

    monkeypatch.setattr(trainer.Trainer, "training_step", fails)
    assert cli.main(["train", *SMALL_ARGUMENTS, "--steps", "4", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f"wrote step 2; to continue: fastseg train --resume {tmp_path / 'checkpoint.pt'}" in printed
    assert "out of memory" in printed and checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
