import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.train_common import SMALL, run, same

import fastseg
from fastseg.commands import cli, train
from fastseg.training import checkpoint, data, trainer

pytest.importorskip("sklearn")

SMALL_ARGUMENTS = ["--model", "segnet-basic", "--width", "0.125", "--size", "32x32", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_is_uninterrupted_to_the_bit(optimizer, tmp_path):
    """Five scenes in batches of two: the six steps cross two epochs."""
    options = {"steps": 6, "optimizer": optimizer, "eval_every": 2}
    whole = run(**options, out=str(tmp_path / "whole"))
    run(3, **options, out=str(tmp_path / "halves"))
    path = tmp_path / "halves" / "checkpoint.pt"
    assert checkpoint.load_checkpoint(path)["step"] == 3
    resumed = train.resume(path, {})
    torch.manual_seed(99)  # what else the process does must not matter
    resumed.restore(checkpoint.load_checkpoint(path), path)
    resumed.run()
    ours, theirs = checkpoint.load_checkpoint(path), checkpoint.load_checkpoint(whole.path)
    assert ours.pop("config")["out"] != theirs.pop("config")["out"]
    assert same(ours, theirs)
    lines = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6] and lines == resumed.history
    assert lines[-1]["miou"] == whole.history[-1]["miou"] and "miou" not in lines[1]


@pytest.mark.parametrize("later", ['{"step": 3, "loss": 1.0, "lr": 0.1}\n', '{"step": 3, "lo'])
def test_history_is_cut_back_to_the_resumed_step(later, tmp_path):
    path = run(2, steps=4, out=str(tmp_path)).path
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(later)  # by a run that was killed
    assert [record["step"] for record in train.resume(path, {}).history] == [2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_ctrl_c_writes_a_checkpoint_and_exits_130(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastseg.commands.cli",
        "train",
        *SMALL_ARGUMENTS,
        "--steps",
        "100000",
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(fastseg.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"to go on: fastseg train --resume {tmp_path / 'checkpoint.pt'}" in errors and "Traceback" not in errors
    state = checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert state["step"] == last["step"] >= 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]


def test_a_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt() and "Ctrl-C again stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_lowers_the_loss(tmp_path):
    history = run(steps=60, lr=1e-2, out=str(tmp_path), eval_every=60).history
    assert [record["step"] for record in history] == [10, 20, 30, 40, 50, 60]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"] and 0 < history[-1]["miou"] < 1


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(tmp_path):
    made = run(2, steps=4, out=str(tmp_path))
    before = made.path.read_bytes()
    resumed = train.resume(made.path, {})
    with torch.no_grad():
        next(resumed.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss was nan in one of the 2 steps up to step 4; try a lower --lr"):
        resumed.run()
    assert made.path.read_bytes() == before


def test_weights_that_the_last_step_made_infinite_are_not_written(tmp_path):
    """The loss of the last step is that of the weights before it."""
    made = train.start(SMALL | {"steps": 1, "out": str(tmp_path), "optimizer": "sgd"})
    step = made.training_step

    def overflowing(*batch):
        loss = step(*batch)
        with torch.no_grad():
            made.model.classifier.bias[3] = torch.inf
        return loss

    made.training_step = overflowing
    with pytest.raises(ValueError, match="the weights are no longer finite after step 1; try a lower --lr"):
        made.run()
    assert not made.path.exists()


def test_the_command(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", *SMALL_ARGUMENTS, "--steps", "4", "--eval-every", "2", "--out", str(out)]
    assert cli.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["steps"] == 4 and 0 <= result["miou"] <= 1 and len(result["iou"]) == 11
    assert "step 2/4  loss" in printed.err and result["checkpoint"] == str(out / "checkpoint.pt")
    assert cli.main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--steps", "6"]) == 0
    printed = capsys.readouterr()
    assert "mIoU" in printed.out and "steps 4 to 6" in printed.err
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--lr", "7"]) == 2
    assert "--lr 7.0 is not what" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(out / "checkpoint.pt"), "--steps", "5"]) == 2
    assert "is at step 6 already" in capsys.readouterr().err


@pytest.mark.parametrize("model, optimizer", [("fcn-16s", "sgd"), ("fcn-8s-at-once", "adamw")])
def test_a_network_with_a_frozen_layer_goes_on(model, optimizer, tmp_path):
    """The optimizer keeps nothing for the bilinear interpolation that FCN ends in."""
    options = {"model": model, "width": 0.02, "optimizer": optimizer, "lr": 1e-3, "steps": 3, "eval_every": 100}
    options |= {"size": (16, 16), "out": str(tmp_path)}
    stopped = run(2, **options)
    resumed = train.resume(stopped.path, {})
    assert resumed.step == 2 and same(resumed.model.state_dict(), stopped.model.state_dict())
    losses = []
    for one in (resumed, stopped):
        torch.manual_seed(0)  # of the dropout
        losses.append(one.training_step(*one.batch(2)))
    assert torch.equal(*losses) and same(resumed.model.state_dict(), stopped.model.state_dict())
    state = checkpoint.load_checkpoint(stopped.path)["optimizer"]["state"]
    assert len(state) == len(list(stopped.model.parameters())) - 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["segnet", "deconvnet"])
def test_one_step_is_the_optimizer_by_hand(optimizer, model, tmp_path):
    """The trainer does what the config says: normalised pictures, class weights, learning rate, optimizer."""
    size = (224, 224) if model == "deconvnet" else (32, 32)
    options = SMALL | {"model": model, "size": size, "optimizer": optimizer, "out": str(tmp_path), "steps": 9}
    options |= {"schedule": "one-cycle", "lr": 0.25, "class_weights": "1,2,3,4,5,6,7,8,9,10,0.5", "width": 0.02}
    made = train.start(options)
    torch.manual_seed(0)
    model = checkpoint.build_model(options["model"], 11, 0.02)
    assert same(model.state_dict(), made.model.state_dict())
    images, masks = made.batch(0)
    loss = made.training_step(images, masks)
    weight = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0.5])
    want = torch.nn.functional.cross_entropy(model((images - 0.5) / 0.25), masks, weight)
    torch.testing.assert_close(loss, want)
    want.backward()
    kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}
    kind, extra = kinds[optimizer]
    kind(model.parameters(), 0.04 * 0.25, weight_decay=5e-4, **extra).step()
    torch.testing.assert_close(dict(made.model.named_parameters()), dict(model.named_parameters()))


