"""The operators of upsample_cross_entropy: the kernels, and in torch a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...kernels import losses as triton_kernels
from ...kernels.cpu import losses as cpu_kernels
from ...kernels.losses.options import LossInputs, LossOptions, LossResults, Resizing
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, accumulator
from ..operator import Implementation, Operator, empty, empty_like, memory_format
from .checks import require_labels_in_range
from .chunked_reference import (
    chunk_gradient,
    chunk_losses,
    chunk_losses_and_gradient,
    reduce_chunks,
    smoothed_shares,
)
from .cross_entropy_operators import empty_loss, empty_lse, empty_predictions
from .reference import predict
from .resizing import unsupported_resizing
from .row_chunks import RowChunks

NAME = "upsample_cross_entropy"
FEW_LOGITS = 2**14  # resized ones, on a CPU


def resized_shape(input: Tensor, size: Sequence[int]) -> Tensor:
    """A view in the shape of the resized logits, without memory of its own, for code that reads the shape alone."""
    return input[:, :, :1, :1].expand(-1, -1, *size)


def _unsupported(input: Tensor, target: Tensor) -> str | None:
    if target.is_floating_point():
        return "a target of class probabilities"
    return unsupported_resizing(input, target.shape[1:])


def _unsupported_on_cpu(input: Tensor, target: Tensor) -> str | None:
    if target.is_floating_point():
        return "a target of class probabilities"
    return unsupported_resizing(input, target.shape[1:], FLOAT_AND_DOUBLE_DTYPES)


def few_logits(input: Tensor, target: Tensor) -> bool:
    """Whether torch's two functions are as fast on a CPU as the kernels, and the resized logits take little memory."""
    return input.shape[1] * target.numel() < FEW_LOGITS


def _preferred_on_cpu(input: Tensor, target: Tensor) -> dispatch.Preference | None:
    return ("torch", "torch is as fast for few logits") if few_logits(input, target) else None


def _inputs(input: Tensor, target: Tensor, weight: Tensor | None) -> LossInputs:
    return LossInputs(input, target.contiguous(), None if weight is None else weight.contiguous())


# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_results(
    input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
    predicted: torch.dtype | None,
) -> LossResults:  # fmt: skip
    large = resized_shape(input, target.shape[1:])
    loss, denominator = empty_loss(large, options)
    return LossResults(loss, empty_lse(large, target), denominator, *empty_predictions(large, predicted))


def _kernel(
    kernels: ModuleType, input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing,
    options: LossOptions, predicted: torch.dtype | None,
) -> LossResults:  # fmt: skip
    if kernels is not cpu_kernels:  # which raise IndexError themselves
        require_labels_in_range(NAME, input.shape[1], target, options.ignore_index)
    results = _empty_results(input, target, weight, resizing, options, predicted)
    if options.reduction == "count":
        results.denominator.fill_(options.count)
    inputs = _inputs(input, target, weight)
    kernels.upsample_cross_entropy.upsample_cross_entropy_fwd(inputs, resizing, options, results)
    return results


def in_chunks(
    input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
    predicted: torch.dtype | None, gradient: Tensor | None = None,
) -> LossResults:  # fmt: skip
    """The operator in torch, a chunk of rows at a time.

    gradient: filled with the gradient of the sum of the losses, in float32 or float64, if it is given; lse is not
    written then.
    """
    require_labels_in_range(NAME, input.shape[1], target, options.ignore_index)
    results = _empty_results(input, target, weight, resizing, options, predicted)
    loss, lse, denominator, prediction, counts = results
    counts.zero_()
    chunks = RowChunks.of(input, target.shape[1:], resizing)
    buffer, small = chunks.buffer(), None if gradient is None else chunks.empty(*input.shape[2:])
    shares = smoothed_shares(buffer, weight, options.label_smoothing)
    parts = []
    for n, image in enumerate(input):
        if small is not None:
            small.zero_()
        for rows in chunks:
            values, labels = chunks.values(image, rows, buffer), target[n, rows].long()
            if predicted is not None:  # before the losses overwrite the values
                best, found = predict(values, target[n : n + 1, rows], options.ignore_index)
                prediction[n, rows] = best[0]
                counts += found
            if small is not None:
                losses, divisor = chunk_losses_and_gradient(values, labels, weight, shares, options)
                chunks.add_gradient(values, rows, small)
            else:
                losses, divisor, *terms = chunk_losses(values, labels, weight, shares, options)
                lse[:, n, rows] = torch.stack(terms) if len(lse) == 2 else sum(terms)
            if options.is_reduced:
                parts.append((losses.sum(), divisor.sum(dtype=losses.dtype)))
            else:
                loss[n, rows] = losses
        if small is not None:
            gradient[n] = small[0]
    if options.is_reduced:
        reduce_chunks(parts, options, loss, denominator)
    return results


