"""SegNet (Badrinarayanan et al. 2015) twice: with one shared pool and unpool, and with functional calls only."""

import torch
import torch.nn.functional as F
from torch import nn


class SharedSegNet(nn.Module):
    """One nn.MaxPool2d and one nn.MaxUnpool2d, called at every stage with positional and keyword arguments."""

    def __init__(self, num_classes, channels=(4, 6, 8)):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2, 2)
        self.encoder = nn.ModuleList(self._stage(i, o) for i, o in zip((3, *channels), channels, strict=False))
        outputs = (channels[0], *channels[:-1])
        self.decoder = nn.ModuleList(self._stage(i, o) for i, o in zip(channels, outputs, strict=True))
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    @staticmethod
    def _stage(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.3), nn.ReLU(inplace=True)
        )

    def forward(self, x):
        indices, sizes = [], []
        for stage in self.encoder:
            x = stage(x)
            sizes.append(x.size())
            x, index = self.pool(x)
            indices.append(index)
        for stage in reversed(self.decoder):
            x = stage(self.unpool(input=x, indices=indices.pop(), output_size=sizes.pop()))
        return self.classifier(x)


class FunctionalSegNet(nn.Module):
    """Only the convolutions are layers; everything else is a functional call.

    forward(x, target) returns the loss of the full logits plus, for deep supervision, that of the encoder's small ones.
    """

    def __init__(self, num_classes, width=6):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.deconv1 = nn.Conv2d(width, width, 3, padding=1)
        self.up_weight = nn.Parameter(torch.randn(width, num_classes, 2, 2) / width**0.5)
        self.up_bias = nn.Parameter(torch.zeros(num_classes))
        self.side = nn.Conv2d(width, num_classes, 1)
        for name in ("norm1", "norm2", "norm3"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.rand(width) + 0.5))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(width) / 10))
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_var", torch.ones(width))

    def _norm_relu(self, name, x):
        mean, var = getattr(self, f"{name}_mean"), getattr(self, f"{name}_var")
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=self.training, momentum=0.1), inplace=True)

    def logits(self, x):
        x = self._norm_relu("norm1", self.conv1(x))
        size1 = x.size()
        x, indices1 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self._norm_relu("norm2", self.conv2(x))
        side = self.side(x)
        size2 = x.size()
        x, indices2 = F.max_pool2d_with_indices(x, 2)
        x = F.max_unpool2d(x, indices2, kernel_size=2, stride=2, output_size=size2)
        x = self._norm_relu("norm3", self.deconv1(x))
        x = F.max_unpool2d(x, indices1, 2, output_size=size1)
        return F.conv_transpose2d(x, self.up_weight, self.up_bias, stride=2), side

    def forward(self, x, target):
        logits, side = self.logits(x)
        side = F.interpolate(side, size=target.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, target, ignore_index=255) + 0.4 * F.cross_entropy(side, target, ignore_index=255)
