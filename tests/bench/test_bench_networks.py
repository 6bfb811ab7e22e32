"""The networks that `fastseg bench` times: their forms, and the ADE20K head with its loss and labels at full size."""

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import models
from fastseg.bench import networks, results, timing
from fastseg.bench.models import ModelBench
from fastseg.bench.networks import IGNORED, NETWORKS, Built

FACTS = {"gpu": "Test GPU", "driver": "1.2", "torch": "2.0", "triton": "3.0", "fastseg": "0.1.0", "commit": "abc"}
BY_NAME = {network.name: network for network in NETWORKS}
HEAD = BY_NAME["ade20k-head"]


def run(network, monkeypatch, dtype="float32"):
    """(notes of the checks, what was timed) of the network on a CPU, by provider."""
    monkeypatch.setattr(timing, "measure", lambda call, *rest: timing.Timing(1, 2, 3, None))
    recorder = results.Recorder(None, FACTS)
    bench = ModelBench(recorder, "cpu", dtype, "channels_last", float("inf"), small=True, seconds=0)
    bench.run([network], compile=False)
    rows = recorder.records
    notes = [(r["provider"], r["mode"], r["note"]) for r in rows if r["metric"] == "status"]
    return notes, {(r["provider"], r["mode"]) for r in rows if r["metric"] == "ms"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_checked_and_timed_in_each_form(dtype, monkeypatch):
    notes, timed = run(HEAD, monkeypatch, dtype)
    providers = ["torch", "fastseg swap", "fastseg"]
    assert notes == [(who, "", "right") for who in providers]
    assert timed == {(who, mode) for who in providers for mode in ("inference", "training step")}


def test_labels_of_another_resizing_are_not_timed(monkeypatch):
    def corners(logits, size, mode, align_corners):
        return F.interpolate(logits, size, mode=mode, align_corners=True).argmax(1)

    monkeypatch.setattr(networks.functional, "upsample_argmax", corners)
    notes, timed = run(HEAD, monkeypatch)
    assert [who for who, _, note in notes if note.startswith("wrong: labels")] == ["fastseg"]
    assert "fastseg" not in {who for who, _ in timed} and ("torch", "inference") in timed


def test_a_loss_that_counts_ignored_labels_is_not_timed(monkeypatch):
    def all_count(logits, labels):
        return F.cross_entropy(networks.resized(logits, labels.shape[-2:]), labels.where(labels != IGNORED, 0))

    monkeypatch.setattr(networks.fused.UpsampleCrossEntropyLoss, "forward", lambda self, *pair: all_count(*pair))
    notes, timed = run(HEAD, monkeypatch)
    assert [who for who, _, note in notes if note.startswith("wrong: loss")] == ["fastseg"]
    assert {who for who, _ in timed} == {"torch", "fastseg swap"}


def test_the_forms_of_the_head_run_their_operators(monkeypatch):
    built = Built(HEAD, small=True)
    plain, swapped, native = (built.form(name) for name in ("plain", "swapped", "native"))
    inputs = [torch.randn(shape) for shape in HEAD.inputs(1, 64, 64)]
    labels = HEAD.labels(1, 64, 64, "cpu")

    def operators(form):
        with torch.no_grad():
            return {
                choice.operator
                for call in (
                    lambda x: form.loss(form.model(*x), labels),
                    lambda x: form.predict(form.model(*x), (64, 64)),
                )
                for choice in fastseg.explain(call, inputs)
            }

    monkeypatch.setattr(fastseg.dispatch, "torch_alone", lambda tensor: False)  # let sequences run fused
    assert operators(plain) == set()
    assert operators(swapped) == {"batch_norm_relu", "cross_entropy"}
    assert operators(native) == {"batch_norm_relu", "upsample_cross_entropy", "upsample_argmax"}
    weights = [dict(form.model.state_dict()) for form in (plain, swapped, native)]
    for other in weights[1:]:
        assert weights[0].keys() == other.keys() and all(torch.equal(weights[0][k], other[k]) for k in other)


def test_the_head_at_its_full_size():
    with torch.device("meta"):
        model = networks.SemanticFPN(HEAD.classes)
        features = [torch.empty(shape) for shape in HEAD.inputs(*HEAD.pictures)]
        logits = model(*features)
    assert [tuple(x.shape[1:]) for x in features] == [(64, 128, 128), (128, 64, 64), (320, 32, 32), (512, 16, 16)]
    assert logits.shape == (16, 150, 128, 128)
    assert networks.resized(logits, HEAD.pictures[1:]).shape == (16, 150, 512, 512)


def test_labels():
    drawn = HEAD.labels(2, 64, 64, "cpu")
    assert 0.03 < (drawn == IGNORED).double().mean() < 0.07 and drawn[drawn != IGNORED].max() < 150
    assert BY_NAME["segnet"].labels(2, 64, 64, "cpu").max() == 10


@pytest.mark.parametrize("name", BY_NAME)
def test_forms(name):
    """A form that would repeat another one is None; kernels are forced only if `auto` may choose others."""
    built = Built(BY_NAME[name], small=True)
    assert type(built.form("plain").model).__module__ == networks.__name__
    native = built.form("native")
    assert (native is None) == (name == "unet")
    assert name not in models.MODELS or isinstance(native.model, models.MODELS[name])
    forced = built.form("native", "triton")
    assert (forced is not None) == (name in ("segnet", "deconvnet", "unet"))
    assert built.form("plain").model is built.form("plain").model is not built.form("swapped").model
