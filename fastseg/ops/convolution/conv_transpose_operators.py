"""conv_transpose2d's operators: kernels, torch reference and fakes, and which of both runs in which direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autotune, dispatch
from ...kernels import convolution as triton_kernels
from ..arguments import FLOAT_DTYPES, INT32_MAX, MAX_FLOAT_SIDE
from ..operator import Implementation, Operator, dense, empty, memory_format

UNMEASURED = "no measurement says that the kernels beat cuDNN for this shape"
FORWARD, OF_INPUT, OF_WEIGHT, OF_BOTH = DIRECTIONS = (
    "forward", "gradient of input", "gradient of weight", "gradients of input and weight"
)  # fmt: skip
GRADIENTS = {OF_INPUT: [True, False, False], OF_WEIGHT: [False, True, False], OF_BOTH: [True, True, False]}


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: list[int], padding: list[int], output_padding: list[int],
    dilation: list[int],
) -> list[int]:  # fmt: skip
    """Height and width of the result."""
    sizes = zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    return [(length - 1) * s - 2 * p + d * (k - 1) + extra + 1 for length, k, s, p, extra, d in sizes]


def uncovered(input: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> str | None:
    if input.dtype not in FLOAT_DTYPES:
        return f"dtype {input.dtype}"
    if any(k > 1 and s > 1 and d > 1 for k, s, d in zip(weight.shape[-2:], stride, dilation, strict=True)):
        return f"dilation {tuple(dilation)} with stride {tuple(stride)}"
    sides = [size * s for size, s in zip(input.shape[-2:], stride, strict=True)]
    if max(sides) > MAX_FLOAT_SIDE:
        return f"maps of more than {MAX_FLOAT_SIDE} rows or columns"
    if sides[0] * sides[1] > INT32_MAX:
        return f"maps of more than {INT32_MAX} pixels"
    return None


def _suggests_channels_last(x: Tensor) -> bool:
    """torch's rule, from the strides alone: a slice of a channels_last tensor is channels_last still."""
    least = 0
    for dim in (1, 3, 2, 0):
        stride, size = x.stride(dim), x.shape[dim]
        if size == 0 or stride == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size
    return True


def layout_of(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of the result and of input's gradient: channels_last where input or weight is, as in torch."""
    either = _suggests_channels_last(input) or _suggests_channels_last(weight)
    return torch.channels_last if either else torch.contiguous_format


def _empty_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int], scale: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    size = output_size(input.shape[-2:], weight.shape[-2:], stride, padding, output_padding, dilation)
    return empty(input, [input.shape[0], weight.shape[1] * groups, *size], layout_of(input, weight))


