"""upsample_cross_entropy: what the operators mean, their torch reference, gradients and function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, kernels
from .cross_entropy import (
    _check_target,
    _check_types,
    _check_weight,
    _empty_losses,
    _reduction,
    _refuse_strays,
    _weights,
)
from .library import Operator, double_backward, empty, memory_format, placed, wants_graph
from .upsample import Bands, check_map, check_resizing, uncovered

SCHEMA = "float[]? scales, str mode, bool align_corners, str reduction, int ignore_index, float label_smoothing"


def _large(input: Tensor, size: Sequence[int]) -> Tensor:
    """A tensor of the resized logits' shape that has no memory of its own, for what looks at shapes alone."""
    return input[:, :, :1, :1].expand(-1, -1, *size)


def _uncovered(input: Tensor, target: Tensor) -> str | None:
    if target.is_floating_point():
        return "a target of class probabilities"
    return uncovered(input, target.shape[1:])


def _differentiable(
    input: Tensor, target: Tensor, weight: Tensor | None, scales: Sequence[float] | None, mode: str,
    align_corners: bool, reduction: str, ignore_index: int, label_smoothing: float,
) -> Tensor:  # fmt: skip
    """torch's two functions, in the computed dtype: they store the large logits."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    operator = getattr(torch.ops.aten, f"upsample_{mode}2d").default  # F.interpolate takes a size or scales, not both
    size = list(target.shape[-2:])
    corners = () if mode == "nearest" else (align_corners,)
    large = operator(input.to(dtype), size, *corners, *(scales or (None, None)))
    target = target if target.is_floating_point() else target.long()
    return F.cross_entropy(
        large, target, None if weight is None else weight.to(dtype), ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip


# --- operators -------------------------------------------------------------------------------------------------------


def _empty_results(
    input: Tensor, target: Tensor, weight: Tensor | None, scales: Sequence[float] | None, mode: str,
    align_corners: bool, reduction: str, ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_losses(input, target, weight, reduction, ignore_index)


def _kernel(
    input: Tensor, target: Tensor, weight: Tensor | None, scales: Sequence[float] | None, mode: str,
    align_corners: bool, reduction: str, ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _refuse_strays(_large(input, target.shape[1:]), target, ignore_index)
    losses = _empty_losses(input, target, weight, reduction, ignore_index)
    kernels.upsample_cross_entropy.upsample_cross_entropy_fwd(
        input, target.contiguous(), None if weight is None else weight.contiguous(), scales, mode, align_corners,
        reduction, ignore_index, label_smoothing, *losses,
    )  # fmt: skip
    return losses


def _reference(
    input: Tensor, target: Tensor, weight: Tensor | None, scales: Sequence[float] | None, mode: str,
    align_corners: bool, reduction: str, ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _refuse_strays(_large(input, target.shape[1:]), target, ignore_index)
    loss, lse, denominator = _empty_losses(input, target, weight, reduction, ignore_index)
    bands = Bands.of(input, target.shape[1:], scales, mode, align_corners)
    buffer = bands.buffer()
    of_class = loss.new_ones(input.shape[1]) if weight is None else weight.flatten().to(loss.dtype)
    sums = [loss.new_zeros(2)]
    for n, picture in enumerate(input):
        for rows in bands:
            labels = target[n, rows].long()
            valid = labels != ignore_index
            weights = _weights(input, labels, weight, ignore_index)
            values = bands.values(picture, rows, buffer)
            picked = values.gather(1, labels.masked_fill(~valid, 0)[None, None])[0, 0]
            mixed = torch.tensordot(of_class, values[0], 1) if label_smoothing else None
            highest = values.amax(1, keepdim=True)
            above = values.sub_(highest).exp_().sum((0, 1)).log_()
            highest = highest[0, 0]
            losses = weights * ((highest - picked) + above)
            if label_smoothing:
                even = of_class.sum() * (highest + above) - mixed
                losses = (1 - label_smoothing) * losses + label_smoothing / input.shape[1] * even
            losses = losses.masked_fill_(~valid, 0.0)
            lse[:, n, rows] = torch.stack((highest, above)) if len(lse) == 2 else highest + above
            if reduction == "none":
                loss[n, rows] = losses
            else:
                sums.append(torch.stack((losses.sum(), weights.sum())))
    if reduction != "none":
        total, divisor = torch.stack(sums).sum(0)
        loss.copy_(total / divisor if reduction == "mean" else total)
        if reduction == "mean":
            denominator.copy_(divisor)
    return loss, lse, denominator


UPSAMPLE_CROSS_ENTROPY = Operator(
    f"upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    kernel=_kernel,
    reference=_reference,
    fake=_empty_results,
    uncovered=lambda input, target, *rest: _uncovered(input, target),
)


def _empty_gradient(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty(input, input.shape, memory_format(input))


def _backward_kernel(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    scales: Sequence[float] | None, mode: str, align_corners: bool, reduction: str, ignore_index: int,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    grad_input = _empty_gradient(grad, input)
    kernels.upsample_cross_entropy.upsample_cross_entropy_bwd(
        grad.contiguous(), input, target.contiguous(), None if weight is None else weight.contiguous(),
        lse.contiguous(), denominator, scales, mode, align_corners, reduction, ignore_index, label_smoothing,
        grad_input,
    )  # fmt: skip
    return grad_input


def _backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    scales: Sequence[float] | None, mode: str, align_corners: bool, reduction: str, ignore_index: int,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    bands = Bands.of(input, target.shape[1:], scales, mode, align_corners)
    buffer = bands.buffer()
    c, h, w = bands.shape
    of_class = lse.new_ones(c) if weight is None else weight.flatten().to(lse.dtype)
    small = bands.empty(h, w)
    grad_input = _empty_gradient(grad, input)
    if reduction == "mean":
        grad = grad / denominator
    grad = grad.expand(target.shape)
    for n, picture in enumerate(input):
        small.zero_()
        for rows in bands:
            labels = target[n, rows].long()
            valid = labels != ignore_index
            own = (1 - label_smoothing) * grad[n, rows] * _weights(input, labels, weight, ignore_index)
            even = label_smoothing / c * grad[n, rows] * valid
            change = bands.values(picture, rows, buffer)
            for term in lse[:, n, rows]:
                change.sub_(term)
            change.exp_().mul_(own + even * of_class.sum())
            change.scatter_add_(1, labels.masked_fill(~valid, 0)[None, None], -own[None, None])
            if label_smoothing:
                change.sub_(even * of_class[:, None, None])
            change.masked_fill_(~valid, 0.0)  # also where logits are not finite
            bands.add_back(change, rows, small)
        grad_input[n] = small[0]
    return grad_input


UPSAMPLE_CROSS_ENTROPY_BACKWARD = Operator(
    "upsample_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    f"Tensor denominator, {SCHEMA}) -> Tensor",
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_empty_gradient,
    uncovered=lambda grad, input, target, *rest: _uncovered(input, target),
)


# --- function --------------------------------------------------------------------------------------------------------


class UpsampleCrossEntropyFunction(torch.autograd.Function):
    """The operator's arguments -> (loss, lse, denominator); the gradient is the loss's."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return UPSAMPLE_CROSS_ENTROPY(input, target, weight, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, target, weight, *ctx.arguments = inputs
        _, lse, denominator = output
        ctx.mark_non_differentiable(lse, denominator)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        input, target, weight, *rest = ctx.saved_tensors
        if wants_graph():
            inputs = (input, target, weight, *ctx.arguments)
            return tuple(double_backward(_differentiable, inputs, (True, *(False,) * 8), grad))
        gradient = UPSAMPLE_CROSS_ENTROPY_BACKWARD(grad, input, target, weight, *rest, *ctx.arguments)
        return gradient, *(None,) * 8


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "bilinear",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy(F.interpolate(input, size, scale_factor, mode, align_corners), target, ...) in one.

    The resized logits are never in memory: on the kernels a call needs the losses or their partial sums, 4 bytes a
    pixel for the backward (8 for float32 logits) and the gradient of `input`; on torch a band of rows besides.

    input: logits (N, C, h, w) of any strides; float32, float16 and bfloat16 run on the kernels, float64 on torch.
    target: class indices (N, H, W) of dtype uint8, int16, int32 or int64, or class probabilities (N, C, H, W), for
    which torch's two functions run and do store the resized logits. size, scale_factor, align_corners,
    recompute_scale_factor: torch.nn.functional.interpolate's; with neither size nor scale_factor the size is target's.
    mode: "bilinear" or "nearest". weight, ignore_index, reduction, label_smoothing: cross_entropy's.

    Computed, summed and returned in float32 also for half-precision logits (float64 for float64), under autocast too.
    The gradient has input's dtype and memory format. Deterministic, no atomics: the backward gathers. An ignored pixel
    adds exactly 0 to it, whatever its logits. A logit that is infinite or NaN may make NaN of pixels nearby that
    torch's bilinear mode leaves alone. A second derivative is torch's own.

    Raises what the two functions raise: ValueError for both size and scale_factor, another batch size, an unknown
    reduction, align_corners in mode "nearest"; NotImplementedError for other modes, integer or not 4-D logits;
    RuntimeError for a target that has not the output's size, for other shapes, dtypes and devices; and on a CPU
    IndexError for a target that is neither a class nor ignore_index (on a GPU a device-side assertion).
    """
    name = "upsample_cross_entropy"
    reduction = _reduction(name, None, None, reduction)
    check_map(name, input)
    _check_types(name, input, target, weight, ignore_index, label_smoothing)
    default = target.shape[-2:] if target.dim() >= 2 else None
    out, scales = check_resizing(name, input, size, scale_factor, mode, align_corners, recompute_scale_factor, default)
    large = _large(input, out)
    _check_target(name, large, target)
    if weight is not None:
        _check_weight(name, large, target, weight)
    arguments = (weight, scales, mode, bool(align_corners), reduction, int(ignore_index), float(label_smoothing))
    if target.is_floating_point():
        dispatch.choose(name, input, _uncovered(input, target))
        return _differentiable(input, target, *arguments)
    return UpsampleCrossEntropyFunction.apply(input, target.contiguous(), *arguments)[0]
