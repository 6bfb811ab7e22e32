"""upsample_argmax: the class of the largest logit of each pixel of a resized map, which is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ...kernels.cpu import losses as cpu_kernels
from ...kernels.losses.options import Resizing
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, accumulator
from ..operator import Implementation, Operator, empty
from .checks import LABEL_DTYPES
from .resizing import ResizingArguments, check_map, check_resizing, unsupported_resizing
from .row_chunks import RowChunks


def _empty_labels(
    input: Tensor, size: Sequence[int], resizing: Resizing, dtype: torch.dtype, probability: bool
) -> tuple[Tensor, Tensor]:
    shape, layout = (input.shape[0], *size), torch.contiguous_format
    labels = empty(input, shape, layout, dtype)
    return labels, empty(input, shape if probability else (0,), layout, accumulator(input.dtype))


def _upsample_argmax_kernel(
    kernels: ModuleType, input: Tensor, size: Sequence[int], resizing: Resizing, dtype: torch.dtype, probability: bool
) -> tuple[Tensor, Tensor]:
    labels, probabilities = _empty_labels(input, size, resizing, dtype, probability)
    kernels.upsample.upsample_argmax(input, labels, probabilities if probability else None, resizing)
    return labels, probabilities


def _upsample_argmax_reference(
    input: Tensor, size: Sequence[int], resizing: Resizing, dtype: torch.dtype, probability: bool
) -> tuple[Tensor, Tensor]:
    labels, probabilities = _empty_labels(input, size, resizing, dtype, probability)
    chunks = RowChunks.of(input, size, resizing)
    buffer = chunks.buffer()
    for n, image in enumerate(input):
        for rows in chunks:
            values = chunks.values(image, rows, buffer)
            highest, best = values.max(1, keepdim=True)
            labels[n, rows] = best[0, 0]
            if probability:
                probabilities[n, rows] = values.sub_(highest).exp_().sum((0, 1)).reciprocal()
    return labels, probabilities


UPSAMPLE_ARGMAX = Operator(
    "upsample_argmax(Tensor input, SymInt[] size, Resizing resizing, ScalarType dtype, bool probability) "
    "-> (Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            partial(_upsample_argmax_kernel, triton_kernels),
            lambda input, size, *rest: unsupported_resizing(input, size),
        ),
        "cpu": Implementation(
            partial(_upsample_argmax_kernel, cpu_kernels),
            lambda input, size, *rest: unsupported_resizing(input, size, FLOAT_AND_DOUBLE_DTYPES),
        ),
    },
    reference=_upsample_argmax_reference,
    fake=_empty_labels,
)


def upsample_argmax(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "bilinear",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    dtype: torch.dtype = torch.uint8,
    return_probability: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The labels of resized logits: the large logits are never stored.

        labels = interpolate(input, size, scale_factor, mode, align_corners).argmax(1)

    Args:
        input: logits of any strides. float32, float16 and bfloat16 run on the kernels, float64 falls back to PyTorch.
        size, scale_factor, align_corners, recompute_scale_factor: as in torch.nn.functional.interpolate.
        mode: "bilinear" or "nearest".
        dtype: that of the labels: uint8, int16, int32 or int64, which must hold C classes.
        return_probability: also return the softmax probability of each label.

    Shape:
        - input: (N, C, h, w).
        - labels, probability: (N, H, W).

    Returns:
        The labels; with `return_probability` (labels, probability), the latter in float32 (float64 for float64 logits).
        Neither has a gradient.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as interpolate.
        ValueError: for a dtype that does not hold the labels.

    Note:
        Deterministic. The resized logits are computed in float32 (float64). Of equal logits the first class wins, and
        NaN wins over numbers, as in torch.argmax.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])  # 2 classes, 1 x 2 pixels
        >>> FS.upsample_argmax(logits, size=(1, 4))
        tensor([[[0, 0, 0, 1]]], dtype=torch.uint8)

    Source:
        torch.nn.functional.interpolate, torch.argmax.
    """
    name = "upsample_argmax"
    check_map(name, input)
    arguments = ResizingArguments(size, scale_factor, mode, align_corners, recompute_scale_factor)
    output_size, resizing = check_resizing(name, input, arguments)
    if dtype not in LABEL_DTYPES or input.shape[1] - 1 > torch.iinfo(dtype).max:
        raise ValueError(
            f"{name}: dtype must be one of {', '.join(map(str, LABEL_DTYPES))} and hold {input.shape[1]} classes, but "
            f"is {dtype}"
        )
    call = (input.detach(), output_size, resizing, dtype, bool(return_probability))
    UPSAMPLE_ARGMAX.choose(*call)  # only for `explain`: the operator chooses again when it runs
    labels, probabilities = UPSAMPLE_ARGMAX(*call)
    return (labels, probabilities) if return_probability else labels
