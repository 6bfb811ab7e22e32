"""Bayesian SegNet and Bayesian SegNet-Basic: SegNets with dropout, for Monte-Carlo sampling."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .blocks import (
    VGG16,
    Block,
    Conv2d,
    NormFactories,
    NormFactory,
    Pooled,
    build_encoder,
    build_stages,
    check_arguments,
    encode,
    initialize,
    scaled,
    unpool,
)
from .segnet import BASIC, DECODER


class BeforeDropout(NamedTuple):
    """What a picture's passes have in common: the features in front of the first dropout, and the pools' positions."""

    features: Tensor
    pooled: list[Pooled]


class BayesianSegNet(nn.Module):
    """SegNet with dropout in its six central places, whose passes differ in evaluation if dropout is on.

    Dropout follows the pools 3, 4 and 5, and the decoder's stages 5, 4 and 3, in front of the unpoolings 4, 3 and 2. It
    drops single elements. All else is :class:`~fastseg.models.SegNet`, whose weights it takes: 29.449 M parameters with
    11 classes. The batch norms' biases begin at 0, as in the authors' bayesian_segnet_train.prototxt.
    :func:`fastseg.uncertainty.sample` predicts with it.

    Args:
        num_classes, in_channels, width, bn_eps: as in :class:`~fastseg.models.SegNet`.
        dropout: the probability that an element is dropped.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Raises:
        ValueError: as :class:`~fastseg.models.SegNet`, and for a dropout outside of 0 to 1.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.BayesianSegNet(num_classes=11, width=0.125).eval()
        >>> samples = fastseg.uncertainty.sample(model, torch.randn(1, 3, 45, 61), passes=4, seed=0)
        >>> samples.mean.shape, samples.variance.shape, bool(samples.variance.max() > 0)
        (torch.Size([1, 11, 45, 61]), torch.Size([1, 11, 45, 61]), True)

    Source:
        Kendall, Badrinarayanan and Cipolla, "Bayesian SegNet: Model Uncertainty in Deep Convolutional Encoder-Decoder
        Architectures for Scene Understanding", 2015
    """

    FIRST = 2  # the first stage of the encoder whose pool a dropout follows
    CENTRAL = 3  # the stages of the decoder that a dropout follows

    def __init__(
        self,
        num_classes: int = 11,
        in_channels: int = 3,
        width: float = 1.0,
        bn_eps: float = 1e-9,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        down, up = scaled(VGG16, width), scaled(DECODER, width)

        def block(inputs: int, outputs: int, norm: NormFactory) -> Block:
            return Block(Conv2d(inputs, outputs, 3, padding=1), norm(outputs))

        norms = NormFactories.of(bn_eps)
        self.encoder = build_encoder(in_channels, down, block, norms)
        self.decoder = build_stages(down[-1][-1], up, block, norms.plain, [norms.plain] * len(up))
        self.classifier = nn.Conv2d(up[-1][-1], num_classes, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        initialize(self, norm_bias=0.0)

    def before_dropout(self, x: Tensor) -> BeforeDropout:
        """The part of the network in front of the first dropout, which is the same in every pass."""
        return BeforeDropout(*encode(self.encoder[: self.FIRST + 1], x))

    def after_dropout(self, before: BeforeDropout) -> Tensor:
        """The logits, from the first dropout on."""
        x, pooled = self.dropout(before.features), list(before.pooled)
        for stage in self.encoder[self.FIRST + 1 :]:
            x, last = encode([stage], x)
            x = self.dropout(x)
            pooled += last
        for number, stage in enumerate(self.decoder):
            x = stage(unpool(x, pooled.pop()))
            x = self.dropout(x) if number < self.CENTRAL else x
        return self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_dropout(self.before_dropout(x))


class BayesianSegNetBasic(BayesianSegNet):
    """SegNet-Basic with dropout behind the pools 3 and 4 and the decoder's convolutions 4 and 3.

    All else is :class:`~fastseg.models.SegNetBasic`, whose weights it takes: 1.417 M parameters with 11 classes. The
    batch norms' biases begin at 0.001, as in the authors' bayesian_segnet_basic_train.prototxt.

    Args:
        num_classes, in_channels, width, bn_eps, dropout: as in :class:`BayesianSegNet`.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Raises:
        ValueError: as :class:`BayesianSegNet`.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.BayesianSegNetBasic(num_classes=11, width=0.25).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 11, 45, 61)

    Source:
        as :class:`BayesianSegNet`
    """

    CENTRAL = 2

    def __init__(
        self,
        num_classes: int = 11,
        in_channels: int = 3,
        width: float = 1.0,
        bn_eps: float = 1e-9,
        dropout: float = 0.5,
    ) -> None:
        nn.Module.__init__(self)
        check_arguments(num_classes, in_channels, width)
        plan = scaled(BASIC, width)

        def block(inputs: int, outputs: int, norm: NormFactory) -> Block:
            return Block(Conv2d(inputs, outputs, 7, padding=3), norm(outputs))

        linear = NormFactories.of(bn_eps, relu=False).plain
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = build_encoder(in_channels, plan, block, NormFactories.of(bn_eps))
        self.decoder = build_stages(plan[-1][-1], plan, block, linear, [linear] * len(plan))
        self.classifier = nn.Conv2d(plan[-1][-1], num_classes, 1)
        self.dropout = nn.Dropout(dropout)
        initialize(self)

    def before_dropout(self, x: Tensor) -> BeforeDropout:
        return super().before_dropout(self.norm(x))
