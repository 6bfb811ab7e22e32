"""FCN-32s, FCN-16s and FCN-8s.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; Shelhamer, Long and
Darrell, TPAMI 2017. Layers, padding and crops as in the authors' Caffe files, voc-fcn32s, -16s, -8s and -8s-atonce.
Each of VGG16's fully connected layers is a convolution, and so gives a map of class scores for a picture of any size;
transposed convolutions that start as bilinear interpolation bring the scores up again, and finer ones from earlier
pools are added on the way.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import ConvTranspose2d, MaxPool2d
from .blocks import VGG16, check_arguments, scaled

HIDDEN = 4096
PAD = 100  # of the first convolution, so that fc6's 7x7 window fits behind five pools of the smallest picture


class Skip(NamedTuple):
    """Scores of a pool, of which the part that begins at row and column `crop` is added to the map brought up by 2."""

    pool: int
    crop: int


class FCN32s(nn.Module):
    """VGG16 with its fully connected layers as convolutions, and one bilinear step of 32 up to the picture.

    136.153 M parameters at the authors' 21 classes (PASCAL VOC), of which the 1.806 M of the last transposed
    convolution stay the bilinear interpolation that they are: they are not trained (requires_grad is False), and where
    the kernels run, they run depthwise.

    forward: (N, in_channels, H, W) of any size to logits (N, num_classes, H, W), dtype kept: a view of a larger map,
    the part that lies over the picture.

    width multiplies the channel counts (multiples of 8, at least 8). The score layers start from 0, all else from MSRA
    with bias 0; the authors start from VGG16's weights: `fastseg.models.load_vgg16`.
    """

    SKIPS: ClassVar[tuple[Skip, ...]] = ()
    STRIDE: ClassVar[int] = 32  # of the last step up
    CROP: ClassVar[int] = 19  # where the picture begins in what that gives
    SCALES: ClassVar[dict[int, float]] = {}  # what a pool is multiplied by before it is scored

    def __init__(self, num_classes: int = 21, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        plan, ((hidden,),) = scaled(VGG16, width), scaled([[HIDDEN]], width)
        self.encoder = nn.ModuleList()
        for row in plan:
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise([in_channels, *row]):
                padding = 1 if self.encoder or layers else PAD
                layers += [nn.Conv2d(inputs, outputs, 3, padding=padding), nn.ReLU(inplace=True)]
            self.encoder.append(nn.Sequential(*layers, MaxPool2d(2, ceil_mode=True)))
            in_channels = row[-1]
        self.fc6 = nn.Sequential(nn.Conv2d(in_channels, hidden, 7), nn.ReLU(inplace=True), nn.Dropout())
        self.fc7 = nn.Sequential(nn.Conv2d(hidden, hidden, 1), nn.ReLU(inplace=True), nn.Dropout())
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        channels = [hidden, *(plan[skip.pool - 1][-1] for skip in self.SKIPS)]
        self.scores = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in channels)
        for layer in self.scores:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.ups = nn.ModuleList(ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False) for _ in self.SKIPS)
        self.last_up = ConvTranspose2d(
            num_classes, num_classes, 2 * self.STRIDE, self.STRIDE, padding=self.CROP, bias=False
        )
        for layer in (*self.ups, self.last_up):
            bilinear_(layer.weight)
        self.last_up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        size, pools = x.shape[-2:], {}
        for pool, stage in enumerate(self.encoder, 1):
            pools[pool] = x = stage(x)
        coarsest, *finer = self.scores
        x = coarsest(self.fc7(self.fc6(x)))
        for up, skip, score in zip(self.ups, self.SKIPS, finer, strict=True):
            x, pooled = up(x), pools[skip.pool]
            if skip.pool in self.SCALES:
                pooled = pooled * self.SCALES[skip.pool]
            x = x + cropped(score(pooled), skip.crop, x.shape[-2:])
        return cropped(self.last_up(x), 0, size)


class FCN16s(FCN32s):
    """FCN32s that steps up by 2, adds scores of the fourth pool, and steps up by 16; all else as there.

    The transposed convolution between, bilinear at the start, is trained, as the paper says; the files keep it fixed.
    """

    SKIPS, STRIDE, CROP = (Skip(4, 5),), 16, 27


class FCN8s(FCN32s):
    """FCN32s that steps up by 2, adds scores of the fourth pool, by 2, adds the third's, and by 8; all else as there.

    The authors train FCN32s first, then FCN16s from its weights, all but those of `last_up`, then FCN8s from that's.
    """

    SKIPS, STRIDE, CROP = (Skip(4, 5), Skip(3, 9)), 8, 31


class FCN8sAtOnce(FCN8s):
    """FCN8s with the fourth pool times 0.01 and the third times 0.0001 before they are scored.

    So all layers can be trained together from the start. The state_dict has the keys of FCN8s; the weights mean
    something else here.
    """

    SCALES: ClassVar[dict[int, float]] = {4: 0.01, 3: 0.0001}


def bilinear_(weight: Tensor) -> Tensor:
    """Fill a transposed convolution's weight (C, C, k, k) with bilinear interpolation of each channel, in place.

    For kernel size k and factor f = ceil(k / 2) the entry at (y, x) is (1 - |y - c| / f) (1 - |x - c| / f) on the
    channels' diagonal, with c the centre, and zero off it. Stride f makes an image f times as large.
    """
    side = weight.shape[-1]
    factor = (side + 1) // 2
    centre = factor - (1.0 if side % 2 else 0.5)
    line = 1 - (torch.arange(side, dtype=torch.float64, device=weight.device) - centre).abs() / factor
    with torch.no_grad():
        weight.zero_()
        weight.diagonal().copy_((line[:, None] * line).unsqueeze(-1))  # (k, k, C)
    return weight


def cropped(x: Tensor, begin: int, size: torch.Size) -> Tensor:
    """A view of the part of x that begins at row and column `begin` and has that size."""
    return x[..., begin : begin + size[0], begin : begin + size[1]]