def _as_it_lies(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x itself in either dense format; the kernels' launchers choose how each is read. Else a copy in `layout`."""
    either = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if either else dense(x, layout)


def _conv_transpose2d_kernel(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int], scale: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    output = _empty_output(input, weight, bias, stride, padding, output_padding, groups, dilation)
    layout = layout_of(input, weight)
    after = (x if x is None else x.contiguous() for x in (scale, bias))
    triton_kernels.conv_transpose.conv_transpose2d_fwd(
        _as_it_lies(input, layout),
        _as_it_lies(weight, layout),
        triton_kernels.geometry.Epilogue(*after, relu),
        output,
        _geometry(input, weight, stride, padding, dilation, groups),
    )
    return output


def _geometry(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> triton_kernels.geometry.Geometry:
    channels_last = layout_of(input, weight) == torch.channels_last
    return triton_kernels.geometry.Geometry(list(weight.shape[-2:]), stride, padding, dilation, groups, channels_last)


def affine_relu(y: Tensor, scale: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
    """The epilogue in torch: relu(y * scale + bias) in float32 at least, rounded once."""
    dtype = y.dtype
    y = y.to(torch.promote_types(dtype, torch.float32))
    if scale is not None:
        y = y * scale[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return (y.relu() if relu else y).to(dtype)


def _conv_transpose2d_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int], scale: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation, scale, relu)
    return _as(_empty_output(*(_bare(x) for x in arguments)), torch_forward(*arguments))


def _bare(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def torch_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int], scale: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    """On torch's operators, of whatever strides they give."""
    geometry = (stride, padding, output_padding, groups, dilation)
    if scale is None and (bias is None or bias.dtype == input.dtype):
        output = F.conv_transpose2d(input, weight, bias, *geometry)
        return output.relu_() if relu else output
    return affine_relu(F.conv_transpose2d(input, weight, None, *geometry), scale, bias, relu)


def preferred(
    direction: str, input: Tensor, weight: Tensor, geometry: Sequence[Any], bias: Tensor | None = None,
    scale: Tensor | None = None, relu: bool = False, dtype: torch.dtype | None = None,
) -> dispatch.Preference:  # fmt: skip
    """The faster backend for one direction of a call in a dtype (None: input's), and what says so."""
    dtype = dtype or input.dtype
    kinds = ["nchw" if layout_of(x, x) == torch.contiguous_format else "channels_last" for x in (input, weight)]
    shapes = "x".join(map(str, input.shape)), "x".join(map(str, weight.shape))
    after = [name for name, there in (("bias", bias), ("scale", scale), ("relu", relu or None)) if there is not None]
    numbers = torch.backends.cudnn.conv.fp32_precision if dtype == torch.float32 else ""
    deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    words = (direction, dtype, numbers, *zip(shapes, kinds, strict=True), *geometry, after, deterministic)

    def calls() -> tuple[Any, Any]:
        x, w = (t.detach().to(dtype) for t in (input, weight))
        forward = (x, w, bias, *geometry, scale, relu)
        if direction == FORWARD:
            return lambda: _conv_transpose2d_kernel(*forward), lambda: torch_forward(*forward)
        backward = (torch.randn_like(_empty_output(*forward)), x, w, *geometry, GRADIENTS[direction])
        return lambda: _run_backward(*backward), lambda: torch_gradients(*backward)

    took = autotune.times(f"conv_transpose2d {words}", input, calls)
    if took is None:
        return "torch", UNMEASURED
    backend = "triton" if took[0] < took[1] else "torch"
    return backend, f"{took[0]:.3g} ms on the kernels, {took[1]:.3g} ms on cuDNN"


CONV_TRANSPOSE2D = Operator(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] output_padding, int groups, int[2] dilation, Tensor? scale=None, bool relu=False) -> Tensor",
    kernels={
        "triton": Implementation(
            _conv_transpose2d_kernel,
            lambda input, weight, bias, stride, *rest: uncovered(input, weight, stride, rest[3]),
        ),
    },
    reference=_conv_transpose2d_reference,
    fake=_empty_output,
    preferred=lambda input, weight, bias, *rest: preferred(FORWARD, input, weight, rest[:5], bias, *rest[5:]),
)


def _empty_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool], output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias, each an empty(0) where output_mask does not ask for it.

    In the fused form the sums over pixels stay in float32 at least: shift and scale are, and theirs follow from them.
    """
    sums = input.dtype if output is None else torch.promote_types(input.dtype, torch.float32)
    return (
        empty(input, input.shape, layout_of(input, weight)) if output_mask[0] else input.new_empty(0),
        empty(weight, weight.shape, memory_format(weight), sums) if output_mask[1] else input.new_empty(0),
        input.new_empty(weight.shape[1] * groups if output_mask[2] else 0, dtype=sums),
    )


def _conv_transpose2d_backward_kernel(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool], output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Under "auto" each direction on what is faster for it; the bias's gradient goes with the kernels'."""
    arguments = (input, weight, stride, padding, output_padding, groups, dilation)
    theirs = _directions_of("torch", input, weight, arguments[2:], output_mask)
    if not any(theirs):
        return _run_backward(grad, *arguments, output_mask, output)
    ours = [need and not other for need, other in zip(output_mask, theirs, strict=True)]
    gradients = _run_backward(grad, *arguments, ours, output)
    others = _conv_transpose2d_backward_reference(grad, *arguments, theirs, output)
    return tuple(b if other else a for a, b, other in zip(gradients, others, theirs, strict=True))


