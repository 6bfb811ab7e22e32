"""Cross-entropy in torch: what the kernels must give, and what runs where they do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import memory_format, placed
from .checks import computed, pixels_shape


def pixel_weights(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each pixel, 0 where it is ignored."""
    dtype = computed(input.dtype)
    if target.is_floating_point():
        return torch.ones(pixels_shape(input), dtype=dtype, device=input.device)
    valid = target.long() != ignore_index
    if weight is None:
        return valid.to(dtype)
    safe = target.long().masked_fill(~valid, 0)
    return weight.to(dtype).flatten()[safe].masked_fill(~valid, 0.0)


def denominator_of(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int
) -> Tensor:
    """What a mean divides the sum by."""
    if reduction == "count":
        return torch.full((), count, dtype=computed(input.dtype), device=input.device)
    if not target.is_floating_point() and (weight is None or reduction == "valid"):
        return (target.long() != ignore_index).sum().to(computed(input.dtype))
    return pixel_weights(input, target, weight, ignore_index).sum()


def differentiable(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """torch's function on what torch's function takes: labels int64, the rest of the computed dtype."""
    dtype, probabilities = computed(input.dtype), target.is_floating_point()
    labels = target.to(torch.promote_types(target.dtype, dtype)) if probabilities else target.long()
    logits = input.to(dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    weights = None if weight is None else weight.to(dtype)
    direct = {"weights": "mean", "sum": "sum", "none": "none"}.get(reduction)
    if z_loss == 0 and direct is not None:
        return F.cross_entropy(logits, labels, weights, reduction=direct, **options)
    total = F.cross_entropy(logits, labels, weights, reduction="none" if reduction == "none" else "sum", **options)
    if z_loss != 0:
        squared = z_loss * logits.logsumexp(min(1, input.dim() - 1)).square()
        if not probabilities:
            squared = squared.where(labels != ignore_index, 0.0)
        total = total + (squared.view_as(total) if reduction == "none" else squared.sum())
    if reduction in ("none", "sum"):
        return total
    return total / denominator_of(input, target, weight, reduction, count, ignore_index)


def shares_of(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(q_c, whether the pixel counts): of kernels/losses/common.py, q 0 where it does not."""
    dtype, classes = computed(input.dtype), input.shape[1]
    if target.is_floating_point():
        valid, own = torch.ones_like(target[:, :1], dtype=torch.bool), target.to(dtype)
    else:
        valid = (target.long() != ignore_index).unsqueeze(1)
        own = (torch.arange(classes, device=input.device).view(-1, 1, 1) == target.unsqueeze(1)).to(dtype)
    shares = own * (1 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        shares = shares * weight.to(dtype).view(-1, 1, 1)
    return shares.where(valid, 0.0), valid


def gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, denominator: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """dloss/dinput, written in torch: 0 where a pixel is ignored, whatever its logits."""
    shares, valid = shares_of(input, target, weight, ignore_index, label_smoothing)
    logits = input.to(shares.dtype)
    if reduction not in ("none", "sum"):
        grad = grad / denominator
    mass = shares.sum(1, keepdim=True)
    if target.is_floating_point() or label_smoothing or z_loss:
        if z_loss:
            mass = mass + 2 * z_loss * logits.logsumexp(1, keepdim=True)
        grad_input = mass * logits.softmax(1) - shares
    else:
        grad_input = mass * (logits.softmax(1) - (shares != 0).to(shares.dtype))
    grad_input = torch.where(valid, grad_input * (grad.unsqueeze(1) if reduction == "none" else grad), 0.0)
    return placed(grad_input.to(input.dtype), memory_format(input))


def right_ones(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(each pixel's class with the largest logit, numbers of right pixels and of those that are not ignored)."""
    best, valid = input.argmax(1), target.long() != ignore_index
    return best, torch.stack((((best == target) & valid).sum(), valid.sum()))
