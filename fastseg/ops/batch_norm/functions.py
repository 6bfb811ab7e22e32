"""Batch norm + ReLU (+ max-pooling or max-unpooling) as one differentiable function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import IntOrPair, require_tensor
from ..operator import double_backward, wants_graph
from ..pooling.geometry import PoolGeometry, pool_geometry
from ..pooling.pool import checked_geometry, max_pool2d, max_pool2d_with_offsets
from ..pooling.positions import to_indices
from ..pooling.unpool import check_unpool, max_unpool2d_with_offsets, unpooled_size
from .operators import BACKWARD, BATCH_NORM_RELU, SUMS, means_of, movable, statistics
from .pooling_operators import POOL, POOL_BACKWARD, POOL_SUMS, UNPOOL, UNPOOL_SUMS


class BatchNormReLUFunction(torch.autograd.Function):
    """relu(batch norm of the input), then nothing, or max-pooling, or max-unpooling; two passes back.

    offsets and geometry: neither, or geometry for pooling, or both for unpooling. rest: ceil_mode and whether offsets
    are kept for pooling, output_size for unpooling.
    """

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None, mean: Tensor,
        shift: Tensor | None, var: Tensor, count: Tensor | None, offsets: Tensor | None, geometry: PoolGeometry | None,
        rest: tuple[Any, ...], eps: float, relu: bool, training: bool, group: Any,
    ) -> Any:  # fmt: skip
        norm = (mean, shift, var, weight, bias, eps, relu)
        if geometry is None:
            return BATCH_NORM_RELU(input, *norm)
        if offsets is None:
            return POOL(input, geometry, *rest, *norm)
        return UNPOOL(input, offsets, geometry, *rest, *norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, weight, bias, input_bias, mean, shift, var, count, offsets, ctx.geometry, _, *ctx.settings = inputs
        ctx.unpools = offsets is not None
        if ctx.geometry is not None and not ctx.unpools:
            offsets = output[1]
            ctx.mark_non_differentiable(offsets)
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, input_bias, mean, shift, var, count, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        input, weight, bias, input_bias, mean, shift, var, count, offsets = ctx.saved_tensors
        eps, relu, training, group = ctx.settings
        norm = (mean, shift, var, weight, bias, eps, relu)
        needed = ctx.needs_input_grad[:4]
        unneeded = (None,) * 11
        if grad is None:
            return (None,) * 15
        if wants_graph():
            return *_gradients_with_graph(ctx, grad), *unneeded
        sums, windows = None, ctx.geometry
        if training or any(needed[1:]) or ctx.unpools:
            if windows is None:
                sums = SUMS(grad, input, *norm)
            elif ctx.unpools:
                grad, sums = UNPOOL_SUMS(grad, offsets, input, windows, *norm)
            else:
                sums = POOL_SUMS(grad, offsets, input, windows, *norm)
        found: list[Tensor | None] = [None] * 4
        if needed[0]:
            means = means_of(sums, count, group) if training else None
            if windows is None or ctx.unpools:
                found[0] = BACKWARD(grad, input, means, *norm)
            else:
                found[0] = POOL_BACKWARD(grad, offsets, input, means, windows, *norm)
        if needed[1]:
            found[1] = sums[1].to(weight.dtype)
        if needed[2]:
            found[2] = sums[0].to(bias.dtype)
        if needed[3]:
            found[3] = _gradient_of_input_bias(sums[0], norm, input_bias, training)
        return *found, *unneeded


def _gradient_of_input_bias(total: Tensor, norm: Any, input_bias: Tensor, training: bool) -> Tensor:
    """A constant that is added to the input moves the batch's mean by as much, and so nothing else."""
    if training:
        return torch.zeros_like(input_bias)
    return (total * _scale(norm[2], norm[3], norm[5])).to(input_bias.dtype)


def _scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight / sqrt(var + eps), in float32 at least: half precision has no such eps."""
    scale = (var.to(torch.promote_types(var.dtype, torch.float32)) + eps).rsqrt()
    return scale if weight is None else scale * weight


def _gradients_with_graph(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The four gradients by torch's own formulas, to be differentiated again."""
    input, weight, bias, input_bias, mean, _, var, _, offsets = ctx.saved_tensors
    eps, relu, training, group = ctx.settings
    if group is not None:
        raise RuntimeError("batch_norm_relu: a backward with create_graph=True has no form for a process group")

    def composed(input: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None) -> Tensor:
        running = (None, None) if training else (mean, var)
        y = _batch_normalised(input, *running, weight, bias, input_bias, training, 0.0, eps, relu)
        if ctx.geometry is None:
            return y
        if ctx.unpools:
            indices = to_indices(offsets, ctx.geometry, grad.shape[-1])
            return F.max_unpool2d(y, indices, *ctx.geometry[:3], output_size=grad.shape[-2:])
        indices = to_indices(offsets, ctx.geometry, y.shape[-1])
        return y.flatten(-2).gather(-1, indices.flatten(-2)).view(grad.shape)

    return double_backward(composed, (input, weight, bias, input_bias), ctx.needs_input_grad[:4], grad)


