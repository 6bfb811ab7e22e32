"""The operators of cross_entropy on logits (N, C, H, W): in two passes, or in one, whose forward makes the gradient."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...kernels import losses as triton_kernels
from ...kernels.cpu import losses as cpu_kernels
from ...kernels.cuda import losses as cuda_kernels
from ...kernels.losses.options import LossInputs, LossOptions, LossResults, OnePassResults
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, HALF_DTYPES, accumulator
from ..operator import (
    MOST_THREADS,
    Implementation,
    Operator,
    dense,
    empty,
    empty_like,
    for_backends,
    memory_format,
)
from .checks import LABEL_DTYPES, number_of_classes, pixels_shape, require_labels_in_range
from .reference import differentiable_loss, gradient, mean_denominator, predict, target_distribution

ONE_PASS_CLASSES = 256  # the most classes of one pass: a program holds all classes of its pixels


FEW_LOGITS = 2**18  # for each thread of a CPU: with fewer the Python code around the kernels costs more than they save


def unsupported(input: Tensor, target: Tensor, weight: Tensor | None = None) -> str | None:
    """What of a call the Triton and the CPU kernels do not support, in words, or None. Takes logits of any rank."""
    if input.dtype not in FLOAT_AND_DOUBLE_DTYPES:
        return f"dtype {input.dtype}"
    if number_of_classes(input) == 0:
        return "input without classes"
    if not target.is_floating_point():
        return None if target.dtype in LABEL_DTYPES else f"a target of dtype {target.dtype}"
    if target.dtype not in FLOAT_AND_DOUBLE_DTYPES or accumulator(target.dtype) != accumulator(input.dtype):
        return f"class probabilities of dtype {target.dtype} for logits of {input.dtype}"
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        return "a gradient of class probabilities or of weight"
    return None


def _unsupported_by_cuda(
    input: Tensor, target: Tensor, weight: Tensor | None = None, predicted: torch.dtype | None = None
) -> str | None:
    if target.is_floating_point():
        return "class probabilities"
    return "predictions" if predicted is not None else unsupported(input, target, weight)


def few_logits(input: Tensor) -> bool:
    """Whether torch is as fast on a CPU as the kernels."""
    threads = 1 if torch.compiler.is_compiling() else min(torch.get_num_threads(), MOST_THREADS)
    layouts = 2 if memory_format(input) == torch.channels_last else 1  # torch takes twice the time in channels_last
    return input.numel() * layouts < FEW_LOGITS * threads


def preferred_on_cpu(input: Tensor, *rest: Any) -> dispatch.Preference | None:
    """torch for few logits on a CPU, and why; else None."""
    return ("torch", "torch is as fast for few logits") if few_logits(input) else None


# --- what the losses share -------------------------------------------------------------------------------------------


def empty_loss(input: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(loss, denominator), the latter without elements unless the loss is a mean."""
    dtype, layout = accumulator(input.dtype), torch.contiguous_format
    loss = empty(input, () if options.is_reduced else pixels_shape(input), layout, dtype)
    return loss, empty(input, () if options.is_mean else (0,), layout, dtype)


def empty_lse(input: Tensor, target: Tensor) -> Tensor:
    """lse in the terms of kernels/losses/common.py.

    They are the maximum and the rest, whose sum would lose digits, or in half precision their sum; and for class
    probabilities the sum of a pixel's target.
    """
    terms = (1 if input.dtype in HALF_DTYPES else 2) + target.is_floating_point()
    return empty(input, (terms, *pixels_shape(input)), torch.contiguous_format, accumulator(input.dtype))


