"""The risk-coverage curve and the calibration error, against loops and torchmetrics."""

import pytest
import torch

from fastseg.training.calibration import expected_calibration_error, risk_coverage


def test_the_curve_is_that_of_a_loop():
    uncertainty, correct = torch.rand(3, 7, 11), torch.rand(3, 7, 11) < 0.7
    pairs = sorted(zip(uncertainty.flatten().tolist(), correct.flatten().tolist(), strict=True))
    risks = [sum(not right for _, right in pairs[:n]) / n for n in range(1, len(pairs) + 1)]
    curve = risk_coverage(uncertainty, correct, points=len(pairs))
    assert curve.risk == pytest.approx(risks) and curve.area == pytest.approx(sum(risks) / len(risks))
    assert curve.coverage[-1] == 1 and curve.risk[-1] == pytest.approx(1 - correct.float().mean().item())
    few = risk_coverage(uncertainty, correct, points=3)
    assert few.coverage == (77 / 231, 154 / 231, 1.0) and few.risk[0] == curve.risk[76]


def test_knowing_what_is_wrong_lowers_the_area():
    correct = torch.rand(1000) < 0.8
    perfect, useless = (risk_coverage(u, correct).area for u in ((~correct).float(), torch.rand(1000)))
    assert perfect < 0.03 and useless > 0.15
    assert risk_coverage(torch.rand(10), torch.ones(10, dtype=torch.bool)).area == 0


def test_the_calibration_error_is_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    probability, target = torch.rand(500), torch.randint(2, (500,))
    ours = expected_calibration_error(
        torch.maximum(probability, 1 - probability), (probability > 0.5) == target, bins=10
    )
    # torchmetrics' binary form takes the positive class's probability as the confidence.
    theirs = metrics.multiclass_calibration_error(torch.stack((1 - probability, probability), 1), target, 2, n_bins=10)
    assert ours == pytest.approx(theirs.item(), abs=1e-6)


def test_the_calibration_error_is_that_of_a_loop():
    confidence, correct = torch.rand(4, 50, dtype=torch.float64), torch.rand(4, 50) < 0.5
    confidence[0, :2] = torch.tensor([0.0, 1.0])
    total = 0.0
    for number in range(7):
        inside = (confidence * 7).long().clamp(max=6) == number
        if inside.any():
            gap = confidence[inside].mean() - correct[inside].double().mean()
            total += gap.abs().item() * inside.double().mean().item()
    assert expected_calibration_error(confidence, correct, bins=7) == pytest.approx(total)
    sure = torch.rand(20000)
    assert expected_calibration_error(sure, torch.rand(20000) < sure) < 0.03


ONES, TRUE = torch.ones(4), torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: risk_coverage(ONES, TRUE[:3]), r"correct must have the shape of uncertainty, \(4,\), but has \(3,\)"),
        (lambda: risk_coverage(ONES[:0], TRUE[:0]), "must have elements"),
        (lambda: risk_coverage(ONES * torch.nan, TRUE), "has NaN"),
        (lambda: risk_coverage(ONES, TRUE, 0), "points must be at least 1"),
        (lambda: expected_calibration_error(ONES * 2, TRUE), "confidence must be from 0 to 1"),
        (lambda: expected_calibration_error(ONES * torch.nan, TRUE), "confidence must be from 0 to 1"),
        (lambda: expected_calibration_error(ONES, TRUE, 0), "bins must be at least 1"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
