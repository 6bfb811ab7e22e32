#!/usr/bin/env bash
# MONAI's Dice per class is 0 for a class that no picture has, although the prediction is perfect.
#
# Expected: DiceMetric leaves a class without ground truth out (its scores are NaN), as reduction="mean" does, so per
#           class (reduction="mean_batch") it reports NaN, or 1.
# Happens:  it reports 0, which looks like total failure. The mean of the reported classes is then 2/3 where
#           reduction="mean" says 1, for the same predictions.
# Versions: monai 1.6.1, torch 2.13.0, numpy 2.4.6.
# Source:   do_metric_reduction in monai/metrics/utils.py: torch.where(not_nans > 0, sum / not_nans, 0). The docstring
#           of DiceMetric says that NaN are left out, not what remains when all are.
# Means:    per-class tables of small validation sets understate rare classes. Use get_not_nans=True and drop the
#           classes whose count is 0, or reduction="none" and nanmean.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 monai==1.6.1 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import torch
from monai.metrics import DiceMetric

# Two pictures, one-hot in three classes; class 2 is in neither. The prediction is the ground truth.
labels = torch.zeros(2, 8, 8, dtype=torch.long)
labels[:, 2:5] = 1
truth = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()


def dice(reduction):
    """The result of DiceMetric, and the number of scores behind it."""
    metric = DiceMetric(include_background=True, reduction=reduction, get_not_nans=True)
    metric(truth, truth)
    return metric.aggregate()


overall, _ = dice("mean")
per_class, counts = dice("mean_batch")
scores, _ = dice("none")
print("mean:", overall.item(), " mean_batch:", per_class.tolist(), "counts:", counts.tolist())
print("mean of mean_batch:", per_class.mean().item(), " nanmean of none:", scores.nanmean(0).tolist())

assert overall.item() == 1 and scores[:, 2].isnan().all()  # the control: elsewhere the class is left out
assert per_class.tolist() == [1, 1, 0] and counts.tolist() == [2, 2, 0], per_class  # the surprise
PY
