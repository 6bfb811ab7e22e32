"""Bytes of each operator: its kernels' sectors beside the floor and beside what torch eager moves."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..atomic_write import atomic_write
from ..kernels import launch
from ..ops.operator import Operator, observing
from ..torch_internals import tree_map_only
from ..verification import cases
from ..verification.cases import Case, ConvTransposeSpec, LossSpec, Placement, PoolSpec, ResizeSpec
from .eager import ByteCounter
from .inductor import compiled
from .traffic import KernelTraffic, metering

# Small enough for the interpreter; per-element figures are those of a large size, as tests show with two sizes. The
# second size of each is a multiple of no block.
IMAGES = ((2, 64, 32, 64), (1, 24, 38, 54))
OVERLAPPED = ((1, 32, 8, 32), (1, 24, 9, 13))
RESNET_STEM = PoolSpec(kernel=3, stride=2, padding=1)  # a ResNet's first pooling, whose windows overlap
NORMED = ((2, 16, 32, 64), (1, 24, 38, 54))
LOGITS = (11, 19, 21, 150)
COMPILED = ("compiled least", "compiled sectors")


def sized_cases(at: Placement) -> Iterator[Case]:
    """Every operator, at a size that its blocks divide and at an odd size."""
    for shape in IMAGES:
        yield from cases.max_pool2d(at, shape)
        yield from cases.max_unpool2d(at, shape)
    for shape in NORMED:
        yield from cases.batch_norm_relu(at, shape)
    for shape in OVERLAPPED:
        yield from cases.max_pool2d(at, shape, RESNET_STEM)
        yield from cases.max_unpool2d(at, shape, RESNET_STEM)
    for classes in LOGITS:
        yield from cases.cross_entropy(at, (1, classes, 32, 64))
    yield from cases.cross_entropy(at, (1, 19, 23, 37))
    for size in ((32, 64), (23, 37)):
        yield from cases.cross_entropy(at, (1, 19, *size), LossSpec(one_pass=False))
    yield from cases.dice_cross_entropy(at, (1, 4, 64, 128))
    yield from cases.upsample_cross_entropy(at, (1, 11, 4, 8), ResizeSpec((32, 64)))
    yield from cases.upsample_cross_entropy(at, (1, 11, 7, 9), ResizeSpec((23, 37), align_corners=True))
    yield from cases.upsample_argmax(at, (1, 11, 8, 16), (32, 64))
    yield from cases.conv_transpose2d(at, (1, 64, 32, 32), ConvTransposeSpec(32, kernel=2, stride=2))
    affine = ConvTransposeSpec(32, kernel=4, stride=2, padding=1)
    yield from cases.conv_transpose2d_affine_relu(at, (1, 32, 17, 23), affine)


@dataclass(frozen=True)
class OperatorTraffic:
    """Bytes of one operator in one call: its kernels', torch's around them, the floor."""

    operator: str
    backward: bool
    kernels: list[KernelTraffic]
    around: int
    floor: int

    @property
    def moved(self) -> int:
        return sum(kernel.sectors() for kernel in self.kernels) + self.around

    @property
    def requested(self) -> int:
        return sum(sum(kernel.requested.values()) for kernel in self.kernels)

    @property
    def ratio(self) -> float:
        return self.moved / self.floor


def operator_traffic(case: Case) -> list[OperatorTraffic]:
    """Forward and backward of a case on CPU tensors, kernels interpreted: one entry an operator, in order."""
    found: list[OperatorTraffic] = []

    def note(operator: Operator, args: tuple[Any, ...]) -> None:
        done = sum(len(traffic.kernels) for traffic in found)
        around, floor = _around(operator, args), operator.floor(*args)
        found.append(OperatorTraffic(operator.name, operator.gradient, launches[done:], around, floor))

    with dispatch.backend("triton"):
        with launch.recording(lambda *call: None):  # a call of it gives the gradients' shapes: no kernel need run
            step = case.step(case.ours, backward=True)
        with metering() as launches, observing(note):
            step()
    return found


def by_mode(traffic: list[OperatorTraffic]) -> dict[str, OperatorTraffic]:
    """Forward and backward, each as one: a case may take several operators for it."""
    modes = {}
    for mode, backward in (("forward", False), ("backward", True)):
        own = [t for t in traffic if t.backward == backward]
        if not own:
            continue
        kernels = [kernel for t in own for kernel in t.kernels]
        name = " + ".join(t.operator for t in own)
        modes[mode] = OperatorTraffic(name, backward, kernels, sum(t.around for t in own), sum(t.floor for t in own))
    return modes


def _around(operator: Operator, args: tuple[Any, ...]) -> int:
    """Bytes of the torch operators that an operator runs besides its kernels: copies to a dense layout, zero-fills."""
    bare = tree_map_only(Tensor, lambda x: x.to("meta"), args)
    with launch.recording(lambda *call: None), torch.no_grad(), ByteCounter() as counter:
        operator.implementations["triton"](*bare)
    return counter.sectors.total()


def eager_bytes(case: Case) -> dict[str, tuple[int, int]]:
    """What torch eager moves on a GPU for a case on the meta device: (least, in sectors) forward and backward."""
    forward, both = (_eager_bytes(case, backward) for backward in (False, True))
    return {"forward": forward, "backward": (both[0] - forward[0], both[1] - forward[1])}


def _eager_bytes(case: Case, backward: bool) -> tuple[int, int]:
    step = case.step(case.eager or case.theirs, backward)
    with ByteCounter() as counter:
        step()
    return counter.least.total(), counter.sectors.total()


def compiled_bytes(case: Case, backward: bool) -> dict[str, tuple[int, int]]:
    """What torch.compile's kernels move on a GPU for what `eager_bytes` counts, of a case on CPU tensors."""
    torch.compiler.reset()  # else the cases before count against its limit of recompilations
    function, graphs = compiled(case.eager or case.theirs)
    case.step(function, backward)()
    return {"backward" if graph.backward else "forward": graph.moved for graph in graphs}


