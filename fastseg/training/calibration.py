"""Whether a network knows what it does not know: the risk-coverage curve and the calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RiskCoverage:
    """The share of wrong pixels among the most certain ones, for every number of them that `coverage` names."""

    coverage: tuple[float, ...]
    """Shares of all pixels, rising to 1."""
    risk: tuple[float, ...]
    """The share of wrong ones among so many of the most certain pixels."""
    area: float
    """The mean risk over every coverage: 0 if nothing is wrong, the error rate if uncertainty says nothing."""


def _flat(**tensors: Tensor) -> list[Tensor]:
    """The tensors in one dimension, checked to have the same, non-empty shape."""
    (first, shape), *others = ((name, tuple(t.shape)) for name, t in tensors.items())
    for name, other in others:
        if other != shape:
            raise ValueError(f"{name} must have the shape of {first}, {shape}, but has {other}")
    if next(iter(tensors.values())).numel() == 0:
        raise ValueError(f"{first} must have elements, but has shape {shape}")
    return [t.detach().flatten() for t in tensors.values()]


def risk_coverage(uncertainty: Tensor, correct: Tensor, points: int = 20) -> RiskCoverage:
    """Sort the pixels by their uncertainty, and count the wrong ones among the most certain.

    Args:
        uncertainty: of each pixel, for instance from :func:`fastseg.uncertainty.measure`.
        correct: whether each pixel is right, bool; leave ignored pixels out of both.
        points: how many equally spaced coverages are returned.

    Shape:
        - uncertainty, correct: any, the same.

    Raises:
        ValueError: for other shapes, no pixels, NaN, and points below 1.

    Example::

        >>> import torch
        >>> from fastseg.training.calibration import risk_coverage
        >>> curve = risk_coverage(torch.tensor([0.1, 0.9, 0.2, 0.8]), torch.tensor([True, False, True, True]), points=4)
        >>> curve.coverage, curve.risk
        ((0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.0, 0.25))

    Source: Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NIPS 2017.
    """
    values, right = _flat(uncertainty=uncertainty, correct=correct)
    if points < 1:
        raise ValueError(f"points must be at least 1, but is {points}")
    if bool(values.isnan().any()):
        raise ValueError("uncertainty must be numbers, but has NaN")
    wrong = (~right.bool())[values.argsort(stable=True)].double().cumsum(0)
    count = torch.arange(1, len(wrong) + 1, device=wrong.device)
    risk = wrong / count
    at = (torch.arange(1, points + 1) * len(risk) + points - 1) // points - 1  # the last of each coverage, rounded up
    shares = ((at + 1).double() / len(risk)).tolist()
    return RiskCoverage(tuple(shares), tuple(risk.cpu()[at].tolist()), risk.mean().item())


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """How far confidence and accuracy are apart: the mean over bins of equal width, weighted by their pixels.

    Args:
        confidence: the probability of each pixel's label, from 0 to 1.
        correct: whether each pixel is right, bool; leave ignored pixels out of both.
        bins: how many.

    Shape:
        - confidence, correct: any, the same.

    Returns:
        float: from 0, perfectly calibrated, to 1.

    Raises:
        ValueError: for other shapes, no pixels, confidences outside of 0 to 1, and bins below 1.

    Example::

        >>> import torch
        >>> from fastseg.training.calibration import expected_calibration_error
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.9, 0.9]), torch.tensor([True, True, False, False])
        >>> round(expected_calibration_error(confidence, correct), 3)
        0.4

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    """
    values, right = _flat(confidence=confidence, correct=correct)
    values = values.double()
    if bins < 1:
        raise ValueError(f"bins must be at least 1, but is {bins}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("confidence must be from 0 to 1, but has other values")
    place = (values * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=values.device)
    gap.index_add_(0, place, values - right.double())
    return (gap.abs().sum() / len(values)).item()
