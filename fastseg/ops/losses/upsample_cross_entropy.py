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
from ..operator import double_backward, empty, memory_format, wants_graph
from .checks import (
    LossArguments,
    check_prediction,
    check_types,
    checked_reduction,
    loss_options,
    require_labels_in_range,
)
from .chunked_reference import gradient_scale
from .cross_entropy import CrossEntropyOutput
from .reference import differentiable_loss
from .resizing import ResizingArguments, check_map, check_resizing, check_target_kind, check_target_size
from .upsample_cross_entropy_operators import (
    NAME,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_BACKWARD,
    in_chunks,
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


def _composes_torch(input: Tensor, target: Tensor, resizing: Resizing) -> bool:
    """Whether torch's two functions run: for class probabilities, and for few classes on a CPU: it is faster there."""
    few = input.shape[1] <= FEW_CLASSES[resizing.mode]
    return target.is_floating_point() or (few and input.device.type == "cpu" and dispatch.get_backend() == "auto")


# --- gradients -------------------------------------------------------------------------------------------------------


def _differentiable_gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions
) -> Tensor | None:
    """The gradient of the logits by torch's formulas, which can be differentiated again."""
    return double_backward(lambda x: _differentiable_loss(x, target, weight, resizing, options), [input], [True], grad)[
        0
    ]


class UpsampleCrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, resizing, options, predicted) -> LossResults. The gradient is the loss's, for input."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
        predicted: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return UPSAMPLE_CROSS_ENTROPY(input, target, weight, resizing, options, predicted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, ctx.resizing, ctx.options, _ = inputs
        _, lse, denominator, *predictions = output
        ctx.mark_non_differentiable(lse, denominator, *predictions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

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


class UpsampleCrossEntropyOnePassFunction(torch.autograd.Function):
    """UpsampleCrossEntropyFunction in torch, for a mean or a sum: the forward makes the gradient, up to a factor."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, resizing: Resizing, options: LossOptions,
        predicted: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        gradient = empty(input, input.shape, memory_format(input), accumulator(input.dtype))
        results = in_chunks(input, target, weight, resizing, options, predicted, gradient)
        return results.loss, gradient, results.denominator, results.prediction, results.counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, ctx.resizing, ctx.options, _ = inputs
        _, gradient, denominator, *predictions = output
        ctx.mark_non_differentiable(gradient, denominator, *predictions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, gradient, denominator)

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
    return wanted and eager and backend == "torch" and input.device.type == "cpu"


# --- functions -------------------------------------------------------------------------------------------------------


def _loss_and_predictions(
    function: str, input: Tensor, target: Tensor, weight: Tensor | None, resizing_arguments: ResizingArguments,
    arguments: LossArguments, predicted: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, prediction, counts), the latter two meaningless unless `predicted` is the dtype of predictions."""
    check_map(function, input)
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
    if predicted is None and _composes_torch(input, target, resizing):
        try:
            return _differentiable_loss(input, target, weight, resizing, options), None, None
        except IndexError:
            require_labels_in_range(NAME, input.shape[1], target, options.ignore_index)  # to say at which pixel
            raise
    one_pass = _takes_one_pass(input, options, backend)
    passes = UpsampleCrossEntropyOnePassFunction if one_pass else UpsampleCrossEntropyFunction
    loss, _, _, prediction, counts = passes.apply(input, target.contiguous(), weight, resizing, options, predicted)
    return loss, prediction, counts


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
    """F.cross_entropy(F.interpolate(input, size, scale_factor, mode, align_corners), target, ...) in one.

    The resized logits are never in memory: on the kernels a call needs the losses or their partial sums, 4 bytes a
    pixel for the backward (8 for float32 logits) and the gradient of `input`; on torch a band of rows besides. On a CPU
    under backend "auto" logits of few classes (8; 32 in mode "nearest") are resized whole, which is faster and holds
    12 bytes a class and pixel.

    input: logits (N, C, h, w) of any strides; float32, float16 and bfloat16 run on the kernels, float64 on torch.
    target: class indices (N, H, W) of dtype uint8, int16, int32 or int64, or class probabilities (N, C, H, W), for
    which torch's two functions run and do store the resized logits. size, scale_factor, align_corners,
    recompute_scale_factor: torch.nn.functional.interpolate's; with neither size nor scale_factor the size is target's.
    mode: "bilinear" or "nearest". The other arguments are fastseg.functional.cross_entropy's.

    Computed, summed and returned in float32 also for half-precision logits (float64 for float64), under autocast too.
    The gradient has input's dtype and memory format. Deterministic, no atomics: the kernels' backward gathers; what
    runs on torch (float64, class probabilities) is as deterministic as torch's own operators. An ignored pixel
    adds exactly 0 to it, whatever its logits. A logit that is infinite or NaN may make NaN of pixels nearby that
    torch's bilinear mode leaves alone. A second derivative is torch's own.

    Raises what the two functions raise: ValueError for both size and scale_factor, another batch size, an unknown
    reduction, align_corners in mode "nearest"; NotImplementedError for other modes, integer or not 4-D logits;
    RuntimeError for a target that has not the output's size, for other shapes, dtypes and devices; and on a CPU
    IndexError for a target that is neither a class nor ignore_index (on a GPU a device-side assertion).
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

    The arguments are upsample_cross_entropy's; target must be class indices. dtype: of the prediction, torch.int64 or
    torch.uint8, which takes an eighth of the memory and holds up to 256 classes. Returns (loss, prediction, correct,
    valid): see CrossEntropyOutput. Of equal values the first class wins, and a NaN wins over numbers, as in
    upsample_argmax. The logits are resized once for all of it, on a CPU in bands for any number of classes.
    Deterministic; the loss alone has a gradient.

    Raises what upsample_cross_entropy raises, RuntimeError for class probabilities, ValueError for another dtype and
    for torch.uint8 with more than 256 classes.
    """
    name = "upsample_cross_entropy_with_predictions"
    reduction = checked_reduction(name, None, None, reduction)
    resizing = ResizingArguments(size, scale_factor, mode, align_corners, recompute_scale_factor)
    arguments = LossArguments(reduction, ignore_index, label_smoothing, normalization, z_loss)
    loss, prediction, counts = _loss_and_predictions(name, input, target, weight, resizing, arguments, dtype)
    return CrossEntropyOutput(loss, prediction, counts[0], counts[1])
