"""`fastseg verify`: every operator against torch in float64, and the criterion that the tests use.

The truth is torch itself in float64. An output or gradient is right when its error against the truth is no more than
torch's own error in the same dtype plus a small tolerance; integer results must be equal. While ours runs, torch's
deterministic mode is on: it fills every new tensor with NaN, so that an element nobody wrote shows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import cases, dispatch, terminal
from .cases import Case

# In units of the dtype's epsilon: one rounding of a half, the order of a sum in float32.
TOLERANCE = {torch.float64: 64, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}

Function = Callable[..., Any]


@dataclass(frozen=True)
class Comparison:
    """One result: largest error against float64 over the truth's largest magnitude, ours and torch's."""

    tensor: str
    error: float
    torch_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that is none is None."""
        numbers = {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items() if name != "tensor"
        }
        return {"tensor": self.tensor, **numbers, "passed": self.passed}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every new uninitialised tensor is filled with NaN (integers: the largest), and non-determinism is an error."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def relative_error(result: Tensor, truth: Tensor) -> float:
    """max |result - truth| / max |truth|; infinite where one is NaN or infinite and the other is something else."""
    if result.shape != truth.shape:
        return float("inf")
    result, truth = result.detach().double(), truth.detach().double()
    same = (result == truth) | (result.isnan() & truth.isnan())
    if bool(same.all()):
        return 0.0
    difference = (result - truth).abs().masked_fill(same, 0.0)
    if not bool(difference.isfinite().all()):
        return float("inf")
    scale = truth[truth.isfinite()].abs().max().item()
    return difference.max().item() / max(scale, torch.finfo(torch.float32).tiny)


def _run(function: Function, inputs: Sequence[Any], grads: Sequence[Tensor] | None, dtype: torch.dtype | None):
    """Outputs of the function, then gradients of its float inputs for the given gradients of its float outputs."""
    cast = [x.detach().to(dtype or x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in cast]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    differentiable = [y for y in outputs if y.requires_grad]
    if grads is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in differentiable]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not differentiable or [g.shape for g in grads] != [y.shape for y in differentiable]:
        return outputs, [None] * len(wanted), grads
    found = torch.autograd.grad(
        differentiable, wanted, [g.to(y.dtype) for g, y in zip(grads, differentiable, strict=True)], allow_unused=True
    )
    return outputs, list(found), grads


def compare(
    ours: Function, theirs: Function, inputs: Sequence[Any], names: Sequence[str] | None = None, poison: bool = True
) -> list[Comparison]:
    """Compare `ours(*inputs)` and its gradients with `theirs`, which must also run in float64.

    inputs: tensors and whatever else the functions take; float tensors are made leaves that require gradients.
    names: of the inputs, for the report. poison: fill fresh memory and refuse non-determinism while ours runs; not
    for calls that fall back to torch's functions, some of which are not deterministic.
    """
    names = names or [f"input {i}" for i in range(len(inputs))]
    native, native_grads, grads = _run(theirs, inputs, None, None)
    truth, true_grads, _ = _run(theirs, inputs, grads, torch.float64)
    with poisoned() if poison else contextlib.nullcontext():
        mine, my_grads, _ = _run(ours, inputs, grads, None)
    leaves = [name for name, x in zip(names, inputs, strict=True) if isinstance(x, Tensor) and x.is_floating_point()]
    labels = [f"output {i}" for i in range(len(mine))] + [f"grad {name}" for name in leaves]
    comparisons = []
    for label, got, own, want in zip(labels, mine + my_grads, native + native_grads, truth + true_grads, strict=True):
        if got is None or want is None:
            comparisons.append(Comparison(label, 0.0 if got is want else float("inf"), 0.0, 0.0))
        elif want.is_floating_point():
            torch_error = relative_error(own, want)
            tolerance = TOLERANCE[got.dtype] * torch.finfo(got.dtype).eps
            comparisons.append(Comparison(label, relative_error(got, want), torch_error, torch_error + tolerance))
        else:
            equal = got.shape == own.shape and got.dtype == own.dtype and torch.equal(got, own)
            comparisons.append(Comparison(label, 0.0 if equal else float("inf"), 0.0, 0.0))
    return comparisons


# --- the sizes of the command ----------------------------------------------------------------------------------------

