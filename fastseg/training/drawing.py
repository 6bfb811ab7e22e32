"""Figures of predictions and of a training run, and images of labels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..atomic_write import atomic_write
from .class_names import COLOURS, DISTINCT_COLOURS

if TYPE_CHECKING:
    from .logs import Record

VOID_COLOUR = (0, 0, 0)


class Scene(NamedTuple):
    """One row of a figure.

    Shape:
        - picture: uint8 [H, W, 3].
        - truth: integer [H, W], or None.
        - prediction: integer [H, W].
    """

    picture: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray


def require_matplotlib() -> None:
    """Raise an ImportError that says how to install matplotlib if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "fastseg-kernels[demo]"') from error


def palette(classes: Sequence[str]) -> np.ndarray:
    """Return a colour for each class: the authors' for the classes of a known data set, else ones easy to tell apart.

    Shape:
        - output: uint8 [K, 3] for K classes.
    """
    if tuple(classes) in COLOURS:
        return np.array(COLOURS[tuple(classes)], np.uint8)
    if len(classes) <= len(DISTINCT_COLOURS):
        return np.array(DISTINCT_COLOURS[: len(classes)], np.uint8)
    # Neighbours on the colour wheel also differ in brightness.
    colours = [colorsys.hsv_to_rgb(k / len(classes), 0.8, (1.0, 0.6)[k % 2]) for k in range(len(classes))]
    return np.round(np.array(colours) * 255).astype(np.uint8)


def colourise(labels: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """Draw labels in the colours of their classes, and pixels of `ignore_index` in black.

    Shape:
        - labels: integer [H, W].
        - colours: uint8 [K, 3] for K classes.
        - output: uint8 [H, W, 3].

    Example::

        >>> import numpy as np
        >>> from fastseg.training.drawing import colourise
        >>> colourise(np.array([[1, 255]]), np.array([[1, 2, 3], [4, 5, 6]], np.uint8), ignore_index=255).tolist()
        [[[4, 5, 6], [0, 0, 0]]]
    """
    ignored = labels == ignore_index
    image = colours[np.where(ignored, 0, labels)]
    image[ignored] = VOID_COLOUR
    return image


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write an image, uint8 [H, W, 3], to a PNG file."""
    from PIL import Image

    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def write_labels(path: str | Path, labels: np.ndarray, colours: np.ndarray) -> None:
    """Write labels to a PNG file with a palette: the values are the labels, and a viewer shows them in colours.

    Shape:
        - labels: uint8 [H, W].
        - colours: uint8 [K, 3]; labels from K on are black.
    """
    from PIL import Image

    image = Image.fromarray(labels)
    image.putpalette(np.concatenate([colours, np.zeros((256 - len(colours), 3), np.uint8)]).tobytes())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def overlay(picture: np.ndarray, labels: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """Draw labels half transparent over a picture of the same size.

    Shape:
        - picture: uint8 [H, W, 3].
        - labels: integer [H, W].
        - colours: uint8 [K, 3] for K classes.
        - output: uint8 [H, W, 3].
    """
    return picture // 2 + colourise(labels, colours, ignore_index) // 2


def draw_scenes(
    path: str | Path,
    scenes: Sequence[Scene],
    classes: Sequence[str],
    ignore_index: int,
    colours: np.ndarray | None = None,
) -> None:
    """Write a PNG file with a row per scene: picture, ground truth if there is any, prediction; and a legend.

    Args:
        path: the file to write.
        scenes: the rows.
        classes: names of the classes. The legend has those that occur in a scene.
        ignore_index: label of ignored pixels, which the legend calls "void".
        colours: uint8 [K, 3], the colours of the classes. Default: those of :func:`palette`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(classes) if colours is None else colours
    has_truth = any(scene.truth is not None for scene in scenes)
    columns = ["picture", "truth", "prediction"] if has_truth else ["picture", "prediction"]
    height, width = scenes[0].picture.shape[:2]
    cell, legend = 3.2, 1.8  # inches
    figure = Figure((cell * len(columns) + legend, cell * height / width * len(scenes) + 0.4), layout="constrained")
    axes = figure.subplots(len(scenes), len(columns), squeeze=False)
    shown: set[int] = set()
    for row, scene in zip(axes, scenes, strict=True):
        prediction = colourise(scene.prediction, colours, ignore_index)
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


def draw_uncertainty(path: str | Path, values: np.ndarray) -> None:
    """Write a PNG file with the uncertainty of each pixel, white for 0 and black for the largest value.

    Shape:
        - values: float [H, W].

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import colormaps

    write_png(path, colormaps["bone_r"](values / max(float(values.max()), 1e-30), bytes=True)[..., :3])


def draw_history(path: str | Path, history: Sequence[Record]) -> None:
    """Write a PNG file with the training loss and the validation mIoU of a run over its steps.

    Args:
        path: the file to write.
        history: the records of the run, see :class:`fastseg.training.trainer.Trainer`.
    """
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    loss = figure.subplots()
    (loss_line,) = loss.plot([r["step"] for r in history], [r["loss"] for r in history], label="training loss")
    validated = [record for record in history if "miou" in record]
    miou = loss.twinx()
    (miou_line,) = miou.plot(
        [r["step"] for r in validated],
        [r["miou"] for r in validated],
        "o-",
        color="tab:orange",
        label="validation mIoU",
    )
    loss.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    miou.set(ylabel="validation mIoU", ylim=(0, 1))
    loss.legend(handles=[loss_line, miou_line], loc="center right", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
