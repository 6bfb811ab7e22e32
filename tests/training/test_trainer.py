import json

import pytest
import torch
from support.train_common import run, same, start

from fastseg import backend
from fastseg.training import checkpoint, data, networks, trainer
from fastseg.training.config import TrainConfig
from fastseg.training.runs import resume_run

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(optimizer, tmp_path):
    """Five scenes in batches of two: the six steps span three epochs."""
    options = {"steps": 6, "optimizer": optimizer, "eval_every": 2}
    whole = run(**options, out=str(tmp_path / "whole"))
    run(3, **options, out=str(tmp_path / "resumed"))
    path = tmp_path / "resumed" / "checkpoint.pt"
    assert checkpoint.load_checkpoint(path)["step"] == 3
    resumed = resume_run(path, {})
    torch.manual_seed(99)  # other uses of the generator before restoring must not matter
    resumed.restore(checkpoint.load_checkpoint(path), path)
    resumed.run()
    ours, theirs = checkpoint.load_checkpoint(path), checkpoint.load_checkpoint(whole.path)
    assert ours.pop("config")["out"] != theirs.pop("config")["out"]
    assert same(ours, theirs)
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6] and lines == resumed.history
    assert lines[-1]["miou"] == whole.history[-1]["miou"] and "miou" not in lines[1]


@pytest.mark.parametrize("later", ['{"step": 3, "loss": 1.0, "lr": 0.1}\n', '{"step": 3, "lo'])
def test_resuming_drops_records_after_the_step_of_the_checkpoint(later, tmp_path):
    path = run(2, steps=4, out=str(tmp_path)).path
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(later)  # as a run leaves it that was killed after the checkpoint
    assert [record["step"] for record in resume_run(path, {}).history] == [2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_training_lowers_the_loss(tmp_path):
    history = run(steps=60, lr=1e-2, out=str(tmp_path), eval_every=60).history
    assert [record["step"] for record in history] == [10, 20, 30, 40, 50, 60]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"] and 0 < history[-1]["miou"] < 1


def test_on_record_gets_each_record(tmp_path):
    made, records = start(steps=12, eval_every=5, out=str(tmp_path)), []
    made.run(on_record=records.append)
    assert [record["step"] for record in records] == [5, 10, 12] and records == made.history


def test_a_loss_that_is_not_finite_raises_and_keeps_the_checkpoint(tmp_path):
    made = run(2, steps=4, out=str(tmp_path))
    before = made.path.read_bytes()
    resumed = resume_run(made.path, {})
    with torch.no_grad():
        next(resumed.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss was nan in one of the 2 steps up to step 4; try a lower lr"):
        resumed.run()
    assert made.path.read_bytes() == before


def test_weights_that_the_last_step_makes_infinite_are_not_written(tmp_path):
    """The loss of the last step is computed from the weights before it, so it cannot show this."""
    made = start(steps=1, out=str(tmp_path), optimizer="sgd")
    step = made.training_step

    def overflowing(*batch):
        loss = step(*batch)
        with torch.no_grad():
            made.model.classifier.bias[3] = torch.inf
        return loss

    made.training_step = overflowing
    with pytest.raises(ValueError, match="the weights are no longer finite after step 1; try a lower lr"):
        made.run()
    assert not made.path.exists()


@pytest.mark.parametrize("model, optimizer", [("fcn-16s", "sgd"), ("fcn-8s-at-once", "adamw")])
def test_a_network_with_a_frozen_layer_resumes(model, optimizer, tmp_path):
    """The optimizer has no state for FCN's last layer, a bilinear interpolation that is not trained."""
    options = {"model": model, "width": 0.02, "optimizer": optimizer, "lr": 1e-3, "steps": 3, "eval_every": 100}
    options |= {"size": (16, 16), "out": str(tmp_path)}
    stopped = run(2, **options)
    resumed = resume_run(stopped.path, {})
    assert resumed.step == 2 and same(resumed.model.state_dict(), stopped.model.state_dict())
    losses = []
    for one in (resumed, stopped):
        torch.manual_seed(0)  # for dropout
        losses.append(one.training_step(*one.batch(2)))
    assert torch.equal(*losses) and same(resumed.model.state_dict(), stopped.model.state_dict())
    state = checkpoint.load_checkpoint(stopped.path)["optimizer"]["state"]
    assert len(state) == len(list(stopped.model.parameters())) - 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["segnet", "deconvnet"])
def test_one_step_equals_a_step_written_out(optimizer, model, tmp_path):
    """The trainer does what the config says: normalisation, class weights, learning rate and optimizer."""
    size = (224, 224) if model == "deconvnet" else (32, 32)
    options = {"model": model, "size": size, "optimizer": optimizer, "out": str(tmp_path), "steps": 9}
    options |= {"schedule": "one-cycle", "lr": 0.25, "class_weights": "1,2,3,4,5,6,7,8,9,10,0.5", "width": 0.02}
    made = start(**options)
    torch.manual_seed(0)
    model = networks.build_model(options["model"], 11, 0.02)
    assert same(model.state_dict(), made.model.state_dict())
    images, masks = made.batch(0)
    with backend("torch"):  # the same rounding as below: AdamW magnifies it where a gradient is nearly zero
        loss = made.training_step(images, masks)
    weight = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0.5])
    with backend("torch"):
        want = torch.nn.functional.cross_entropy(model((images - 0.5) / 0.25), masks, weight)
        torch.testing.assert_close(loss, want)
        want.backward()
    kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}
    kind, extra = kinds[optimizer]
    kind(model.parameters(), 0.04 * 0.25, weight_decay=5e-4, **extra).step()
    torch.testing.assert_close(dict(made.model.named_parameters()), dict(model.named_parameters()))


def test_learning_rates():
    def rates(schedule):
        config = TrainConfig(schedule=schedule, lr=2.0, steps=100)
        return [trainer.learning_rate(config, step) for step in range(100)]

    assert rates("constant") == [2.0] * 100
    cosine, one_cycle = rates("cosine"), rates("one-cycle")
    assert cosine[0] == 2 and cosine[50] == pytest.approx(1) and 0 < cosine[99] < 0.01
    assert one_cycle[0] == pytest.approx(0.08) and max(one_cycle) == one_cycle[20] == 2 and 0 < one_cycle[99] < 0.01
    assert one_cycle[:21] == sorted(one_cycle[:21]) and cosine == sorted(cosine, reverse=True)
