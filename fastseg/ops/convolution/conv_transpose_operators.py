"""conv_transpose2d: its operators, torch reference and fakes, and the faster backend for each direction of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autotune, dispatch
from ...kernels import convolution as triton_kernels
from ...kernels.convolution.options import ConvTransposeGradients
from ..operator import Implementation, Operator, dense, empty, memory_format
from .options import (
    NO_EPILOGUE,
    ConvTransposeGeometry,
    Epilogue,
    dense_in_any_layout,
    layout_of,
    unsupported_map,
)

UNMEASURED = "no measurement says that the kernels beat cuDNN for this shape"
FORWARD, OF_INPUT, OF_WEIGHT, OF_BOTH = DIRECTIONS = (
    "forward", "gradient of input", "gradient of weight", "gradients of input and weight"
)  # fmt: skip
OUTPUT_MASKS = {OF_INPUT: [True, False, False], OF_WEIGHT: [False, True, False], OF_BOTH: [True, True, False]}


def unsupported(input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry) -> str | None:
    """What of a call the kernels do not support, in words, or None."""
    stride, dilation = geometry.stride, geometry.dilation
    if missing := unsupported_map(input, [size * s for size, s in zip(input.shape[-2:], stride, strict=True)]):
        return missing
    if any(k > 1 and s > 1 and d > 1 for k, s, d in zip(weight.shape[-2:], stride, dilation, strict=True)):
        return f"dilation {tuple(dilation)} with stride {tuple(stride)}"
    return None


def _without_data(x: Tensor | None) -> Tensor | None:
    """The tensor on the meta device: a fake computed from it allocates nothing."""
    return None if x is None else x.to("meta")


def _like(place: Tensor, found: Tensor) -> Tensor:
    """`found` with the strides and dtype of `place`: itself, or a copy."""
    if found.stride() == place.stride() and found.dtype == place.dtype:
        return found
    return torch.empty_strided(place.shape, place.stride(), dtype=place.dtype, device=found.device).copy_(found)


# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_output(input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue) -> Tensor:
    size = geometry.output_size(input.shape[-2:], weight.shape[-2:])
    return empty(input, [input.shape[0], weight.shape[1] * geometry.groups, *size], layout_of(input, weight))


def _conv_transpose2d_kernel(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue
) -> Tensor:
    output = _empty_output(input, weight, geometry, epilogue)
    layout = layout_of(input, weight)
    triton_kernels.conv_transpose.conv_transpose2d_fwd(
        dense_in_any_layout(input, layout),
        dense_in_any_layout(weight, layout),
        output,
        geometry,
        epilogue.contiguous(),
        layout == torch.channels_last,
    )
    return output


def apply_epilogue(y: Tensor, epilogue: Epilogue) -> Tensor:
    """The epilogue in torch, computed in float32 (float64 for float64) and rounded once."""
    dtype = y.dtype
    y = y.to(torch.promote_types(dtype, torch.float32))
    if epilogue.scale is not None:
        y = y * epilogue.scale[:, None, None]
    if epilogue.bias is not None:
        y = y + epilogue.bias[:, None, None]
    return (y.relu() if epilogue.relu else y).to(dtype)


def torch_forward(input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue) -> Tensor:
    """The operator in torch's functions, with the strides that they return."""
    bias, scale, relu = epilogue
    if scale is None and (bias is None or bias.dtype == input.dtype):
        output = F.conv_transpose2d(input, weight, bias, *geometry)
        return output.relu_() if relu else output
    return apply_epilogue(F.conv_transpose2d(input, weight, None, *geometry), epilogue)


def _conv_transpose2d_reference(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue
) -> Tensor:
    place = _empty_output(_without_data(input), _without_data(weight), geometry, epilogue)
    return _like(place, torch_forward(input, weight, geometry, epilogue))


def _unsupported_forward(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue
) -> str | None:
    return unsupported(input, weight, geometry)


