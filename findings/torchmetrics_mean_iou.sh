#!/usr/bin/env bash
# torchmetrics' MeanIoU is not the mIoU of segmentation papers; its MulticlassJaccardIndex is.
#
# Expected: torchmetrics.segmentation.MeanIoU, "mean Intersection over Union (mIoU) for semantic segmentation", adds up
#           pixels over the data set like the benchmarks of PASCAL VOC, Cityscapes and ADE20K, so that a class that one
#           image has in 1 pixel and another in 1,000 is scored by 1,001 pixels.
# Happens:  it computes the IoU of each image and averages over images, and a class that is in one image only
#           by mistake of the network counts there with 0. One wrong pixel of 1,000 costs 25 points below.
# Versions: torchmetrics 1.9.0, torch 2.13.0, numpy 2.4.6.
# Source:   torchmetrics/segmentation/mean_iou.py: update() adds scores of samples and counts samples. The docstring
#           gives no hint; per_class=True returns means over images too.
# Means:    numbers from MeanIoU cannot stand beside published ones. torchmetrics.classification.MulticlassJaccardIndex
#           adds up a confusion matrix, as the papers do.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

# Image 1 is all of class 0, with one pixel predicted as class 1; image 2 is half and half, and perfect.
target = torch.zeros(2, 10, 100, dtype=torch.long)
target[1, 5:] = 1
prediction = target.clone()
prediction[0, 0, 0] = 1


def score(metric, *images):
    for image in images:
        metric.update(prediction[image : image + 1], target[image : image + 1])
    return metric.compute().item()


matrix = torch.zeros(2, 2)
matrix.index_put_((target.flatten(), prediction.flatten()), torch.ones(target.numel()), accumulate=True)
paper = (matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())).mean().item()
mean_iou = score(MeanIoU(num_classes=2, input_format="index"), 0, 1)
jaccard = score(MulticlassJaccardIndex(num_classes=2), 0, 1)
print(f"from the confusion matrix {paper:.4f}, MulticlassJaccardIndex {jaccard:.4f}, MeanIoU {mean_iou:.4f}")

# The control: for one image the three agree.
assert score(MeanIoU(num_classes=2, input_format="index"), 1) == score(MulticlassJaccardIndex(num_classes=2), 1) == 1
assert abs(jaccard - paper) < 1e-6 and paper > 0.998
assert 0.74 < mean_iou < 0.76, mean_iou  # the surprise: ((0.999 + 0) / 2 + 1) / 2
PY
