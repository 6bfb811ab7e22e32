"""conv_transpose2d: what the operators mean, their torch reference, gradients and function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .library import Operator, dense, empty, memory_format, placed, wants_graph
from .windows import KERNEL_DTYPES, IntOrPair, pair

NAME = "conv_transpose2d"
UNMEASURED = "no measurement says that the kernels beat cuDNN for this shape"


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: list[int], padding: list[int], output_padding: list[int],
    dilation: list[int],
) -> list[int]:  # fmt: skip
    """Height and width of the result."""
    sizes = zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    return [(length - 1) * s - 2 * p + d * (k - 1) + extra + 1 for length, k, s, p, extra, d in sizes]


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
    stride, padding = pair(stride, NAME, "stride", 1), pair(padding, NAME, "padding", 0)
    dilation, extra = pair(dilation, NAME, "dilation", 1), pair(output_padding, NAME, "output_padding", 0)
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


def _uncovered(input: Tensor, weight: Tensor, groups: int, dilation: list[int]) -> str | None:
    if input.dtype not in KERNEL_DTYPES:
        return f"dtype {input.dtype}"
    if groups != 1:
        return f"groups {groups}"
    if any(d != 1 for d in dilation):
        return f"dilation {tuple(dilation)}"
    return None


# --- operators -------------------------------------------------------------------------------------------------------


def _suggests_channels_last(x: Tensor) -> bool:
    """torch's rule, from the strides alone: a slice of a channels_last tensor is channels_last still."""
    least = 0
    for dim in (1, 3, 2, 0):
        stride, size = x.stride(dim), x.shape[dim]
        if size == 0 or stride == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size
    return True


def _layout(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of the result and of input's gradient: channels_last where input or weight is, as in torch."""
    either = _suggests_channels_last(input) or _suggests_channels_last(weight)
    return torch.channels_last if either else torch.contiguous_format


def _empty_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int],
) -> Tensor:  # fmt: skip
    size = output_size(input.shape[-2:], weight.shape[-2:], stride, padding, output_padding, dilation)
    return empty(input, [input.shape[0], weight.shape[1] * groups, *size], _layout(input, weight))


def _as_it_lies(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x itself in either dense format; the kernels' launchers choose how each is read. Else a copy in `layout`."""
    either = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if either else dense(x, layout)


def _conv_transpose2d_kernel(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int],
) -> Tensor:  # fmt: skip
    output = _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation)
    layout = _layout(input, weight)
    geometry = kernels.conv_transpose.Geometry(list(weight.shape[-2:]), stride, padding, layout == torch.channels_last)
    kernels.conv_transpose.conv_transpose2d_fwd(
        _as_it_lies(input, layout),
        _as_it_lies(weight, layout),
        None if bias is None else bias.contiguous(),
        output,
        geometry,
    )
    return output


def _conv_transpose2d_reference(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    return placed(F.conv_transpose2d(input, weight, bias, *arguments), _layout(input, weight))


CONV_TRANSPOSE2D = Operator(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] output_padding, int groups, int[2] dilation) -> Tensor",
    kernel=_conv_transpose2d_kernel,
    reference=_conv_transpose2d_reference,
    fake=_empty_output,
    uncovered=lambda input, weight, bias, *geometry: _uncovered(input, weight, *geometry[3:]),
    slower=lambda *args: UNMEASURED,
)


def _empty_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias, each an empty(0) where output_mask does not ask for it."""
    return (
        empty(input, input.shape, _layout(input, weight)) if output_mask[0] else input.new_empty(0),
        empty(weight, weight.shape, memory_format(weight)) if output_mask[1] else input.new_empty(0),
        input.new_empty(weight.shape[1] * groups if output_mask[2] else 0),
    )


def _conv_transpose2d_backward_kernel(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _empty_gradients(grad, input, weight, stride, padding, output_padding, groups, dilation, output_mask)
    layout = _layout(input, weight)
    geometry = kernels.conv_transpose.Geometry(list(weight.shape[-2:]), stride, padding, layout == torch.channels_last)
    operands = (_as_it_lies(x, layout) for x in (grad, input, weight))
    wanted = (g if need else None for g, need in zip(gradients, output_mask, strict=True))
    kernels.conv_transpose_bwd.conv_transpose2d_bwd(*operands, *wanted, geometry)
    return gradients


def _torch_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [grad.shape[1]], stride, padding, dilation, True, output_padding, groups, output_mask
    )


def _conv_transpose2d_backward_reference(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    results = _empty_gradients(grad, *arguments)
    for result, found in zip(results, _torch_gradients(grad, *arguments), strict=True):
        if found is not None:
            result.copy_(found)
    return results


CONV_TRANSPOSE2D_BACKWARD = Operator(
    "conv_transpose2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
    "int[2] output_padding, int groups, int[2] dilation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    kernel=_conv_transpose2d_backward_kernel,
    reference=_conv_transpose2d_backward_reference,
    fake=_empty_gradients,
    uncovered=lambda grad, input, weight, *geometry: _uncovered(grad, weight, *geometry[3:5]),
    slower=lambda *args: UNMEASURED,
)


# --- functions -------------------------------------------------------------------------------------------------------


class ConvTranspose2dFunction(torch.autograd.Function):
    """(input, weight, bias, geometry) -> output, with gradients for the three tensors."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
        output_padding: list[int], groups: int, dilation: list[int],
    ) -> Tensor:  # fmt: skip
        return CONV_TRANSPOSE2D(input, weight, bias, stride, padding, output_padding, groups, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.geometry = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        if grad is None:
            return (None,) * 8
        run = _torch_gradients if wants_graph() else CONV_TRANSPOSE2D_BACKWARD
        gradients = run(grad, *ctx.saved_tensors, *ctx.geometry, needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *(None,) * 5


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
    weight is, as in torch. float32, float16 and bfloat16 of one group without dilation run on the kernels, all else
    on torch. Sums are in float32; float32 operands are rounded to TF32 where torch allows cuDNN's convolutions that
    (torch.backends.cudnn.conv.fp32_precision). Under autocast the tensors are cast as torch casts them.

    Deterministic, the gradients too, which have second derivatives through torch's. Under backend "auto" torch runs
    until a measurement says that the kernels beat cuDNN; backend "triton" runs them. Raises RuntimeError for shapes,
    dtypes and arguments that torch refuses, and for an output without pixels.
    """
    geometry = _arguments(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if CONV_TRANSPOSE2D.choose(input, weight, bias, *geometry).backend == "torch":
        return F.conv_transpose2d(input, weight, bias, *geometry)
    tensors = [None if x is None else x.to(_dtype(x)) for x in (input, weight, bias)]
    if input.dim() == 3:
        tensors[0] = tensors[0].unsqueeze(0)
    output = ConvTranspose2dFunction.apply(*tensors, *geometry)
    return output.squeeze(0) if input.dim() == 3 else output
