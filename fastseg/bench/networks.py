"""The networks that are timed, each in the forms that are compared: plain torch, swapped, and fastseg's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, models
from .. import nn as fused
from ..swapping import swap

BN_EPS = 1e-5  # torch's default: with the authors' 1e-9 rounding dominates the check of few images
SMALL_WIDTH = 0.125
IGNORED = 255


@dataclass(frozen=True)
class Form:
    """One implementation of a network: a model that gives logits, their loss, and the prediction.

    predict: labels from the logits and the size of the images; None if the logits are the result.
    """

    model: nn.Module
    loss: nn.Module
    predict: Callable[[Tensor, Sequence[int]], Tensor] | None = None


class PlainTwin(nn.Module):
    """SegNet, SegNetBasic or DeconvNet in plain torch, with nn.MaxPool2d that returns indices and nn.MaxUnpool2d.

    It takes the layers of a network of fastseg.models and turns them into torch's layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm = getattr(model, "norm", nn.Identity())
        self.encoder = nn.ModuleList(self.stage(*blocks) for blocks in model.encoder)
        middle = (getattr(model, name, None) for name in ("fc6", "fc7", "fc6_deconv"))
        self.middle = self.stage(*(layer for layer in middle if layer is not None))
        self.decoder = nn.ModuleList(self.stage(*blocks) for blocks in model.decoder)
        self.classifier = model.classifier  # in the order of the network's parameters
        self.pools = nn.ModuleList(nn.MaxPool2d(2, return_indices=True, ceil_mode=True) for _ in self.encoder)
        self.unpools = nn.ModuleList(nn.MaxUnpool2d(2) for _ in self.decoder)

    @staticmethod
    def stage(*blocks: nn.Module) -> nn.Sequential:
        """Convolution, nn.BatchNorm2d and ReLU for each convolution and the fused layer after it."""
        made = []
        for conv, norm in blocks:
            conv.__class__ = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose2d) else nn.Conv2d
            relus = [nn.ReLU(inplace=True)] * norm.relu
            norm.__class__ = nn.BatchNorm2d
            made.append(nn.Sequential(conv, norm, *relus))
        return nn.Sequential(*made)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.norm(x), []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size = x.shape
            x, indices = pool(x)
            places.append((indices, size))
        x = self.middle(x)
        for stage, unpool in zip(self.decoder, self.unpools, strict=True):
            indices, size = places.pop()
            x = stage(unpool(x, indices, output_size=size))
        return self.classifier(x)


class UNet(nn.Module):
    """A small U-Net in plain torch: max-pooling, 2x2 transposed convolutions with stride 2, and skip connections."""

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = [max(8, int(c * width)) for c in (32, 64, 128, 256, 512)]
        self.down = nn.ModuleList(self.stage(i, o) for i, o in zip([3, *channels], channels, strict=False))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.merge = nn.ModuleList(self.stage(2 * o, o) for _, o in pairs)
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
            x = self.pool(x)
        x = kept.pop()  # the last feature map is not pooled
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.classifier(x)


