"""cross_entropy: gradients and functions. Any rank of logits is brought into the operators' (N, C, H, W) by views."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ..operator import dense, double_backward, memory_format, vmap_loops, wants_graph
from .checks import (
    check_normalization,
    check_number,
    check_prediction,
    check_target,
    check_types,
    check_weight,
    checked_reduction,
    divided,
    pixels_shape,
    refuse_strays,
)
from .cross_entropy_operators import (
    CROSS_ENTROPY,
    CROSS_ENTROPY_BACKWARD,
    CROSS_ENTROPY_ONE_PASS,
    CROSS_ENTROPY_ONE_PASS_BACKWARD,
    ONE_PASS_CLASSES,
    Arguments,
    cuda_uncovered,
    packed_labels,
    uncovered,
)
from .reference import differentiable, right_ones

NOTHING = (None,) * (3 + len(Arguments._fields))  # the gradients of all but input


def _second(input: Tensor, target: Tensor, weight: Tensor | None, arguments: Arguments, grad: Tensor) -> Tensor | None:
    """The gradient of input, by torch's formulas, that can be differentiated again."""
    inputs = (input, target, weight, *arguments)
    return double_backward(differentiable, inputs, (True, *(False,) * (len(inputs) - 1)), grad)[0]


class CrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, predicted, *Arguments) -> (loss, lse, denominator, prediction, counts).

    The gradient is the loss's, of input alone.
    """

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, reduction: str, count: int,
        ignore_index: int, label_smoothing: float, z_loss: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # By name, not as *arguments: by their number torch.compile tells that there is no ctx.
        return CROSS_ENTROPY(input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, _, *arguments = inputs
        _, lse, denominator, *rest = output
        ctx.arguments = Arguments(*arguments)
        ctx.mark_non_differentiable(lse, denominator, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, CrossEntropyFunction, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *NOTHING
        input, target, weight, *rest = ctx.saved_tensors
        if wants_graph():
            return _second(input, target, weight, ctx.arguments, grad), *NOTHING
        return CROSS_ENTROPY_BACKWARD(grad, input, target, weight, *rest, *ctx.arguments), *NOTHING


class CrossEntropyOnePassFunction(torch.autograd.Function):
    """(input, target, weight, predicted, *Arguments) -> (loss, grad_input, packed, denominator, prediction, counts).

    The first backward hands out the gradient that the forward made, for a grad_output of 1 as it is; a later one has
    another made, since what was handed out may have been written to.
    """

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, reduction: str, count: int,
        ignore_index: int, label_smoothing: float, z_loss: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # By name, not as *arguments: by their number torch.compile tells that there is no ctx.
        return CROSS_ENTROPY_ONE_PASS(
            input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, _, *arguments = inputs
        _, grad_input, packed, denominator, *_ = output
        ctx.arguments = Arguments(*arguments)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, packed, denominator)
        ctx.grad_input = grad_input

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, CrossEntropyOnePassFunction, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *NOTHING
        input, target, weight, packed, denominator = ctx.saved_tensors
        if wants_graph():
            return _second(input, target, weight, ctx.arguments, grad), *NOTHING
        grad_input, ctx.grad_input = ctx.grad_input, None
        if grad_input is None:
            grad_input = CROSS_ENTROPY_ONE_PASS(input, target, weight, *ctx.arguments, None)[1]
        labels, ignore_index = packed_labels(target, packed, ctx.arguments.ignore_index)
        arguments = ctx.arguments._replace(ignore_index=ignore_index)
        CROSS_ENTROPY_ONE_PASS_BACKWARD(grad_input, grad, input, labels, weight, denominator, *arguments)
        return grad_input, *NOTHING


def as_images(x: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ...) as a dense (N, C, H, W), a view where its strides allow one."""
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
    """What cross_entropy_with_predictions returns.

    loss: as cross_entropy's. prediction: each pixel's class with the largest logit, of the target's shape. correct:
    how many pixels that are not ignored are predicted right; valid: how many are not ignored (both int64, of no
    dimension, on input's device).
    """

    loss: Tensor
    prediction: Tensor
    correct: Tensor
    valid: Tensor


