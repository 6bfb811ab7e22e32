"""Parts of the encoder-decoder networks: convolution blocks, stages of blocks, the encoder and the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import torch_internals
from ..nn import BatchNormReLU2d, BatchNormReLUMaxPool2d, BatchNormReLUMaxUnpool2d

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # output channels, stage by stage

ChannelPlan = Sequence[Sequence[int]]  # the output channels of the convolutions, one row per stage


class Pooled(NamedTuple):
    """What a pool keeps for its unpool: the offsets of the maxima, and the size of the pool's input."""

    offsets: Tensor
    size: torch.Size


def check_arguments(num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
    """Raise ValueError for constructor arguments that no network can be built with."""
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be finite and above 0, but is {width}")


def scaled(plan: ChannelPlan, width: float) -> list[list[int]]:
    """The plan with its channel counts multiplied by `width` and rounded to multiples of 8, at least 8."""
    return [[max(8, round(channels * width / 8) * 8) for channels in row] for row in plan]


class Conv2d(nn.Conv2d):
    """A convolution that does not add its bias: the batch norm after it takes the bias as `input_bias`."""

    omits_bias = True

    def forward(self, input: Tensor) -> Tensor:
        return torch_internals.convolve_without_bias(self, input)


class Block(nn.Sequential):
    """A convolution and a batch norm, possibly fused with a pool or unpool; state_dict keys `0.` and `1.`.

    A convolution with `omits_bias` leaves its bias to the batch norm; hooks on it see the output without the bias. Any
    other convolution adds its bias itself.
    """

    def forward(self, x: Tensor, *pooled: Any) -> Any:
        conv, norm = self
        bias = conv.bias if getattr(conv, "omits_bias", False) else None
        return norm(conv(x), *pooled, input_bias=bias)


class Stage(nn.Sequential):
    """Consecutive blocks. The offsets and the size for an unpool at the end go to the last block."""

    def forward(self, x: Tensor, *pooled: Any) -> Any:
        *blocks, last = self
        for block in blocks:
            x = block(x)
        return last(x, *pooled)


NormFactory = Callable[[int], BatchNormReLU2d]  # builds a batch norm for a number of channels


class NormFactories(NamedTuple):
    """Factories of batch norms, by what is fused after them: nothing, a 2x2 pool with offsets, or a 2x2 unpool."""

    plain: NormFactory
    pooled: NormFactory
    unpooled: NormFactory

    @classmethod
    def of(cls, eps: float, relu: bool = True) -> NormFactories:
        """The factories for a given eps. Pools round their output size up, as Caffe does."""
        return cls(
            partial(BatchNormReLU2d, eps=eps, relu=relu),
            partial(BatchNormReLUMaxPool2d, eps=eps, relu=relu, ceil_mode=True, return_offsets=True),
            partial(BatchNormReLUMaxUnpool2d, eps=eps, relu=relu),
        )


BlockFactory = Callable[[int, int, NormFactory], nn.Module]  # builds a block from in_channels, out_channels and a norm


def build_encoder(in_channels: int, plan: ChannelPlan, block: BlockFactory, norms: NormFactories) -> nn.ModuleList:
    """One stage per row of the plan; each stage ends in a pool."""
    return build_stages(in_channels, plan, block, norms.plain, [norms.pooled] * len(plan))


def build_decoder(in_channels: int, plan: ChannelPlan, block: BlockFactory, norms: NormFactories) -> nn.ModuleList:
    """One stage per row of the plan; each stage but the last ends in the unpool for the next stage."""
    return build_stages(in_channels, plan, block, norms.plain, [norms.unpooled] * (len(plan) - 1) + [norms.plain])


def build_stages(
    in_channels: int, plan: ChannelPlan, block: BlockFactory, inner: NormFactory, last: list[NormFactory]
) -> nn.ModuleList:
    """Stages whose blocks have the norm `inner`, except for the last block of each stage, which has one from `last`."""
    stages = nn.ModuleList()
    for row, last_norm in zip(plan, last, strict=True):
        norms = [*[inner] * (len(row) - 1), last_norm]
        channels = zip(pairwise([in_channels, *row]), norms, strict=True)
        stages.append(Stage(*(block(inputs, outputs, norm) for (inputs, outputs), norm in channels)))
        in_channels = row[-1]
    return stages


def encode(encoder: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, list[Pooled]]:
    """The output of the last pool, and what each unpool needs, in the order of the pools."""
    pooled = []
    for stage in encoder:
        size = x.shape[-2:]  # the convolutions of a stage keep the size
        x, offsets = stage(x)
        pooled.append(Pooled(offsets, size))
    return x, pooled


def decode(decoder: nn.ModuleList, x: Tensor, pooled: list[Pooled]) -> Tensor:
    """The output of the last stage. `x` is unpooled already for the first stage; `pooled` is for the others."""
    for stage in decoder:
        x = stage(x, *pooled.pop()) if pooled else stage(x)
    return x


def unpool(x: Tensor, pooled: Pooled) -> Tensor:
    """Each value of x at the position of its maximum, and zero elsewhere."""
    return F.max_unpool2d_with_offsets(x, pooled.offsets, 2, output_size=pooled.size)


def initialize(model: nn.Module, norm_bias: float = 0.001) -> None:
    """The authors' initialization: convolutions MSRA (Gaussian, fan-in), bias 0; batch norms weight 1."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, norm_bias)
