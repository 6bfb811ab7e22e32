#!/usr/bin/env bash
# segmentation-models-pytorch's cross-entropy also divides by ignored pixels, and its focal loss has no softmax.
#
# Expected: SoftCrossEntropyLoss, by its docstring a "drop-in replacement for torch.nn.CrossEntropyLoss", returns the
#           same number. FocalLoss("multiclass", gamma=0) is the cross-entropy.
# Happens:  SoftCrossEntropyLoss divides by all pixels, the ignored ones too: with half of them ignored the loss is half
#           as large. Without ignored pixels it is right. FocalLoss runs one *sigmoid* per class (one against
#           the rest) and averages over classes; adding a constant to all logits of a pixel, which no softmax notices,
#           changes it.
# Versions: segmentation-models-pytorch 0.6.0, torch 2.13.0, numpy 2.4.6.
# Source:   label_smoothed_nll_loss in segmentation_models_pytorch/losses/_functional.py (masked_fill, then mean());
#           FocalLoss.forward in losses/focal.py (a loop over the classes).
# Means:    with padding or void labels the weight of the loss depends on how much of a batch is void. Scores of a
#           network trained with FocalLoss are sigmoids: a softmax over them is not the probability that was trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
# The losses need torch alone; the rest of the package would bring torchvision, timm and their downloads.
"$work/venv/bin/pip" install --quiet --no-deps segmentation-models-pytorch==0.6.0
package=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/segmentation_models_pytorch

PYTHONPATH=$package "$work/venv/bin/python" - <<'PY'
import torch
from losses import FocalLoss, SoftCrossEntropyLoss  # segmentation_models_pytorch.losses
from torch.nn import functional as F

torch.manual_seed(0)
logits = torch.randn(2, 3, 16, 16)
labels = torch.randint(3, (2, 16, 16))
half_void = labels.clone()
half_void[:, :8] = 255

soft = SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=255)
focal = FocalLoss("multiclass", gamma=0.0)
torch_full, torch_half = (F.cross_entropy(logits, t, ignore_index=255).item() for t in (labels, half_void))
soft_full, soft_half = soft(logits, labels).item(), soft(logits, half_void).item()
sigmoids = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).movedim(-1, 1).float()).item()
focal_loss, focal_shifted = focal(logits, labels).item(), focal(logits + 5, labels).item()
print(f"no void pixels:   torch {torch_full:.4f}, SoftCrossEntropyLoss {soft_full:.4f}")
print(f"half of them void: torch {torch_half:.4f}, SoftCrossEntropyLoss {soft_half:.4f}")
print(f"FocalLoss, gamma 0: {focal_loss:.4f}, logits + 5: {focal_shifted:.4f}; mean of sigmoid losses {sigmoids:.4f}")

assert abs(soft_full - torch_full) < 1e-5  # the control
assert abs(soft_half - torch_half / 2) < 1e-5, soft_half  # the surprise
assert abs(F.cross_entropy(logits + 5, labels).item() - torch_full) < 1e-5  # the control: softmax ignores the shift
assert abs(focal_loss - sigmoids) < 1e-5 and focal_shifted > 2 * focal_loss, (focal_loss, focal_shifted)
PY
