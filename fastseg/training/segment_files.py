"""Segmentation of image files: find, read, predict, draw, score. All can be checked before writing."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dispatch import backend
from ..functional import confusion_matrix
from ..uncertainty import Sampling, dropout_layers
from .data_check import Progress, no_progress
from .drawing import Scene, draw_scenes, draw_uncertainty, overlay, write_labels, write_png
from .edeconvnet import Ensemble, ensemble_labels
from .instance_wise import PROPOSAL_SIZE, Box, InstanceOptions, read_boxes, select_boxes, sliding_windows
from .layouts import masks_by_name
from .masks import read_pair
from .networks import check_image_size
from .pictures import FRAME_SUFFIXES, find_files, read_image
from .segmenter import DEFAULT_PREDICTION, PredictOptions, Segmenter

if TYPE_CHECKING:
    from PIL.Image import Image

WRITTEN = ("-segmented", "-labels", "-overlay")
"""The ends of the names of outputs, which are no inputs when a folder or a pattern is given."""


class Outputs(NamedTuple):
    """Where the results of an image are written; None for what is not."""

    figure: Path | None
    labels: Path | None
    overlay: Path | None
    uncertainty: Path | None = None


class ImageFiles(NamedTuple):
    """The files of one image."""

    image: Path
    truth: Path | None
    """Its ground-truth mask."""
    boxes: Path | None
    """Its proposals. Without a file, instance-wise prediction uses sliding windows."""
    outputs: Outputs


@dataclass(frozen=True)
class SegmentOptions:
    """How images are segmented.

    Args:
        predict: how their classes are predicted.
        backend: fastseg's backend, see :func:`fastseg.set_backend`.
        sampling: predict by several passes with dropout on; neither in tiles nor instance-wise.
        ensemble: combine instance-wise scores with another network's. Its mode sets the options of the CRF too.

    Raises:
        ValueError: two ways are chosen.
    """

    predict: PredictOptions = DEFAULT_PREDICTION
    backend: str = "auto"
    sampling: Sampling | None = None
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        if self.sampling is not None and (self.predict.tile is not None or self.predict.instances is not None):
            raise ValueError("passes must be left out with tiles and with boxes")
        if self.ensemble is not None and self.predict.instances is None:
            raise ValueError("ensemble needs boxes")

    def check(self, segmenter: Segmenter) -> None:
        """Raise ValueError if the network cannot be used so."""
        if self.sampling is not None:
            dropout_layers(segmenter.model)
        if self.ensemble is not None:
            self.ensemble.check(segmenter)


class Inputs(NamedTuple):
    """The content of the input files. `boxes` is empty unless the image is predicted instance-wise."""

    image: Image
    truth: np.ndarray | None
    boxes: list[Box]


def find_images(given: Sequence[str]) -> list[tuple[Path, Path]]:
    """Return the images that a command line names.

    Args:
        given: files; folders, of which all pictures are taken, with those in subfolders; patterns such as
            ``"val/*.png"``, also with ``**``. Outputs of this command are left out of folders and patterns.

    Returns:
        list: (image, name), where the name begins at the folder that was given: an output gets the same subfolder.

    Raises:
        FileNotFoundError: a folder or a pattern has no pictures.
    """
    images: list[tuple[Path, Path]] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            found = [(image, image.relative_to(path)) for image in find_files(path, FRAME_SUFFIXES)]
        elif glob.has_magic(text) and not path.exists():
            matches = sorted(map(Path, glob.glob(text, recursive=True)))
            found = [(image, Path(image.name)) for image in matches if image.suffix.lower() in FRAME_SUFFIXES]
        else:
            images.append((path, Path(path.name)))
            continue
        found = [(image, name) for image, name in found if not name.stem.endswith(WRITTEN)]
        if not found:
            raise FileNotFoundError(f"{text} has no pictures ({', '.join(FRAME_SUFFIXES)})")
        images += found
    return images


def output_files(images: Sequence[tuple[Path, Path]], out: Path, wanted: Sequence[str]) -> list[Outputs]:
    """Return the files to write for each image.

    Args:
        images: the images and their names, see :func:`find_images`.
        out: a .png file for the figure of a single image, or a folder for ``<stem>-segmented.png``.
        wanted: a subset of the fields of Outputs. Labels are written to ``<stem>-labels.png``, an overlay to
            ``<stem>-overlay.png``.

    Raises:
        ValueError: two images would get the same file, or `out` is the image.

    Example::

        >>> from pathlib import Path
        >>> from fastseg.training.segment_files import output_files
        >>> image = Path("street.jpg")
        >>> [outputs] = output_files([(image, image)], Path("out"), ["figure", "labels"])
        >>> print(outputs.figure.as_posix(), outputs.labels.as_posix(), outputs.overlay)
        out/street-segmented.png out/street-labels.png None
    """
    if out.suffix.lower() == ".png":
        if len(images) > 1:
            raise ValueError(f"out must be a folder for {len(images)} images, but is {out}")
        if out.resolve() == images[0][0].resolve():
            raise ValueError(f"out must not be the image itself, but is {out}")
        stems, figures = [out.with_suffix("")], [out]
    else:
        stems = [out / name.with_suffix("") for _, name in images]
        if len(set(stems)) < len(stems):
            raise ValueError("two images have the same name, so their outputs would too: segment them one at a time")
        figures = [stem.with_name(f"{stem.name}-segmented.png") for stem in stems]
    return [
        Outputs(
            figure if "figure" in wanted else None,
            *(stem.with_name(f"{stem.name}-{kind}.png") if kind in wanted else None for kind in ("labels", "overlay")),
        )
        for stem, figure in zip(stems, figures, strict=True)
    ]


def find_truths(images: Sequence[tuple[Path, Path]], given: Sequence[str] | None) -> list[Path | None]:
    """Return the ground truth of each image.

    Args:
        images: the images and their names, see :func:`find_images`.
        given: as many files; or one folder, in which masks have the names of their images; or None.

    Raises:
        ValueError: there is another number of files.
        FileNotFoundError: the folder lacks the mask of an image.
    """
    if given is not None and len(given) == 1 and Path(given[0]).is_dir():
        return [mask for mask, _ in masks_by_name([name for _, name in images], Path(given[0]))]
    return file_for_each("--truth", given, len(images))


def file_for_each(option: str, given: Sequence[str] | None, count: int) -> list[Path | None]:
    """The files of an option, one for each image. Raises ValueError if there is another number of them."""
    if not given:
        return [None] * count
    if len(given) != count:
        raise ValueError(f"{count} images need as many files for {option}, but got {len(given)}")
    return [Path(name) for name in given]


def read_inputs(files: ImageFiles, segmenter: Segmenter, options: PredictOptions) -> Inputs:
    """Read and check the image, its ground truth and its proposals.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is invalid or does not fit the image, or the image is too small for the network.
    """
    huge = options.tile is not None
    if files.truth is None:
        image, truth = read_image(files.image, huge=huge), None
    else:
        image, truth, *_ = read_pair(files.image, files.truth, segmenter.masks, huge)
    boxes = [] if options.instances is None else _read_boxes(files, image, options.instances)
    own_size = (image.height, image.width)
    if options.tile is not None:
        seen = tuple(map(min, options.tile.size, own_size))
    else:
        seen = options.size or segmenter.size or (own_size if options.instances is None else PROPOSAL_SIZE)
    check_image_size(segmenter.model, *seen)
    return Inputs(image, truth, boxes)


def _read_boxes(files: ImageFiles, image: Image, options: InstanceOptions) -> list[Box]:
    """The selected proposals of an image. Raises ValueError that names the file if there are none."""
    limits = (image.height, image.width, options.min_side, options.max_boxes)
    boxes = sliding_windows(*limits) if files.boxes is None else read_boxes(files.boxes)
    try:
        return select_boxes(boxes, *limits)
    except ValueError as error:
        raise ValueError(f"{files.boxes or files.image}: {error}") from None


def segment_file(
    files: ImageFiles, segmenter: Segmenter, options: SegmentOptions, progress: Progress = no_progress
) -> Tensor | None:
    """Segment one image and write what `files.outputs` has paths for.

    Args:
        files: the files.
        segmenter: the network.
        options: see :class:`SegmentOptions`.
        progress: shows how far a prediction in several parts is.

    Returns:
        Tensor or None: the confusion matrix of the prediction, int64 (K, K); None without ground truth.

    Raises:
        OSError, ValueError: as :func:`read_inputs`.
        ImportError: Pillow or matplotlib is not installed.
    """
    image, truth, boxes = read_inputs(files, segmenter, options.predict)
    with backend(options.backend):
        prediction, uncertainty = _predict(image, boxes, segmenter, options, progress)
    picture, ignored, outputs = np.asarray(image), segmenter.ignore_index, files.outputs
    if outputs.labels is not None:
        write_labels(outputs.labels, prediction, segmenter.colours)
    if outputs.uncertainty is not None and uncertainty is not None:
        draw_uncertainty(outputs.uncertainty, uncertainty)
    if outputs.overlay is not None:
        write_png(outputs.overlay, overlay(picture, prediction, segmenter.colours, ignored))
    if outputs.figure is not None:
        scene = Scene(picture, truth, prediction)
        draw_scenes(outputs.figure, [scene], segmenter.classes, ignored, segmenter.colours)
    if truth is None:
        return None
    return confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(truth), len(segmenter.classes), ignored)


def _predict(
    image: Image, boxes: list[Box], segmenter: Segmenter, options: SegmentOptions, progress: Progress
) -> tuple[np.ndarray, np.ndarray | None]:
    """The classes of the pixels and, with sampling, their uncertainty."""
    predict = options.predict
    if options.sampling is not None:
        return segmenter.sampled(image, options.sampling, predict.size, predict.crf)
    if options.ensemble is None or predict.instances is None:
        return segmenter.predict(image, predict, boxes, progress), None
    instances, crf = replace(predict.instances, size=predict.size), predict.crf is not None
    return ensemble_labels(
        segmenter, image, boxes, instances, options.ensemble, crf, lambda parts: progress(parts, len(parts), "boxes")
    ), None
