"""`fastseg segment`: the classes of a picture's pixels by a trained checkpoint, and the pictures that show them."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ..atomic_write import atomic_write
from ..dispatch import BACKENDS, backend
from ..training.data import read_image, read_mask
from ..training.drawing import Scene, draw_scenes
from ..training.instance_wise import COMBINE, LEAST_SIDE, MOST_BOXES, Box, read_boxes, taken, windows
from ..training.metrics import confusion_matrix, scores
from ..training.segmenter import PROPOSAL, Segmenter
from . import terminal
from .options import parse_size

if TYPE_CHECKING:
    from PIL.Image import Image


EXAMPLES = """examples:
  fastseg segment street.jpg --checkpoint runs/train/checkpoint.pt
  fastseg segment val/*.png --checkpoint runs/train/checkpoint.pt --out predictions --labels
  fastseg segment val/0016E5.png --truth valannot/0016E5.png --checkpoint runs/train/checkpoint.pt --overlay
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv     instance-wise, from object proposals
"""


def _truth(path: Path, picture: Image, segmenter: Segmenter) -> np.ndarray:
    """The true mask of `picture`, int64 [H, W]; ValueError where it is of another size."""
    mask = read_mask(path, len(segmenter.classes), segmenter.ignore_index)
    if mask.size != picture.size:
        raise ValueError(
            f"{path} must be as large as its picture, {picture.width}x{picture.height}, "
            f"but is {mask.width}x{mask.height}"
        )
    return np.asarray(mask).astype(np.int64)


def _read(
    image: Path, truth: Path | None, boxes: Path | None, segmenter: Segmenter, args: argparse.Namespace
) -> tuple[Image, np.ndarray | None, list[Box] | None]:
    """The picture, its true mask and its proposals, all checked."""
    picture = read_image(image)
    proposed = None
    if args.boxes is not None:
        least, most = args.least_side or LEAST_SIDE, args.most_boxes or MOST_BOXES
        proposed = read_boxes(boxes) if boxes else windows(picture.height, picture.width, least, most)
        try:
            proposed = taken(proposed, picture.height, picture.width, least, most)
        except ValueError as error:
            raise ValueError(f"{boxes or image}: {error}") from None
    own = PROPOSAL if proposed else (picture.height, picture.width)
    segmenter.check(*(args.size or segmenter.size or own))
    return picture, _truth(truth, picture, segmenter) if truth else None, proposed


def _outputs(images: list[Path], out: Path, labels: bool) -> list[tuple[Path, Path | None]]:
    """For each picture where its drawing goes, and its labels."""
    if out.suffix.lower() == ".png":
        if len(images) > 1:
            raise ValueError(f"--out must be a folder for {len(images)} pictures, not {out}")
        if out.resolve() == images[0].resolve():
            raise ValueError(f"--out {out} is the picture itself")
        drawings = [out]
        stems = [out.with_suffix("")]
    else:
        stems = [out / image.stem for image in images]
        if len(set(stems)) < len(stems):
            raise ValueError("two pictures have the same name, their outputs would too: give one at a time")
        drawings = [stem.with_name(f"{stem.name}-segmented.png") for stem in stems]
    named = [stem.with_name(f"{stem.name}-labels.png") if labels else None for stem in stems]
    return list(zip(drawings, named, strict=True))


def _write_labels(path: Path, labels: np.ndarray) -> None:
    from PIL import Image

    with atomic_write(path) as temporary:
        Image.fromarray(labels).save(temporary, format="PNG")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg segment`."""
    parser.epilog = EXAMPLES
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, PNG or JPEG")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="written by fastseg train or demo")
    parser.add_argument(
        "--out", default=".", help="a .png file for one picture, or a folder for IMAGE-segmented.png (default: here)"
    )
    parser.add_argument(
        "--truth", nargs="+", metavar="MASK", help="the pictures' true masks: shown, and scored against"
    )
    parser.add_argument("--overlay", action="store_true", help="lay the prediction over the picture")
    parser.add_argument("--labels", action="store_true", help="write the classes too, as an 8-bit IMAGE-labels.png")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="what the network sees (default: as in training)"
    )
    proposals = parser.add_argument_group(
        "instance-wise", "one object proposal at a time, as DeconvNet's authors predict"
    )
    proposals.add_argument(
        "--boxes", nargs="*", metavar="FILE",
        help="the pictures' proposals, a line each: left, top, width, height; without a FILE windows of several sizes",
    )  # fmt: skip
    proposals.add_argument("--least-side", type=int, metavar="N", help=f"leave out smaller boxes ({LEAST_SIDE})")
    proposals.add_argument("--most-boxes", type=int, metavar="N", help=f"take the first N ({MOST_BOXES})")
    proposals.add_argument(
        "--combine", choices=COMBINE, help=f"a pixel's probabilities in several boxes ({COMBINE[0]})"
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--backend", choices=list(BACKENDS), default="auto", help="fused kernels or torch")


def main(args: argparse.Namespace) -> int:
    """Run `fastseg segment`; 0."""
    images = [Path(name) for name in args.images]
    for option, files in (("--truth", args.truth), ("--boxes", args.boxes)):
        if files and len(files) != len(images):
            raise ValueError(f"{len(images)} pictures need as many files for {option}, not {len(files)}")
    given = [value for value in (args.least_side, args.most_boxes, args.combine) if value is not None]
    if given and args.boxes is None:
        raise ValueError("--least-side, --most-boxes and --combine need --boxes")
    if any(value < 1 for value in (args.least_side, args.most_boxes) if value is not None):
        raise ValueError("--least-side and --most-boxes must be at least 1")
    outputs = _outputs(images, Path(args.out), args.labels)
    segmenter = Segmenter(args.checkpoint, args.device)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    truths = [Path(name) for name in args.truth] if args.truth else [None] * len(images)
    boxes = [Path(name) for name in args.boxes] if args.boxes else [None] * len(images)
    for files in zip(images, truths, boxes, strict=True):  # all, before anything is written
        _read(*files, segmenter, args)
    for image, truth_path, boxes_path, (drawing, labels_path) in zip(images, truths, boxes, outputs, strict=True):
        picture, truth, proposed = _read(image, truth_path, boxes_path, segmenter, args)
        with backend(args.backend):
            if proposed is None:
                prediction = segmenter(picture, args.size)
            else:
                bar = terminal.console(stderr=True)
                watch = partial(track, description=image.name, console=bar, transient=True, disable=not bar.is_terminal)
                options = {"combine": args.combine or COMBINE[0], "least": 1, "most": len(proposed)}  # taken already
                prediction = segmenter.instance_wise(picture, proposed, args.size, watch=watch, **options)
        scene = Scene(np.asarray(picture), truth, prediction)
        draw_scenes(drawing, [scene], segmenter.classes, segmenter.ignore_index, args.overlay)
        note = ""
        if truth is not None:
            matrix = confusion_matrix(
                torch.from_numpy(prediction), torch.from_numpy(truth), len(segmenter.classes), segmenter.ignore_index
            )
            result = scores(matrix)
            note = f"  accuracy {result.global_accuracy:.3f}, mIoU {result.miou:.3f}"
        console.print(f"{image} -> {drawing}{note}")
        if labels_path:
            _write_labels(labels_path, prediction)
            console.print(f"{image} -> {labels_path}")
    return 0
