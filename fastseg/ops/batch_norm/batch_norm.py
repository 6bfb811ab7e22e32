"""The operators of batch norm + ReLU: statistics, forward, the two sums of the backward, and the input's gradient.

    y = relu(x_hat * weight + bias),   x_hat = (x - mean) / sqrt(var + eps)

mean and var are those of the batch in training and the running ones in evaluation. NormArguments says in which two
terms the mean is passed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import torch_internals
from ...kernels import batch_norm as triton_kernels
from ...kernels.cpu import batch_norm as cpu_kernels
from ...kernels.cuda import batch_norm as cuda_kernels
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, accumulator
from ..operator import Operator, dense, empty_like, for_backends, memory_format, placed
from .arguments import NormArguments, RunningStatistics


def unsupported_input(input: Tensor, *rest: Any) -> str | None:
    """What of a call on `input` the kernels do not support, in words, or None."""
    if input.dtype not in FLOAT_AND_DOUBLE_DTYPES:
        return f"dtype {input.dtype}"
    if input.dim() != 4:
        return f"{input.dim()}-D input"
    return "an empty batch" if input.numel() == 0 else None


def _unsupported_gradient(grad: Tensor, input: Tensor, *rest: Any) -> str | None:
    return unsupported_input(input)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """A vector of C as a view that broadcasts along `like` (N, C, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


# --- statistics ------------------------------------------------------------------------------------------------------


def _empty_stats(input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=accumulator(input.dtype))


def _stats_kernel(
    kernels: ModuleType, input: Tensor, input_bias: Tensor | None, running: RunningStatistics | None
) -> Tensor:
    stats = _empty_stats(input)
    layout = memory_format(input)
    input_bias = None if input_bias is None else input_bias.contiguous()
    updated = None
    if running is not None:
        updated = running._replace(
            running_mean=running.running_mean.contiguous(), running_var=running.running_var.contiguous()
        )
    kernels.batch_norm.batch_norm_stats(dense(input, layout), input_bias, updated, stats, layout == torch.channels_last)
    if running is not None and updated is not None:
        _store_update(running.running_mean, updated.running_mean)
        _store_update(running.running_var, updated.running_var)
    return stats


def _store_update(buffer: Tensor, updated: Tensor) -> None:
    """Copy an updated contiguous copy back; if the kernel wrote the buffer itself, tell autograd."""
    if updated is buffer:
        torch.autograd.graph.increment_version(buffer)
    else:
        buffer.copy_(updated)


def _stats_reference(input: Tensor, input_bias: Tensor | None, running: RunningStatistics | None) -> Tensor:
    dims = [0, *range(2, input.dim())]
    var, mean = torch.var_mean(input.to(accumulator(input.dtype)), dims, correction=0)
    if running is not None:
        count = input.numel() // input.shape[1]
        update_running(running, mean, var * (count / (count - 1)), input_bias)
    return torch.stack([mean, torch.zeros_like(mean), var])


def update_running(running: RunningStatistics, mean: Tensor, unbiased: Tensor, input_bias: Tensor | None) -> None:
    """running = (1 - momentum) * running + momentum * batch; the batch is the input with the bias added."""
    total = mean if input_bias is None else mean + input_bias
    running.running_mean.lerp_(total.to(running.running_mean.dtype), running.momentum)
    running.running_var.lerp_(unbiased.to(running.running_var.dtype), running.momentum)


def writable(running: Tensor) -> Tensor:
    """Running statistics as a tensor whose updates autograd does not see, because torch's batch_norm hides them too.

    Autograd may have saved the same buffer for the backward of another call. torch.export records no autograd graph,
    and treats the result of `.data` as another tensor. torch_internals reads the export flag itself, because in torch
    2.11 `is_exporting()` is true in every trace of Dynamo.
    """
    return running if torch_internals.exporting() else running.data


BATCH_NORM_STATS = Operator(
    "batch_norm_stats(Tensor input, Tensor? input_bias, RunningStatistics? running) -> Tensor",
    kernels=for_backends(_stats_kernel, unsupported_input, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels),
    reference=_stats_reference,
    fake=_empty_stats,
)


# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_output(input: Tensor, *rest: Any) -> Tensor:
    return empty_like(input)


def normalized(input: Tensor, norm: NormArguments) -> Tensor:
    """y in torch's own functions, differentiable in the input, weight and bias."""
    mean = norm.mean if norm.shift is None else norm.mean - norm.shift
    vectors = [mean, norm.var, norm.weight, norm.bias]
    # torch wants float32 vectors for half-precision inputs, or all vectors in the input's dtype.
    dtype = norm.mean.dtype if norm.mean.dtype == accumulator(input.dtype) else input.dtype
    mean, var, weight, bias = (None if t is None else t.to(dtype) for t in vectors)
    y = F.batch_norm(input, mean, var, weight, bias, training=False, eps=norm.eps)
    return F.relu(y) if norm.relu else y


def _batch_norm_relu_kernel(kernels: ModuleType, input: Tensor, norm: NormArguments) -> Tensor:
    layout = memory_format(input)
    output = empty_like(input)
    kernels.batch_norm.batch_norm_relu_fwd(
        dense(input, layout), norm.contiguous(), output, layout == torch.channels_last
    )
    return output


def _batch_norm_relu_reference(input: Tensor, norm: NormArguments) -> Tensor:
    return placed(normalized(input, norm), memory_format(input))


BATCH_NORM_RELU = Operator(
    "batch_norm_relu(Tensor input, NormArguments norm) -> Tensor",
    kernels=for_backends(
        _batch_norm_relu_kernel,
        unsupported_input,
        triton=triton_kernels,
        cuda=cuda_kernels,
        cpu=cpu_kernels,
    ),
    reference=_batch_norm_relu_reference,
    fake=_empty_output,
)


# --- backward: the sums over the pixels ------------------------------------------------------------------------------


def empty_sums(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    """Uninitialized sums (4, C)."""
    return input.new_empty((4, input.shape[1]), dtype=accumulator(input.dtype))


def x_hat_and_gradient(grad: Tensor, input: Tensor, norm: NormArguments) -> tuple[Tensor, Tensor]:
    """x_hat, and the gradient of the ReLU's input from that of its output."""
    wide = accumulator(input.dtype)
    mean = norm.mean if norm.shift is None else norm.mean - norm.shift
    x_hat = (input.to(wide) - per_channel(mean, input)) * per_channel((norm.var + norm.eps).rsqrt(), input)
    grad = grad.to(wide)
    if norm.relu:
        grad = grad.masked_fill(normalized(input, norm._replace(relu=False)) <= 0, 0)
    return x_hat, grad


def sums_of(x_hat: Tensor, grad: Tensor) -> Tensor:
    """(4, C): the sums of grad and grad * x_hat over the pixels, then their means."""
    dims = [0, *range(2, grad.dim())]
    sums = torch.stack([grad.sum(dims), (grad * x_hat).sum(dims)])
    return torch.cat([sums, sums / (grad.numel() // grad.shape[1])])


def _sums_kernel(kernels: ModuleType, grad: Tensor, input: Tensor, norm: NormArguments) -> Tensor:
    layout = memory_format(input)
    sums = empty_sums(grad, input)
    kernels.batch_norm.batch_norm_relu_sums(
        dense(grad, layout), dense(input, layout), norm.contiguous(), sums, layout == torch.channels_last
    )
    return sums


def _sums_reference(grad: Tensor, input: Tensor, norm: NormArguments) -> Tensor:
    return sums_of(*x_hat_and_gradient(grad, input, norm))


BATCH_NORM_RELU_SUMS = Operator(
    "batch_norm_relu_sums(Tensor grad_output, Tensor input, NormArguments norm) -> Tensor",
    kernels=for_backends(
        _sums_kernel, _unsupported_gradient, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels
    ),
    reference=_sums_reference,
    fake=empty_sums,
    gradient=True,
)


# --- backward: the input's gradient ----------------------------------------------------------------------------------


def input_gradient(x_hat: Tensor, grad: Tensor, means: Tensor | None, input: Tensor, norm: NormArguments) -> Tensor:
    """The gradient of the input, from the gradient of the ReLU's input."""
    if means is not None:
        grad = grad - per_channel(means[0], grad) - x_hat * per_channel(means[1], grad)
    scale = (norm.var + norm.eps).rsqrt()
    grad = grad * per_channel(scale if norm.weight is None else scale * norm.weight, grad)
    return placed(grad.to(input.dtype), memory_format(input))


def _empty_gradient(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty_like(input)


def _backward_kernel(
    kernels: ModuleType, grad: Tensor, input: Tensor, means: Tensor | None, norm: NormArguments
) -> Tensor:
    layout = memory_format(input)
    grad_input = empty_like(input)
    kernels.batch_norm.batch_norm_relu_bwd(
        dense(grad, layout),
        dense(input, layout),
        norm.contiguous(),
        None if means is None else means.contiguous(),
        grad_input,
        layout == torch.channels_last,
    )
    return grad_input


def _backward_reference(grad: Tensor, input: Tensor, means: Tensor | None, norm: NormArguments) -> Tensor:
    return input_gradient(*x_hat_and_gradient(grad, input, norm), means, input, norm)


BATCH_NORM_RELU_BACKWARD = Operator(
    "batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor? means, NormArguments norm) -> Tensor",
    kernels=for_backends(
        _backward_kernel, _unsupported_gradient, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels
    ),
    reference=_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)