class _Absorbed(torch.autograd.Function):
    """(values, input_bias) -> values: the bias has a gradient, which is zero, as every parameter of a step has."""

    @staticmethod
    def forward(values: Tensor, input_bias: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(*ctx.saved_tensors)


def _batch_normalised(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, input_bias: Tensor | None, training: bool, momentum: float, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """torch's own batch norm and ReLU, with the input's bias in the running mean in place of the input."""
    moved = running_mean
    if input_bias is not None:
        bias = torch.zeros_like(input_bias) if bias is None else bias
        if training:
            bias = _Absorbed.apply(bias, input_bias)
            moved = None if running_mean is None else running_mean - input_bias.detach()
        else:
            bias = (bias + input_bias * _scale(running_var, weight, eps)).to(bias.dtype)
    y = F.batch_norm(input, moved, running_var, weight, bias, training, momentum, eps)
    if moved is not running_mean:
        movable(running_mean).copy_(moved + input_bias.detach())
    return F.relu(y, inplace=True) if relu else y


def _check(
    function: str, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, input_bias: Tensor | None, training: bool, eps: float, grouped: bool = False,
    windows: bool = False,
) -> None:  # fmt: skip
    require_tensor(function, "input", input)
    if windows and input.dim() != 4:
        raise RuntimeError(f"{function}: input must be (N, C, H, W), but has shape {tuple(input.shape)}")
    if input.dim() < 2:
        raise RuntimeError(f"{function}: input must be (N, C, ...), but has shape {tuple(input.shape)}")
    vectors = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, input_bias=input_bias)
    for name, values in vectors.items():
        if values is None:
            continue
        require_tensor(function, name, values)
        if values.shape != input.shape[1:2]:
            raise RuntimeError(
                f"{function}: {name} must be of shape ({input.shape[1]},), one value a channel of the input, but is of "
                f"{tuple(values.shape)}"
            )
        if values.device != input.device:
            raise RuntimeError(
                f"{function}: {name} must be on input's device {input.device}, but is on {values.device}"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{function}: running_mean and running_var must be given both or neither")
    if not training and running_mean is None:
        raise RuntimeError(f"{function}: running_mean must be a Tensor where training is False, but is None")
    if training and not grouped and input.numel() == input.shape[1]:
        raise ValueError(f"{function}: expected more than 1 value per channel when training, got {tuple(input.shape)}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{function}: eps must be {'positive' if training else 'at least 0'}, but is {eps}")


def _normalise(
    plain: Callable[[Tensor], Any], backend: str, input: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool, input_bias: Tensor | None, group: Any, offsets: Tensor | None = None,
    geometry: PoolGeometry | None = None, rest: tuple[Any, ...] = (),
) -> Any:  # fmt: skip
    """Where `backend` is torch, `plain` of torch's own functions; else the operators."""
    if backend == "torch" and not (training and group is not None):
        return plain(
            _batch_normalised(input, running_mean, running_var, weight, bias, input_bias, training, momentum, eps, relu)
        )
    found = statistics(input, running_mean, running_var, input_bias, training, momentum, group)
    return BatchNormReLUFunction.apply(
        input, weight, bias, input_bias, *found, offsets, geometry, rest, eps, relu, training, group
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
    name = "batch_norm_relu"
    _check(name, input, running_mean, running_var, weight, bias, input_bias, training, eps, process_group is not None)
    norm = (input, running_mean, running_var, weight, bias, training, momentum, eps, relu, input_bias, process_group)
    choice = BATCH_NORM_RELU.choose(input)
    return _normalise(lambda y: y, choice.backend, *norm)


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
    _check(
        name,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        input_bias,
        training,
        eps,
        process_group is not None,
        windows=True,
    )
    geometry = checked_geometry(name, input, pool_geometry(name, kernel_size, stride, padding), ceil_mode)
    norm = (input, running_mean, running_var, weight, bias, training, momentum, eps, relu, input_bias, process_group)

    def pooled(y: Tensor) -> Any:
        function = max_pool2d_with_offsets if return_offsets else max_pool2d
        return function(y, *geometry, ceil_mode=ceil_mode)

    if not geometry.has_cells:
        return pooled(_normalise(lambda y: y, BATCH_NORM_RELU.choose(input).backend, *norm))
    leaves = (input, weight, bias, input_bias)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    keep = return_offsets or differentiated
    choice = POOL.choose(input, geometry)
    result = _normalise(pooled, choice.backend, *norm, None, geometry, (ceil_mode, keep))
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
    _check(
        name,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        input_bias,
        training,
        eps,
        process_group is not None,
        windows=True,
    )
    check_unpool(name, input, offsets, "offsets", torch.uint8)
    geometry = pool_geometry(name, kernel_size, stride, padding)
    size = unpooled_size(name, input.shape[-2:], geometry, output_size)
    norm = (input, running_mean, running_var, weight, bias, training, momentum, eps, relu, input_bias, process_group)

    def unpooled(y: Tensor) -> Tensor:
        return max_unpool2d_with_offsets(y, offsets, *geometry[:3], output_size=size)

    if not geometry.has_cells:
        return unpooled(_normalise(lambda y: y, BATCH_NORM_RELU.choose(input).backend, *norm))
    choice = UNPOOL.choose(input, offsets, geometry)
    return _normalise(unpooled, choice.backend, *norm, offsets, geometry, (size,))
