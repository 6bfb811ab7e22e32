"""Segmentation of image files: read, predict, draw, score. All inputs can be checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..crf import CRFOptions
from ..dispatch import backend
from ..functional import confusion_matrix
from ..uncertainty import Sampling, dropout_layers
from .data import check_same_size, read_image, read_mask
from .drawing import Scene, draw_scenes, draw_uncertainty, write_png
from .edeconvnet import Ensemble, ensemble_labels
from .instance_wise import PROPOSAL_SIZE, Box, InstanceOptions, read_boxes, select_boxes, sliding_windows
from .metrics import Scores, scores
from .networks import check_image_size
from .segmenter import Segmenter

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageFiles(NamedTuple):
    """The files of one image: the inputs, and where the results are written."""

    image: Path
    truth: Path | None
    """Its ground-truth mask."""
    boxes: Path | None
    """Its proposals. Without a file, instance-wise prediction uses sliding windows."""
    drawing: Path
    labels: Path | None
    uncertainty: Path | None = None
    """Where the uncertainty is drawn; only with `SegmentOptions.sampling`."""


@dataclass(frozen=True)
class SegmentOptions:
    """How images are segmented and drawn.

    Args:
        size: (height, width) that the network sees. Default: the size of training, or the image's own.
        instances: the options of instance-wise prediction, or None to predict the whole image at once.
        overlay: draw the prediction over the image.
        backend: fastseg's backend, see :func:`fastseg.set_backend`.
        crf: refine the labels by a fully connected CRF.
        ensemble: combine the proposals' scores with another network's; needs `instances`. Its mode says how, and sets
            the CRF's options.
        sampling: predict by several passes with dropout on, and draw the uncertainty. Not with `instances`.
    """

    size: tuple[int, int] | None = None
    instances: InstanceOptions | None = None
    overlay: bool = False
    backend: str = "auto"
    crf: CRFOptions | None = None
    sampling: Sampling | None = None
    ensemble: Ensemble | None = None


class Inputs(NamedTuple):
    """The content of the input files. `boxes` is None if the whole image is predicted at once."""

    image: Image
    truth: np.ndarray | None
    boxes: list[Box] | None


def output_files(images: Sequence[Path], out: Path, labels: bool) -> list[tuple[Path, Path | None]]:
    """Return the file of the drawing and of the labels for each image.

    Args:
        images: the images.
        out: a .png file for the drawing of a single image, or a folder for ``<stem>-segmented.png``.
        labels: whether labels are written, to ``<stem>-labels.png``.

    Raises:
        ValueError: two images would get the same file, or `out` is the image.

    Example::

        >>> from pathlib import Path
        >>> from fastseg.training.segment_files import output_files
        >>> [(drawing, labels)] = output_files([Path("street.jpg")], Path("out"), labels=True)
        >>> print(drawing.as_posix(), labels.as_posix())
        out/street-segmented.png out/street-labels.png
    """
    if out.suffix.lower() == ".png":
        if len(images) > 1:
            raise ValueError(f"out must be a folder for {len(images)} images, but is {out}")
        if out.resolve() == images[0].resolve():
            raise ValueError(f"out must not be the image itself, but is {out}")
        drawings = [out]
        stems = [out.with_suffix("")]
    else:
        stems = [out / image.stem for image in images]
        if len(set(stems)) < len(stems):
            raise ValueError("two images have the same name, so their outputs would too: segment them one at a time")
        drawings = [stem.with_name(f"{stem.name}-segmented.png") for stem in stems]
    label_files = [stem.with_name(f"{stem.name}-labels.png") if labels else None for stem in stems]
    return list(zip(drawings, label_files, strict=True))


def read_inputs(files: ImageFiles, segmenter: Segmenter, options: SegmentOptions) -> Inputs:
    """Read and check the image, its ground truth and its proposals.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is invalid or does not fit the image, the image is too small for the network, or passes with
            dropout are requested of a network without it.
    """
    if options.sampling is not None:
        dropout_layers(segmenter.model)
    if options.ensemble is not None:
        options.ensemble.check(segmenter)
    image = read_image(files.image)
    boxes = None if options.instances is None else _read_boxes(files, image, options.instances)
    own_size = (image.height, image.width) if boxes is None else PROPOSAL_SIZE
    check_image_size(segmenter.model, *(options.size or segmenter.size or own_size))
    truth = None
    if files.truth is not None:
        mask = read_mask(files.truth, len(segmenter.classes), segmenter.ignore_index)
        check_same_size(mask, files.truth, image)
        truth = np.asarray(mask).astype(np.int64)
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
    files: ImageFiles,
    segmenter: Segmenter,
    options: SegmentOptions,
    progress: Callable[[Sequence[Sequence[Box]]], Iterable[Sequence[Box]]] = iter,
) -> Scores | None:
    """Segment one image and write the drawing and, if `files` has a path for them, the labels.

    Args:
        files: the files.
        segmenter: the network.
        options: see :class:`SegmentOptions`.
        progress: wraps the list of batches of instance-wise prediction, for example in a progress bar.

    Returns:
        Scores or None: the scores of the prediction; None without ground truth.

    Raises:
        OSError, ValueError: as :func:`read_inputs`.
        ImportError: Pillow or matplotlib is not installed.
    """
    image, truth, boxes = read_inputs(files, segmenter, options)
    with backend(options.backend):
        if options.sampling is not None:
            prediction, uncertainty = segmenter.sampled(image, options.sampling, options.size, options.crf)
        elif boxes is None:
            prediction = segmenter(image, options.size, options.crf)
        else:
            instances = replace(options.instances, size=options.size)
            if options.ensemble is None:
                prediction = segmenter.instance_wise(image, boxes, instances, progress, options.crf)
            else:
                crf = options.crf is not None
                prediction = ensemble_labels(segmenter, image, boxes, instances, options.ensemble, crf, progress)
    scene = Scene(np.asarray(image), truth, prediction)
    draw_scenes(files.drawing, [scene], segmenter.classes, segmenter.ignore_index, options.overlay)
    if files.uncertainty is not None:
        draw_uncertainty(files.uncertainty, uncertainty)
    if files.labels is not None:
        write_png(files.labels, prediction)
    if truth is None:
        return None
    labels = (torch.from_numpy(prediction), torch.from_numpy(truth))
    return scores(confusion_matrix(*labels, len(segmenter.classes), segmenter.ignore_index))
