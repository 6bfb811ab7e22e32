"""A trained checkpoint applied to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..functional import upsample_argmax
from .checkpoint import build_model, load_checkpoint, load_weights
from .data import normalise, resize, to_tensor
from .device import pick_device
from .instance_wise import Box, instance_scores

if TYPE_CHECKING:
    from PIL.Image import Image


PROPOSAL = (224, 224)  # what a network that was trained at no size of its own sees of a proposal


class Segmenter:
    """A trained checkpoint that answers pictures with labels.

    Args: path of the checkpoint; device, by default cuda where there is one. Raises FileNotFoundError or ValueError.
    Attributes: `classes` (names), `ignore_index`, `model`, `size` ((height, width) it was trained at, or None).
    """

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        state = load_checkpoint(path)
        config = state["config"]
        self.classes, self.ignore_index = tuple(state["classes"]), state["ignore_index"]
        self.mean, self.std, self.size = state["mean"], state["std"], config["size"]
        self.device = pick_device(device)
        self.model: nn.Module = build_model(config["model"], len(self.classes), config["width"])
        load_weights(self.model, state, path)
        self.model.to(self.device).eval()

    def check(self, height: int, width: int) -> None:
        """ValueError where the network cannot see pictures of that size, since they are too small."""
        least = getattr(self.model, "LEAST", 1)
        if min(height, width) < least:
            raise ValueError(
                f"the network needs pictures of at least {least}x{least}, not {height}x{width}; give --size"
            )

    @torch.no_grad()
    def __call__(self, picture: Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """The class of each pixel of an RGB picture: uint8 [H, W], the picture's own size.

        The network sees it at `size`, by default the size it was trained at, and its logits are stretched back.
        """
        logits = self.logits(to_tensor(resize(picture, size or self.size)).to(self.device)[None])
        labels = upsample_argmax(logits, (picture.height, picture.width), dtype=torch.uint8)
        return labels[0].cpu().numpy()

    def instance_wise(
        self, picture: Image, boxes: Sequence[Box], size: tuple[int, int] | None = None, **options: Any
    ) -> np.ndarray:
        """The same from the class probabilities of the picture's proposals, each seen at `size`.

        That is by default the size of training, else 224x224. Pixels in no proposal have the class they have when the
        whole picture is seen at once. options: those of fastseg.training.instance_wise.instance_scores.
        """
        seen = size or self.size or PROPOSAL
        found = instance_scores(
            lambda images: self.logits(images).softmax(1), to_tensor(picture).to(self.device), boxes, seen, **options
        )
        highest, labels = found.max(0)
        answer = labels.to(torch.uint8).cpu().numpy()
        outside = (highest == 0).cpu().numpy()
        if outside.any():
            answer[outside] = self(picture, seen)[outside]
        return answer

    def logits(self, images: Tensor) -> Tensor:
        """The network's logits of images (N, 3, H, W) in 0..1."""
        return self.model(normalise(images, self.mean, self.std))
