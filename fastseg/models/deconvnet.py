"""DeconvNet."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import ConvTransposeBatchNormReLU2d
from ..nn.conv import ConvTranspose2dBeforeNorm
from .blocks import (
    VGG16,
    Block,
    Conv2d,
    NormFactories,
    NormFactory,
    build_decoder,
    build_encoder,
    check_arguments,
    decode,
    encode,
    initialize,
    scaled,
)

HIDDEN = 4096
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64, 64))


class DeconvNet(nn.Module):
    """DeconvNet: VGG16 including two fully connected layers, and its mirror image with transposed convolutions.

    The encoder has VGG16's 13 convolutions in five stages with 2x2 max-pooling. fc6 is a 7x7 convolution without
    padding, fc7 a 1x1 convolution, and fc6_deconv a 7x7 transposed convolution back to the size of the last pool. The
    decoder has five stages, each with a max-unpooling and 3x3 transposed convolutions with stride 1. All of these have
    batch normalization and ReLU; there is no dropout. A 1x1 convolution classifies. 251.806 M parameters with the
    authors' 21 classes (PASCAL VOC).

    Layers, initialization and eps are those of the authors' Caffe file stage_1_train.prototxt, except that the encoder,
    fc6 and fc7 start from MSRA and not from the weights of VGG16 (see :func:`load_vgg16`). The layers after fc7 start
    from a Gaussian with standard deviation 0.01. All biases start from 0, batch norm weights from 1 and their biases
    from 0.001.

    Args:
        num_classes, in_channels, width, bn_eps: as in :class:`SegNet`.

    Shape:
        - Input: (N, in_channels, H, W) with H and W at least 193; the authors use crops of 224x224. In training, a
          batch of one needs a side above 224: batch normalization needs more than one value per channel after fc6.
        - Output: logits (N, num_classes, H, W), in the dtype and memory format of the input.

    Raises:
        ValueError: as :class:`SegNet`, and in the call for images smaller than 193x193.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.DeconvNet(num_classes=21, width=0.02).eval()
        >>> tuple(model(torch.randn(1, 3, 193, 200)).shape)
        (1, 21, 193, 200)

    Source:
        Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015
    """

    MIN_SIZE = 6 * 32 + 1  # the shorter side: five pools that round up must leave the 7x7 window of fc6

    def __init__(self, num_classes: int = 21, in_channels: int = 3, width: float = 1.0, bn_eps: float = 1e-9) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        down, up = scaled(VGG16, width), scaled(DECODER, width)
        bottom, ((hidden,),) = down[-1][-1], scaled([[HIDDEN]], width)

        norms = NormFactories.of(bn_eps)

        def conv(inputs: int, outputs: int, norm: NormFactory) -> Block:
            return Block(Conv2d(inputs, outputs, 3, padding=1), norm(outputs))

        def deconv(inputs: int, outputs: int, norm: NormFactory) -> nn.Sequential:
            if norm is norms.plain:
                return ConvTransposeBatchNormReLU2d(inputs, outputs, 3, padding=1, eps=bn_eps)
            return Block(ConvTranspose2dBeforeNorm(inputs, outputs, 3, padding=1), norm(outputs))

        self.encoder = build_encoder(in_channels, down, conv, norms)
        self.fc6 = Block(Conv2d(bottom, hidden, 7), norms.plain(hidden))
        self.fc7 = Block(Conv2d(hidden, hidden, 1), norms.plain(hidden))
        self.fc6_deconv = Block(ConvTranspose2dBeforeNorm(hidden, bottom, 7), norms.unpooled(bottom))
        self.decoder = build_decoder(bottom, up, deconv, norms)
        self.classifier = nn.Conv2d(up[-1][-1], num_classes, 1)
        initialize(self)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d) or module is self.classifier:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.MIN_SIZE:
            raise ValueError(
                f"DeconvNet: input must be at least {self.MIN_SIZE}x{self.MIN_SIZE}, so that five pools leave the 7x7 "
                f"map that fc6 needs, but is {x.shape[-2]}x{x.shape[-1]}"
            )
        x, pooled = encode(self.encoder, x)
        x = self.fc6_deconv(self.fc7(self.fc6(x)), *pooled.pop())
        return self.classifier(decode(self.decoder, x, pooled))
