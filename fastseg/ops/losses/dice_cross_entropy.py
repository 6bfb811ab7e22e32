"""dice_cross_entropy: soft Dice and cross-entropy from one pass over the logits forward, and one backward.

The operator reduces the logits to a few sums. torch computes both losses from these sums, and its gradient of the sums
is what the operator's backward takes: any formula for Dice costs no further pass over the logits.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import losses as triton_kernels
from ...kernels.cpu import losses as cpu_kernels
from ...kernels.losses.options import LossInputs
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, accumulator
from ..operator import (
    Implementation,
    Operator,
    dense,
    empty,
    empty_like,
    known_signature,
    memory_format,
    placed,
    wants_graph,
)
from .checks import (
    LossArguments,
    check_types,
    loss_options,
    number_of_classes,
    require_labels,
    require_labels_in_range,
    require_number,
    whole_labels,
    widened,
)
from .cross_entropy import as_images, labels_as_images
from .reference import pixel_weights

MOST_CLASSES = 256  # on a GPU, where a program holds all classes of its pixels


def _unsupported(input: Tensor, most_classes: float = MOST_CLASSES) -> str | None:
    if input.dtype not in FLOAT_AND_DOUBLE_DTYPES:
        return f"dtype {input.dtype}"
    classes = number_of_classes(input)
    return None if 0 < classes <= most_classes else f"{classes} classes"


# --- the sums in torch -----------------------------------------------------------------------------------------------


def _softmax_and_masks(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax in float32 or float64, whether a class is the pixel's label, whether the pixel is not ignored)."""
    valid = (target.long() != ignore_index).unsqueeze(1)
    classes = torch.arange(input.shape[1], device=input.device).view(-1, 1, 1)
    return input.to(accumulator(input.dtype)).softmax(1), (classes == target.unsqueeze(1)) & valid, valid


