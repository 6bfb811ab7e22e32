"""cross_entropy: gradients and functions. Logits of any rank become the operators' (N, C, H, W) through views."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.losses.options import LossOptions
from ..operator import dense, double_backward, known_signature, memory_format, vmap_loops, wants_graph
from .checks import (
    LossArguments,
    check_prediction,
    check_types,
    checked_reduction,
    loss_options,
    number_of_classes,
    pixels_shape,
    require_labels_in_range,
    widened,
)
from .cross_entropy_operators import (
    CROSS_ENTROPY,
    CROSS_ENTROPY_BACKWARD,
    CROSS_ENTROPY_ONE_PASS,
    CROSS_ENTROPY_ONE_PASS_BACKWARD,
    ONE_PASS_CLASSES,
    one_pass_labels,
)
from .reference import differentiable_loss, predict

# --- gradients -------------------------------------------------------------------------------------------------------


def _differentiable_gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tensor | None:
    """The gradient of the logits by torch's formulas, which can be differentiated again."""
    return double_backward(lambda x: differentiable_loss(x, target, weight, options), [input], [True], grad)[0]


class CrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, options, predicted) -> LossResults. The gradient is that of the loss, for input alone."""

    @staticmethod
    @known_signature
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        return CROSS_ENTROPY(input, target, weight, options, predicted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, ctx.options, _ = inputs
        _, lse, denominator, *predictions = output
        ctx.mark_non_differentiable(lse, denominator, *predictions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, CrossEntropyFunction, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        input, target, weight, lse, denominator = ctx.saved_tensors
        if wants_graph():
            found = _differentiable_gradient(grad, input, target, weight, ctx.options)
        else:
            found = CROSS_ENTROPY_BACKWARD(grad, input, target, weight, lse, denominator, ctx.options)
        return found, None, None, None, None


class CrossEntropyOnePassFunction(torch.autograd.Function):
    """(input, target, weight, options, predicted) -> OnePassResults.

    The first backward returns the forward's gradient unchanged if grad_output is 1. Every later one recomputes it,
    because the caller may have written to the first.
    """

    @staticmethod
    @known_signature
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        return CROSS_ENTROPY_ONE_PASS(input, target, weight, options, predicted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, ctx.options, _ = inputs
        _, ctx.grad_input, packed, denominator, *_ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, packed, denominator)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, CrossEntropyOnePassFunction, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        input, target, weight, packed, denominator = ctx.saved_tensors
        if wants_graph():
            found = _differentiable_gradient(grad, input, target, weight, ctx.options)
            return found, None, None, None, None
        grad_input, ctx.grad_input = ctx.grad_input, None
        if grad_input is None:
            _, grad_input, *_ = CROSS_ENTROPY_ONE_PASS(input, target, weight, ctx.options, None)
        labels, options = one_pass_labels(target, packed, ctx.options)
        CROSS_ENTROPY_ONE_PASS_BACKWARD(grad_input, grad, input, labels, weight, denominator, options)
        return grad_input, None, None, None, None


# --- functions -------------------------------------------------------------------------------------------------------


def as_images(x: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ...) as a dense (N, C, H, W), a view if its strides allow one."""
    if x.dim() == 1:
        x = x.unsqueeze(0)
    if x.dim() == 2:
        x = x.unsqueeze(0).movedim(-1, 1).unsqueeze(2)  # the rows of one image, channels_last if they are dense
    elif x.dim() != 4:
        x = x.flatten(2).unsqueeze(2)
    return dense(x, memory_format(x))


def labels_as_images(target: Tensor) -> Tensor:
    """Labels (), (N,) or (N, d1, ...) as a dense (N, H, W)."""
    if target.dim() <= 1:
        return target.reshape(1, 1, -1)
    return (target if target.dim() == 3 else target.flatten(1).unsqueeze(1)).contiguous()


class CrossEntropyOutput(NamedTuple):
    """The result of cross_entropy_with_predictions and upsample_cross_entropy_with_predictions.

    loss: that of the function without predictions. prediction: the class of each pixel's largest logit, in the shape
    of the target. correct: the number of pixels that are predicted right and not ignored. valid: the number of pixels
    that are not ignored. Both are int64 scalars on input's device.
    """

    loss: Tensor
    prediction: Tensor
    correct: Tensor
    valid: Tensor