def empty_predictions(input: Tensor, predicted: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(prediction, counts) in LossResults, without elements if no prediction is requested."""
    layout = torch.contiguous_format
    if predicted is None:
        return empty(input, (0,), layout, torch.uint8), empty(input, (0,), layout, torch.int64)
    return empty(input, pixels_shape(input), layout, predicted), empty(input, (2,), layout, torch.int64)


def _dense_inputs(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[LossInputs, bool]:
    """The tensors without gaps, and whether the logits are channels_last."""
    layout = memory_format(input)
    targets = dense(target, layout if target.is_floating_point() else torch.contiguous_format)
    weight = None if weight is None else weight.contiguous()
    return LossInputs(dense(input, layout), targets, weight), layout == torch.channels_last


def _prepare(kernels: ModuleType, input: Tensor, target: Tensor, options: LossOptions, denominator: Tensor) -> None:
    """Before a forward on the kernels: fill a denominator that is known, and check the labels."""
    if options.reduction == "count":
        denominator.fill_(options.count)
    if kernels is not cpu_kernels:  # which raise IndexError themselves
        require_labels_in_range("cross_entropy", input.shape[1], target, options.ignore_index)


# --- two passes ------------------------------------------------------------------------------------------------------


def _empty_results(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
) -> LossResults:
    loss, denominator = empty_loss(input, options)
    return LossResults(loss, empty_lse(input, target), denominator, *empty_predictions(input, predicted))


def _cross_entropy_kernel(
    kernels: ModuleType, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions,
    predicted: torch.dtype | None,
) -> LossResults:  # fmt: skip
    results = _empty_results(input, target, weight, options, predicted)
    _prepare(kernels, input, target, options, results.denominator)
    inputs, channels_last = _dense_inputs(input, target, weight)
    kernels.cross_entropy.cross_entropy_fwd(inputs, options, channels_last, results)
    return results


def _cross_entropy_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
) -> LossResults:
    require_labels_in_range("cross_entropy", input.shape[1], target, options.ignore_index)
    results = _empty_results(input, target, weight, options, predicted)
    results.loss.copy_(differentiable_loss(input, target, weight, options))
    logits = input.to(results.loss.dtype)
    highest = logits.amax(1)
    above = (logits - highest.unsqueeze(1)).exp().sum(1).log()  # NaN where torch's softmax is
    terms = [highest + above] if input.dtype in HALF_DTYPES else [highest, above]
    if target.is_floating_point():
        terms.append(target_distribution(input, target, weight, options)[0].sum(1))
    results.lse.copy_(torch.stack(terms))
    if options.is_mean:
        results.denominator.copy_(mean_denominator(input, target, weight, options))
    if predicted is not None:
        best, counts = predict(input, target, options.ignore_index)
        results.prediction.copy_(best)
        results.counts.copy_(counts)
    return results


CROSS_ENTROPY = Operator(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, LossOptions options, ScalarType? predicted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            partial(_cross_entropy_kernel, triton_kernels),
            lambda input, target, weight, *rest: unsupported(input, target, weight),
        ),
        "cuda": Implementation(
            partial(_cross_entropy_kernel, cuda_kernels),
            lambda input, target, weight, options, predicted: _unsupported_by_cuda(input, target, weight, predicted),
        ),
        "cpu": Implementation(
            partial(_cross_entropy_kernel, cpu_kernels),
            lambda input, target, weight, *rest: unsupported(input, target, weight),
            preferred_on_cpu,
        ),
    },
    reference=_cross_entropy_reference,
    fake=_empty_results,
)


def _empty_gradient(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty_like(input)


def _cross_entropy_backward_kernel(
    kernels: ModuleType, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
    denominator: Tensor, options: LossOptions,
) -> Tensor:  # fmt: skip
    grad_input = _empty_gradient(grad, input)
    inputs, channels_last = _dense_inputs(input, target, weight)
    kernels.cross_entropy_bwd.cross_entropy_bwd(
        grad.contiguous(), inputs, lse.contiguous(), denominator, options, channels_last, grad_input
    )
    return grad_input


def _cross_entropy_backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    options: LossOptions,
) -> Tensor:  # fmt: skip
    return gradient(grad, input, target, weight, denominator, options)


CROSS_ENTROPY_BACKWARD = Operator(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    "Tensor denominator, LossOptions options) -> Tensor",
    kernels={
        "triton": Implementation(
            partial(_cross_entropy_backward_kernel, triton_kernels),
            lambda grad, input, target, *rest: unsupported(input, target),
        ),
        "cuda": Implementation(
            partial(_cross_entropy_backward_kernel, cuda_kernels),
            lambda grad, input, target, *rest: _unsupported_by_cuda(input, target),
        ),
        "cpu": Implementation(
            partial(_cross_entropy_backward_kernel, cpu_kernels),
            lambda grad, input, target, *rest: unsupported(input, target),
        ),
    },
    reference=_cross_entropy_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)


# --- one pass --------------------------------------------------------------------------------------------------------


def _empty_one_pass(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
) -> OnePassResults:
    loss, denominator = empty_loss(input, options)
    grad_input = empty_like(input)
    packed = empty(
        input, target.shape if options.sums_denominator else (0,), torch.contiguous_format,
        torch.uint8 if input.shape[1] < 256 else torch.int16,
    )  # fmt: skip
    return OnePassResults(loss, grad_input, packed, denominator, *empty_predictions(input, predicted))


def _one_pass_kernel(
    kernels: ModuleType, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions,
    predicted: torch.dtype | None,
) -> OnePassResults:  # fmt: skip
    results = _empty_one_pass(input, target, weight, options, predicted)
    _prepare(kernels, input, target, options, results.denominator)
    inputs, channels_last = _dense_inputs(input, target, weight)
    kernels.cross_entropy_one_pass.cross_entropy_one_pass(inputs, options, channels_last, results)
    return results


def _one_pass_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
) -> OnePassResults:
    loss, _, denominator, *predictions = _cross_entropy_reference(input, target, weight, options, predicted)
    grad_input = gradient(torch.ones_like(loss), input, target, weight, denominator, options)
    packed = _empty_one_pass(input, target, weight, options, predicted).packed_labels
    if packed.numel():
        packed.copy_(target.long().masked_fill(target.long() == options.ignore_index, -1))
    return OnePassResults(loss, grad_input, packed, denominator, *predictions)


CROSS_ENTROPY_ONE_PASS = Operator(
    "cross_entropy_one_pass(Tensor input, Tensor target, Tensor? weight, LossOptions options, ScalarType? predicted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels=for_backends(
        _one_pass_kernel,
        lambda input, target, weight, *rest: unsupported(input, target, weight),
        triton=triton_kernels,
        cpu=cpu_kernels,
    ),
    reference=_one_pass_reference,
    fake=_empty_one_pass,
)


def _one_pass_backward_kernel(
    kernels: ModuleType, grad_input: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
    denominator: Tensor, options: LossOptions,
) -> None:  # fmt: skip
    inputs, channels_last = _dense_inputs(input, target, weight)
    kernels.cross_entropy_one_pass.cross_entropy_one_pass_bwd(
        grad, inputs, denominator, options, channels_last, grad_input
    )


def _one_pass_backward_reference(
    grad_input: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, denominator: Tensor,
    options: LossOptions,
) -> None:  # fmt: skip
    recomputed = gradient(grad, input, target, weight, denominator, options)
    grad_input.copy_(torch.where(grad == 1, grad_input, recomputed))


CROSS_ENTROPY_ONE_PASS_BACKWARD = Operator(
    "cross_entropy_one_pass_backward_(Tensor(a!) grad_input, Tensor grad_output, Tensor input, Tensor target, "
    "Tensor? weight, Tensor denominator, LossOptions options) -> ()",
    kernels=for_backends(
        _one_pass_backward_kernel,
        lambda grad_input, grad, input, target, *rest: unsupported(input, target),
        triton=triton_kernels,
        cpu=cpu_kernels,
    ),
    reference=_one_pass_backward_reference,
    fake=lambda *args: None,
    gradient=True,
)


def one_pass_labels(target: Tensor, packed: Tensor, options: LossOptions) -> tuple[Tensor, LossOptions]:
    """The labels that the one-pass backward reads, and the options with the value that marks ignored pixels in them."""
    if packed.numel() == 0:
        return target, options
    return packed, options._replace(ignore_index=255 if packed.dtype == torch.uint8 else -1)
