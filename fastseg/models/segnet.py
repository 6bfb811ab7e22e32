"""SegNet and SegNet-Basic.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", TPAMI 2017. Layers, fillers and epsilon as in the authors' Caffe files, segnet_train.prototxt and
segnet_basic_train.prototxt. Where max-pooling goes down, the place of each maximum is kept as one byte; where
unpooling goes up, it is put back there, to exactly the size the map had.
"""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import (
    VGG16,
    Block,
    Conv2d,
    Norm,
    Norms,
    check_arguments,
    decode,
    encode,
    initialise,
    scaled,
    stages,
    unpool,
)
from .segnet_inference import unpool_and_decode

DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64,))
BASIC = ((64,),) * 4


class SegNet(nn.Module):
    """VGG16's 13 convolutions, five pools, their mirror image, all 3x3 + BN + ReLU, and a 3x3 classifier.

    29.449 M parameters at the authors' 11 classes (CamVid). forward: (N, in_channels, H, W) of any size to logits
    (N, num_classes, H, W), dtype and memory format kept.

    width multiplies every channel count (multiples of 8, at least 8). bn_eps: the authors' Caffe layer has 1e-9;
    torch's own default is 1e-5. Their BN starts from gamma 1 and beta 0.001, their convolutions from MSRA with bias 0,
    and the last one has neither BN nor ReLU. Theirs keeps no running statistics but averages them in a pass over the
    training set; here BatchNorm2d's running ones serve in eval mode.

    In evaluation without gradients each unpooling runs in one kernel with the convolution behind it where that was
    measured to be faster on this GPU, see docs/conv_transpose.md.
    """

    def __init__(self, num_classes: int = 11, in_channels: int = 3, width: float = 1.0, bn_eps: float = 1e-9) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        down, up = scaled(VGG16, width), scaled(DECODER, width)

        def layer(inputs: int, outputs: int, norm: Norm) -> Block:
            return Block(Conv2d(inputs, outputs, 3, padding=1), norm(outputs))

        norms = Norms.of(bn_eps)
        self.encoder = stages(in_channels, down, layer, norms, down=True)
        self.decoder = stages(down[-1][-1], up, layer, norms, down=False)
        self.classifier = nn.Conv2d(up[-1][-1], num_classes, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = encode(self.encoder, x)
        return self.classifier(unpool_and_decode(self.decoder, x, kept))


class SegNetBasic(nn.Module):
    """Response normalisation, 4 times [7x7 convolution + BN + ReLU + pool], 4 times [unpool + 7x7 + BN], a classifier.

    64 channels throughout, no ReLU in the decoder, the classifier 1x1. 1.417 M parameters at the authors' 11 classes
    (CamVid). forward, arguments, fillers and epsilon as in SegNet; the normalisation (size 5, alpha 1e-4, beta 0.75)
    is of the input.
    """

    def __init__(self, num_classes: int = 11, in_channels: int = 3, width: float = 1.0, bn_eps: float = 1e-9) -> None:
        super().__init__()
        check_arguments(num_classes, in_channels, width)
        plan = scaled(BASIC, width)

        def layer(inputs: int, outputs: int, norm: Norm) -> Block:
            return Block(Conv2d(inputs, outputs, 7, padding=3), norm(outputs))

        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = stages(in_channels, plan, layer, Norms.of(bn_eps), down=True)
        self.decoder = stages(plan[-1][-1], plan, layer, Norms.of(bn_eps, relu=False), down=False)
        self.classifier = nn.Conv2d(plan[-1][-1], num_classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = encode(self.encoder, self.norm(x))
        return self.classifier(decode(self.decoder, unpool(x, kept.pop()), kept))
