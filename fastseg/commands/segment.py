"""`fastseg segment`: predict the classes of the pixels of images with a trained checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dispatch import BACKENDS
from ..training.data_check import no_progress
from ..training.instance_wise import COMBINE, MAX_BOXES, MIN_SIDE, InstanceOptions
from ..training.interrupt import GracefulInterrupt
from ..training.metrics import scores
from ..training.segment_files import (
    ImageFiles,
    Outputs,
    SegmentOptions,
    file_for_each,
    find_images,
    find_truths,
    output_files,
    read_inputs,
    segment_file,
)
from ..training.segmenter import PredictOptions, Segmenter
from ..training.tiles import DEFAULT_SIZE, TileOptions
from . import terminal
from .options import add_device, add_json, parse_size

EXAMPLES = """examples:
  fastseg segment street.jpg --checkpoint runs/train/checkpoint.pt
  fastseg segment pictures/ 'more/**/*.png' --checkpoint runs/train/checkpoint.pt --out predictions --labels --overlay
  fastseg segment CamVid/val --truth CamVid/valannot --checkpoint runs/train/checkpoint.pt --no-figure --labels --json
  fastseg segment orthophoto.tif --checkpoint runs/train/checkpoint.pt --tile 512x512 --labels --no-figure
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv     instance-wise, from object proposals

