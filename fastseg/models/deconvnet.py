"""DeconvNet.

Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015. Layers, fillers and epsilon
as in the authors' Caffe file stage_1_train.prototxt.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import ConvTransposeBatchNormReLU2d
from ..nn.conv import ConvTranspose2dBeforeNorm
from .blocks import VGG16, Block, Conv2d, Norm, Norms, check_arguments, decode, encode, initialise, scaled, stages

HIDDEN = 4096
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64, 64))


class DeconvNet(nn.Module):
    """VGG16's convolutions and two of its fully connected layers as convolutions, and a mirror of transposed ones.

    fc6 is a 7x7 convolution without padding, fc7 1x1, fc6_deconv a transposed 7x7 back to the map of the last pool;
    the decoder's transposed convolutions are 3x3 with stride 1. All + BN + ReLU, no dropout; the classifier is 1x1.
    251.806 M parameters at the authors' 21 classes (PASCAL VOC).

    forward: (N, in_channels, H, W) to logits (N, num_classes, H, W), dtype and memory format kept. The authors' crops
    are 224x224; any size from 193x193 goes, ValueError below. In training mode a batch of one needs a side of more
    than 224, since BN has to see more than one pixel behind fc6.

    width, bn_eps as in SegNet. The authors start the encoder, fc6 and fc7 from VGG16's weights, here they start from
    MSRA; the layers behind start from a gaussian of 0.01, and all from bias 0, BN gamma 1 and beta 0.001.
    """

    LEAST = 6 * 32 + 1  # the shorter side: five ceil pools leave fc6's 7x7 window

    def __init__(self, num_classes: int = 21, in_channels: int = 3, width: float = 1.0, bn_eps: float = 1e-9) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        down, up = scaled(VGG16, width), scaled(DECODER, width)
        bottom, ((hidden,),) = down[-1][-1], scaled([[HIDDEN]], width)

        norms = Norms.of(bn_eps)

        def conv(inputs: int, outputs: int, norm: Norm) -> Block:
            return Block(Conv2d(inputs, outputs, 3, padding=1), norm(outputs))

        def deconv(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
            if norm is norms.plain:
                return ConvTransposeBatchNormReLU2d(inputs, outputs, 3, padding=1, eps=bn_eps)
            return Block(ConvTranspose2dBeforeNorm(inputs, outputs, 3, padding=1), norm(outputs))

        self.encoder = stages(in_channels, down, conv, norms, down=True)
        self.fc6 = Block(Conv2d(bottom, hidden, 7), norms.plain(hidden))
        self.fc7 = Block(Conv2d(hidden, hidden, 1), norms.plain(hidden))
        self.fc6_deconv = Block(ConvTranspose2dBeforeNorm(hidden, bottom, 7), norms.unpooled(bottom))
        self.decoder = stages(bottom, up, deconv, norms, down=False)
        self.classifier = nn.Conv2d(up[-1][-1], num_classes, 1)
        initialise(self)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d) or module is self.classifier:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.LEAST:
            raise ValueError(
                f"DeconvNet: input must be at least {self.LEAST}x{self.LEAST}, so that five pools leave the 7x7 map "
                f"that fc6 needs, but is {x.shape[-2]}x{x.shape[-1]}"
            )
        x, kept = encode(self.encoder, x)
        x = self.fc6_deconv(self.fc7(self.fc6(x)), *kept.pop())
        return self.classifier(decode(self.decoder, x, kept))
