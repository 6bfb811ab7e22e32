"""upsample_cross_entropy and its predictions: gradients and functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, torch_internals
from ..operator import double_backward, empty, memory_format, wants_graph
from .checks import (
    LABEL_DTYPES,
    check_normalization,
    check_number,
    check_prediction,
    check_target,
    check_types,
    check_weight,
    checked_reduction,
    divided,
    refuse_strays,
)
from .chunked_reference import factor_of
from .cross_entropy import CrossEntropyOutput
from .reference import differentiable
from .upsample import check_map, check_resizing
from .upsample_cross_entropy_operators import (
    NAME,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_BACKWARD,
    Arguments,
    _in_bands,
    _large,
    _uncovered,
)

FEW_CLASSES = {"bilinear": 8, "nearest": 32}  # up to which a CPU resizes all in less time than in bands
NOTHING = (None,) * (3 + len(Arguments._fields))  # the gradients of all but input


def _finite(x: Tensor) -> bool:
    """Whether all of a map is known to be finite: looked at on a CPU alone, and not while it stands for others."""
    traced = (
        torch.compiler.is_compiling() or torch_internals.functorch_transforms_active() or torch_internals.is_fake(x)
    )
    return x.device.type == "cpu" and not traced and math.isfinite(float(x.detach().abs().amax()))


def _differentiable(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    """torch's two functions, in the computed dtype: they store the large logits."""
    scales, mode, align_corners, *arguments = rest
    corners = () if mode == "nearest" else (align_corners,)
    # F.interpolate takes a size or scales; the operator below it both.
    resize = getattr(torch.ops.aten, f"upsample_{mode}2d").default
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    large = resize(input.to(dtype), list(target.shape[-2:]), *corners, *(scales or (None, None)))
    if not target.is_floating_point():
        target = target.long()
        if not _finite(input):  # what is not, in an ignored pixel, would be NaN in torch's gradient
            large = large.masked_fill((target == Arguments(*rest).ignore_index).unsqueeze(1), 0.0)
    return differentiable(large, target, weight, *arguments)


def _composed(input: Tensor, target: Tensor, mode: str) -> bool:
    """Whether torch's two functions run: for class probabilities, and where their memory is little and time counts."""
    few = input.device.type == "cpu" and input.shape[1] <= FEW_CLASSES[mode] and dispatch.get_backend() == "auto"
    return target.is_floating_point() or few


