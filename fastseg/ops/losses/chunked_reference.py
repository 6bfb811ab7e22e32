"""Cross-entropy of a chunk of logits in torch, over the chunk's own memory: for losses that never hold all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import pixel_weights

ELEMENTS = 2**19  # logits that the references hold at a time for each thread: what stays in a core's cache
MOST_THREADS = 16


def elements() -> int:
    """Logits of a chunk on a CPU: with fewer the threads have too little to do, with more the caches are too small."""
    return ELEMENTS * min(torch.get_num_threads(), MOST_THREADS)


def even_shares(weight: Tensor | None, label_smoothing: float, like: Tensor) -> Tensor:
    """What label smoothing gives each of the classes of `like` (N, C, ...), in every pixel with a label."""
    even = torch.full((like.shape[1],), label_smoothing / like.shape[1], dtype=like.dtype, device=like.device)
    return even if weight is None else even * weight.flatten()


def chunk_losses(
    logits: Tensor, labels: Tensor, weight: Tensor | None, shares: Tensor, reduction: str, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses, what a mean divides by, the two terms of lse), each of the labels' shape (rows, columns).

    logits: (1, C, rows, columns) of the computed dtype, overwritten.
    """
    valid = labels != ignore_index
    weights = pixel_weights(logits, labels, weight, ignore_index)
    highest = logits.amax(1, keepdim=True)
    logits.sub_(highest)
    picked = logits.gather(1, labels.masked_fill(~valid, 0)[None, None])[0, 0]
    short = torch.tensordot(shares, logits[0], 1) if label_smoothing else None
    above = logits.exp_().sum((0, 1)).log_()
    highest = highest[0, 0]
    losses = (1 - label_smoothing) * weights * (above - picked)
    if short is not None:
        losses += shares.sum() * above - short
    if z_loss:
        losses += z_loss * (highest + above).square()
    return losses.masked_fill_(~valid, 0.0), valid if reduction == "valid" else weights, highest, above


def chunk_gradient(
    logits: Tensor, labels: Tensor, weight: Tensor | None, shares: Tensor, lse: Tensor, scale: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """The gradient of chunk_losses' logits, in their memory. lse: its one or two terms; scale: the losses' gradients.

    Exactly 0 where a pixel is ignored, also where its logits are not finite.
    """
    valid = labels != ignore_index
    own = (1 - label_smoothing) * scale * pixel_weights(logits, labels, weight, ignore_index)
    for term in lse:
        logits.sub_(term)
    logits.exp_().mul_(own + scale * (shares.sum() + 2 * z_loss * lse.sum(0)))
    logits.scatter_add_(1, labels.masked_fill(~valid, 0)[None, None], -own[None, None])
    if label_smoothing:
        logits.sub_(scale * shares[:, None, None])
    return logits.masked_fill_(~valid, 0.0)


def chunk_losses_and_gradient(
    logits: Tensor, labels: Tensor, weight: Tensor | None, shares: Tensor, reduction: str, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """chunk_losses' (losses, what a mean divides by), and in the logits' memory the gradient of the losses' sum."""
    options = (ignore_index, label_smoothing, z_loss)
    losses, divisor, highest, above = chunk_losses(logits, labels, weight, shares, reduction, *options)
    valid = labels != ignore_index
    own = (1 - label_smoothing) * pixel_weights(logits, labels, weight, ignore_index)
    logits.mul_((own + shares.sum() + 2 * z_loss * (highest + above)) / above.exp())
    logits.scatter_add_(1, labels.masked_fill(~valid, 0)[None, None], -own[None, None])
    if label_smoothing:
        logits.sub_(shares[:, None, None])
    logits.masked_fill_(~valid, 0.0)
    return losses, divisor


def factor_of(grad: Tensor, denominator: Tensor, reduction: str, target: Tensor, ignore_index: int) -> Tensor:
    """What the gradient of the losses' sum is multiplied by, on a CPU: 0 where no label counts, whose mean is NaN."""
    if reduction == "sum":
        return grad
    nothing = denominator.item() == 0 and not bool((target.long() != ignore_index).any())
    return torch.zeros_like(grad) if nothing else grad / denominator


def reduced(parts: list[tuple[Tensor, Tensor]], reduction: str, count: int, loss: Tensor, denominator: Tensor) -> None:
    """Write loss and denominator from the chunks' sums of losses and of what they are divided by."""
    total, divisor = torch.stack([torch.stack(part) for part in parts] or [loss.new_zeros(2)]).sum(0)
    if reduction == "count":
        denominator.fill_(count)
    elif reduction != "sum":
        denominator.copy_(divisor)
    loss.copy_(total if reduction == "sum" else total / denominator)
