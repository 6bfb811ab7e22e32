"""conv_transpose2d and its fused form: arguments, gradients and functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from ..arguments import IntOrPair, autocast_dtype
from ..operator import double_backward, vmap_loops, wants_graph
from .conv_transpose_operators import (
    CONV_TRANSPOSE2D,
    CONV_TRANSPOSE2D_BACKWARD,
    FORWARD,
    apply_epilogue,
    gradient_directions,
    preferred,
    torch_forward,
    torch_gradients,
    unsupported,
)
from .options import ConvTransposeGeometry, Epilogue, conv_transpose_geometry

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
    channels, dtype = weight.shape[1] * groups, autocast_dtype(input)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != channels):
        raise RuntimeError(f"{NAME}: bias must have shape ({channels},), but has {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and autocast_dtype(other) != dtype:
            raise RuntimeError(f"{NAME}: {name} must be of input's dtype {dtype}, but is of {autocast_dtype(other)}")
        if other is not None and other.device != input.device:
            raise RuntimeError(f"{NAME}: {name} must be on input's device {input.device}, but is on {other.device}")


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvTransposeGeometry) -> None:
    """Raise RuntimeError for a call that torch refuses, or that would give an output without pixels."""
    _check_tensors(input, weight, bias, geometry.groups)
    stride, padding, extra, _, dilation = geometry
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise RuntimeError(
            f"{NAME}: output_padding must be smaller than stride {tuple(stride)} or dilation {tuple(dilation)}, "
            f"but is {tuple(extra)}"
        )
    size = geometry.output_size(input.shape[-2:], weight.shape[-2:])
    if min(size) < 1:
        raise RuntimeError(
            f"{NAME}: padding {tuple(padding)} must leave an output, but input of shape {tuple(input.shape)} would "
            f"give one of size {tuple(size)}"
        )


def _check_epilogue(input: Tensor, channels: int, scale: Tensor | None, shift: Tensor | None) -> None:
    name, dtype = "conv_transpose2d_affine_relu", autocast_dtype(input)
    for what, value in (("scale", scale), ("shift", shift)):
        if value is None:
            continue
        if value.shape != (channels,):
            raise RuntimeError(f"{name}: {what} must have shape ({channels},), but has {tuple(value.shape)}")
        if value.dtype not in (torch.float32, dtype, input.dtype):
            raise RuntimeError(f"{name}: {what} must be of float32 or {dtype}, but is of {value.dtype}")
        if value.device != input.device:
            raise RuntimeError(f"{name}: {what} must be on input's device {input.device}, but is on {value.device}")


# --- gradients -------------------------------------------------------------------------------------------------------


class ConvTranspose2dFunction(torch.autograd.Function):
    """(input, weight, bias, scale, geometry, relu) -> output, with gradients for the four tensors.

    Let g be the gradient after ReLU's mask. The gradient of input uses g and weight * scale. Those of weight and scale
    come from one GEMM, G, of input and g: G * scale, and the sum of G * weight, because the output is linear in the
    weight. So nothing is divided by scale, and the sum before the epilogue need not be saved.
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        geometry: ConvTransposeGeometry,
        relu: bool,
    ) -> Tensor:
        return CONV_TRANSPOSE2D(input, weight, geometry, Epilogue(bias, scale, relu))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, scale, ctx.geometry, relu = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, scale, output if relu else None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, ConvTranspose2dFunction, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        needed = ctx.needs_input_grad[:4]
        run = _differentiable_gradients if wants_graph() else _gradients
        found = run(grad, ctx.saved_tensors, ctx.geometry, needed)
        return *(gradient if need else None for gradient, need in zip(found, needed, strict=True)), None, None


