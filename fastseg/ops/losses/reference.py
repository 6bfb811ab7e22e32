"""Cross-entropy in torch: what the kernels must compute, and what runs where they do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.losses.options import LossOptions
from ..arguments import accumulator
from ..operator import memory_format, placed
from .checks import pixels_shape


def pixel_weights(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each pixel: that of its label, and 0 if it is ignored."""
    dtype = accumulator(input.dtype)
    if target.is_floating_point():
        return torch.ones(pixels_shape(input), dtype=dtype, device=input.device)
    valid = target.long() != ignore_index
    if weight is None:
        return valid.to(dtype)
    safe = target.long().masked_fill(~valid, 0)
    return weight.to(dtype).flatten()[safe].masked_fill(~valid, 0.0)


def mean_denominator(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The divisor of a mean."""
    dtype = accumulator(input.dtype)
    if options.reduction == "count":
        return torch.full((), options.count, dtype=dtype, device=input.device)
    if not target.is_floating_point() and (weight is None or options.reduction == "valid"):
        return (target.long() != options.ignore_index).sum().to(dtype)
    return pixel_weights(input, target, weight, options.ignore_index).sum()


def differentiable_loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The loss by torch's own function, on int64 labels and float32 (float64) logits, weights and probabilities."""
    dtype, probabilities = accumulator(input.dtype), target.is_floating_point()
    labels = target.to(torch.promote_types(target.dtype, dtype)) if probabilities else target.long()
    logits = input.to(dtype)
    smoothing = {"ignore_index": options.ignore_index, "label_smoothing": options.label_smoothing}
    weights = None if weight is None else weight.to(dtype)
    direct = {"weights": "mean", "sum": "sum", "none": "none"}.get(options.reduction)
    if options.z_loss == 0 and direct is not None:
        return F.cross_entropy(logits, labels, weights, reduction=direct, **smoothing)
    total = F.cross_entropy(logits, labels, weights, reduction="sum" if options.is_reduced else "none", **smoothing)
    if options.z_loss != 0:
        squared = options.z_loss * logits.logsumexp(min(1, input.dim() - 1)).square()
        if not probabilities:
            squared = squared.where(labels != options.ignore_index, 0.0)
        total = total + (squared.sum() if options.is_reduced else squared.view_as(total))
    return total / mean_denominator(input, target, weight, options) if options.is_mean else total


def target_distribution(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """(q_c of kernels/losses/common.py, which is 0 if the pixel is ignored; whether the pixel is not ignored)."""
    dtype, classes, smoothing = accumulator(input.dtype), input.shape[1], options.label_smoothing
    if target.is_floating_point():
        valid, own = torch.ones_like(target[:, :1], dtype=torch.bool), target.to(dtype)
    else:
        valid = (target.long() != options.ignore_index).unsqueeze(1)
        own = (torch.arange(classes, device=input.device).view(-1, 1, 1) == target.unsqueeze(1)).to(dtype)
    q = own * (1 - smoothing) + smoothing / classes
    if weight is not None:
        q = q * weight.to(dtype).view(-1, 1, 1)
    return q.where(valid, 0.0), valid


def gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, denominator: Tensor, options: LossOptions
) -> Tensor:
    """The gradient of the logits, written in torch: 0 where a pixel is ignored, whatever its logits."""
    q, valid = target_distribution(input, target, weight, options)
    logits = input.to(q.dtype)
    if options.is_mean:
        grad = grad / denominator
    mass = q.sum(1, keepdim=True)
    if target.is_floating_point() or options.label_smoothing or options.z_loss:
        if options.z_loss:
            mass = mass + 2 * options.z_loss * logits.logsumexp(1, keepdim=True)
        grad_input = mass * logits.softmax(1) - q
    else:
        grad_input = mass * (logits.softmax(1) - (q != 0).to(q.dtype))
    grad_input = torch.where(valid, grad_input * (grad if options.is_reduced else grad.unsqueeze(1)), 0.0)
    return placed(grad_input.to(input.dtype), memory_format(input))


def predict(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(the class of each pixel's largest logit, the numbers of pixels predicted right and of those not ignored)."""
    best, valid = input.argmax(1), target.long() != ignore_index
    return best, torch.stack((((best == target) & valid).sum(), valid.sum()))
