"""How the launchers of this family spell their arguments for the C++ functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...pooling.geometry import PoolGeometry
    from ..build import Parameter


def parameters(x: Tensor, channels_last: bool) -> dict[str, Parameter]:
    """The macros that layers.h reads."""
    return {"DTYPE": x.dtype, "CHANNELS_LAST": channels_last}


def as_pointers(positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(offsets, indices), of which one is None, or both."""
    return (None, positions) if positions is not None and positions.dtype == torch.int64 else (positions, None)


def sizes(image: Tensor, pooled: Tensor, geometry: PoolGeometry) -> tuple[int, ...]:
    """The fields of the struct Windows in windows.h."""
    kernel, stride, padding, dilation = geometry
    return (*image.shape, *pooled.shape[-2:], *kernel, *stride, *padding, *dilation)


def are_cells(image: Tensor, pooled: Tensor, geometry: PoolGeometry) -> bool:
    """Whether the windows are cells of 2x2 pixels that lie inside the image: Windows::cells in windows.h."""
    kernel, stride, padding, dilation = (tuple(pair) for pair in geometry)
    inside = all(2 * o <= size for o, size in zip(pooled.shape[-2:], image.shape[-2:], strict=True))
    return (kernel, stride, padding, dilation) == ((2, 2), (2, 2), (0, 0), (1, 1)) and inside


def refuse_invalid(invalid: int, positions: Tensor, image: Tensor) -> None:
    """Raise RuntimeError if a kernel found a position outside its window or the plane."""
    if invalid:
        kind = "index" if positions.dtype == torch.int64 else "offset"
        raise RuntimeError(
            f"found an invalid max {kind} (output volumes are of size {image.shape[-2]}x{image.shape[-1]})"
        )
