"""The shapes that are timed: every operator where the networks use it, and at odd sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..verification import cases
from ..verification.cases import LAYOUTS, Case, ConvTransposeSpec, Placement, PoolSpec, ResizeSpec


class DrawnInPlace(Placement):
    """A placement that draws random numbers on its device: half a billion of them would take a CPU seconds."""

    def tensor(self, *shape: int) -> Tensor:
        made = torch.randn(shape, device=self.device).to(self.dtype)
        return made.contiguous(memory_format=self.layout) if made.dim() == 4 else made

    def labels(self, classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, device=self.device)


@dataclass(frozen=True)
class Site:
    """A place in a network where an operator runs, and its shape there.

    make, shape, rest: a function of fastseg.verification.cases and its arguments. headline: timed first, and with
    torch.compile too.
    """

    where: str
    make: Callable[..., Iterator[Case]]
    shape: tuple[int, ...]
    rest: tuple[Any, ...] = ()
    headline: bool = False

    def cases(self, at: Placement) -> list[Case]:
        """The cases of the site."""
        return list(self.make(at, self.shape, *self.rest))

    def small(self) -> Site:
        """The site for one image at an eighth of the height and width and at most 150 channels, for a CPU."""
        _, c, h, w = self.shape
        return replace(self, shape=(1, min(c, 150), max(h // 8, min(h, 6)), max(w // 8, min(w, 6))))

    def one(self) -> Site:
        """The site for one image."""
        return replace(self, shape=(1, *self.shape[1:]))


def _encoder(net: str, batch: int, maps: Sequence[tuple[int, int, int]]) -> list[Site]:
    """The pools, unpools and batch norms of an encoder and its decoder; maps: their inputs (C, H, W) in order."""
    pool = PoolSpec(ceil_mode=True)
    return [
        Site(f"{net} stage {number}", make, (batch, *shape), (pool,), headline=number == 1)
        for number, shape in enumerate(maps, 1)
        for make in (cases.max_pool2d, cases.max_unpool2d)
    ] + [
        Site(f"{net} stage {number}", cases.batch_norm_relu, (batch, *shape), headline=number == 1)
        for number, shape in enumerate(maps, 1)
    ]


def _resized(at: Placement, shape: Sequence[int], factor: int) -> Iterator[Case]:
    """The loss of logits that are resized to labels `factor` times as high and wide."""
    return cases.upsample_cross_entropy(at, shape, ResizeSpec((factor * shape[2], factor * shape[3])))


_HEADLINES = ("U-Net up 1", "DeconvNet deconv 2-1", "FCN 21 classes", "Cityscapes", "ADE20K")
_SAME_3 = {"kernel": 3, "padding": 1}  # keeps the size
_BY_2 = {"kernel": 2, "stride": 2}  # doubles the size
_CONVS = [
    ("DeconvNet fc6", (16, 4096, 1, 1), ConvTransposeSpec(512, kernel=7)),
    ("DeconvNet deconv 5-1", (16, 512, 14, 14), ConvTransposeSpec(512, **_SAME_3)),
    ("DeconvNet deconv 4-1", (16, 512, 28, 28), ConvTransposeSpec(512, **_SAME_3)),
    ("DeconvNet deconv 3-1", (16, 256, 56, 56), ConvTransposeSpec(256, **_SAME_3)),
    ("DeconvNet deconv 2-1", (16, 128, 112, 112), ConvTransposeSpec(128, **_SAME_3)),
    ("DeconvNet deconv 1-1", (16, 64, 224, 224), ConvTransposeSpec(64, **_SAME_3)),
    ("U-Net up 1", (8, 128, 256, 256), ConvTransposeSpec(64, **_BY_2)),
    ("U-Net up 2", (8, 256, 128, 128), ConvTransposeSpec(128, **_BY_2)),
    ("U-Net up 3", (8, 512, 64, 64), ConvTransposeSpec(256, **_BY_2)),
    ("U-Net up 4", (8, 1024, 32, 32), ConvTransposeSpec(512, **_BY_2)),
    ("FCN 21 classes", (8, 21, 64, 64), ConvTransposeSpec(21, kernel=4, stride=2, padding=1)),
    ("FCN 256 channels", (8, 256, 64, 64), ConvTransposeSpec(128, kernel=4, stride=2, padding=1)),
    ("FCN-8s depthwise", (8, 21, 64, 64), ConvTransposeSpec(21, kernel=16, stride=8, padding=4, groups=21)),
    ("ERFNet up 1", (8, 128, 64, 128), ConvTransposeSpec(64, kernel=3, stride=2, padding=1, output_padding=1)),
    ("DPT reassemble", (8, 256, 24, 24), ConvTransposeSpec(256, kernel=4, stride=4)),
    ("odd", (3, 37, 29, 41), ConvTransposeSpec(13, kernel=3, stride=2, padding=1, output_padding=1)),
]
_HEADS = [  # where, the classifier's input, classes, size of the labels relative to it
    ("ADE20K", (16, 256, 128, 128), 150, 4),
    ("Cityscapes", (8, 128, 128, 256), 19, 4),
    ("odd", (3, 24, 31, 41), 7, 3),
]
_LOGITS = [
    ("Cityscapes", (8, 19, 512, 1024)),
    ("ADE20K", (16, 150, 512, 512)),
    ("SegNet CamVid", (8, 11, 360, 480)),
    ("odd", (3, 7, 61, 83)),
]
_OVERLAPPING_POOL = PoolSpec(kernel=3, stride=2, padding=1)
_ODD_POOL = PoolSpec(kernel=3, stride=3, padding=1)
SITES = [
    *_encoder("SegNet", 8, [(64, 360, 480), (128, 180, 240), (256, 90, 120), (512, 45, 60), (512, 23, 30)]),
    *_encoder("DeconvNet", 16, [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)]),
    Site("ResNet stem", cases.max_pool2d, (8, 64, 256, 512), (_OVERLAPPING_POOL,)),
    Site("odd", cases.max_pool2d, (3, 37, 53, 91), (_ODD_POOL,)),
    Site("odd", cases.max_unpool2d, (3, 37, 53, 91), (_ODD_POOL,)),
    *(Site(where, cases.conv_transpose2d, shape, (conv,), where in _HEADLINES) for where, shape, conv in _CONVS),
    *(Site(where, cases.conv_transpose2d_affine_relu, shape, (conv,)) for where, shape, conv in _CONVS),
    *(Site(where, cases.cross_entropy, shape, headline=where in _HEADLINES) for where, shape in _LOGITS),
    *(
        Site(where, _resized, (n, classes, h, w), (factor,), where == "ADE20K")
        for where, (n, _, h, w), classes, factor in _HEADS
    ),
    *(Site(where, cases.linear_cross_entropy, shape, (classes,)) for where, shape, classes, _ in _HEADS),
    *(Site(where, cases.dice_cross_entropy, shape) for where, shape in _LOGITS),
]
TINY = [
    Site("tiny", cases.max_pool2d, (1, 8, 4, 4)),
    Site("tiny", cases.max_unpool2d, (1, 8, 4, 4)),
    Site("tiny", cases.batch_norm_relu, (1, 8, 4, 4)),
    Site("tiny", cases.conv_transpose2d, (1, 16, 4, 4), (ConvTransposeSpec(16, **_BY_2),)),
    Site("tiny", cases.cross_entropy, (1, 8, 4, 4)),
    Site("tiny", cases.dice_cross_entropy, (1, 8, 4, 4)),
    Site("tiny", _resized, (1, 8, 4, 4), (4,)),
    Site("tiny", cases.linear_cross_entropy, (1, 8, 4, 4), (8,)),
]


def sites(small: bool) -> list[Site]:
    """All sites, the headlines first. small: only the headlines, at sizes for a CPU."""
    if small:
        return [site.small() for site in SITES if site.headline]
    return sorted(SITES, key=lambda site: not site.headline)


def sizes(device: str, dtype: str, layout: str) -> Iterator[Case]:
    """The headline cases, at full size on a GPU and small on a CPU."""
    for site in sites(small=device == "cpu"):
        if site.headline:
            yield from site.cases(DrawnInPlace(cases.DTYPES[dtype], LAYOUTS[layout], device))