def _loss_and_predictions(
    function: str, input: Tensor, target: Tensor, weight: Tensor | None, arguments: LossArguments,
    one_pass: bool | None, predicted: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, prediction, counts), the latter two meaningless unless `predicted` is the dtype of predictions."""
    target = widened(target)
    check_types(function, input, target, weight, arguments)
    classes = number_of_classes(input)
    if predicted is not None:
        check_prediction(function, classes, target, predicted)
    options = loss_options(function, input, target, weight, arguments)
    if one_pass and not options.is_reduced:
        raise ValueError(
            f"{function}: one_pass must be left out for reduction 'none', which takes two passes, but is {one_pass}"
        )
    backend = CROSS_ENTROPY.choose(input, target, weight, options, predicted).backend
    try:
        if backend == "torch":
            return _in_torch(input, target, weight, options, predicted)
        passes = CrossEntropyFunction
        if backend in ("triton", "cpu") and _takes_one_pass(input, classes, options, one_pass):
            passes = CrossEntropyOnePassFunction
        return _in_operators(passes, input, target, weight, options, predicted)
    except IndexError:
        require_labels_in_range(function, classes, target, options.ignore_index)  # to say at which pixel
        raise


def _takes_one_pass(input: Tensor, classes: int, options: LossOptions, one_pass: bool | None) -> bool:
    """Whether the forward makes the gradient, which pays if the gradient of the loss is going to be 1.

    Not by default for float16, whose losses are scaled; never in a compiled graph, which cannot return a saved tensor.
    """
    if one_pass is None:
        one_pass = input.dtype != torch.float16
    wanted = input.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return one_pass and wanted and options.is_reduced and classes <= ONE_PASS_CLASSES


def _in_torch(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, predicted: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    loss = differentiable_loss(input, target, weight, options)
    if predicted is None:
        return loss, None, None
    with torch.no_grad():
        best, counts = predict(as_images(input), labels_as_images(target), options.ignore_index)
    return loss, best.to(predicted), counts


def _in_operators(
    passes: type[torch.autograd.Function], input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions,
    predicted: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = as_images(input)
    if target.is_floating_point():
        targets = dense(as_images(target), memory_format(logits))
    else:
        targets = labels_as_images(target)
    loss, *_, prediction, counts = passes.apply(logits, targets, weight, options, predicted)
    return loss if options.is_reduced else loss.reshape(pixels_shape(input)), prediction, counts


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    normalization: str = "weights",
    z_loss: float = 0.0,
    one_pass: bool | None = None,
) -> Tensor:
    """Cross-entropy as torch.nn.functional.cross_entropy: deterministic, in one pass over the logits or in two.

        loss = sum_c q[c] * (lse - x[c]) + z_loss * lse ** 2          of one pixel, lse = log(sum_c exp(x[c]))
        q[c] = weight[c] * ((1 - label_smoothing) * [c = target] + label_smoothing / C)

    For class probabilities, target[c] takes the place of [c = target].

    Args:
        input: logits of any floating-point dtype, in NCHW or channels_last (with other numbers of dimensions: classes
            second or last in memory). Other strides are made dense once.
        target: class indices of dtype int8, uint8, int16, uint16, int32, uint32 or int64 (torch: int64, and uint8 for
            (N, C) input), or class probabilities.
        weight: the weights of the classes, of float32 or the input's dtype.
        size_average, reduce: deprecated, as in torch.
        ignore_index: pixels with this label do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: between 0 and 1.
        normalization: the divisor of a mean. "weights": the sum of the weights of the pixels that are not ignored (of
            class probabilities: the number of pixels), as in torch; "valid": the number of pixels that are not ignored,
            as in Caffe; "pixels": the number of all pixels; "batch": N, as in FCN.
        z_loss: the weight of PaLM's auxiliary loss, which is added for each pixel that is not ignored and is not
            multiplied by the class weights.
        one_pass: whether the forward of a mean or a sum also computes the gradient. It saves a third of the bytes if
            the gradient of the loss is 1 (``loss.backward()``), costs a third more if it is not (a weighted or scaled
            loss), and gives the same result up to rounding. None: for all dtypes but float16, whose losses are scaled.
            Only on the Triton kernels, for up to 256 classes, outside compiled graphs. Two passes keep 4 bytes per
            pixel for the backward, 8 for float32 logits.

    Shape:
        - input: (C,), (N, C) or (N, C, d1, ...).
        - target: (), (N,) or (N, d1, ...); class probabilities: the shape of the input.
        - weight: (C,).
        - output: a scalar; with reduction "none" the shape of the class indices.

    Returns:
        The loss in float32, for half-precision logits and under autocast too (torch returns the input's dtype); in
        float64 for float64 logits. If every pixel is ignored, a mean over "weights" or "valid" is NaN, the sum 0 and
        the gradient 0, as in torch.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for another batch size, an unknown reduction or normalization, and for a normalization or one_pass
            that has no meaning for the reduction.
        RuntimeError: for other wrong shapes, dtypes and devices, and for a label_smoothing outside [0, 1].
        NotImplementedError: for integer logits, and if requested kernels do not support the call.
        IndexError: on a CPU, for a label that is neither a class nor ignore_index. On a GPU that is a device-side
            assertion, and no memory is read at such an index.

    Note:
        Deterministic, without atomics. Computed and summed in float32 (float64). The gradient has the input's dtype and
        memory format. On the kernels the gradient of an ignored pixel is exactly 0, even if its logits are NaN or
        infinite (torch: NaN). Gradients of class probabilities and of weights, and second derivatives, are torch's.
        Kernels are compiled once for each value of label_smoothing and z_loss.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])  # 2 classes, 1 x 2 pixels
        >>> FS.cross_entropy(logits, torch.tensor([[[0, 1]]]), reduction="none")
        tensor([[[0.1269, 0.6931]]])

    Source:
        torch.nn.functional.cross_entropy. z_loss: Chowdhery et al., "PaLM", 2022.
    """
    reduction = checked_reduction("cross_entropy", size_average, reduce, reduction)
    arguments = LossArguments(reduction, ignore_index, label_smoothing, normalization, z_loss)
    loss, *_ = _loss_and_predictions("cross_entropy", input, target, weight, arguments, one_pass, None)
    return loss


def cross_entropy_with_predictions(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalization: str = "weights",
    z_loss: float = 0.0,
    one_pass: bool | None = None,
    dtype: torch.dtype = torch.int64,
) -> CrossEntropyOutput:
    """cross_entropy of class indices, and from the same read of the logits the argmax and the number of right pixels.

    Args:
        input, target, weight, ignore_index, reduction, label_smoothing, normalization, z_loss, one_pass: as in
            cross_entropy; the target must be class indices.
        dtype: that of the prediction: torch.int64, or torch.uint8, which takes an eighth of the memory and holds up to
            256 classes.

    Shape:
        - input: (C,), (N, C) or (N, C, d1, ...).
        - target, prediction: (), (N,) or (N, d1, ...).
        - loss: a scalar; with reduction "none" the shape of the target. correct, valid: scalars.

    Returns:
        CrossEntropyOutput(loss, prediction, correct, valid). Only the loss has a gradient.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError, IndexError: as cross_entropy.
        RuntimeError: for class probabilities.
        ValueError: for another dtype, and for torch.uint8 with more than 256 classes.

    Note:
        Deterministic. Of equal logits the first class wins, and NaN wins over numbers, as in torch.argmax.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
        >>> loss, prediction, correct, valid = FS.cross_entropy_with_predictions(logits, target)
        >>> prediction, correct, valid
        (tensor([0, 1, 0]), tensor(2), tensor(3))
    """
    name = "cross_entropy_with_predictions"
    reduction = checked_reduction(name, None, None, reduction)
    arguments = LossArguments(reduction, ignore_index, label_smoothing, normalization, z_loss)
    loss, prediction, counts = _loss_and_predictions(name, input, target, weight, arguments, one_pass, dtype)
    return CrossEntropyOutput(loss, prediction.reshape(pixels_shape(input)), counts[0], counts[1])