def preferred(
    direction: str,
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    epilogue: Epilogue = NO_EPILOGUE,
    dtype: torch.dtype | None = None,
) -> dispatch.Preference:
    """The faster backend for one direction of a call in a dtype (default: input's), and what says so."""
    dtype = dtype or input.dtype
    kinds = ["channels_last" if memory_format(x) == torch.channels_last else "nchw" for x in (input, weight)]
    shapes = "x".join(map(str, input.shape)), "x".join(map(str, weight.shape))
    # The operator of the backward does not know the whole epilogue, so it is no part of the key of a gradient.
    bias, scale, relu = epilogue if direction == FORWARD else NO_EPILOGUE
    after = [name for name, there in (("bias", bias), ("scale", scale), ("relu", relu or None)) if there is not None]
    numbers = torch.backends.cudnn.conv.fp32_precision if dtype == torch.float32 else ""
    deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    words = (direction, dtype, numbers, *zip(shapes, kinds, strict=True), *geometry, after, deterministic)

    def calls() -> tuple[Any, Any]:
        x, w = (t.detach().to(dtype) for t in (input, weight))
        if direction == FORWARD:
            forward = (x, w, geometry, epilogue)
            return lambda: _conv_transpose2d_kernel(*forward), lambda: torch_forward(*forward)
        grad = torch.randn_like(_empty_output(x, w, geometry, epilogue))
        backward = (grad, x, w, geometry, OUTPUT_MASKS[direction])
        return lambda: _run_backward(*backward, None), lambda: torch_gradients(*backward)

    took = autotune.times(f"conv_transpose2d {words}", input, calls)
    if took is None:
        return "torch", UNMEASURED
    backend = "triton" if took[0] < took[1] else "torch"
    return backend, f"{took[0]:.3g} ms on the kernels, {took[1]:.3g} ms on cuDNN"


def _preferred_forward(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue
) -> dispatch.Preference:
    return preferred(FORWARD, input, weight, geometry, epilogue)


CONV_TRANSPOSE2D = Operator(
    "conv_transpose2d(Tensor input, Tensor weight, ConvTransposeGeometry geometry, Epilogue epilogue) -> Tensor",
    kernels={"triton": Implementation(_conv_transpose2d_kernel, _unsupported_forward)},
    reference=_conv_transpose2d_reference,
    fake=_empty_output,
    preferred=_preferred_forward,
)


# --- backward --------------------------------------------------------------------------------------------------------


def _empty_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    output_mask: list[bool],
    output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty(0) for each that output_mask does not ask for.

    With an epilogue (`output`) the sums over pixels stay in float32, like scale and shift, whose gradients are made
    from them.
    """
    sums = input.dtype if output is None else torch.promote_types(input.dtype, torch.float32)
    return (
        empty(input, input.shape, layout_of(input, weight)) if output_mask[0] else input.new_empty(0),
        empty(weight, weight.shape, memory_format(weight), sums) if output_mask[1] else input.new_empty(0),
        input.new_empty(weight.shape[1] * geometry.groups if output_mask[2] else 0, dtype=sums),
    )


def _run_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    output_mask: list[bool],
    output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients that are asked for, on the kernels."""
    gradients = _empty_gradients(grad, input, weight, geometry, output_mask, output)
    layout = layout_of(input, weight)
    grad = dense_in_any_layout(grad, layout) if output is None else dense(grad, layout)
    triton_kernels.conv_transpose_bwd.conv_transpose2d_bwd(
        grad,
        output if output is None else dense(output, layout),
        dense_in_any_layout(input, layout),
        dense_in_any_layout(weight, layout),
        ConvTransposeGradients(*(g if need else None for g, need in zip(gradients, output_mask, strict=True))),
        geometry,
        layout == torch.channels_last,
    )
    return gradients


