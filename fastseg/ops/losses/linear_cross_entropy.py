"""linear_cross_entropy: a 1x1 classifier and its cross-entropy, a chunk of pixels at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, torch_internals
from ...kernels.losses.options import LossOptions
from ..arguments import accumulator, autocast_dtype, require_tensor
from ..operator import double_backward, wants_graph
from .checks import (
    LossArguments,
    check_types,
    checked_reduction,
    loss_options,
    pixels_shape,
    require_labels_in_range,
    widened,
)
from .chunked_reference import chunk_losses_and_gradient, gradient_scale, reduce_chunks, smoothed_shares
from .cross_entropy import as_images, labels_as_images
from .linear_cross_entropy_operators import (
    LINEAR_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY_BACKWARD,
    NAME,
    LinearInputs,
    differentiable_linear_loss,
    empty_gradients,
    empty_logits,
    empty_results,
    pixel_chunks,
)

Needed = tuple[bool, bool, bool]  # whether input, linear_weight and linear_bias need a gradient

# --- gradients -------------------------------------------------------------------------------------------------------


def _differentiable_gradients(
    grad: Tensor, inputs: LinearInputs, options: LossOptions, needed: Needed
) -> list[Tensor | None]:
    """The gradients by torch's formulas, which can be differentiated again."""
    input, linear_weight, linear_bias, target, weight = inputs
    return double_backward(
        lambda *leaves: differentiable_linear_loss(*leaves, target, weight, options),
        (input, linear_weight, linear_bias), needed, grad,
    )  # fmt: skip


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, weight, options, chunk) -> (loss, lse, denominator).

    The gradient is that of the loss, for input, linear_weight and linear_bias.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        options: LossOptions, chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return LINEAR_CROSS_ENTROPY(input, linear_weight, linear_bias, target, weight, options, chunk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.options, ctx.chunk = inputs
        _, lse, denominator = output
        ctx.mark_non_differentiable(lse, denominator)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, lse, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None, None
        *tensors, lse, denominator = ctx.saved_tensors
        inputs, needed = LinearInputs(*tensors), ctx.needs_input_grad[:3]
        if wants_graph():
            found = _differentiable_gradients(grad, inputs, ctx.options, needed)
        else:
            found = LINEAR_CROSS_ENTROPY_BACKWARD(grad, inputs, lse, denominator, ctx.options, ctx.chunk, needed)
        return *_only_needed(found, needed), None, None, None, None


class LinearCrossEntropyOnePassFunction(torch.autograd.Function):
    """LinearCrossEntropyFunction in torch, for a mean or a sum: the forward makes the gradients, up to a factor.

    (input, linear_weight, linear_bias, target, weight, options, needed) -> (loss, denominator, gradients...).
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        options: LossOptions, needed: Needed,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs = LinearInputs(input, linear_weight, linear_bias, target, weight)
        require_labels_in_range(NAME, inputs.classes, target, options.ignore_index)
        loss, _, denominator = empty_results(*inputs, options, 0)
        grads = _, grad_weight, grad_bias = empty_gradients(inputs, needed)
        grad_weight.zero_()
        grad_bias.zero_()
        shares = smoothed_shares(empty_logits(input, inputs.classes), weight, options.label_smoothing)
        parts = []
        for pixels in pixel_chunks(inputs, 0):
            features = pixels.features(input)
            logits = pixels.logits(features, linear_weight, linear_bias)
            labels = pixels.pixels(target).long()
            losses, divisor = chunk_losses_and_gradient(logits, labels, weight, shares, options)
            parts.append((losses.sum(), divisor.sum(dtype=losses.dtype)))
            pixels.add_gradients(pixels.as_matrix(logits), features, linear_weight, grads, needed)
        reduce_chunks(parts, options, loss, denominator)
        return loss, denominator, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.needed = inputs
        _, denominator, *grads = output
        ctx.mark_non_differentiable(denominator, *grads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, denominator, *grads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None, None
        *tensors, denominator, grad_input, grad_weight, grad_bias = ctx.saved_tensors
        inputs = LinearInputs(*tensors)
        if wants_graph():
            found = _differentiable_gradients(grad, inputs, ctx.options, ctx.needed)
        else:
            scale = gradient_scale(grad, denominator, inputs.target, ctx.options)
            grads = _only_needed((grad_input, grad_weight, grad_bias), ctx.needed)
            found = [None if x is None else x * scale for x in grads]
        return *found, None, None, None, None


def _only_needed(grads: Sequence[Tensor | None], needed: Needed) -> list[Tensor | None]:
    return [x if need else None for x, need in zip(grads, needed, strict=True)]


def _composes_torch(features: Tensor, classes: int, chunk: int | None) -> bool:
    """Whether torch's two functions run on a CPU: if the logits are small compared to the features, they are faster."""
    few = 2 * classes <= features.shape[1] and features.dtype == accumulator(features.dtype)
    return chunk is None and few and features.device.type == "cpu" and dispatch.get_backend() == "auto"


def _takes_one_pass(leaves: tuple[Tensor, Tensor, Tensor | None], options: LossOptions, chunk: int | None) -> bool:
    """Whether the forward makes the gradients, which saves a matrix product: in eager code on a CPU, by default."""
    input, _, _ = leaves
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    eager = not torch.compiler.is_compiling() and not torch_internals.functorch_transforms_active()
    on_torch = input.device.type == "cpu" and dispatch.get_backend() != "triton"
    full_precision = input.dtype == accumulator(input.dtype)
    return wanted and eager and on_torch and full_precision and options.is_reduced and chunk is None


# --- the function ----------------------------------------------------------------------------------------------------


def _check_linear(input: Tensor, linear_weight: Any, linear_bias: Any) -> None:
    for name, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if value is not None or name == "linear_weight":
            require_tensor(NAME, name, value)
        if value is not None and value.device != input.device:
            raise RuntimeError(f"{NAME}: {name} must be on input's device {input.device}, but is on {value.device}")
        if value is not None and autocast_dtype(value) != autocast_dtype(input):
            raise RuntimeError(f"{NAME}: {name} must be of input's dtype {input.dtype}, but is of {value.dtype}")
    features = input.shape[0 if input.dim() == 1 else 1]
    if linear_weight.shape != (linear_weight.shape[:1] + (features,) + (1,) * (linear_weight.dim() - 2)):
        raise RuntimeError(
            f"{NAME}: linear_weight must have shape (C, {features}) or (C, {features}, 1, 1) for input of shape "
            f"{tuple(input.shape)}, but has {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"{NAME}: linear_bias must have shape ({linear_weight.shape[0]},), one for each class, but has "
            f"{tuple(linear_bias.shape)}"
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    normalization: str = "weights",
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """A 1x1 classifier and its cross-entropy, a chunk of pixels at a time: the logits are never stored.

        loss = cross_entropy(conv2d(input, linear_weight, linear_bias), target, weight, ...)

    Only the logits of `chunk` pixels and their gradient are in memory at a time, besides 8 bytes per pixel (16 for
    float64) and the gradients. The backward recomputes the logits.

    Args:
        input: features of any floating-point dtype, in NCHW or channels_last.
        linear_weight, linear_bias: the classifier, in the dtype of the input.
        target: class indices or class probabilities, as in cross_entropy. For class probabilities torch's two functions
            run, and store the logits.
        weight, reduction, ignore_index, label_smoothing, normalization, z_loss: as in cross_entropy.
        chunk: the number of pixels of a chunk. None: as many as fit in the caches of a CPU, or fill a GPU.

    Shape:
        - input: (N, D, H, W), or (D,), (N, D) and (N, D, d1, ...) as in torch.nn.functional.linear_cross_entropy.
        - linear_weight: (C, D) or (C, D, 1, 1); linear_bias: (C,).
        - target: (N, H, W); class probabilities: (N, C, H, W).
        - output: a scalar; with reduction "none" the shape of the class indices.

    Returns:
        The loss in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError, IndexError: as cross_entropy.
        RuntimeError: for a classifier whose shape, dtype or device does not fit the input.
        ValueError: for a chunk below 1.

    Note:
        Logits, losses and all sums over pixels are float32 (float64). Under autocast the features and the classifier
        are cast as for a convolution, and the result of their matrix product is float32. Deterministic if torch.mm is:
        chunks are added in order. Second derivatives are torch's.

        On a CPU in float32 and float64, if no `chunk` is given: under backend "auto" torch's two functions run if there
        are at most half as many classes as features, which is faster. With more classes, the forward of a mean or a
        sum in eager code also computes the gradients, which saves a matrix product, and keeps them for the backward.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> features, classifier = torch.zeros(1, 16, 2, 2), torch.zeros(5, 16)
        >>> round(FS.linear_cross_entropy(features, classifier, torch.zeros(1, 2, 2, dtype=torch.long)).item(), 4)
        1.6094

    Source:
        torch.nn.functional.linear_cross_entropy.
    """
    reduction = checked_reduction(NAME, None, None, reduction)
    arguments = LossArguments(reduction, ignore_index, label_smoothing, normalization, z_loss)
    target = widened(target)
    check_types(NAME, input, target, weight, arguments)
    _check_linear(input, linear_weight, linear_bias)
    if chunk is not None and chunk < 1:
        raise ValueError(f"{NAME}: chunk must be at least 1 pixel, but is {chunk}")
    input, linear_weight, linear_bias = (
        None if x is None else x.to(autocast_dtype(x)) for x in (input, linear_weight.flatten(1), linear_bias)
    )
    classes = linear_weight.shape[0]
    logits = input.new_empty(()).expand((*input.shape[: input.dim() > 1], classes, *input.shape[2:]))
    options = loss_options(NAME, logits, target, weight, arguments)
    features = as_images(input)
    labels = as_images(target) if target.is_floating_point() else labels_as_images(target)
    leaves = (features, linear_weight, linear_bias)
    LINEAR_CROSS_ENTROPY.choose(*leaves, labels, weight, options, chunk or 0)
    if target.is_floating_point() or _composes_torch(features, classes, chunk):
        try:
            loss = differentiable_linear_loss(*leaves, labels, weight, options)
        except IndexError:
            require_labels_in_range(NAME, classes, labels, options.ignore_index)  # to say at which pixel
            raise
    elif _takes_one_pass(leaves, options, chunk):
        needed = tuple(x is not None and x.requires_grad for x in leaves)
        loss, *_ = LinearCrossEntropyOnePassFunction.apply(*leaves, labels, weight, options, needed)
    else:
        loss, *_ = LinearCrossEntropyFunction.apply(*leaves, labels, weight, options, chunk or 0)
    return loss if options.is_reduced else loss.reshape(pixels_shape(logits))
