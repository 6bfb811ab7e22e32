"""Resizing that never stores the large map: arguments, the torch reference by bands of rows, and upsample_argmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ..arguments import MAX_FLOAT_SIDE
from ..operator import Implementation, Operator, empty
from .chunked_reference import elements

MODES = ("nearest", "bilinear")
LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)
LEAST_CLASSES = 8  # that a band is counted for: what the labels need besides is that of some classes
FEW_CLASSES = 16  # below which the reference computes in NCHW, from which on in channels_last


# --- arguments -------------------------------------------------------------------------------------------------------


def check_map(name: str, input: Any) -> None:
    """torch's exceptions for what cannot be resized."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a Tensor, but is of type {type(input).__name__}")
    if not input.is_floating_point():
        raise NotImplementedError(f"{name}: input must be of a floating-point dtype, but is of {input.dtype}")
    if input.dim() != 4:
        raise NotImplementedError(f"{name}: input must have shape (N, C, h, w), but has {tuple(input.shape)}")
    if 0 in input.shape[1:]:
        raise RuntimeError(f"{name}: input must have classes, rows and columns, but has shape {tuple(input.shape)}")


def _pair(name: str, argument: str, value: Any, kind: type) -> list[Any]:
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{name}: {argument} must be one number or one for each of 2 sides, but is {value!r}")
    for number in pair:
        if not isinstance(number, (kind, torch.SymInt, torch.SymFloat)) or isinstance(number, bool):
            raise TypeError(f"{name}: {argument} must be of {kind.__name__} numbers, but is {value!r}")
    return pair


def check_resizing(
    name: str,
    input: Tensor,
    size: Any,
    scale_factor: Any,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    default: Sequence[int] | None = None,
) -> tuple[list[int], list[float] | None]:
    """(size, scales): the output's size, and the factors that source positions are divided by in place of the sizes.

    The rules and exceptions are torch.nn.functional.interpolate's; default: the size where none of the two is given.
    """
    if mode not in MODES:
        raise NotImplementedError(f"{name}: mode must be one of {', '.join(map(repr, MODES))}, but is {mode!r}")
    if mode == "nearest" and align_corners is not None:
        raise ValueError(f"{name}: align_corners belongs to mode 'bilinear', but mode is 'nearest'")
    scales = None
    if size is not None:
        if scale_factor is not None:
            raise ValueError(f"{name}: only one of size and scale_factor may be given")
        if recompute_scale_factor:
            raise ValueError(f"{name}: recompute_scale_factor has no meaning with a size")
        out = _pair(name, "size", size, Integral)
    elif scale_factor is not None:
        scales = [float(scale) for scale in _pair(name, "scale_factor", scale_factor, Real)]
        if not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"{name}: scale_factor must be above 0 and finite, but is {scale_factor!r}")
        out = [torch.sym_int(side * scale) for side, scale in zip(input.shape[2:], scales, strict=True)]
        if recompute_scale_factor:
            scales = None
    elif default is not None:
        out = list(default)
    else:
        raise ValueError(f"{name}: either size or scale_factor must be given")
    if any(side <= 0 for side in out):
        raise RuntimeError(f"{name}: the output must have rows and columns, but its size would be {tuple(out)}")
    return out, scales


def uncovered(input: Tensor, size: Sequence[int]) -> str | None:
    """Why the kernels cannot resize a map, in words, or None."""
    if input.dtype not in LOGITS_DTYPES:
        return f"dtype {input.dtype}"
    if any(side > MAX_FLOAT_SIDE for side in (*input.shape[2:], *size)):
        return f"maps of more than {MAX_FLOAT_SIDE} rows or columns"
    return None


