#!/usr/bin/env bash
# MONAI's sliding window overwrites what the predictor returns, and so may overwrite the picture.
#
# Expected: the weighted mean of equal predictions is that prediction: with a predictor that returns its input, a
#           picture of ones comes back as ones, and stays as it was. That is how one tests a pipeline.
# Happens:  with sw_batch_size=1 the window is a view of the picture, and the returned tensor is multiplied by the
#           Gaussian weights in place: the picture is changed, windows that overlap see the changed pixels, and the
#           result is between 0.09 and 1. With sw_batch_size=2 the windows are copies, and the result is right.
# Versions: monai 1.6.1, torch 2.13.0, numpy 2.4.6.
# Source:   monai/inferers/utils.py, sliding_window_inference: "sw_device_buffer[ss] *= w_t". Not in its docstring.
# Means:    predictors that return a view of their input, or a tensor that they keep (a cache, a teacher's output, an
#           oracle of the ground truth, a channel of the picture passed through) must clone() it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 monai==1.6.1 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import torch
from monai.inferers import sliding_window_inference


def ranges(predictor, sw_batch_size, mode="gaussian"):
    """Smallest and largest value of the result, and of the picture afterwards."""
    picture = torch.ones(1, 1, 100, 100)
    result = sliding_window_inference(picture, (96, 96), sw_batch_size, predictor, overlap=0.25, mode=mode)
    return [round(value.item(), 3) for tensor in (result, picture) for value in tensor.aminmax()]


def identity(window):
    return window


cases = {
    "constant weights": ranges(identity, 1, "constant"),
    "Gaussian, two windows at a time": ranges(identity, 2),
    "Gaussian, one at a time, cloned": ranges(torch.clone, 1),
    "Gaussian, one at a time": ranges(identity, 1),
}
for name, (low, high, *picture) in cases.items():
    print(f"{name:32} result from {low} to {high}, picture afterwards from {picture[0]} to {picture[1]}")

*controls, surprise = cases.values()
assert controls == [[1, 1, 1, 1]] * 3, controls
assert surprise[0] < 0.1 and surprise[2] < 0.1, surprise
PY
