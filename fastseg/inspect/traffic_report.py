"""The report of `fastseg inspect traffic`: bytes that each operator moves, next to the floor and to PyTorch's bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from .selection import Selection
from .traffic import KernelTraffic, metering

# Small enough for the interpreter; bytes per element are those of large sizes, as a test shows. No block size divides
# the second shape of a pair.
IMAGES = ((2, 64, 32, 64), (1, 24, 38, 54))
OVERLAPPED = ((1, 32, 8, 32), (1, 24, 9, 13))
RESNET_STEM = PoolSpec(kernel=3, stride=2, padding=1)  # a ResNet's first pooling, whose windows overlap
NORMED = ((2, 16, 32, 64), (1, 24, 38, 54))
LOGITS = (11, 19, 21, 150)
COMPILED = ("compiled least", "compiled sectors")
SEED = 0

T = TypeVar("T")


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
    yield from cases.paste_boxes(at, (8, 21, 16, 16), (64, 96))
    yield from cases.softmax_moments(at, (1, 11, 32, 64), passes=8, chunk=8)
    yield from cases.mean_field_message(at, (1, 21, 16, 32), sigma=3.0)
    yield from cases.conv_transpose2d(at, (1, 64, 32, 32), ConvTransposeSpec(32, kernel=2, stride=2))
    affine = ConvTransposeSpec(32, kernel=4, stride=2, padding=1)
    yield from cases.conv_transpose2d_affine_relu(at, (1, 32, 17, 23), affine)


def seeded(cases: Iterable[T]) -> Iterator[T]:
    """The same cases, each drawn from the same seed, and with it all that is drawn until the next one.

    Which sectors are touched depends on indices and labels. So a row is the same in every run and for every selection.
    The caller's random numbers do not change.
    """
    rest = iter(cases)
    with torch.random.fork_rng(devices=[]):
        while True:
            torch.manual_seed(SEED)
            try:
                case = next(rest)
            except StopIteration:
                return
            yield case


@dataclass(frozen=True)
class OperatorTraffic:
    """One call of an operator: its kernels, and the bytes of the torch operators around them and of the floor."""

    operator: str
    backward: bool
    kernels: list[KernelTraffic]
    around: int
    floor: int

    @property
    def moved(self) -> int:
        """Bytes of the distinct sectors of each kernel, and of the torch operators around them."""
        return sum(kernel.sectors() for kernel in self.kernels) + self.around

    @property
    def requested(self) -> int:
        """Bytes that the kernels' accesses request."""
        return sum(sum(kernel.requested.values()) for kernel in self.kernels)

    @property
    def ratio(self) -> float:
        """Bytes moved over the floor."""
        return self.moved / self.floor


def operator_traffic(case: Case) -> list[OperatorTraffic]:
    """Run the forward and backward of a case on CPU tensors, kernels interpreted. One entry per operator, in order."""
    found: list[OperatorTraffic] = []

    def note(operator: Operator, args: tuple[Any, ...]) -> None:
        done = sum(len(traffic.kernels) for traffic in found)
        around, floor = _around(operator, args), operator.floor(*args)
        found.append(OperatorTraffic(operator.name, operator.gradient, launches[done:], around, floor))

    with dispatch.backend("triton"):
        with launch.recording(lambda *call: None):  # this call only gives the gradients' shapes
            step = case.step(case.ours, backward=True)
        with metering() as launches, observing(note):
            step()
    return found


def by_mode(traffic: list[OperatorTraffic]) -> dict[str, OperatorTraffic]:
    """The operators of the forward and those of the backward, each added up."""
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
    """Bytes of the torch operators that an operator runs besides its kernels, such as copies and zero-fills."""
    bare = tree_map_only(Tensor, lambda x: x.to("meta"), args)
    with launch.recording(lambda *call: None), torch.no_grad(), ByteCounter() as counter:
        operator.implementations["triton"](*bare)
    return counter.sectors.total()


def eager_bytes(case: Case) -> dict[str, tuple[int, int]]:
    """Bytes of torch eager on a GPU, for a case on the meta device: (fewest, in sectors) of forward and backward."""
    forward, both = (_eager_bytes(case, backward) for backward in (False, True))
    return {"forward": forward, "backward": (both[0] - forward[0], both[1] - forward[1])}


def _eager_bytes(case: Case, backward: bool) -> tuple[int, int]:
    step = case.step(case.eager or case.theirs, backward)
    with ByteCounter() as counter:
        step()
    return counter.least.total(), counter.sectors.total()


