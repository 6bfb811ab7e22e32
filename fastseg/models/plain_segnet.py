"""A small SegNet made of torch's layers only."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import check_arguments


class PlainSegNet(nn.Module):
    """A small SegNet made of torch.nn's layers only: the network of `fastseg demo`, and an example for fastseg.swap.

    Four encoder stages with 16, 32, 64 and 128 channels and six 3x3 convolutions in all, each with batch normalization
    and ReLU; 2x2 max-pooling with indices; four decoder stages of max-unpooling, a 3x3 convolution and batch
    normalization, without ReLU as in SegNet-Basic; and a 3x3 convolution that classifies.

    Args:
        num_classes: number of classes.

    Shape:
        - Input: (N, 3, H, W), any size.
        - Output: logits (N, num_classes, H, W).

    Raises:
        ValueError: if num_classes is below 1.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.models.PlainSegNet().eval()
        >>> report = fastseg.swap(model)
        >>> tuple(model(torch.randn(1, 3, 45, 61)).shape)
        (1, 11, 45, 61)
    """

    def __init__(self, num_classes: int = 11) -> None:
        super().__init__()
        check_arguments(num_classes)
        self.encoder = nn.ModuleList(
            [
                nn.Sequential(*self._conv_norm(3, 16), nn.ReLU()),
                nn.Sequential(*self._conv_norm(16, 32), nn.ReLU()),
                nn.Sequential(*self._conv_norm(32, 64), nn.ReLU(), *self._conv_norm(64, 64), nn.ReLU()),
                nn.Sequential(*self._conv_norm(64, 128), nn.ReLU(), *self._conv_norm(128, 128), nn.ReLU()),
            ]
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(2, return_indices=True, ceil_mode=True) for _ in self.encoder)
        self.unpools = nn.ModuleList(nn.MaxUnpool2d(2) for _ in self.encoder)
        channels = ((128, 64), (64, 32), (32, 16), (16, 16))
        self.decoder = nn.ModuleList(nn.Sequential(*self._conv_norm(*row)) for row in channels)
        self.classifier = nn.Conv2d(16, num_classes, 3, padding=1)

    @staticmethod
    def _conv_norm(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        pooled = []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size = x.shape
            x, indices = pool(x)
            pooled.append((indices, size))
        for unpool, stage in zip(self.unpools, self.decoder, strict=True):
            indices, size = pooled.pop()
            x = stage(unpool(x, indices, output_size=size))
        return self.classifier(x)
