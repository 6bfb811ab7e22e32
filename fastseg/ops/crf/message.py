"""mean_field_message: sums over the neighbours of each pixel, weighted by a Gaussian of position and colour.

The weights are symmetric. The operator is therefore its own gradient: that of the values is the message of the gradient
of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...kernels import crf as triton_kernels
from ...kernels.cpu import crf as cpu_kernels
from ...kernels.crf.options import Neighbourhood
from ..arguments import FLOAT_AND_DOUBLE_DTYPES, FLOAT_DTYPES, accumulator, require_tensor
from ..operator import (
    Implementation,
    Operator,
    dense,
    empty_like,
    known_signature,
    memory_format,
    register_options,
    vmap_loops,
)

NAME = "mean_field_message"
EVERYWHERE = 2**62  # the largest squared distance where every pixel is a neighbour
MOST_SIDE = 2**14  # of images on the kernels: squared distances fit in 32 bits
MOST_WEIGHTS = 2**22  # that the reference holds at a time

register_options(Neighbourhood, "float sigma, int farthest, bool self_term")


def _empty_message(values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood) -> Tensor:
    return empty_like(values)


def _kernel(kernels: ModuleType, values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood) -> Tensor:
    out, layout = _empty_message(values, colours, neighbourhood), memory_format(values)
    if out.numel() == 0:
        return out
    if colours is not None:
        if colours.shape[1] < 3:  # a channel of zeros adds nothing to a distance
            colours = torch.nn.functional.pad(colours, (0, 0, 0, 0, 0, 3 - colours.shape[1]))
        colours = colours.contiguous()
    last = layout == torch.channels_last
    kernels.message.mean_field_message(dense(values, layout), colours, neighbourhood, last, out)
    return out


def _reference(values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood) -> Tensor:
    """The weights of some pixels at a time, as a matrix."""
    out = _empty_message(values, colours, neighbourhood)
    images, _, height, width = values.shape
    if out.numel() == 0:
        return out
    dtype, reach = accumulator(values.dtype), neighbourhood.reach(height, width)
    columns = torch.arange(width, device=values.device)
    step = max(1, MOST_WEIGHTS // (min(2 * reach + 1, height) * width))  # pixels of a row
    for image in range(images):
        colour = None if colours is None else colours[image].to(dtype)
        for y in range(height):
            rows = torch.arange(max(0, y - reach), min(height, y + reach + 1), device=values.device)
            said = values[image, :, rows].to(dtype).flatten(1)
            for own in columns.split(step):
                squared = (y - rows)[None, :, None].square() + (own[:, None, None] - columns).square()
                weight = (squared.to(dtype) / (-2 * neighbourhood.sigma**2)).flatten(1)
                if colour is not None:
                    for channel in colour:
                        weight -= (channel[y, own, None] - channel[rows].flatten()).square() / 2
                near = squared.flatten(1) <= neighbourhood.farthest
                if not neighbourhood.self_term:
                    near &= squared.flatten(1) > 0
                out[image, :, y, own] = (said @ weight.exp_().mul_(near).T).to(out.dtype)
    return out


def _unsupported(
    dtypes: Sequence[torch.dtype], values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood
) -> str | None:
    if values.dtype not in dtypes:
        return f"values of dtype {values.dtype}"
    if max(values.shape[2:]) > MOST_SIDE:
        return f"a side of more than {MOST_SIDE} pixels"
    if colours is not None and colours.shape[1] > 3:
        return f"images of {colours.shape[1]} channels"
    return None


MEAN_FIELD_MESSAGE = Operator(
    "mean_field_message(Tensor values, Tensor? colours, Neighbourhood neighbourhood) -> Tensor",
    kernels={
        "triton": Implementation(partial(_kernel, triton_kernels), partial(_unsupported, FLOAT_DTYPES)),
        "cpu": Implementation(partial(_kernel, cpu_kernels), partial(_unsupported, FLOAT_AND_DOUBLE_DTYPES)),
    },
    reference=_reference,
    fake=_empty_message,
)


class MeanFieldMessageFunction(torch.autograd.Function):
    """(values, colours, neighbourhood) -> messages, linear in the values. Any number of derivatives are messages."""

    @staticmethod
    @known_signature
    def forward(values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood) -> Tensor:
        return MEAN_FIELD_MESSAGE(values, colours, neighbourhood)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, colours, ctx.neighbourhood = inputs
        ctx.save_for_backward(colours)
        ctx.save_for_forward(colours)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return MeanFieldMessageFunction.apply(grad, *ctx.saved_tensors, ctx.neighbourhood), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: Any) -> Tensor:
        return MeanFieldMessageFunction.apply(tangent, *ctx.saved_tensors, ctx.neighbourhood)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_loops(info, in_dims, MeanFieldMessageFunction, *args)


def _require_sigma(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{NAME}: {name} must be a positive number, but is {value!r}")


def _check_image(image: Tensor, values: Tensor) -> None:
    require_tensor(NAME, "image", image)
    n, _, height, width = values.shape
    if image.dim() != 4 or image.shape[1] == 0 or (image.shape[0], *image.shape[2:]) != (n, height, width):
        raise ValueError(
            f"{NAME}: image must have shape ({n}, channels, {height}, {width}) for values of shape "
            f"{tuple(values.shape)}, but has shape {tuple(image.shape)}"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"{NAME}: image must be uint8 or floating-point, but is of {image.dtype}")
    if image.device != values.device:
        raise ValueError(f"{NAME}: image must be on the device of values, {values.device}, but is on {image.device}")
    if image.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{NAME}: image must not require a gradient, which is not computed: detach it")


def mean_field_message(
    values: Tensor,
    image: Tensor | None = None,
    sigma: float = 3.0,
    sigma_color: float = 3.0,
    radius: float | None = 3.0,
    self_term: bool = True,
) -> Tensor:
    """The sum of each class over the neighbours of a pixel, weighted by a Gaussian of position and colour.

    With the position p and the colour c of each pixel::

        message_i = sum over j of exp(-|p_i - p_j|^2 / (2 sigma^2) - |c_i - c_j|^2 / (2 sigma_color^2)) * values_j

    This is the message of mean-field inference in a fully connected CRF: exact, with every weight computed from the two
    pixels. No matrix of weights is stored.

    Args:
        values: of any floating-point dtype, in NCHW or channels_last.
        image: the colours c, uint8 or floating-point, from 0 to 255; None for weights of the positions p alone.
        sigma: standard deviation of the distance, in pixels.
        sigma_color: standard deviation of the colours.
        radius: pixels farther apart than ``radius * sigma`` are no neighbours; the largest weight that is left out is
            exp(-radius^2 / 2), 0.011 for 3. None: all pixels are neighbours.
        self_term: whether a pixel is its own neighbour, with weight 1.

    Shape:
        - values: (N, K, H, W).
        - image: (N, C, H, W). More than three channels fall back to PyTorch.
        - output: (N, K, H, W).

    Returns:
        The messages in the dtype and memory format of the values.

    Raises:
        TypeError: if an argument has another type, or the image is of another integer dtype.
        ValueError: for another shape or device, and for a sigma or radius that is not positive.
        NotImplementedError: if the image requires a gradient.

    Note:
        Deterministic. Weights and sums are in float32 (float64 for float64 values). Differentiable in the values any
        number of times, by the same kernel. The work grows with (radius * sigma)^2 for each pixel and class.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> values = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> FS.mean_field_message(values, sigma=1.0)
        tensor([[[[1.0000, 0.6065, 0.1353]]]])
        >>> image = torch.tensor([[[[0, 0, 200]]]], dtype=torch.uint8)
        >>> FS.mean_field_message(values, image, sigma=1.0, sigma_color=10.0)
        tensor([[[[1.0000, 0.6065, 0.0000]]]])

    Source:
        Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011, who
        approximate the sum with a permutohedral lattice.
    """
    require_tensor(NAME, "values", values)
    if values.dim() != 4:
        raise ValueError(f"{NAME}: values must have shape (N, K, H, W), but has shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"{NAME}: values must be floating-point, but is of {values.dtype}")
    _require_sigma("sigma", sigma)
    _require_sigma("sigma_color", sigma_color)
    if radius is not None:
        _require_sigma("radius", radius)
    colours = None
    if image is not None:
        _check_image(image, values)
        colours = image.detach().to(accumulator(values.dtype)) / sigma_color
    farthest = EVERYWHERE if radius is None else int(min(radius * sigma * radius * sigma, EVERYWHERE))
    call = (values, colours, Neighbourhood(float(sigma), farthest, bool(self_term)))
    MEAN_FIELD_MESSAGE.choose(*call)  # only for `explain`: the operator chooses again when it runs
    return MeanFieldMessageFunction.apply(*call)
