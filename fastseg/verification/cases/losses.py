"""Cases of the losses, of predictions from logits, and of the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from .case import Case, Placement, describe
from .specs import MEAN_LOSS, LossSpec, ResizeSpec


def _class_weight(at: Placement, classes: int, loss: LossSpec) -> Tensor | None:
    return torch.rand(classes).add(0.5).to(at.device) if loss.weighted else None


def _ignore_a_tenth(at: Placement, labels: Tensor, ignore_index: int) -> Tensor:
    return labels.masked_fill(at.labels(10, *labels.shape) == 0, ignore_index)


def cross_entropy(at: Placement, shape: Sequence[int], loss: LossSpec = MEAN_LOSS) -> Iterator[Case]:
    """Cross-entropy of (N, C, H, W) logits. The target holds int64 labels, a tenth ignored, or class probabilities."""
    labels = _ignore_a_tenth(at, at.labels(shape[1], shape[0], *shape[2:]), loss.ignore_index)
    weight = _class_weight(at, shape[1], loss)
    shares = at.tensor(*shape).softmax(1) if loss.probabilities else None
    inputs = {"logits": at.tensor(*shape), "labels": labels}

    def ours(logits: Tensor, labels: Tensor) -> Any:
        target, options = labels if shares is None else shares, loss.options | {"one_pass": loss.one_pass}
        if loss.predicted:
            return functional.cross_entropy_with_predictions(logits, target, weight, **options)[:2]
        return functional.cross_entropy(logits, target, weight, **options)

    def theirs(logits: Tensor, labels: Tensor) -> Any:
        own = None if weight is None else weight.to(logits.dtype)
        target = labels if shares is None else shares.to(logits.dtype)
        value = F.cross_entropy(logits, target, own, **loss.options)
        return (value, logits.argmax(1)) if loss.predicted else value

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs log_softmax in the logits' dtype and the loss in float32."""
        scores = torch.log_softmax(logits, 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=loss.ignore_index, reduction=loss.reduction)

    words = [f"ignore {loss.ignore_index} {loss.reduction}", *["weighted"] * loss.weighted]
    words += [
        *["probabilities"] * loss.probabilities,
        *loss.smoothing_words,
        *["two passes"] * (loss.one_pass is False),
    ]
    name = "cross_entropy" + "_with_predictions" * loss.predicted
    has_eager = not (loss.label_smoothing or loss.probabilities or loss.predicted)
    yield Case(name, describe(shape, *words), ours, theirs, inputs, eager if has_eager else None)


def dice_cross_entropy(
    at: Placement, shape: Sequence[int], ignore_index: int = 255, batch: bool = False
) -> Iterator[Case]:
    """Soft Dice and cross-entropy of (N, C, H, W) logits with int64 labels, a tenth of them ignored."""
    labels = at.labels(shape[1], shape[0], *shape[2:])
    logits = at.tensor(*shape)
    inputs = {"logits": logits, "labels": _ignore_a_tenth(at, labels, ignore_index)}

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.dice_cross_entropy(logits, labels, ignore_index=ignore_index, batch=batch)

    def theirs(logits: Tensor, labels: Tensor) -> Tensor:
        """The common implementation: softmax, one-hot labels, and sums of their elementwise product."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        valid = (labels != ignore_index).unsqueeze(1)
        softmax = logits.softmax(1) * valid
        hit = F.one_hot(labels.where(valid[:, 0], 0), shape[1]).movedim(-1, 1) * valid
        over = (0, 2, 3) if batch else (2, 3)
        dice = (2 * (softmax * hit).sum(over) + 1e-5) / (softmax.sum(over) + hit.sum(over) + 1e-5)
        return F.cross_entropy(logits, labels, ignore_index=ignore_index) + 1 - dice.mean()

    size = describe(shape, f"ignore {ignore_index}", *["batch"] * batch)
    yield Case("dice_cross_entropy", size, ours, theirs, inputs)


def upsample_cross_entropy(
    at: Placement, shape: Sequence[int], resize: ResizeSpec, loss: LossSpec = MEAN_LOSS
) -> Iterator[Case]:
    """Cross-entropy of logits that are resized to the size of the labels, a tenth of which are ignored."""
    labels = _ignore_a_tenth(at, at.labels(shape[1], shape[0], *resize.size), loss.ignore_index)
    weight = _class_weight(at, shape[1], loss)
    inputs = {"logits": at.tensor(*shape), "labels": labels}
    options = resize.options | loss.options

    def ours(logits: Tensor, labels: Tensor) -> Any:
        if loss.predicted:
            return functional.upsample_cross_entropy_with_predictions(logits, labels, weight, **options)[:2]
        return functional.upsample_cross_entropy(logits, labels, weight, **options)

    def theirs(logits: Tensor, labels: Tensor) -> Any:
        own, large = None if weight is None else weight.to(logits.dtype), F.interpolate(logits, **resize.options)
        value = F.cross_entropy(large, labels, own, **loss.options)
        return (value, large.argmax(1)) if loss.predicted else value

    def eager(logits: Tensor, labels: Tensor) -> Tensor:
        """Autocast runs interpolate and log_softmax in the logits' dtype and the loss in float32."""
        scores = torch.log_softmax(F.interpolate(logits, **resize.options), 1).float()
        return F.nll_loss(scores, labels, weight, ignore_index=loss.ignore_index, reduction=loss.reduction)

    words = [*resize.words(), loss.reduction, *["weighted"] * loss.weighted, *loss.smoothing_words]
    name = "upsample_cross_entropy" + "_with_predictions" * loss.predicted
    has_eager = not (loss.label_smoothing or loss.predicted)
    yield Case(name, describe(shape, *words), ours, theirs, inputs, eager if has_eager else None)