POOLS = [  # shape, kernel, stride, padding, ceil_mode
    ((2, 8, 8, 32), 2, 2, 0, False),
    ((2, 3, 9, 15), 2, 2, 0, True),
    ((1, 16, 12, 13), 3, 3, 1, False),
    ((2, 5, 7, 8), (1, 2), (3, 2), (0, 1), False),
    ((1, 1, 1, 1), 1, 1, 0, False),
    ((0, 4, 6, 6), 2, 2, 0, False),
]
OVERLAPPING = [  # for pooling: of indices that repeat torch keeps any on a GPU, and in channels_last
    ((1, 6, 9, 16), 3, 2, 1, False),
    ((2, 4, 6, 5), (2, 3), 1, (0, 1), True),
]
SIZES: dict[str, list[tuple[Callable[..., Iterator[Case]], tuple[Any, ...]]]] = {
    "max_pool2d": [(cases.max_pool2d, size) for size in POOLS + OVERLAPPING],
    "max_unpool2d": [
        *((cases.max_unpool2d, size) for size in POOLS),
        (cases.max_unpool2d_anywhere, ((2, 3, 4, 5),)),
    ],
    "batch_norm_relu": [  # shape, kernel of the pooling, ceil_mode, conv_bias, whose gradient is zero but for rounding
        (cases.batch_norm_relu, size)
        for size in [
            ((2, 8, 8, 16), 2, False, False),
            ((2, 5, 9, 11), 2, True, False),
            ((1, 24, 6, 7), 3, True, False),
            ((2, 3, 2, 1), 1, False, False),
        ]
    ],
    "conv_transpose2d": [  # shape, output channels, kernel, stride, padding, output_padding, groups, dilation
        (cases.conv_transpose2d, size)
        for size in [
            ((2, 16, 5, 8), 16, 2, 2, 0, 0),
            ((2, 16, 8, 16), 32, 2, 2),
            ((1, 16, 8, 8), 16, 4, 2, 1),
            ((1, 24, 3, 8), 80, 2, 2, 0, 0),
            ((1, 5, 7, 9), 3, 3, 2, 1, 1),
            ((2, 8, 6, 5), 12, 3, 1, 1, 0),
            ((1, 4, 3, 4), 4, (4, 5), (2, 3), (1, 0), 0),
            ((1, 3, 1, 1), 7, 2, 3, 0, 1),
            ((1, 12, 3, 4), 6, 3, 2, 1, 1, 3),
            ((1, 8, 5, 4), 8, 3, 1, 2, 0, 1, 2),
            ((1, 16, 3, 4), 16, 4, 2, 1, 0, 16),
            ((16, 24, 1, 1), 8, 3),
            ((1, 8, 3, 5), 21, (4, 8), (2, 4), (1, 2)),
        ]
    ],
    "conv_transpose2d_affine_relu": [
        (cases.conv_transpose2d_affine_relu, size)
        for size in [((2, 16, 4, 6), 16, 2, 2, 0, 0), ((1, 5, 7, 9), 3, 3, 2, 1, 1), ((1, 8, 6, 5), 12, 3, 1, 1, 0)]
    ],
    "max_unpool2d_conv2d": [  # shape, output channels, kernel of the pooling
        (cases.max_unpool2d_conv2d, size)
        for size in [((2, 16, 4, 6), 16, 2), ((1, 5, 3, 7), 3, 3), ((1, 70, 2, 3), 40, 2)]
    ],
    "cross_entropy": [  # shape, ignore_index, weighted, reduction, label_smoothing, probabilities, one_pass, predicted
        (cases.cross_entropy, size)
        for size in [
            ((2, 11, 6, 8), 255, True, "mean"),
            ((2, 19, 5, 7), -100, False, "mean"),
            ((1, 21, 9, 4), 3, True, "sum"),
            ((1, 150, 3, 5), 255, False, "none"),
            ((2, 1, 4, 4), -100, False, "mean"),
            ((2, 19, 3, 5), 255, True, "mean", 0.1, False, False),
            ((1, 13, 7, 6), 255, False, "mean", 0.0, False, None, True),
            ((7, 11), -100, True, "mean", 0.1, True, True),
            ((1, 5, 7), -100, False, "sum", 0.0, True, False),
            ((1, 6, 2, 3, 4), -100, True, "mean"),
        ]
    ],
    "dice_cross_entropy": [  # shape, ignore_index, batch
        (cases.dice_cross_entropy, size)
        for size in [((2, 4, 6, 8), 255), ((2, 19, 5, 7), -100, True), ((1, 150, 3, 5), 0)]
    ],
    "upsample_cross_entropy": [  # shape, size, mode, align_corners, weighted, reduction, label_smoothing
        (cases.upsample_cross_entropy, size)
        for size in [
            ((2, 19, 3, 5), (12, 20), "bilinear", None, True, "mean", 0.0),
            ((1, 5, 9, 4), (13, 7), "bilinear", True, False, "none", 0.1),
            ((1, 11, 5, 6), (3, 4), "bilinear", False, True, "sum", 0.1),
            ((2, 3, 4, 3), (7, 9), "nearest", None, True, "mean", 0.0),
        ]
    ],
    "upsample_argmax": [  # shape, size, mode
        (cases.upsample_argmax, size)
        for size in [
            ((2, 19, 3, 5), (12, 20)),
            ((1, 6, 7, 4), (5, 9)),
            ((1, 1, 2, 3), (5, 4), "nearest"),
        ]
    ],
    "linear_cross_entropy": [  # shape, classes, chunk, reduction
        (cases.linear_cross_entropy, size)
        for size in [((2, 8, 5, 6), 19, 16), ((1, 5, 7, 3), 4, None, "none"), ((2, 3, 4, 4), 11, 7, "sum")]
    ],
    "confusion_matrix": [  # shape, classes
        (cases.confusion_matrix, size) for size in [((2, 9, 31), 19), ((1, 13, 11), 70), ((3, 4, 5), 2)]
    ],
}


