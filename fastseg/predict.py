"""`fastseg segment`: the classes of a picture's pixels by a trained checkpoint, and the pictures that show them."""

from __future__ import annotations

import argparse
import colorsys
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from .checkpoint import atomic_write, build_model, load_checkpoint, load_weights
from .data import CAMVID_CLASSES, normalise, read_image, read_mask, resize, to_tensor
from .dispatch import BACKENDS, backend
from .metrics import confusion_matrix, scores
from .train import parse_size

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

EXAMPLES = """examples:
  fastseg segment street.jpg --checkpoint runs/train/checkpoint.pt
  fastseg segment val/*.png --checkpoint runs/train/checkpoint.pt --out predictions --labels
  fastseg segment val/0016E5.png --truth valannot/0016E5.png --checkpoint runs/train/checkpoint.pt --overlay
"""


def palette(classes: Sequence[str]) -> np.ndarray:
    """A colour for each class, uint8 [classes, 3]: CamVid's own for its classes, else hues far apart."""
    if tuple(classes) == CAMVID_CLASSES:
        return np.array(CAMVID_COLOURS, np.uint8)
    # Two rings of brightness halve the number of hues that the eye must tell apart; the last class is grey.
    colours = [colorsys.hsv_to_hsv(0, 0, 0)]
    return np.array(colours, np.uint8)
