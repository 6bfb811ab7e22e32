"""batch_norm_relu, alone and with max-pooling or max-unpooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import IntOrPair
from ..pooling.geometry import pool_geometry
from ..pooling.pool import checked_geometry, max_pool2d, max_pool2d_with_offsets
from ..pooling.unpool import check_unpool, max_unpool2d_with_offsets, unpooled_size
from .arguments import BatchNormCall, BatchNormOptions, Tail
from .batch_norm import BATCH_NORM_RELU
from .batch_norm_pool import BATCH_NORM_RELU_MAX_POOL2D
from .batch_norm_unpool import BATCH_NORM_RELU_MAX_UNPOOL2D
from .gradient import BatchNormReLUFunction, torch_batch_norm_relu
from .statistics import statistics_of


def _unchanged(y: Tensor) -> Tensor:
    return y


def _run(
    call: BatchNormCall, backend: str, tail: Tail | None = None, torch_tail: Callable[[Tensor], Any] = _unchanged
) -> Any:
    """Run a call on the kernels, or on torch's own functions with `torch_tail` in place of `tail`.

    torch's batch_norm knows no process group, so a training call with one always runs the operators.
    """
    grouped = call.options.training and call.options.process_group is not None
    if backend == "torch" and not grouped:
        return torch_tail(torch_batch_norm_relu(call))
    return BatchNormReLUFunction.apply(
        call.input, call.weight, call.bias, call.input_bias, statistics_of(call), call.options, tail
    )


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = True,
    input_bias: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """relu(torch.nn.functional.batch_norm(input, ...)) in two passes over the input, and two back.

    input: (N, C, H, W), any float dtype (other ranks go to torch); the output keeps dtype and memory format.
    running_mean, running_var, weight, bias: (C,), in the input's dtype or float32. training: normalise with the
    batch's mean and biased variance, and move the running ones (unbiased) by `momentum`, in place.

    relu: False leaves the ReLU out. input_bias (C,): the bias of a convolution before, which has *not* been added to
    input; in training it moves running_mean and its gradient is zero, since the mean takes it out again; in
    evaluation it is added. process_group: of torch.distributed; in training the statistics and their gradients are
    those of the batches of all its processes together.

    Statistics are Welford's in float32 (float64 for float64), in a fixed order: deterministic. For the backward
    nothing of full size is kept but the input. Raises ValueError and RuntimeError where torch does: a single value a
    channel in training, eps below 0, vectors of another length.
    """
    options = BatchNormOptions(training, momentum, eps, relu, process_group)
    call = BatchNormCall(input, running_mean, running_var, weight, bias, input_bias, options)
    call.check("batch_norm_relu")
    return _run(call, BATCH_NORM_RELU.choose(input).backend)


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: IntOrPair = 2,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    *,
    return_offsets: bool = False,
    relu: bool = True,
    input_bias: Tensor | None = None,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """max_pool2d(batch_norm_relu(input, ...)) without storing the map between.

    Returns the pooled map, and with return_offsets the uint8 offsets of max_pool2d_with_offsets too. The maximum is
    that of the values as the map between would hold them, so that both give the same. Windows that overlap, or of a
    stride of more than 64 elements, run as two operators. Everything else is as in batch_norm_relu and
    max_pool2d_with_offsets.
    """
    name = "batch_norm_relu_max_pool2d"
    options = BatchNormOptions(training, momentum, eps, relu, process_group)
    call = BatchNormCall(input, running_mean, running_var, weight, bias, input_bias, options)
    call.check_images(name)
    geometry = checked_geometry(name, input, pool_geometry(name, kernel_size, stride, padding), ceil_mode)

    def pooled(y: Tensor) -> Any:
        function = max_pool2d_with_offsets if return_offsets else max_pool2d
        return function(y, *geometry, ceil_mode=ceil_mode)

    if not geometry.has_cells:
        return pooled(_run(call, BATCH_NORM_RELU.choose(input).backend))
    leaves = (input, weight, bias, input_bias)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    tail = Tail(geometry, ceil_mode, keep_offsets=return_offsets or differentiated)
    backend = BATCH_NORM_RELU_MAX_POOL2D.choose(input, geometry).backend
    result = _run(call, backend, tail, pooled)
    return result if return_offsets or isinstance(result, Tensor) else result[0]


def batch_norm_relu_max_unpool2d(
    input: Tensor,
    offsets: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: IntOrPair = 2,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
    *,
    relu: bool = True,
    input_bias: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """max_unpool2d_with_offsets(batch_norm_relu(input, ...), offsets, ...) without storing the map between.

    offsets: uint8, of input's shape, as max_pool2d_with_offsets gives them. Windows that overlap, or of a
    stride of more than 64 elements, run as two operators. Everything else is as in batch_norm_relu and
    max_unpool2d_with_offsets.
    """
    name = "batch_norm_relu_max_unpool2d"
    options = BatchNormOptions(training, momentum, eps, relu, process_group)
    call = BatchNormCall(input, running_mean, running_var, weight, bias, input_bias, options)
    call.check_images(name)
    check_unpool(name, input, offsets, "offsets", torch.uint8)
    geometry = pool_geometry(name, kernel_size, stride, padding)
    size = unpooled_size(name, input.shape[-2:], geometry, output_size)

    def unpooled(y: Tensor) -> Tensor:
        return max_unpool2d_with_offsets(
            y, offsets, geometry.kernel_size, geometry.stride, geometry.padding, output_size=size
        )

    if not geometry.has_cells:
        return unpooled(_run(call, BATCH_NORM_RELU.choose(input).backend))
    backend = BATCH_NORM_RELU_MAX_UNPOOL2D.choose(input, offsets, geometry).backend
    return _run(call, backend, Tail(geometry, offsets=offsets, output_size=size), unpooled)
