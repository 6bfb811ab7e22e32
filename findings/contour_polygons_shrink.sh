#!/usr/bin/env bash
# A mask that goes through OpenCV's contour into a COCO polygon comes back smaller.
#
# Expected: cv2.findContours followed by pycocotools' frPyObjects is the usual way from a mask to a COCO annotation and
#           back, so it should return the mask, at least that of a square.
# Happens:  OpenCV's contour runs through the *centres* of the border pixels, COCO's polygon along the pixels' *edges*.
#           A square of 5x5 pixels comes back as 4x4, an IoU of 0.64, and one more round makes it 3x3. A line one pixel
#           wide vanishes. cv2.contourArea says 16 as well, but cv2.fillPoly of the same contour fills all 25.
# Versions: opencv-python-headless 5.0.0.93, pycocotools 2.0.11, numpy 2.4.6.
# Source:   the text of cv2.contourArea ("may be different from the number of non-zero pixels") and of fillPoly, which
#           includes the border; rleFrPoly in pycocotools' common/maskApi.c, in whose coordinates pixel (0, 0) spans
#           0 to 1. No page compares the two.
# Means:    thin classes (poles, lane marks, vessels) lose most of their area in exports, and "areas" by contourArea
#           disagree with the RLE's. Store RLE; or take contours of the mask enlarged s times, and map their points by
#           (p + 0.5) / s; with s = 8 both shapes below come back exactly.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 pycocotools==2.0.11 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import cv2
import numpy as np
from pycocotools import mask as coco


def there_and_back(mask, scale=1):
    """A mask by way of OpenCV's outer contours and COCO polygons. scale: enlarge it before the contours are taken."""
    large = np.kron(mask, np.ones((scale, scale), np.uint8))
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    shift = 0.5 if scale > 1 else 0
    polygons = [((contour.ravel() + shift) / scale).tolist() for contour in contours if len(contour) >= 3]
    if not polygons:
        return np.zeros_like(mask)
    return coco.decode(coco.merge(coco.frPyObjects(polygons, *mask.shape)))


square = np.zeros((12, 12), np.uint8)
square[3:8, 3:8] = 1
line = np.zeros((12, 12), np.uint8)
line[5, 2:10] = 1
contours, _ = cv2.findContours(square, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
filled = int(cv2.fillPoly(np.zeros_like(square), contours, 1).sum())
once = there_and_back(square)
twice = there_and_back(once)
iou = (square & once).sum() / (square | once).sum()
print("square:", square.sum(), "contourArea", cv2.contourArea(contours[0]), "fillPoly", filled)
print("after one round", once.sum(), f"(IoU {iou:.2f}),", "after two", twice.sum())
print("line of 8 pixels:", there_and_back(line).sum())
print("enlarged 8 times first:", there_and_back(square, 8).sum(), there_and_back(line, 8).sum())

assert filled == square.sum() == 25  # the control: OpenCV alone returns the mask
assert cv2.contourArea(contours[0]) == 16
assert (once.sum(), twice.sum(), there_and_back(line).sum()) == (16, 9, 0)  # the surprise
assert (there_and_back(square, 8) == square).all() and (there_and_back(line, 8) == line).all()  # what to do
PY