Ctrl-C ends the command after the current image; --skip-existing goes on where it ended.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg segment`."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="images, folders with images, or patterns")
    add("--checkpoint", required=True, metavar="CKPT", help="written by fastseg train or fastseg demo")
    add("--out", default=".", help="a .png file for one image, or a folder for IMAGE-segmented.png (default: here)")
    add("--truth", nargs="+", metavar="MASK", help="the images' ground-truth masks, or their folder, to score against")
    add(
        "--labels",
        action="store_true",
        help="write the classes: IMAGE-labels.png with a palette, whose values they are",
    )
    add("--overlay", action="store_true", help="write IMAGE-overlay.png: the classes over the image, in its own size")
    add("--no-figure", action="store_true", help="do not write IMAGE-segmented.png, a figure with a legend")
    add("--skip-existing", action="store_true", help="leave out images whose outputs all exist")
    add("--size", type=parse_size, metavar="HxW", help="what the network sees (default: the size of training)")
    add("--tile", type=parse_size, nargs="?", const=DEFAULT_SIZE, metavar="HxW",
        help="predict overlapping tiles of the image in its own size, for large images "
        f"(default size: {DEFAULT_SIZE[0]}x{DEFAULT_SIZE[1]})")  # fmt: skip
    add("--tile-overlap", type=float, metavar="X", help="part of a tile that its neighbour shares (default: 0.25)")
    instances = parser.add_argument_group(
        "instance-wise", "one object proposal at a time, the way DeconvNet's authors predict"
    )
    instances.add_argument(
        "--boxes", nargs="*", metavar="FILE",
        help="the images' proposals, a line each: left, top, width, height; without a FILE, windows of several sizes",
    )  # fmt: skip
    instances.add_argument("--least-side", type=int, metavar="N", help=f"ignore smaller boxes (default: {MIN_SIDE})")
    instances.add_argument("--most-boxes", type=int, metavar="N", help=f"use the first N (default: {MAX_BOXES})")
    instances.add_argument(
        "--combine",
        choices=COMBINE,
        help=f"how a pixel's probabilities in several boxes are combined (default: {COMBINE[0]})",
    )
    add_device(parser)
    add("--backend", choices=list(BACKENDS), default="auto", help="fused kernels or torch's (default: auto)")
    add_json(parser)


def parse_instances(args: argparse.Namespace) -> InstanceOptions | None:
    """The options of instance-wise prediction, or None without --boxes."""
    given = {"min_side": args.least_side, "max_boxes": args.most_boxes, "combine": args.combine}
    given = {name: value for name, value in given.items() if value is not None}
    if args.boxes is None:
        if given:
            raise ValueError("--least-side, --most-boxes and --combine need --boxes")
        return None
    if any(value < 1 for value in (args.least_side, args.most_boxes) if value is not None):
        raise ValueError("--least-side and --most-boxes must be at least 1")
    return InstanceOptions(**given)


def parse_tile(args: argparse.Namespace) -> TileOptions | None:
    """The options of tiles, or None without --tile."""
    if args.tile is None:
        if args.tile_overlap is not None:
            raise ValueError("--tile-overlap needs --tile")
        return None
    return TileOptions(args.tile) if args.tile_overlap is None else TileOptions(args.tile, args.tile_overlap)


def parse_files(args: argparse.Namespace) -> list[ImageFiles]:
    """The input and output files of each image."""
    wanted = [name for name in Outputs._fields if (not args.no_figure if name == "figure" else getattr(args, name))]
    if not (wanted or args.truth):
        raise ValueError("--no-figure needs --labels, --overlay or --truth: there would be no result")
    if args.skip_existing and not wanted:
        raise ValueError("--skip-existing needs an output to look for: --labels, --overlay or the figure")
    images = find_images(args.images)
    truths, boxes = find_truths(images, args.truth), file_for_each("--boxes", args.boxes, len(images))
    outputs = output_files(images, Path(args.out), wanted)
    paths = [image for image, _ in images]
    return [ImageFiles(*one) for one in zip(paths, truths, boxes, outputs, strict=True)]


def main(args: argparse.Namespace) -> int:
    """Run `fastseg segment`. Returns 0, or after a signal what a shell would: 130 for Ctrl-C."""
    files = parse_files(args)
    options = SegmentOptions(PredictOptions(args.size, parse_tile(args), parse_instances(args)), args.backend)
    segmenter = Segmenter(args.checkpoint, args.device)
    if args.skip_existing:
        files = [one for one in files if not all(path.exists() for path in one.outputs if path is not None)]
    for one in terminal.bar(files, len(files), "checking"):  # all inputs, before any output is written
        read_inputs(one, segmenter, options.predict)
    console = terminal.text_console(stderr=args.json)
    results: list[dict[str, Any]] = []
    total: Tensor | None = None
    with GracefulInterrupt("image") as stop:
        for one in terminal.bar(files, len(files), "segmenting") if len(files) > 1 else files:
            if stop():
                break
            bar = no_progress if len(files) > 1 else terminal.bar
            matrix = segment_file(one, segmenter, options, bar)
            if matrix is not None:
                total = matrix if total is None else total + matrix
            results.append(describe(one, matrix, segmenter.classes))
            print_result(console, results[-1])
    if total is not None and len(results) > 1:
        print_scores(console, f"all {len(results)} images", scores(total).as_dict(segmenter.classes))
    if stop():
        console.print(
            f"stopped after {len(results)} of {len(files)} images; to continue: the same with --skip-existing"
        )
    if args.json:
        whole = None if total is None else scores(total).as_dict(segmenter.classes)
        terminal.print_json({"images": results, "scores": whole, "interrupted": stop()})
    return stop.exit_code if stop() else 0


def describe(files: ImageFiles, matrix: Tensor | None, classes: tuple[str, ...]) -> dict[str, Any]:
    """The files of an image and its scores, in a form that JSON can represent."""
    written = {name: None if path is None else str(path) for name, path in files.outputs._asdict().items()}
    found = None if matrix is None else scores(matrix).as_dict(classes)
    return {"image": str(files.image), **written, "scores": found}


def print_result(console: Any, result: dict[str, Any]) -> None:
    """Print the files of an image and its scores."""
    written = [path for path in (result["figure"], result["labels"], result["overlay"]) if path is not None]
    for place, path in enumerate(written):
        if place or result["scores"] is None:
            console.print(f"{result['image']} -> {path}")
        else:
            print_scores(console, f"{result['image']} -> {path}", result["scores"])
    if not written:
        print_scores(console, result["image"], result["scores"])


def print_scores(console: Any, what: str, found: dict[str, Any]) -> None:
    """Print accuracy and mIoU of an image or of all."""
    accuracy, miou = ("-" if found[name] is None else f"{found[name]:.3f}" for name in ("global_accuracy", "miou"))
    console.print(f"{what}  accuracy {accuracy}, mIoU {miou}")
