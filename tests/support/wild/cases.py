"""The networks, their losses, and what fastseg should find in each."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from . import enet, erfnet, fcn, segnet, unet

CLASSES = 5
GRADIENT_TOLERANCE = 1e-3
"""For gradients, beyond torch's own errors: a PReLU's gradient is one sum, whose terms may nearly cancel."""


class Supervised(nn.Module):
    """A network and its loss. Returns (logits, loss)."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, target):
        logits = self.net(x)
        return logits, self.loss(logits, target)


@dataclass(frozen=True)
class Case:
    """A network, the size of its images, its loss, and what fastseg finds in it.

    swapped: the number of swapped layers by op. fused: the number of fused groups by their layers. calls: how often a
    forward calls each function; `called` overrides `swapped` for functions that are not called once per layer.
    compiled: what torch.compile's backend puts into the graph. slow_to_train: the interpreted backward takes most of a
    minute, because a window has 64x64 = 4096 taps.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    loss: Callable[[], nn.Module] | None = nn.CrossEntropyLoss
    swapped: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    classes: int = CLASSES
    images: int = 2
    called: dict[str, int] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)
    slow_to_train: bool = False

    @property
    def calls(self) -> dict[str, int]:
        return {op: n for op, n in (self.swapped | self.called).items() if op != SEQUENCE}

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
        {POOL: 3, UNPOOL: 2, CONV: 3, LOSS: 1, SEQUENCE: 2}, {BR: 2},  # the other sequences have PReLU
        compiled={POOL: 3, UNPOOL: 2, CONV: 3, LOSS: 1, "batch_norm_relu": 4},  # two are not in sequences
    ),
    "segnet-shared": Case(
        lambda: segnet.SharedSegNet(CLASSES), (17, 22), weighted, {POOL: 1, UNPOOL: 1, LOSS: 1, SEQUENCE: 6}, {CBR: 6},
        called={POOL: 3, UNPOOL: 3},
        compiled={"batch_norm_relu_max_pool2d": 3, "batch_norm_relu_max_unpool2d": 2, "batch_norm_relu": 1,
                  "max_unpool2d_with_offsets": 1, "input_bias": 6, LOSS: 1},
    ),
    "segnet-functional": Case(
        lambda: segnet.FunctionalSegNet(CLASSES), (9, 11), None, called={POOL: 2, UNPOOL: 2, CONV: 1, LOSS: 2},
        compiled={"batch_norm_relu_max_pool2d": 1, "batch_norm_relu_max_unpool2d": 1, "batch_norm_relu": 1,
                  "max_pool2d_with_offsets": 1, "max_unpool2d_with_offsets": 1, "input_bias": 3,
                  "upsample_cross_entropy": 1, CONV: 1, LOSS: 1},
    ),
    "fcn-8s": Case(
        lambda: fcn.FCN(3, 8), (37, 37), lambda: nn.CrossEntropyLoss(reduction="sum"), {POOL: 5, CONV: 3, LOSS: 1},
        classes=3, images=1,
    ),
    "fcn-32s": Case(
        lambda: fcn.FCN(3, 32), (37, 37), nn.CrossEntropyLoss, {POOL: 5, CONV: 1, LOSS: 1},
        classes=3, images=1, slow_to_train=True,
    ),
    "erfnet": Case(
        lambda: erfnet.ERFNet(CLASSES), (16, 24), nn.CrossEntropyLoss, {POOL: 3, CONV: 3, LOSS: 1},  # calls F.relu
        compiled={POOL: 3, CONV: 3, LOSS: 1, "batch_norm_relu": 8, "input_bias": 5},
    ),
    "unet-odd": Case(
        lambda: unet.UNet(CLASSES), (11, 15), lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        {POOL: 2, CONV: 2, LOSS: 1, SEQUENCE: 5}, {BR: 10},
        compiled={POOL: 2, CONV: 2, LOSS: 1, "batch_norm_relu": 10},
    ),
    "linknet": Case(
        lambda: unet.LinkNet(CLASSES), (16, 24), nn.NLLLoss,
        {POOL: 1, CONV: 4, SEQUENCE: 9}, {BR: 1, CBR: 5, "deconv + norm + relu": 3},
        compiled={POOL: 1, CONV: 4, "batch_norm_relu": 11, "input_bias": 6},  # two are in residual blocks
    ),
    "repeated": Case(
        lambda: unet.Repeated(CLASSES), (8, 10), nn.CrossEntropyLoss,
        {POOL: 1, CONV: 1, LOSS: 1, SEQUENCE: 1}, {CBR: 2, "conv + norm + relu + pool": 1},
        compiled={"batch_norm_relu": 2, "batch_norm_relu_max_pool2d": 1, "input_bias": 3, CONV: 1, LOSS: 1},
    ),
}  # fmt: skip


def batch(case, device):
    size = [2 * n for n in case.size] if case.loss is None else case.size  # that network doubles the size
    return (
        torch.randn(case.images, 3, *case.size, device=device),
        torch.randint(case.classes, (case.images, *size), device=device),
    )
