"""A trained checkpoint applied to images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..crf import CRFOptions, dense_crf
from ..functional import upsample_argmax
from ..uncertainty import Sampling, measure, sample
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
        crf: refine the labels by a fully connected CRF; not in tiles.

    Raises:
        ValueError: two ways are chosen.
    """

    size: tuple[int, int] | None = None
    tile: TileOptions | None = None
    instances: InstanceOptions | None = None
    crf: CRFOptions | None = None

    def __post_init__(self) -> None:
        if self.tile is not None and (self.size is not None or self.instances is not None):
            raise ValueError("tile must be left out with size or instances: tiles have the size of the picture")
        if self.tile is not None and self.crf is not None:
            raise ValueError("tile must be left out with a CRF, which sees the whole picture")


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
    def __call__(self, image: Image, size: tuple[int, int] | None = None, crf: CRFOptions | None = None) -> np.ndarray:
        """Return the class of each pixel.

        Args:
            image: an RGB image of H x W pixels.
            size: (height, width) that the image is resized to for the network; its logits are resized back. Default:
                the size of training, or the image's own.
            crf: refine the labels by a fully connected CRF at the image's size, see :func:`fastseg.crf.dense_crf`.

        Shape:
            - output: uint8 [H, W].
        """
        if crf is not None:
            return self.refined(self.scores(image, size), image, crf)
        logits = self.logits(to_tensor(resize(image, size or self.size)).to(self.device)[None])
        labels = upsample_argmax(logits, (image.height, image.width), dtype=torch.uint8)
        return labels[0].cpu().numpy()

    def sampled(
        self, image: Image, sampling: Sampling, size: tuple[int, int] | None = None, crf: CRFOptions | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the class of each pixel by the mean of several passes with dropout, and its uncertainty.

        Args:
            image, size, crf: as for a call. The CRF refines the mean, whose logarithm takes the place of logits.
            sampling: how many passes, and what is measured. Both are resized to the image after all passes.

        Shape:
            - output: uint8 [H, W], float32 [H, W].

        Raises:
            ValueError: the network has no dropout layer.
        """
        x = to_tensor(resize(image, size or self.size)).to(self.device)[None]
        samples = sample(self.model, normalise(x, self.mean, self.std), sampling.passes, sampling.chunk, sampling.seed)
        mean = _enlarged(samples.mean, image)
        uncertainty = _enlarged(measure(samples, sampling.measure)[:, None], image)[0, 0].cpu().numpy()
        if crf is not None:
            return self.refined(mean.clamp(min=1e-5).log(), image, crf), uncertainty
        return mean[0].argmax(0).to(torch.uint8).cpu().numpy(), uncertainty

    def instance_wise(
        self,
        image: Image,
        boxes: Sequence[Box],
        options: InstanceOptions = DEFAULT_OPTIONS,
        progress: Callable[[Sequence[Sequence[Box]]], Iterable[Sequence[Box]]] = iter,
        crf: CRFOptions | None = None,
    ) -> np.ndarray:
        """Return the class of each pixel from the class probabilities of object proposals.

        A pixel in no proposal gets the class that it has when the network sees the whole image.

        Args:
            image: an RGB image of H x W pixels.
            boxes, options, progress: as for :func:`~fastseg.training.instance_wise.instance_scores`.
            crf: refine the labels by a fully connected CRF. The logarithm of the combined probabilities, not below
                1e-5, takes the place of logits.

        Shape:
            - output: uint8 [H, W].

        Raises:
            ValueError: no box is left.
        """
        options = replace(options, size=options.size or self.size or PROPOSAL_SIZE)
        scores = instance_scores(
            lambda images: self.logits(images).softmax(1), to_tensor(image).to(self.device), boxes, options, progress
        )
        if crf is not None:
            return self.refined(self._filled(scores, image, options.size).clamp(min=1e-5).log(), image, crf)
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
            return self(image, options.size, options.crf)
        instances = replace(options.instances, size=options.size)
        return self.instance_wise(
            image, boxes, instances, lambda parts: progress(parts, len(parts), "boxes"), options.crf
        )

    def _filled(self, scores: Tensor, image: Image, size: tuple[int, int] | None) -> Tensor:
        """Probabilities (1, K, H, W) of proposals; where a pixel is in none, those of the whole image."""
        in_no_box = scores.amax(0) == 0
        if not in_no_box.any():
            return scores[None]
        return torch.where(in_no_box, self.scores(image, size).softmax(1), scores)

    def scores(self, image: Image, size: tuple[int, int] | None = None) -> Tensor:
        """The logits at the size of the image, (1, K, H, W).

        Args:
            image, size: as for a call.
        """
        return _enlarged(self.logits(to_tensor(resize(image, size or self.size)).to(self.device)[None]), image)

    def refined(self, logits: Tensor, image: Image, crf: CRFOptions) -> np.ndarray:
        """The labels of logits at the size of the image after mean field.

        Shape:
            - logits: (1, K, H, W).
            - output: uint8 [H, W].
        """
        picture = torch.from_numpy(np.array(image)).movedim(-1, 0)[None].to(self.device)
        return dense_crf(logits, picture, crf)[0].argmax(0).to(torch.uint8).cpu().numpy()

    def logits(self, images: Tensor) -> Tensor:
        """Normalise images from 0 to 1 and apply the network.

        Shape:
            - images: (N, 3, H, W).
            - output: (N, K, H, W) for K classes.
        """
        return self.model(normalise(images, self.mean, self.std))


def _enlarged(logits: Tensor, image: Image) -> Tensor:
    """Logits at the size of the image."""
    return F.interpolate(logits.float(), (image.height, image.width), mode="bilinear")
