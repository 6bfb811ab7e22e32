"""cross_entropy: what the operators mean, their torch reference, gradients and functions.

The operators take logits (N, C, H, W); the functions bring any other rank into that shape by views.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, kernels
from .cross_entropy_checks import (
    LABEL_DTYPES,
    LOGITS_DTYPES,
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
from .library import Operator, dense, double_backward, empty, memory_format, placed, wants_graph

HALVES = (torch.float16, torch.bfloat16)
SUMMED = ("weights", "valid")  # reductions whose denominator is a sum over the pixels


class Arguments(NamedTuple):
    """What the operators take besides tensors. reduction, count: of cross_entropy_checks.divided."""

    reduction: str
    count: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


SCHEMA = "str reduction, SymInt count, int ignore_index, float label_smoothing, float z_loss"


def uncovered(input: Tensor, target: Tensor, weight: Tensor | None = None) -> str | None:
    """Why the kernels cannot run a call, in words, or None."""
    if input.dtype not in LOGITS_DTYPES:
        return f"dtype {input.dtype}"
    if input.shape[0 if input.dim() == 1 else 1] == 0:
        return "input without classes"
    if not target.is_floating_point():
        return None if target.dtype in LABEL_DTYPES else f"a target of dtype {target.dtype}"
    if target.dtype not in LOGITS_DTYPES or computed(target.dtype) != computed(input.dtype):
        return f"class probabilities of dtype {target.dtype} for logits of {input.dtype}"
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        return "a gradient of class probabilities or of weight"
    return None


# --- in torch --------------------------------------------------------------------------------------------------------


def pixel_weights(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each pixel, 0 where it is ignored."""
    dtype = computed(input.dtype)
    if target.is_floating_point():
        return torch.ones(pixels_shape(input), dtype=dtype, device=input.device)
    valid = target.long() != ignore_index
    if weight is None:
        return valid.to(dtype)
    safe = target.long().masked_fill(~valid, 0)
    return weight.to(dtype).flatten()[safe].masked_fill(~valid, 0.0)


def denominator_of(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int
) -> Tensor:
    """What a mean divides the sum by."""
    if reduction == "count":
        return torch.full((), count, dtype=computed(input.dtype), device=input.device)
    return pixel_weights(input, target, weight if reduction == "weights" else None, ignore_index).sum()


