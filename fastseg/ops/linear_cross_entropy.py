"""linear_cross_entropy: a 1x1 classifier and its cross-entropy, a chunk of pixels at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from .chunks import chunk_gradient, chunk_losses, elements, even_shares, reduced
from .conv_transpose import _dtype
from .cross_entropy import as_images, labels_as_images
from .cross_entropy_checks import (
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
from .cross_entropy_operators import (
    CROSS_ENTROPY,
    CROSS_ENTROPY_BACKWARD,
    SCHEMA,
    _empty_loss,
    _empty_lse,
    uncovered,
)
from .cross_entropy_reference import differentiable, pixel_weights
from .library import Operator, double_backward, empty, memory_format, wants_graph

NAME = "linear_cross_entropy"
GPU_ELEMENTS = 2**24  # logits of a chunk on a GPU: enough to fill it


class Arguments(NamedTuple):
    """What the operators take besides tensors: cross_entropy_operators.Arguments, and the pixels of a chunk or 0."""

    reduction: str
    count: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    chunk: int


NOTHING = (None,) * (2 + len(Arguments._fields))  # the gradients of target, weight and arguments


def _logits_like(input: Tensor, classes: int) -> Tensor:
    """A tensor of the logits' shape and dtype that holds nothing, for what looks at those alone."""
    return input.new_empty((), dtype=computed(input.dtype)).expand(input.shape[0], classes, *input.shape[2:])


