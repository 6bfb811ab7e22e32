"""cross_entropy: what the operators mean, their torch reference, gradients and function."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction

from .. import dispatch, kernels
from .library import Operator, dense, double_backward, empty, memory_format, placed, wants_graph

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
HALVES = (torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "mean", "sum")


def _reduction(name: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that torch takes from its three arguments; ValueError if it is none."""
    if size_average is not None or reduce is not None:
        return _Reduction.legacy_get_string(size_average, reduce)
    if reduction == "elementwise_mean":
        _Reduction.get_enum(reduction)  # torch's warning that the name is deprecated
        return "mean"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, but is {reduction!r}")
    return reduction


def _check_types(name: str, input: Any, target: Any, weight: Any, ignore_index: Any, label_smoothing: Any) -> None:
    for argument, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (argument == "weight" and value is None):
            raise TypeError(f"{name}: {argument} must be a Tensor, but is of type {type(value).__name__}")
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"{name}: ignore_index must be an int, but is of type {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{name}: ignore_index must fit in 64 bits, but is {ignore_index}")
    if not isinstance(label_smoothing, Real):
        raise TypeError(f"{name}: label_smoothing must be a float, but is of type {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be between 0.0 and 1.0, but is {label_smoothing}")
    if not input.is_floating_point():
        raise NotImplementedError(f"{name}: input must be of a floating-point dtype, but is of {input.dtype}")
    if input.dim() == 0:
        raise RuntimeError(f"{name}: input must have a dimension of classes, but has none")


def _check_target(name: str, input: Tensor, target: Tensor) -> None:
    if target.device != input.device:
        raise RuntimeError(f"{name}: target must be on input's device {input.device}, but is on {target.device}")
    if target.is_floating_point() and target.shape == input.shape:
        return  # class probabilities
    if target.dtype not in LABEL_DTYPES:
        raise RuntimeError(
            f"{name}: target must be class indices of dtype uint8, int16, int32 or int64, or class probabilities of "
            f"input's shape {tuple(input.shape)}, but is of {target.dtype} and shape {tuple(target.shape)}"
        )
    if input.dim() < 2:
        return
    wanted = (input.shape[0], *input.shape[2:])
    if target.shape != wanted:
        same_batch = target.dim() > 0 and target.shape[0] == input.shape[0]
        raise (RuntimeError if same_batch else ValueError)(
            f"{name}: target must have shape {wanted} for input of shape {tuple(input.shape)}, but has "
            f"{tuple(target.shape)}" + ("" if same_batch else ": another batch size")
        )


