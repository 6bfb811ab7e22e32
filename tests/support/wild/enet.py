"""ENet (Paszke et al. 2016) in the style of its PyTorch ports: pools and unpools with different windows."""

import torch
from torch import nn


class InitialBlock(nn.Module):
    """A strided convolution and a pool of the same image, concatenated."""

    def __init__(self, channels):
        super().__init__()
        self.main_branch = nn.Conv2d(3, channels - 3, kernel_size=3, stride=2, padding=1, bias=False)
        self.ext_branch = nn.MaxPool2d(3, stride=2, padding=1)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.out_prelu = nn.PReLU()

    def forward(self, x):
        return self.out_prelu(self.batch_norm(torch.cat((self.main_branch(x), self.ext_branch(x)), 1)))


class RegularBottleneck(nn.Module):
    def __init__(self, channels, kernel_size=3, padding=1, dilation=1, asymmetric=False, dropout_prob=0.1):
        super().__init__()
        inner = channels // 2
        self.ext_conv1 = nn.Sequential(
            nn.Conv2d(channels, inner, kernel_size=1, bias=False), nn.BatchNorm2d(inner), nn.PReLU()
        )
        if asymmetric:
            middle = [
                nn.Conv2d(inner, inner, (kernel_size, 1), padding=(padding, 0), bias=False),
                nn.BatchNorm2d(inner),
                nn.PReLU(),
                nn.Conv2d(inner, inner, (1, kernel_size), padding=(0, padding), bias=False),
            ]
        else:
            middle = [nn.Conv2d(inner, inner, kernel_size, padding=padding, dilation=dilation, bias=False)]
        self.ext_conv2 = nn.Sequential(*middle, nn.BatchNorm2d(inner), nn.PReLU())
        self.ext_conv3 = nn.Sequential(
            nn.Conv2d(inner, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels), nn.PReLU()
        )
        self.ext_regul = nn.Dropout2d(p=dropout_prob)
        self.out_prelu = nn.PReLU()

    def forward(self, x):
        ext = self.ext_regul(self.ext_conv3(self.ext_conv2(self.ext_conv1(x))))
        return self.out_prelu(x + ext)


class DownsamplingBottleneck(nn.Module):
    """The main branch pools overlapping 3x3 windows, returns the indices, and pads channels with zeros."""

    def __init__(self, in_channels, out_channels, dropout_prob=0.01):
        super().__init__()
        inner = in_channels // 2
        self.main_max1 = nn.MaxPool2d(kernel_size=3, stride=2, padding=1, return_indices=True)
        self.ext_conv1 = nn.Sequential(
            nn.Conv2d(in_channels, inner, kernel_size=2, stride=2, bias=False), nn.BatchNorm2d(inner), nn.PReLU()
        )
        self.ext_conv2 = nn.Sequential(
            nn.Conv2d(inner, out_channels, kernel_size=1, bias=False), nn.BatchNorm2d(out_channels), nn.PReLU()
        )
        self.ext_regul = nn.Dropout2d(p=dropout_prob)
        self.out_prelu = nn.PReLU()

    def forward(self, x):
        main, max_indices = self.main_max1(x)
        ext = self.ext_regul(self.ext_conv2(self.ext_conv1(x)))
        n, channels, h, w = ext.size()
        padding = torch.zeros(n, channels - main.size(1), h, w, dtype=main.dtype, device=main.device)
        return self.out_prelu(torch.cat((main, padding), 1) + ext), max_indices


class UpsamplingBottleneck(nn.Module):
    """Unpools with 2x2 windows what was pooled with 3x3 windows, to a size given at the call."""

    def __init__(self, in_channels, out_channels, dropout_prob=0.1):
        super().__init__()
        inner = in_channels // 2
        self.main_conv1 = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.main_unpool1 = nn.MaxUnpool2d(kernel_size=2)
        self.ext_conv1 = nn.Sequential(
            nn.Conv2d(in_channels, inner, kernel_size=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        )
        self.ext_tconv1 = nn.ConvTranspose2d(inner, inner, kernel_size=2, stride=2, bias=False)
        self.ext_tconv1_bnorm = nn.BatchNorm2d(inner)
        self.ext_tconv1_activation = nn.ReLU()
        self.ext_conv2 = nn.Sequential(
            nn.Conv2d(inner, out_channels, kernel_size=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.ext_regul = nn.Dropout2d(p=dropout_prob)
        self.out_prelu = nn.PReLU()

    def forward(self, x, max_indices, output_size):
        main = self.main_unpool1(self.main_conv1(x), max_indices, output_size=output_size)
        ext = self.ext_tconv1(self.ext_conv1(x), output_size=output_size)
        ext = self.ext_tconv1_activation(self.ext_tconv1_bnorm(ext))
        return self.out_prelu(main + self.ext_regul(self.ext_conv2(ext)))


class ENet(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.initial_block = InitialBlock(width)
        self.downsample1_0 = DownsamplingBottleneck(width, 2 * width)
        self.regular1_1 = RegularBottleneck(2 * width, dropout_prob=0.01)
        self.downsample2_0 = DownsamplingBottleneck(2 * width, 4 * width)
        self.dilated2_2 = RegularBottleneck(4 * width, padding=2, dilation=2)
        self.asymmetric2_3 = RegularBottleneck(4 * width, kernel_size=5, padding=2, asymmetric=True)
        self.upsample4_0 = UpsamplingBottleneck(4 * width, 2 * width)
        self.regular4_1 = RegularBottleneck(2 * width)
        self.upsample5_0 = UpsamplingBottleneck(2 * width, width)
        self.transposed_conv = nn.ConvTranspose2d(width, num_classes, kernel_size=3, stride=2, padding=1, bias=False)

    def forward(self, x):
        input_size = x.size()
        x = self.initial_block(x)
        stage1_size = x.size()
        x, indices1 = self.downsample1_0(x)
        x = self.regular1_1(x)
        stage2_size = x.size()
        x, indices2 = self.downsample2_0(x)
        x = self.asymmetric2_3(self.dilated2_2(x))
        x = self.regular4_1(self.upsample4_0(x, indices2, output_size=stage2_size))
        x = self.upsample5_0(x, indices1, output_size=stage1_size)
        return self.transposed_conv(x, output_size=input_size)