def upsample_argmax(at: Placement, shape: Sequence[int], size: Sequence[int], mode: str = "bilinear") -> Iterator[Case]:
    """The class of each pixel of resized logits, and its probability."""

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        return functional.upsample_argmax(logits, size, mode=mode, return_probability=True)

    def theirs(logits: Tensor) -> tuple[Tensor, Tensor]:
        # In float64: in half precision logits would tie that do not tie in float32.
        large = F.interpolate(logits.detach().double(), size, mode=mode)
        return large.argmax(1).to(torch.uint8), large.softmax(1).amax(1)

    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        probability, best = F.interpolate(logits, size, mode=mode).float().softmax(1).max(1)
        return best, probability

    inputs = {"logits": at.tensor(*shape)}
    yield Case("upsample_argmax", describe(shape, *ResizeSpec(size, mode).words()), ours, theirs, inputs, eager)


def softmax_moments(at: Placement, shape: Sequence[int], passes: int = 3, chunk: int = 2) -> Iterator[Case]:
    """Mean, squared deviations and entropy of the softmax over passes, in chunks. Nothing has a gradient."""
    inputs = {f"pass {number}": at.tensor(*shape) for number in range(passes)}

    def ours(*logits: Tensor) -> tuple[Tensor, ...]:
        state = None
        for first in range(0, passes, chunk):
            state = functional.softmax_moments(torch.stack(logits[first : first + chunk]), state)
        return tuple(state[1:])

    def theirs(*logits: Tensor) -> tuple[Tensor, ...]:
        wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
        softmax = torch.stack(logits).detach().to(wide).softmax(2)
        squares = softmax.var(0, unbiased=False) * passes
        return softmax.mean(0), squares, torch.special.entr(softmax).sum((0, 2))

    yield Case("softmax_moments", describe(shape, f"{passes} passes in {chunk}s"), ours, theirs, inputs)


def confusion_matrix(at: Placement, shape: Sequence[int], classes: int) -> Iterator[Case]:
    """The confusion matrix of predictions and labels, a tenth of which are ignored."""
    labels = _ignore_a_tenth(at, at.labels(classes, *shape), 255)
    inputs = {"pred": at.labels(classes, *shape).to(torch.uint8), "labels": labels}

    def ours(pred: Tensor, labels: Tensor) -> Tensor:
        return functional.confusion_matrix(pred, labels, classes, 255)

    def theirs(pred: Tensor, labels: Tensor) -> Tensor:
        cell = (labels * classes + pred).masked_fill(labels == 255, classes**2)
        return torch.bincount(cell.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)

    yield Case("confusion_matrix", describe(shape, f"{classes} classes"), ours, theirs, inputs)


def linear_cross_entropy(
    at: Placement, shape: Sequence[int], classes: int, chunk: int | None = None, reduction: str = "mean"
) -> Iterator[Case]:
    """A 1x1 classifier with a bias and its cross-entropy; a tenth of the labels is ignored."""
    labels = _ignore_a_tenth(at, at.labels(classes, shape[0], *shape[2:]), 255)
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

    size = describe(shape, f"{classes} classes {reduction}", *[f"chunk {chunk}"] * bool(chunk))
    yield Case("linear_cross_entropy", size, ours, theirs, inputs)
