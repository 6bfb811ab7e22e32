"""Where a Bayesian SegNet is uncertain: at the borders of labels, and where it is wrong.

    fastseg train --model bayesian-segnet-basic --width 0.25 --steps 400 --batch-size 8
    python examples/uncertainty.py runs/train/checkpoint.pt uncertainty.png

Predicts digit scenes that the network has not seen by 40 passes with dropout. Prints how the uncertainty relates to
borders and errors, and draws a scene, its prediction and the variance.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.training.calibration import expected_calibration_error, risk_coverage
from fastseg.training.data import DigitScenes, normalise
from fastseg.training.drawing import colourise, palette
from fastseg.training.segmenter import Segmenter
from fastseg.uncertainty import measure, sample


def near_borders(labels: Tensor, distance: int = 2) -> Tensor:
    """Which pixels of labels (N, H, W) are at most `distance` from a pixel with another label."""
    side = 2 * distance + 1
    maps = labels[:, None].float()
    highest, lowest = (sign * F.max_pool2d(sign * maps, side, 1, distance) for sign in (1, -1))
    return (highest != lowest)[:, 0]


def draw(path: Path, panels: dict[str, np.ndarray]) -> None:
    """Write the panels beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (name, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel, cmap="bone_r" if panel.ndim == 2 else None)
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    segmenter = Segmenter(sys.argv[1], "cpu")
    scenes = DigitScenes("val", 64)
    images, labels = (torch.stack(column) for column in zip(*(scenes[k] for k in range(16)), strict=True))
    samples = sample(segmenter.model, normalise(images, segmenter.mean, segmenter.std), passes=40, seed=0)
    confidence, prediction = samples.mean.max(1)
    variance, correct = measure(samples, "variance"), prediction == labels
    curve, borders = risk_coverage(variance, correct, points=10), near_borders(labels)
    print(f"accuracy of all pixels {1 - curve.risk[-1]:.3f}, of the most certain half {1 - curve.risk[4]:.3f}")
    print(f"variance near borders {variance[borders].mean():.4f}, elsewhere {variance[~borders].mean():.4f}")
    print(f"expected calibration error {expected_calibration_error(confidence, correct):.3f}")
    if len(sys.argv) > 2:
        shown = colourise(prediction[0].numpy(), palette(segmenter.classes), segmenter.ignore_index)
        picture = (images[0].movedim(0, -1) * 255).byte().numpy()
        draw(Path(sys.argv[2]), {"picture": picture, "mean of 40 passes": shown, "variance": variance[0].numpy()})


if __name__ == "__main__":
    main()
