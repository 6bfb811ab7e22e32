"""FCN-32s, FCN-16s and FCN-8s.

A fully connected layer of VGG16 becomes a convolution, so that an image of any size gives a map of class scores.
Transposed convolutions, which start as bilinear interpolation, upsample the scores, and the finer scores of earlier
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
PADDING = 100  # of the first convolution, so that the 7x7 window of fc6 fits after five pools of the smallest image


class Skip(NamedTuple):
    """The scores of a pool, added to the upsampled scores from row and column `crop` on. Pools count from 1."""

    pool: int
    crop: int


class FCN32s(nn.Module):
    """FCN-32s: VGG16 with its fully connected layers as convolutions, and one upsampling by 32.

    VGG16's 13 convolutions with ReLU in five stages with 2x2 max-pooling; fc6 (7x7) and fc7 (1x1) with ReLU and
    dropout; a 1x1 convolution for the scores; and a transposed convolution with stride 32. 136.153 M parameters with
    the authors' 21 classes (PASCAL VOC). 1.806 M of these are the weight of the last transposed convolution, which
    stays bilinear interpolation: it is not trained (requires_grad is False), and on the kernels it runs as a depthwise
    convolution.

    Layers, padding and crops are those of the authors' Caffe file voc-fcn32s. The score layers start from 0 and all
    other layers from MSRA with bias 0; the authors start from the weights of VGG16 (see :func:`load_vgg16`).

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images.
        width: factor for all channel counts, which are rounded to multiples of 8.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W) in the dtype of the input: a view of the larger map that the last
          transposed convolution returns.

    Raises:
        ValueError: if num_classes or in_channels is below 1, or width is not finite and above 0.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.FCN32s(num_classes=21, width=0.02).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 21, 45, 61)

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; Shelhamer,
        Long and Darrell, TPAMI 2017
    """

    SKIPS: ClassVar[tuple[Skip, ...]] = ()
    STRIDE: ClassVar[int] = 32  # of the last transposed convolution
    CROP: ClassVar[int] = 19  # row and column of its output where the image begins
    SCALES: ClassVar[dict[int, float]] = {}  # factors for the outputs of pools before they are scored

    def __init__(self, num_classes: int = 21, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        plan, ((hidden,),) = scaled(VGG16, width), scaled([[HIDDEN]], width)
        self.encoder = nn.ModuleList()
        for row in plan:
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise([in_channels, *row]):
                padding = 1 if self.encoder or layers else PADDING
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
    """FCN-16s: upsampling by 2, the scores of the fourth pool added, and upsampling by 16.

    All other layers are those of :class:`FCN32s`. The transposed convolution with stride 2 starts as bilinear
    interpolation and is trained, as the paper says; the authors' file voc-fcn16s keeps it fixed. 134.816 M parameters
    with 21 classes.

    Args:
        num_classes, in_channels, width: as in :class:`FCN32s`.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.FCN16s(num_classes=21, width=0.02).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 21, 45, 61)

    Source:
        as of :class:`FCN32s`
    """

    SKIPS, STRIDE, CROP = (Skip(4, 5),), 16, 27


class FCN8s(FCN32s):
    """FCN-8s: twice an upsampling by 2 with the scores of an earlier pool added, and upsampling by 8.

    The scores of the fourth pool are added first, then those of the third. All other layers are those of
    :class:`FCN16s`, after the authors' file voc-fcn8s. 134.490 M parameters with 21 classes.

    The authors train FCN32s first, then FCN16s from its weights, then FCN8s from those; `last_up`, which has another
    size in each, is left out.

    Args:
        num_classes, in_channels, width: as in :class:`FCN32s`.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.FCN8s(num_classes=21, width=0.02).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 21, 45, 61)

    Source:
        as of :class:`FCN32s`
    """

    SKIPS, STRIDE, CROP = (Skip(4, 5), Skip(3, 9)), 8, 31


class FCN8sAtOnce(FCN8s):
    """FCN-8s that trains all scores at once: pools are multiplied by constants before they are scored.

    The output of the fourth pool is multiplied by 0.01 and that of the third by 0.0001, as in the authors' file
    voc-fcn8s-atonce. The state_dict keys are those of :class:`FCN8s`, but weights for one do not fit the other.

    Args:
        num_classes, in_channels, width: as in :class:`FCN32s`.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.FCN8sAtOnce(num_classes=21, width=0.02).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 21, 45, 61)

    Source:
        as of :class:`FCN32s`
    """

    SCALES: ClassVar[dict[int, float]] = {4: 0.01, 3: 0.0001}


def bilinear_(weight: Tensor) -> Tensor:
    """Fill the weight (C, C, k, k) of a transposed convolution with bilinear interpolation of each channel, in place.

    With f = ceil(k / 2) and the center c, the entry at (y, x) is (1 - |y - c| / f) * (1 - |x - c| / f) on the channel
    diagonal and zero off it. With stride f, the transposed convolution enlarges an image f times.
    """
    side = weight.shape[-1]
    factor = (side + 1) // 2
    center = factor - (1.0 if side % 2 else 0.5)
    line = 1 - (torch.arange(side, dtype=torch.float64, device=weight.device) - center).abs() / factor
    with torch.no_grad():
        weight.zero_()
        weight.diagonal().copy_((line[:, None] * line).unsqueeze(-1))  # (k, k, C)
    return weight


def cropped(x: Tensor, begin: int, size: torch.Size) -> Tensor:
    """A view of the part of x that begins at row and column `begin` and has the given height and width."""
    return x[..., begin : begin + size[0], begin : begin + size[1]]
