"""`fastseg segment`: predict the classes of the pixels of images with a trained checkpoint."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.progress import track

from ..crf import PRESETS, CRFOptions
from ..dispatch import BACKENDS
from ..training.edeconvnet import Ensemble
from ..training.instance_wise import COMBINE, ENSEMBLES, MAX_BOXES, MIN_SIDE, ORDERS, InstanceOptions
from ..training.segment_files import ImageFiles, SegmentOptions, output_files, read_inputs, segment_file
from ..training.segmenter import Segmenter
from ..uncertainty import MEASURES, Sampling
from . import terminal
from .options import add_device, parse_size

EXAMPLES = """examples:
  fastseg segment street.jpg --checkpoint runs/train/checkpoint.pt
  fastseg segment val/*.png --checkpoint runs/train/checkpoint.pt --out predictions --labels
  fastseg segment val/0016E5.png --truth valannot/0016E5.png --checkpoint runs/train/checkpoint.pt --overlay
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv     instance-wise, from object proposals
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv --ensemble fcn.pt --crf        EDeconvNet + CRF
  fastseg segment dog.jpg --checkpoint fcn.pt --crf                     labels that follow the picture's edges
  fastseg segment dog.jpg --checkpoint bayesian.pt --passes 40 --uncertainty dog-uncertainty.png
"""

CRF_MODES = ("paper", "deeplab")  # "code" is for scores that are products: its messages are sums, not means


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg segment`."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="images, PNG or JPEG")
    add("--checkpoint", required=True, metavar="CKPT", help="written by fastseg train or fastseg demo")
    add("--out", default=".", help="a .png file for one image, or a folder for IMAGE-segmented.png (default: here)")
    add("--truth", nargs="+", metavar="MASK", help="the images' ground-truth masks, to draw and to score against")
    add("--overlay", action="store_true", help="draw the prediction over the image")
    add("--labels", action="store_true", help="also write the classes, as an 8-bit IMAGE-labels.png")
    add("--size", type=parse_size, metavar="HxW", help="what the network sees (default: the size of training)")
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
    if args.boxes is not None:
        raise ValueError("--passes does not work with --boxes")
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


def parse_files(args: argparse.Namespace) -> list[ImageFiles]:
    """The input and output files of each image."""
    images = [Path(name) for name in args.images]
    for option, files in (("--truth", args.truth), ("--boxes", args.boxes)):
        if files and len(files) != len(images):
            raise ValueError(f"{len(images)} images need as many files for {option}, but got {len(files)}")
    truths, boxes = (
        [Path(name) for name in files] if files else [None] * len(images) for files in (args.truth, args.boxes)
    )
    outputs = output_files(images, Path(args.out), args.labels)
    inputs = zip(images, truths, boxes, strict=True)
    rows = zip(inputs, outputs, uncertainty_files(images, args.uncertainty), strict=True)
    files = [ImageFiles(*one, *output, uncertainty) for one, output, uncertainty in rows]
    written = [path.resolve() for one in files for path in (one.drawing, one.labels, one.uncertainty) if path]
    if len({*written, *(image.resolve() for image in images)}) < len(written) + len(images):
        raise ValueError("--uncertainty must not name another output or an image")
    return files


def main(args: argparse.Namespace) -> int:
    """Run `fastseg segment`. Returns 0."""
    files = parse_files(args)
    options = SegmentOptions(
        args.size, parse_instances(args), args.overlay, args.backend, parse_crf(args), parse_sampling(args),
        parse_ensemble(args),
    )  # fmt: skip
    segmenter = Segmenter(args.checkpoint, args.device)
    for one in files:  # check all inputs before any output is written
        read_inputs(one, segmenter, options)
    console, progress = terminal.text_console(), terminal.console(stderr=True)
    for one in files:
        bar = partial(
            track, description=one.image.name, console=progress, transient=True, disable=not progress.is_terminal
        )
        scores = segment_file(one, segmenter, options, bar)
        note = "" if scores is None else f"  accuracy {scores.global_accuracy:.3f}, mIoU {scores.miou:.3f}"
        console.print(f"{one.image} -> {one.drawing}{note}")
        for more in filter(None, (one.labels, one.uncertainty)):
            console.print(f"{one.image} -> {more}")
    return 0
