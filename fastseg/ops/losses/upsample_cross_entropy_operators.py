"""The operators of upsample_cross_entropy: the triton_kernels, and torch a band of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ..operator import Implementation, Operator, empty, memory_format
from .checks import refuse_strays
from .chunked_reference import chunk_gradient, chunk_losses, chunk_losses_and_gradient, even_shares, reduced
from .cross_entropy_operators import SCHEMA, _empty_loss, _empty_lse, _empty_predictions
from .reference import right_ones
from .upsample import Bands, uncovered

NAME = "upsample_cross_entropy"


class Arguments(NamedTuple):
    """What the operators take besides tensors: of check_resizing, and cross_entropy_operators.Arguments."""

    scales: Sequence[float] | None
    mode: str
    align_corners: bool
    reduction: str
    count: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


RESIZING = "float[]? scales, str mode, bool align_corners"


def _large(input: Tensor, size: Sequence[int]) -> Tensor:
    """A tensor of the resized logits' shape that has no memory of its own, for what looks at shapes alone."""
    return input[:, :, :1, :1].expand(-1, -1, *size)


def _uncovered(input: Tensor, target: Tensor) -> str | None:
    if target.is_floating_point():
        return "a target of class probabilities"
    return uncovered(input, target.shape[1:])


def _empty_results(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, predicted = rest
    large = _large(input, target.shape[1:])
    loss, denominator = _empty_loss(large, Arguments(*arguments).reduction)
    return loss, _empty_lse(large, target), denominator, *_empty_predictions(large, predicted)


def _kernel(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    scales, mode, align_corners, reduction, count, *others, _ = rest
    refuse_strays(NAME, input.shape[1], target, others[0])
    loss, lse, denominator, *predictions = _empty_results(input, target, weight, *rest)
    if reduction == "count":
        denominator.fill_(count)
    triton_kernels.upsample_cross_entropy.upsample_cross_entropy_fwd(
        input, target.contiguous(), None if weight is None else weight.contiguous(), scales, mode, align_corners,
        reduction, *others, loss, lse, denominator, *predictions,
    )  # fmt: skip
    return loss, lse, denominator, *predictions


def _reference(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _in_bands(input, target, weight, None, *rest)


def _in_bands(
    input: Tensor, target: Tensor, weight: Tensor | None, gradient: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator in torch, a band of rows at a time.

    gradient: None, or what takes the gradient of the losses' sum, in the computed dtype; then lse is not written.
    """
    *arguments, predicted = rest
    a = Arguments(*arguments)
    refuse_strays(NAME, input.shape[1], target, a.ignore_index)
    loss, lse, denominator, prediction, counts = _empty_results(input, target, weight, *rest)
    counts.zero_()
    bands = Bands.of(input, target.shape[1:], a.scales, a.mode, a.align_corners)
    buffer, small = bands.buffer(), None if gradient is None else bands.empty(*input.shape[2:])
    shares = even_shares(weight, a.label_smoothing, buffer)
    options = (a.reduction, a.ignore_index, a.label_smoothing, a.z_loss)
    parts = []
    for n, picture in enumerate(input):
        if small is not None:
            small.zero_()
        for rows in bands:
            values, labels = bands.values(picture, rows, buffer), target[n, rows].long()
            if predicted is not None:  # what follows overwrites the values
                best, found = right_ones(values, target[n : n + 1, rows], a.ignore_index)
                prediction[n, rows] = best[0]
                counts += found
            if small is not None:
                losses, divisor = chunk_losses_and_gradient(values, labels, weight, shares, *options)
                bands.add_back(values, rows, small)
            else:
                losses, divisor, *terms = chunk_losses(values, labels, weight, shares, *options)
                lse[:, n, rows] = torch.stack(terms) if len(lse) == 2 else sum(terms)
            if a.reduction == "none":
                loss[n, rows] = losses
            else:
                parts.append((losses.sum(), divisor.sum(dtype=losses.dtype)))
        if small is not None:
            gradient[n] = small[0]
    if a.reduction != "none":
        reduced(parts, a.reduction, a.count, loss, denominator)
    return loss, lse, denominator, prediction, counts


UPSAMPLE_CROSS_ENTROPY = Operator(
    f"upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, {RESIZING}, {SCHEMA}, "
    "ScalarType? predicted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(_kernel, lambda input, target, *rest: _uncovered(input, target)),
    },
    reference=_reference,
    fake=_empty_results,
)


def _empty_gradient(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty(input, input.shape, memory_format(input))


def _backward_kernel(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor, *rest: Any
) -> Tensor:
    scales, mode, align_corners, reduction, _, *others = rest
    grad_input = _empty_gradient(grad, input)
    triton_kernels.upsample_cross_entropy.upsample_cross_entropy_bwd(
        grad.contiguous(), input, target.contiguous(), None if weight is None else weight.contiguous(),
        lse.contiguous(), denominator, scales, mode, align_corners, reduction, *others, grad_input,
    )  # fmt: skip
    return grad_input


def _backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor, *rest: Any
) -> Tensor:
    a = Arguments(*rest)
    bands = Bands.of(input, target.shape[1:], a.scales, a.mode, a.align_corners)
    buffer, small = bands.buffer(), bands.empty(*input.shape[2:])
    shares = even_shares(weight, a.label_smoothing, buffer)
    options = (a.ignore_index, a.label_smoothing, a.z_loss)
    grad_input = _empty_gradient(grad, input)
    if a.reduction not in ("none", "sum"):
        grad = grad / denominator
    grad = grad.expand(target.shape)
    for n, picture in enumerate(input):
        small.zero_()
        for rows in bands:
            values = bands.values(picture, rows, buffer)
            labels = target[n, rows].long()
            change = chunk_gradient(values, labels, weight, shares, lse[:, n, rows], grad[n, rows], *options)
            bands.add_back(change, rows, small)
        grad_input[n] = small[0]
    return grad_input


UPSAMPLE_CROSS_ENTROPY_BACKWARD = Operator(
    "upsample_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    f"Tensor denominator, {RESIZING}, {SCHEMA}) -> Tensor",
    kernels={
        "triton": Implementation(_backward_kernel, lambda grad, input, target, *rest: _uncovered(input, target)),
    },
    reference=_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)