def _conv_transpose2d_backward_kernel(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    output_mask: list[bool],
    output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Under "auto" each direction runs on the backend that is faster for it; the bias's gradient is the kernels'."""
    on_torch = _directions_on_torch(input, weight, geometry, output_mask)
    if not any(on_torch):
        return _run_backward(grad, input, weight, geometry, output_mask, output)
    on_kernels = [need and not other for need, other in zip(output_mask, on_torch, strict=True)]
    ours = _run_backward(grad, input, weight, geometry, on_kernels, output)
    theirs = _conv_transpose2d_backward_reference(grad, input, weight, geometry, on_torch, output)
    return tuple(b if other else a for a, b, other in zip(ours, theirs, on_torch, strict=True))


def torch_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias by torch's own operator; None for those that are not asked for."""
    stride, padding, output_padding, groups, dilation = geometry
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [grad.shape[1]], stride, padding, dilation, True, output_padding, groups, output_mask
    )


def _conv_transpose2d_backward_reference(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    output_mask: list[bool],
    output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    bare = [_without_data(t) for t in (grad, input, weight, output)]
    places = _empty_gradients(*bare[:3], geometry, output_mask, bare[3])
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    found = torch_gradients(grad, input, weight, geometry, output_mask)
    return tuple(
        grad.new_empty(0, dtype=place.dtype) if gradient is None else _like(place, gradient)
        for place, gradient in zip(places, found, strict=True)
    )


def gradient_directions(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, needed: Sequence[bool], dtype: torch.dtype
) -> list[str]:
    """The directions that a backward in a dtype chooses a backend for. needed: the gradients of input and of weight."""
    if all(needed):
        channels_last = layout_of(input, weight) == torch.channels_last
        problem = triton_kernels.problem.ConvProblem.of(weight, geometry, channels_last)
        image, output = input.shape[-2:], geometry.output_size(input.shape[-2:], weight.shape[-2:])
        shuffle = triton_kernels.conv_transpose_bwd_shuffle
        if shuffle.one_kernel_makes_both(image, output, weight, dtype, problem):
            return [OF_BOTH]
    return [direction for direction, need in zip((OF_INPUT, OF_WEIGHT), needed, strict=True) if need]


def _preferences(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, output_mask: list[bool]
) -> dict[str, dispatch.Preference]:
    """The preferred backend for each direction of a backward, and why."""
    directions = gradient_directions(input, weight, geometry, output_mask[:2], input.dtype)
    return {direction: preferred(direction, input, weight, geometry) for direction in directions}


def _directions_on_torch(
    input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, output_mask: list[bool]
) -> list[bool]:
    """Which of the needed gradients are faster on torch; never the bias's, and none unless the backend is "auto"."""
    if dispatch.get_backend() != "auto":
        return [False] * 3
    found = _preferences(input, weight, geometry, output_mask)
    masks = [OUTPUT_MASKS[direction] for direction, (backend, _) in found.items() if backend == "torch"]
    return [any(column) for column in zip(*masks, [False] * 3, strict=True)]


def _preferred_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvTransposeGeometry,
    output_mask: list[bool],
    output: Tensor | None,
) -> dispatch.Preference:
    """torch if no needed gradient is faster on the kernels."""
    found = _preferences(input, weight, geometry, output_mask)
    any_on_kernels = any(backend == "triton" for backend, _ in found.values())
    why = "; ".join(f"{direction}: {reason}" for direction, (_, reason) in found.items()) or UNMEASURED
    return "triton" if any_on_kernels else "torch", why


def _unsupported_backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvTransposeGeometry, *rest: Any
) -> str | None:
    return unsupported(input, weight, geometry)


CONV_TRANSPOSE2D_BACKWARD = Operator(
    "conv_transpose2d_backward(Tensor grad_output, Tensor input, Tensor weight, ConvTransposeGeometry geometry, "
    "bool[3] output_mask, Tensor? output) -> (Tensor, Tensor, Tensor)",
    kernels={"triton": Implementation(_conv_transpose2d_backward_kernel, _unsupported_backward)},
    reference=_conv_transpose2d_backward_reference,
    fake=_empty_gradients,
    preferred=_preferred_backward,
    gradient=True,
)
