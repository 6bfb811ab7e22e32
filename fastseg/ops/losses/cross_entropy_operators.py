"""The operators of cross_entropy on logits (N, C, H, W): two passes, or one with the gradient made in the forward."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ...kernels.cuda import losses as cuda_kernels
from ..operator import Implementation, Operator, dense, empty, memory_format
from .checks import LABEL_DTYPES, LOGITS_DTYPES, computed, refuse_strays
from .reference import denominator_of, differentiable, gradient, right_ones, shares_of

HALVES = (torch.float16, torch.bfloat16)
ONE_PASS_CLASSES = 256  # at most, of which a program holds all
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


def cuda_uncovered(
    input: Tensor, target: Tensor, weight: Tensor | None = None, predicted: torch.dtype | None = None
) -> str | None:
    """Why the CUDA C++ kernels cannot run a call, in words, or None."""
    if target.is_floating_point():
        return "class probabilities"
    return "predictions" if predicted is not None else uncovered(input, target, weight)


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


def _dense(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """(logits, targets and weight without gaps, whether the logits are channels_last)."""
    layout = memory_format(input)
    targets = dense(target, layout if target.is_floating_point() else torch.contiguous_format)
    return dense(input, layout), targets, None if weight is None else weight.contiguous(), layout == torch.channels_last


def _cross_entropy_kernel(
    code: ModuleType, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int,
    ignore_index: int, label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, lse, denominator, *predictions = results = _empty_results(
        input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted
    )
    if reduction == "count":
        denominator.fill_(count)
    refuse_strays("cross_entropy", input.shape[1], target, ignore_index)
    *tensors, channels_last = _dense(input, target, weight)
    code.cross_entropy.cross_entropy_fwd(
        *tensors, reduction, ignore_index, label_smoothing, z_loss, channels_last, loss, lse, denominator, *predictions
    )
    return results


def _predictions(
    input: Tensor, target: Tensor, ignore_index: int, predicted: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    results = _empty_predictions(input, predicted)
    if predicted is not None:
        for result, found in zip(results, right_ones(input, target, ignore_index), strict=True):
            result.copy_(found)
    return results


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
        terms.append(shares_of(input, target, weight, ignore_index, label_smoothing)[0].sum(1))
    lse.copy_(torch.stack(terms))
    if reduction not in ("none", "sum"):
        denominator.copy_(denominator_of(input, target, weight, reduction, count, ignore_index))
    return loss, lse, denominator, *_predictions(input, target, ignore_index, predicted)


CROSS_ENTROPY = Operator(
    f"cross_entropy(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, ScalarType? predicted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            partial(_cross_entropy_kernel, triton_kernels),
            lambda input, target, weight, *rest: uncovered(input, target, weight),
        ),
        "cuda": Implementation(
            partial(_cross_entropy_kernel, cuda_kernels),
            lambda input, target, weight, *rest: cuda_uncovered(input, target, weight, rest[-1]),
        ),
    },
    reference=_cross_entropy_reference,
    fake=_empty_results,
)


def _empty_gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    return empty(input, input.shape, memory_format(input))


def _cross_entropy_backward_kernel(
    code: ModuleType, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
    denominator: Tensor, reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    grad_input = empty(input, input.shape, memory_format(input))
    *tensors, channels_last = _dense(input, target, weight)
    code.cross_entropy_bwd.cross_entropy_bwd(
        grad.contiguous(), *tensors, lse.contiguous(), denominator, reduction, ignore_index, label_smoothing, z_loss,
        channels_last, grad_input,
    )  # fmt: skip
    return grad_input


def _cross_entropy_backward_reference(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    return gradient(grad, input, target, weight, denominator, reduction, ignore_index, label_smoothing, z_loss)


CROSS_ENTROPY_BACKWARD = Operator(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    f"Tensor denominator, {SCHEMA}) -> Tensor",
    kernels={
        "triton": Implementation(
            partial(_cross_entropy_backward_kernel, triton_kernels),
            lambda grad, input, target, *rest: uncovered(input, target),
        ),
        "cuda": Implementation(
            partial(_cross_entropy_backward_kernel, cuda_kernels),
            lambda grad, input, target, *rest: cuda_uncovered(input, target),
        ),
    },
    reference=_cross_entropy_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)


# --- one pass: the forward makes the gradient too --------------------------------------------------------------------


def _empty_one_pass(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, denominator = _empty_loss(input, reduction)
    grad_input = empty(input, input.shape, memory_format(input))
    packed = empty(
        input, target.shape if reduction in SUMMED else (0,), torch.contiguous_format,
        torch.uint8 if input.shape[1] < 256 else torch.int16,
    )  # fmt: skip
    return loss, grad_input, packed, denominator, *_empty_predictions(input, predicted)


def _one_pass_kernel(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, grad_input, packed, denominator, *predictions = results = _empty_one_pass(
        input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted
    )
    if reduction == "count":
        denominator.fill_(count)
    refuse_strays("cross_entropy", input.shape[1], target, ignore_index)
    *tensors, channels_last = _dense(input, target, weight)
    triton_kernels.cross_entropy_one_pass.cross_entropy_one_pass(
        *tensors, reduction, ignore_index, label_smoothing, z_loss, channels_last, loss, grad_input, packed,
        denominator, *predictions,
    )  # fmt: skip
    return results


def _one_pass_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, count: int, ignore_index: int,
    label_smoothing: float, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    results = _empty_one_pass(input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted)
    _, _, packed, *_ = results
    loss, _, denominator, *predictions = _cross_entropy_reference(
        input, target, weight, reduction, count, ignore_index, label_smoothing, z_loss, predicted
    )
    grad_input = gradient(
        torch.ones_like(loss), input, target, weight, denominator, reduction, ignore_index, label_smoothing, z_loss
    )
    if packed.numel():
        packed.copy_(target.long().masked_fill(target.long() == ignore_index, -1))
    return loss, grad_input, packed, denominator, *predictions


CROSS_ENTROPY_ONE_PASS = Operator(
    f"cross_entropy_one_pass(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, ScalarType? predicted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            _one_pass_kernel, lambda input, target, weight, *rest: uncovered(input, target, weight)
        ),
    },
    reference=_one_pass_reference,
    fake=_empty_one_pass,
)


def _one_pass_backward_kernel(
    grad_input: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    *tensors, channels_last = _dense(input, target, weight)
    triton_kernels.cross_entropy_one_pass.cross_entropy_one_pass_bwd(
        grad, *tensors, denominator, reduction, ignore_index, label_smoothing, z_loss, channels_last, grad_input
    )


def _one_pass_backward_reference(
    grad_input: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, denominator: Tensor,
    reduction: str, count: int, ignore_index: int, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    anew = gradient(grad, input, target, weight, denominator, reduction, ignore_index, label_smoothing, z_loss)
    grad_input.copy_(torch.where(grad == 1, grad_input, anew))


CROSS_ENTROPY_ONE_PASS_BACKWARD = Operator(
    "cross_entropy_one_pass_backward_(Tensor(a!) grad_input, Tensor grad_output, Tensor input, Tensor target, "
    f"Tensor? weight, Tensor denominator, {SCHEMA}) -> ()",
    kernels={
        "triton": Implementation(
            _one_pass_backward_kernel, lambda grad_input, grad, input, target, *rest: uncovered(input, target)
        ),
    },
    reference=_one_pass_backward_reference,
    fake=lambda *args: None,
    gradient=True,
)


def packed_labels(target: Tensor, packed: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """The labels that the one-pass backward takes, and what stands for none in them."""
    if packed.numel() == 0:
        return target, ignore_index
    return packed, 255 if packed.dtype == torch.uint8 else -1
