"""EDeconvNet: the scores of DeconvNet's proposals and of an FCN on the whole picture, combined, and a dense CRF.

Source: Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015, and the authors'
inference code. Where the two differ, both are kept apart: the code multiplies raw scores and runs the CRF on raw
kernels, the paper averages scores and normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..crf import PRESETS
from .instance_wise import ENSEMBLES, PROPOSAL_SIZE, Box, InstanceOptions, ensemble, instance_scores
from .pictures import to_tensor
from .segmenter import Segmenter

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Ensemble:
    """The other network of EDeconvNet.

    Args:
        fcn: sees the whole picture.
        mode: ``"code"`` for max(0, FCN) times DeconvNet's scores, and ``fastseg.crf.PRESETS["code"]``; ``"paper"`` for
            their mean, and ``PRESETS["paper"]``.

    Raises:
        ValueError: `mode` is another word.
    """

    fcn: Segmenter
    mode: str = "code"

    def __post_init__(self) -> None:
        if self.mode not in ENSEMBLES:
            raise ValueError(f"mode must be one of {', '.join(ENSEMBLES)}, but is {self.mode!r}")

    def check(self, deconvnet: Segmenter) -> None:
        """Raise ValueError unless both networks have the same classes."""
        if self.fcn.classes != deconvnet.classes:
            raise ValueError(
                f"both networks of an ensemble must have the same classes, but have {', '.join(deconvnet.classes)} and "
                f"{', '.join(self.fcn.classes)}"
            )


@torch.no_grad()
def ensemble_labels(
    deconvnet: Segmenter,
    image: Image,
    boxes: Sequence[Box],
    options: InstanceOptions,
    other: Ensemble,
    crf: bool = True,
    progress: Callable[[Sequence[Sequence[Box]]], Iterable[Sequence[Box]]] = iter,
) -> np.ndarray:
    """Return the class of each pixel.

    In mode "code" a pixel in no proposal has the score 0 for every class: without the CRF it gets class 0, the
    background; with it the CRF decides, from equal probabilities.

    Args:
        deconvnet: sees the proposals; its raw scores are combined.
        image: an RGB image of H x W pixels.
        boxes, options, progress: as for :func:`~fastseg.training.instance_wise.instance_scores`.
        other: the FCN, and how both are combined.
        crf: refine the labels with the preset of the ensemble's mode.

    Shape:
        - output: uint8 [H, W].

    Raises:
        ValueError: no box is left, or the networks have other classes.
    """
    other.check(deconvnet)
    options = replace(options, size=options.size or deconvnet.size or PROPOSAL_SIZE)
    proposals = instance_scores(deconvnet.logits, to_tensor(image).to(deconvnet.device), boxes, options, progress)
    whole = other.fcn.scores(image)[0].to(proposals.device)
    scores = ensemble(whole, proposals, other.mode)
    if crf:
        return deconvnet.refined(scores[None], image, PRESETS[other.mode])
    return scores.argmax(0).to(torch.uint8).cpu().numpy()
