#!/usr/bin/env bash
# pycocotools.mask.encode takes a label map, and returns the mask of something else.
#
# Expected: a uint8 array with values above 1 is an error, or everything that is not 0 is foreground.
# Happens:  the encoder starts a new run wherever the value *changes*, and counts every second run as foreground. So
#           0 5 5 0 and 0 255 255 0 are right, which is why tests pass, but where two labels touch, one of them is
#           background: 0 1 2 0 loses class 2, and turns the background after it into foreground.
# Versions: pycocotools 2.0.11, numpy 2.4.6.
# Source:   rleEncode in common/maskApi.c compares each pixel with the one before it ("if M[j] != p"), not with 0; the
#           docstring of pycocotools/mask.py says "binary masks" and checks only the dtype and the Fortran order.
# Means:    areas, boxes and IoU of an encoded instance or label map are wrong only where objects touch. Encode
#           np.asfortranarray(labels == k) for each k, also if "any label" is what is wanted: (labels > 0).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import numpy as np
from pycocotools import mask


def there_and_back(row):
    """A row of labels, encoded and decoded."""
    return mask.decode(mask.encode(np.asfortranarray(np.array([row], np.uint8))))[0].tolist()


for row in ([0, 5, 5, 0], [0, 1, 2, 0], [1, 2, 3, 4]):
    print(row, "->", there_and_back(row))

# The control: one label, whatever its number, is one object.
assert there_and_back([0, 1, 1, 0]) == there_and_back([0, 5, 5, 0]) == there_and_back([0, 255, 255, 0]) == [0, 1, 1, 0]
# The surprise: labels that touch.
assert there_and_back([0, 1, 2, 0]) == [0, 1, 0, 1]
assert there_and_back([1, 2, 3, 4]) == [1, 0, 1, 0]
# What to do.
assert [there_and_back([int(v == k) for v in (0, 1, 2, 0)]) for k in (1, 2)] == [[0, 1, 0, 0], [0, 0, 1, 0]]
PY
