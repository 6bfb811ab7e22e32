"""batch_norm_relu, alone and with max-pooling or max-unpooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import torch_internals
from ..arguments import IntOrPair
from ..operator import few_elements
from ..pooling.geometry import pool_geometry
from ..pooling.pool import checked_geometry, max_pool2d, max_pool2d_with_offsets
from ..pooling.unpool import check_unpool, max_unpool2d_with_offsets, unpooled_size
from .arguments import BatchNormCall, BatchNormOptions, Tail
from .batch_norm import BATCH_NORM_RELU
from .batch_norm_pool import BATCH_NORM_RELU_MAX_POOL2D
from .batch_norm_unpool import BATCH_NORM_RELU_MAX_UNPOOL2D
from .gradient import BatchNormReLUFunction, torch_batch_norm_relu
from .statistics import statistics_of

# On a CPU, in training and evaluation: see few_elements. Of an unpooling the input's elements count.
FEW_ELEMENTS = {
    True: {torch.contiguous_format: 2**18, torch.channels_last: 2**20},
    False: {torch.contiguous_format: 2**19, torch.channels_last: 2**19},
}
FEW_POOLED = {
    True: {torch.contiguous_format: 2**16, torch.channels_last: 2**18},
    False: {torch.contiguous_format: 2**15, torch.channels_last: 2**19},
}
FEW_UNPOOLED = {
    True: {torch.contiguous_format: 2**18, torch.channels_last: 2**17},
    False: {torch.contiguous_format: 2**20, torch.channels_last: 2**20},
}


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
    vectors = (call.weight, call.bias, call.input_bias)
    return torch_internals.apply(BatchNormReLUFunction, call.input, *vectors, statistics_of(call), call.options, tail)


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
    """Batch normalization and ReLU in two passes over the input in training, and two in the backward.

        output = relu((input + input_bias - mean) / sqrt(var + eps) * weight + bias)

    mean and var are those of the batch in training, with the biased variance, and the running ones in evaluation.

    Args:
        input: of any floating-point dtype.
        running_mean, running_var: the running statistics, or None for both in training. In training they are updated
            in place, with the unbiased variance.
        weight, bias: the scale and shift of each channel. Default: 1 and 0.
        training: normalize with the statistics of the batch.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        relu: False leaves out the ReLU.
        input_bias: the bias of the preceding convolution, if the convolution has not added it to the input. In
            training it only moves running_mean, because the mean cancels it out of the output; its gradient is zero.
        process_group: a group of torch.distributed. In training the statistics and their gradients are those of the
            batches of all its processes together.

    Shape:
        - input: (N, C, H, W). Inputs of any other rank (N, C, ...) fall back to PyTorch.
        - running_mean, running_var, weight, bias, input_bias: (C,), in the input's dtype or float32.
        - output: the shape, dtype and memory format of the input.

    Raises:
        TypeError, ValueError, RuntimeError: for arguments that torch refuses, for instance a single value per channel
            in training, or an eps that is not positive.
        NotImplementedError: if the kernels are requested for an input that they do not support.

    Note:
        Deterministic. Statistics are computed by Welford's algorithm in float32 (float64 for float64), in a fixed
        order; a mean far from zero loses no digits. The backward recomputes the ReLU's mask, so no tensor of full size
        is saved except the input. A backward with create_graph=True uses torch's formulas, which process_group rules
        out.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
        >>> mean, var = torch.zeros(1), torch.ones(1)
        >>> FS.batch_norm_relu(x, mean, var, training=True).round(decimals=3)
        tensor([[[[0.0000, 0.0000, 1.2250]]]])
        >>> mean, var
        (tensor([0.2000]), tensor([1.]))

    Source:
        torch.nn.functional.batch_norm; Ioffe and Szegedy, "Batch Normalization", ICML 2015.
    """
    options = BatchNormOptions(training, momentum, eps, relu, process_group)
    call = BatchNormCall(input, running_mean, running_var, weight, bias, input_bias, options)
    call.check("batch_norm_relu")
    return _run(call, BATCH_NORM_RELU.choose(input, preferred=few_elements(input, FEW_ELEMENTS[training])).backend)


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
    """Batch normalization, ReLU and max-pooling without storing the map that is pooled.

        output = max_pool2d(batch_norm_relu(input, ...), kernel_size, stride, padding, ceil_mode=ceil_mode)

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps: as in batch_norm_relu.
        kernel_size, stride, padding, ceil_mode: as in max_pool2d.
        return_offsets: also return where each maximum was, as max_pool2d_with_offsets does.
        relu, input_bias, process_group: as in batch_norm_relu.

    Shape:
        - input: (N, C, H, W).
        - output: (N, C, OH, OW), of the size that max_pool2d returns, in the dtype and memory format of the input.

    Returns:
        The pooled map; with `return_offsets` also uint8 offsets of its shape.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as batch_norm_relu and max_pool2d.

    Note:
        Deterministic, and bit for bit the result of the two functions: values are rounded to the input's dtype before
        they are compared. Besides the input one byte per pooled element is saved for the backward. Overlapping windows,
        and windows with a stride of more than 64 elements, run as two operators.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> x, mean, var = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([6.0]), torch.ones(1)
        >>> output, offsets = FS.batch_norm_relu_max_pool2d(x, mean, var, eps=0.0, return_offsets=True)
        >>> output
        tensor([[[[0., 1.],
                  [7., 9.]]]])
        >>> offsets
        tensor([[[[0, 3],
                  [3, 3]]]], dtype=torch.uint8)

    Source:
        torch.nn.functional.batch_norm, torch.nn.functional.max_pool2d.
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
        return pooled(
            _run(call, BATCH_NORM_RELU.choose(input, preferred=few_elements(input, FEW_ELEMENTS[training])).backend)
        )
    leaves = (input, weight, bias, input_bias)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    tail = Tail(geometry, ceil_mode, keep_offsets=return_offsets or differentiated)
    backend = BATCH_NORM_RELU_MAX_POOL2D.choose(
        input, geometry, preferred=few_elements(input, FEW_POOLED[training])
    ).backend
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
    """Batch normalization, ReLU and max-unpooling without storing the map that is unpooled.

        output = max_unpool2d_with_offsets(batch_norm_relu(input, ...), offsets, kernel_size, stride, padding,
                                           output_size)

    Args:
        input: the pooled map, of any floating-point dtype.
        offsets: uint8, of the input's shape, from max_pool2d_with_offsets or batch_norm_relu_max_pool2d.
        running_mean, running_var, weight, bias, training, momentum, eps: as in batch_norm_relu.
        kernel_size, stride, padding, output_size: as in max_unpool2d.
        relu, input_bias, process_group: as in batch_norm_relu.

    Shape:
        - input, offsets: (N, C, H, W).
        - output: (N, C) + output_size, in the input's dtype and memory format.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as batch_norm_relu and max_unpool2d_with_offsets.

    Note:
        Deterministic. Overlapping windows, and windows with a stride of more than 64 elements, run as two operators.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> pooled, offsets = FS.max_pool2d_with_offsets(torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]]), 2)
        >>> FS.batch_norm_relu_max_unpool2d(pooled, offsets, torch.ones(1), torch.ones(1), eps=0.0)
        tensor([[[[0., 0.],
                  [3., 0.]]]])

    Source:
        torch.nn.functional.batch_norm, torch.nn.functional.max_unpool2d.
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
        return unpooled(
            _run(call, BATCH_NORM_RELU.choose(input, preferred=few_elements(input, FEW_ELEMENTS[training])).backend)
        )
    backend = BATCH_NORM_RELU_MAX_UNPOOL2D.choose(
        input, offsets, geometry, preferred=few_elements(input, FEW_UNPOOLED[training])
    ).backend
    return _run(call, backend, Tail(geometry, offsets=offsets, output_size=size), unpooled)