def differentiable(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """torch's function on what torch's function takes: labels int64, the rest of the computed dtype."""
    dtype, probabilities = computed(input.dtype), target.is_floating_point()
    labels = target.to(torch.promote_types(target.dtype, dtype)) if probabilities else target.long()
    logits = input.to(dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    weights = None if weight is None else weight.to(dtype)
    if z_loss == 0:
        direct = {"weights": "mean", "sum": "sum", "none": "none"}.get(reduction)
        if direct is not None:
            return F.cross_entropy(logits, labels, weights, reduction=direct, **options)
        total = F.cross_entropy(logits, labels, weights, reduction="sum", **options)
    else:
        loss = F.cross_entropy(logits, labels, weights, reduction="none", **options)
        squared = z_loss * logits.logsumexp(min(1, input.dim() - 1)).square()
        loss = loss + (squared if probabilities else squared.where(labels != ignore_index, 0.0).view_as(loss))
        if reduction == "none":
            return loss
        total = loss.sum()
    if reduction == "sum":
        return total
    return total / denominator_of(input, target, weight, reduction, count, ignore_index)


# --- operators -------------------------------------------------------------------------------------------------------


def _pixels(input: Tensor) -> tuple[int, ...]:
    return (input.shape[0], *input.shape[2:])


def _empty_loss(input: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, denominator): the latter of no elements where nothing is divided."""
    dtype, dense_format = computed(input.dtype), torch.contiguous_format
    loss = empty(input, _pixels(input) if reduction == "none" else (), dense_format, dtype)
    return loss, empty(input, (0,) if reduction in ("none", "sum") else (), dense_format, dtype)


def _empty_predictions(input: Tensor, predicted: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(classes of the pixels, numbers of right and of valid ones), empty where they are not asked for."""
    dense_format = torch.contiguous_format
    if predicted is None:
        return empty(input, (0,), dense_format, torch.uint8), empty(input, (0,), dense_format, torch.int64)
    return empty(input, _pixels(input), dense_format, predicted), empty(input, (2,), dense_format, torch.int64)


def _empty_lse(input: Tensor, target: Tensor) -> Tensor:
    """(the maximum, what is above it), whose sum would lose digits; one term for halves; a probability's mass."""
    terms = (1 if input.dtype in HALVES else 2) + target.is_floating_point()
    return empty(input, (terms, *_pixels(input)), torch.contiguous_format, computed(input.dtype))


def _empty_results(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, denominator = _empty_loss(input, reduction)
    return loss, _empty_lse(input, target), denominator, *_empty_predictions(input, predicted)


def _prepared(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Dense logits, targets and weight, and whether they are channels_last."""
    layout = memory_format(input)
    refuse_strays("cross_entropy", input.shape[1], target, ignore_index)
    target = dense(target, layout if target.is_floating_point() else torch.contiguous_format)
    return (
        dense(input, layout),
        target,
        weight if weight is None else weight.contiguous(),
        layout != torch.contiguous_format,
    )


def _cross_entropy_kernel(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, lse, denominator, *predictions = results = _empty_results(
        input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted
    )
    if reduction == "count":
        denominator.fill_(count)
    *tensors, channels_last = _prepared(input, target, weight, ignore_index)
    kernels.cross_entropy.cross_entropy_fwd(
        *tensors, reduction, ignore_index, label_smoothing, z_loss, channels_last, loss, lse, denominator, *predictions
    )
    return results


def _shares(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(q_c, whether the pixel counts): of kernels/cross_entropy_parts.py, q 0 where it does not."""
    dtype, classes = computed(input.dtype), input.shape[1]
    if target.is_floating_point():
        valid, own = torch.ones_like(target[:, :1], dtype=torch.bool), target.to(dtype)
    else:
        valid = (target.long() != ignore_index).unsqueeze(1)
        own = (torch.arange(classes, device=input.device).view(-1, 1, 1) == target.unsqueeze(1)).to(dtype)
    shares = own * (1 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        shares = shares * weight.to(dtype).view(-1, 1, 1)
    return shares.where(valid, 0.0), valid


def _predictions(
    input: Tensor, target: Tensor, ignore_index: int, predicted: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    prediction, counts = _empty_predictions(input, predicted)
    if predicted is not None:
        best, valid = input.argmax(1), target.long() != ignore_index
        prediction.copy_(best)
        counts.copy_(torch.stack((((best == target) & valid).sum(), valid.sum())))
    return prediction, counts


def _cross_entropy_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    refuse_strays("cross_entropy", input.shape[1], target, ignore_index)
    loss, denominator = _empty_loss(input, reduction)
    lse = _empty_lse(input, target)
    loss.copy_(differentiable(input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss))
    logits = input.to(loss.dtype)
    highest = logits.amax(1)
    above = (logits - highest.unsqueeze(1)).exp().sum(1).log()  # NaN where torch's softmax is
    terms = [highest + above] if input.dtype in HALVES else [highest, above]
    if target.is_floating_point():
        terms.append(_shares(input, target, weight, ignore_index, label_smoothing)[0].sum(1))
    lse.copy_(torch.stack(terms))
    if reduction not in ("none", "sum"):
        denominator.copy_(denominator_of(input, target, weight, reduction, count, ignore_index))
    return loss, lse, denominator, *_predictions(input, target, ignore_index, predicted)


CROSS_ENTROPY = Operator(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, ScalarType? predicted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_cross_entropy_kernel,
    reference=_cross_entropy_reference,
    fake=_empty_results,
    uncovered=lambda input, target, weight, *rest: uncovered(input, target, weight),
)


def _empty_gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    return empty(input, input.shape, memory_format(input))


def _cross_entropy_backward_kernel(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    grad_input = empty(input, input.shape, memory_format(input))
    layout = memory_format(input)
    target = dense(target, layout if target.is_floating_point() else torch.contiguous_format)
    kernels.cross_entropy_bwd.cross_entropy_bwd(
        grad.contiguous(), dense(input, layout), target, None if weight is None else weight.contiguous(),
        lse.contiguous(), denominator, reduction, ignore_index, label_smoothing, z_loss,
        layout == torch.channels_last, grad_input,
    )  # fmt: skip
    return grad_input


def gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, denominator: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """dloss/dinput, written in torch: 0 where a pixel is ignored, whatever its logits."""
    shares, valid = _shares(input, target, weight, ignore_index, label_smoothing)
    logits = input.to(shares.dtype)
    if reduction not in ("none", "sum"):
        grad = grad / denominator
    mass = shares.sum(1, keepdim=True)
    if target.is_floating_point() or label_smoothing or z_loss:
        if z_loss:
            mass = mass + 2 * z_loss * logits.logsumexp(1, keepdim=True)
        grad_input = mass * logits.softmax(1) - shares
    else:
        grad_input = mass * (logits.softmax(1) - (shares != 0).to(shares.dtype))
    grad_input = torch.where(valid, grad_input * (grad.unsqueeze(1) if reduction == "none" else grad), 0.0)
    return placed(grad_input.to(input.dtype), memory_format(input))


def _cross_entropy_backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    return gradient(grad, input, target, weight, denominator, reduction, ignore_index, label_smoothing, z_loss)


CROSS_ENTROPY_BACKWARD = Operator(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    f"Tensor denominator, {SCHEMA}) -> Tensor",
    kernel=_cross_entropy_backward_kernel,
    reference=_cross_entropy_backward_reference,
    fake=_empty_gradient,
    uncovered=lambda grad, input, target, *rest: uncovered(input, target),
)


# --- functions -------------------------------------------------------------------------------------------------------


class CrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, predicted, *Arguments) -> (loss, lse, denominator, prediction, counts).

    The gradient is the loss's, of input alone.
    """

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, *arguments: Any
    ) -> tuple[Tensor, ...]:
        return CROSS_ENTROPY(input, target, weight, *arguments, predicted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, _, *ctx.arguments = inputs
        _, lse, denominator, *rest = output
        ctx.mark_non_differentiable(lse, denominator, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (3 + len(ctx.arguments))
        if grad is None:
            return None, *nothing
        input, target, weight, *rest = ctx.saved_tensors
        if wants_graph():
            inputs, needed = (input, target, weight, *ctx.arguments), (True, *(False,) * (2 + len(ctx.arguments)))
            return double_backward(differentiable, inputs, needed, grad)[0], *nothing
        return CROSS_ENTROPY_BACKWARD(grad, input, target, weight, *rest, *ctx.arguments), *nothing


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
    label_smoothing: float, normalization: str, z_loss: float, predicted: torch.dtype | None,
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
    chosen = dispatch.choose("cross_entropy", input, uncovered(input, target, weight)).backend
    try:
        return (_in_torch if chosen == "torch" else _in_operators)(input, target, weight, predicted, arguments)
    except IndexError:
        classes = input.shape[0 if input.dim() == 1 else 1]
        refuse_strays(name, classes, target, ignore_index)  # neither torch's message nor the operators' says where
        raise


def _in_torch(
    input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, arguments: Arguments
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    loss = differentiable(input, target, weight, *arguments)
    if predicted is None:
        return loss, None, None
    with torch.no_grad():
        return loss, *_predictions(as_images(input), labels_as_images(target), arguments.ignore_index, predicted)


def _in_operators(
    input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor]:
    logits = as_images(input)
    if target.is_floating_point():
        targets = dense(as_images(target), memory_format(logits))
    else:
        targets = labels_as_images(target)
    loss, _, _, *predictions = CrossEntropyFunction.apply(logits, targets, weight, predicted, *arguments)
    if arguments.reduction == "none":
        loss = loss.reshape(pixels_shape(input))
    return loss, *predictions


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
) -> Tensor:
    """torch.nn.functional.cross_entropy: deterministic, one read of the logits forward and one backward.

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
    Keeps 4 bytes a pixel for the backward (8 for float32 logits). A second derivative is torch's own. The kernels are
    compiled once for each value of label_smoothing and z_loss.

    Raises what torch raises: ValueError for another batch size, an unknown reduction or normalization and a
    normalization of what is no mean, RuntimeError for other wrong shapes, dtypes, devices and a label_smoothing
    outside [0, 1] (torch lets a negative one pass), NotImplementedError for integer logits, and on a CPU IndexError
    for a target that is neither a class nor ignore_index (on a GPU a device-side assertion, and no memory is read by
    it).
    """
    name = "cross_entropy"
    reduction = checked_reduction(name, size_average, reduce, reduction)
    return _call(
        name, input, target, weight, reduction, ignore_index, label_smoothing, normalization, z_loss, None
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
    if dtype not in (torch.int64, torch.uint8):
        raise ValueError(f"{name}: dtype must be torch.int64 or torch.uint8, but is {dtype}")
    check_types(name, input, target, weight, ignore_index, label_smoothing)
    if target.is_floating_point():
        raise RuntimeError(f"{name}: target must be class indices, but is of {target.dtype}")
    classes = input.shape[0 if input.dim() == 1 else 1]
    if dtype == torch.uint8 and classes > 256:
        raise ValueError(f"{name}: dtype must be torch.int64 for {classes} classes, of which torch.uint8 holds 256")
    loss, prediction, counts = _call(
        name, input, target, weight, reduction, ignore_index, label_smoothing, normalization, z_loss, dtype
    )
    return CrossEntropyOutput(loss, prediction.reshape(pixels_shape(input)), counts[0], counts[1])
