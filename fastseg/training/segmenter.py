"""A trained checkpoint applied to images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..functional import upsample_argmax
from .checkpoint import load_checkpoint
from .data import LabelOptions, mask_format, normalise
from .data_check import Progress, no_progress
from .device import pick_device
from .drawing import palette
from .instance_wise import DEFAULT_OPTIONS, PROPOSAL_SIZE, Box, InstanceOptions, instance_scores
from .layouts import AUTO, LAYOUTS
from .masks import ColourTable
from .networks import build_model, load_weights
from .pictures import resize, to_tensor
from .tiles import DEFAULT_TILES, TileOptions, tiled_labels

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PredictOptions:
    """How the classes of an image are predicted: all at once, in tiles, or instance-wise.

    Args:
        size: (height, width) that the network sees. None: the size of training, or the image's own.
        tile: how the image is cut into tiles, or None.
        instances: the options of instance-wise prediction, or None.

    Raises:
        ValueError: two ways are chosen.
    """

    size: tuple[int, int] | None = None
    tile: TileOptions | None = None
    instances: InstanceOptions | None = None

    def __post_init__(self) -> None:
        if self.tile is not None and (self.size is not None or self.instances is not None):
            raise ValueError("tile must be left out with size or instances: tiles have the size of the picture")


DEFAULT_PREDICTION = PredictOptions()


class Segmenter:
    """Predicts the class of each pixel with the network of a checkpoint.

    Args:
        path: a checkpoint that `fastseg train` or `fastseg demo` wrote.
        device: see :func:`~fastseg.training.device.pick_device`.

    Attributes:
        classes: names of the classes.
        ignore_index: label of pixels without a class in the training data.
        colours: uint8 [K, 3], the colour of each class: that of the colour table it was trained with, if any.
        masks: how masks are read that look like those of the training data.
        model: the network, in evaluation mode.
        size: (height, width) that the network was trained at, or None if it was trained at the size of each image.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint is invalid, or the device does not exist.

    Example (not executed)::

        segmenter = Segmenter("runs/train/checkpoint.pt")
        labels = segmenter(read_image("street.jpg"))  # fastseg.training.pictures.read_image
    """

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        state = load_checkpoint(path)
        config = state["config"]
        self.classes, self.ignore_index = tuple(state["classes"]), state["ignore_index"]
        self.mean, self.std, self.size = state["mean"], state["std"], config["size"]
        self.device = pick_device(device)
        self.model: nn.Module = build_model(config["model"], len(self.classes), config["width"])
        load_weights(self.model, state, path, averaged=True)
        colours = {row[:3]: row[3] for row in state["colours"]}
        labels = LabelOptions(num_classes=len(self.classes), ignore_index=self.ignore_index, exif=config["exif"])
        table = ColourTable(self.classes, colours) if colours else None
        # Digit scenes, and checkpoints of earlier versions, have masks with the numbers of their classes.
        layout = LAYOUTS["camvid" if config["layout"] == AUTO else config["layout"]]
        own = [next((c for c, k in colours.items() if k == label), None) for label in range(len(self.classes))]
        self.colours = np.array(own, np.uint8) if colours and None not in own else palette(self.classes)
        self.masks = replace(mask_format(layout, labels, table), classes=self.classes)
        self.model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, image: Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the class of each pixel.

        Args:
            image: an RGB image of H x W pixels.
            size: (height, width) that the image is resized to for the network; its logits are resized back. Default:
                the size of training, or the image's own.

        Shape:
            - output: uint8 [H, W].
        """
        logits = self.logits(to_tensor(resize(image, size or self.size)).to(self.device)[None])
        labels = upsample_argmax(logits, (image.height, image.width), dtype=torch.uint8)
        return labels[0].cpu().numpy()

    def instance_wise(
        self,
        image: Image,
        boxes: Sequence[Box],
        options: InstanceOptions = DEFAULT_OPTIONS,
        progress: Callable[[Sequence[Sequence[Box]]], Iterable[Sequence[Box]]] = iter,
    ) -> np.ndarray:
        """Return the class of each pixel from the class probabilities of object proposals.

        A pixel in no proposal gets the class that it has when the network sees the whole image.

        Args:
            image: an RGB image of H x W pixels.
            boxes, options, progress: as for :func:`~fastseg.training.instance_wise.instance_scores`.

        Shape:
            - output: uint8 [H, W].

        Raises:
            ValueError: no box is left.
        """
        options = replace(options, size=options.size or self.size or PROPOSAL_SIZE)
        scores = instance_scores(
            lambda images: self.logits(images).softmax(1), to_tensor(image).to(self.device), boxes, options, progress
        )
        highest, labels = scores.max(0)
        result = labels.to(torch.uint8).cpu().numpy()
        in_no_box = (highest == 0).cpu().numpy()
        if in_no_box.any():
            result[in_no_box] = self(image, options.size)[in_no_box]
        return result

    def tiled(self, image: Image, options: TileOptions = DEFAULT_TILES, progress: Progress = no_progress) -> np.ndarray:
        """Return the class of each pixel from overlapping tiles of the image, in its own size.

        Args:
            image: an RGB image of H x W pixels.
            options, progress: as for :func:`~fastseg.training.tiles.tiled_labels`.

        Shape:
            - output: uint8 [H, W].
        """
        return tiled_labels(self.logits, np.asarray(image), options, self.device, progress)

    def predict(
        self, image: Image, options: PredictOptions, boxes: Sequence[Box] = (), progress: Progress = no_progress
    ) -> np.ndarray:
        """Return the class of each pixel in the way that `options` say.

        Args:
            image: an RGB image of H x W pixels.
            options: see :class:`PredictOptions`.
            boxes: the proposals of instance-wise prediction.
            progress: shows how far it is.

        Shape:
            - output: uint8 [H, W].

        Raises:
            ValueError: no box is left.
        """
        if options.tile is not None:
            return self.tiled(image, options.tile, progress)
        if options.instances is None:
            return self(image, options.size)
        instances = replace(options.instances, size=options.size)
        return self.instance_wise(image, boxes, instances, lambda parts: progress(parts, len(parts), "boxes"))

    def logits(self, images: Tensor) -> Tensor:
        """Normalise images from 0 to 1 and apply the network.

        Shape:
            - images: (N, 3, H, W).
            - output: (N, K, H, W) for K classes.
        """
        return self.model(normalise(images, self.mean, self.std))
