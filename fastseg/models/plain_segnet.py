"""The network that the demo trains, from torch's layers alone."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import check_arguments


class PlainSegNet(nn.Module):
    """A small SegNet in plain torch: four stages down, four up; the decoder without ReLU, as SegNet-Basic's.

    forward: images [N, 3, H, W] to logits [N, num_classes, H, W], of any size.
    """

    def __init__(self, num_classes: int = 11) -> None:
        super().__init__()
        check_arguments(num_classes)
        self.encoder = nn.ModuleList(
            [
                nn.Sequential(*self.layer(3, 16), nn.ReLU()),
                nn.Sequential(*self.layer(16, 32), nn.ReLU()),
                nn.Sequential(*self.layer(32, 64), nn.ReLU(), *self.layer(64, 64), nn.ReLU()),
                nn.Sequential(*self.layer(64, 128), nn.ReLU(), *self.layer(128, 128), nn.ReLU()),
            ]
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(2, return_indices=True, ceil_mode=True) for _ in self.encoder)
        self.unpools = nn.ModuleList(nn.MaxUnpool2d(2) for _ in self.encoder)
        self.decoder = nn.ModuleList(
            nn.Sequential(*self.layer(inputs, outputs)) for inputs, outputs in ((128, 64), (64, 32), (32, 16), (16, 16))
        )
        self.classifier = nn.Conv2d(16, num_classes, 3, padding=1)

    @staticmethod
    def layer(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        places = []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size = x.shape
            x, indices = pool(x)
            places.append((indices, size))
        for unpool, stage in zip(self.unpools, self.decoder, strict=True):
            indices, size = places.pop()
            x = stage(unpool(x, indices, output_size=size))
        return self.classifier(x)
