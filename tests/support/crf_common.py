"""Inputs of the fully connected CRF's tests."""

import pytest
import torch

from fastseg.kernels.cpu import build

NO_CPU = build.unavailable()
BACKENDS = pytest.mark.parametrize(
    "backend",
    ["triton", pytest.param("cpu", marks=pytest.mark.skipif(NO_CPU is not None, reason=str(NO_CPU))), "torch"],
)


def picture(*shape: int, device: str = "cpu", patch: int = 4, mode: str = "bilinear") -> torch.Tensor:
    """Colours that change little from pixel to pixel, as in photographs: uint8 (N, C, H, W).

    mode "nearest": patches of one colour each, about `patch` pixels wide. Both with some noise.
    """
    coarse = torch.rand(*shape[:2], shape[2] // patch + 1, shape[3] // patch + 1) * 255
    large = torch.nn.functional.interpolate(coarse, shape[2:], mode=mode)
    return (large + torch.randn(shape) * 3).clamp(0, 255).to(torch.uint8).to(device)


def brute_force(
    values: torch.Tensor, image: torch.Tensor | None, sigma: float, sigma_color: float, radius: float | None
):
    """The messages in float64, pixel by pixel, written independently of fastseg's references."""
    values = values.double()
    height, width = values.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.to(values.device), x.to(values.device)
    out = torch.empty_like(values)
    for row in range(height):
        for column in range(width):
            squared = (y - row) ** 2 + (x - column) ** 2
            weight = torch.exp(-squared / (2 * sigma**2)).expand(len(values), -1, -1)
            if image is not None:
                steps = image.double() - image[:, :, row : row + 1, column : column + 1].double()
                weight = weight * torch.exp(-(steps**2).sum(1) / (2 * sigma_color**2))
            if radius is not None:
                weight = weight * (squared.sqrt() <= radius * sigma)
            out[:, :, row, column] = (weight[:, None] * values).sum((2, 3))
    return out