def _chunk_pixels(chunk: int, input: Tensor, classes: int) -> int:
    return chunk or max(1, (GPU_ELEMENTS if input.is_cuda else elements()) // max(1, classes))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with sums and result in the computed dtype; dtype: the features'. A GPU multiplies halves as such."""
    if a.is_cuda and dtype.itemsize == 2:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return torch.mm(a.to(computed(dtype)), b.to(computed(dtype)))


def _differentiable(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, *rest: Any
) -> Tensor:
    """torch's two functions: they store the logits."""
    input, linear_weight, linear_bias = (
        None if x is None else x.to(computed(x.dtype)) for x in (input, linear_weight[:, :, None, None], linear_bias)
    )
    return differentiable(F.conv2d(input, linear_weight, linear_bias), target, weight, *rest[:-1])


def _composed(input: Tensor, classes: int, chunk: int | None) -> bool:
    """Whether a CPU runs torch's two functions: where the logits are little beside the features, and time counts."""
    few = 2 * classes <= input.shape[1] and input.dtype == computed(input.dtype)
    return chunk is None and few and input.device.type == "cpu" and dispatch.get_backend() == "auto"


# --- chunks ----------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Some pixels: of one image in NCHW, of the batch in channels_last, where a row is a pixel."""

    rows: bool
    place: Any  # index of the pixels in (N, H, W) tensors seen as (N, H * W) or (N * H * W,)

    def features(self, input: Tensor) -> Tensor:
        """(pixels, D) in channels_last, (D, pixels) in NCHW: a view."""
        if self.rows:
            return input.permute(0, 2, 3, 1).flatten(0, 2)[self.place]
        return input[self.place[0]].flatten(1)[:, self.place[1]]

    def pixels(self, x: Tensor) -> Tensor:
        """Of a dense (..., N, H, W): (..., 1, pixels), a view."""
        flat = x.flatten(-3) if self.rows else x.flatten(-2)
        return flat[(..., *(self.place if isinstance(self.place, tuple) else (self.place,)))].unsqueeze(-2)

    def logits(self, features: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        """(1, C, 1, pixels) of the computed dtype, in the memory format of the input."""
        if self.rows:
            made = _product(features, linear_weight.t(), features.dtype)
            return (made if linear_bias is None else made.add_(linear_bias))[None, None].permute(0, 3, 1, 2)
        made = _product(linear_weight, features, features.dtype)
        return (made if linear_bias is None else made.add_(linear_bias[:, None]))[None, :, None]

    def flat(self, gradient: Tensor) -> Tensor:
        """What `logits` gave, as (pixels, C) or (C, pixels)."""
        return gradient[0, :, 0].t() if self.rows else gradient[0, :, 0]


def _chunks(input: Tensor, pixels: int) -> Iterator[Chunk]:
    n, _, h, w = input.shape
    if memory_format(input) == torch.channels_last:
        for start in range(0, n * h * w, pixels):
            yield Chunk(True, slice(start, min(start + pixels, n * h * w)))
    else:
        for image in range(n):
            for start in range(0, h * w, pixels):
                yield Chunk(False, (image, slice(start, min(start + pixels, h * w))))


# --- operators -------------------------------------------------------------------------------------------------------


def _empty_results(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits_like(input, linear_weight.shape[0])
    loss, denominator = _empty_loss(logits, Arguments(*rest).reduction)
    return loss, _empty_lse(logits, target), denominator


def _forward(losses: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operator, given what makes (losses, what a mean divides by, lse) of a chunk's logits."""

    def run(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        a = Arguments(*rest)
        refuse_strays(NAME, linear_weight.shape[0], target, a.ignore_index)
        loss, lse, denominator = _empty_results(input, linear_weight, linear_bias, target, weight, *rest)
        parts = []
        for chunk in _chunks(input, _chunk_pixels(a.chunk, input, linear_weight.shape[0])):
            logits = chunk.logits(chunk.features(input), linear_weight, linear_bias)
            labels = chunk.pixels(target)
            part, divisor, terms = losses(logits, labels, weight, a)
            chunk.pixels(lse).copy_(terms)
            if a.reduction == "none":
                chunk.pixels(loss).copy_(part)
            else:
                parts.append((part.sum(), divisor.sum(dtype=part.dtype)))
        if a.reduction != "none":
            reduced(parts, a.reduction, a.count, loss, denominator)
        return loss, lse, denominator

    return run


def _losses_kernel(logits: Tensor, labels: Tensor, weight: Tensor | None, a: Arguments) -> tuple[Tensor, ...]:
    reduction = "none" if a.reduction == "none" else "sum"
    arguments = (reduction, 0, a.ignore_index, a.label_smoothing, a.z_loss)
    loss, lse, *_ = CROSS_ENTROPY(logits, labels[None], weight, *arguments, None)
    if a.reduction == "none":
        return loss[0], loss, lse[:, 0]
    weight = weight if a.reduction == "weights" else None
    return loss, pixel_weights(logits, labels, weight, a.ignore_index), lse[:, 0]


def _losses_reference(logits: Tensor, labels: Tensor, weight: Tensor | None, a: Arguments) -> tuple[Tensor, ...]:
    shares = even_shares(weight, a.label_smoothing, logits)
    losses, divisor, *lse = chunk_losses(
        logits, labels.long(), weight, shares, a.reduction, a.ignore_index, a.label_smoothing, a.z_loss
    )
    return losses, divisor, torch.stack(lse)


TENSORS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"

LINEAR_CROSS_ENTROPY = Operator(
    f"linear_cross_entropy({TENSORS}, {SCHEMA}, SymInt chunk) -> (Tensor, Tensor, Tensor)",
    kernel=_forward(_losses_kernel),
    reference=_forward(_losses_reference),
    fake=_empty_results,
    uncovered=lambda input, linear_weight, linear_bias, target, weight, *rest: uncovered(
        _logits_like(input, linear_weight.shape[0]), target, weight
    ),
)


def _empty_gradients(
    grad: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of no elements where a gradient is not needed."""
    needed = rest[-1]
    return (
        empty(input, input.shape, memory_format(input)) if needed[0] else input.new_empty(0),
        linear_weight.new_empty(linear_weight.shape) if needed[1] else linear_weight.new_empty(0),
        linear_weight.new_empty(linear_weight.shape[0] if needed[2] else 0),
    )


def _backward(change: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operator, given what makes the gradient of a chunk's logits."""

    def run(
        grad: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
        weight: Tensor | None, lse: Tensor, denominator: Tensor, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        *arguments, needed = rest
        a = Arguments(*arguments)
        grads = grad_input, grad_weight, grad_bias = _empty_gradients(grad, input, linear_weight, linear_bias, *rest)
        if a.reduction not in ("none", "sum"):
            grad = grad / denominator
        scale = grad.contiguous() if a.reduction == "none" else grad
        dtype = computed(input.dtype)  # of the sums over chunks
        weight_sum, bias_sum = (x.new_zeros(x.shape, dtype=dtype) for x in (grad_weight, grad_bias))
        for chunk in _chunks(input, _chunk_pixels(a.chunk, input, linear_weight.shape[0])):
            features = chunk.features(input)
            logits = chunk.logits(features, linear_weight, linear_bias)
            own = chunk.pixels(scale) if a.reduction == "none" else scale
            made = chunk.flat(change(logits, chunk.pixels(target), weight, chunk.pixels(lse), own, a))
            if needed[0]:
                factors = (made, linear_weight) if chunk.rows else (linear_weight.t(), made)
                chunk.features(grad_input).copy_(_product(*factors, input.dtype))
            if needed[1]:
                factors = (made.t(), features) if chunk.rows else (made, features.t())
                weight_sum += _product(*factors, input.dtype)
            if needed[2]:
                bias_sum += made.sum(0 if chunk.rows else 1)
        grad_weight.copy_(weight_sum)
        grad_bias.copy_(bias_sum)
        return grads

    return run


def _change_kernel(
    logits: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, scale: Tensor, a: Arguments
) -> Tensor:
    reduction = "none" if a.reduction == "none" else "sum"
    scale, nothing = scale[None] if reduction == "none" else scale, lse.new_empty(0)
    arguments = (reduction, 0, a.ignore_index, a.label_smoothing, a.z_loss)
    return CROSS_ENTROPY_BACKWARD(scale, logits, labels[None], weight, lse[:, None], nothing, *arguments)


def _change_reference(
    logits: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, scale: Tensor, a: Arguments
) -> Tensor:
    shares, scale = even_shares(weight, a.label_smoothing, logits), scale.expand(labels.shape)
    options = (a.ignore_index, a.label_smoothing, a.z_loss)
    return chunk_gradient(logits, labels.long(), weight, shares, lse, scale, *options)


LINEAR_CROSS_ENTROPY_BACKWARD = Operator(
    f"linear_cross_entropy_backward(Tensor grad_output, {TENSORS}, Tensor lse, Tensor denominator, {SCHEMA}, "
    "SymInt chunk, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    kernel=_backward(_change_kernel),
    reference=_backward(_change_reference),
    fake=_empty_gradients,
    uncovered=lambda grad, input, linear_weight, linear_bias, target, weight, *rest: uncovered(
        _logits_like(input, linear_weight.shape[0]), target, weight
    ),
)


# --- function --------------------------------------------------------------------------------------------------------


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
    call keeps 8 bytes a pixel (16 for float64). On a CPU under backend "auto", where no `chunk` is given and there are
    at most half as many classes as features, torch's two functions run, which is faster.

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
    dispatch.choose(NAME, input, "a target of class probabilities" if probabilities else uncovered(logits, target))
    if probabilities or _composed(features, classes, chunk):
        labels = as_images(target) if probabilities else labels_as_images(target)
        try:
            loss = _differentiable(features, linear_weight, linear_bias, labels, weight, *arguments)
        except IndexError:
            refuse_strays(NAME, classes, labels, ignore_index)  # torch's message does not say where
            raise
    else:
        labels = labels_as_images(target)
        loss = LinearCrossEntropyFunction.apply(features, linear_weight, linear_bias, labels, weight, *arguments)[0]
    return loss.reshape(shape) if reduction == "none" else loss
