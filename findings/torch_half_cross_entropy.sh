#!/usr/bin/env bash
# On a CPU, the mean cross-entropy of a float16 picture of 256x256 pixels is NaN, and its gradient is zero.
#
# Expected: the mean of numbers between 0 and 10 is a number between 0 and 10. PyTorch's sums of half-precision tensors
#           accumulate in float32, and torch.nn.functional.cross_entropy supports float16 on CPUs.
# Happens:  the loss kernel for pictures adds the losses, and counts the pixels, in the dtype of the logits. 65,536
#           pixels overflow float16 (largest number 65,504): inf / inf is NaN. The gradient is 1 / inf: exactly zero, so
#           training goes on, without NaN in the weights and without learning. In bfloat16 the loss is about
#           1 % off at these sizes, while its gradient is right.
# Versions: torch 2.13.0 (CPU).
# Source:   aten/src/ATen/native/LossNLL2d.cpp: loss_partial_sums and total_weight_val have the type scalar_t.
#           Under torch.autocast the loss runs in float32, so the problem shows only in models that were converted with
#           .half() or .bfloat16().
# Means:    convert the logits, cross_entropy(logits.float(), ...), which costs a copy, or take the mean of
#           reduction="none" in float32. A loss that is logged in bfloat16 on a CPU is not comparable across sizes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import torch
from torch.nn.functional import cross_entropy

torch.manual_seed(0)


def loss_and_gradient(dtype, side, convert=False):
    """The mean loss of side x side pixels and 19 classes, and the sum of the absolute gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 19, side, side, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(19, (1, side, side), generator=generator)
    loss = cross_entropy(logits.float() if convert else logits, target)
    loss.backward()
    return loss.item(), logits.grad.double().abs().sum().item()


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for side in (128, 256, 1024):
        loss, gradient = loss_and_gradient(dtype, side)
        print(f"{str(dtype):15} {side:4} x {side:<4}  loss {loss:.4f}  sum of |gradient| {gradient:.4f}")

right, slope = loss_and_gradient(torch.float32, 256)
# The controls: a smaller picture, and the same logits converted to float32.
assert abs(loss_and_gradient(torch.float16, 128)[0] - right) < 0.01
converted, slope_converted = loss_and_gradient(torch.float16, 256, convert=True)
assert abs(converted - right) < 0.001 and abs(slope_converted - slope) < 0.01
# The surprise.
loss, gradient = loss_and_gradient(torch.float16, 256)
assert loss != loss and gradient == 0, (loss, gradient)
off = [loss_and_gradient(torch.bfloat16, side)[0] / loss_and_gradient(torch.float32, side)[0] - 1 for side in (256, 1024)]
assert all(0.005 < part < 0.03 for part in off), off  # rounding to bfloat16's 8 bits explains at most 0.004
PY
