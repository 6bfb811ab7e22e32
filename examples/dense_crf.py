"""A fully connected CRF on a small scene: noisy scores become labels with the picture's edges.

    python examples/dense_crf.py docs/images/crf.png

Draws the picture, the labels of the scores, and the labels after the CRF, and prints the share of right pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.crf import CRFOptions, dense_crf

COLOURS = torch.tensor([[70.0, 80, 90], [200, 90, 60], [60, 150, 90], [210, 190, 80]])
NAMES = ("picture", "labels of the scores", "labels after the CRF")


def scene(height: int = 90, width: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """(picture, scores, true labels): three discs, and scores as blurred and noisy as a coarse network's."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = torch.zeros(height, width, dtype=torch.long)
    for label, (row, column, radius) in enumerate(((35, 32, 24), (58, 74, 26), (28, 98, 16)), 1):
        labels[(y - row) ** 2 + (x - column) ** 2 < radius**2] = label
    noise = torch.randn(3, height, width, generator=generator) * 8
    picture = (COLOURS[labels].movedim(-1, 0) + noise).clamp(0, 255).to(torch.uint8)[None]
    exact = F.one_hot(labels, 4).movedim(-1, 0)[None].float()
    small = F.interpolate(exact, scale_factor=1 / 8, mode="area") * 4
    small = small + torch.randn(small.shape, generator=generator)
    return picture, F.interpolate(small, (height, width), mode="bilinear"), labels


def draw(path: Path, panels: list[Tensor]) -> None:
    """Write RGB panels (H, W, 3) beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, panel, name in zip(figure.subplots(1, len(panels)), panels, NAMES, strict=True):
        axes.imshow(panel.numpy())
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    picture, scores, truth = scene()
    refined = dense_crf(scores, picture, CRFOptions(gaussian=(3.0, 3.0), bilateral=(5.0, 20.0, 13.0)))
    before, after = scores.argmax(1)[0], refined.argmax(1)[0]
    for name, labels in zip(("scores", "after the CRF"), (before, after), strict=True):
        print(f"{name}: {(labels == truth).float().mean():.3f} of the pixels right")
    if len(sys.argv) > 1:
        colours = COLOURS.to(torch.uint8)
        draw(Path(sys.argv[1]), [picture[0].movedim(0, -1), colours[before], colours[after]])


if __name__ == "__main__":
    main()
