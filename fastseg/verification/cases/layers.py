"""Pooling, unpooling, batch norms and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...ops.operator import memory_format
from .case import Case, Placement, in_words


def max_pool2d(
    at: Placement, shape: Sequence[int], kernel: Any = 2, stride: Any = 2, padding: Any = 0, ceil_mode: bool = False
) -> Iterator[Case]:
    """Pooling with torch's indices, and with offsets (compared after conversion to indices)."""
    geometry = (kernel, stride, padding)
    size = in_words(shape, f"k{kernel} s{stride} p{padding}", *["ceil"] * ceil_mode)
    inputs = {"input": at.tensor(*shape)}

    def indexed(x: Tensor, function: Callable[..., Any] = functional.max_pool2d) -> Any:
        return function(x, *geometry, ceil_mode=ceil_mode, return_indices=True)

    def with_offsets(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.max_pool2d_with_offsets(x, *geometry, ceil_mode=ceil_mode)

    def offsets_of_torch(x: Tensor) -> tuple[Tensor, Tensor]:
        y, indices = theirs(x)
        return y, functional.indices_to_offsets(indices, *geometry, width=shape[-1])

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        return indexed(x, F.max_pool2d)

    yield Case("max_pool2d", size, indexed, theirs, inputs)
    yield Case("max_pool2d_with_offsets", size, with_offsets, offsets_of_torch, inputs, theirs)


def max_unpool2d(
    at: Placement, shape: Sequence[int], kernel: Any = 2, stride: Any = 2, padding: Any = 0, ceil_mode: bool = False
) -> Iterator[Case]:
    """Unpooling to `shape`, from torch's indices and from the offsets that say the same."""
    geometry = (kernel, stride, padding)
    size = in_words(shape, f"k{kernel} s{stride} p{padding}", *["ceil"] * ceil_mode)
    plane = torch.randn(shape, device="meta" if at.device == "meta" else "cpu")
    pooled, indices = F.max_pool2d(plane, *geometry, ceil_mode=ceil_mode, return_indices=True)
    indices = indices.to(at.device).contiguous(memory_format=at.layout)
    offsets = functional.indices_to_offsets(indices, *geometry, width=shape[-1])
    inputs = {"input": at.tensor(*pooled.shape), "indices": indices, "offsets": offsets}
    kept = {"output_size": list(shape[-2:])}

    def theirs(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return F.max_unpool2d(x, indices, *geometry, **kept)

    def ours(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return functional.max_unpool2d(x, indices, *geometry, **kept)

    def with_offsets(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return functional.max_unpool2d_with_offsets(x, offsets, *geometry, **kept)

    def eager(*inputs: Tensor) -> Tensor:
        return theirs(*inputs).contiguous(memory_format=at.layout)

    yield Case("max_unpool2d", size, ours, theirs, inputs, eager)
    yield Case("max_unpool2d_with_offsets", size, with_offsets, theirs, inputs, eager)


def max_unpool2d_anywhere(at: Placement, shape: Sequence[int]) -> Iterator[Case]:
    """Unpooling by 2 from indices that no pool made: anywhere in the plane, none twice."""
    n, c, h, w = shape
    draws = torch.stack([torch.randperm(4 * h * w)[: h * w] for _ in range(n * c)]).view(n, c, h, w)
    inputs = {"input": at.tensor(*shape), "indices": draws.to(at.device).contiguous(memory_format=at.layout)}
    yield Case(
        "max_unpool2d",
        in_words(shape, "any indices"),
        lambda x, indices: functional.max_unpool2d(x, indices, 2),
        lambda x, indices: F.max_unpool2d(x, indices, 2),
        inputs,
    )


def _apart(x: Tensor, kernel: int) -> Tensor:
    """Values no two of which are near each other in any window: half precision must not choose another maximum."""
    levels = (2 * x.float()).round() / 2
    rows, columns = (torch.arange(size, device=x.device) % kernel for size in x.shape[-2:])
    steps = (rows[:, None] * kernel + columns) * (0.5 / kernel**2)
    return (
        (levels + steps + x.float().sin() * (0.05 / kernel**2)).to(x.dtype).contiguous(memory_format=memory_format(x))
    )


def batch_norm_relu(
    at: Placement, shape: Sequence[int], kernel: int = 2, ceil_mode: bool = True, conv_bias: bool = True
) -> Iterator[Case]:
    """Batch norm in training with the ReLU behind it; with pooling behind; with the unpooling that undoes it.

    conv_bias: behind a convolution whose bias torch adds and ours absorbs.
    """
    channels = shape[1]
    running = [torch.zeros(channels, device=at.device), torch.ones(channels, device=at.device)]

    def inputs(image: Sequence[int]) -> dict[str, Any]:
        vectors = {name: at.parameters(channels) for name in ("weight", "bias", "conv bias")}
        return {"input": _apart(at.tensor(*image), kernel), **(vectors if conv_bias else vectors | {"conv bias": None})}

    def ours(function: Callable[..., Any], **rest: Any) -> Callable[..., Any]:
        def call(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *offsets: Tensor) -> Any:
            moved = [t.clone().to(weight.dtype) for t in running]
            return function(x, *offsets[1:], *moved, weight, bias, training=True, **rest, input_bias=added)

        return call

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *_: Tensor) -> Tensor:
        moved = [t.clone().to(weight.dtype) for t in running]
        y = x if added is None else x + added.to(x.dtype).view(1, -1, 1, 1)
        return F.relu(F.batch_norm(y, *moved, weight, bias, training=True))

    def pooled(*inputs: Tensor) -> Tensor:
        return F.max_pool2d(theirs(*inputs), kernel, ceil_mode=ceil_mode, return_indices=True)[0]

    yield Case("batch_norm_relu", in_words(shape), ours(functional.batch_norm_relu), theirs, inputs(shape))
    size = in_words(shape, f"k{kernel}", *["ceil"] * ceil_mode)
    fused = ours(functional.batch_norm_relu_max_pool2d, kernel_size=kernel, ceil_mode=ceil_mode)
    yield Case("batch_norm_relu_max_pool2d", size, fused, pooled, inputs(shape))
    plane = torch.randn(shape, device="meta" if at.device == "meta" else "cpu")
    small, indices = F.max_pool2d(plane, kernel, ceil_mode=ceil_mode, return_indices=True)
    indices = indices.to(at.device).contiguous(memory_format=at.layout)
    offsets = functional.indices_to_offsets(indices, kernel, kernel, 0, width=shape[-1])

    def unpooled(*inputs: Tensor) -> Tensor:
        return F.max_unpool2d(theirs(*inputs), inputs[-2], kernel, output_size=shape[-2:])

    def eager(*inputs: Tensor) -> Tensor:
        return unpooled(*inputs).contiguous(memory_format=at.layout)

    fused = ours(functional.batch_norm_relu_max_unpool2d, kernel_size=kernel, output_size=shape[-2:])
    places = {"indices": indices, "offsets": offsets}
    yield Case("batch_norm_relu_max_unpool2d", size, fused, unpooled, inputs(small.shape) | places, eager)


def max_unpool2d_conv2d(at: Placement, shape: Sequence[int], out_channels: int, kernel: int = 2) -> Iterator[Case]:
    """Unpooling by `kernel` and the 3x3 convolution behind it, forward: where a gradient is wanted there are two."""
    _, c, h, w = shape
    size = (kernel * h, kernel * w)
    offsets = at.labels(kernel**2, *shape).to(torch.uint8).contiguous(memory_format=at.layout)
    weight = at.tensor(out_channels, c, 3, 3) / (9 * c) ** 0.5
    inputs = {"input": at.tensor(*shape), "weight": weight, "bias": at.tensor(out_channels), "offsets": offsets}

    def ours(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        with torch.no_grad():
            return functional.max_unpool2d_conv2d(x, offsets, weight, bias, kernel, output_size=size)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        with torch.no_grad():
            indices = functional.offsets_to_indices(offsets, kernel, kernel, 0, width=size[1])
            return F.conv2d(F.max_unpool2d(x, indices, kernel, output_size=size), weight, bias, padding=1)

    yield Case("max_unpool2d_conv2d", in_words(shape, f"to {out_channels} k{kernel}"), ours, theirs, inputs)


def conv_transpose2d(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Iterator[Case]:  # fmt: skip
    """Transposed convolution with a bias, weights in the layout of the input."""
    geometry = (stride, padding, output_padding, groups, dilation)
    inputs = _conv_inputs(at, shape, out_channels, kernel, groups) | {"bias": at.tensor(out_channels)}
    size = in_words(shape, _conv_words(out_channels, kernel, *geometry))
    yield Case(
        "conv_transpose2d", size, lambda *t: functional.conv_transpose2d(*t, *geometry),
        lambda *t: F.conv_transpose2d(*t, *geometry), inputs,
    )  # fmt: skip


def conv_transpose2d_affine_relu(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Iterator[Case]:  # fmt: skip
    """Transposed convolution with a folded batch norm and ReLU in its epilogue."""
    geometry = (stride, padding, output_padding, groups, dilation)
    inputs = _conv_inputs(at, shape, out_channels, kernel, groups)
    inputs |= {"scale": at.tensor(out_channels).float(), "shift": at.tensor(out_channels).float()}
    size = in_words(shape, _conv_words(out_channels, kernel, *geometry))

    def theirs(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, weight, None, *geometry)
        return (y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]).relu()

    yield Case(
        "conv_transpose2d_affine_relu", size, lambda *t: functional.conv_transpose2d_affine_relu(*t, *geometry),
        theirs, inputs,
    )  # fmt: skip


def _conv_inputs(
    at: Placement, shape: Sequence[int], out_channels: int, kernel: int | tuple[int, int], groups: int
) -> dict[str, Any]:
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = at.tensor(shape[1], out_channels // groups, kh, kw) / (shape[1] // groups * kh * kw) ** 0.5
    return {"input": at.tensor(*shape), "weight": weight}


def _conv_words(
    out_channels: int, kernel: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> str:
    rest = [f"g{groups}"] * (groups != 1) + [f"d{dilation}"] * (dilation != 1)
    return " ".join([f"to {out_channels} k{kernel} s{stride} p{padding} op{output_padding}", *rest])
