"""Checkpoints are written completely or not at all, and an invalid one raises."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.train_common import run, same

import fastseg
from fastseg.atomic_write import atomic_write
from fastseg.training import checkpoint, data
from fastseg.training.runs import resume_run

pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.DigitScenes, "__len__", lambda scenes: 5)
        yield


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".txt"
    with contextlib.suppress(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_an_existing_checkpoint_is_kept_if_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    write = torch.save

    def full(value, target):
        write(value, target)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(path, {})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


class Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_damaged_and_other_files_raise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = run(steps=1, out="run").path
    content = good.read_bytes()
    middle = bytearray(content)
    middle[len(content) // 2] ^= 0xFF
    files = {"cut": content[:-100], "flipped": bytes(middle), "text": b"hello", "empty": b""}
    for name, text in files.items():
        Path(name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name} is .*damaged"):
            checkpoint.load_checkpoint(name)
    torch.save({"weights": torch.zeros(3)}, "other")
    with pytest.raises(ValueError, match="other is not a fastseg checkpoint"):
        checkpoint.load_checkpoint("other")
    torch.save(Payload(), "pickle")
    with pytest.raises(ValueError, match="pickle is not a fastseg checkpoint"):
        checkpoint.load_checkpoint("pickle")
    assert not Path("executed").exists()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint gone"):
        checkpoint.load_checkpoint("gone")
    state = checkpoint.load_checkpoint(good)
    state["config"]["width"] = 0.5
    checkpoint.save_checkpoint("wide", state)
    with pytest.raises(ValueError, match="the weights in wide do not fit the model 'segnet-basic'"):
        resume_run(Path("wide"), {"out": "elsewhere"})


@pytest.fixture(scope="module")
def written(few_scenes, tmp_path_factory):
    """The path of a checkpoint after one step."""
    return run(1, steps=2, out=str(tmp_path_factory.mktemp("written"))).path


CONTENTS = {  # keys of the value to replace, its new value, the error message
    "config": (("config",), None, "config must have exactly the fields"),
    "no width": (("config",), {}, "config must have exactly the fields"),
    "strange field": (("config", "depth"), 3, "config must have exactly the fields"),
    "width": (("config", "width"), "wide", "config is wrong: width must be of type float, but is 'wide'"),
    "size": (("config", "size"), 32, "config is wrong: size must be of type"),
    "steps": (("config", "steps"), 0, "config is wrong: steps must be from 1"),
    "weights": (("model",), [1], "model must map parameter names to tensors"),
    "weight": (("model", "classifier.bias"), 1.0, "model must map parameter names to tensors"),
    "optimizer": (("optimizer",), None, "optimizer must be the state_dict of an optimizer"),
    "rng": (("rng",), torch.zeros(3), "rng must hold"),
    "no rng": (("rng",), {}, "rng must hold"),
    "rng of floats": (("rng", "cpu"), torch.zeros(5056), "rng must hold"),
    "rng of the gpu": (("rng", "cuda"), "state", "rng must hold"),
    "step": (("step",), "1", "step must be an integer"),
    "negative step": (("step",), -1, "step must be an integer"),
    "mean": (("mean",), None, "mean must be three"),
    "std": (("std",), (1.0, 0.0, 1.0), "std must be above 0"),
    "nan": (("std",), (1.0, float("nan"), 1.0), "std must be three finite"),
    "classes": (("classes",), 11, "classes must be 11 names"),
    "too few classes": (("classes",), ("a", "b"), "classes must be 11 names"),
    "ignore_index": (("ignore_index",), None, "ignore_index must be an integer"),
}


def spoil(source, keys, value, path):
    """Write a copy of a checkpoint in which one value is replaced, and return its path."""
    state = torch.load(source)
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize("keys, value, message", CONTENTS.values(), ids=CONTENTS)
def test_a_value_of_the_wrong_type_raises_on_loading(keys, value, message, written, tmp_path):
    path = spoil(written, keys, value, tmp_path / "spoilt.pt")
    with pytest.raises(ValueError, match=f"spoilt.pt is not a valid fastseg checkpoint: its {message}"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (("optimizer", "state"), {}, "the state of the optimizer in .*spoilt.pt does not fit adamw"),
        (("optimizer", "state", 0), 7, "the state of the optimizer in .*spoilt.pt does not fit adamw"),
        (
            ("optimizer", "state", 0, "exp_avg"),
            torch.zeros(2),
            "the state of the optimizer in .*spoilt.pt does not fit",
        ),
        (("optimizer", "state", 0, "step"), "1", "the state of the optimizer in .*spoilt.pt does not fit adamw"),
        (
            ("rng", "cpu"),
            torch.zeros(9, dtype=torch.uint8),
            "state of the random number generator in .*spoilt.pt is invalid",
        ),
    ],
)
def test_state_that_does_not_fit_the_run_raises_on_resuming(keys, value, message, written, tmp_path):
    with pytest.raises(ValueError, match=message):
        resume_run(spoil(written, keys, value, tmp_path / "spoilt.pt"), {})


def test_the_parameter_groups_of_the_optimizer_follow_from_the_config(written, tmp_path):
    path = spoil(written, ("optimizer", "param_groups"), "none", tmp_path / "spoilt.pt")
    assert same(resume_run(path, {}).optimizer.state_dict()["state"], torch.load(written)["optimizer"]["state"])


def test_sgd_without_momentum_resumes(tmp_path):
    path = run(1, steps=2, optimizer="sgd", momentum=0.0, out=str(tmp_path)).path
    resumed = resume_run(path, {})
    resumed.run()
    assert resumed.step == 2


def test_a_checkpoint_of_the_demo_is_read_without_its_command():
    code = (
        "import sys, fastseg.training.networks as c; print(type(c.build_model('demo', 3, 1.0)).__module__); "
        "assert not {'fastseg.commands.demo', 'fastseg.training.comparison'} & {*sys.modules}"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fastseg.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "fastseg.models.plain_segnet", done.stderr
