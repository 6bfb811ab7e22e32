"""`fastseg segment`: the classes of a picture's pixels by a trained checkpoint, and the pictures that show them."""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from . import terminal
from .checkpoint import atomic_write, build_model, load_checkpoint, load_weights
from .data import CAMVID_CLASSES, normalise, read_image, read_mask, resize, to_tensor
from .dispatch import BACKENDS, backend
from .functional import upsample_argmax
from .instancewise import COMBINE, LEAST_SIDE, MOST_BOXES, Box, instance_scores, read_boxes, taken, windows
from .metrics import confusion_matrix, scores
from .train import parse_size
from .trainer import pick_device

if TYPE_CHECKING:
    from PIL.Image import Image

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
PROPOSAL = (224, 224)  # what a network that was trained at no size of its own sees of a proposal

EXAMPLES = """examples:
  fastseg segment street.jpg --checkpoint runs/train/checkpoint.pt
  fastseg segment val/*.png --checkpoint runs/train/checkpoint.pt --out predictions --labels
  fastseg segment val/0016E5.png --truth valannot/0016E5.png --checkpoint runs/train/checkpoint.pt --overlay
  fastseg segment dog.jpg --checkpoint deconvnet.pt --boxes dog.csv     instance-wise, from object proposals
"""


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
        whole picture is seen at once. options: those of fastseg.instancewise.instance_scores.
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


class Scene(NamedTuple):
    """One row of a drawing: picture uint8 [H, W, 3], truth (or None) and prediction integer [H, W]."""

    picture: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray


def need_matplotlib() -> None:
    """Raise an ImportError that names the extra where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "fastseg-kernels[demo]"') from error


def palette(classes: Sequence[str]) -> np.ndarray:
    """A colour for each class, uint8 [classes, 3]: CamVid's own for its classes, else colours far apart."""
    if tuple(classes) == CAMVID_CLASSES:
        return np.array(CAMVID_COLOURS, np.uint8)
    if len(classes) <= 11:
        from matplotlib import colormaps

        colours = [*colormaps["tab10"].colors, (0.17, 0.17, 0.17)][: len(classes)]
    else:  # neighbours on the colour wheel differ in brightness too
        colours = [colorsys.hsv_to_rgb(k / len(classes), 0.8, (1.0, 0.6)[k % 2]) for k in range(len(classes))]
    return np.round(np.array(colours) * 255).astype(np.uint8)


def colourise(labels: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """Labels [H, W] in their classes' colours, uint8 [H, W, 3]; pixels of `ignore_index` black."""
    ignored = labels == ignore_index
    image = colours[np.where(ignored, 0, labels)]
    image[ignored] = VOID_COLOUR
    return image


def draw_scenes(
    path: str | Path, scenes: Sequence[Scene], classes: Sequence[str], ignore_index: int, overlay: bool = False
) -> None:
    """Write a PNG to `path`: a row for each scene, picture, truth where there is one, prediction; a legend beside.

    overlay: lay the prediction over the picture, half transparent. The legend names the classes that are shown.
    """
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(classes)
    columns = (
        ["picture", "truth", "prediction"] if any(s.truth is not None for s in scenes) else ["picture", "prediction"]
    )
    height, width = scenes[0].picture.shape[:2]
    cell = 3.2
    legend = 1.8
    figure = Figure((cell * len(columns) + legend, cell * height / width * len(scenes) + 0.4), layout="constrained")
    axes = figure.subplots(len(scenes), len(columns), squeeze=False)
    shown: set[int] = set()
    for row, scene in zip(axes, scenes, strict=True):
        prediction = colourise(scene.prediction, colours, ignore_index)
        if overlay:
            prediction = scene.picture // 2 + prediction // 2
        panels = {"picture": scene.picture, "prediction": prediction}
        shown |= set(np.unique(scene.prediction).tolist())
        if scene.truth is not None:
            panels["truth"] = colourise(scene.truth, colours, ignore_index)
            shown |= set(np.unique(scene.truth).tolist())
        for axis, name in zip(row, columns, strict=True):
            axis.set_axis_off()
            if name in panels:
                axis.imshow(panels[name], interpolation="nearest" if name != "picture" else None)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name)
    entries = [Patch(facecolor=colours[k] / 255, label=name) for k, name in enumerate(classes) if k in shown]
    if ignore_index in shown:
        entries.append(Patch(facecolor=VOID_COLOUR, label="void"))
    figure.legend(handles=entries, loc="outside right center", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


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
