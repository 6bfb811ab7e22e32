"""upsample_cross_entropy and its predictions: gradients and functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, torch_internals
from ...kernels.losses.options import LossOptions, Resizing
from ..arguments import accumulator
from ..operator import double_backward, known_signature, wants_graph
from .checks import (
    LossArguments,
    check_prediction,
    check_types,
    checked_reduction,
    loss_options,
    require_labels_in_range,
    widened,
)
from .chunked_reference import gradient_scale
from .cross_entropy import CrossEntropyOutput
from .reference import differentiable_loss
from .resizing import ResizingArguments, check_map, check_resizing, check_target_kind, check_target_size
from .upsample_cross_entropy_operators import (
    NAME,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_BACKWARD,
    UPSAMPLE_CROSS_ENTROPY_ONE_PASS,
    few_logits,
    resized_shape,
)

FEW_CLASSES = {"bilinear": 8, "nearest": 32}  # up to so many a CPU resizes the whole map faster than in chunks

# --- torch's two functions -------------------------------------------------------------------------------------------


def _known_to_be_finite(x: Tensor) -> bool:
    """Whether the values were checked, which needs a CPU tensor that is not being traced, and all are finite."""
    traced = (
        torch.compiler.is_compiling() or torch_internals.functorch_transforms_active() or torch_internals.is_fake(x)
    )
    return x.device.type == "cpu" and not traced and math.isfinite(float(x.detach().abs().amax()))


def _differentiable_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions
) -> Tensor:
    """The loss by torch's two functions, in float32 or float64: they store the resized logits."""
    # F.interpolate takes a size or scales; the operator below it takes both.
    resize = getattr(torch.ops.aten, f"upsample_{resizing.mode}2d").default
    corners = () if resizing.mode == "nearest" else (resizing.align_corners,)
    scales = resizing.scales or (None, None)
    large = resize(input.to(accumulator(input.dtype)), list(target.shape[-2:]), *corners, *scales)
    if not target.is_floating_point():
        target = target.long()
        if not _known_to_be_finite(input):  # an infinite or NaN logit of an ignored pixel makes torch's gradient NaN
            large = large.masked_fill((target == options.ignore_index).unsqueeze(1), 0.0)
    return differentiable_loss(large, target, weight, options)


def _composes_torch(input: Tensor, target: Tensor, resizing: Resizing, backend: str) -> bool:
    """Whether torch's two functions run: for class probabilities, and on a CPU where they are the fastest.

    That is with few classes where no CPU kernels run, since chunks are slower there, and with few logits where they do.
    """
    if target.is_floating_point():
        return True
    few = input.shape[1] <= FEW_CLASSES[resizing.mode]
    few = few or (few_logits(input, target) and dispatch.without_cpu_kernels() is None)
    return few and backend == "torch" and input.device.type == "cpu" and dispatch.get_backend() == "auto"


# --- gradients -------------------------------------------------------------------------------------------------------


def _differentiable_gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions
) -> Tensor | None:
    """The gradient of the logits by torch's formulas, which can be differentiated again."""
    gradients = double_backward(
        lambda x: _differentiable_loss(x, target, weight, resizing, options), [input], [True], grad
    )
    return gradients[0]


class UpsampleCrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, resizing, options, predicted) -> LossResults. The gradient is the loss's, for input."""

    @staticmethod
    @known_signature
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
        predicted: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return UPSAMPLE_CROSS_ENTROPY(input, target, weight, resizing, options, predicted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, ctx.resizing, ctx.options, _ = inputs
        _, made, denominator, *predictions = output  # made: lse; in one pass the gradient
        ctx.mark_non_differentiable(made, denominator, *predictions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, made, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        *tensors, lse, denominator = ctx.saved_tensors
        if wants_graph():
            found = _differentiable_gradient(grad, *tensors, ctx.resizing, ctx.options)
        else:
            found = UPSAMPLE_CROSS_ENTROPY_BACKWARD(grad, *tensors, lse, denominator, ctx.resizing, ctx.options)
        return found, None, None, None, None, None


class UpsampleCrossEntropyOnePassFunction(UpsampleCrossEntropyFunction):
    """UpsampleCrossEntropyFunction on a CPU, for a mean or a sum: the forward makes the gradient, up to a factor."""

    @staticmethod
    @known_signature
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
        predicted: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return UPSAMPLE_CROSS_ENTROPY_ONE_PASS(input, target, weight, resizing, options, predicted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        input, target, weight, gradient, denominator = ctx.saved_tensors
        if wants_graph():
            found = _differentiable_gradient(grad, input, target, weight, ctx.resizing, ctx.options)
        else:
            found = (gradient * gradient_scale(grad, denominator, target, ctx.options)).to(input.dtype)
        return found, None, None, None, None, None


def _takes_one_pass(input: Tensor, options: LossOptions, backend: str) -> bool:
    """Whether the forward makes the gradient, which saves one resizing: in eager code on a CPU."""
    wanted = torch.is_grad_enabled() and input.requires_grad and options.is_reduced
    eager = not torch.compiler.is_compiling() and not torch_internals.functorch_transforms_active()
    return wanted and eager and backend in ("torch", "cpu") and input.device.type == "cpu"


# --- functions -------------------------------------------------------------------------------------------------------


def _loss_and_predictions(
    function: str, input: Tensor, target: Tensor, weight: Tensor | None, resizing_arguments: ResizingArguments,
    arguments: LossArguments, predicted: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, prediction, counts), the latter two meaningless unless `predicted` is the dtype of predictions."""
    check_map(function, input)
    target = widened(target)
    check_types(function, input, target, weight, arguments)
    if predicted is not None:
        check_prediction(function, input.shape[1], target, predicted)
    check_target_kind(function, input, target)
    if resizing_arguments.size is None and resizing_arguments.scale_factor is None and 0 in target.shape[-2:]:
        raise RuntimeError(f"{function}: target must have rows and columns, but has shape {tuple(target.shape)}")
    size, resizing = check_resizing(function, input, resizing_arguments, default_size=target.shape[-2:])
    check_target_size(function, input, size, target)
    options = loss_options(function, resized_shape(input, size), target, weight, arguments)
    backend = UPSAMPLE_CROSS_ENTROPY.choose(input, target, weight, resizing, options, predicted).backend
    try:
        if predicted is None and _composes_torch(input, target, resizing, backend):
            return _differentiable_loss(input, target, weight, resizing, options), None, None
        one_pass = _takes_one_pass(input, options, backend)
        passes = UpsampleCrossEntropyOnePassFunction if one_pass else UpsampleCrossEntropyFunction
        loss, _, _, prediction, counts = passes.apply(input, target.contiguous(), weight, resizing, options, predicted)
        return loss, prediction, counts
    except IndexError:
        require_labels_in_range(NAME, input.shape[1], target, options.ignore_index)  # to say at which pixel
        raise


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
    *,
    normalization: str = "weights",
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits resized to the size of the target: the large logits are never stored.

        loss = cross_entropy(interpolate(input, size, scale_factor, mode, align_corners), target, weight, ...)

    Args:
        input: logits of any strides. float32, float16 and bfloat16 run on the kernels, float64 falls back to PyTorch.
        target: class indices of dtype int8, uint8, int16, uint16, int32, uint32 or int64, or class probabilities, for
            which torch's two functions run, and store the resized logits.
        weight: the weights of the classes, of float32 or the input's dtype.
        size, scale_factor, align_corners, recompute_scale_factor: as in torch.nn.functional.interpolate. Without size
            and scale_factor, the size is that of the target.
        mode: "bilinear" or "nearest".
        ignore_index, reduction, label_smoothing, normalization, z_loss: as in cross_entropy.

    Shape:
        - input: (N, C, h, w).
        - target: (N, H, W); class probabilities: (N, C, H, W).
        - weight: (C,).
        - output: a scalar; with reduction "none" (N, H, W).

    Returns:
        The loss in float32, for half-precision logits and under autocast too; in float64 for float64 logits.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError, IndexError: as interpolate and cross_entropy. For
            instance ValueError for both size and scale_factor, NotImplementedError for another mode, and RuntimeError
            for a target that does not have the output's size.

    Note:
        Deterministic, without atomics: the backward of the kernels gathers. Class probabilities and float64 are as
        deterministic as torch's own operators. The gradient has the input's dtype and memory format. An ignored
        pixel adds exactly 0 to it, whatever its logits. An infinite or NaN logit may make the loss of neighbouring
        pixels NaN that torch's bilinear mode would not touch. Second derivatives are torch's.

        On the kernels a call needs memory for the losses or their partial sums, 4 bytes per pixel for the backward (8
        for float32 logits) and the gradient of the input; in PyTorch also for a chunk of rows. On a CPU under backend
        "auto", logits of up to 8 classes (32 in mode "nearest") are resized whole, which is faster and takes 12 bytes
        per class and pixel.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])  # 2 classes, 1 x 2 pixels
        >>> FS.upsample_cross_entropy(logits, torch.tensor([[[0, 0, 0, 1]]]), reduction="none")
        tensor([[[0.0486, 0.1269, 0.6931, 0.3133]]])

    Source:
        torch.nn.functional.interpolate and cross_entropy.
    """
    reduction = checked_reduction(NAME, None, None, reduction)
    resizing = ResizingArguments(size, scale_factor, mode, align_corners, recompute_scale_factor)
    arguments = LossArguments(reduction, ignore_index, label_smoothing, normalization, z_loss)
    loss, *_ = _loss_and_predictions(NAME, input, target, weight, resizing, arguments, None)
    return loss


def upsample_cross_entropy_with_predictions(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "bilinear",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalization: str = "weights",
    z_loss: float = 0.0,
    dtype: torch.dtype = torch.int64,
) -> CrossEntropyOutput:
    """upsample_cross_entropy of class indices, and of the same resized logits the argmax and number of right pixels.

    The logits are resized once for all results; on a CPU in chunks, whatever the number of classes.

    Args:
        input, target: as in upsample_cross_entropy; the target must be class indices.
        weight, ignore_index, reduction, label_smoothing, normalization, z_loss: as in upsample_cross_entropy.
        size, scale_factor, mode, align_corners, recompute_scale_factor: as in upsample_cross_entropy.
        dtype: that of the prediction: torch.int64, or torch.uint8, which takes an eighth of the memory and holds up to
            256 classes.

    Shape:
        - input: (N, C, h, w).
        - target, prediction: (N, H, W).
        - loss: a scalar; with reduction "none" (N, H, W). correct, valid: scalars.

    Returns:
        CrossEntropyOutput(loss, prediction, correct, valid). Only the loss has a gradient.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError, IndexError: as upsample_cross_entropy.
        RuntimeError: for class probabilities.
        ValueError: for another dtype, and for torch.uint8 with more than 256 classes.

    Note:
        Deterministic. Of equal logits the first class wins, and NaN wins over numbers, as in upsample_argmax.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])  # 2 classes, 1 x 2 pixels
        >>> output = FS.upsample_cross_entropy_with_predictions(logits, torch.tensor([[[0, 0, 1, 1]]]))
        >>> output.prediction, output.correct, output.valid
        (tensor([[[0, 0, 0, 1]]]), tensor(3), tensor(4))
    """
    name = "upsample_cross_entropy_with_predictions"
    reduction = checked_reduction(name, None, None, reduction)
    resizing = ResizingArguments(size, scale_factor, mode, align_corners, recompute_scale_factor)
    arguments = LossArguments(reduction, ignore_index, label_smoothing, normalization, z_loss)
    loss, prediction, counts = _loss_and_predictions(name, input, target, weight, resizing, arguments, dtype)
    return CrossEntropyOutput(loss, prediction, counts[0], counts[1])