def compiled_bytes(case: Case, backward: bool) -> dict[str, tuple[int, int]]:
    """Bytes of torch.compile's kernels on a GPU for the calls of `eager_bytes`, from a case on CPU tensors."""
    torch.compiler.reset()  # earlier cases count against the limit of recompilations
    function, graphs = compiled(case.eager or case.theirs)
    case.step(function, backward)()
    return {"backward" if graph.backward else "forward": graph.moved for graph in graphs}


def _compiled_columns(case: Case, modes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Columns of each mode. If Inductor's internals have changed and raise, the columns say why there is no count."""
    try:
        found = compiled_bytes(case, "backward" in modes)
        return {mode: dict(zip(COMPILED, found[mode], strict=True)) for mode in modes}
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return {mode: dict.fromkeys(COMPILED) | {"not counted": words} for mode in modes}


def rows(selection: Selection, bandwidth: float, compile: bool = False) -> list[dict[str, Any]]:
    """One row for the forward and one for the backward of each case: bytes counted, of the floor, and of PyTorch.

    bandwidth: TB/s of the column "model us". compile: also count torch.compile's kernels.
    """
    found = []
    for layout in selection.layouts:
        placements = (selection.placement(layout, device) for device in ("cpu", "meta"))
        for case, bare in seeded(zip(*map(sized_cases, placements), strict=True)):
            if not selection.includes(case):
                continue
            eager = eager_bytes(bare)
            modes = by_mode(operator_traffic(case))
            others = _compiled_columns(case, modes) if compile else {mode: {} for mode in modes}
            for mode, traffic in modes.items():
                least, sectors = eager[mode]
                found.append({
                    "operator": case.operator, "mode": mode, "layout": layout, "size": case.size,
                    "kernels": [kernel.kernel for kernel in traffic.kernels],
                    "requested": traffic.requested, "moved": traffic.moved, "floor": traffic.floor,
                    "ratio": traffic.ratio, "eager least": least, "eager sectors": sectors,
                    **others[mode],
                    "model us": traffic.moved / bandwidth / 1e6,
                })  # fmt: skip
    return found


NOTE = (
    "All numbers are bytes. moved: distinct 32-byte sectors of all kernels, and the bytes of torch operators around "
    "them. floor: each argument read once, each result written once. eager: torch's operators on a GPU under autocast, "
    "from nominal bytes to whole sectors. model: the time for the moved bytes at the given bandwidth, not a "
    "measurement. compiled: the Triton kernels that torch.compile generates for an H100, counted like fastseg's, and "
    "the operators that it leaves to PyTorch, counted like eager; the forward also writes what the backward reads. "
    "These bytes depend on the size: a small batch norm may read its input once, a large one twice."
)


def table(rows: list[dict[str, Any]], dtype: str, bandwidth: float) -> Any:
    """A rich table of the rows."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=f"bytes moved, {dtype}")
    for column in ("operator", "", "layout", "size"):
        made.add_column(column)
    others = ("eager", "compiled") if _has_compiled(rows) else ("eager",)
    beside = [words for other in others for words in (other, f"of {other}")]
    for column in ("requested", "moved", "floor", "ratio", *beside, f"model us at {bandwidth:g} TB/s"):
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


def _has_compiled(rows: list[dict[str, Any]]) -> bool:
    return any(COMPILED[0] in row for row in rows)


def _beside(row: dict[str, Any], other: str) -> tuple[str, str]:
    """The bytes of torch eager or torch.compile, and the ratio of fastseg's bytes to them."""
    low, high = row[f"{other} least"], row[f"{other} sectors"]
    if low is None:
        return "not counted", ""
    share = f"{row['moved'] / high:.2f}"
    return (f"{low:,}", share) if low == high else (f"{low:,} to {high:,}", f"{share} to {row['moved'] / low:.2f}")


def chart(rows: list[dict[str, Any]], dtype: str, path: Path) -> None:
    """Write a bar chart of the bytes moved over the floor: fastseg's and PyTorch's for each row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the chart needs matplotlib: pip install "fastseg-kernels[bench]"') from error
    figure = Figure(figsize=(10, (0.42 if _has_compiled(rows) else 0.28) * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    bars = {"fastseg": "moved", "torch eager": "eager sectors"}
    if _has_compiled(rows):
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
    axes.set_xlabel(f"bytes moved over the floor, {dtype}")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)
