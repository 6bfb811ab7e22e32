"""Losses, predictions and counts of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from .case import Case, Placement, in_words


def cross_entropy(
    at: Placement, shape: Sequence[int], ignore_index: int = -100, weighted: bool = False, reduction: str = "mean",
    label_smoothing: float = 0.0, probabilities: bool = False, one_pass: bool | None = None, predicted: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """Cross-entropy of (N, C, H, W) logits with int64 labels, a tenth of them ignored, or with class probabilities.

    predicted: and each pixel's class with the largest logit.
    """
    labels = at.labels(shape[1], shape[0], *shape[2:])
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, ignore_index)
    weight = torch.rand(shape[1]).add(0.5).to(at.device) if weighted else None
    shares = at.tensor(*shape).softmax(1) if probabilities else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}

    def ours(logits: Tensor, labels: Tensor) -> Any:
        target = labels if shares is None else shares
        if predicted:
            return functional.cross_entropy_with_predictions(logits, target, weight, **options, one_pass=one_pass)[:2]
        return functional.cross_entropy(logits, target, weight, **options, one_pass=one_pass)

    def theirs(logits: Tensor, labels: Tensor) -> Any:
        own = None if weight is None else weight.to(logits.dtype)
        target = labels if shares is None else shares.to(logits.dtype)
        loss = F.cross_entropy(logits, target, own, **options)
        return (loss, logits.argmax(1)) if predicted else loss

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs log_softmax in the logits' dtype, and the loss in float32."""
        scores = torch.log_softmax(logits, 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=ignore_index, reduction=reduction)

    words = [f"ignore {ignore_index} {reduction}", *["weighted"] * weighted, *["probabilities"] * probabilities]
    words += [f"smoothing {label_smoothing}"] * bool(label_smoothing) + ["two passes"] * (one_pass is False)
    name = "cross_entropy" + "_with_predictions" * predicted
    plain = not (label_smoothing or probabilities or predicted)
    yield Case(name, in_words(shape, *words), ours, theirs, inputs, eager if plain else None)


def dice_cross_entropy(
    at: Placement, shape: Sequence[int], ignore_index: int = -100, batch: bool = False
) -> Iterator[Case]:
    """Soft Dice and cross-entropy of (N, C, H, W) logits with int64 labels, a tenth of them ignored."""
    labels = at.labels(shape[1], shape[0], *shape[2:])
    inputs = {
        "logits": at.tensor(*shape),
        "labels": labels.masked_fill(at.labels(10, *labels.shape) == 0, ignore_index),
    }

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.dice_cross_entropy(logits, labels, ignore_index=ignore_index, batch=batch)

    def theirs(logits: Tensor, labels: Tensor) -> Tensor:
        """As it is commonly written: softmax, one-hot labels, and sums of their products."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        valid = (labels != ignore_index).unsqueeze(1)
        softmax = logits.softmax(1) * valid
        hit = F.one_hot(labels.where(valid[:, 0], 0), shape[1]).movedim(-1, 1) * valid
        over = (0, 2, 3) if batch else (2, 3)
        dice = (2 * (softmax * hit).sum(over) + 1e-5) / (softmax.sum(over) + hit.sum(over) + 1e-5)
        return F.cross_entropy(logits, labels, ignore_index=ignore_index) + 1 - dice.mean()

    size = in_words(shape, f"ignore {ignore_index}", *["batch"] * batch)
    yield Case("dice_cross_entropy", size, ours, theirs, inputs)


def upsample_cross_entropy(
    at: Placement, shape: Sequence[int], size: Sequence[int], mode: str = "bilinear", align_corners: bool | None = None,
    weighted: bool = False, reduction: str = "mean", label_smoothing: float = 0.0, predicted: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """Cross-entropy of logits resized to their labels, a tenth of which are ignored; predicted: and their classes."""
    labels = at.labels(shape[1], shape[0], *size)
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, 255)
    weight = torch.rand(shape[1]).add(0.5).to(at.device) if weighted else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": label_smoothing}
    resizing = {"size": list(size), "mode": mode, "align_corners": align_corners}

    def ours(logits: Tensor, labels: Tensor) -> Any:
        if predicted:
            return functional.upsample_cross_entropy_with_predictions(logits, labels, weight, **resizing, **options)[:2]
        return functional.upsample_cross_entropy(logits, labels, weight, **resizing, **options)

    def theirs(logits: Tensor, labels: Tensor) -> Any:
        own, large = None if weight is None else weight.to(logits.dtype), F.interpolate(logits, **resizing)
        loss = F.cross_entropy(large, labels, own, **options)
        return (loss, large.argmax(1)) if predicted else loss

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs interpolate and log_softmax in the logits' dtype, and the loss in float32."""
        scores = torch.log_softmax(F.interpolate(logits, **resizing), 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=255, reduction=reduction)

    corners = ["align_corners"] * bool(align_corners)
    smoothed = [f"smoothing {label_smoothing}"] * bool(label_smoothing)
    words = (f"to {size[0]}x{size[1]} {mode}", *corners, reduction, *["weighted"] * weighted, *smoothed)
    name, plain = "upsample_cross_entropy" + "_with_predictions" * predicted, not smoothed and not predicted
    yield Case(name, in_words(shape, *words), ours, theirs, inputs, eager if plain else None)