def _call(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    label_smoothing: float, normalization: str, z_loss: float, one_pass: bool | None, predicted: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, prediction, counts) of checked reduction, on the backend that the call takes."""
    check_types(name, input, target, weight, ignore_index, label_smoothing)
    check_normalization(name, reduction, normalization)
    check_number(name, "z_loss", z_loss)
    check_target(name, input, target, ignore_index)
    check_weight(name, input, target, weight)
    arguments = Arguments(
        *divided(input, target, reduction, normalization), int(ignore_index), float(label_smoothing), float(z_loss)
    )
    if one_pass and reduction == "none":
        raise ValueError(f"{name}: one_pass must be left out for reduction 'none', which takes two, but is {one_pass}")

    def unsupported(backend: str) -> str | None:
        if backend == "cuda":
            return cuda_uncovered(input, target, weight, predicted)
        return uncovered(input, target, weight)

    chosen = dispatch.choose("cross_entropy", input, unsupported).backend
    classes = input.shape[0 if input.dim() == 1 else 1]
    try:
        if chosen == "torch":
            return _in_torch(input, target, weight, predicted, arguments)
        function = CrossEntropyFunction
        if chosen == "triton" and _takes_one_pass(input, classes, reduction, one_pass):
            function = CrossEntropyOnePassFunction
        return _in_operators(function, input, target, weight, predicted, arguments)
    except IndexError:
        refuse_strays(name, classes, target, ignore_index)  # neither torch's message nor the operators' says where
        raise


def _takes_one_pass(input: Tensor, classes: int, reduction: str, one_pass: bool | None) -> bool:
    """Whether the forward makes the gradient, which pays where the loss's own gradient is going to be 1.

    Not for float16, whose losses are scaled; nor in a compiled graph, which cannot hand out a saved tensor.
    """
    if one_pass is None:
        one_pass = input.dtype != torch.float16
    wanted = input.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return one_pass and wanted and reduction != "none" and classes <= ONE_PASS_CLASSES


def _in_torch(
    input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, arguments: Arguments
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    loss = differentiable(input, target, weight, *arguments)
    if predicted is None:
        return loss, None, None
    with torch.no_grad():
        best, counts = right_ones(as_images(input), labels_as_images(target), arguments.ignore_index)
    return loss, best.to(predicted), counts


def _in_operators(
    function: type[torch.autograd.Function],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    predicted: torch.dtype | None,
    arguments: Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = as_images(input)
    if target.is_floating_point():
        targets = dense(as_images(target), memory_format(logits))
    else:
        targets = labels_as_images(target)
    loss, *_, prediction, counts = function.apply(logits, targets, weight, predicted, *arguments)
    if arguments.reduction == "none":
        loss = loss.reshape(pixels_shape(input))
    return loss, prediction, counts


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
    """torch.nn.functional.cross_entropy: deterministic, in one pass over the logits or in two.

    input: logits (C,), (N, C) or (N, C, d1, ...), floating-point, in NCHW or channels_last (any rank: classes second
    or last in memory); other strides are made dense once. target: class indices (), (N,) or (N, d1, ...) of dtype
    uint8, int16, int32 or int64 (torch: int64 alone), or class probabilities of input's shape. weight: one entry for
    each class, float32 or input's dtype. A gradient of probabilities or weight is torch's own (fastseg.explain).

    Per pixel sum_c q_c * (lse - x_c) with lse = log sum_c exp(x_c), q_c = w_c * ((1 - label_smoothing) * [c = target]
    + label_smoothing / C), and for probabilities target_c in place of [c = target]. Beyond torch:

    z_loss: adds z_loss * lse^2 to each pixel that is not ignored, whatever its weight (PaLM's auxiliary loss).
    normalization: what reduction "mean" divides the sum by. "weights": torch's rule, the weights of the pixels that
    are not ignore_index (of probabilities: the number of pixels); "valid": the number of pixels that are not ignored
    (Caffe); "pixels": of all pixels; "batch": N (FCN). With nothing valid the mean over "weights" and "valid" is NaN,
    the sum 0 and the gradient 0, as in torch.

    The loss is computed, summed and returned in float32 also for half-precision logits (float64 for float64), under
    autocast too, on every backend; torch returns input's dtype. The gradient has input's dtype and memory format; on
    the kernels that of an ignored pixel is exactly 0 even where its logits are NaN or infinite (torch: NaN).
    A second derivative is torch's own. The kernels are compiled once for each value of label_smoothing and z_loss.

    one_pass: whether the forward of a mean or sum makes the gradient too, which saves a third of the bytes where the
    gradient of the loss is 1 (loss.backward()), costs a third more where it is not (a weighted or scaled loss), and is
    the same to a rounding. None: for all dtypes but float16, whose losses are scaled. On Triton kernels alone, for up
    to 256 classes, outside of compiled graphs; two passes keep 4 bytes a pixel for the backward (8 for float32 logits).

    Raises what torch raises: ValueError for another batch size, an unknown reduction or normalization, and a
    normalization or one_pass that the reduction has no use for, RuntimeError for other wrong shapes, dtypes, devices
    and a label_smoothing outside [0, 1] (torch lets a negative one pass), NotImplementedError for integer logits, and
    on a CPU IndexError for a target that is neither a class nor ignore_index (on a GPU a device-side assertion, and no
    memory is read by it).
    """
    name = "cross_entropy"
    reduction = checked_reduction(name, size_average, reduce, reduction)
    return _call(
        name, input, target, weight, reduction, ignore_index, label_smoothing, normalization, z_loss, one_pass, None
    )[0]  # fmt: skip


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
    """cross_entropy of class indices, and what the same read of the logits tells: argmax and number of right pixels.

    The arguments are cross_entropy's; target must be class indices. dtype: of the prediction, torch.int64 or
    torch.uint8, which takes an eighth of the memory and holds up to 256 classes. Returns (loss, prediction, correct,
    valid): see CrossEntropyOutput. Of equal logits the first class wins, and a NaN wins over numbers, as in argmax.
    Deterministic; the loss alone has a gradient.

    Raises what cross_entropy raises, RuntimeError for class probabilities, ValueError for another dtype and for
    torch.uint8 with more than 256 classes.
    """
    name = "cross_entropy_with_predictions"
    reduction = checked_reduction(name, None, None, reduction)
    check_types(name, input, target, weight, ignore_index, label_smoothing)
    check_prediction(name, input.shape[0 if input.dim() == 1 else 1], target, dtype)
    loss, prediction, counts = _call(
        name, input, target, weight, reduction, ignore_index, label_smoothing, normalization, z_loss, one_pass, dtype
    )
    return CrossEntropyOutput(loss, prediction.reshape(pixels_shape(input)), counts[0], counts[1])
