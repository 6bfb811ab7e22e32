import math

import numpy as np
import pytest
import torch

from fastseg.functional import confusion_matrix
from fastseg.training import metrics


def test_scores_computed_by_hand():
    """Classes 0, 1, 2 and an absent 3; the last pixel is ignored."""
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 9]])
    pred = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 2]])
    matrix = confusion_matrix(pred, truth, 4, ignore_index=9)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    result = metrics.scores(matrix)
    assert result.global_accuracy == pytest.approx(4 / 7)
    assert result.class_accuracy == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert result.iou[:3] == pytest.approx((2 / 4, 2 / 5, 0)) and math.isnan(result.iou[3])
    assert result.miou == pytest.approx((2 / 4 + 2 / 5) / 3)
    assert result.frequency_weighted_iou == pytest.approx(3 / 7 * 2 / 4 + 3 / 7 * 2 / 5)


def test_a_class_that_is_only_predicted_counts_only_in_the_miou():
    result = metrics.scores(confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 3))
    assert result.miou == pytest.approx((2 / 3 + 0) / 2) and result.class_accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_scores_equal_counting_pixel_by_pixel(dtype, device):
    classes, shape = 5, (3, 17, 11)
    pred = torch.randint(0, classes, shape, dtype=dtype, device=device)
    truth = torch.randint(0, classes + 1, shape, dtype=dtype, device=device)
    want = np.zeros((classes, classes), int)
    for t, p in zip(truth.flatten().tolist(), pred.flatten().tolist(), strict=True):
        if t != classes:
            want[t, p] += 1
    matrix = confusion_matrix(pred, truth, classes, ignore_index=classes)
    assert matrix.tolist() == want.tolist() and matrix.device.type == device
    halves = [confusion_matrix(p, t, classes, classes) for p, t in zip(pred.split(2), truth.split(2), strict=True)]
    assert torch.equal(sum(halves), matrix)
    result = metrics.scores(matrix)
    for k in range(classes):
        intersection = ((pred == k) & (truth == k)).sum().item()
        union = (((pred == k) & (truth != classes)) | (truth == k)).sum().item()
        assert result.iou[k] == pytest.approx(intersection / union)


def test_invalid_labels_raise():
    one = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="pred must have the shape of target"):
        confusion_matrix(one, one[0], 2)
    with pytest.raises(ValueError, match="pred must hold integer labels"):
        confusion_matrix(one.float(), one, 2)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="target must hold labels from 0 to 1"):
            confusion_matrix(one, one + wrong, 2, ignore_index=255)
        with pytest.raises(ValueError, match="pred must hold labels from 0 to 1"):
            confusion_matrix(one + wrong, one, 2)


def test_without_a_pixel_to_score_the_scores_are_nan():
    ignored = torch.full((4,), 255)
    matrix = confusion_matrix(torch.zeros(4, dtype=torch.int64), ignored, 2, ignore_index=255)
    assert not matrix.any() and math.isnan(metrics.scores(matrix).miou)


def test_scores_as_a_dict_have_none_in_place_of_nan():
    result = metrics.scores(torch.tensor([[2, 0], [0, 0]])).as_dict(("road", "sky"))
    assert result["iou"] == {"road": 1.0, "sky": None} and result["miou"] == result["global_accuracy"] == 1
