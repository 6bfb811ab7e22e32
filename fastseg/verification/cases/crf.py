"""Cases of the messages of a fully connected CRF."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import functional
from .case import Case, Placement, describe


def mean_field_message(
    at: Placement,
    shape: Sequence[int],
    sigma: float = 2.0,
    sigma_color: float | None = 60.0,
    radius: float | None = 3.0,
    self_term: bool = True,
) -> Iterator[Case]:
    """The message of values to every pixel, by position and, with `sigma_color`, by the colours of a random picture."""
    images, _, height, width = shape
    inputs = {"values": at.tensor(*shape)}
    if sigma_color is not None:
        inputs["image"] = at.labels(256, images, 3, height, width).to(torch.uint8)

    def ours(values: Tensor, image: Tensor | None = None) -> Tensor:
        return functional.mean_field_message(values, image, sigma, sigma_color or 1.0, radius, self_term)

    def theirs(values: Tensor, image: Tensor | None = None) -> Tensor:
        """The matrix of weights, and a product with it."""
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        y, x = (torch.arange(side, device=values.device) for side in (height, width))
        squared = (y[:, None, None, None] - y[:, None]).square() + (x[:, None, None] - x).square()
        squared = squared.reshape(height * width, height * width)
        exponent = squared.to(wide).expand(images, -1, -1) / (2 * sigma**2)
        if image is not None:
            colours = image.to(wide).flatten(2) / sigma_color
            exponent = exponent + (colours[..., :, None] - colours[..., None, :]).square().sum(1) / 2
        near = squared <= (math.inf if radius is None else (radius * sigma) ** 2)
        near = near if self_term else near & (squared > 0)
        matrix = (-exponent).exp().where(near, 0.0)
        return torch.einsum("nij,nkj->nki", matrix, values.to(wide).flatten(2)).view_as(values).to(values.dtype)

    words = [f"sigma {sigma:g}", *([] if sigma_color is None else [f"{sigma_color:g}"]), f"radius {radius}"]
    size = describe(shape, *words, *["others"] * (not self_term))
    yield Case("mean_field_message", size, ours, theirs, inputs)
