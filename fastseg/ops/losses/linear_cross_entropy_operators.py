"""The operators of linear_cross_entropy: logits, losses and gradients of a chunk of pixels at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.losses.options import LossOptions
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, accumulator
from ..operator import Implementation, Operator, empty_like, memory_format, register_options
from .checks import require_labels_in_range
from .chunked_reference import chunk_gradient, chunk_losses, elements, reduce_chunks, smoothed_shares
from .cross_entropy_operators import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, empty_loss, empty_lse
from .cross_entropy_operators import unsupported as unsupported_by_cross_entropy
from .reference import differentiable_loss, pixel_weights

NAME = "linear_cross_entropy"
GPU_ELEMENTS = 2**24  # logits of a chunk on a GPU: enough to fill it


class LinearInputs(NamedTuple):
    """The tensors of a call: features (N, D, H, W), the classifier (C, D) and (C,), labels (N, H, W), weights (C,)."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None

    @property
    def classes(self) -> int:
        return self.linear_weight.shape[0]


TENSORS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
register_options(LinearInputs, TENSORS)


def empty_logits(input: Tensor, classes: int) -> Tensor:
    """A tensor in the shape and dtype of the logits, without memory of its own, for code that reads only those."""
    return input.new_empty((), dtype=accumulator(input.dtype)).expand(input.shape[0], classes, *input.shape[2:])


