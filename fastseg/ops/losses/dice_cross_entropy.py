"""dice_cross_entropy: soft Dice and cross-entropy from one pass over the logits forward, and one backward.

The operator reduces the logits to a few sums, the formula on them is torch's, and its gradient comes back to the
operator's backward: whatever Dice is made of the sums costs no pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from ...kernels import losses as triton_kernels
from ..operator import Implementation, Operator, dense, empty, memory_format, placed, wants_graph
from .checks import LOGITS_DTYPES, check_number, check_target, check_types, check_weight, computed, refuse_strays
from .cross_entropy import as_images, labels_as_images
from .reference import pixel_weights

CLASSES = 256  # at most, of which a program holds all


def _uncovered(input: Tensor) -> str | None:
    if input.dtype not in LOGITS_DTYPES:
        return f"dtype {input.dtype}"
    classes = input.shape[0 if input.dim() == 1 else 1]
    return None if 0 < classes <= CLASSES else f"{classes} classes"


def _parts(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax, whether a class is the pixel's label, whether the pixel counts): of the computed dtype."""
    valid = (target.long() != ignore_index).unsqueeze(1)
    classes = torch.arange(input.shape[1], device=input.device).view(-1, 1, 1)
    return input.to(computed(input.dtype)).softmax(1), (classes == target.unsqueeze(1)) & valid, valid


