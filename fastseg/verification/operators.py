"""Every operator at several sizes, dtypes and layouts, compared with torch: what `fastseg verify` runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import dispatch
from . import cases
from .cases import Case
from .criterion import Comparison, compare_to_torch

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
                        yield (
                            what,
                            compare_to_torch(case.ours, case.theirs, list(case.inputs.values()), list(case.inputs)),
                        )
                except dispatch.NotSupported as error:  # only CUDA C++ kernels may lack a case
                    yield what, [] if backend == "cuda" else [_raised(error)]
                except Exception as error:  # a case that cannot run is a case that fails; the others go on
                    yield what, [_raised(error)]


def _raised(error: Exception) -> Comparison:
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return Comparison(said, float("inf"), 0.0, 0.0)
