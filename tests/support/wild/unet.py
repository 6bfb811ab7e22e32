"""U-Net (Ronneberger et al. 2015) for images of any size, and LinkNet (Chaurasia and Culurciello 2017)."""

import torch
import torch.nn.functional as F
from torch import nn


class DoubleConv(nn.Module):
    """Twice convolution, batch norm and ReLU."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Upsamples, pads to the size of the skip connection, which may have one more row or column, and concatenates."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        dy, dx = x2.size(2) - x1.size(2), x2.size(3) - x1.size(3)
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, n_classes, width=4):
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1, self.down2 = Down(width, 2 * width), Down(2 * width, 4 * width)
        self.up1, self.up2 = Up(4 * width, 2 * width), Up(2 * width, width)
        self.outc = nn.Conv2d(width, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += residual
        return self.relu(out)


class Decoder(nn.Module):
    def __init__(self, in_planes, out_planes, stride, output_padding):
        super().__init__()
        inner = in_planes // 2
        self.conv1 = nn.Sequential(nn.Conv2d(in_planes, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(inplace=True))
        self.tp_conv = nn.Sequential(
            nn.ConvTranspose2d(inner, inner, 3, stride, padding=1, output_padding=output_padding, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(nn.Conv2d(inner, out_planes, 1), nn.BatchNorm2d(out_planes), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.conv2(self.tp_conv(self.conv1(x)))


class LinkNet(nn.Module):
    """Ends in LogSoftmax, for nn.NLLLoss."""

    def __init__(self, n_classes, width=6):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.encoder1 = BasicBlock(width, width)
        self.encoder2 = BasicBlock(width, 2 * width, stride=2)
        self.decoder1 = Decoder(width, width, 1, 0)
        self.decoder2 = Decoder(2 * width, width, 2, 1)
        self.tp_conv1 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 3, 2, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.tp_conv2 = nn.ConvTranspose2d(width, n_classes, 2, 2, 0)
        self.lsm = nn.LogSoftmax(dim=1)

    def forward(self, x):
        e1 = self.encoder1(self.stem(x))
        e2 = self.encoder2(e1)
        d1 = self.decoder1(e1 + self.decoder2(e2))
        return self.lsm(self.tp_conv2(self.conv2(self.tp_conv1(d1))))


class Repeated(nn.Module):
    """`[conv, bn, relu] * n` in one nn.Sequential: one convolution and one batch norm that run n times."""

    def __init__(self, num_classes, times=3, width=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        block = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*block * times, nn.MaxPool2d(2))
        self.up = nn.ConvTranspose2d(width, num_classes, 2, 2)

    def forward(self, x):
        return self.up(self.body(self.stem(x)))
