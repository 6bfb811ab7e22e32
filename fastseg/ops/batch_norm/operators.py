"""Batch norm with the ReLU behind it: what the operators mean, their torch reference, and the statistics of a call.

    y = relu(x_hat * weight + bias),   x_hat = (x - mean) / sqrt(var + eps)

mean and var are the batch's in training and the running ones in evaluation. Every operator takes them as vectors of
C, the mean in two terms: x - mean is computed as (x - mean) + shift, where shift is what rounding took from the mean
in training, and in evaluation the bias of the convolution before, which has not been added to x. In training such a
bias cancels out of y and of every gradient; it moves running_mean and nothing else.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ... import torch_internals
from ...kernels import batch_norm as triton_kernels
from ...kernels.cuda import batch_norm as cuda_kernels
from ..operator import Implementation, Operator, dense, empty, memory_format, placed

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NORM = "Tensor mean, Tensor? shift, Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu"

Norm = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, float, bool]  # the arguments of NORM


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def uncovered(input: Tensor) -> str | None:
    """Why the kernels cannot run a call, in words, or None."""
    if input.dtype not in KERNEL_DTYPES:
        return f"dtype {input.dtype}"
    if input.dim() != 4:
        return f"{input.dim()}-D input"
    return "an empty batch" if input.numel() == 0 else None


def kernel_norm(
    mean: Tensor, shift: Tensor | None, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    relu: bool, code: ModuleType = triton_kernels,
) -> Any:  # fmt: skip
    """What the kernels take for NORM: they read vectors one value behind the other."""
    vectors = (None if t is None else t.contiguous() for t in (mean, shift, var, weight, bias))
    return code.batch_norm.Norm(*vectors, eps, relu)


def vector(values: Tensor, like: Tensor) -> Tensor:
    """A value for each channel, to be broadcast along `like` (N, C, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


# --- operators -------------------------------------------------------------------------------------------------------


def _empty_stats(
    input: Tensor, input_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=accumulator(input.dtype))


def _stats_kernel(
    code: ModuleType, input: Tensor, input_bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float,
) -> Tensor:  # fmt: skip
    stats = _empty_stats(input, input_bias, running_mean, running_var, momentum)
    layout = memory_format(input)
    given = () if running_mean is None or running_var is None else (running_mean, running_var)
    running = tuple(t.contiguous() for t in given)
    input_bias = None if input_bias is None else input_bias.contiguous()
    code.batch_norm.batch_norm_stats(
        dense(input, layout), input_bias, running or None, momentum, stats, layout == torch.channels_last
    )
    for buffer, moved in zip(given, running, strict=True):
        if moved is buffer:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(moved)
    return stats


def _stats_reference(
    input: Tensor, input_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Tensor:
    dims = [0, *range(2, input.dim())]
    var, mean = torch.var_mean(input.to(accumulator(input.dtype)), dims, correction=0)
    stats = torch.stack([mean, torch.zeros_like(mean), var])
    if running_mean is not None and running_var is not None:
        count = input.numel() // input.shape[1]
        move_running(running_mean, running_var, mean, var * (count / (count - 1)), input_bias, momentum)
    return stats


def movable(running: Tensor) -> Tensor:
    """Running statistics, to be moved as torch moves them: autograd, which may hold them for another call, is not told.

    torch.export has no autograd, and takes what `.data` gives for another tensor. The flag is read itself: for torch
    2.11's Dynamo `is_exporting()` is true in every trace.
    """
    return running if torch_internals.exporting() else running.data


def move_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, unbiased: Tensor, input_bias: Tensor | None,
    momentum: float,
) -> None:  # fmt: skip
    """running = (1 - momentum) * running + momentum * batch, of the input with the bias added."""
    whole = mean if input_bias is None else mean + input_bias
    running_mean.lerp_(whole.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


STATS = Operator(
    "batch_norm_stats(Tensor input, Tensor? input_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum) -> Tensor",
    kernels={
        "triton": Implementation(partial(_stats_kernel, triton_kernels), lambda input, *rest: uncovered(input)),
        "cuda": Implementation(partial(_stats_kernel, cuda_kernels), lambda input, *rest: uncovered(input)),
    },
    reference=_stats_reference,
    fake=_empty_stats,
)


def like_input(input: Tensor, *rest: Any) -> Tensor:
    return empty(input, input.shape, memory_format(input))


def normalised(input: Tensor, norm: Norm) -> Tensor:
    """y by torch's own functions, differentiable in the input, weight and bias."""
    mean, shift, var, weight, bias, eps, relu = norm
    centre = mean if shift is None else mean - shift
    vectors = [None if t is None else t.to(mean.dtype) for t in (weight, bias)]
    if mean.dtype != accumulator(input.dtype):  # parameters in half precision: torch wants the input's
        centre, var, *vectors = (None if t is None else t.to(input.dtype) for t in (centre, var, *vectors))
    y = F.batch_norm(input, centre, var, *vectors, training=False, eps=eps)
    return F.relu(y) if relu else y


def _relu_kernel(code: ModuleType, input: Tensor, *norm: Any) -> Tensor:
    layout = memory_format(input)
    output = like_input(input)
    code.batch_norm.batch_norm_relu_fwd(
        dense(input, layout), kernel_norm(*norm, code), output, layout == torch.channels_last
    )
    return output


BATCH_NORM_RELU = Operator(
    f"batch_norm_relu(Tensor input, {NORM}) -> Tensor",
    kernels={
        "triton": Implementation(partial(_relu_kernel, triton_kernels), lambda input, *rest: uncovered(input)),
        "cuda": Implementation(partial(_relu_kernel, cuda_kernels), lambda input, *rest: uncovered(input)),
    },
    reference=lambda input, *norm: placed(normalised(input, norm), memory_format(input)),
    fake=like_input,
)


def empty_sums(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((4, input.shape[1]), dtype=accumulator(input.dtype))


def x_hat_and_gradient(grad: Tensor, input: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x_hat, and the gradient behind the ReLU."""
    mean, shift, var, _, _, eps, relu = norm
    T = accumulator(input.dtype)
    centred = input.to(T) - vector(mean if shift is None else mean - shift, input)
    x_hat = centred * vector((var + eps).rsqrt(), input)
    behind = grad.to(T)
    return x_hat, behind.masked_fill(normalised(input, (*norm[:-1], False)) <= 0, 0) if relu else behind


def sums_of(x_hat: Tensor, grad: Tensor) -> Tensor:
    """(4, C): sums of grad and grad * x_hat over the pixels, then their means."""
    dims = [0, *range(2, grad.dim())]
    sums = torch.stack([grad.sum(dims), (grad * x_hat).sum(dims)])
    return torch.cat([sums, sums / (grad.numel() // grad.shape[1])])


def _sums_kernel(code: ModuleType, grad: Tensor, input: Tensor, *norm: Any) -> Tensor:
    sums, layout = empty_sums(grad, input), memory_format(input)
    code.batch_norm.batch_norm_relu_sums(
        dense(grad, layout), dense(input, layout), kernel_norm(*norm, code), sums, layout == torch.channels_last
    )
    return sums


SUMS = Operator(
    f"batch_norm_relu_sums(Tensor grad_output, Tensor input, {NORM}) -> Tensor",
    kernels={
        "triton": Implementation(partial(_sums_kernel, triton_kernels), lambda grad, input, *rest: uncovered(input)),
        "cuda": Implementation(partial(_sums_kernel, cuda_kernels), lambda grad, input, *rest: uncovered(input)),
    },
    reference=lambda grad, input, *norm: sums_of(*x_hat_and_gradient(grad, input, norm)),
    fake=empty_sums,
    gradient=True,
)


def _backward_kernel(code: ModuleType, grad: Tensor, input: Tensor, means: Tensor | None, *norm: Any) -> Tensor:
    grad_input, layout = like_input(input), memory_format(input)
    code.batch_norm.batch_norm_relu_bwd(
        dense(grad, layout), dense(input, layout), kernel_norm(*norm, code),
        None if means is None else means.contiguous(), grad_input,
        layout == torch.channels_last,
    )  # fmt: skip
    return grad_input


def input_gradient(x_hat: Tensor, grad: Tensor, means: Tensor | None, input: Tensor, norm: Norm) -> Tensor:
    """The gradient of the input, from that behind the ReLU."""
    if means is not None:
        grad = grad - vector(means[0], grad) - x_hat * vector(means[1], grad)
    scale = (norm[2] + norm[5]).rsqrt()
    grad = grad * vector(scale if norm[3] is None else scale * norm[3], grad)
    return placed(grad.to(input.dtype), memory_format(input))


BACKWARD = Operator(
    f"batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor? means, {NORM}) -> Tensor",
    kernels={
        "triton": Implementation(
            partial(_backward_kernel, triton_kernels), lambda grad, input, *rest: uncovered(input)
        ),
        "cuda": Implementation(partial(_backward_kernel, cuda_kernels), lambda grad, input, *rest: uncovered(input)),
    },
    reference=lambda grad, input, means, *norm: input_gradient(
        *x_hat_and_gradient(grad, input, norm), means, input, norm
    ),
    fake=lambda grad, input, *rest: like_input(input),
    gradient=True,
)


# --- statistics of a call --------------------------------------------------------------------------------------------


def statistics(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, input_bias: Tensor | None, training: bool,
    momentum: float, group: Any,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """(mean, shift, var, count) that a call normalises with; count: pixels of all processes of the group, or None.

    In training the running statistics are moved. With a group they are those of all its processes' batches together.
    """
    if not training:
        assert running_mean is not None and running_var is not None  # _check has seen to it
        if torch.is_grad_enabled():  # a training step before the backward would move them
            running_mean, running_var = running_mean.clone(), running_var.clone()
        return running_mean, None if input_bias is None else input_bias.detach(), running_var, None
    input, input_bias = input.detach(), None if input_bias is None else input_bias.detach()
    if running_mean is not None and running_var is not None:
        running_mean, running_var = movable(running_mean), movable(running_var)
    if group is None:
        return *STATS(input, input_bias, running_mean, running_var, momentum).unbind(), None
    stats = STATS(input, None, None, None, momentum)
    pixels = stats.new_full((1, input.shape[1]), input.numel() // input.shape[1])
    mine = torch.cat([stats, pixels]).double()
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    head, shift, var, counts = torch.stack(everyones).unbind(1)
    count = counts.sum(0)
    shares = counts / count
    means = (head - shift).masked_fill(counts == 0, 0)  # a process may have an empty batch
    mean = (shares * means).sum(0)
    var = (shares * (var.masked_fill(counts == 0, 0) + (means - mean) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        move_running(running_mean, running_var, mean, var * (count / (count - 1)), input_bias, momentum)
    rounded = mean.to(stats.dtype)
    return rounded, (rounded - mean).to(stats.dtype), var.to(stats.dtype), count[0]


def means_of(sums: Tensor, count: Tensor | None, group: Any) -> Tensor:
    """(2, C): the means of grad and grad * x_hat, over the pixels of all processes of the group."""
    if group is None:
        return sums[2:]
    total = sums[:2].clone()
    dist.all_reduce(total, group=group)
    return total / count.to(total.dtype)
