"""What the launchers of the CRF take, for every backend. No triton here: the other kernels run where it is missing."""

from __future__ import annotations

import math
from typing import NamedTuple


class Neighbourhood(NamedTuple):
    """Which pixels a message comes from, and how the weight of a pixel falls with its distance.

    sigma: standard deviation of the Gaussian of the distance, in pixels. farthest: the largest squared distance of a
    neighbour, in whole pixels. self_term: whether a pixel is its own neighbour.
    """

    sigma: float
    farthest: int
    self_term: bool

    def reach(self, height: int, width: int) -> int:
        """The most rows or columns between two neighbours in an image."""
        return math.isqrt(min(self.farthest, height**2 + width**2))
