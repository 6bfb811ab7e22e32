"""The operators behind linear_cross_entropy: logits, losses and gradients of a chunk of pixels at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import Implementation, Operator, empty, memory_format
from .checks import computed, refuse_strays
from .chunked_reference import chunk_gradient, chunk_losses, elements, even_shares, reduced
from .cross_entropy_operators import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, SCHEMA, _empty_loss, _empty_lse, uncovered
from .reference import differentiable, pixel_weights

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

    def add_gradients(
        self, made: Tensor, features: Tensor, linear_weight: Tensor, grads: Sequence[Tensor], needed: Sequence[bool]
    ) -> None:
        """From a gradient of the logits, `flat`: write the features', add the weight's and the bias's."""
        grad_input, grad_weight, grad_bias = grads
        if needed[0]:
            factors = (made, linear_weight) if self.rows else (linear_weight.t(), made)
            self.features(grad_input).copy_(_product(*factors, features.dtype))
        if needed[1]:
            factors = (made.t(), features) if self.rows else (made, features.t())
            grad_weight += _product(*factors, features.dtype)
        if needed[2]:
            grad_bias += made.sum(0 if self.rows else 1)


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
    kernels={
        "triton": Implementation(
            _forward(_losses_kernel),
            lambda input, linear_weight, linear_bias, target, weight, *rest: uncovered(
                _logits_like(input, linear_weight.shape[0]), target, weight
            ),
        ),
    },
    reference=_forward(_losses_reference),
    fake=_empty_results,
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
            chunk.add_gradients(made, features, linear_weight, (grad_input, weight_sum, bias_sum), needed)
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
    kernels={
        "triton": Implementation(
            _backward(_change_kernel),
            lambda grad, input, linear_weight, linear_bias, target, weight, *rest: uncovered(
                _logits_like(input, linear_weight.shape[0]), target, weight
            ),
        ),
    },
    reference=_backward(_change_reference),
    fake=_empty_gradients,
    gradient=True,
)
