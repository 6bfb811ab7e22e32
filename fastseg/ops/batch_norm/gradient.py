"""Batch norm + ReLU (+ max-pooling or max-unpooling) as one differentiable function, and the same in torch alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.batch_norm.arguments import NormArguments
from ..operator import double_backward, wants_graph
from ..pooling.positions import to_indices
from .arguments import BatchNormCall, BatchNormOptions, Tail
from .batch_norm import BATCH_NORM_RELU, BATCH_NORM_RELU_BACKWARD, BATCH_NORM_RELU_SUMS, writable
from .batch_norm_pool import (
    BATCH_NORM_RELU_MAX_POOL2D,
    BATCH_NORM_RELU_MAX_POOL2D_BACKWARD,
    BATCH_NORM_RELU_MAX_POOL2D_SUMS,
)
from .batch_norm_unpool import BATCH_NORM_RELU_MAX_UNPOOL2D, BATCH_NORM_RELU_MAX_UNPOOL2D_SUMS
from .statistics import Statistics, gradient_means


class BatchNormReLUFunction(torch.autograd.Function):
    """(input, weight, bias, input_bias, statistics, options, tail) -> output, or (output, offsets) with a pooling.

    The backward reads the input twice: once for the sums over the pixels, once for the input's gradient.
    """

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None, statistics: Statistics,
        options: BatchNormOptions, tail: Tail | None,
    ) -> Any:  # fmt: skip
        norm = statistics.norm_arguments(weight, bias, options)
        if tail is None:
            return BATCH_NORM_RELU(input, norm)
        if tail.offsets is None:
            return BATCH_NORM_RELU_MAX_POOL2D(input, tail.geometry, tail.ceil_mode, tail.keep_offsets, norm)
        return BATCH_NORM_RELU_MAX_UNPOOL2D(input, tail.offsets, tail.geometry, tail.output_size, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, weight, bias, input_bias, statistics, ctx.options, tail = inputs
        ctx.geometry = None if tail is None else tail.geometry
        offsets = None if tail is None else tail.offsets
        ctx.unpools = offsets is not None
        if tail is not None and not ctx.unpools:
            offsets = output[1]
            ctx.mark_non_differentiable(offsets)
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, input_bias, offsets, *statistics)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        gradients = _differentiable_gradients if wants_graph() else _gradients
        return *gradients(ctx, grad), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of input, weight, bias and input_bias from the kernels."""
    input, weight, bias, input_bias, offsets, *saved = ctx.saved_tensors
    statistics, options, geometry = Statistics(*saved), ctx.options, ctx.geometry
    norm = statistics.norm_arguments(weight, bias, options)
    needs_input, needs_weight, needs_bias, needs_input_bias = ctx.needs_input_grad[:4]
    pools = geometry is not None and not ctx.unpools
    # 1. The sums over the pixels; an unpooling's gradient is gathered on the way
    sums = None
    if ctx.unpools:
        grad, sums = BATCH_NORM_RELU_MAX_UNPOOL2D_SUMS(grad, offsets, input, geometry, norm)
    elif options.training or needs_weight or needs_bias or needs_input_bias:
        if pools:
            sums = BATCH_NORM_RELU_MAX_POOL2D_SUMS(grad, offsets, input, geometry, norm)
        else:
            sums = BATCH_NORM_RELU_SUMS(grad, input, norm)
    # 2. The input's gradient
    grad_input = None
    if needs_input:
        means = gradient_means(sums, statistics.count, options.process_group) if options.training else None
        if pools:
            grad_input = BATCH_NORM_RELU_MAX_POOL2D_BACKWARD(grad, offsets, input, means, geometry, norm)
        else:
            grad_input = BATCH_NORM_RELU_BACKWARD(grad, input, means, norm)
    # 3. The parameters' gradients
    return [
        grad_input,
        sums[1].to(weight.dtype) if needs_weight else None,
        sums[0].to(bias.dtype) if needs_bias else None,
        _input_bias_gradient(sums[0], norm, input_bias, options.training) if needs_input_bias else None,
    ]


def _input_bias_gradient(total: Tensor, norm: NormArguments, input_bias: Tensor, training: bool) -> Tensor:
    """Zero in training: a constant added to the input moves the batch's mean by as much and cancels out."""
    if training:
        return torch.zeros_like(input_bias)
    return (total * _scale(norm.var, norm.weight, norm.eps)).to(input_bias.dtype)


def _scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight / sqrt(var + eps) in float32 at least, because a small eps underflows in half precision."""
    scale = (var.to(torch.promote_types(var.dtype, torch.float32)) + eps).rsqrt()
    return scale if weight is None else scale * weight


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The four gradients by torch's own formulas, which can be differentiated again."""
    input, weight, bias, input_bias, offsets, *saved = ctx.saved_tensors
    statistics, geometry = Statistics(*saved), ctx.geometry
    if ctx.options.process_group is not None:
        raise RuntimeError("batch_norm_relu: double backward is not supported with process_group")
    running = (None, None) if ctx.options.training else (statistics.mean, statistics.var)

    def composed(input: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None) -> Tensor:
        y = torch_batch_norm_relu(BatchNormCall(input, *running, weight, bias, input_bias, ctx.options))
        if geometry is None:
            return y
        if ctx.unpools:
            indices = to_indices(offsets, geometry, grad.shape[-1])
            return F.max_unpool2d(
                y, indices, geometry.kernel_size, geometry.stride, geometry.padding, output_size=grad.shape[-2:]
            )
        indices = to_indices(offsets, geometry, y.shape[-1])
        return y.flatten(-2).gather(-1, indices.flatten(-2)).view(grad.shape)

    return double_backward(composed, (input, weight, bias, input_bias), ctx.needs_input_grad[:4], grad)


class _GiveZeroGradient(torch.autograd.Function):
    """(values, input_bias) -> values. input_bias, which cancels out, gets the gradient zero in place of none."""

    @staticmethod
    def forward(values: Tensor, input_bias: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(*ctx.saved_tensors)


def torch_batch_norm_relu(call: BatchNormCall) -> Tensor:
    """The call in torch's own batch_norm and relu.

    input_bias is not added to the input, which would cost a pass over it, but to the running mean or to the bias.
    """
    training, momentum, eps, relu, _ = call.options
    bias, input_bias, shifted_mean = call.bias, call.input_bias, call.running_mean
    if input_bias is not None:
        bias = torch.zeros_like(input_bias) if bias is None else bias
        if training:
            bias = _GiveZeroGradient.apply(bias, input_bias)
            shifted_mean = None if call.running_mean is None else call.running_mean - input_bias.detach()
        else:
            bias = (bias + input_bias * _scale(call.running_var, call.weight, eps)).to(bias.dtype)
    y = F.batch_norm(call.input, shifted_mean, call.running_var, call.weight, bias, training, momentum, eps)
    if shifted_mean is not call.running_mean:
        writable(call.running_mean).copy_(shifted_mean + input_bias.detach())
    return F.relu(y, inplace=True) if relu else y