def _gradients(
    grad: Tensor, saved: Sequence[Tensor | None], geometry: ConvTransposeGeometry, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Gradients of input, weight, bias and scale; those that are not needed may be any tensor."""
    input, weight, _, scale, output = saved
    need_input, need_weight, need_bias, need_scale = needed
    mask = [need_input, need_weight or need_scale, need_bias]
    if scale is None:
        return *CONV_TRANSPOSE2D_BACKWARD(grad, input, weight, geometry, mask, output), None
    groups = geometry.groups
    by_row = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(*weight.shape[:2], 1, 1)
    scaled = (weight * by_row).to(weight.dtype)
    of_input, unscaled, of_bias = CONV_TRANSPOSE2D_BACKWARD(grad, input, scaled, geometry, mask, output)
    if not (need_weight or need_scale):
        return of_input, None, of_bias, None
    of_scale = (unscaled * weight).sum((2, 3)).view(groups, -1, weight.shape[1]).sum(1).flatten()
    return of_input, unscaled * by_row, of_bias, of_scale


def _differentiable_gradients(
    grad: Tensor, saved: Sequence[Tensor | None], geometry: ConvTransposeGeometry, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The same in torch's functions, which can be differentiated again."""
    *inputs, output = saved
    input, weight, _, scale = inputs
    if scale is None and output is None:
        return *torch_gradients(grad, input, weight, geometry, list(needed[:3])), None

    def fused(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        y = F.conv_transpose2d(input, weight, None, *geometry)
        return apply_epilogue(y, Epilogue(bias, scale, output is not None))

    return double_backward(fused, inputs, needed, grad)


# --- functions -------------------------------------------------------------------------------------------------------


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
    """Transposed convolution as torch.nn.functional.conv_transpose2d, without multiplications by inserted zeros.

        output[n, k, oh, ow] = bias[k] + sum over c and taps (i, j) of input[n, c, h, w] * weight[c, k, i, j],
        with oh = h * stride - padding + i * dilation, and ow likewise

    Args:
        input: of any floating-point dtype. The kernels support float32, float16 and bfloat16.
        weight: of the input's dtype.
        bias: of the input's dtype, or None.
        stride, padding, output_padding, dilation: an int or two ints (height, width).
        groups: the input channels are divided into so many groups, each with its own output channels.

    Shape:
        - input: (N, C, H, W) or (C, H, W).
        - weight: (C, K / groups, KH, KW). bias: (K,).
        - output: (N, K, OH, OW) or (K, OH, OW) with
          OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1, and OW likewise. It is
          channels_last if the input or the weight is, as in torch.

    Returns:
        The output, in the input's dtype; under autocast in autocast's dtype.

    Raises:
        TypeError: for a stride, padding, output_padding or dilation that is not made of ints.
        RuntimeError: for shapes, dtypes and arguments that torch refuses, and for an output without pixels.
        NotImplementedError: if the kernels are requested for what they do not support: float64, a dilation together
            with a stride in the same dimension, or maps of more than 2^20 rows or columns or 2^31 - 1 pixels.

    Note:
        Under backend "auto" a call runs on the kernels only if a measurement says that they are faster than cuDNN.
        Deterministic, the gradients too; they have second derivatives through torch's functions. Sums are in float32.
        float32 operands are rounded to TF32 if torch.backends.cudnn.conv.fp32_precision is "tf32". Under autocast
        tensors are cast as torch casts them.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> FS.conv_transpose2d(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0, 10.0]]]]), stride=2)
        tensor([[[[ 1., 10.,  2., 20.]]]])

    Source:
        torch.nn.functional.conv_transpose2d.
    """
    geometry = conv_transpose_geometry(stride, padding, output_padding, groups, dilation)
    _check(input, weight, bias, geometry)
    if _falls_back_to_torch(input, weight, geometry, Epilogue(bias)):
        return F.conv_transpose2d(input, weight, bias, *geometry)
    return _apply(input, weight, geometry, Epilogue(None if bias is None else bias.to(autocast_dtype(bias))))


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
    """Transposed convolution, scale and shift of each channel, and ReLU, in one kernel.

        output = relu(conv_transpose2d(input, weight) * scale + shift)

    Scale, shift and ReLU are applied in float32 before the result is rounded and stored. A bias is a shift without a
    scale. A batch norm in evaluation is scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale.

    Args:
        input, weight, stride, padding, output_padding, groups, dilation: as in conv_transpose2d.
        scale, shift: of float32 or of the input's dtype, or None. Values computed from a batch norm are best kept in
            float32. Autocast does not cast them.

    Shape:
        - input, weight, output: as in conv_transpose2d.
        - scale, shift: (K,).

    Returns:
        The output, in the dtype and memory format that conv_transpose2d returns.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as conv_transpose2d; RuntimeError also for a scale or shift of
            another shape, dtype or device.

    Note:
        As in conv_transpose2d: "auto" asks for a measurement, and the result and all gradients are deterministic. The
        backward makes one pass over the gradient that applies ReLU's mask, for which torch makes three.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> x, weight = torch.tensor([[[[1.0, 2.0]]]]), torch.ones(1, 1, 1, 1)
        >>> FS.conv_transpose2d_affine_relu(x, weight, scale=torch.tensor([2.0]), shift=torch.tensor([-3.0]))
        tensor([[[[0., 1.]]]])

    Source:
        torch.nn.functional.conv_transpose2d, batch_norm and relu.
    """
    geometry = conv_transpose_geometry(stride, padding, output_padding, groups, dilation)
    _check(input, weight, None, geometry)
    _check_epilogue(input, weight.shape[1] * groups, scale, shift)
    epilogue = Epilogue(shift, scale, True)
    if _falls_back_to_torch(input, weight, geometry, epilogue):
        return torch_forward(input, weight, geometry, epilogue)
    return _apply(input, weight, geometry, epilogue)


def runs_on_kernels(input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue) -> bool:
    """Whether such a call of conv_transpose2d, or with scale or relu of the fused form, would run on the kernels."""
    fused = epilogue.scale is not None or epilogue.relu
    _check(input, weight, None if fused else epilogue.bias, geometry)
    return not _falls_back_to_torch(input, weight, geometry, epilogue, dry_run=True)


def _falls_back_to_torch(
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    epilogue: Epilogue,
    dry_run: bool = False,
) -> bool:
    """Whether no direction of a call runs on the kernels. Each direction that will be needed is chosen separately.

    Under torch.compile the operators choose when they run.
    """
    missing = unsupported(input, weight, geometry)
    automatic = input.is_cuda and dispatch.get_backend() == "auto" and not dispatch.without_triton(input.device)
    if missing is not None or not automatic:
        return dispatch.choose(NAME, input, dispatch.only_triton(missing), dry_run=dry_run).backend == "torch"
    if torch.compiler.is_compiling():
        return False
    image, dtype = input if input.dim() == 4 else input.unsqueeze(0), autocast_dtype(input)
    needed = [torch.is_grad_enabled() and t.requires_grad for t in (input, weight)]
    backends = set()
    for direction in (FORWARD, *gradient_directions(image, weight, geometry, needed, dtype)):
        name = NAME if direction == FORWARD else f"{NAME}, {direction}"
        preference = preferred(direction, image, weight, geometry, epilogue, dtype)
        backends.add(dispatch.choose(name, input, dispatch.only_triton(None), preference, dry_run).backend)
    return backends == {"torch"}


def _apply(input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue) -> Tensor:
    x, weight = input.to(autocast_dtype(input)), weight.to(autocast_dtype(weight))
    batch = x if input.dim() == 4 else x.unsqueeze(0)
    bias, scale, relu = epilogue
    output = ConvTranspose2dFunction.apply(batch, weight, bias, scale, geometry, relu)
    return output if input.dim() == 4 else output.squeeze(0)
