"""linear_cross_entropy: a 1x1 classifier and its cross-entropy, a chunk of pixels at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import dispatch, torch_internals
from ..convolution.conv_transpose import _dtype
from ..operator import double_backward, wants_graph
from .checks import (
    check_normalization,
    check_number,
    check_target,
    check_types,
    check_weight,
    checked_reduction,
    computed,
    divided,
    pixels_shape,
    refuse_strays,
)
from .chunked_reference import chunk_losses_and_gradient, even_shares, factor_of, reduced
from .cross_entropy import as_images, labels_as_images
from .cross_entropy_operators import uncovered
from .linear_cross_entropy_operators import (
    LINEAR_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY_BACKWARD,
    NAME,
    Arguments,
    _chunk_pixels,
    _chunks,
    _differentiable,
    _empty_gradients,
    _empty_results,
    _logits_like,
)

NOTHING = (None,) * (2 + len(Arguments._fields))  # the gradients of target, weight and arguments


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, weight, *Arguments) -> (loss, lse, denominator).

    The gradient is the loss's, of input, linear_weight and linear_bias.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float, chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        # By name, not as *arguments: by their number torch.compile tells that there is no ctx.
        arguments = (reduction, count, ignore_index, label_smoothing, z_loss, chunk)
        return LINEAR_CROSS_ENTROPY(input, linear_weight, linear_bias, target, weight, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.arguments = inputs[5:]
        _, lse, denominator = output
        ctx.mark_non_differentiable(lse, denominator)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], lse, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if grad is None:
            return None, None, None, *NOTHING
        *tensors, lse, denominator = ctx.saved_tensors
        if wants_graph():
            inputs = (*tensors, *ctx.arguments)
            found = double_backward(_differentiable, inputs, (*needed, *(False,) * len(NOTHING)), grad)[:3]
            return *found, *NOTHING
        found = LINEAR_CROSS_ENTROPY_BACKWARD(grad, *tensors, lse, denominator, *ctx.arguments, needed)
        return *(x if need else None for x, need in zip(found, needed, strict=True)), *NOTHING


class LinearCrossEntropyOnePassFunction(torch.autograd.Function):
    """The same of a mean or a sum, whose forward makes the gradients of `needed` too, but for a factor."""

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        needed: tuple[bool, bool, bool], *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        a = Arguments(*rest)
        refuse_strays(NAME, linear_weight.shape[0], target, a.ignore_index)
        loss, _, denominator = _empty_results(input, linear_weight, linear_bias, target, weight, *rest)
        grads = _empty_gradients(loss, input, linear_weight, linear_bias, needed)
        for sums in grads[1:]:
            sums.zero_()
        shares = even_shares(weight, a.label_smoothing, _logits_like(input, linear_weight.shape[0]))
        parts = []
        for chunk in _chunks(input, _chunk_pixels(a.chunk, input, linear_weight.shape[0])):
            features = chunk.features(input)
            logits = chunk.logits(features, linear_weight, linear_bias)
            part, divisor = chunk_losses_and_gradient(
                logits, chunk.pixels(target).long(), weight, shares, a.reduction, a.ignore_index, a.label_smoothing,
                a.z_loss,
            )  # fmt: skip
            parts.append((part.sum(), divisor.sum(dtype=part.dtype)))
            chunk.add_gradients(chunk.flat(logits), features, linear_weight, grads, needed)
        reduced(parts, a.reduction, a.count, loss, denominator)
        return loss, denominator, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needed, *ctx.arguments = inputs[5:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (*NOTHING, None)
        if grad is None:
            return None, None, None, *nothing
        *tensors, denominator, grad_input, grad_weight, grad_bias = ctx.saved_tensors
        if wants_graph():
            inputs = (*tensors, *ctx.arguments)
            found = double_backward(_differentiable, inputs, (*ctx.needed, *(False,) * len(NOTHING)), grad)[:3]
            return *found, *nothing
        a = Arguments(*ctx.arguments)
        scale = factor_of(grad, denominator, a.reduction, tensors[3], a.ignore_index)
        grads = (grad_input, grad_weight, grad_bias)
        return *(x * scale if need else None for x, need in zip(grads, ctx.needed, strict=True)), *nothing


def _composed(input: Tensor, classes: int, chunk: int | None) -> bool:
    """Whether a CPU runs torch's two functions: where the logits are little beside the features, and time counts."""
    few = 2 * classes <= input.shape[1] and input.dtype == computed(input.dtype)
    return chunk is None and few and input.device.type == "cpu" and dispatch.get_backend() == "auto"


