"""What the encoder-decoder networks share: convolution blocks, stages of blocks, pooling that can be undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import functional as F

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # output channels, stage by stage

Plan = Sequence[Sequence[int]]
Kept = tuple[Tensor, torch.Size]  # offsets of the maxima, size of the map they were taken from


def check_arguments(num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
    """ValueError where a network cannot be built with these."""
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be a finite number above 0, not {width}")


def scaled(plan: Plan, width: float) -> list[list[int]]:
    """The plan with its channel counts multiplied by `width`: multiples of 8, at least 8."""
    return [[max(8, round(channels * width / 8) * 8) for channels in row] for row in plan]


def block(conv: nn.Conv2d | nn.ConvTranspose2d, bn_eps: float, relu: bool = True) -> nn.Sequential:
    """conv + BN (+ ReLU): keys `0.` and `1.` in a state_dict."""
    layers = [conv, nn.BatchNorm2d(conv.out_channels, eps=bn_eps)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def stages(in_channels: int, plan: Plan, layer: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    """One nn.Sequential for each row of the plan, of ``layer(in_channels, out_channels)`` for each entry of the row."""
    built = nn.ModuleList()
    for row in plan:
        built.append(nn.Sequential(*(layer(i, o) for i, o in pairwise([in_channels, *row]))))
        in_channels = row[-1]
    return built


def pool(x: Tensor) -> tuple[Tensor, Kept]:
    """2x2 max-pooling with Caffe's output size (ceil), and what `unpool` needs to undo it."""
    pooled, offsets = F.max_pool2d_with_offsets(x, 2, ceil_mode=True)
    return pooled, (offsets, x.shape[-2:])


def unpool(x: Tensor, kept: Kept) -> Tensor:
    """Each element back to where its maximum stood, zero elsewhere."""
    offsets, size = kept
    return F.max_unpool2d_with_offsets(x, offsets, 2, output_size=size)


def initialise(model: nn.Module) -> None:
    """Convolutions MSRA (gaussian, fan-in) with bias 0, BN gamma 1 and beta 0.001: the authors' fillers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.001)