# --- the reference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bands:
    """The large map of one picture, a band of rows at a time: (1, C, rows, W) in the dtype it is computed in.

    torch's own operator resizes along x. Along y each of a band's rows is the mean of two rows of the small map.
    """

    shape: tuple[int, int, int]  # C, h, w
    size: tuple[int, int]
    scales: tuple[float, float] | None
    mode: str
    align_corners: bool
    dtype: torch.dtype
    taps: Tensor  # (2, H): rows of the small map
    weights: Tensor  # (2, H): what each counts

    @classmethod
    def of(
        cls, input: Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool
    ) -> Bands:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        scales = None if scales is None else (scales[0], scales[1])
        h, rows = input.shape[2], torch.arange(size[0], device=input.device)
        if mode == "nearest":
            # torch rounds in float32, and takes these two sizes without looking at scales.
            step = torch.tensor(h / size[0] if scales is None or size[0] in (h, 2 * h) else 1 / scales[0])
            first = (rows * step.float()).long().clamp(max=h - 1)
            behind = torch.zeros(size[0], dtype=dtype, device=input.device)
        else:
            if align_corners:
                at = rows.double() * ((h - 1) / (size[0] - 1) if size[0] > 1 else 0.0)
            else:
                # torch copies a side whose size stays, without looking at scales.
                step = h / size[0] if scales is None or size[0] == h else 1 / scales[0]
                at = ((rows + 0.5).double() * step - 0.5).clamp(min=0)
            first = at.long().clamp(max=h - 1)
            behind = (at - first).clamp(max=1).to(dtype)
        taps = torch.stack((first, (first + 1).clamp(max=h - 1)))
        _, c, _, w = input.shape
        return cls(
            (c, h, w), (size[0], size[1]), scales, mode, align_corners, dtype, taps, torch.stack((1 - behind, behind))
        )

    def __iter__(self) -> Iterator[slice]:
        """The bands, from above."""
        rows = max(1, elements() // (self.size[1] * max(self.shape[0], LEAST_CLASSES)))
        for start in range(0, self.size[0], rows):
            yield slice(start, min(start + rows, self.size[0]))

    def empty(self, rows: int, columns: int) -> Tensor:
        layout = torch.contiguous_format if self.shape[0] < FEW_CLASSES else torch.channels_last
        shape = (1, self.shape[0], rows, columns)
        return torch.empty(shape, dtype=self.dtype, device=self.taps.device, memory_format=layout)

    def buffer(self) -> Tensor:
        """Memory for a band, to be used again for each: fresh memory of this size is costly."""
        return self.empty(next(iter(self)).stop, self.size[1])

    def reach(self, rows: slice) -> tuple[int, int]:
        """The rows of the small map that a band is made of. Found from the size, since looking would be a wait."""
        h = self.shape[1]
        ratio = h / self.size[0] if self.scales is None or self.align_corners else 1 / self.scales[0]
        return max(0, min(h - 1, math.floor(rows.start * ratio) - 1)), min(h, math.ceil(rows.stop * ratio) + 2)

    def values(self, picture: Tensor, rows: slice, buffer: Tensor) -> Tensor:
        """The band of a picture (C, h, w), written into the buffer."""
        taps, (first, behind) = self.taps[:, rows], self.weights[:, rows, None]
        small = self.empty(rows.stop - rows.start, self.shape[2])
        small[0] = picture.index_select(1, taps[0])
        if self.mode == "bilinear":
            small.mul_(first).addcmul_(picture.index_select(1, taps[1])[None].to(self.dtype), behind)
        out = buffer[:, :, : small.shape[2]]
        return self._operator("")(small, [*out.shape[2:]], *self._along_x(), out=out)

    def add_back(self, change: Tensor, rows: slice, small: Tensor) -> None:
        """Add what the gradient of a band makes of the small map's, a tensor that `empty` gave."""
        start, stop = self.reach(rows)
        near = torch.arange(start, stop, device=change.device)[:, None]
        matrix = sum(
            (near == tap) * weight for tap, weight in zip(self.taps[:, rows], self.weights[:, rows], strict=True)
        )
        c, _, w = self.shape
        high = self.empty(stop - start, self.size[1])
        if high.is_contiguous():
            torch.matmul(matrix, change, out=high)
        else:
            torch.matmul(matrix, change.permute(0, 2, 3, 1).flatten(2), out=high.permute(0, 2, 3, 1).flatten(2))
        sizes = ([stop - start, self.size[1]], [1, c, stop - start, w])
        back = self.empty(stop - start, w)
        self._operator("_backward")(high, *sizes, *self._along_x(), grad_input=back)
        small[:, :, start:stop] += back

    def _along_x(self) -> tuple[Any, ...]:
        corners = () if self.mode == "nearest" else (self.align_corners,)
        return (*corners, None, None if self.scales is None else self.scales[1])

    def _operator(self, direction: str) -> Any:
        packet = getattr(torch.ops.aten, f"upsample_{self.mode}2d{direction}")
        return packet.grad_input if direction else packet.out


# --- upsample_argmax -------------------------------------------------------------------------------------------------


def _empty_labels(
    input: Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, probability: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (input.shape[0], *size)
    computed = torch.float64 if input.dtype == torch.float64 else torch.float32
    labels = empty(input, shape, torch.contiguous_format, dtype)
    return labels, empty(input, shape if probability else (0,), torch.contiguous_format, computed)


def _upsample_argmax_kernel(
    input: Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, probability: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    labels, share = _empty_labels(input, size, scales, mode, align_corners, dtype, probability)
    triton_kernels.upsample.upsample_argmax(input, labels, share if probability else None, scales, mode, align_corners)
    return labels, share


def _upsample_argmax_reference(
    input: Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool,
    dtype: torch.dtype, probability: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    labels, share = _empty_labels(input, size, scales, mode, align_corners, dtype, probability)
    bands = Bands.of(input, size, scales, mode, align_corners)
    buffer = bands.buffer()
    for n, picture in enumerate(input):
        for rows in bands:
            values = bands.values(picture, rows, buffer)
            highest, best = values.max(1, keepdim=True)
            labels[n, rows] = best[0, 0]
            if probability:
                share[n, rows] = values.sub_(highest).exp_().sum((0, 1)).reciprocal()
    return labels, share


UPSAMPLE_ARGMAX = Operator(
    "upsample_argmax(Tensor input, SymInt[] size, float[]? scales, str mode, bool align_corners, ScalarType dtype, "
    "bool probability) -> (Tensor, Tensor)",
    kernels={
        "triton": Implementation(_upsample_argmax_kernel, lambda input, size, *rest: uncovered(input, size)),
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
    """F.interpolate(input, size, scale_factor, mode, align_corners).argmax(1), without the large logits in memory.

    input: logits (N, C, h, w) of any strides; float32, float16 and bfloat16 run on the kernels, float64 on torch.
    size, scale_factor, align_corners, recompute_scale_factor: torch.nn.functional.interpolate's; mode: "bilinear" or
    "nearest". dtype: uint8, int16, int32 or int64, which must hold C classes.

    Returns labels (N, H, W), with return_probability also the softmax probability of each, float32 (float64 for
    float64). The resized logits are computed in float32 whatever the input's dtype; of equal ones the first wins, NaN
    wins over numbers. Deterministic. Not differentiable, the probability neither: it is detached.

    Raises interpolate's exceptions, and ValueError for a dtype that does not hold the labels.
    """
    name = "upsample_argmax"
    check_map(name, input)
    out, scales = check_resizing(name, input, size, scale_factor, mode, align_corners, recompute_scale_factor)
    if dtype not in LABELS or input.shape[1] - 1 > torch.iinfo(dtype).max:
        raise ValueError(
            f"{name}: dtype must be one of {', '.join(str(label) for label in LABELS)} and hold {input.shape[1]} "
            f"classes, but is {dtype}"
        )
    call = (input.detach(), out, scales, mode, bool(align_corners), dtype, bool(return_probability))
    UPSAMPLE_ARGMAX.choose(*call)
    labels, share = UPSAMPLE_ARGMAX(*call)
    return (labels, share) if return_probability else labels