def _compiled_columns(case: Case, modes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Columns of each mode. Inductor's internals change with torch: where they fail it is not counted, and shown so."""
    try:
        found = compiled_bytes(case, "backward" in modes)
        return {mode: dict(zip(COMPILED, found[mode], strict=True)) for mode in modes}
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return {mode: dict.fromkeys(COMPILED) | {"not counted": words} for mode in modes}


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each operator of each case: bytes as counted, as the floor has them, as eager moves them."""
    found = []
    dtype = cases.DTYPES[args.dtype]
    for layout in [args.layout] if args.layout else cases.LAYOUTS:
        places = (Placement(dtype, cases.LAYOUTS[layout], device) for device in ("cpu", "meta"))
        for case, bare in zip(*map(sized_cases, places), strict=True):
            if args.op and not case.operator.startswith(tuple(args.op)):
                continue
            eager = eager_bytes(bare)
            modes = by_mode(operator_traffic(case))
            others = _compiled_columns(case, modes) if args.compile else {mode: {} for mode in modes}
            for mode, traffic in modes.items():
                least, sectors = eager[mode]
                found.append({
                    "operator": case.operator, "mode": mode, "layout": layout, "size": case.size,
                    "kernels": [kernel.kernel for kernel in traffic.kernels],
                    "requested": traffic.requested, "moved": traffic.moved, "floor": traffic.floor,
                    "ratio": traffic.ratio, "eager least": least, "eager sectors": sectors,
                    **others[mode],
                    "model us": traffic.moved / args.bandwidth / 1e6,
                })  # fmt: skip
    return found


NOTE = (
    "Bytes. moved: distinct 32-byte sectors of all kernels, and what torch's operators around them move. floor: each "
    "argument read once, each result written once. eager: torch's own operators on a GPU, under autocast, from their "
    "nominal bytes to whole sectors. model: what the moved bytes take at the given bandwidth; not a measurement. "
    "compiled (--compile): the Triton kernels that torch.compile generates for an H100, counted as fastseg's, and what "
    "it leaves to torch, counted as eager; forward, they write also what the backward reads. They depend on the size: "
    "a batch norm as small as these may read its input once where one of a network's reads it twice."
)


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=f"bytes moved, {args.dtype}")
    for column in ("operator", "", "layout", "size"):
        made.add_column(column)
    others = ("eager", "compiled") if args.compile else ("eager",)
    beside = [words for other in others for words in (other, f"of {other}")]
    for column in ("requested", "moved", "floor", "ratio", *beside, f"model us at {args.bandwidth:g} TB/s"):
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(
            row["operator"], row["mode"], row["layout"], row["size"],
            *(f"{row[key]:,}" for key in ("requested", "moved", "floor")), f"{row['ratio']:.3f}",
            *(cell for other in others for cell in _beside(row, other)), f"{row['model us']:.2f}",
        )  # fmt: skip
    reasons = sorted({f"not counted: {row['not counted']}" for row in rows if "not counted" in row})
    made.caption = Text("\n".join(reasons)) if reasons else None
    return made


def _beside(row: dict[str, Any], other: str) -> tuple[str, str]:
    """Another's bytes, and ours as a share of them."""
    low, high = row[f"{other} least"], row[f"{other} sectors"]
    if low is None:
        return "not counted", ""
    share = f"{row['moved'] / high:.2f}"
    return (f"{low:,}", share) if low == high else (f"{low:,} to {high:,}", f"{share} to {row['moved'] / low:.2f}")


def chart(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Bars for each row: what moves, ours and the others', over the floor. Written to args.png, or not at all."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--png needs matplotlib: pip install "fastseg-kernels[bench]"') from error
    figure = Figure(figsize=(10, (0.42 if args.compile else 0.28) * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    bars = {"fastseg": "moved", "torch eager": "eager sectors"}
    if args.compile:
        bars |= {"torch.compile": "compiled sectors"}
    height = 0.8 / len(bars)
    for number, (label, key) in enumerate(bars.items()):
        shown = [p for p in places if rows[p][key] is not None]
        at = [p + (number - (len(bars) - 1) / 2) * height for p in shown]
        axes.barh(at, [rows[p][key] / rows[p]["floor"] for p in shown], height, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    labels = [f"{row['operator']} {row['mode']}, {row['layout']}, {row['size']}" for row in rows]
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"bytes moved over the floor, {args.dtype}")
    axes.legend()
    with atomic_write(args.png) as temporary:
        figure.savefig(temporary, dpi=130)
