"""The launcher of message.cpp."""

from __future__ import annotations

from torch import Tensor

from ...crf.options import Neighbourhood
from ..launch import launch


def mean_field_message(
    values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood, channels_last: bool, out: Tensor
) -> None:
    """Write the messages of the dense values (N, K, H, W), which are channels_last or contiguous, into `out`.

    colours: contiguous (N, 3, H, W) in float32 (float64 for float64 values), divided by their standard deviation.
    """
    n, classes, height, width = values.shape
    farthest, self_term = min(neighbourhood.farthest, height**2 + width**2), neighbourhood.self_term
    launch(
        "crf/message", "mean_field_message", {"VALUES": values.dtype}, values, colours, n, classes, height, width,
        channels_last, farthest, neighbourhood.sigma, self_term, out,
    )  # fmt: skip
