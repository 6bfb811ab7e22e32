"""The networks that are timed whole, each in the forms that are compared: plain torch, swapped, and fastseg's own."""

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

BN_EPS = 1e-5  # torch's own: with the authors' 1e-9 a check of few pictures sees little but rounding
SMALL_WIDTH = 0.125
IGNORED = 255


@dataclass(frozen=True)
class Form:
    """One way to write a network: a model that gives logits, their loss, and what inference makes of them.

    predict: labels from the logits and the pictures' size; None where the logits are the result.
    """

    model: nn.Module
    loss: nn.Module
    predict: Callable[[Tensor, Sequence[int]], Tensor] | None = None


class PlainTwin(nn.Module):
    """SegNet, SegNetBasic or DeconvNet as one writes it in torch alone: nn.MaxPool2d with indices, nn.MaxUnpool2d.

    Takes the layers of one of fastseg.models' networks and makes torch's own of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm = getattr(model, "norm", nn.Identity())
        self.encoder = nn.ModuleList(self.stage(*blocks) for blocks in model.encoder)
        middle = (getattr(model, name, None) for name in ("fc6", "fc7", "fc6_deconv"))
        self.middle = self.stage(*(layer for layer in middle if layer is not None))
        self.decoder = nn.ModuleList(self.stage(*blocks) for blocks in model.decoder)
        self.classifier = model.classifier  # all in the order of the network's own parameters
        self.pools = nn.ModuleList(nn.MaxPool2d(2, return_indices=True, ceil_mode=True) for _ in self.encoder)
        self.unpools = nn.ModuleList(nn.MaxUnpool2d(2) for _ in self.decoder)

    @staticmethod
    def stage(*blocks: nn.Module) -> nn.Sequential:
        """Convolution, nn.BatchNorm2d and ReLU for each pair of a convolution and what is fused behind it."""
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
    """A small U-Net in plain torch: max-pooling down, 2x2 transposed convolutions with stride 2 up, skips between."""

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
        x = kept.pop()  # the last map is not pooled
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.classifier(x)


class SemanticFPN(nn.Module):
    """The head that ADE20K is often reported with: a feature pyramid, and a branch up to stride 4 from each level.

    Kirillov, Girshick, He and Dollar, "Panoptic Feature Pyramid Networks", CVPR 2019, without dropout: the pyramid's
    levels have 256 channels; convolution, batch norm, ReLU and 2x bilinear upsampling of 128 channels bring each to
    stride 4, where their sum goes through a 1x1 classifier. forward: a backbone's maps of strides 4, 8, 16 and 32 to
    logits of stride 4.
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
    """nn.CrossEntropyLoss of logits that are resized to the labels first, as one writes it in torch."""

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
    """The form after fastseg.swap of its model and of its loss."""
    model, loss = copy.deepcopy(form.model), copy.deepcopy(form.loss)
    swap(model)
    swap(loss)
    return Form(model, loss, form.predict)


def of_models(name: str) -> Callable[[int, float], dict[str, Form]]:
    """The forms of one of fastseg.models' networks."""

    def build(classes: int, width: float) -> dict[str, Form]:
        native = models.MODELS[name](classes, width=width, bn_eps=BN_EPS)
        plain = Form(PlainTwin(copy.deepcopy(native)), nn.CrossEntropyLoss())
        return {"plain": plain, "native": Form(native, fused.CrossEntropyLoss())}

    return build


def unet(classes: int, width: float) -> dict[str, Form]:
    """fastseg has none of its own."""
    return {"plain": Form(UNet(classes, width), nn.CrossEntropyLoss())}


def ade20k_head(classes: int, width: float) -> dict[str, Form]:
    """fastseg's own is the swapped model with the loss and the labels from logits that are not resized in memory."""
    plain = Form(SemanticFPN(classes, width), ResizedCrossEntropyLoss(), predicted)
    loss = fused.UpsampleCrossEntropyLoss(ignore_index=IGNORED, align_corners=False)
    return {"plain": plain, "native": Form(swapped(plain).model, loss, predicted_at_once)}


def picture(n: int, h: int, w: int) -> list[tuple[int, ...]]:
    return [(n, 3, h, w)]


def pyramid(n: int, h: int, w: int) -> list[tuple[int, ...]]:
    """What a backbone gives of pictures of h x w."""
    return [(n, c, h // stride, w // stride) for c, stride in zip(SemanticFPN.CHANNELS, (4, 8, 16, 32), strict=True)]


@dataclass(frozen=True)
class Network:
    """A network and the pictures it is timed on: at full size, and small for a CPU.

    build: (classes, width) to its forms, "plain" and, where fastseg has one, "native". forced: whether backend "triton"
    runs other kernels than "auto", which measures those of convolutions. inputs: the shapes that the model takes for
    pictures (n, h, w). ignored: whether some labels are IGNORED.
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
    """The forms of one network, all with the same weights: plain, swapped, native."""

    def __init__(self, network: Network, small: bool) -> None:
        torch.manual_seed(0)
        self.forced, self.forms = network.forced, network.build(network.classes, SMALL_WIDTH if small else 1.0)

    def form(self, build: str, backend: str = "auto") -> Form | None:
        """None where this network has no such form, or it would run what another one does."""
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