def verify(
    operators: Sequence[str], dtypes: Sequence[str], quick: bool, device: str, seed: int, backend: str = "triton"
) -> Iterator[tuple[dict[str, str], list[Comparison]]]:
    """Run the cases on the kernels of a backend: (what was run, its comparisons). quick: the first size of each.

    A case that the CUDA C++ kernels do not cover has no comparisons.
    """
    for operator, dtype, layout in itertools.product(operators, dtypes, cases.LAYOUTS):
        torch.manual_seed(seed)
        at = cases.Placement(cases.DTYPES[dtype], cases.LAYOUTS[layout], device)
        for make, size in SIZES[operator][: 1 if quick else None]:
            for case in make(at, *size):
                what = {"operator": operator, "case": f"{case.operator} {case.size}", "dtype": dtype, "layout": layout}
                try:
                    with dispatch.backend(backend):
                        yield what, compare(case.ours, case.theirs, list(case.inputs.values()), list(case.inputs))
                except NotImplementedError as error:
                    yield what, [] if backend == "cuda" and "do not cover" in str(error) else [_raised(error)]
                except Exception as error:  # a case that cannot run is a case that fails; the others go on
                    yield what, [_raised(error)]


def _raised(error: Exception) -> Comparison:
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return Comparison(said, float("inf"), 0.0, 0.0)


# --- the command -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check every operator's kernels against torch in float64, forward and backward: on the GPU if there is one, "
        "else Triton's in its interpreter on the CPU. Exit code 1 if anything fails."
    )
    parser.epilog = "examples:\n  fastseg verify --quick\n  fastseg verify --op max_unpool2d --dtype bfloat16 --json"
    parser.add_argument("--op", action="append", choices=list(SIZES), help="only this operator (may be repeated)")
    parser.add_argument(
        "--dtype", action="append", choices=list(cases.DTYPES), help="only this dtype (may be repeated)"
    )
    parser.add_argument("--backend", choices=list(dispatch.NAMES), default="triton", help="whose kernels (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size of each operator, dtype and layout")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: a fresh one, printed)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.backend == "cuda" and device == "cpu":
        raise ValueError("--backend cuda needs a CUDA GPU, and torch finds none on this machine")
    if args.backend == "triton" and (lacking := dispatch.without_triton(torch.device(device))) is not None:
        raise ValueError(f"--backend triton cannot run: {lacking}")
    if device == "cpu":
        dispatch.interpret_kernels()
    seed = args.seed if args.seed is not None else torch.seed() % 2**31
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, kernels interpreted"
    started, rows, uncovered = time.perf_counter(), [], 0
    console = terminal.console(stderr=args.json)
    runs = verify(args.op or list(SIZES), args.dtype or list(cases.DTYPES), args.quick, device, seed, args.backend)
    progress = Console(file=sys.stderr)
    interrupted = False
    try:
        for what, comparisons in track(
            runs, "verifying", console=progress, transient=True, disable=not progress.is_terminal
        ):
            if comparisons:
                rows.append((what, comparisons))
            else:
                uncovered += 1
    except KeyboardInterrupt:  # what is done is shown all the same
        interrupted = True
    failed = [(what, c) for what, comparisons in rows for c in comparisons if not c.passed]
    code = 130 if interrupted else 1 if failed else 0
    if args.json:
        runs = [{**what, "results": [c.as_dict() for c in cs]} for what, cs in rows]
        print(json.dumps({"device": where, "seed": seed, "passed": code == 0, "interrupted": interrupted, "cases": runs,
                          "backend": args.backend, "uncovered": uncovered}))  # fmt: skip
        return code
    table = Table(title=f"largest error against float64, on {where}, seed {seed}")
    for column in ("operator", "dtype", "layout", "cases", "fastseg", "torch", ""):
        table.add_column(column)
    for key, group in itertools.groupby(rows, lambda row: (row[0]["operator"], row[0]["dtype"], row[0]["layout"])):
        found = [comparisons for _, comparisons in group]
        flat = [c for comparisons in found for c in comparisons]
        table.add_row(
            *key, str(len(found)), f"{max(c.error for c in flat):.1e}", f"{max(c.torch_error for c in flat):.1e}",
            "ok" if all(c.passed for c in flat) else "[red]FAILED",
        )  # fmt: skip
    console.print(table)
    for what, c in failed:
        console.print(f"FAILED {what['case']} {what['dtype']} {what['layout']}: {c.tensor} is off by {c.error:.2e}, "
                      f"allowed {c.allowed:.2e}", markup=False)  # fmt: skip
    seconds = time.perf_counter() - started
    console.print(f"{len(rows)} cases, {len(failed)} failed results, {seconds:.0f} s")
    if uncovered:
        console.print(f"{uncovered} cases are not covered by the {dispatch.NAMES[args.backend]} kernels")
    if interrupted:
        console.print("interrupted: the other cases were not run")
    return code