def _statistics(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(loss (2,): summed losses and weights of the pixels, sums (N, 3, C): overlap, predicted, labelled), in torch."""
    softmax, hit, valid = _parts(input, target, ignore_index)
    weights = None if weight is None else weight.to(softmax.dtype)
    logits, labels = input.to(softmax.dtype), target.long()
    loss = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum")
    predicted = torch.where(valid, softmax, 0.0)
    terms = (torch.where(hit, predicted, 0.0), predicted, hit.to(softmax.dtype))
    sums = torch.stack([term.sum((2, 3)) for term in terms], 1)
    return torch.stack((loss, pixel_weights(input, target, weight, ignore_index).sum())), sums


def _second(
    grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    """The gradient of input, by torch's formulas, that can be differentiated again."""
    with torch.enable_grad():
        results = _statistics(input, target, weight, ignore_index)
        return torch.autograd.grad(results, input, (grad_loss, grad_sums), create_graph=True)[0]


def _empty(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype, (n, classes, *_) = computed(input.dtype), input.shape
    return tuple(empty(input, shape, torch.contiguous_format, dtype) for shape in ((2,), (n, 3, classes)))


def _kernel(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    refuse_strays("dice_cross_entropy", input.shape[1], target, ignore_index)
    layout, results = memory_format(input), _empty(input, target, weight, ignore_index)
    triton_kernels.dice_cross_entropy.dice_cross_entropy_fwd(
        dense(input, layout), target.contiguous(), None if weight is None else weight.contiguous(), ignore_index,
        layout == torch.channels_last, *results,
    )  # fmt: skip
    return results


def _reference(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    refuse_strays("dice_cross_entropy", input.shape[1], target, ignore_index)
    return _statistics(input, target, weight, ignore_index)


DICE_CROSS_ENTROPY = Operator(
    "dice_cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index) -> (Tensor, Tensor)",
    kernels={
        "triton": Implementation(_kernel, lambda input, *rest: _uncovered(input)),
    },
    reference=_reference,
    fake=_empty,
)


def _empty_gradient(
    grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    return empty(input, input.shape, memory_format(input))


def _backward_kernel(
    grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    layout, grad_input = memory_format(input), empty(input, input.shape, memory_format(input))
    triton_kernels.dice_cross_entropy.dice_cross_entropy_bwd(
        grad_loss.contiguous(), grad_sums.contiguous(), dense(input, layout), target.contiguous(),
        None if weight is None else weight.contiguous(), ignore_index, layout == torch.channels_last, grad_input,
    )  # fmt: skip
    return grad_input


def _backward_reference(
    grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    softmax, hit, valid = _parts(input, target, ignore_index)
    overlap, predicted, _ = (grad[:, :, None, None] for grad in grad_sums.unbind(1))
    wanted = torch.where(hit, overlap, 0.0) + predicted
    scale = (grad_loss[0] * pixel_weights(input, target, weight, ignore_index)).unsqueeze(1)
    grad = softmax * (wanted - (softmax * wanted).sum(1, keepdim=True)) + scale * (softmax - hit.to(softmax.dtype))
    return placed(torch.where(valid, grad, 0.0).to(input.dtype), memory_format(input))


DICE_CROSS_ENTROPY_BACKWARD = Operator(
    "dice_cross_entropy_backward(Tensor grad_loss, Tensor grad_sums, Tensor input, Tensor target, Tensor? weight, "
    "int ignore_index) -> Tensor",
    kernels={
        "triton": Implementation(_backward_kernel, lambda grad_loss, grad_sums, input, *rest: _uncovered(input)),
    },
    reference=_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)


class DiceCrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, ignore_index) -> (loss, sums); the gradient is of input alone."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
        return DICE_CROSS_ENTROPY(input, target, weight, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ignore_index = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        function = _second if wants_graph() else DICE_CROSS_ENTROPY_BACKWARD
        return function(grad_loss, grad_sums, *ctx.saved_tensors, ctx.ignore_index), None, None, None


def dice_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    batch: bool = False,
    include_background: bool = True,
    smooth: float = 1e-5,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Tensor:
    """ce_weight * cross-entropy + dice_weight * (1 - soft Dice), from one read of the logits forward, one backward.

    input: logits (C,), (N, C) or (N, C, d1, ...), floating-point, in NCHW or channels_last. target: class indices (),
    (N,) or (N, d1, ...), uint8, int16, int32 or int64. weight: of the classes in the cross-entropy, which is torch's
    weighted mean; Dice weighs all classes alike. ignore_index: pixels of this label count in neither.

    With p = softmax(input), Dice of a class is (2 * sum p_c [c = target] + smooth) / (sum p_c + sum [c = target] +
    smooth), over the pixels of each sample, or of the whole batch (batch=True), and the mean is taken over classes and
    samples; include_background=False leaves class 0 out of it (Milletari et al., V-Net, 2016; as nnU-Net and MONAI
    combine the two). The loss is of no dimension, float32 also for half-precision logits (float64 for float64), under
    autocast too. With nothing valid the cross-entropy is NaN, as torch's, and so is the loss.

    Deterministic. The gradient has input's dtype and memory format, and is exactly 0 for ignored pixels on the
    kernels. Nothing but the logits is kept for the backward; a second derivative is torch's own. On a GPU, more than
    256 classes are torch's (fastseg.explain). In channels_last rows of no multiple of 16 bytes are read and written in
    narrower accesses.

    Raises what cross_entropy raises, RuntimeError for class probabilities, and ValueError for a negative smooth and
    for include_background=False with one class.
    """
    name = "dice_cross_entropy"
    check_types(name, input, target, weight, ignore_index)
    for argument, value in (("smooth", smooth), ("dice_weight", dice_weight), ("ce_weight", ce_weight)):
        check_number(name, argument, value)
    if smooth < 0:
        raise ValueError(f"{name}: smooth must not be negative, but is {smooth}")
    if target.is_floating_point():
        raise RuntimeError(f"{name}: target must be class indices, but is of {target.dtype}")
    check_target(name, input, target, ignore_index)
    check_weight(name, input, target, weight)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if classes == 0 or (classes == 1 and not include_background):
        what = "" if include_background else " besides the background, which is left out"
        raise ValueError(f"{name}: input must have a class{what}, but has shape {tuple(input.shape)}")
    chosen = dispatch.choose(name, input, dispatch.only_triton(_uncovered(input))).backend
    logits, labels = as_images(input), labels_as_images(target)
    if input.dim() == 2:  # each row is a sample
        logits, labels = input[:, :, None, None], target.view(-1, 1, 1)
    function = _statistics if chosen == "torch" else DiceCrossEntropyFunction.apply
    try:
        loss, sums = function(logits, labels, weight, int(ignore_index))
    except IndexError:
        refuse_strays(name, classes, target, ignore_index)  # neither torch's message nor the operators' says where
        raise
    if batch:
        sums = sums.sum(0, keepdim=True)
    overlap, predicted, labelled = sums[:, :, 0 if include_background else 1 :].unbind(1)
    dice = (2 * overlap + smooth) / (predicted + labelled + smooth)
    return ce_weight * (loss[0] / loss[1]) + dice_weight * (1 - dice.mean())