def upsample_argmax(at: Placement, shape: Sequence[int], size: Sequence[int], mode: str = "bilinear") -> Iterator[Case]:
    """The class of each pixel of logits that are resized, and its probability."""

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        return functional.upsample_argmax(logits, size, mode=mode, return_probability=True)

    def theirs(logits: Tensor) -> tuple[Tensor, Tensor]:
        large = F.interpolate(logits.detach().double(), size, mode=mode)  # halves would tie where float32 does not
        return large.argmax(1).to(torch.uint8), large.softmax(1).amax(1)

    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        share, best = F.interpolate(logits, size, mode=mode).float().softmax(1).max(1)
        return best, share

    inputs = {"logits": at.tensor(*shape)}
    yield Case("upsample_argmax", in_words(shape, f"to {size[0]}x{size[1]} {mode}"), ours, theirs, inputs, eager)


def confusion_matrix(at: Placement, shape: Sequence[int], classes: int) -> Iterator[Case]:
    """Counts of a map of predictions and one of labels, a tenth of which are ignored."""
    labels = at.labels(classes, *shape)
    labels = labels.masked_fill(at.labels(10, *shape) == 0, 255)
    inputs = {"pred": at.labels(classes, *shape).to(torch.uint8), "labels": labels}

    def ours(pred: Tensor, labels: Tensor) -> Tensor:
        return functional.confusion_matrix(pred, labels, classes, 255)

    def theirs(pred: Tensor, labels: Tensor) -> Tensor:
        cell = (labels * classes + pred).masked_fill(labels == 255, classes**2)
        return torch.bincount(cell.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)

    yield Case("confusion_matrix", in_words(shape, f"{classes} classes"), ours, theirs, inputs)


def linear_cross_entropy(
    at: Placement, shape: Sequence[int], classes: int, chunk: int | None = None, reduction: str = "mean"
) -> Iterator[Case]:
    """A 1x1 classifier with a bias and its cross-entropy, a tenth of the labels ignored."""
    labels = at.labels(classes, shape[0], *shape[2:])
    labels = labels.masked_fill(at.labels(10, *labels.shape) == 0, 255)
    inputs = {
        "features": at.tensor(*shape),
        "linear_weight": at.tensor(classes, shape[1]) / shape[1] ** 0.5,
        "linear_bias": at.tensor(classes),
        "labels": labels,
    }

    def ours(features: Tensor, linear_weight: Tensor, linear_bias: Tensor, labels: Tensor) -> Tensor:
        options = {"ignore_index": 255, "reduction": reduction, "chunk": chunk}
        return functional.linear_cross_entropy(features, linear_weight, labels, linear_bias=linear_bias, **options)

    def theirs(features: Tensor, linear_weight: Tensor, linear_bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.conv2d(features, linear_weight[:, :, None, None], linear_bias)
        return F.cross_entropy(logits, labels, ignore_index=255, reduction=reduction)

    size = in_words(shape, f"{classes} classes {reduction}", *[f"chunk {chunk}"] * bool(chunk))
    yield Case("linear_cross_entropy", size, ours, theirs, inputs)