def test_batches_go_through_every_epoch_once(tmp_path):
    class Numbers:
        def __len__(self):
            return 7

        def sample(self, index, epoch):
            return torch.full((3, 1, 1), float(index)), torch.full((1, 1), epoch)

    batches = [trainer.training_batch(Numbers(), 3, seed=5, step=step) for step in range(7)]
    indices = torch.cat([images[:, 0].flatten() for images, _ in batches]).int().tolist()
    epochs = torch.cat([masks.flatten() for _, masks in batches]).tolist()
    assert epochs == [0] * 7 + [1] * 7 + [2] * 7
    orders = [indices[:7], indices[7:14], indices[14:]]
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1] != orders[2]
    assert [m.tolist() for m in trainer.training_batch(Numbers(), 3, 5, 4)] == [m.tolist() for m in batches[4]]
    assert not torch.equal(trainer.training_batch(Numbers(), 7, 6, 0)[0], trainer.training_batch(Numbers(), 7, 5, 0)[0])


def test_prefetched_keeps_order_and_passes_errors_on():
    def make(item):
        time.sleep(0.01 * (item % 3 == 0))
        if item == 9:
            raise ValueError("nine")
        return item

    items = trainer.prefetched(make, range(3, 20), workers=4)
    assert [next(items) for _ in range(6)] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="nine"):
        next(items)


def test_learning_rates():
    def rates(schedule):
        config = trainer.TrainConfig(schedule=schedule, lr=2.0, steps=100)
        return [trainer.learning_rate(config, step) for step in range(100)]

    assert rates("constant") == [2.0] * 100
    cosine, one_cycle = rates("cosine"), rates("one-cycle")
    assert cosine[0] == 2 and cosine[50] == pytest.approx(1) and 0 < cosine[99] < 0.01
    assert one_cycle[0] == pytest.approx(0.08) and max(one_cycle) == one_cycle[20] == 2 and 0 < one_cycle[99] < 0.01
    assert one_cycle[:21] == sorted(one_cycle[:21]) and cosine == sorted(cosine, reverse=True)


def test_class_weights():
    scenes = data.DigitScenes("train", length=5)
    assert trainer.class_weights("none", scenes) is None
    assert torch.equal(trainer.class_weights("camvid", scenes), torch.tensor(data.CAMVID_CLASS_WEIGHTS))
    computed = data.median_frequency_weights(scenes, 11, -100)
    assert torch.equal(trainer.class_weights("median-frequency", scenes), computed) and computed[10] < 1
    assert trainer.class_weights("1,0,1,1,1,1,1,1,1,1,.5", scenes).tolist()[9:] == [1, 0.5]
    for wrong in ("heavy", "1,2", "1,1,1,1,1,1,1,1,1,1,-1", "1,1,1,1,1,1,1,1,1,1,nan"):
        with pytest.raises(ValueError, match="class weights must be"):
            trainer.class_weights(wrong, scenes)