def chunk_pixels(chunk: int, inputs: LinearInputs) -> int:
    """The pixels of a chunk: `chunk`, or for 0 as many as suit the device."""
    return chunk or max(1, (GPU_ELEMENTS if inputs.input.is_cuda else elements()) // max(1, inputs.classes))


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in float32 (float64). On a GPU half-precision features are multiplied as such.

    dtype: that of the features.
    """
    if a.is_cuda and dtype.itemsize == 2:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return torch.mm(a.to(accumulator(dtype)), b.to(accumulator(dtype)))


def differentiable_linear_loss(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    options: LossOptions,
) -> Tensor:  # fmt: skip
    """The loss by torch's two functions: they store the logits."""
    input, linear_weight, linear_bias = (
        None if x is None else x.to(accumulator(x.dtype)) for x in (input, linear_weight[:, :, None, None], linear_bias)
    )
    return differentiable_loss(F.conv2d(input, linear_weight, linear_bias), target, weight, options)


def _unsupported(input: Tensor, linear_weight: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    if target.is_floating_point():
        return "a target of class probabilities"
    if input.dtype not in FLOAT_AND_DOUBLE_DTYPES:
        return f"dtype {input.dtype}"
    return unsupported_by_cross_entropy(empty_logits(input, linear_weight.shape[0]), target, weight)


# --- chunks ----------------------------------------------------------------------------------------------------------


class PixelChunk(NamedTuple):
    """Some pixels: of one image in NCHW, of the batch in channels_last, where the features of a pixel are a row."""

    rows: bool  # channels_last
    index: Any  # of the pixels in (N, H, W) tensors viewed as (N * H * W,) for rows, else as (N, H * W)

    def features(self, input: Tensor) -> Tensor:
        """A view of the features: (pixels, D) for rows, else (D, pixels)."""
        if self.rows:
            return input.permute(0, 2, 3, 1).flatten(0, 2)[self.index]
        image, pixels = self.index
        return input[image].flatten(1)[:, pixels]

    def pixels(self, x: Tensor) -> Tensor:
        """A view (..., 1, pixels) of a dense (..., N, H, W)."""
        flat = x.flatten(-3) if self.rows else x.flatten(-2)
        return flat[(..., *(self.index if isinstance(self.index, tuple) else (self.index,)))].unsqueeze(-2)

    def logits(self, features: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        """(1, C, 1, pixels) in float32 or float64, in the memory format of the features."""
        if self.rows:
            made = _matmul(features, linear_weight.t(), features.dtype)
            return (made if linear_bias is None else made.add_(linear_bias))[None, None].permute(0, 3, 1, 2)
        made = _matmul(linear_weight, features, features.dtype)
        return (made if linear_bias is None else made.add_(linear_bias[:, None]))[None, :, None]

    def as_matrix(self, logits: Tensor) -> Tensor:
        """A view of the result of `logits` as a matrix: (pixels, C) for rows, else (C, pixels)."""
        return logits[0, :, 0].t() if self.rows else logits[0, :, 0]

    def add_gradients(
        self, grad_logits: Tensor, features: Tensor, linear_weight: Tensor, grads: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> None:  # fmt: skip
        """Write the gradient of the features and add those of weight and bias, from as_matrix(gradient of logits)."""
        grad_input, grad_weight, grad_bias = grads
        input_needed, weight_needed, bias_needed = needed
        if input_needed:
            factors = (grad_logits, linear_weight) if self.rows else (linear_weight.t(), grad_logits)
            self.features(grad_input).copy_(_matmul(*factors, features.dtype))
        if weight_needed:
            factors = (grad_logits.t(), features) if self.rows else (grad_logits, features.t())
            grad_weight += _matmul(*factors, features.dtype)
        if bias_needed:
            grad_bias += grad_logits.sum(0 if self.rows else 1)


def pixel_chunks(inputs: LinearInputs, chunk: int) -> Iterator[PixelChunk]:
    """The chunks of `chunk` pixels each, or for 0 of as many as suit the device."""
    n, _, h, w = inputs.input.shape
    pixels = chunk_pixels(chunk, inputs)
    if memory_format(inputs.input) == torch.channels_last:
        for start in range(0, n * h * w, pixels):
            yield PixelChunk(True, slice(start, min(start + pixels, n * h * w)))
    else:
        for image in range(n):
            for start in range(0, h * w, pixels):
                yield PixelChunk(False, (image, slice(start, min(start + pixels, h * w))))


# --- forward ---------------------------------------------------------------------------------------------------------


def empty_results(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    options: LossOptions, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, lse, denominator)."""
    logits = empty_logits(input, linear_weight.shape[0])
    loss, denominator = empty_loss(logits, options)
    return loss, empty_lse(logits, target), denominator


def _forward(
    losses_of: Callable[..., tuple[Tensor, Tensor, Tensor]],
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    options: LossOptions, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator. losses_of: (losses or their sum, terms of a mean's denominator, lse) of a chunk's logits."""
    require_labels_in_range(NAME, linear_weight.shape[0], target, options.ignore_index)
    inputs = LinearInputs(input, linear_weight, linear_bias, target, weight)
    loss, lse, denominator = empty_results(*inputs, options, chunk)
    parts = []
    for pixels in pixel_chunks(inputs, chunk):
        logits = pixels.logits(pixels.features(input), linear_weight, linear_bias)
        losses, divisor, terms = losses_of(logits, pixels.pixels(target), weight, options)
        pixels.pixels(lse).copy_(terms)
        if options.is_reduced:
            parts.append((losses.sum(), divisor.sum(dtype=losses.dtype)))
        else:
            pixels.pixels(loss).copy_(losses)
    if options.is_reduced:
        reduce_chunks(parts, options, loss, denominator)
    return loss, lse, denominator


def _of_chunk(options: LossOptions) -> LossOptions:
    """The options of cross_entropy for one chunk, whose mean would not be the chunk's part of the mean."""
    return options._replace(reduction="sum" if options.is_reduced else "none", count=0)


def _losses_kernel(
    logits: Tensor, labels: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, *_ = CROSS_ENTROPY(logits, labels[None], weight, _of_chunk(options), None)
    if not options.is_reduced:
        return loss[0], loss, lse[:, 0]
    weight = weight if options.reduction == "weights" else None
    return loss, pixel_weights(logits, labels, weight, options.ignore_index), lse[:, 0]


def _losses_reference(
    logits: Tensor, labels: Tensor, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    shares = smoothed_shares(logits, weight, options.label_smoothing)
    losses, divisor, *lse = chunk_losses(logits, labels.long(), weight, shares, options)
    return losses, divisor, torch.stack(lse)


LINEAR_CROSS_ENTROPY = Operator(
    f"linear_cross_entropy({TENSORS}, LossOptions options, SymInt chunk) -> (Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            partial(_forward, _losses_kernel),
            lambda input, linear_weight, linear_bias, target, weight, *rest: _unsupported(
                input, linear_weight, target, weight
            ),
        ),
    },
    reference=partial(_forward, _losses_reference),
    fake=empty_results,
)


# --- backward --------------------------------------------------------------------------------------------------------


def empty_gradients(inputs: LinearInputs, needed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, linear_weight and linear_bias; without elements if a gradient is not needed."""
    input, linear_weight = inputs.input, inputs.linear_weight
    input_needed, weight_needed, bias_needed = needed
    return (
        empty_like(input) if input_needed else input.new_empty(0),
        linear_weight.new_empty(linear_weight.shape) if weight_needed else linear_weight.new_empty(0),
        linear_weight.new_empty(linear_weight.shape[0] if bias_needed else 0),
    )


def _empty_gradients(
    grad: Tensor, inputs: LinearInputs, lse: Tensor, denominator: Tensor, options: LossOptions, chunk: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(inputs, needed)


def _backward(
    gradient_of: Callable[..., Tensor],
    grad: Tensor, inputs: LinearInputs, lse: Tensor, denominator: Tensor, options: LossOptions, chunk: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator. gradient_of: the gradient of a chunk's logits."""
    input, linear_weight, linear_bias, target, weight = inputs
    grads = grad_input, grad_weight, grad_bias = empty_gradients(inputs, needed)
    if options.is_mean:
        grad = grad / denominator
    scale = grad if options.is_reduced else grad.contiguous()
    dtype = accumulator(input.dtype)  # of the sums over chunks
    weight_sum, bias_sum = (x.new_zeros(x.shape, dtype=dtype) for x in (grad_weight, grad_bias))
    for pixels in pixel_chunks(inputs, chunk):
        features = pixels.features(input)
        logits = pixels.logits(features, linear_weight, linear_bias)
        own_scale = scale if options.is_reduced else pixels.pixels(scale)
        gradient = gradient_of(logits, pixels.pixels(target), weight, pixels.pixels(lse), own_scale, options)
        pixels.add_gradients(
            pixels.as_matrix(gradient), features, linear_weight, (grad_input, weight_sum, bias_sum), needed
        )
    grad_weight.copy_(weight_sum)
    grad_bias.copy_(bias_sum)
    return grads


def _gradient_kernel(
    logits: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, scale: Tensor, options: LossOptions
) -> Tensor:
    scale, no_denominator = scale if options.is_reduced else scale[None], lse.new_empty(0)
    return CROSS_ENTROPY_BACKWARD(scale, logits, labels[None], weight, lse[:, None], no_denominator, _of_chunk(options))


def _gradient_reference(
    logits: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, scale: Tensor, options: LossOptions
) -> Tensor:
    shares = smoothed_shares(logits, weight, options.label_smoothing)
    return chunk_gradient(logits, labels.long(), weight, shares, lse, scale.expand(labels.shape), options)


LINEAR_CROSS_ENTROPY_BACKWARD = Operator(
    "linear_cross_entropy_backward(Tensor grad_output, LinearInputs inputs, Tensor lse, Tensor denominator, "
    "LossOptions options, SymInt chunk, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            partial(_backward, _gradient_kernel),
            lambda grad, inputs, *rest: _unsupported(inputs.input, inputs.linear_weight, inputs.target, inputs.weight),
        ),
    },
    reference=partial(_backward, _gradient_reference),
    fake=_empty_gradients,
    gradient=True,
)
