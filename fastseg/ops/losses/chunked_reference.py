"""Cross-entropy of a chunk of logits in torch, in the chunk's own memory: for losses that never hold all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.losses.options import LossOptions
from .reference import pixel_weights

ELEMENTS = 2**19  # logits of a chunk per thread: they stay in a core's cache
MOST_THREADS = 16


def elements() -> int:
    """Logits of a chunk on a CPU: fewer would not keep the threads busy, more would not fit in the caches."""
    return ELEMENTS * min(torch.get_num_threads(), MOST_THREADS)


def smoothed_shares(logits: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """(C,): the part of a pixel's target that label smoothing gives to each class, the same in every pixel."""
    classes = logits.shape[1]
    shares = torch.full((classes,), label_smoothing / classes, dtype=logits.dtype, device=logits.device)
    return shares if weight is None else shares * weight.flatten()


def chunk_losses(
    logits: Tensor, labels: Tensor, weight: Tensor | None, shares: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, terms of a mean's denominator, the two terms of lse), each in the shape (rows, columns) of the labels.

    logits: (1, C, rows, columns) in float32 or float64, overwritten. shares: those of smoothed_shares.
    """
    smoothing, z_loss = options.label_smoothing, options.z_loss
    valid = labels != options.ignore_index
    weights = pixel_weights(logits, labels, weight, options.ignore_index)
    highest = logits.amax(1, keepdim=True)
    logits.sub_(highest)
    picked = logits.gather(1, labels.masked_fill(~valid, 0)[None, None])[0, 0]
    smoothed = torch.tensordot(shares, logits[0], 1) if smoothing else None
    above = logits.exp_().sum((0, 1)).log_()
    highest = highest[0, 0]
    losses = (1 - smoothing) * weights * (above - picked)
    if smoothed is not None:
        losses += shares.sum() * above - smoothed
    if z_loss:
        losses += z_loss * (highest + above).square()
    return losses.masked_fill_(~valid, 0.0), valid if options.reduction == "valid" else weights, highest, above


def chunk_gradient(
    logits: Tensor, labels: Tensor, weight: Tensor | None, shares: Tensor, lse: Tensor, scale: Tensor,
    options: LossOptions,
) -> Tensor:  # fmt: skip
    """The gradient of the logits of chunk_losses, in their memory.

    lse: its one or two terms. scale: the gradients of the losses. Exactly 0 where a pixel is ignored, also if its
    logits are not finite.
    """
    valid = labels != options.ignore_index
    weights = pixel_weights(logits, labels, weight, options.ignore_index)
    own = (1 - options.label_smoothing) * scale * weights
    for term in lse:
        logits.sub_(term)
    logits.exp_().mul_(own + scale * (shares.sum() + 2 * options.z_loss * lse.sum(0)))
    logits.scatter_add_(1, labels.masked_fill(~valid, 0)[None, None], -own[None, None])
    if options.label_smoothing:
        logits.sub_(scale * shares[:, None, None])
    return logits.masked_fill_(~valid, 0.0)


def chunk_losses_and_gradient(
    logits: Tensor, labels: Tensor, weight: Tensor | None, shares: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """(losses, terms of a mean's denominator); the gradient of the sum of the losses replaces the logits."""
    losses, divisor, highest, above = chunk_losses(logits, labels, weight, shares, options)
    valid = labels != options.ignore_index
    own = (1 - options.label_smoothing) * pixel_weights(logits, labels, weight, options.ignore_index)
    logits.mul_((own + shares.sum() + 2 * options.z_loss * (highest + above)) / above.exp())
    logits.scatter_add_(1, labels.masked_fill(~valid, 0)[None, None], -own[None, None])
    if options.label_smoothing:
        logits.sub_(shares[:, None, None])
    logits.masked_fill_(~valid, 0.0)
    return losses, divisor


def gradient_scale(grad: Tensor, denominator: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """The factor from the gradient of the sum of the losses to that of the loss, on a CPU.

    It is 0 if every pixel is ignored: the mean is NaN then, and its gradient 0.
    """
    if options.reduction == "sum":
        return grad
    all_ignored = denominator.item() == 0 and not bool((target.long() != options.ignore_index).any())
    return torch.zeros_like(grad) if all_ignored else grad / denominator


def reduce_chunks(parts: list[tuple[Tensor, Tensor]], options: LossOptions, loss: Tensor, denominator: Tensor) -> None:
    """Fill loss and denominator from each chunk's (sum of losses, sum of the terms of the denominator)."""
    total, divisor = torch.stack([torch.stack(part) for part in parts] or [loss.new_zeros(2)]).sum(0)
    if options.reduction == "count":
        denominator.fill_(options.count)
    elif options.is_mean:
        denominator.copy_(divisor)
    loss.copy_(total / denominator if options.is_mean else total)