UPSAMPLE_CROSS_ENTROPY = Operator(
    "upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, Resizing resizing, LossOptions options, "
    "ScalarType? predicted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            partial(_kernel, triton_kernels), lambda input, target, *rest: _unsupported(input, target)
        ),
        "cpu": Implementation(
            partial(_kernel, cpu_kernels),
            lambda input, target, *rest: _unsupported_on_cpu(input, target),
            lambda input, target, *rest: _preferred_on_cpu(input, target),
        ),
    },
    reference=in_chunks,
    fake=_empty_results,
)


# --- backward --------------------------------------------------------------------------------------------------------


def _empty_gradient(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty_like(input)


def _backward_with(kernels: ModuleType) -> Callable[..., Tensor]:
    """The implementation by a package of launchers."""

    def run(
        grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
        resizing: Resizing, options: LossOptions,
    ) -> Tensor:  # fmt: skip
        grad_input = _empty_gradient(grad, input)
        inputs = _inputs(input, target, weight)
        kernels.upsample_cross_entropy.upsample_cross_entropy_bwd(
            grad.contiguous(), inputs, lse.contiguous(), denominator, resizing, options, grad_input
        )
        return grad_input

    return run


def _backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    resizing: Resizing, options: LossOptions,
) -> Tensor:  # fmt: skip
    chunks = RowChunks.of(input, target.shape[1:], resizing)
    buffer, small = chunks.buffer(), chunks.empty(*input.shape[2:])
    shares = smoothed_shares(buffer, weight, options.label_smoothing)
    grad_input = _empty_gradient(grad, input)
    if options.is_mean:
        grad = grad / denominator
    grad = grad.expand(target.shape)
    for n, image in enumerate(input):
        small.zero_()
        for rows in chunks:
            values, labels = chunks.values(image, rows, buffer), target[n, rows].long()
            gradient = chunk_gradient(values, labels, weight, shares, lse[:, n, rows], grad[n, rows], options)
            chunks.add_gradient(gradient, rows, small)
        grad_input[n] = small[0]
    return grad_input


UPSAMPLE_CROSS_ENTROPY_BACKWARD = Operator(
    "upsample_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    "Tensor denominator, Resizing resizing, LossOptions options) -> Tensor",
    kernels={
        "triton": Implementation(
            _backward_with(triton_kernels), lambda grad, input, target, *rest: _unsupported(input, target)
        ),
        "cpu": Implementation(
            _backward_with(cpu_kernels),
            lambda grad, input, target, *rest: _unsupported_on_cpu(input, target),
        ),
    },
    reference=_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)


# --- one pass on a CPU -----------------------------------------------------------------------------------------------


def _empty_one_pass(
    input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
    predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    large = resized_shape(input, target.shape[1:])
    loss, denominator = empty_loss(large, options)
    gradient = empty(input, input.shape, memory_format(input), accumulator(input.dtype))
    return loss, gradient, denominator, *empty_predictions(large, predicted)


def _one_pass_kernel(
    input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
    predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    results = _empty_one_pass(input, target, weight, resizing, options, predicted)
    loss, gradient, denominator, *predictions = results
    if options.reduction == "count":
        denominator.fill_(options.count)
    filled = LossResults(loss, loss.new_empty(0), denominator, *predictions)
    inputs = _inputs(input, target, weight)
    cpu_kernels.upsample_cross_entropy.upsample_cross_entropy_fwd(inputs, resizing, options, filled, gradient)
    return results


def _one_pass_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
    predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    gradient = empty(input, input.shape, memory_format(input), accumulator(input.dtype))
    results = in_chunks(input, target, weight, resizing, options, predicted, gradient)
    return results.loss, gradient, results.denominator, results.prediction, results.counts


# For a mean or a sum. The second result is the gradient of the sum of the losses, in float32 or float64.
UPSAMPLE_CROSS_ENTROPY_ONE_PASS = Operator(
    "upsample_cross_entropy_one_pass(Tensor input, Tensor target, Tensor? weight, Resizing resizing, "
    "LossOptions options, ScalarType? predicted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        "cpu": Implementation(
            _one_pass_kernel,
            lambda input, target, *rest: _unsupported_on_cpu(input, target),
            lambda input, target, *rest: _preferred_on_cpu(input, target),
        ),
    },
    reference=_one_pass_reference,
    fake=_empty_one_pass,
)
