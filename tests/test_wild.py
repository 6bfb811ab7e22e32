"""fastseg.swap in networks as people write them: the same numbers before, during and after, and an exact report."""

import collections
import contextlib
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from wild import enet, erfnet, fcn, segnet, unet

import fastseg
from fastseg import outcomes, verify

CLASSES = 5


class Supervised(nn.Module):
    """A network and its loss, which gives the logits too."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, target):
        logits = self.net(x)
        return logits, self.loss(logits, target)


@dataclass(frozen=True)
class Case:
    """A network, the size of its pictures, its loss, and what swap finds: layers by op, and what runs as one."""

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    loss: Callable[[], nn.Module] | None = nn.CrossEntropyLoss
    swapped: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    classes: int = CLASSES
    pictures: int = 2
    slow_to_train: bool = False  # interpreted: the backward of a 64x64 window goes through 4096 taps, most of a minute

    def model(self, device):
        net = self.build()
        return (net if self.loss is None else Supervised(net, self.loss())).to(device)


def weighted():
    return nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 1.5, 2.0, 1.0]), ignore_index=CLASSES - 1)


POOL, UNPOOL, CONV, LOSS, SEQUENCE = (
    "max_pool2d",
    "max_unpool2d",
    "conv_transpose2d",
    "cross_entropy",
    "batch_norm_relu",
)
CBR, BR = "conv + norm + relu", "norm + relu"
CASES = {
    "enet": Case(
        lambda: enet.ENet(CLASSES), (16, 24), weighted,
        {POOL: 3, UNPOOL: 2, CONV: 3, LOSS: 1, SEQUENCE: 2}, {BR: 2},  # the others have PReLU
    ),
    "segnet-shared": Case(
        lambda: segnet.SharedSegNet(CLASSES), (17, 22), weighted, {POOL: 1, UNPOOL: 1, LOSS: 1, SEQUENCE: 6}, {CBR: 6}
    ),
    "segnet-functional": Case(lambda: segnet.FunctionalSegNet(CLASSES), (9, 11), None),
    "fcn-8s": Case(
        lambda: fcn.FCN(3, 8), (37, 37), lambda: nn.CrossEntropyLoss(reduction="sum"), {POOL: 5, CONV: 3, LOSS: 1},
        classes=3, pictures=1,
    ),
    "fcn-32s": Case(
        lambda: fcn.FCN(3, 32), (37, 37), nn.CrossEntropyLoss, {POOL: 5, CONV: 1, LOSS: 1},
        classes=3, pictures=1, slow_to_train=True,
    ),
    "erfnet": Case(lambda: erfnet.ERFNet(CLASSES), (16, 24), nn.CrossEntropyLoss, {POOL: 3, CONV: 3, LOSS: 1}),
    "unet-odd": Case(
        lambda: unet.UNet(CLASSES), (11, 15), lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        {POOL: 2, CONV: 2, LOSS: 1, SEQUENCE: 5}, {BR: 10},
    ),
    "linknet": Case(
        lambda: unet.LinkNet(CLASSES), (24, 32), nn.NLLLoss,
        {POOL: 1, CONV: 4, SEQUENCE: 9}, {BR: 1, CBR: 5, "deconv + norm + relu": 3},
    ),
    "repeated": Case(
        lambda: unet.Repeated(CLASSES), (8, 10), nn.CrossEntropyLoss,
        {POOL: 1, CONV: 1, LOSS: 1, SEQUENCE: 1}, {CBR: 2, "conv + norm + relu + pool": 1},
    ),
}  # fmt: skip
PARTS = {nn.Conv2d: "conv", nn.ConvTranspose2d: "deconv", nn.BatchNorm2d: "norm", nn.ReLU: "relu", nn.MaxPool2d: "pool"}


def batch(case, device):
    size = [2 * n for n in case.size] if case.loss is None else case.size  # that network doubles its picture
    return (
        torch.randn(case.pictures, 3, *case.size, device=device),
        torch.randint(case.classes, (case.pictures, *size), device=device),
    )


def wrong(found):
    return [
        f"{kind} {c.tensor}: {c.error:.2e}, torch {c.torch_error:.2e}, allowed {c.allowed:.2e}"
        for kind, comparisons in found.items()
        for c in comparisons
        if not c.passed
    ]


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model(case, device):
    return case.model(device)


@pytest.fixture
def data(case, device):
    return batch(case, device)


def fused(report):
    """What runs as one, in words, counted."""
    found = collections.Counter()
    for sequence in report.swapped:
        for names in sequence.together:
            layers = (sequence.module.get_submodule(name) for name in names)
            kinds = (next(word for base, word in PARTS.items() if isinstance(layer, base)) for layer in layers)
            found[" + ".join(kinds)] += 1
    return found


def test_the_report_is_exact(case, model):
    before = kinds(model)
    report = fastseg.swap(model, strict=True)
    assert collections.Counter(layer.op for layer in report.swapped) == case.swapped
    assert fused(report) == case.fused
    assert report.left == []
    assert sum(a is not b for a, b in zip(before, kinds(model), strict=True)) == sum(case.swapped.values())


def on_kernels(report, model, data):
    # torch's own functions, which a swap of layers does not reach, are refused where all must be deterministic
    with fastseg.backend("triton"), verify.poisoned() if report.swapped else contextlib.nullcontext():
        return outcomes.outcome(model, data)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_same_numbers_before_during_and_after(case, model, data, device, training):
    model.train(training)
    keys, before = list(model.state_dict()), kinds(model)
    plain = outcomes.outcome(model, data)
    truth = outcomes.in_float64(model, data)
    report = fastseg.swap(model)
    during = outcomes.outcome(model, data)
    if device == "cpu":  # where "auto" is torch
        assert outcomes.equal(during, plain)
    assert wrong(outcomes.compare(during, plain, truth)) == []
    if not (device == "cpu" and training and case.slow_to_train):
        assert wrong(outcomes.compare(on_kernels(report, model, data), plain, truth)) == []
    assert list(model.state_dict()) == keys
    report.undo()
    assert kinds(model) == before and list(model.state_dict()) == keys
    if device == "cpu":
        assert outcomes.equal(outcomes.outcome(model, data), plain)


def test_every_swapped_layer_runs_on_the_kernels(case, model, data, triton_backend):
    """That the comparison above was of kernels, and not of torch with itself."""
    fastseg.swap(model)
    chosen = fastseg.explain(model, *data)
    assert {choice.backend for choice in chosen} <= {"triton"}
    ran = collections.Counter(choice.operator for choice in chosen)
    pooled_together = sum(n for layers, n in case.fused.items() if "pool" in layers)
    alone = set(case.swapped) - {SEQUENCE} - ({POOL} if pooled_together == case.swapped.get(POOL) else set())
    assert alone <= ran.keys()
    assert sum(n for op, n in ran.items() if op.startswith(SEQUENCE)) == sum(case.fused.values())


def test_compact_indices(device, triton_backend):
    """One shared pool and unpool of one geometry; ENet's are of two, so that its indices stay what they are."""
    model, case = CASES["segnet-shared"].model(device), CASES["segnet-shared"]
    data = batch(case, device)
    plain, truth = outcomes.outcome(model, data), outcomes.in_float64(model, data)
    report = fastseg.swap(model, compact_indices=True)
    assert report.compact_indices and report.compact_reason is None
    seen = set()
    model.net.pool.register_forward_hook(lambda module, inputs, output: seen.add(output[1].dtype))
    assert wrong(outcomes.compare(outcomes.outcome(model, data), plain, truth)) == []
    assert seen == {torch.uint8}
    report = fastseg.swap(CASES["enet"].model(device), compact_indices=True)
    assert not report.compact_indices and "differ in kernel_size" in report.compact_reason


def test_copies_of_the_swapped_model(model, data):
    fastseg.swap(model)
    want = outcomes.outcome(model, data)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(copied) == kinds(model)
        assert outcomes.equal(outcomes.outcome(copied, data), want)


def test_weights_travel_both_ways(case, device):
    plain, swapped = case.model(device), case.model(device)
    fastseg.swap(swapped)
    assert list(plain.state_dict()) == list(swapped.state_dict())
    swapped.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(swapped.state_dict(), strict=True)


def test_weights_can_be_initialised_by_class_after_the_swap(device):
    """FCN's interpolation is written where isinstance(m, nn.ConvTranspose2d): a swapped layer must still be one."""
    net = fcn.FCN(CLASSES, 32)
    want = net.upscore.weight.detach().clone()
    fastseg.swap(net)
    net.upscore.weight.data.zero_()
    net._initialize_weights()
    assert torch.equal(net.upscore.weight, want) and want.count_nonzero() > 0