def gradient_directions(
    input: Tensor, weight: Tensor, geometry: Sequence[Any], asked: Sequence[bool], dtype: torch.dtype
) -> list[str]:
    """What a backward that is asked for the gradients of input and weight, in a dtype, chooses for itself."""
    stride, padding, output_padding, groups, dilation = geometry
    if all(asked):
        sizes = (
            input.shape[-2:],
            output_size(input.shape[-2:], weight.shape[-2:], stride, padding, output_padding, dilation),
        )
        places = _geometry(input, weight, stride, padding, dilation, groups)
        if triton_kernels.conv_transpose_bwd_shuffle.one_kernel(*sizes, weight, dtype, places):
            return [OF_BOTH]
    return [way for way, need in zip((OF_INPUT, OF_WEIGHT), asked, strict=True) if need]


def _directions_of(
    backend: str, input: Tensor, weight: Tensor, geometry: Sequence[Any], output_mask: list[bool]
) -> list[bool]:
    """Which gradients a backend is preferred for, of those asked for; never the bias's."""
    if dispatch.get_backend() != "auto":
        return [False] * 3
    ways = gradient_directions(input, weight, geometry, output_mask[:2], input.dtype)
    masks = [GRADIENTS[way] for way in ways if preferred(way, input, weight, geometry)[0] == backend]
    return [any(column) for column in zip(*masks, [False] * 3, strict=True)]


def _preferred_backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> dispatch.Preference:
    """torch as soon as no asked gradient is faster on the kernels."""
    geometry, output_mask = rest[:5], rest[5]
    ways = gradient_directions(input, weight, geometry, output_mask[:2], input.dtype)
    found = {way: preferred(way, input, weight, geometry) for way in ways}
    ours = [way for way, (backend, _) in found.items() if backend == "triton"]
    why = "; ".join(f"{way}: {reason}" for way, (_, reason) in found.items()) or UNMEASURED
    return "triton" if ours else "torch", why


def _run_backward(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool], output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _empty_gradients(
        grad, input, weight, stride, padding, output_padding, groups, dilation, output_mask, output
    )
    layout = layout_of(input, weight)
    grad = _as_it_lies(grad, layout) if output is None else dense(grad, layout)
    triton_kernels.conv_transpose_bwd.conv_transpose2d_bwd(
        grad,
        output if output is None else dense(output, layout),
        *(_as_it_lies(x, layout) for x in (input, weight)),
        *(g if need else None for g, need in zip(gradients, output_mask, strict=True)),
        _geometry(input, weight, stride, padding, dilation, groups),
    )
    return gradients


def torch_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [grad.shape[1]], stride, padding, dilation, True, output_padding, groups, output_mask
    )


def _conv_transpose2d_backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_padding: list[int],
    groups: int, dilation: list[int], output_mask: list[bool], output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = (input, weight, stride, padding, output_padding, groups, dilation, output_mask)
    places = _empty_gradients(*(_bare(x) for x in (grad, *arguments, output)))
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    return tuple(
        grad.new_empty(0, dtype=place.dtype) if found is None else _as(place, found)
        for place, found in zip(places, torch_gradients(grad, *arguments), strict=True)
    )


def _as(place: Tensor, found: Tensor) -> Tensor:
    """`found` with the strides and dtype that `place` has: itself, or a copy."""
    if found.stride() == place.stride() and found.dtype == place.dtype:
        return found
    return torch.empty_strided(place.shape, place.stride(), dtype=place.dtype, device=found.device).copy_(found)


CONV_TRANSPOSE2D_BACKWARD = Operator(
    "conv_transpose2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
    "int[2] output_padding, int groups, int[2] dilation, bool[3] output_mask, Tensor? output=None) "
    "-> (Tensor, Tensor, Tensor)",
    kernels={
        "triton": Implementation(
            _conv_transpose2d_backward_kernel,
            lambda grad, input, weight, stride, *rest: uncovered(input, weight, stride, rest[3]),
        ),
    },
    reference=_conv_transpose2d_backward_reference,
    fake=_empty_gradients,
    preferred=_preferred_backward,
    gradient=True,
)
