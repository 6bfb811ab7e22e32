"""ERFNet (Romera et al. 2017): concatenating downsamplers, factorized residual blocks, transposed convolutions."""

import torch
import torch.nn.functional as F
from torch import nn


class DownsamplerBlock(nn.Module):
    def __init__(self, ninput, noutput):
        super().__init__()
        self.conv = nn.Conv2d(ninput, noutput - ninput, (3, 3), stride=2, padding=1, bias=True)
        self.pool = nn.MaxPool2d(2, stride=2)
        self.bn = nn.BatchNorm2d(noutput, eps=1e-3)

    def forward(self, input):
        return F.relu(self.bn(torch.cat([self.conv(input), self.pool(input)], 1)))


class NonBottleneck1d(nn.Module):
    def __init__(self, chann, dropprob, dilated):
        super().__init__()
        self.conv3x1_1 = nn.Conv2d(chann, chann, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(chann, chann, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(chann, eps=1e-03)
        self.conv3x1_2 = nn.Conv2d(chann, chann, (3, 1), padding=(dilated, 0), dilation=(dilated, 1))
        self.conv1x3_2 = nn.Conv2d(chann, chann, (1, 3), padding=(0, dilated), dilation=(1, dilated))
        self.bn2 = nn.BatchNorm2d(chann, eps=1e-03)
        self.dropout = nn.Dropout2d(dropprob)

    def forward(self, input):
        output = F.relu(self.conv3x1_1(input))
        output = F.relu(self.bn1(self.conv1x3_1(output)))
        output = F.relu(self.conv3x1_2(output))
        output = self.bn2(self.conv1x3_2(output))
        if self.dropout.p != 0:
            output = self.dropout(output)
        return F.relu(output + input)


class UpsamplerBlock(nn.Module):
    def __init__(self, ninput, noutput):
        super().__init__()
        self.conv = nn.ConvTranspose2d(ninput, noutput, 3, stride=2, padding=1, output_padding=1, bias=True)
        self.bn = nn.BatchNorm2d(noutput, eps=1e-3)

    def forward(self, input):
        return F.relu(self.bn(self.conv(input)))


class ERFNet(nn.Module):
    def __init__(self, num_classes, channels=(4, 8, 12)):
        super().__init__()
        a, b, c = channels
        self.initial_block = DownsamplerBlock(3, a)
        self.layers = nn.ModuleList(
            [
                DownsamplerBlock(a, b),
                NonBottleneck1d(b, 0.03, 1),
                DownsamplerBlock(b, c),
                NonBottleneck1d(c, 0.3, 2),
                UpsamplerBlock(c, b),
                NonBottleneck1d(b, 0, 1),
                UpsamplerBlock(b, a),
            ]
        )
        self.output_conv = nn.ConvTranspose2d(a, num_classes, 2, stride=2, padding=0, output_padding=0, bias=True)

    def forward(self, input):
        output = self.initial_block(input)
        for layer in self.layers:
            output = layer(output)
        return self.output_conv(output)
