"""conv_transpose2d and its fused form: arguments, gradients and functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from ..arguments import IntOrPair, as_pair
from ..operator import double_backward, vmap_loops, wants_graph
from .conv_transpose_operators import (
    CONV_TRANSPOSE2D,
    CONV_TRANSPOSE2D_BACKWARD,
    FORWARD,
    affine_relu,
    gradient_directions,
    output_size,
    preferred,
    torch_forward,
    torch_gradients,
    uncovered,
)

NAME = "conv_transpose2d"


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{NAME}: input must be (N, C, H, W) or (C, H, W), but has shape {tuple(input.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise RuntimeError(f"{NAME}: weight must be (C, K, KH, KW) and not empty, but has shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise RuntimeError(f"{NAME}: groups must be a divisor of weight's {weight.shape[0]} channels, but is {groups}")
    if input.shape[-3] != weight.shape[0]:
        raise RuntimeError(f"{NAME}: input must have weight's {weight.shape[0]} channels, but has {input.shape[-3]}")
    if 0 in input.shape[-2:]:
        raise RuntimeError(f"{NAME}: input may be empty in its batch only, but has shape {tuple(input.shape)}")
    channels = weight.shape[1] * groups
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != channels):
        raise RuntimeError(f"{NAME}: bias must have shape ({channels},), but has {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and _dtype(other) != _dtype(input):
            raise RuntimeError(f"{NAME}: {name} must be of input's dtype {_dtype(input)}, but is of {_dtype(other)}")
        if other is not None and other.device != input.device:
            raise RuntimeError(f"{NAME}: {name} must be on input's device {input.device}, but is on {other.device}")


def _arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntOrPair, padding: IntOrPair,
    output_padding: IntOrPair, groups: int, dilation: IntOrPair,
) -> tuple[list[int], list[int], list[int], int, list[int]]:  # fmt: skip
    _check_tensors(input, weight, bias, groups)
    stride, padding = as_pair(stride, NAME, "stride", 1), as_pair(padding, NAME, "padding", 0)
    dilation, extra = as_pair(dilation, NAME, "dilation", 1), as_pair(output_padding, NAME, "output_padding", 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise RuntimeError(
            f"{NAME}: output_padding must be smaller than stride {tuple(stride)} or dilation {tuple(dilation)}, "
            f"but is {tuple(extra)}"
        )
    size = output_size(input.shape[-2:], weight.shape[-2:], stride, padding, extra, dilation)
    if min(size) < 1:
        raise RuntimeError(
            f"{NAME}: padding {tuple(padding)} must leave an output, but input of shape {tuple(input.shape)} would "
            f"give one of size {tuple(size)}"
        )
    return stride, padding, extra, groups, dilation


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype a tensor is multiplied in: autocast's, where it is on and x is one that it casts."""
    device = x.device.type
    if (
        device in ("cpu", "cuda")
        and torch.is_autocast_enabled(device)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype


class ConvTranspose2dFunction(torch.autograd.Function):
    """(input, weight, bias, geometry, scale, relu) -> output, with gradients for the four tensors.

    With g the gradient behind ReLU's mask, the gradient of input is that of g and the weight times scale, and those of
    weight and scale come from one product G of input and g: G * scale, and the sum of G * weight, since the output is
    linear in the weight. So nothing is divided by scale, and the sum before the epilogue need not be kept.
    """

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
        output_padding: list[int], groups: int, dilation: list[int], scale: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        return CONV_TRANSPOSE2D(input, weight, bias, stride, padding, output_padding, groups, dilation, scale, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, *rest = inputs
        ctx.geometry, (scale, relu) = rest[:5], rest[5:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, scale, output if relu else None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, ConvTranspose2dFunction, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        input, weight, bias, scale, output = ctx.saved_tensors
        needed = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[8]]
        run = _differentiable_gradients if wants_graph() else _gradients
        found = run(grad, input, weight, bias, scale, output, ctx.geometry, needed)
        of_input, of_weight, of_bias, of_scale = (g if n else None for g, n in zip(found, needed, strict=True))
        return of_input, of_weight, of_bias, *(None,) * 5, of_scale, None


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, output: Tensor | None,
    geometry: list[Any], needed: list[bool],
) -> Sequence[Tensor]:  # fmt: skip
    mask = [needed[0], needed[1] or needed[3], needed[2]]
    if scale is None:
        return *CONV_TRANSPOSE2D_BACKWARD(grad, input, weight, *geometry, mask, output), grad
    groups = geometry[3]
    by_row = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(*weight.shape[:2], 1, 1)
    scaled = (weight * by_row).to(weight.dtype)
    of_input, product, of_bias = CONV_TRANSPOSE2D_BACKWARD(grad, input, scaled, *geometry, mask, output)
    if not mask[1]:
        return of_input, product, of_bias, product
    of_scale = (product * weight).sum((2, 3)).view(groups, -1, weight.shape[1]).sum(1).flatten()
    return of_input, product * by_row, of_bias, of_scale


def _differentiable_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, output: Tensor | None,
    geometry: list[Any], needed: list[bool],
) -> Sequence[Tensor | None]:  # fmt: skip
    if scale is None and output is None:
        return *torch_gradients(grad, input, weight, *geometry, needed[:3]), None

    def fused(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        return affine_relu(F.conv_transpose2d(input, weight, None, *geometry), scale, bias, output is not None)

    return double_backward(fused, (input, weight, bias, scale), needed, grad)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    groups: int = 1,
    dilation: IntOrPair = 1,
) -> Tensor:
    """torch.nn.functional.conv_transpose2d, on the tensor cores by phases: no multiplication by inserted zeros.

    input: (N, C, H, W) or (C, H, W); weight: (C, K / groups, KH, KW); bias: (K,). The result is (N, K, OH, OW) with
    OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1, channels_last where input or
    weight is, as in torch. float32, float16 and bfloat16 run on the kernels; float64, and dilation together with a
    stride, on torch. Sums are in float32; float32 operands are rounded to TF32 where torch allows cuDNN's
    convolutions that (torch.backends.cudnn.conv.fp32_precision). Under autocast tensors are cast as torch casts them.

    Deterministic, the gradients too, which have second derivatives through torch's. Under backend "auto" torch runs
    until a measurement says that the kernels beat cuDNN; backend "triton" runs them. Raises RuntimeError for shapes,
    dtypes and arguments that torch refuses, and for an output without pixels.
    """
    geometry = _arguments(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if _all_on_torch(input, weight, bias, geometry, None, False):
        return F.conv_transpose2d(input, weight, bias, *geometry)
    return _applied(input, weight, None if bias is None else bias.to(_dtype(bias)), *geometry, None, False)


def runs_on_kernels(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntOrPair, padding: IntOrPair,
    output_padding: IntOrPair, groups: int, dilation: IntOrPair, scale: Tensor | None = None, relu: bool = False,
) -> bool:  # fmt: skip
    """Whether a call of conv_transpose2d, or with scale and relu of the fused form, would run on the kernels."""
    checked = bias if scale is None and not relu else None
    geometry = _arguments(input, weight, checked, stride, padding, output_padding, groups, dilation)
    return not _all_on_torch(input, weight, bias, geometry, scale, relu, dry_run=True)


def conv_transpose2d_affine_relu(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    groups: int = 1,
    dilation: IntOrPair = 1,
) -> Tensor:
    """relu(conv_transpose2d(input, weight) * scale + shift), the epilogue in float32 before the result is stored.

    scale, shift: (K,), of float32 or of input's dtype, or None: a bias is a shift without scale, and a batch
    normalisation in evaluation folds to scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale, best
    kept in float32. Everything else, shapes, layouts, dtypes, determinism and errors, is as in conv_transpose2d, of
    which this is one kernel where it runs on the kernels, forward, and in the backward one pass over the gradient,
    with ReLU's mask, for what torch takes three for. Under autocast scale and shift are left as they are.
    """
    name = "conv_transpose2d_affine_relu"
    geometry = _arguments(input, weight, None, stride, padding, output_padding, groups, dilation)
    for what, value in (("scale", scale), ("shift", shift)):
        if value is None:
            continue
        if value.shape != (weight.shape[1] * groups,):
            expected = (weight.shape[1] * groups,)
            raise RuntimeError(f"{name}: {what} must have shape {expected}, but has {tuple(value.shape)}")
        if value.dtype not in (torch.float32, _dtype(input), input.dtype):
            raise RuntimeError(f"{name}: {what} must be of float32 or {_dtype(input)}, but is of {value.dtype}")
        if value.device != input.device:
            raise RuntimeError(f"{name}: {what} must be on input's device {input.device}, but is on {value.device}")
    if _all_on_torch(input, weight, shift, geometry, scale, True):
        return torch_forward(input, weight, shift, *geometry, scale, True)
    return _applied(input, weight, shift, *geometry, scale, True)


def _all_on_torch(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], scale: Tensor | None, relu: bool,
    dry_run: bool = False,
) -> bool:  # fmt: skip
    """Whether no direction of a call runs on the kernels; each that will be asked for is chosen for itself.

    Under torch.compile the operators choose when they run.
    """
    no = uncovered(input, weight, geometry[0], geometry[4])
    if no is not None or not input.is_cuda or dispatch.get_backend() != "auto" or dispatch.without_triton(input.device):
        return dispatch.choose(NAME, input, dispatch.only_triton(no), dry_run=dry_run).backend == "torch"
    if torch.compiler.is_compiling():
        return False
    image, differentiated = input if input.dim() == 4 else input.unsqueeze(0), torch.is_grad_enabled()
    asked = [differentiated and t.requires_grad for t in (input, weight)]
    choices = [
        dispatch.choose(
            NAME if way == FORWARD else f"{NAME}, {way}", input, dispatch.only_triton(None),
            preferred(way, image, weight, geometry, bias, scale, relu, _dtype(input)), dry_run,
        )
        for way in (FORWARD, *gradient_directions(image, weight, geometry, asked, _dtype(input)))
    ]  # fmt: skip
    return all(choice.backend == "torch" for choice in choices)


def _applied(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    x, weight = input.to(_dtype(input)), weight.to(_dtype(weight))
    output = ConvTranspose2dFunction.apply(x if input.dim() == 4 else x.unsqueeze(0), weight, *rest)
    return output if input.dim() == 4 else output.squeeze(0)
