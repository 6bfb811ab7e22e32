"""SegNet and SegNet-Basic."""

from __future__ import annotations

from torch import Tensor, nn

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
    unpool,
)
from .segnet_inference import unpool_and_decode

DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64,))
BASIC = ((64,),) * 4


class SegNet(nn.Module):
    """SegNet: the convolutions of VGG16, their mirror image, and max-unpooling in between.

    The encoder has VGG16's 13 convolutions in five stages, each stage with a 2x2 max-pooling. The decoder mirrors it:
    each stage begins with a max-unpooling to exactly the size in front of the pool. All convolutions are 3x3, with
    batch normalization and ReLU, and a 3x3 convolution classifies. 29.449 M parameters with the authors' 11 classes
    (CamVid). A pool keeps the position of each maximum in one byte.

    Layers, initialization and eps are those of the authors' Caffe file segnet_train.prototxt: weights MSRA, biases 0,
    batch norm weights 1 and biases 0.001. The authors compute the statistics of the batch norms in a separate pass over
    the training set; here evaluation uses the running statistics.

    In evaluation without gradients, each unpooling runs in one kernel with the convolution after it where this was
    measured to be faster on the GPU (docs/conv_transpose.md).

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images.
        width: factor for all channel counts, which are rounded to multiples of 8.
        bn_eps: eps of the batch norms. The authors' Caffe layer has 1e-9; torch's default is 1e-5.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W), in the dtype and memory format of the input.

    Raises:
        ValueError: if num_classes or in_channels is below 1, or width is not finite and above 0.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.SegNet(num_classes=11, width=0.125).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 11, 45, 61)

    Source:
        Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
        Segmentation", TPAMI 2017
    """

    def __init__(self, num_classes: int = 11, in_channels: int = 3, width: float = 1.0, bn_eps: float = 1e-9) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        down, up = scaled(VGG16, width), scaled(DECODER, width)

        def block(inputs: int, outputs: int, norm: NormFactory) -> Block:
            return Block(Conv2d(inputs, outputs, 3, padding=1), norm(outputs))

        norms = NormFactories.of(bn_eps)
        self.encoder = build_encoder(in_channels, down, block, norms)
        self.decoder = build_decoder(down[-1][-1], up, block, norms)
        self.classifier = nn.Conv2d(up[-1][-1], num_classes, 3, padding=1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x, pooled = encode(self.encoder, x)
        return self.classifier(unpool_and_decode(self.decoder, x, pooled))


class SegNetBasic(nn.Module):
    """SegNet-Basic: four 7x7 convolutions with pools, and four with max-unpooling.

    Local response normalization of the input (size 5, alpha 1e-4, beta 0.75); four times a 7x7 convolution, batch
    normalization, ReLU and a 2x2 max-pooling; four times a max-unpooling, a 7x7 convolution and batch normalization,
    without ReLU; and a 1x1 convolution that classifies. 64 channels in all layers, 1.417 M parameters with the authors'
    11 classes (CamVid). Layers, initialization and eps are those of the authors' segnet_basic_train.prototxt.

    Args:
        num_classes, in_channels, width, bn_eps: as in :class:`SegNet`.

    Shape:
        - Input: (N, in_channels, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Raises:
        ValueError: as :class:`SegNet`.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.SegNetBasic(num_classes=11, width=0.25).eval()
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 11, 45, 61)

    Source:
        Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
        Segmentation", TPAMI 2017
    """

    def __init__(self, num_classes: int = 11, in_channels: int = 3, width: float = 1.0, bn_eps: float = 1e-9) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        plan = scaled(BASIC, width)

        def block(inputs: int, outputs: int, norm: NormFactory) -> Block:
            return Block(Conv2d(inputs, outputs, 7, padding=3), norm(outputs))

        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = build_encoder(in_channels, plan, block, NormFactories.of(bn_eps))
        self.decoder = build_decoder(plan[-1][-1], plan, block, NormFactories.of(bn_eps, relu=False))
        self.classifier = nn.Conv2d(plan[-1][-1], num_classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x, pooled = encode(self.encoder, self.norm(x))
        return self.classifier(decode(self.decoder, unpool(x, pooled.pop()), pooled))