def _check_weight(name: str, input: Tensor, target: Tensor, weight: Tensor) -> None:
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.numel() != classes:
        raise RuntimeError(
            f"{name}: weight must have one entry for each of the {classes} classes, but has shape {tuple(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, input.dtype):
        raise RuntimeError(f"{name}: weight must be of float32 or input's {input.dtype}, but is of {weight.dtype}")
    if weight.device != input.device:
        raise RuntimeError(f"{name}: weight must be on input's device {input.device}, but is on {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled() and not target.is_floating_point():
        raise RuntimeError(f"{name}: weight must not require a gradient, which the loss of class indices does not have")


def _refuse_strays(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """IndexError for a label that is neither a class nor ignored. On a GPU a device-side assertion says it."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    classes = input.shape[1 if input.dim() > 1 else 0]
    stray = ((target < 0) | (target >= classes)) & (target.long() != ignore_index)
    if stray.any():
        where = tuple(stray.nonzero()[0].tolist())
        raise IndexError(
            f"cross_entropy: Target {target[where].item()} is out of bounds at {where}: a target must be a class, 0 to "
            f"{classes - 1}, or ignore_index {ignore_index}"
        )


# --- operators -------------------------------------------------------------------------------------------------------


def _computed(dtype: torch.dtype) -> torch.dtype:
    """What a loss of logits of this dtype is computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _uncovered(input: Tensor, target: Tensor) -> str | None:
    """Why the kernels cannot run a call, in words, or None."""
    if target.is_floating_point():
        return "a target of class probabilities"
    if input.dtype not in LOGITS_DTYPES:
        return f"dtype {input.dtype}"
    if input.dim() != 4:
        return f"{input.dim()}-D input"
    if input.shape[1] == 0:
        return "input without classes"
    if target.dtype not in LABEL_DTYPES:
        return f"a target of dtype {target.dtype}"
    return None


def _differentiable(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch's function on what torch's function takes: labels int64, logits and weight of the computed dtype."""
    dtype = _computed(input.dtype)
    if not target.is_floating_point():
        target = target.long()
    weight = None if weight is None else weight.to(dtype)
    return F.cross_entropy(
        input.to(dtype), target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _empty_losses(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, dense_format = _computed(input.dtype), torch.contiguous_format
    loss = empty(input, target.shape if reduction == "none" else (), dense_format, dtype)
    terms = 1 if input.dtype in HALVES else 2  # (the maximum, what is above it): their sum would lose digits
    lse = empty(input, (terms, *target.shape), dense_format, dtype)
    return loss, lse, empty(input, () if reduction == "mean" else (0,), dense_format, dtype)


def _cross_entropy_kernel(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_strays(input, target, ignore_index)
    losses = _empty_losses(input, target, weight, reduction, ignore_index)
    layout = memory_format(input)
    weight = None if weight is None else weight.contiguous()
    kernels.cross_entropy.cross_entropy_fwd(
        dense(input, layout), target.contiguous(), weight, reduction, ignore_index, layout == torch.channels_last,
        *losses,
    )  # fmt: skip
    return losses


def _weights(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each pixel, 0 where it is ignored."""
    valid = target.long() != ignore_index
    if weight is None:
        return valid.to(_computed(input.dtype))
    safe = target.long().masked_fill(~valid, 0)
    return weight.to(_computed(input.dtype)).flatten()[safe].masked_fill(~valid, 0.0)


def _cross_entropy_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_strays(input, target, ignore_index)
    loss, lse, denominator = _empty_losses(input, target, weight, reduction, ignore_index)
    loss.copy_(_differentiable(input, target, weight, reduction, ignore_index))
    logits = input.to(loss.dtype)
    highest = logits.amax(1)
    above = (logits - highest.unsqueeze(1)).exp().sum(1).log()  # NaN where torch's softmax is
    lse.copy_(torch.stack((highest, above)) if len(lse) == 2 else highest + above)
    if reduction == "mean":
        denominator.copy_(_weights(input, target, weight, ignore_index).sum())
    return loss, lse, denominator


CROSS_ENTROPY = Operator(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_cross_entropy_kernel,
    reference=_cross_entropy_reference,
    fake=_empty_losses,
    uncovered=lambda input, target, weight, reduction, ignore_index: _uncovered(input, target),
)


def _empty_gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, ignore_index: int,
) -> Tensor:  # fmt: skip
    return empty(input, input.shape, memory_format(input))


def _cross_entropy_backward_kernel(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, ignore_index: int,
) -> Tensor:  # fmt: skip
    layout = memory_format(input)
    grad_input = _empty_gradient(grad, input, target, weight, lse, denominator, reduction, ignore_index)
    weight = None if weight is None else weight.contiguous()
    kernels.cross_entropy.cross_entropy_bwd(
        grad.contiguous(), dense(input, layout), target.contiguous(), weight, lse.contiguous(), denominator,
        reduction, ignore_index, layout == torch.channels_last, grad_input,
    )  # fmt: skip
    return grad_input


def _cross_entropy_backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, ignore_index: int,
) -> Tensor:  # fmt: skip
    valid = (target.long() != ignore_index).unsqueeze(1)
    scale = _weights(input, target, weight, ignore_index) * (grad / denominator if reduction == "mean" else grad)
    hit = torch.arange(input.shape[1], device=input.device).view(-1, 1, 1) == target.unsqueeze(1)
    log_softmax = input.to(lse.dtype)
    for term in lse:
        log_softmax = log_softmax - term.unsqueeze(1)
    grad_input = torch.where(valid, scale.unsqueeze(1) * (log_softmax.exp() - hit.to(lse.dtype)), 0.0)
    return placed(grad_input.to(input.dtype), memory_format(input))


CROSS_ENTROPY_BACKWARD = Operator(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    "Tensor denominator, str reduction, int ignore_index) -> Tensor",
    kernel=_cross_entropy_backward_kernel,
    reference=_cross_entropy_backward_reference,
    fake=_empty_gradient,
    uncovered=lambda grad, input, target, *rest: _uncovered(input, target),
)


# --- function --------------------------------------------------------------------------------------------------------


class CrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, reduction, ignore_index) -> (loss, lse, denominator); the gradient is the loss's."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return CROSS_ENTROPY(input, target, weight, reduction, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, target, weight, *ctx.arguments = inputs
        _, lse, denominator = output
        ctx.mark_non_differentiable(lse, denominator)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        input, target, weight, *rest = ctx.saved_tensors
        if wants_graph():
            inputs, needed = (input, target, weight, *ctx.arguments), (True, *(False,) * 4)
            return tuple(double_backward(_differentiable, inputs, needed, grad))
        return CROSS_ENTROPY_BACKWARD(grad, input, target, weight, *rest, *ctx.arguments), *(None,) * 4


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy: deterministic, one read of the logits forward and one backward.

    input: logits (N, C, H, W); float32, float16 or bfloat16 run on the kernels, in NCHW and channels_last.
    target: class indices (N, H, W) of dtype uint8, int16, int32 or int64 (torch: int64 alone). weight: one entry for
    each class, float32 or input's dtype. Other ranks, float64, class probabilities and label_smoothing are torch's.

    Per pixel w_t * (log sum_c exp(x_c) - x_t); reduction "mean" divides the sum by the sum of the weights of the
    pixels that are not ignore_index. With nothing valid the mean is NaN, the sum 0 and the gradient 0, as in torch.

    The loss is computed, summed and returned in float32 also for half-precision logits (float64 for float64), under
    autocast too, on every backend; torch returns input's dtype. The gradient has input's dtype and memory format; on
    the kernels that of an ignored pixel is exactly 0 even where its logits are NaN or infinite (torch: NaN).
    Keeps 4 bytes a pixel for the backward (8 for float32 logits). A second derivative is torch's own.

    Raises what torch raises: ValueError for another batch size or an unknown reduction, RuntimeError for other wrong
    shapes, dtypes, devices and a label_smoothing outside [0, 1] (torch lets a negative one pass), NotImplementedError
    for integer logits, and on a CPU IndexError for a target that is neither a class nor ignore_index (on a GPU a
    device-side assertion, and no memory is read by it).
    """
    name = "cross_entropy"
    reduction = _reduction(name, size_average, reduce, reduction)
    _check_types(name, input, target, weight, ignore_index, label_smoothing)
    _check_target(name, input, target)
    if weight is not None:
        _check_weight(name, input, target, weight)
    uncovered = f"label_smoothing {label_smoothing}" if label_smoothing else _uncovered(input, target)
    if dispatch.choose(name, input, uncovered).backend == "torch":
        try:
            return _differentiable(input, target, weight, reduction, ignore_index, label_smoothing)
        except IndexError:
            _refuse_strays(input, target, ignore_index)  # torch's own message does not say where
            raise
    logits = dense(input, memory_format(input))  # here, so that the backward finds them dense
    return CrossEntropyFunction.apply(logits, target.contiguous(), weight, reduction, int(ignore_index))[0]