REFUSED = {
    "device": ({"device": "tpu9"}, "--device must be"),
    "no such gpu": ({"device": "cuda:77"}, "there is no device cuda:77"),
    "amp": ({"amp": True}, "--amp needs a CUDA device"),
    "steps": ({"steps": 0}, "steps must be from 1 to"),
    "infinite lr": ({"lr": float("inf")}, "lr must be from 0 to 1000000.0, not inf"),
    "lr not a number": ({"lr": float("nan")}, "lr must be from 0 to 1000000.0, not nan"),
    "no lr": ({"lr": 0.0}, "lr must be above 0"),
    "infinite momentum": ({"momentum": float("inf")}, "momentum must be from 0 to 1"),
    "infinite decay": ({"weight_decay": float("inf")}, "weight-decay must be from 0 to"),
    "negative seed": ({"seed": -5}, "seed must be from 0 to 9223372036854775807, not -5"),
    "large seed": ({"seed": 10**23}, "seed must be from 0 to"),
    "width": ({"width": 1e30}, r"width must be from 0 to 16, not 1e\+30"),
    "no width": ({"width": 0.0}, "width must be above 0"),
    "side": ({"size": (0, 10**23)}, "size must be from 1x1 to"),
    "type": ({"batch_size": "2"}, "batch-size must be of the type int, not '2'"),
    "size's type": ({"size": (32,)}, r"size must be of the type tuple\[int, int\] | None"),
    "optimizer": ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, not 'adam'"),
    "schedule": ({"schedule": "step"}, "schedule must be one of constant"),
    "ignored label": ({"ignore_index": 3}, "digit scenes have no ignored pixels; --ignore-index needs --data"),
    "infinite weight": ({"class_weights": "inf,1,1,1,1,1,1,1,1,1,1"}, "class weights must be 11 finite numbers"),
    "small for deconvnet": ({"model": "deconvnet", "width": 0.01}, "needs pictures of at least 193x193, not 32x32"),
    "meta": ({"device": "meta"}, "--device must be cpu, cuda or cuda:N, not 'meta'"),
    "classes": ({"num_classes": 3}, "digit scenes have 11 classes"),
    "crop": ({"crop": (8, 8)}, "digit scenes have 11 classes and no crops"),
    "model": ({"model": "u-net"}, "there is no model 'u-net'; choose one of segnet"),
    "data": ({"data": "nowhere"}, "nowhere must be a folder"),
}


@pytest.mark.parametrize("options, sentence", REFUSED.values(), ids=REFUSED)
def test_refused(options, sentence, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train.start(SMALL | {"out": str(tmp_path / "run")} | options)
    assert not list(tmp_path.iterdir())


def test_a_seed_is_refused_before_anything_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr(train, "datasets", None)
    assert cli.main(["train", "--seed", "-5"]) == 2
    assert "seed must be from 0" in capsys.readouterr().err


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_cannot_be_written_to(resumed, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "run")
    path = run(1, steps=2, out=str(tmp_path / "run")).path if resumed else None
    with pytest.raises(ValueError, match=r"--out .*run must be a folder to write to: Not a directory"):
        train.resume(path, {"out": out}) if resumed else train.start(SMALL | {"out": out})


def test_sizes_on_the_command_line(capsys):
    assert train.parse_size("360x480") == (360, 480)
    for wrong in ("360", "0x4", "ax3", "3x4x5"):
        with pytest.raises(SystemExit):
            cli.main(["train", "--size", wrong])
        assert "must be HEIGHTxWIDTH, for example 360x480" in capsys.readouterr().err


def write_pictures(root, sizes, label=2):
    Image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(root / split / f"{number}.png")
            Image.fromarray(np.full(size, label, np.uint8)).save(root / f"{split}annot" / f"{number}.png")
    return str(root)


def test_a_folder_of_pictures(tmp_path):
    options = {"data": write_pictures(tmp_path / "set", [(20, 30), (24, 18)]), "steps": 2, "num_classes": 4}
    made = run(**options, ignore_index=255, out=str(tmp_path / "run"), crop=(16, 16))
    state = checkpoint.load_checkpoint(made.path)
    assert state["classes"] == ("class 0", "class 1", "class 2", "class 3") and state["mean"] == data.IMAGENET_MEAN
    with pytest.raises(ValueError, match="the pictures differ in size: give one to resize them to, --size HxW"):
        run(**options | {"size": None}, out=str(tmp_path / "other"))
    for void, sentence in (
        ("train", "look for pictures of ignored pixels"),
        ("val", "no pixel of the validation masks"),
    ):
        root = Path(write_pictures(tmp_path / void, [(20, 30)]))
        (root / f"{void}annot").rename(root / "old")
        write_pictures(root / "void", [(20, 30)], label=255)
        (root / "void" / f"{void}annot").rename(root / f"{void}annot")
        with pytest.raises(ValueError, match=sentence):
            run(**options | {"data": str(root)}, ignore_index=255, out=str(tmp_path / f"run-{void}"))
