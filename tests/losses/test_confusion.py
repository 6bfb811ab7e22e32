"""confusion_matrix against counts in Python, and its arguments."""

import pytest
import torch
from support.cross_entropy_common import BACKENDS

import fastseg
from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.kernels.losses import confusion as kernels


def counted(pred, target, classes, ignore_index=None):
    want = torch.zeros(classes, classes, dtype=torch.int64)
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignore_index:
            want[t, p] += 1
    return want


@BACKENDS
@pytest.mark.parametrize("classes, ignore", [(1, None), (2, 0), (19, 255), (70, -1), (130, None)])
def test_counts(classes, ignore, backend, device):
    pred = torch.randint(classes, (2, 13, 17), device=device).to(torch.uint8)
    target = torch.randint(classes, pred.shape, device=device)
    if ignore is not None:
        target[torch.rand(target.shape, device=device) < 0.2] = ignore
    with fastseg.backend(backend):
        matrix = FS.confusion_matrix(pred, target, classes, ignore)
    assert matrix.dtype == torch.int64 and matrix.device.type == device
    assert torch.equal(matrix.cpu(), counted(pred, target, classes, ignore))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_many_parts_add_up_and_nothing_outside_is_read(monkeypatch, triton_backend):
    monkeypatch.setattr(kernels, "LEAST_PIXELS", 200)
    pred, target = torch.randint(5, (1, 37, 29)), torch.randint(5, (1, 37, 29))
    with metering() as launches:
        matrix = FS.confusion_matrix(pred, target, 5)
    assert torch.equal(matrix, counted(pred, target, 5))
    assert launches[0].programs == 6 and launches[0].outside == 0
    assert launches[0].sectors("load") <= 1.01 * 16 * pred.numel() + 64  # each label once


def test_no_program_counts_beyond_the_integers_of_float32():
    assert kernels.MOST_PIXELS + kernels.BLOCK <= 2**24


@BACKENDS
def test_logits_are_labelled_as_by_upsample_argmax(backend, device):
    logits, target = torch.randn(2, 6, 3, 4, device=device), torch.randint(6, (2, 9, 8), device=device)
    with fastseg.backend(backend):
        got = FS.confusion_matrix(logits, target, ignore_index=3)
        labels = FS.upsample_argmax(logits, (9, 8))
        assert torch.equal(got, FS.confusion_matrix(labels, target, 6, 3))


@BACKENDS
@pytest.mark.parametrize("classes", [255, 256, 300])
def test_label_dtypes_that_cannot_hold_the_number_of_classes(classes, backend, device):
    target = torch.tensor([[[0, 7], [200, 254]]], dtype=torch.uint8, device=device)
    with fastseg.backend(backend):
        matrix = FS.confusion_matrix(target, target, classes)
        assert torch.equal(matrix.nonzero().cpu(), torch.tensor([[n, n] for n in (0, 7, 200, 254)]))
        logits = torch.zeros(1, classes, 2, 2, device=device).scatter_(1, target[:, None].long(), 1.0)
        assert torch.equal(FS.confusion_matrix(logits, target), matrix)


@BACKENDS
def test_opcheck(backend, device):
    call = (torch.randint(4, (3, 5), device=device), torch.randint(4, (3, 5), device=device), 4, None)
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.confusion_matrix.default, call)


def test_bad_arguments():
    labels = torch.zeros(2, 3, 4, dtype=torch.long)
    for pred, target, classes, words in (
        (labels.float(), labels, 3, "pred must hold integer labels"),
        (labels, labels.float(), 3, "target must hold integer labels"),
        (labels, labels[:1], 3, "pred must have the shape of target"),
        (labels, labels, None, "num_classes"),
        (torch.zeros(2, 5, 3, 4), labels, 4, "5 classes of the logits"),
        (torch.zeros(3, 5, 3, 4), labels, None, r"target must have shape \(3, H, W\)"),
        (labels + 3, labels, 3, "pred must hold labels from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            FS.confusion_matrix(pred, target, classes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint16, torch.int32, torch.uint32], ids=str)
def test_labels_of_every_width_are_counted(dtype, device):
    pred, target = torch.randint(5, (2, 4, 6, 3), device=device)
    target[0, 0] = 100
    want = FS.confusion_matrix(pred, target, 5, ignore_index=100)
    for backend in ("torch", "triton"):
        with fastseg.backend(backend):
            assert torch.equal(FS.confusion_matrix(pred.to(dtype), target.to(dtype), 5, ignore_index=100), want)
            logits = torch.nn.functional.one_hot(pred, 5).movedim(-1, 1).float()
            assert torch.equal(FS.confusion_matrix(logits, target.to(dtype), ignore_index=100), want)
    if device == "cpu":
        with pytest.raises(ValueError, match="pred must hold labels from 0 to 3"):
            FS.confusion_matrix(pred.to(dtype), target.to(dtype), 4, ignore_index=100)
