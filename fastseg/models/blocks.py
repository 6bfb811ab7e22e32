"""What the encoder-decoder networks share: convolution blocks, stages of blocks, the way down and up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn import BatchNormReLU2d, BatchNormReLUMaxPool2d, BatchNormReLUMaxUnpool2d

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


class Conv2d(nn.Conv2d):
    """A convolution that leaves its bias to the batch norm behind it, which takes it out again or folds it in."""

    omits_bias = True

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, None)


class Block(nn.Sequential):
    """Convolution, then batch norm with what is fused behind it: keys `0.` and `1.` in a state_dict.

    A convolution that `omits_bias` has it added, or taken out, by the batch norm; hooks on it see its output without.
    """

    def forward(self, x: Tensor, *places: Any) -> Any:
        conv, norm = self
        bias = conv.bias if getattr(conv, "omits_bias", False) else None
        return norm(conv(x), *places, input_bias=bias)


class Stage(nn.Sequential):
    """Blocks one behind the other; what an unpooling at the end needs is handed to the last."""

    def forward(self, x: Tensor, *places: Any) -> Any:
        *blocks, last = self
        for block in blocks:
            x = block(x)
        return last(x, *places)


Norm = Callable[[int], BatchNormReLU2d]


class Norms(NamedTuple):
    """Makers of batch norms, by what follows: nothing, a pooling that keeps its places, an unpooling."""

    plain: Norm
    pooled: Norm
    unpooled: Norm

    @classmethod
    def of(cls, eps: float, relu: bool = True) -> Norms:
        """Pooling is 2x2 with Caffe's output size (ceil)."""
        return cls(
            partial(BatchNormReLU2d, eps=eps, relu=relu),
            partial(BatchNormReLUMaxPool2d, eps=eps, relu=relu, ceil_mode=True, return_offsets=True),
            partial(BatchNormReLUMaxUnpool2d, eps=eps, relu=relu),
        )


def stages(
    in_channels: int, plan: Plan, layer: Callable[[int, int, Norm], nn.Module], norms: Norms, down: bool
) -> nn.ModuleList:
    """A Stage for each row of the plan, of ``layer(in_channels, out_channels, norm)`` for each entry of the row.

    Downwards every stage ends in a pooling, upwards all but the last in the unpooling before the next.
    """
    built = nn.ModuleList()
    for number, row in enumerate(plan, 1):
        upwards = norms.unpooled if number < len(plan) else norms.plain
        makers = [*[norms.plain] * (len(row) - 1), norms.pooled if down else upwards]
        pairs = zip(pairwise([in_channels, *row]), makers, strict=True)
        built.append(Stage(*(layer(i, o, norm) for (i, o), norm in pairs)))
        in_channels = row[-1]
    return built


def encode(encoder: nn.ModuleList, x: Tensor) -> tuple[Tensor, list[Kept]]:
    """The map behind the last pooling, and what each unpooling needs, the last pooling's last."""
    kept = []
    for stage in encoder:
        size = x.shape[-2:]  # which the stage's convolutions keep
        x, offsets = stage(x)
        kept.append((offsets, size))
    return x, kept


def decode(decoder: nn.ModuleList, x: Tensor, kept: list[Kept]) -> Tensor:
    """The map behind the last stage, from the unpooled one before the first."""
    for stage in decoder:
        x = stage(x, *kept.pop()) if kept else stage(x)
    return x


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
