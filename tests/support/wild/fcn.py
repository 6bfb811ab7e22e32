"""FCN-8s and FCN-32s (Long et al. 2015): padding, ceil_mode pools, bilinear transposed convolutions and crops."""

import torch
from torch import nn


def bilinear_kernel(in_channels, out_channels, kernel_size):
    """The weight of a transposed convolution that interpolates each channel bilinearly."""
    factor = (kernel_size + 1) // 2
    center = factor - 1 if kernel_size % 2 == 1 else factor - 0.5
    line = 1 - (torch.arange(kernel_size) - center).abs() / factor
    weight = torch.zeros(in_channels, out_channels, kernel_size, kernel_size)
    for channel in range(min(in_channels, out_channels)):
        weight[channel, channel] = line[:, None] * line
    return weight


class FCN(nn.Module):
    """stride 8: FCN-8s, which adds the scores of pool3 and pool4. stride 32: FCN-32s, with one transposed convolution
    with a 64x64 window, whose weight is not trained.
    """

    def __init__(self, num_classes, stride, channels=(3, 4, 4, 5, 5), hidden=6, padding=30):
        super().__init__()
        self.stride = stride
        self.features = nn.ModuleList()
        for n, (i, o) in enumerate(zip((3, *channels), channels, strict=False)):
            self.features.append(
                nn.Sequential(
                    nn.Conv2d(i, o, 3, padding=padding if n == 0 else 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(o, o, 3, padding=1),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2, stride=2, ceil_mode=True),
                )
            )
        self.fc6 = nn.Sequential(nn.Conv2d(channels[-1], hidden, 3), nn.ReLU(inplace=True), nn.Dropout2d())
        self.score_fr = nn.Conv2d(hidden, num_classes, 1)
        if stride == 8:
            self.score_pool3 = nn.Conv2d(channels[2], num_classes, 1)
            self.score_pool4 = nn.Conv2d(channels[3], num_classes, 1)
            self.upscore2 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False)
            self.upscore_pool4 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False)
        self.upscore = nn.ConvTranspose2d(num_classes, num_classes, 2 * stride, stride=stride, bias=False)
        self._initialize_weights()
        if stride == 32:
            self.upscore.weight.requires_grad_(False)

    def _initialize_weights(self):
        for m in self.modules():
            if isinstance(m, nn.ConvTranspose2d):
                assert m.kernel_size[0] == m.kernel_size[1]
                m.weight.data.copy_(bilinear_kernel(m.in_channels, m.out_channels, m.kernel_size[0]))

    @staticmethod
    def _crop(x, offset, like):
        return x[:, :, offset : offset + like.size(2), offset : offset + like.size(3)]

    def forward(self, x):
        h, kept = x, []
        for stage in self.features:
            h = stage(h)
            kept.append(h)
        h = self.score_fr(self.fc6(h))
        if self.stride == 8:
            h = self.upscore2(h)
            h = h + self._crop(self.score_pool4(kept[3] * 0.01), 0, h)
            h = self.upscore_pool4(h)
            h = h + self._crop(self.score_pool3(kept[2] * 0.0001), 1, h)
        return self._crop(self.upscore(h), 9, x).contiguous()
