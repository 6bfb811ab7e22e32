"""`fastseg segment`: predict the classes of the pixels of images with a trained checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from ..crf import PRESETS, CRFOptions
from ..dispatch import BACKENDS
from ..training.data_check import no_progress
from ..training.edeconvnet import Ensemble
from ..training.instance_wise import COMBINE, ENSEMBLES, MAX_BOXES, MIN_SIDE, ORDERS, InstanceOptions
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
from ..uncertainty import MEASURES, Sampling
from . import terminal
from .options import add_device, add_json, parse_size

EXAMPLES = """examples:
  fastseg segment street.jpg --checkpoint runs/train/checkpoint.pt
  fastseg segment pictures/ 'more/**/*.png' --checkpoint runs/train/checkpoint.pt --out predictions --labels --overlay
  fastseg segment CamVid/val --truth CamVid/valannot --checkpoint runs/train/checkpoint.pt --no-figure --labels --json
  fastseg segment orthophoto.tif --checkpoint runs/train/checkpoint.pt --tile 512x512 --labels --no-figure
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv     instance-wise, from object proposals
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv --ensemble fcn.pt --crf        EDeconvNet + CRF
  fastseg segment dog.jpg --checkpoint fcn.pt --crf                     labels that follow the picture's edges
  fastseg segment dog.jpg --checkpoint bayesian.pt --passes 40 --uncertainty dog-uncertainty.png

Ctrl-C ends the command after the current image; --skip-existing goes on where it ended.
"""

CRF_MODES = ("paper", "deeplab")  # "code" is for scores that are products: its messages are sums, not means


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
    instances.add_argument(
        "--order", choices=ORDERS, help=f"which boxes come first: as given, or the largest (default: {ORDERS[0]})"
    )
    instances.add_argument(
        "--ensemble", metavar="CKPT", help="combine with an FCN that sees the whole image: EDeconvNet"
    )
    instances.add_argument(
        "--ensemble-mode", choices=ENSEMBLES,
        help="the authors' code multiplies scores and runs --crf on raw kernels; the paper averages (default: code)",
    )  # fmt: skip
    refining = parser.add_argument_group("dense CRF", "labels that follow the colours of the image")
    refining.add_argument("--crf", action="store_true", help="refine the labels by a fully connected CRF")
    refining.add_argument(
        "--crf-mode", choices=CRF_MODES, help=f"whose settings: DeconvNet's paper or DeepLab (default: {CRF_MODES[0]})"
    )
    sampling = parser.add_argument_group("uncertainty", "several passes with dropout on (Bayesian SegNet, FCN)")
    sampling.add_argument("--passes", type=int, metavar="T", help="predict by the mean of T passes")
    sampling.add_argument(
        "--uncertainty", metavar="FILE", help="draw the uncertainty: a .png file for one image, or a folder"
    )
    sampling.add_argument("--measure", choices=MEASURES, help=f"what is drawn (default: {MEASURES[0]})")
    add_device(parser)
    add("--backend", choices=list(BACKENDS), default="auto", help="fused kernels or torch's (default: auto)")
    add_json(parser)


def parse_crf(args: argparse.Namespace) -> CRFOptions | None:
    """The options of the CRF, or None without --crf."""
    if args.crf_mode is not None and not args.crf:
        raise ValueError("--crf-mode needs --crf")
    if args.crf_mode is not None and args.ensemble is not None:
        raise ValueError("--crf-mode does not work with --ensemble, whose --ensemble-mode sets the CRF too")
    return PRESETS[args.crf_mode or CRF_MODES[0]] if args.crf else None


def parse_sampling(args: argparse.Namespace) -> Sampling | None:
    """The options of sampling, or None without --passes."""
    if args.passes is None:
        if args.uncertainty is not None or args.measure is not None:
            raise ValueError("--uncertainty and --measure need --passes")
        return None
    if args.boxes is not None or args.tile is not None:
        raise ValueError("--passes does not work with --boxes and --tile")
    return Sampling(args.passes, args.measure or MEASURES[0])


def parse_ensemble(args: argparse.Namespace) -> Ensemble | None:
    """The other network, or None without --ensemble."""
    if args.ensemble is None:
        if args.ensemble_mode is not None:
            raise ValueError("--ensemble-mode needs --ensemble")
        return None
    if args.boxes is None:
        raise ValueError("--ensemble needs --boxes")
    return Ensemble(Segmenter(args.ensemble, args.device), args.ensemble_mode or ENSEMBLES[0])


def uncertainty_files(images: list[Path], out: str | None) -> list[Path | None]:
    """Where each image's uncertainty is drawn, if anywhere."""
    if out is None:
        return [None] * len(images)
    if Path(out).suffix.lower() != ".png":
        return [Path(out) / f"{image.stem}-uncertainty.png" for image in images]
    if len(images) > 1:
        raise ValueError(f"--uncertainty must be a folder for {len(images)} images, but is {out}")
    return [Path(out)]


def parse_instances(args: argparse.Namespace) -> InstanceOptions | None:
    """The options of instance-wise prediction, or None without --boxes."""
    given = {"min_side": args.least_side, "max_boxes": args.most_boxes, "combine": args.combine, "order": args.order}
    given = {name: value for name, value in given.items() if value is not None}
    if args.boxes is None:
        if given:
            raise ValueError("--least-side, --most-boxes, --order and --combine need --boxes")
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
    uncertain = uncertainty_files(paths, args.uncertainty)
    outputs = [one._replace(uncertainty=path) for one, path in zip(outputs, uncertain, strict=True)]
    written = [path.resolve() for one in outputs for path in one if path is not None]
    if len({*written, *(path.resolve() for path in paths)}) < len(written) + len(paths):
        raise ValueError("--uncertainty must not name another output or an image")
    return [ImageFiles(*one) for one in zip(paths, truths, boxes, outputs, strict=True)]


def main(args: argparse.Namespace) -> int:
    """Run `fastseg segment`. Returns 0, or after a signal what a shell would: 130 for Ctrl-C."""
    files = parse_files(args)
    predict = PredictOptions(args.size, parse_tile(args), parse_instances(args), parse_crf(args))
    options = SegmentOptions(predict, args.backend, parse_sampling(args), parse_ensemble(args))
    segmenter = Segmenter(args.checkpoint, args.device)
    options.check(segmenter)
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
    written = [
        path
        for path in (result["figure"], result["labels"], result["overlay"], result["uncertainty"])
        if path is not None
    ]
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