def _differentiable_sums(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The operator's result by torch's functions.

    loss (2,): the sums of the pixels' losses and weights. sums (N, 3, C): overlap, predicted and labelled of
    kernels/losses/dice_cross_entropy.py.
    """
    softmax, hit, valid = _softmax_and_masks(input, target, ignore_index)
    weights = None if weight is None else weight.to(softmax.dtype)
    logits, labels = input.to(softmax.dtype), target.long()
    loss = F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="sum")
    predicted = torch.where(valid, softmax, 0.0)
    terms = (torch.where(hit, predicted, 0.0), predicted, hit.to(softmax.dtype))
    sums = torch.stack([term.sum((2, 3)) for term in terms], 1)
    return torch.stack((loss, pixel_weights(input, target, weight, ignore_index).sum())), sums


def _differentiable_gradient(
    grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    """The gradient of the logits by torch's formulas, which can be differentiated again."""
    with torch.enable_grad():
        results = _differentiable_sums(input, target, weight, ignore_index)
        return torch.autograd.grad(results, input, (grad_loss, grad_sums), create_graph=True)[0]


# --- operators -------------------------------------------------------------------------------------------------------


def _empty_sums(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype, (n, classes, *_) = accumulator(input.dtype), input.shape
    return tuple(empty(input, shape, torch.contiguous_format, dtype) for shape in ((2,), (n, 3, classes)))


def _dense_inputs(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[LossInputs, bool]:
    """The tensors without gaps, and whether the logits are channels_last."""
    layout, weight = memory_format(input), None if weight is None else weight.contiguous()
    return LossInputs(dense(input, layout), target.contiguous(), weight), layout == torch.channels_last


def _kernel(
    kernels: ModuleType, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if kernels is not cpu_kernels:  # which raise IndexError themselves
        require_labels_in_range("dice_cross_entropy", input.shape[1], target, ignore_index)
    loss, sums = _empty_sums(input, target, weight, ignore_index)
    inputs, channels_last = _dense_inputs(input, target, weight)
    kernels.dice_cross_entropy.dice_cross_entropy_fwd(inputs, ignore_index, channels_last, loss, sums)
    return loss, sums


def _reference(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    require_labels_in_range("dice_cross_entropy", input.shape[1], target, ignore_index)
    return _differentiable_sums(input, target, weight, ignore_index)


DICE_CROSS_ENTROPY = Operator(
    "dice_cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index) -> (Tensor, Tensor)",
    kernels={
        "triton": Implementation(partial(_kernel, triton_kernels), lambda input, *rest: _unsupported(input)),
        "cpu": Implementation(
            partial(_kernel, cpu_kernels),
            lambda input, *rest: _unsupported(input, math.inf),
        ),
    },
    reference=_reference,
    fake=_empty_sums,
)


def _empty_gradient(grad_loss: Tensor, grad_sums: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty_like(input)


def _backward_kernel(
    kernels: ModuleType, grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    grad_input = _empty_gradient(grad_loss, grad_sums, input)
    inputs, channels_last = _dense_inputs(input, target, weight)
    kernels.dice_cross_entropy.dice_cross_entropy_bwd(
        grad_loss.contiguous(), grad_sums.contiguous(), inputs, ignore_index, channels_last, grad_input
    )
    return grad_input


def _backward_reference(
    grad_loss: Tensor, grad_sums: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    softmax, hit, valid = _softmax_and_masks(input, target, ignore_index)
    overlap, predicted, _ = (grad[:, :, None, None] for grad in grad_sums.unbind(1))
    grad_softmax = torch.where(hit, overlap, 0.0) + predicted
    scale = (grad_loss[0] * pixel_weights(input, target, weight, ignore_index)).unsqueeze(1)
    grad = softmax * (grad_softmax - (softmax * grad_softmax).sum(1, keepdim=True))
    grad = grad + scale * (softmax - hit.to(softmax.dtype))
    return placed(torch.where(valid, grad, 0.0).to(input.dtype), memory_format(input))


DICE_CROSS_ENTROPY_BACKWARD = Operator(
    "dice_cross_entropy_backward(Tensor grad_loss, Tensor grad_sums, Tensor input, Tensor target, Tensor? weight, "
    "int ignore_index) -> Tensor",
    kernels={
        "triton": Implementation(
            partial(_backward_kernel, triton_kernels), lambda grad_loss, grad_sums, input, *rest: _unsupported(input)
        ),
        "cpu": Implementation(
            partial(_backward_kernel, cpu_kernels),
            lambda grad_loss, grad_sums, input, *rest: _unsupported(input, math.inf),
        ),
    },
    reference=_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)


class DiceCrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, ignore_index) -> (loss, sums). The gradient is that of both, for input alone."""

    @staticmethod
    @known_signature
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
        return DICE_CROSS_ENTROPY(input, target, weight, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ignore_index = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        run = _differentiable_gradient if wants_graph() else DICE_CROSS_ENTROPY_BACKWARD
        return run(grad_loss, grad_sums, *ctx.saved_tensors, ctx.ignore_index), None, None, None


# --- the function ----------------------------------------------------------------------------------------------------


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
    """Soft Dice plus cross-entropy, with one read of the logits forward, and one read and one write backward.

        loss = ce_weight * cross_entropy + dice_weight * (1 - mean of dice)
        dice[c] = (2 * sum(p[c] * [c = target]) + smooth) / (sum(p[c]) + sum([c = target]) + smooth)

    p is softmax(input). The sums run over the pixels of each sample that are not ignored, the mean over classes and
    samples.

    Args:
        input: logits of any floating-point dtype, in NCHW or channels_last.
        target: class indices of dtype int8, uint8, int16, uint16, int32, uint32 or int64, or whole numbers of float32
            or float64, as MONAI's and smp's masks are.
        weight: the weights of the classes in the cross-entropy, whose mean is torch's weighted mean. Dice weighs all
            classes alike.
        ignore_index: pixels with this label count in neither loss.
        batch: sum over the pixels of the whole batch and not of each sample.
        include_background: False leaves class 0 out of the mean of Dice.
        smooth: added to numerator and denominator of Dice; at least 0.
        dice_weight, ce_weight: the weights of the two losses.

    Shape:
        - input: (C,), (N, C) or (N, C, d1, ...).
        - target: (), (N,) or (N, d1, ...).
        - weight: (C,).
        - output: a scalar.

    Returns:
        The loss in float32, for half-precision logits and under autocast too; in float64 for float64 logits. If every
        pixel is ignored, the cross-entropy is NaN as in torch, and so is the loss.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError, IndexError: as cross_entropy.
        RuntimeError: for class probabilities.
        ValueError: for a negative smooth, and for include_background=False with one class.

    Note:
        Deterministic. The gradient has the input's dtype and memory format; on the kernels that of an ignored pixel is
        exactly 0. Only the logits are kept for the backward. Second derivatives are torch's. On a GPU more than 256
        classes fall back to PyTorch. In channels_last, pixels whose classes are no multiple of 16 bytes are accessed
        in narrower units.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> logits = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]])  # 2 classes, 1 x 2 pixels
        >>> round(FS.dice_cross_entropy(logits, torch.tensor([[[0, 1]]])).item(), 4)
        0.0
        >>> round(FS.dice_cross_entropy(logits, torch.tensor([[[1, 0]]])).item(), 4)  # 18 + 1
        19.0

    Source:
        Dice: Milletari et al., "V-Net", 2016. nnU-Net and MONAI combine the two losses in this way.
    """
    name = "dice_cross_entropy"
    arguments = LossArguments("mean", ignore_index, 0.0, "weights", 0.0)
    target = widened(target)
    check_types(name, input, target, weight, arguments)
    for argument, value in (("smooth", smooth), ("dice_weight", dice_weight), ("ce_weight", ce_weight)):
        require_number(name, argument, value)
    if smooth < 0:
        raise ValueError(f"{name}: smooth must not be negative, but is {smooth}")
    if target.shape != input.shape:
        target = whole_labels(name, target, number_of_classes(input), ignore_index)
    require_labels(name, target)
    options, classes = loss_options(name, input, target, weight, arguments), number_of_classes(input)
    if classes == 0 or (classes == 1 and not include_background):
        what = "" if include_background else " besides the background, which is left out"
        raise ValueError(f"{name}: input must have a class{what}, but has shape {tuple(input.shape)}")
    backend = DICE_CROSS_ENTROPY.choose(input, target, weight, options.ignore_index).backend
    logits, labels = as_images(input), labels_as_images(target)
    if input.dim() == 2:  # each row is a sample
        logits, labels = input[:, :, None, None], target.view(-1, 1, 1)
    function = _differentiable_sums if backend == "torch" else DiceCrossEntropyFunction.apply
    try:
        loss, sums = function(logits, labels, weight, options.ignore_index)
    except IndexError:
        require_labels_in_range(name, classes, target, options.ignore_index)  # to say at which pixel
        raise
    if batch:
        sums = sums.sum(0, keepdim=True)
    overlap, predicted, labelled = sums[:, :, 0 if include_background else 1 :].unbind(1)
    dice = (2 * overlap + smooth) / (predicted + labelled + smooth)
    return ce_weight * (loss[0] / loss[1]) + dice_weight * (1 - dice.mean())