class UpsampleCrossEntropyFunction(torch.autograd.Function):
    """(input, target, weight, predicted, *Arguments) -> (loss, lse, denominator, prediction, counts).

    The gradient is the loss's, of input alone.
    """

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None,
        scales: Sequence[float] | None, mode: str, align_corners: bool, reduction: str, count: int, ignore_index: int,
        label_smoothing: float, z_loss: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # By name, not as *arguments: by their number torch.compile tells that there is no ctx.
        arguments = (scales, mode, align_corners, reduction, count, ignore_index, label_smoothing, z_loss, predicted)
        return UPSAMPLE_CROSS_ENTROPY(input, target, weight, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, _, *ctx.arguments = inputs
        _, lse, denominator, *predictions = output
        ctx.mark_non_differentiable(lse, denominator, *predictions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, lse, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *NOTHING
        input, target, weight, *rest = ctx.saved_tensors
        if wants_graph():
            inputs = (input, target, weight, *ctx.arguments)
            needed = (True, *(False,) * (len(inputs) - 1))
            return double_backward(_differentiable, inputs, needed, grad)[0], *NOTHING
        return UPSAMPLE_CROSS_ENTROPY_BACKWARD(grad, input, target, weight, *rest, *ctx.arguments), *NOTHING


class UpsampleCrossEntropyOnePassFunction(torch.autograd.Function):
    """The same on torch, of a mean or a sum, whose forward makes the gradient too, but for a factor."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, predicted: torch.dtype | None, *arguments: Any
    ) -> tuple[Tensor, ...]:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        gradient = empty(input, input.shape, memory_format(input), dtype)
        loss, _, *rest = _in_bands(input, target, weight, gradient, *arguments, predicted)
        return loss, gradient, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, _, *ctx.arguments = inputs
        _, gradient, denominator, *predictions = output
        ctx.mark_non_differentiable(gradient, denominator, *predictions)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, gradient, denominator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *NOTHING
        input, target, weight, gradient, denominator = ctx.saved_tensors
        if wants_graph():
            inputs = (input, target, weight, *ctx.arguments)
            needed = (True, *(False,) * (len(inputs) - 1))
            return double_backward(_differentiable, inputs, needed, grad)[0], *NOTHING
        a = Arguments(*ctx.arguments)
        scale = factor_of(grad, denominator, a.reduction, target, a.ignore_index)
        return (gradient * scale).to(input.dtype), *NOTHING


def _takes_one_pass(input: Tensor, target: Tensor, reduction: str) -> bool:
    """Whether the forward makes the gradient, which resizes once in place of twice: eagerly on a CPU."""
    wanted = torch.is_grad_enabled() and input.requires_grad and reduction != "none"
    eager = not torch.compiler.is_compiling() and not torch_internals.functorch_transforms_active()
    on_torch = (
        dispatch.choose(NAME, input, dispatch.only_triton(_uncovered(input, target)), dry_run=True).backend == "torch"
    )
    return wanted and eager and on_torch and input.device.type == "cpu"


def _check_target_kind(name: str, input: Tensor, target: Tensor) -> None:
    """Labels (N, H, W) or class probabilities (N, C, H, W), of any H and W."""
    probabilities = target.is_floating_point()
    if (probabilities or target.dtype in LABEL_DTYPES) and target.dim() == (4 if probabilities else 3):
        return
    other_batch = target.shape[:1] != input.shape[:1]
    raise (ValueError if other_batch else RuntimeError)(
        f"{name}: target must be class indices (N, H, W) of dtype uint8, int16, int32 or int64, or class probabilities "
        f"(N, C, H, W) of a floating-point dtype, for input of shape {tuple(input.shape)}, but is of {target.dtype} "
        f"and shape {tuple(target.shape)}" + (": another batch size" if other_batch else "")
    )


def _check_target_shape(name: str, input: Tensor, size: Sequence[int], target: Tensor) -> None:
    """That a target of the right kind has the pixels of the resized logits."""
    wanted = (*input.shape[: target.dim() - 2], *size)
    if target.shape != wanted:
        other_batch = target.shape[0] != input.shape[0]
        raise (ValueError if other_batch else RuntimeError)(
            f"{name}: target must have shape {wanted} for input of shape {tuple(input.shape)} resized to "
            f"{tuple(size)}, but has {tuple(target.shape)}" + (": another batch size" if other_batch else "")
        )


def _call(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None, mode: str, align_corners: bool | None,
    recompute_scale_factor: bool | None, ignore_index: int, reduction: str, label_smoothing: float,
    normalization: str, z_loss: float, predicted: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, prediction, counts), the last two of no use where nothing is to be predicted."""
    reduction = checked_reduction(name, None, None, reduction)
    check_map(name, input)
    check_types(name, input, target, weight, ignore_index, label_smoothing)
    if predicted is not None:
        check_prediction(name, input.shape[1], target, predicted)
    check_normalization(name, reduction, normalization)
    check_number(name, "z_loss", z_loss)
    _check_target_kind(name, input, target)
    if size is None and scale_factor is None and 0 in target.shape[-2:]:
        raise RuntimeError(f"{name}: target must have rows and columns, but has shape {tuple(target.shape)}")
    default = target.shape[-2:]
    out, scales = check_resizing(name, input, size, scale_factor, mode, align_corners, recompute_scale_factor, default)
    _check_target_shape(name, input, out, target)
    large = _large(input, out)
    check_target(name, large, target, ignore_index)
    check_weight(name, large, target, weight)
    arguments = Arguments(
        scales, mode, bool(align_corners), *divided(large, target, reduction, normalization), int(ignore_index),
        float(label_smoothing), float(z_loss),
    )  # fmt: skip
    dispatch.choose(NAME, input, dispatch.only_triton(_uncovered(input, target)))
    if predicted is None and _composed(input, target, mode):
        try:
            return _differentiable(input, target, weight, *arguments), None, None
        except IndexError:
            refuse_strays(name, input.shape[1], target, ignore_index)  # torch's message does not say where
            raise
    one_pass = _takes_one_pass(input, target, arguments.reduction)
    function = UpsampleCrossEntropyOnePassFunction if one_pass else UpsampleCrossEntropyFunction
    loss, _, _, *predictions = function.apply(input, target.contiguous(), weight, predicted, *arguments)
    return loss, *predictions


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "bilinear",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    normalization: str = "weights",
    z_loss: float = 0.0,
) -> Tensor:
    """F.cross_entropy(F.interpolate(input, size, scale_factor, mode, align_corners), target, ...) in one.

    The resized logits are never in memory: on the kernels a call needs the losses or their partial sums, 4 bytes a
    pixel for the backward (8 for float32 logits) and the gradient of `input`; on torch a band of rows besides. On a CPU
    under backend "auto" logits of few classes (8; 32 in mode "nearest") are resized whole, which is faster and holds
    12 bytes a class and pixel.

    input: logits (N, C, h, w) of any strides; float32, float16 and bfloat16 run on the kernels, float64 on torch.
    target: class indices (N, H, W) of dtype uint8, int16, int32 or int64, or class probabilities (N, C, H, W), for
    which torch's two functions run and do store the resized logits. size, scale_factor, align_corners,
    recompute_scale_factor: torch.nn.functional.interpolate's; with neither size nor scale_factor the size is target's.
    mode: "bilinear" or "nearest". The other arguments are fastseg.functional.cross_entropy's.

    Computed, summed and returned in float32 also for half-precision logits (float64 for float64), under autocast too.
    The gradient has input's dtype and memory format. Deterministic, no atomics: the kernels' backward gathers; what
    runs on torch (float64, class probabilities) is as deterministic as torch's own operators. An ignored pixel
    adds exactly 0 to it, whatever its logits. A logit that is infinite or NaN may make NaN of pixels nearby that
    torch's bilinear mode leaves alone. A second derivative is torch's own.

    Raises what the two functions raise: ValueError for both size and scale_factor, another batch size, an unknown
    reduction, align_corners in mode "nearest"; NotImplementedError for other modes, integer or not 4-D logits;
    RuntimeError for a target that has not the output's size, for other shapes, dtypes and devices; and on a CPU
    IndexError for a target that is neither a class nor ignore_index (on a GPU a device-side assertion).
    """
    return _call(
        NAME, input, target, weight, size, scale_factor, mode, align_corners, recompute_scale_factor, ignore_index,
        reduction, label_smoothing, normalization, z_loss, None,
    )[0]  # fmt: skip


def upsample_cross_entropy_with_predictions(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "bilinear",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalization: str = "weights",
    z_loss: float = 0.0,
    dtype: torch.dtype = torch.int64,
) -> CrossEntropyOutput:
    """upsample_cross_entropy of class indices, and of the same resized logits the argmax and number of right pixels.

    The arguments are upsample_cross_entropy's; target must be class indices. dtype: of the prediction, torch.int64 or
    torch.uint8, which takes an eighth of the memory and holds up to 256 classes. Returns (loss, prediction, correct,
    valid): see CrossEntropyOutput. Of equal values the first class wins, and a NaN wins over numbers, as in
    upsample_argmax. The logits are resized once for all of it, on a CPU in bands for any number of classes.
    Deterministic; the loss alone has a gradient.

    Raises what upsample_cross_entropy raises, RuntimeError for class probabilities, ValueError for another dtype and
    for torch.uint8 with more than 256 classes.
    """
    loss, prediction, counts = _call(
        "upsample_cross_entropy_with_predictions", input, target, weight, size, scale_factor, mode, align_corners,
        recompute_scale_factor, ignore_index, reduction, label_smoothing, normalization, z_loss, dtype,
    )  # fmt: skip
    return CrossEntropyOutput(loss, prediction, counts[0], counts[1])
