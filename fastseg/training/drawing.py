"""Pictures of labels: a colour for each class, and scenes with their prediction and truth side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..atomic_write import atomic_write
from .data import CAMVID_CLASSES

CAMVID_COLOURS = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (0, 0, 192),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
"""The colours of CamVid's own label file, in the order of CAMVID_CLASSES."""
VOID_COLOUR = (0, 0, 0)


class Scene(NamedTuple):
    """One row of a drawing: picture uint8 [H, W, 3], truth (or None) and prediction integer [H, W]."""

    picture: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray


def need_matplotlib() -> None:
    """Raise an ImportError that names the extra where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "fastseg-kernels[demo]"') from error


def palette(classes: Sequence[str]) -> np.ndarray:
    """A colour for each class, uint8 [classes, 3]: CamVid's own for its classes, else colours far apart."""
    if tuple(classes) == CAMVID_CLASSES:
        return np.array(CAMVID_COLOURS, np.uint8)
    if len(classes) <= 11:
        from matplotlib import colormaps

        colours = [*colormaps["tab10"].colors, (0.17, 0.17, 0.17)][: len(classes)]
    else:  # neighbours on the colour wheel differ in brightness too
        colours = [colorsys.hsv_to_rgb(k / len(classes), 0.8, (1.0, 0.6)[k % 2]) for k in range(len(classes))]
    return np.round(np.array(colours) * 255).astype(np.uint8)


def colourise(labels: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """Labels [H, W] in their classes' colours, uint8 [H, W, 3]; pixels of `ignore_index` black."""
    ignored = labels == ignore_index
    image = colours[np.where(ignored, 0, labels)]
    image[ignored] = VOID_COLOUR
    return image


def draw_scenes(
    path: str | Path, scenes: Sequence[Scene], classes: Sequence[str], ignore_index: int, overlay: bool = False
) -> None:
    """Write a PNG to `path`: a row for each scene, picture, truth where there is one, prediction; a legend beside.

    overlay: lay the prediction over the picture, half transparent. The legend names the classes that are shown.
    """
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(classes)
    columns = (
        ["picture", "truth", "prediction"] if any(s.truth is not None for s in scenes) else ["picture", "prediction"]
    )
    height, width = scenes[0].picture.shape[:2]
    cell = 3.2
    legend = 1.8
    figure = Figure((cell * len(columns) + legend, cell * height / width * len(scenes) + 0.4), layout="constrained")
    axes = figure.subplots(len(scenes), len(columns), squeeze=False)
    shown: set[int] = set()
    for row, scene in zip(axes, scenes, strict=True):
        prediction = colourise(scene.prediction, colours, ignore_index)
        if overlay:
            prediction = scene.picture // 2 + prediction // 2
        panels = {"picture": scene.picture, "prediction": prediction}
        shown |= set(np.unique(scene.prediction).tolist())
        if scene.truth is not None:
            panels["truth"] = colourise(scene.truth, colours, ignore_index)
            shown |= set(np.unique(scene.truth).tolist())
        for axis, name in zip(row, columns, strict=True):
            axis.set_axis_off()
            if name in panels:
                axis.imshow(panels[name], interpolation="nearest" if name != "picture" else None)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name)
    entries = [Patch(facecolor=colours[k] / 255, label=name) for k, name in enumerate(classes) if k in shown]
    if ignore_index in shown:
        entries.append(Patch(facecolor=VOID_COLOUR, label="void"))
    figure.legend(handles=entries, loc="outside right center", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
