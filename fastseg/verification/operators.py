"""What `fastseg verify` runs: every operator at several sizes, dtypes and memory formats, compared with torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from .. import dispatch
from . import cases
from .cases import Case, ConvTransposeSpec, LossSpec, Placement, PoolSpec, ResizeSpec
from .criterion import Comparison, compare_to_torch

MakeCases = Callable[[Placement], Iterator[Case]]

POOLS = [
    ((2, 8, 8, 32), PoolSpec(kernel=2, stride=2)),
    ((2, 3, 9, 15), PoolSpec(kernel=2, stride=2, ceil_mode=True)),
    ((1, 16, 12, 13), PoolSpec(kernel=3, stride=3, padding=1)),
    ((2, 5, 7, 8), PoolSpec(kernel=(1, 2), stride=(3, 2), padding=(0, 1))),
    ((1, 1, 1, 1), PoolSpec(kernel=1, stride=1)),
    ((0, 4, 6, 6), PoolSpec(kernel=2, stride=2)),
]
# For pooling alone: where indices repeat, torch's unpooling keeps any of the values on a GPU and in channels_last.
OVERLAPPING_POOLS = [
    ((1, 6, 9, 16), PoolSpec(kernel=3, stride=2, padding=1)),
    ((2, 4, 6, 5), PoolSpec(kernel=(2, 3), stride=1, padding=(0, 1), ceil_mode=True)),
]
# The gradient of a convolution's bias in front of a batch norm is zero but for rounding, so no size has conv_bias.
NORMS = [
    {"shape": (2, 8, 8, 16), "kernel": 2, "ceil_mode": False},
    {"shape": (2, 5, 9, 11), "kernel": 2, "ceil_mode": True},
    {"shape": (1, 24, 6, 7), "kernel": 3, "ceil_mode": True},
    {"shape": (2, 3, 2, 1), "kernel": 1, "ceil_mode": False},
]
CONV_TRANSPOSES = [
    ((2, 16, 5, 8), ConvTransposeSpec(16, kernel=2, stride=2)),
    ((2, 16, 8, 16), ConvTransposeSpec(32, kernel=2, stride=2)),
    ((1, 16, 8, 8), ConvTransposeSpec(16, kernel=4, stride=2, padding=1)),
    ((1, 24, 3, 8), ConvTransposeSpec(80, kernel=2, stride=2)),
    ((1, 5, 7, 9), ConvTransposeSpec(3, kernel=3, stride=2, padding=1, output_padding=1)),
    ((2, 8, 6, 5), ConvTransposeSpec(12, kernel=3, padding=1)),
    ((1, 4, 3, 4), ConvTransposeSpec(4, kernel=(4, 5), stride=(2, 3), padding=(1, 0))),
    ((1, 3, 1, 1), ConvTransposeSpec(7, kernel=2, stride=3, output_padding=1)),
    ((1, 12, 3, 4), ConvTransposeSpec(6, kernel=3, stride=2, padding=1, output_padding=1, groups=3)),
    ((1, 8, 5, 4), ConvTransposeSpec(8, kernel=3, padding=2, dilation=2)),
    ((1, 16, 3, 4), ConvTransposeSpec(16, kernel=4, stride=2, padding=1, groups=16)),
    ((16, 24, 1, 1), ConvTransposeSpec(8, kernel=3)),
    ((1, 8, 3, 5), ConvTransposeSpec(21, kernel=(4, 8), stride=(2, 4), padding=(1, 2))),
]
AFFINE_CONV_TRANSPOSES = [
    ((2, 16, 4, 6), ConvTransposeSpec(16, kernel=2, stride=2)),
    ((1, 5, 7, 9), ConvTransposeSpec(3, kernel=3, stride=2, padding=1, output_padding=1)),
    ((1, 8, 6, 5), ConvTransposeSpec(12, kernel=3, padding=1)),
]
UNPOOLED_CONVS = [
    {"shape": (2, 16, 4, 6), "out_channels": 16, "kernel": 2},
    {"shape": (1, 5, 3, 7), "out_channels": 3, "kernel": 3},
    {"shape": (1, 70, 2, 3), "out_channels": 40, "kernel": 2},
]
CROSS_ENTROPIES = [
    ((2, 11, 6, 8), LossSpec(weighted=True)),
    ((2, 19, 5, 7), LossSpec(ignore_index=-100)),
    ((1, 21, 9, 4), LossSpec(ignore_index=3, weighted=True, reduction="sum")),
    ((1, 150, 3, 5), LossSpec(reduction="none")),
    ((2, 1, 4, 4), LossSpec(ignore_index=-100)),
    ((2, 19, 3, 5), LossSpec(weighted=True, label_smoothing=0.1, one_pass=False)),
    ((1, 13, 7, 6), LossSpec(predicted=True)),
    ((7, 11), LossSpec(ignore_index=-100, weighted=True, label_smoothing=0.1, probabilities=True, one_pass=True)),
    ((1, 5, 7), LossSpec(ignore_index=-100, reduction="sum", probabilities=True, one_pass=False)),
    ((1, 6, 2, 3, 4), LossSpec(ignore_index=-100, weighted=True)),
]
DICE_CROSS_ENTROPIES = [
    {"shape": (2, 4, 6, 8), "ignore_index": 255},
    {"shape": (2, 19, 5, 7), "ignore_index": -100, "batch": True},
    {"shape": (1, 150, 3, 5), "ignore_index": 0},
]
UPSAMPLE_CROSS_ENTROPIES = [
    ((2, 19, 3, 5), ResizeSpec((12, 20)), LossSpec(weighted=True)),
    ((1, 5, 9, 4), ResizeSpec((13, 7), align_corners=True), LossSpec(reduction="none", label_smoothing=0.1)),
    (
        (1, 11, 5, 6),
        ResizeSpec((3, 4), align_corners=False),
        LossSpec(weighted=True, reduction="sum", label_smoothing=0.1),
    ),
    ((2, 3, 4, 3), ResizeSpec((7, 9), mode="nearest"), LossSpec(weighted=True)),
]
UPSAMPLE_ARGMAXES = [
    {"shape": (2, 19, 3, 5), "size": (12, 20)},
    {"shape": (1, 6, 7, 4), "size": (5, 9)},
    {"shape": (1, 1, 2, 3), "size": (5, 4), "mode": "nearest"},
]
LINEAR_CROSS_ENTROPIES = [
    {"shape": (2, 8, 5, 6), "classes": 19, "chunk": 16},
    {"shape": (1, 5, 7, 3), "classes": 4, "reduction": "none"},
    {"shape": (2, 3, 4, 4), "classes": 11, "chunk": 7, "reduction": "sum"},
]
PASTED_BOXES = [
    {"shape": (4, 3, 3, 5), "size": (6, 35)},
    {"shape": (3, 9, 5, 4), "size": (5, 21), "reduce": "sum", "again": True},
    {"shape": (3, 2, 1, 1), "size": (5, 6), "reduce": "mean"},
]
SOFTMAX_MOMENTS = [
    {"shape": (2, 11, 5, 13)},
    {"shape": (1, 150, 3, 7), "passes": 2},
    {"shape": (1, 2, 17, 9), "passes": 5, "chunk": 1},
]
MEAN_FIELD_MESSAGES = [
    {"shape": (2, 5, 5, 18), "sigma": 1.5},
    {"shape": (1, 35, 9, 7), "sigma": 1.0, "sigma_color": None, "self_term": False},
    {"shape": (1, 2, 9, 17), "radius": None},
]
CONFUSION_MATRICES = [
    {"shape": (2, 9, 31), "classes": 19},
    {"shape": (1, 13, 11), "classes": 70},
    {"shape": (3, 4, 5), "classes": 2},
]

SIZES: dict[str, list[MakeCases]] = {
    "max_pool2d": [partial(cases.max_pool2d, shape=shape, pool=pool) for shape, pool in POOLS + OVERLAPPING_POOLS],
    "max_unpool2d": [
        *(partial(cases.max_unpool2d, shape=shape, pool=pool) for shape, pool in POOLS),
        partial(cases.max_unpool2d_anywhere, shape=(2, 3, 4, 5)),
    ],
    "batch_norm_relu": [partial(cases.batch_norm_relu, **size, conv_bias=False) for size in NORMS],
    "conv_transpose2d": [partial(cases.conv_transpose2d, shape=shape, conv=conv) for shape, conv in CONV_TRANSPOSES],
    "conv_transpose2d_affine_relu": [
        partial(cases.conv_transpose2d_affine_relu, shape=shape, conv=conv) for shape, conv in AFFINE_CONV_TRANSPOSES
    ],
    "max_unpool2d_conv2d": [partial(cases.max_unpool2d_conv2d, **size) for size in UNPOOLED_CONVS],
    "cross_entropy": [partial(cases.cross_entropy, shape=shape, loss=loss) for shape, loss in CROSS_ENTROPIES],
    "dice_cross_entropy": [partial(cases.dice_cross_entropy, **size) for size in DICE_CROSS_ENTROPIES],
    "upsample_cross_entropy": [
        partial(cases.upsample_cross_entropy, shape=shape, resize=resize, loss=loss)
        for shape, resize, loss in UPSAMPLE_CROSS_ENTROPIES
    ],
    "upsample_argmax": [partial(cases.upsample_argmax, **size) for size in UPSAMPLE_ARGMAXES],
    "linear_cross_entropy": [partial(cases.linear_cross_entropy, **size) for size in LINEAR_CROSS_ENTROPIES],
    "paste_boxes": [partial(cases.paste_boxes, **size) for size in PASTED_BOXES],
    "softmax_moments": [partial(cases.softmax_moments, **size) for size in SOFTMAX_MOMENTS],
    "mean_field_message": [partial(cases.mean_field_message, **size) for size in MEAN_FIELD_MESSAGES],
    "confusion_matrix": [partial(cases.confusion_matrix, **size) for size in CONFUSION_MATRICES],
}
"""For each operator, functions that make its cases at one size."""


def verify(
    operators: Sequence[str], dtypes: Sequence[str], quick: bool, device: str, seed: int, backend: str = "triton"
) -> Iterator[tuple[dict[str, str], list[Comparison]]]:
    """Run the cases on the kernels of a backend. Yields (operator, case, dtype, layout, precision; the comparisons).

    quick: only the first size of each operator. A case that the CUDA C++ or CPU kernels do not support has no
    comparisons. A convolution in float32 is compared twice, in precision "ieee" and "tf32", except on those two.
    """
    precisions = 1 if backend in ("cuda", "cpu") else None
    for operator, dtype, layout in itertools.product(operators, dtypes, cases.LAYOUTS):
        torch.manual_seed(seed)
        at = Placement(cases.DTYPES[dtype], cases.LAYOUTS[layout], device)
        for make in SIZES[operator][: 1 if quick else None]:
            for case, precision in [(made, how) for made in make(at) for how in made.precisions[:precisions]]:
                what = {"operator": operator, "case": f"{case.operator} {case.size}", "dtype": dtype, "layout": layout,
                        "precision": precision}  # fmt: skip
                try:
                    with dispatch.backend(backend):
                        inputs, names = list(case.inputs.values()), list(case.inputs)
                        yield what, compare_to_torch(case.ours, case.theirs, inputs, names, precision=precision)
                except dispatch.NotSupported as error:
                    yield what, [_raised(error)] if backend == "triton" else []
                except Exception as error:  # a case that cannot run has failed; the others continue
                    yield what, [_raised(error)]


def _raised(error: Exception) -> Comparison:
    """A failed comparison that names the exception."""
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return Comparison(said, float("inf"), 0.0, 0.0)