def _takes_one_pass(tensors: tuple[Tensor | None, ...], reduction: str, chunk: int | None) -> bool:
    """Whether the forward makes the gradients, which saves a product: eagerly on a CPU, where nothing else is asked."""
    input = tensors[0]
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    eager = not torch.compiler.is_compiling() and not torch_internals.functorch_transforms_active()
    plain = input.device.type == "cpu" and input.dtype == computed(input.dtype) and dispatch.get_backend() != "triton"
    return wanted and eager and plain and reduction != "none" and chunk is None


def _check_linear(input: Tensor, linear_weight: Any, linear_bias: Any) -> None:
    for name, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(value, Tensor) and not (name == "linear_bias" and value is None):
            raise TypeError(f"{NAME}: {name} must be a Tensor, but is of type {type(value).__name__}")
        if value is not None and value.device != input.device:
            raise RuntimeError(f"{NAME}: {name} must be on input's device {input.device}, but is on {value.device}")
        if value is not None and _dtype(value) != _dtype(input):
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
    """F.cross_entropy(F.conv2d(input, linear_weight, linear_bias), target, ...) for a 1x1 classifier, in chunks.

    The logits of `chunk` pixels and their gradient are all that is in memory of either at a time; the products are
    torch.mm's, the loss of a chunk is cross_entropy's. The backward makes the logits anew. Besides its gradients a
    call keeps 8 bytes a pixel (16 for float64). On a CPU in float32 and float64, where no `chunk` is given: with at
    most half as many classes as features torch's two functions run under backend "auto", which is faster; with more,
    in eager code, the forward of a mean or a sum makes the gradients too, a product less, and holds them from then on.

    input: features (N, D, H, W), in NCHW or channels_last, also (D,), (N, D) and (N, D, d1, ...) as
    torch.nn.functional.linear_cross_entropy has them. linear_weight: (C, D) or (C, D, 1, 1); linear_bias: (C,), both
    of input's dtype. target, weight, reduction, ignore_index, label_smoothing, normalization, z_loss: those of
    fastseg.functional.cross_entropy for logits (N, C, H, W); for class probabilities torch's functions run and store
    the logits. chunk: pixels; None: as many as stay in a CPU's caches or fill a GPU.

    Under autocast features, weight and bias are cast as for a convolution; torch.mm's products have a float32 result.
    Logits, loss and all sums over pixels are float32 (float64 for float64). Deterministic where torch.mm is: the
    chunks are added up in their order. Second derivatives are torch's own.

    Raises RuntimeError for shapes, dtypes and devices that do not fit, ValueError for a chunk below 1, and what
    cross_entropy raises.
    """
    reduction = checked_reduction(NAME, None, None, reduction)
    check_types(NAME, input, target, weight, ignore_index, label_smoothing)
    check_normalization(NAME, reduction, normalization)
    check_number(NAME, "z_loss", z_loss)
    _check_linear(input, linear_weight, linear_bias)
    if chunk is not None and chunk < 1:
        raise ValueError(f"{NAME}: chunk must be at least 1 pixel, but is {chunk}")
    input, linear_weight, linear_bias = (
        None if x is None else x.to(_dtype(x)) for x in (input, linear_weight.flatten(1), linear_bias)
    )
    classes = linear_weight.shape[0]
    logits = input.new_empty(()).expand((*input.shape[: input.dim() > 1], classes, *input.shape[2:]))
    check_target(NAME, logits, target, ignore_index)
    check_weight(NAME, logits, target, weight)
    shape, arguments = pixels_shape(logits), (
        *divided(logits, target, reduction, normalization), int(ignore_index), float(label_smoothing), float(z_loss),
        chunk or 0,
    )  # fmt: skip
    features = as_images(input)
    probabilities = target.is_floating_point()
    missing = "a target of class probabilities" if probabilities else uncovered(logits, target)
    dispatch.choose(NAME, input, dispatch.only_triton(missing))
    tensors = (features, linear_weight, linear_bias)
    if probabilities or _composed(features, classes, chunk):
        labels = as_images(target) if probabilities else labels_as_images(target)
        try:
            loss = _differentiable(*tensors, labels, weight, *arguments)
        except IndexError:
            refuse_strays(NAME, classes, labels, ignore_index)  # torch's message does not say where
            raise
    elif _takes_one_pass(tensors, arguments[0], chunk):
        needed = tuple(x is not None and x.requires_grad for x in tensors)
        function, labels = LinearCrossEntropyOnePassFunction, labels_as_images(target)
        loss = function.apply(*tensors, labels, weight, needed, *arguments)[0]
    else:
        loss = LinearCrossEntropyFunction.apply(*tensors, labels_as_images(target), weight, *arguments)[0]
    return loss.reshape(shape) if reduction == "none" else loss