class SemanticFPN(nn.Module):
    """A feature pyramid network for segmentation, a common head for ADE20K, without its backbone.

    Kirillov, Girshick, He and Dollar, "Panoptic Feature Pyramid Networks", CVPR 2019, without dropout. The levels have
    256 channels. From each level, blocks of convolution, batch norm, ReLU and 2x bilinear upsampling with 128 channels
    lead to stride 4, where a 1x1 classifier takes their sum. forward: a backbone's feature maps of strides 4, 8, 16 and
    32 to logits of stride 4.
    """

    CHANNELS = (64, 128, 320, 512)

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        level, branch = (max(8, int(c * width)) for c in (256, 128))
        self.lateral = nn.ModuleList(nn.Conv2d(c, level, 1) for c in self.CHANNELS)
        self.smooth = nn.ModuleList(nn.Conv2d(level, level, 3, padding=1) for _ in self.CHANNELS)
        self.branches = nn.ModuleList(self.branch(level, branch, ups) for ups in range(len(self.CHANNELS)))
        self.classifier = nn.Conv2d(branch, num_classes, 1)

    @staticmethod
    def branch(inputs: int, outputs: int, ups: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for number in range(max(ups, 1)):
            conv = nn.Conv2d(outputs if number else inputs, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            if ups:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        return nn.Sequential(*layers)

    def forward(self, *features: Tensor) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + F.interpolate(levels[finer + 1], scale_factor=2)
        branches = zip(self.branches, self.smooth, levels, strict=True)
        return self.classifier(sum(branch(smooth(level)) for branch, smooth, level in branches))


class ResizedCrossEntropyLoss(nn.Module):
    """nn.CrossEntropyLoss of logits that are first resized to the size of the labels, in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(ignore_index=IGNORED)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(resized(logits, labels.shape[-2:]), labels)


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, list(size), mode="bilinear", align_corners=False)


def predicted(logits: Tensor, size: Sequence[int]) -> Tensor:
    return resized(logits, size).argmax(1)


def predicted_at_once(logits: Tensor, size: Sequence[int]) -> Tensor:
    return functional.upsample_argmax(logits, list(size), mode="bilinear", align_corners=False)


def swapped(form: Form) -> Form:
    """The form after fastseg.swap of its model and its loss."""
    model, loss = copy.deepcopy(form.model), copy.deepcopy(form.loss)
    swap(model)
    swap(loss)
    return Form(model, loss, form.predict)


def of_models(name: str) -> Callable[[int, float], dict[str, Form]]:
    """A function that builds the forms of a network of fastseg.models."""

    def build(classes: int, width: float) -> dict[str, Form]:
        native = models.MODELS[name](classes, width=width, bn_eps=BN_EPS)
        plain = Form(PlainTwin(copy.deepcopy(native)), nn.CrossEntropyLoss())
        return {"plain": plain, "native": Form(native, fused.CrossEntropyLoss())}

    return build


def unet(classes: int, width: float) -> dict[str, Form]:
    """The forms of the U-Net, which fastseg.models does not have."""
    return {"plain": Form(UNet(classes, width), nn.CrossEntropyLoss())}


def ade20k_head(classes: int, width: float) -> dict[str, Form]:
    """The forms of the ADE20K head. fastseg's own computes the loss and the labels without resized logits in memory."""
    plain = Form(SemanticFPN(classes, width), ResizedCrossEntropyLoss(), predicted)
    loss = fused.UpsampleCrossEntropyLoss(ignore_index=IGNORED, align_corners=False)
    return {"plain": plain, "native": Form(swapped(plain).model, loss, predicted_at_once)}


def picture(n: int, h: int, w: int) -> list[tuple[int, ...]]:
    return [(n, 3, h, w)]


def pyramid(n: int, h: int, w: int) -> list[tuple[int, ...]]:
    """Shapes of a backbone's feature maps for images of h x w."""
    return [(n, c, h // stride, w // stride) for c, stride in zip(SemanticFPN.CHANNELS, (4, 8, 16, 32), strict=True)]


@dataclass(frozen=True)
class Network:
    """A network and the images (N, H, W) it is timed on: `pictures` at full size, `small` on a CPU.

    build: from (classes, width) to the forms, "plain" and, if fastseg has one, "native". forced: whether backend
    "triton" runs other kernels than "auto", which may choose cuDNN's convolutions. inputs: shapes of the model's inputs
    for images (n, h, w). ignored: whether some labels are IGNORED.
    """

    name: str
    classes: int
    pictures: tuple[int, int, int]
    small: tuple[int, int, int]
    build: Callable[[int, float], dict[str, Form]]
    forced: bool
    inputs: Callable[[int, int, int], list[tuple[int, ...]]] = picture
    ignored: bool = False

    def labels(self, n: int, h: int, w: int, device: str) -> Tensor:
        drawn = torch.randint(self.classes, (n, h, w), device=device)
        return drawn.masked_fill_(torch.rand(n, h, w, device=device) < 0.05, IGNORED) if self.ignored else drawn


class Built:
    """The forms of one network with the same weights: plain, swapped and native."""

    def __init__(self, network: Network, small: bool) -> None:
        torch.manual_seed(0)
        self.forced, self.forms = network.forced, network.build(network.classes, SMALL_WIDTH if small else 1.0)

    def form(self, build: str, backend: str = "auto") -> Form | None:
        """The form; None if the network does not have it, or if it would run the same as another form."""
        if backend == "triton" and not self.forced:
            return None
        if build == "native" and backend == "triton" and build not in self.forms:
            build = "swapped"
        return swapped(self.forms["plain"]) if build == "swapped" else self.forms.get(build)


NETWORKS = [
    Network("segnet", 11, (8, 360, 480), (4, 48, 64), of_models("segnet"), forced=True),
    Network("deconvnet", 21, (16, 224, 224), (4, 224, 224), of_models("deconvnet"), forced=True),
    Network("unet", 19, (8, 512, 512), (4, 64, 64), unet, forced=True),
    Network("segnet-basic", 11, (8, 360, 480), (4, 48, 64), of_models("segnet-basic"), forced=False),
    Network("ade20k-head", 150, (16, 512, 512), (4, 64, 64), ade20k_head, False, pyramid, ignored=True),
]
