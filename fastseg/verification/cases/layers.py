"""Cases of pooling, unpooling, batch norm and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...ops.operator import memory_format
from .case import Case, Placement, describe
from .specs import POOL_BY_2, ConvTransposeSpec, PoolSpec


def max_pool2d(at: Placement, shape: Sequence[int], pool: PoolSpec = POOL_BY_2) -> Iterator[Case]:
    """Pooling that returns torch's indices, and pooling that returns offsets (converted to indices to compare)."""
    size = describe(shape, *pool.words())
    inputs = {"input": at.tensor(*shape)}

    def indexed(x: Tensor, function: Callable[..., Any] = functional.max_pool2d) -> Any:
        return function(x, *pool.geometry, ceil_mode=pool.ceil_mode, return_indices=True)

    def with_offsets(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.max_pool2d_with_offsets(x, *pool.geometry, ceil_mode=pool.ceil_mode)

    def offsets_of_torch(x: Tensor) -> tuple[Tensor, Tensor]:
        y, indices = theirs(x)
        return y, functional.indices_to_offsets(indices, *pool.geometry, width=shape[-1])

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        return indexed(x, F.max_pool2d)

    yield Case("max_pool2d", size, indexed, theirs, inputs)
    yield Case("max_pool2d_with_offsets", size, with_offsets, offsets_of_torch, inputs, theirs)


def max_unpool2d(at: Placement, shape: Sequence[int], pool: PoolSpec = POOL_BY_2) -> Iterator[Case]:
    """Unpooling to `shape`, from torch's indices and from the equivalent offsets."""
    size = describe(shape, *pool.words())
    plane = torch.randn(shape, device="meta" if at.device == "meta" else "cpu")
    pooled, indices = F.max_pool2d(plane, *pool.geometry, ceil_mode=pool.ceil_mode, return_indices=True)
    indices = indices.to(at.device).contiguous(memory_format=at.layout)
    offsets = functional.indices_to_offsets(indices, *pool.geometry, width=shape[-1])
    inputs = {"input": at.tensor(*pooled.shape), "indices": indices, "offsets": offsets}
    output_size = list(shape[-2:])

    def theirs(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return F.max_unpool2d(x, indices, *pool.geometry, output_size=output_size)

    def ours(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return functional.max_unpool2d(x, indices, *pool.geometry, output_size=output_size)

    def with_offsets(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return functional.max_unpool2d_with_offsets(x, offsets, *pool.geometry, output_size=output_size)

    def eager(*inputs: Tensor) -> Tensor:
        return theirs(*inputs).contiguous(memory_format=at.layout)

    yield Case("max_unpool2d", size, ours, theirs, inputs, eager)
    yield Case("max_unpool2d_with_offsets", size, with_offsets, theirs, inputs, eager)


def max_unpool2d_anywhere(at: Placement, shape: Sequence[int]) -> Iterator[Case]:
    """Unpooling by 2 from indices that no pooling gives: anywhere in the plane, each at most once."""
    n, c, h, w = shape
    draws = torch.stack([torch.randperm(4 * h * w)[: h * w] for _ in range(n * c)]).view(n, c, h, w)
    inputs = {"input": at.tensor(*shape), "indices": draws.to(at.device).contiguous(memory_format=at.layout)}
    yield Case(
        "max_unpool2d",
        describe(shape, "any indices"),
        lambda x, indices: functional.max_unpool2d(x, indices, 2),
        lambda x, indices: F.max_unpool2d(x, indices, 2),
        inputs,
    )


def _well_separated(x: Tensor, kernel: int) -> Tensor:
    """Values that differ clearly within each window, so that rounding to half precision keeps the maximum."""
    levels = (2 * x.float()).round() / 2
    rows, columns = (torch.arange(size, device=x.device) % kernel for size in x.shape[-2:])
    steps = (rows[:, None] * kernel + columns) * (0.5 / kernel**2)
    separated = levels + steps + x.float().sin() * (0.05 / kernel**2)
    return separated.to(x.dtype).contiguous(memory_format=memory_format(x))


def batch_norm_relu(
    at: Placement, shape: Sequence[int], kernel: int = 2, ceil_mode: bool = True, conv_bias: bool = True
) -> Iterator[Case]:
    """Batch norm in training and ReLU; the same with a max-pooling; the same with an unpooling.

    conv_bias: the input comes from a convolution whose bias torch adds and fastseg's batch norm absorbs.
    """
    channels = shape[1]
    running = [torch.zeros(channels, device=at.device), torch.ones(channels, device=at.device)]

    def inputs(image: Sequence[int]) -> dict[str, Any]:
        vectors = {name: at.parameters(channels) for name in ("weight", "bias", "conv bias")}
        vectors = vectors if conv_bias else vectors | {"conv bias": None}
        return {"input": _well_separated(at.tensor(*image), kernel), **vectors}

    def ours(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *offsets: Tensor) -> Any:
            moved = [t.clone().to(weight.dtype) for t in running]
            return function(x, *offsets[1:], *moved, weight, bias, training=True, **options, input_bias=added)

        return call

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *_: Tensor) -> Tensor:
        moved = [t.clone().to(weight.dtype) for t in running]
        y = x if added is None else x + added.to(x.dtype).view(1, -1, 1, 1)
        return F.relu(F.batch_norm(y, *moved, weight, bias, training=True))

    def pooled(*inputs: Tensor) -> Tensor:
        return F.max_pool2d(theirs(*inputs), kernel, ceil_mode=ceil_mode, return_indices=True)[0]

    yield Case("batch_norm_relu", describe(shape), ours(functional.batch_norm_relu), theirs, inputs(shape))
    size = describe(shape, f"k{kernel}", *["ceil"] * ceil_mode)
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
    positions = {"indices": indices, "offsets": offsets}
    yield Case("batch_norm_relu_max_unpool2d", size, fused, unpooled, inputs(small.shape) | positions, eager)


def max_unpool2d_conv2d(at: Placement, shape: Sequence[int], out_channels: int, kernel: int = 2) -> Iterator[Case]:
    """Unpooling by `kernel` and a 3x3 convolution, forward only: with gradients, fastseg runs them separately."""
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

    yield Case("max_unpool2d_conv2d", describe(shape, f"to {out_channels} k{kernel}"), ours, theirs, inputs)


def conv_transpose2d(at: Placement, shape: Sequence[int], conv: ConvTransposeSpec) -> Iterator[Case]:
    """Transposed convolution with a bias; the weight is in the input's memory format."""
    inputs = _conv_inputs(at, shape, conv) | {"bias": at.tensor(conv.out_channels)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, weight, bias, *conv.geometry)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, *conv.geometry)

    yield Case("conv_transpose2d", describe(shape, *conv.words()), ours, theirs, inputs)


def conv_transpose2d_affine_relu(at: Placement, shape: Sequence[int], conv: ConvTransposeSpec) -> Iterator[Case]:
    """Transposed convolution with a folded batch norm and ReLU in its epilogue."""
    inputs = _conv_inputs(at, shape, conv)
    inputs |= {"scale": at.tensor(conv.out_channels).float(), "shift": at.tensor(conv.out_channels).float()}

    def ours(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.conv_transpose2d_affine_relu(x, weight, scale, shift, *conv.geometry)

    def theirs(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, weight, None, *conv.geometry)
        return (y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]).relu()

    yield Case("conv_transpose2d_affine_relu", describe(shape, *conv.words()), ours, theirs, inputs)


def _conv_inputs(at: Placement, shape: Sequence[int], conv: ConvTransposeSpec) -> dict[str, Any]:
    """A random input, and a weight that keeps the magnitude of values."""
    kh, kw = conv.kernel_size
    weight = at.tensor(shape[1], conv.out_channels // conv.groups, kh, kw)
    weight = weight / (shape[1] // conv.groups * kh * kw) ** 0.5
    return {"input": at.tensor(*shape), "weight": weight}
