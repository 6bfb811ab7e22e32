import json
import sys

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


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_ignored_pixels_changes_nothing(tmp_path):
    made = start(steps=4, out=str(tmp_path), lr=0.1)
    images, masks = made.batch(0)
    made.training_step(images, masks)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    assert made.training_step(images, torch.full_like(masks, -100)) is None
    assert same(made.model.state_dict(), before) and made.step == 2
    made.training_step(images, masks)
    assert not same(made.model.state_dict(), before)


def test_classes_of_weight_0_alone_are_no_batch_either(tmp_path):
    made = start(steps=4, out=str(tmp_path), class_weights="0,1,1,1,1,1,1,1,1,1,1")
    images, masks = made.batch(0)
    assert made.training_step(images, torch.zeros_like(masks)) is None
    assert made.training_step(images, masks).isfinite()


def test_a_run_goes_on_over_ignored_batches(tmp_path):
    made = start(steps=22, out=str(tmp_path), eval_every=50)
    batch = made.batch
    made.batch = lambda step: batch(step) if step >= 20 else (batch(step)[0], torch.full_like(batch(step)[1], -100))
    made.run()
    assert [record["loss"] is None for record in made.history] == [True, True, False]
    assert resume_run(made.path, {"steps": 22}).history == made.history


@pytest.mark.parametrize("weights", ["none", "1,2,3,4,5,6,7,8,9,10,0.5"])
def test_accumulated_gradients_are_those_of_the_whole_batch(weights, tmp_path):
    """With batch norm's running statistics; the parts have different numbers of ignored pixels."""
    options = {"model": "fcn-32s", "width": 0.02, "class_weights": weights, "optimizer": "sgd", "lr": 0.1, "steps": 5}
    whole, parts = (
        start(**options, batch_size=4 // count, accumulate=count, out=str(tmp_path / str(count))) for count in (1, 4)
    )
    for made in (whole, parts):  # without dropout the parts have the gradients of the whole
        for layer in made.model.modules():
            if isinstance(layer, torch.nn.Dropout2d | torch.nn.Dropout):
                layer.p = 0.0
    images, masks = whole.batch(0)
    assert all(map(torch.equal, (images, masks), parts.batch(0)))
    masks[0, :20], masks[2] = -100, -100
    losses = [made.training_step(images, masks) for made in (whole, parts)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(dict(parts.model.named_parameters()), dict(whole.model.named_parameters()))


def test_averaged_weights_are_scored_written_and_resumed(tmp_path):
    options = {"steps": 6, "ema": 0.9, "eval_every": 3}
    whole = run(**options, out=str(tmp_path / "whole"))
    assert not same(whole.averaged.state_dict(), whole.model.state_dict())
    path = run(3, **options, out=str(tmp_path / "resumed")).path
    resumed = resume_run(path, {})
    resumed.run()
    ours, theirs = (checkpoint.load_checkpoint(made.path) for made in (resumed, whole))
    assert same(ours["ema"], theirs["ema"]) and same(ours["ema"], whole.averaged.state_dict())
    found = whole.evaluate()
    whole.model.load_state_dict(whole.averaged.state_dict())
    whole.averaged = whole.model
    assert whole.evaluate() == found


def test_the_average_is_that_of_the_formula(tmp_path):
    made = start(steps=9, ema=0.9, out=str(tmp_path), lr=0.1, optimizer="sgd")
    name = "classifier.bias"
    average = None
    for step in range(5):
        made.training_step(*made.batch(step))
        now = made.model.state_dict()[name].clone()
        decay = min(0.9, (1 + step) / (10 + step))
        average = now if average is None else decay * average + (1 - decay) * now
    torch.testing.assert_close(made.averaged.state_dict()[name], average)


def test_bfloat16_on_a_cpu(tmp_path):
    made = start(steps=2, amp="bf16", out=str(tmp_path))
    assert made.logits(made.batch(0)[0]).dtype == torch.bfloat16
    assert made.run().miou >= 0


# --- errors and logs -------------------------------------------------------------------------------------------------


def test_any_error_leaves_the_last_step(tmp_path):
    made = start(steps=9, out=str(tmp_path))
    step = made.training_step

    def fails(*batch):
        if made.step == 4:
            raise RuntimeError("out of memory")
        return step(*batch)

    made.training_step = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        made.run()
    assert made.rescued and checkpoint.load_checkpoint(made.path)["step"] == 4
    resumed = resume_run(made.path, {})
    resumed.run()
    assert resumed.step == 9


def test_an_error_within_the_update_keeps_the_checkpoint_before(tmp_path):
    made = run(2, steps=9, out=str(tmp_path))
    before, update = made.path.read_bytes(), made.optimizer.step

    def fails():
        update()
        if made.step == 4:
            raise RuntimeError("no more")

    made.optimizer.step = fails
    with pytest.raises(RuntimeError, match="no more"):
        made.run()
    assert made.step == 4 and not made.rescued and made.path.read_bytes() == before


def test_a_table_of_records(tmp_path):
    options = {"steps": 25, "eval_every": 20, "log": "csv"}
    run(22, **options, out=str(tmp_path))
    resume_run(tmp_path / "checkpoint.pt", {}).run()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,loss,lr,miou" and [line.split(",")[0] for line in lines[1:]] == ["10", "20", "22", "25"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [float(line.split(",")[1]) for line in lines[1:]] == [record["loss"] for record in records]
    assert lines[1].endswith(",") and float(lines[2].split(",")[3]) == records[1]["miou"]


def test_tensorboard_gets_the_records(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = run(steps=20, eval_every=20, log="csv,tensorboard", out=str(tmp_path))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert events.Scalars("miou")[0].value == pytest.approx(made.history[-1]["miou"])


def test_without_tensorboard_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "fastseg-kernels\[tensorboard\]"'):
        start(log="tensorboard", out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="log must be made of csv, tensorboard, but has 'wandb'"):
        start(log="csv,wandb", out=str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
